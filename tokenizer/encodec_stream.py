"""EnCodec's SEANet run in pieces (see `streaming`).

The layers are the `encodec` package's own modules; only their padding is replaced. The package pads the left edge of
every convolution by reflection, so a stream holds a convolution's first `left` inputs back until one more has arrived;
from then on an output leaves with its last input. In SEANet's hop of 320 samples only the convolutions at the frame
rate (kernel 7) hold whole frames back: six.
"""

from __future__ import annotations

from encodec.modules import SConv1d, SConvTranspose1d, SEANetDecoder, SEANetEncoder
from encodec.modules.lstm import SLSTM
from encodec.modules.seanet import SEANetResnetBlock
from torch import nn

from tokenizer.streaming import (
    Chain,
    ConvStream,
    LayerStream,
    LSTMStream,
    PointwiseStream,
    ResidualStream,
    TransposedConvStream,
)


def stream_seanet(network: SEANetEncoder | SEANetDecoder) -> Chain:
    """A fresh stream through a causal SEANet encoder or decoder."""
    return Chain(stream_layer(layer) for layer in network.model)


def stream_layer(layer: nn.Module) -> LayerStream:
    """The streaming form of one of SEANet's layers."""
    if isinstance(layer, SConv1d):
        conv = layer.conv.conv
        assert isinstance(conv, nn.Conv1d)
        left = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
        return ConvStream(conv, left=left, mode=layer.pad_mode)
    if isinstance(layer, SConvTranspose1d):
        conv = layer.convtr.convtr
        assert isinstance(conv, nn.ConvTranspose1d)
        assert layer.trim_right_ratio == 1.0
        return TransposedConvStream(conv, left=0, right=conv.stride[0])
    if isinstance(layer, SLSTM):
        return LSTMStream(layer.lstm, skip=layer.skip)
    if isinstance(layer, SEANetResnetBlock):
        return ResidualStream(Chain(stream_layer(inner) for inner in layer.block), stream_layer(layer.shortcut))
    if isinstance(layer, nn.ELU | nn.Identity):
        return PointwiseStream(layer)
    raise TypeError(f"no streaming form of {type(layer).__name__}: not a layer of EnCodec's 24 kHz model")
