"""Operations of a step, against products counted by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.support.toy_task import ToyTask
from training.flops import step_flop
from training.task import Task


class Counted(ToyTask):
    """A task of which only modules and loss are asked."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def modules(self):  # type: ignore[no-untyped-def]
        return {"model": self.module}

    def loss(self, turn, batch, *, step, generator):  # type: ignore[no-untyped-def]
        return self.module(batch["x"]).square().sum(), {}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_linear_layer() -> None:
    task: Task = Counted(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    # Backward: the weights' gradients of both, and the gradient of the second layer's input.
    assert step_flop(task, {"x": torch.randn(5, 8)}) == 2 * forward + 2 * 5 * 16 * 4
    assert all(p.grad is None for p in task.modules()["model"].parameters())


def test_attention_counts_on_the_cpu() -> None:
    batch, length, dim = 2, 6, 8
    linear = 2 * batch * length * dim * 3 * dim
    products = 2 * 2 * batch * length * length * dim  # scores, and weighted sums of values
    found = step_flop(Counted(Attention(dim, 2)), {"x": torch.randn(batch, length, dim)})
    assert found == 2 * linear + 3 * products
