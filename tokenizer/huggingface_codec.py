"""Which codec of `transformers`: its settings, what a family of codecs must bring, and the choice among the families.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.streaming import Chain

MODEL_TYPES = ("encodec", "mimi", "dac")
MINIMUM = (5, 23)
"""Version of `transformers` whose modules the streams know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceConfig:
    """Which codec, and how it is used."""

    codec: dict[str, Any]
    """The codec's own configuration in `transformers`, with its `model_type`."""
    num_codebooks: int | None = None
    """The first K; None for all that the codec has."""
    num_mels: int = 80
    """Bands of the log-mel features."""
    n_fft: int | None = None
    """Window of the log-mel features in samples; None for the power of two from 1024 on that covers a frame."""

    def __post_init__(self) -> None:
        if self.num_codebooks is not None and self.num_codebooks < 1:
            raise ValueError(f"num_codebooks={self.num_codebooks} must be at least 1")
        if self.num_mels < 1:
            raise ValueError(f"num_mels={self.num_mels} must be at least 1; use 80")


@runtime_checkable
class Codec(Protocol):
    """What tells one family of codecs from another."""

    model: Any
    """The library's model."""
    sample_rate_hz: int
    hop_length: int
    available_codebooks: int
    num_codebooks: int
    codebook_size: int
    latent_dim: int

    def encoder(self) -> Chain:
        """A fresh stream from samples (B, 1, S) to latents (B, D, T)."""
        ...

    def decoder(self) -> Chain:
        """A fresh stream from latents (B, D, T) to samples (B, 1, S)."""
        ...

    def quantize(self, latents: Float[Tensor, "B D T"]) -> Int[Tensor, "B K T"]: ...

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B D T"]: ...


def build_codec(config: HuggingFaceConfig) -> tuple[Codec, dict[str, Any], Callable[[str], str]]:
    """The codec with random weights, the fields of its configuration that count, and the published names of tensors.

    Raises:
        UserError: `transformers` is missing, or the configuration is not one that it or we can take.
    """
    kind, wanted = config.codec["model_type"], config.num_codebooks
    _require_transformers(kind)
    rename: Callable[[str], str] = str
    codec: Codec
    try:
        with torch.random.fork_rng(devices=[]):  # initializing draws from the global generator
            if kind == "encodec":
                from tokenizer.huggingface_encodec import FIELDS, EncodecCodec
                from tokenizer.huggingface_encodec_chunks import ChunkedEncodecCodec

                chunked = config.codec.get("normalize") and config.codec.get("chunk_length_s") is not None
                fields, codec = FIELDS, (ChunkedEncodecCodec if chunked else EncodecCodec)(config.codec, wanted)
            elif kind == "mimi":
                from tokenizer import huggingface_mimi as mimi

                fields, codec, rename = mimi.FIELDS, mimi.MimiCodec(config.codec, wanted), mimi.published_name
            else:
                from tokenizer import huggingface_dac as dac

                fields, codec = dac.FIELDS, dac.DacCodec(config.codec, wanted)
    except UserError:
        raise
    except Exception as error:  # the library checks its configurations with exceptions of many types
        reason = " ".join(str(error).split())
        raise UserError(f"no {kind} codec can be made of this configuration ({reason}); copy it again") from error
    if wanted is not None and wanted > codec.available_codebooks:
        raise UserError(f"num_codebooks={wanted} must be from 1 to {codec.available_codebooks}, what the codec has")
    return codec, {name: getattr(codec.model.config, name) for name in fields}, rename


def _require_transformers(kind: str) -> None:
    remedy = "install hybridlm[hf], on Python 3.11 or newer"
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"tokenizer of type 'hf' ({kind}) needs the package transformers; {remedy}") from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise UserError(f"transformers {transformers.__version__} must be {wanted} or newer for {kind}; {remedy}")


def check_type(codec: Mapping[str, Any], where: str) -> None:
    if codec.get("model_type") not in MODEL_TYPES:
        known = ", ".join(f"'{name}'" for name in MODEL_TYPES)
        raise UserError(
            f"{where}: model_type={codec.get('model_type')!r} is none of the supported codecs {known}; "
            "use one such as facebook/encodec_24khz, kyutai/mimi or descript/dac_44khz"
        )
