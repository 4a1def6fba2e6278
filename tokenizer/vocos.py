"""The decoder of DashengTokenizer: Vocos (arXiv 2306.00814), ConvNeXt blocks and an inverse STFT, in both directions.

Modules carry the names of the published checkpoint. Its convolutions are centred, and its synthesis windows too
(Vocos' "same" padding). The causal form pads on the left alone and starts window h at sample h * hop_length, so that a
sample depends on present and past hops only. Weights fit both, but sound only in the form that they were trained in.

Shapes: B batch, H hops, C channels, S samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_MAGNITUDE = 100.0


class VocosState(NamedTuple):
    """What the causal form remembers: inputs of its convolutions, and the windows' tails past the last hop."""

    embed: Tensor
    blocks: list[Tensor]
    tail: Tensor


class Block(nn.Module):
    """ConvNeXt block of Vocos: x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden_dim)
        self.pwconv2 = nn.Linear(hidden_dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(
        self, x: Float[Tensor, "B H C"], past: Float[Tensor, "B P C"] | None, causal: bool
    ) -> tuple[Float[Tensor, "B H C"], Float[Tensor, "B P2 C"]]:
        # In float32 also under autocast: depthwise bfloat16 kernels are several times slower on a CPU.
        with torch.autocast(x.device.type, enabled=False):
            y, past = convolve(self.dwconv, x.float(), past, causal)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + self.gamma * y, past


class Backbone(nn.Module):
    def __init__(self, input_dim: int, dim: int, hidden_dim: int, num_blocks: int, kernel_size: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(input_dim, dim, kernel_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(
            Block(dim, hidden_dim, kernel_size, scale=1.0 / num_blocks) for _ in range(num_blocks)
        )
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class Head(nn.Module):
    """Log-magnitudes and phases of overlapping windows, and their sum."""

    window: Tensor

    def __init__(self, dim: int, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.out = nn.Linear(dim, n_fft + 2)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def windows(self, x: Float[Tensor, "B H C"]) -> Float[Tensor, "B H N"]:
        """w * irfft(exp(m) e^{ip}), the magnitude at most 100."""
        log_magnitude, phase = self.out(x).float().chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.clamp(max=math.log(MAX_MAGNITUDE)).exp(), phase)
        return torch.fft.irfft(spectrum, n=self.n_fft) * self.window

    def centred(self, x: Float[Tensor, "B H C"]) -> Float[Tensor, "B S"]:
        """Windows centred on their hops ("same" padding), divided by the sum of squared windows."""
        margin = (self.n_fft - self.hop_length) // 2
        summed = overlap_add(self.windows(x), self.hop_length)
        squares = self.window.square().expand(1, x.shape[1], -1)
        envelope = overlap_add(squares, self.hop_length)
        return (summed / envelope.clamp(min=1e-11))[:, margin : summed.shape[1] - margin]

    def causal(
        self, x: Float[Tensor, "B H C"], tail: Float[Tensor, "B N"] | None
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B N"]]:
        """Windows that start at their hops, divided by the sum of squares where all of them overlap."""
        length = x.shape[1] * self.hop_length
        summed = overlap_add(self.windows(x), self.hop_length)
        if tail is not None:
            summed = summed + F.pad(tail, (0, summed.shape[1] - tail.shape[1]))
        envelope = self.window.square().reshape(-1, self.hop_length).sum(dim=0).repeat(x.shape[1])
        return summed[:, :length] / envelope, summed[:, length:]


class Vocos(nn.Module):
    """Hops of features to samples; H * hop_length of them.

    Args:
        input_dim: Channels of a hop.
        dim: Width of the blocks.
        hidden_dim: Width inside a block.
        num_blocks: Number of blocks.
        kernel_size: Of the convolutions over hops, odd.
        n_fft: Length of a synthesis window, a multiple of `hop_length`.
        hop_length: Samples a hop.
        causal: See the module's docstring.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        dim: int,
        hidden_dim: int,
        num_blocks: int,
        kernel_size: int,
        n_fft: int,
        hop_length: int,
        causal: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.backbone = Backbone(input_dim, dim, hidden_dim, num_blocks, kernel_size)
        self.head = Head(dim, n_fft, hop_length)
        edge = -(-(n_fft - hop_length) // (2 * hop_length))
        self.reach_hops = 0 if causal else (kernel_size // 2) * (1 + num_blocks) + edge
        """Hops after (and before, when centred) a sample's own that it depends on."""

    def forward(
        self, x: Float[Tensor, "B H C"], state: VocosState | None = None
    ) -> tuple[Float[Tensor, "B S"], VocosState | None]:
        """Samples of all hops; the state goes on from the hops before, in the causal form alone."""
        assert state is None or self.causal, "the centred form has no state"
        x, embed = convolve(self.backbone.embed, x, state.embed if state else None, self.causal)
        x = self.backbone.norm(x)
        blocks = []
        for index, block in enumerate(self.backbone.convnext):
            x, past = block(x, state.blocks[index] if state else None, self.causal)
            blocks.append(past)
        x = self.backbone.final_layer_norm(x)
        if not self.causal:
            return self.head.centred(x), None
        waveform, tail = self.head.causal(x, state.tail if state else None)
        return waveform, VocosState(embed, blocks, tail)


def convolve(
    layer: nn.Conv1d, x: Float[Tensor, "B H C"], past: Float[Tensor, "B P C"] | None, causal: bool
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B P2 C"]]:
    """Convolve over hops, zeros outside; also returns the last inputs, which the causal form's next call needs."""
    reach = layer.kernel_size[0] - 1
    if causal:
        x = torch.cat([x.new_zeros(x.shape[0], reach, x.shape[2]) if past is None else past.to(x.dtype), x], dim=1)
        past = x[:, x.shape[1] - reach :]
    else:
        x, past = F.pad(x, (0, 0, reach // 2, reach // 2)), x[:, :0]
    return layer(x.transpose(1, 2)).transpose(1, 2), past


def overlap_add(windows: Float[Tensor, "B H N"], hop_length: int) -> Float[Tensor, "B S"]:
    """Add window h at sample h * hop_length; S = (H - 1) * hop_length + N."""
    batch, num_hops, width = windows.shape
    length = (num_hops - 1) * hop_length + width
    columns = windows.transpose(1, 2)
    return F.fold(columns, output_size=(1, length), kernel_size=(1, width), stride=(1, hop_length)).reshape(
        batch, length
    )
