"""Floating-point operations of a training step, counted on the operations themselves, not from a formula."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.task import Batch, Task


def step_flop(task: Task, batch: Batch, *, turn: str = "model") -> int:
    """Of the products (a multiplication and an addition are two) in a forward and a backward pass.

    Attention counts whole, with what causality hides; additions, norms and the optimizer do not count.

    Args:
        task: Its modules' gradients are lost.
        batch: On the modules' device.
        turn: Which module learns.
    """
    module = task.modules()[turn]
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    training = module.training
    module.train()
    counter = FlopCounterMode(display=False)
    # Only as plain products is attention counted on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = task.loss(turn, batch, step=0, generator=generator)
        loss.backward()
    module.zero_grad(set_to_none=True)
    module.train(training)
    return int(counter.get_total_flops())
