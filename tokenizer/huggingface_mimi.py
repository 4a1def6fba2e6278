"""Mimi (Moshi, arXiv 2410.00037) in the form of `transformers`: a causal SEANet with a transformer on either side.

The transformers attend to a window of past steps, so a stream keeps that window's keys and values and nothing else.

Shapes: B batch, T frames, K codebooks, D latent, C channels, L steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import MimiConfig, MimiModel
from transformers.cache_utils import DynamicCache
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook, MimiTransformerModel

from tokenizer.errors import UserError
from tokenizer.huggingface_seanet import LAYER_FIELDS, stream_layer
from tokenizer.streaming import Chain

FIELDS: tuple[str, ...] = (
    *(*LAYER_FIELDS, "num_quantizers", "num_semantic_quantizers", "vector_quantization_hidden_dimension"),
    *("upsample_groups", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "norm_eps", "rope_parameters", "sliding_window"),
    "attention_bias",
)


class MimiCodec:
    """See `tokenizer.huggingface_codec.Codec`."""

    def __init__(self, config: Mapping[str, Any], num_codebooks: int | None) -> None:
        fields = {name: config[name] for name in FIELDS if name in config}
        if "rope_theta" in config:  # how configurations written before the fifth version say it
            fields.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": config["rope_theta"]})
        settings = MimiConfig(**fields)
        if not settings.use_causal_conv or settings.audio_channels != 1:
            raise UserError(
                f"use_causal_conv={settings.use_causal_conv}, audio_channels={settings.audio_channels}, but Mimi is "
                "read as a causal mono codec; use kyutai/mimi"
            )
        self.model = MimiModel(settings)
        self.sample_rate_hz = settings.sampling_rate
        self.hop_length = settings.frame_size
        self.available_codebooks = settings.num_quantizers
        self.num_codebooks = num_codebooks or self.available_codebooks
        self.codebook_size = settings.codebook_size
        self.latent_dim = settings.hidden_size
        semantic = settings.num_semantic_quantizers
        if self.num_codebooks < semantic:
            raise UserError(f"num_codebooks={self.num_codebooks} must be at least {semantic}, the semantic codebooks")
        acoustic = self.model.quantizer.acoustic_residual_vector_quantizer
        acoustic.layers = acoustic.layers[: self.num_codebooks - semantic]

    def encoder(self) -> Chain:
        half = self.model.encoder
        layers = [stream_layer(layer) for layer in half.encoder_seanet.layers]
        return Chain([*layers, TransformerStream(half.encoder_transformer), stream_layer(half.downsample)])

    def decoder(self) -> Chain:
        half = self.model.decoder
        layers = [stream_layer(layer) for layer in half.decoder_seanet.layers]
        return Chain([stream_layer(half.upsample), TransformerStream(half.decoder_transformer), *layers])

    def quantize(self, latents: Float[Tensor, "B D T"]) -> Int[Tensor, "B K T"]:
        self._derive_codebooks()
        return self.model.quantizer.encode(latents, self.num_codebooks).transpose(0, 1)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B D T"]:
        self._derive_codebooks()
        return self.model.quantizer.decode(codes)

    @torch.inference_mode(False)  # what is kept must serve other callers too
    @torch.no_grad()
    def _derive_codebooks(self) -> None:
        # The library derives a codebook when it is first used and keeps it where it was then.
        for module in self.model.quantizer.modules():
            if isinstance(module, MimiEuclideanCodebook):
                if module._embed is not None and module._embed.device != module.embed_sum.device:
                    module._embed = None
                module.embed  # noqa: B018 (a property that keeps its value)


class TransformerStream:
    """A causal transformer over (B, C, L) with the keys and values of its window."""

    def __init__(self, transformer: MimiTransformerModel) -> None:
        self.transformer = transformer
        self.cache = DynamicCache(config=transformer.config)

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[-1] == 0:
            return x
        found = self.transformer(x.transpose(1, 2), past_key_values=self.cache, use_cache=True)
        return found.last_hidden_state.transpose(1, 2)

    def inputs_for(self, outputs: int) -> int:
        return outputs


def published_name(name: str) -> str:
    """The name that a tensor of `MimiModel` has in published files: `encoder.layers`, not `encoder.encoder_seanet`."""
    name = re.sub(r"^(encoder|decoder)\.\1_seanet\.", r"\1.", name)
    return re.sub(r"^(?:encoder|decoder)\.((?:encoder|decoder)_transformer|downsample|upsample)\.", r"\1.", name)
