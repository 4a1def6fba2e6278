"""Causal ConvNeXt blocks on channels-last sequences, with streaming state as an argument.

Shapes: B batch, T frames, C channels. A module's state is what it must remember of the past; `None` is the start of a
recording. Every forward returns `(output, state)`, so that the same code serves training, offline use and streaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CausalDepthwiseConv(nn.Module):
    """Depthwise convolution that sees the present frame and `kernel_size - 1` past ones."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.trunc_normal_(self.weight, std=kernel_size**-0.5)

    def forward(
        self, x: Float[Tensor, "B T C"], state: Float[Tensor, "B past C"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B past C"]]:
        past = self.kernel_size - 1
        if state is None:
            state = x.new_zeros(x.shape[0], past, x.shape[2])
        x = torch.cat([state, x], dim=1)
        # (B, T, C) seen as a channels-last image (B, C, 1, T): no copy, and the fast depthwise kernels on CPU and GPU.
        # In float32 also under autocast: the bfloat16 depthwise kernel is several times slower on a CPU.
        with torch.autocast(x.device.type, enabled=False):
            image = x.float().transpose(1, 2).unsqueeze(2)
            y = F.conv2d(image, self.weight.float(), self.bias.float(), groups=x.shape[2])
        return y.squeeze(2).transpose(1, 2), x[:, x.shape[1] - past :]


class ConvNeXtBlock(nn.Module):
    """ConvNeXt (arXiv 2201.03545) in the causal, one-dimensional form that Vocos (arXiv 2306.00814) uses."""

    def __init__(self, channels: int, *, expansion: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.mix_time = CausalDepthwiseConv(channels, kernel_size)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, expansion * channels)
        self.contract = nn.Linear(expansion * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Float[Tensor, "B T C"], state: Tensor | None = None) -> tuple[Float[Tensor, "B T C"], Tensor]:
        y, state = self.mix_time(x, state)
        # The tanh form: the exact GELU costs more than both products in bfloat16 on a CPU.
        y = self.contract(F.gelu(self.expand(self.norm(y)), approximate="tanh"))
        return x + self.scale * y, state


class ConvNeXtStack(nn.Module):
    """`num_blocks` blocks and a final LayerNorm; its state is the list of the blocks' states."""

    def __init__(self, channels: int, *, num_blocks: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(channels, expansion=expansion, kernel_size=kernel_size, scale=1.0 / max(1, num_blocks))
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, x: Float[Tensor, "B T C"], state: list[Tensor] | None = None
    ) -> tuple[Float[Tensor, "B T C"], list[Tensor]]:
        past: list[Tensor | None] = [None] * len(self.blocks) if state is None else list(state)
        present = []
        for block, block_state in zip(self.blocks, past, strict=True):
            x, new_state = block(x, block_state)
            present.append(new_state)
        return self.norm(x), present
