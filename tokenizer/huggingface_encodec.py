"""EnCodec (arXiv 2210.13438) in the form of `transformers`: the causal mono model at 24 kHz, as one stream.

The 48 kHz model, which works on chunks, stands in `huggingface_encodec_chunks`.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import EncodecConfig, EncodecModel

from tokenizer.errors import UserError
from tokenizer.huggingface_seanet import LAYER_FIELDS, stream_layer
from tokenizer.streaming import Chain

FIELDS: tuple[str, ...] = (
    *(*LAYER_FIELDS, "target_bandwidths", "norm_type", "normalize", "chunk_length_s", "overlap", "num_lstm_layers"),
)


class EncodecCodec:
    """See `tokenizer.huggingface_codec.Codec`."""

    def __init__(self, config: Mapping[str, Any], num_codebooks: int | None) -> None:
        settings = EncodecConfig(**{name: config[name] for name in FIELDS if name in config})
        self.check(settings)
        self.model = EncodecModel(settings)
        for module in self.model.modules():  # its gain and direction only serve training
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.sample_rate_hz = settings.sampling_rate
        self.hop_length = math.prod(settings.upsampling_ratios)
        self.available_codebooks = len(self.model.quantizer.layers)
        self.num_codebooks = num_codebooks or self.available_codebooks
        self.codebook_size = settings.codebook_size
        self.latent_dim = settings.hidden_size
        self.model.quantizer.layers = self.model.quantizer.layers[: self.num_codebooks]

    @staticmethod
    def check(settings: EncodecConfig) -> None:
        """Refuse what is not of this layout.

        Raises:
            UserError: it needs more than the past, or the loudness of the whole recording.
        """
        plain = settings.use_causal_conv and settings.audio_channels == 1 and settings.norm_type == "weight_norm"
        if not plain or settings.normalize or settings.chunk_length_s is not None:
            raise UserError(
                f"audio_channels={settings.audio_channels}, norm_type={settings.norm_type!r}, "
                f"normalize={settings.normalize}, chunk_length_s={settings.chunk_length_s} are neither the 24 kHz "
                "model's (causal, mono, weight_norm, not normalized, no chunks) nor the 48 kHz model's (normalized "
                "chunks); use facebook/encodec_24khz or facebook/encodec_48khz"
            )

    def encoder(self) -> Chain:
        return Chain(stream_layer(layer) for layer in self.model.encoder.layers)

    def decoder(self) -> Chain:
        return Chain(stream_layer(layer) for layer in self.model.decoder.layers)

    def quantize(self, latents: Float[Tensor, "B D T"]) -> Int[Tensor, "B K T"]:
        return self.model.quantizer.encode(latents).transpose(0, 1)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B D T"]:
        return self.model.quantizer.decode(codes.transpose(0, 1))
