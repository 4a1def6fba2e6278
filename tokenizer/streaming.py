"""Convolutional networks run in pieces: each layer keeps what the next piece needs, so any pieces give one result.

A layer's stream holds an output back until the last input that it depends on has arrived. Two things make a layer wait:
padding on the right (its outputs look ahead), and a left edge padded by reflection (the first outputs need `left`
inputs *after* them). `inputs_for` tells how long, and from it follows how far a whole network looks ahead.

Shapes: B batch, C channels, L steps at the layer's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class LayerStream(Protocol):
    """One layer on its way through one recording (or a batch of one length)."""

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        """Take (B, C, L), L >= 0, and whether the stream ends; return the outputs that became final."""
        ...

    def inputs_for(self, outputs: int) -> int:
        """Inputs that must have arrived before the first `outputs` outputs leave, in mid-stream."""
        ...


class Chain:
    """Layers one after the other."""

    def __init__(self, layers: Iterable[LayerStream]) -> None:
        self.layers = list(layers)

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, last)
        return x

    def inputs_for(self, outputs: int) -> int:
        for layer in reversed(self.layers):
            outputs = layer.inputs_for(outputs)
        return outputs


class PointwiseStream:
    """A layer whose output at a step depends on that step alone."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        return self.layer(x) if x.shape[-1] else x

    def inputs_for(self, outputs: int) -> int:
        return outputs


class ConvStream:
    """A convolution, strided or dilated, over an input padded at both ends; the module's own padding is not used.

    Args:
        conv: Weights, stride, dilation and groups.
        left: Steps of padding before the recording.
        right: Steps of zeros after it.
        mode: Of the padding on the left: "constant" (zeros), "replicate" or "reflect".
    """

    def __init__(self, conv: nn.Conv1d, *, left: int, right: int = 0, mode: str = "constant") -> None:
        self.conv = conv
        self.span = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        self.stride = conv.stride[0]
        self.left, self.right, self.mode = left, right, mode
        self.first = left + 1 if mode == "reflect" else 1
        self.buffer: Tensor | None = None
        self.started = False

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        buffer = x if self.buffer is None else torch.cat([self.buffer, x], dim=-1)
        if not self.started and (buffer.shape[-1] >= self.first or (last and buffer.shape[-1] > 0)):
            buffer = pad_left(buffer, self.left, self.mode)
            self.started = True
        if self.started and last:
            buffer = F.pad(buffer, (0, self.right))
        steps = (buffer.shape[-1] - self.span) // self.stride + 1 if self.started else 0
        if steps <= 0:
            self.buffer = buffer
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        self.buffer = buffer[..., steps * self.stride :]
        window = buffer[..., : (steps - 1) * self.stride + self.span]
        conv = self.conv
        return F.conv1d(window, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def inputs_for(self, outputs: int) -> int:
        return max((outputs - 1) * self.stride + self.span - self.left, self.first) if outputs > 0 else 0


class TransposedConvStream:
    """A transposed convolution whose kernel spans two strides: an output needs its own input and the one before.

    Args:
        conv: Weights, stride and groups.
        left: Outputs cut off at the start.
        right: Outputs cut off at the end; a full stride makes the layer causal.
    """

    def __init__(self, conv: nn.ConvTranspose1d, *, left: int, right: int) -> None:
        assert conv.kernel_size[0] == 2 * conv.stride[0]
        assert min(left, right) >= 0 and max(left, right) <= conv.stride[0]
        self.conv, self.left, self.right = conv, left, right
        self.stride = conv.stride[0]
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        length = x.shape[-1] * self.stride
        if self.previous is None and length == 0:
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        start = self.left if self.previous is None else self.stride
        end = length + (0 if self.previous is None else self.stride) + (self.stride - self.right if last else 0)
        inputs = x if self.previous is None else torch.cat([self.previous, x], dim=-1)
        self.previous = inputs[..., -1:]
        conv = self.conv
        outputs = F.conv_transpose1d(inputs, conv.weight, conv.bias, conv.stride, 0, 0, conv.groups)
        return outputs[..., start:end]

    def inputs_for(self, outputs: int) -> int:
        return -(-(outputs + self.left) // self.stride) if outputs > 0 else 0


class LSTMStream:
    """A recurrent layer, with its input added to its output where `skip` says so."""

    def __init__(self, lstm: nn.LSTM, *, skip: bool = True) -> None:
        self.lstm = lstm
        self.skip = skip
        self.state: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[-1] == 0:
            return x
        steps = x.permute(2, 0, 1)  # (L, B, C)
        y, self.state = self.lstm(steps, self.state)
        return (y + steps if self.skip else y).permute(1, 2, 0)

    def inputs_for(self, outputs: int) -> int:
        return outputs


class ChunkStream:
    """A network that takes its input in chunks of one length, each for itself; the last one may be shorter.

    Args:
        network: From one chunk of inputs to its outputs.
        inputs: Steps of a whole chunk.
        outputs: Steps that they become.
        channels: Of the outputs.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], inputs: int, outputs: int, channels: int) -> None:
        self.network, self.inputs, self.outputs, self.channels = network, inputs, outputs, channels
        self.buffer: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        buffer = x if self.buffer is None else torch.cat([self.buffer, x], dim=-1)
        whole = buffer.shape[-1] if last else buffer.shape[-1] // self.inputs * self.inputs
        self.buffer = buffer[..., whole:]
        if whole == 0:
            return x.new_zeros(x.shape[0], self.channels, 0)
        return torch.cat([self.network(chunk) for chunk in buffer[..., :whole].split(self.inputs, dim=-1)], dim=-1)

    def inputs_for(self, outputs: int) -> int:
        return -(-outputs // self.outputs) * self.inputs


class ResidualStream:
    """Shortcut plus block. The shortcut holds nothing back, so its outputs wait here for the block's."""

    def __init__(self, block: LayerStream, shortcut: LayerStream) -> None:
        self.block, self.shortcut = block, shortcut
        self.waiting: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        y = self.block(x, last)
        straight = self.shortcut(x, last)
        if self.waiting is not None:
            straight = torch.cat([self.waiting, straight], dim=-1)
        self.waiting = straight[..., y.shape[-1] :]
        return straight[..., : y.shape[-1]] + y

    def inputs_for(self, outputs: int) -> int:
        return max(self.block.inputs_for(outputs), self.shortcut.inputs_for(outputs))


def pad_left(x: Tensor, left: int, mode: str) -> Tensor:
    """Pad the left edge; what is too short to reflect is first continued with zeros, which are dropped again."""
    if left == 0:
        return x
    if mode != "reflect":
        return F.pad(x, (left, 0), mode)
    length = x.shape[-1]
    return F.pad(F.pad(x, (0, max(0, left + 1 - length))), (left, 0), mode)[..., : left + length]


def lookahead(network: LayerStream, hop_length: int, *, frames: int = 64) -> int:
    """How many frames ahead a frame may depend on samples, at most, for a network from samples to frames.

    Args:
        network: A fresh stream.
        hop_length: Samples per frame.
        frames: How many frames from the start to look at; past the edge it is the same for all.
    """
    return max(-(-network.inputs_for(t + 1) // hop_length) - (t + 1) for t in range(frames))
