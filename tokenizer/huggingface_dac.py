"""The Descript Audio Codec (arXiv 2306.06546) in the form of `transformers`, at 16, 24 or 44.1 kHz.

Its convolutions are centred, so frames look ahead and a decoder needs frames after those whose samples it gives. The
reach is finite: a stream holds that much back and gives the same result.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DacConfig, DacModel
from transformers.models.dac.modeling_dac import DacDecoderBlock, DacEncoderBlock, DacResidualUnit, Snake1d

from tokenizer.streaming import Chain, ConvStream, LayerStream, PointwiseStream, ResidualStream, TransposedConvStream

FIELDS: tuple[str, ...] = (
    *("encoder_hidden_size", "downsampling_ratios", "decoder_hidden_size", "n_codebooks", "codebook_size"),
    *("codebook_dim", "sampling_rate"),
)


class DacCodec:
    """See `tokenizer.huggingface_codec.Codec`."""

    def __init__(self, config: Mapping[str, Any], num_codebooks: int | None) -> None:
        settings = DacConfig(**{name: config[name] for name in FIELDS if name in config})
        self.model = DacModel(settings)
        self.sample_rate_hz = settings.sampling_rate
        self.hop_length = math.prod(settings.downsampling_ratios)
        self.available_codebooks = settings.n_codebooks
        self.num_codebooks = num_codebooks or self.available_codebooks
        self.codebook_size = settings.codebook_size
        self.latent_dim = self.model.encoder.conv2.out_channels
        self.model.quantizer.quantizers = self.model.quantizer.quantizers[: self.num_codebooks]

    def encoder(self) -> Chain:
        network = self.model.encoder
        return _chain(network.conv1, *network.block, network.snake1, network.conv2)

    def decoder(self) -> Chain:
        network = self.model.decoder
        return _chain(network.conv1, *network.block, network.snake1, network.conv2, network.tanh)

    def quantize(self, latents: Float[Tensor, "B D T"]) -> Int[Tensor, "B K T"]:
        return self.model.quantizer(latents)[1]

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B D T"]:
        return self.model.quantizer.from_codes(codes)[0]


def _chain(*layers: nn.Module) -> Chain:
    return Chain(_stream(layer) for layer in layers)


def _stream(layer: nn.Module) -> LayerStream:
    if isinstance(layer, nn.Conv1d):
        assert isinstance(layer.padding, tuple)
        return ConvStream(layer, left=layer.padding[0], right=layer.padding[0])
    if isinstance(layer, nn.ConvTranspose1d):
        assert isinstance(layer.padding, tuple)
        return TransposedConvStream(layer, left=layer.padding[0], right=layer.padding[0])
    if isinstance(layer, DacResidualUnit):
        return ResidualStream(_chain(layer.snake1, layer.conv1, layer.snake2, layer.conv2), Chain([]))
    if isinstance(layer, DacEncoderBlock):
        return _chain(layer.res_unit1, layer.res_unit2, layer.res_unit3, layer.snake1, layer.conv1)
    if isinstance(layer, DacDecoderBlock):
        return _chain(layer.snake1, layer.conv_t1, layer.res_unit1, layer.res_unit2, layer.res_unit3)
    if isinstance(layer, Snake1d | nn.Tanh):
        return PointwiseStream(layer)
    raise TypeError(f"no streaming form of {type(layer).__name__}: not a layer of DAC")
