"""EnCodec's SEANet run in pieces: each layer keeps what the next piece needs, so pieces of any size give one result.

The layers are the `encodec` package's own modules; only their padding is replaced. The package pads the left edge of
every convolution by reflection, so a convolution's first outputs need `left` inputs *after* them. A stream therefore
holds a convolution's first `left` inputs back until one more has arrived; from then on an output leaves with its last
input. In SEANet's hop of 320 samples only the convolutions at the frame rate (kernel 7) hold whole frames back: six.

Shapes: B batch, C channels, L steps at the layer's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from encodec.modules import SConv1d, SConvTranspose1d, SEANetDecoder, SEANetEncoder
from encodec.modules.conv import pad1d
from encodec.modules.lstm import SLSTM
from encodec.modules.seanet import SEANetResnetBlock
from torch import Tensor, nn

LayerStream: TypeAlias = Callable[[Tensor, bool], Tensor]
"""Takes (B, C, L), L >= 0, and whether the stream ends; returns the outputs that became final."""


class Chain:
    """Layers one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = [stream_layer(layer) for layer in layers]

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, last)
        return x


def stream_seanet(network: SEANetEncoder | SEANetDecoder) -> Chain:
    """A fresh stream through a causal SEANet encoder or decoder."""
    return Chain(network.model)


def stream_layer(layer: nn.Module) -> LayerStream:
    """The streaming form of one of SEANet's layers."""
    if isinstance(layer, SConv1d):
        return ConvStream(layer)
    if isinstance(layer, SConvTranspose1d):
        return TransposedConvStream(layer)
    if isinstance(layer, SLSTM):
        return LSTMStream(layer)
    if isinstance(layer, SEANetResnetBlock):
        return ResidualStream(layer)
    if isinstance(layer, nn.ELU | nn.Identity):
        return PointwiseStream(layer)
    raise TypeError(f"no streaming form of {type(layer).__name__}: not a layer of EnCodec's 24 kHz model")


class PointwiseStream:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        return self.layer(x)


class ConvStream:
    """A causal convolution, strided or dilated; `left` is its padding at the start of the recording."""

    def __init__(self, layer: SConv1d) -> None:
        assert isinstance(layer.conv.conv, nn.Conv1d)
        self.conv = layer.conv.conv
        self.pad_mode = layer.pad_mode
        self.span = (self.conv.kernel_size[0] - 1) * self.conv.dilation[0] + 1
        self.stride = self.conv.stride[0]
        self.left = self.span - self.stride
        self.buffer: Tensor | None = None
        self.started = self.left == 0

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        buffer = x if self.buffer is None else torch.cat([self.buffer, x], dim=-1)
        length = buffer.shape[-1]
        if not self.started and (length > self.left or (last and length > 0)):
            buffer = pad1d(buffer, (self.left, 0), mode=self.pad_mode)
            self.started = True
        steps = (buffer.shape[-1] - self.span) // self.stride + 1 if self.started else 0
        if steps <= 0:
            self.buffer = buffer
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        self.buffer = buffer[..., steps * self.stride :]
        return self.conv(buffer[..., : (steps - 1) * self.stride + self.span])


class TransposedConvStream:
    """A transposed convolution whose kernel spans two strides: an output needs its own input and the one before."""

    def __init__(self, layer: SConvTranspose1d) -> None:
        assert isinstance(layer.convtr.convtr, nn.ConvTranspose1d)
        self.conv = layer.convtr.convtr
        self.stride = self.conv.stride[0]
        assert self.conv.kernel_size[0] == 2 * self.stride
        assert layer.trim_right_ratio == 1.0
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        length = x.shape[-1]
        if length == 0:
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        skip = 0 if self.previous is None else self.stride
        inputs = x if self.previous is None else torch.cat([self.previous, x], dim=-1)
        self.previous = x[..., -1:]
        return self.conv(inputs)[..., skip : skip + length * self.stride]


class LSTMStream:
    def __init__(self, layer: SLSTM) -> None:
        self.lstm: nn.LSTM = layer.lstm
        self.skip = layer.skip
        self.state: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[-1] == 0:
            return x
        steps = x.permute(2, 0, 1)  # (L, B, C)
        y, self.state = self.lstm(steps, self.state)
        return (y + steps if self.skip else y).permute(1, 2, 0)


class ResidualStream:
    """Shortcut plus block. A piece is empty or at least 8 steps long here, and the block holds back none of that."""

    def __init__(self, layer: SEANetResnetBlock) -> None:
        self.block = Chain(layer.block)
        self.shortcut = stream_layer(layer.shortcut)

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        return self.shortcut(x, last) + self.block(x, last)
