"""Streams through the SEANet layers of `transformers`, which EnCodec and Mimi share (see `streaming`)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiConvTranspose1d, MimiResnetBlock

from tokenizer.streaming import (
    Chain,
    ConvStream,
    LayerStream,
    LSTMStream,
    PointwiseStream,
    ResidualStream,
    TransposedConvStream,
)

LAYER_FIELDS: tuple[str, ...] = (
    *("sampling_rate", "hidden_size", "num_filters", "num_residual_layers", "upsampling_ratios", "kernel_size"),
    *("last_kernel_size", "residual_kernel_size", "dilation_growth_rate", "use_causal_conv", "pad_mode", "compress"),
    *("trim_right_ratio", "use_conv_shortcut", "codebook_size", "codebook_dim", "audio_channels"),
)
"""Fields of both configurations that decide what the networks compute."""


def stream_layer(layer: nn.Module) -> LayerStream:
    """The streaming form of one layer of a causal SEANet."""
    if isinstance(layer, EncodecConv1d | MimiConv1d):
        return _conv(layer)
    if isinstance(layer, EncodecConvTranspose1d | MimiConvTranspose1d):
        stride = layer.conv.stride[0]
        right = math.ceil(stride * layer.trim_right_ratio)
        return TransposedConvStream(layer.conv, left=stride - right, right=right)
    if isinstance(layer, EncodecLSTM):
        return LSTMStream(layer.lstm)
    if isinstance(layer, EncodecResnetBlock | MimiResnetBlock):
        return ResidualStream(Chain(stream_layer(inner) for inner in layer.block), stream_layer(layer.shortcut))
    if isinstance(layer, nn.ELU | nn.Identity):
        return PointwiseStream(layer)
    raise TypeError(f"no streaming form of {type(layer).__name__}: not a layer of SEANet")


def _conv(layer: Any) -> ConvStream:
    conv = layer.conv
    left = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
    return ConvStream(conv, left=left, mode=layer.pad_mode)
