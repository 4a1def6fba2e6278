"""A language model before its first step: sizes from tokenizer and text, the frames' scale, the codec's codebooks.

Shapes: K codebooks, V codebook size, D latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.backbone import Backbone
from hybridlm.checkpoint import Checkpoint
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from tokenizer.huggingface_text import HuggingFaceText
from tokenizer.settings import from_mapping
from tokenizer.text import TextTokenizer
from training.corpus import TokenCache, Window
from training.examples import device_of

DERIVED = (
    *("vocab_size", "first_text_id", "num_codebooks", "codebook_size", "latent_dim", "feature_dim", "frame_rate_hz"),
)
"""Fields of `ModelConfig` that the tokenizer and the text model decide."""


def new_model(
    given: Mapping[str, Any],
    tokenizer: Tokenizer,
    text: TextTokenizer,
    cache: TokenCache,
    backbone: Backbone | None = None,
) -> HybridLM:
    """An untrained model that knows the scale of the cache's frames and the tokenizer's codebooks.

    Args:
        given: Fields of `ModelConfig`, without those in `DERIVED`.
        tokenizer: What made the cache.
        text: Pieces and tags.
        cache: Training clips.
        backbone: A published text model that gives the decoder and the text embeddings; `text` is then its own.

    Raises:
        UserError: unknown or derived fields, values that do not fit together, or weights that cannot be read.
    """
    sizes = {"vocab_size": text.vocab_size, "first_text_id": text.first_text_id, "feature_dim": cache.feature_dim}
    model = HybridLM(new_config(given, tokenizer, sizes, backbone))
    if backbone is not None:
        assert isinstance(text, HuggingFaceText), "a backbone comes with its own text pieces"
        backbone.fill(model, text)
    set_scale(model, cache)
    if model.config.uses_codes and tokenizer.latent_dim <= model.config.code_embedding_dim:
        start_from_codebooks(model, codebook_vectors(tokenizer))
    return model


def new_config(
    given: Mapping[str, Any], tokenizer: Tokenizer, sizes: Mapping[str, int], backbone: Backbone | None
) -> ModelConfig:
    """The settings of an untrained model.

    Args:
        given: See `new_model`.
        tokenizer: See `new_model`.
        sizes: `vocab_size`, `first_text_id` and `feature_dim`.
        backbone: See `new_model`.

    Raises:
        UserError: unknown or derived fields, or values that do not fit together.
    """
    _refuse_derived(given)
    decided = {} if backbone is None else backbone.fields
    for name in decided:
        if name in given:
            raise UserError(f"language.model.{name} is decided by the backbone; leave it out")
    derived = {
        **sizes,
        "num_codebooks": tokenizer.num_codebooks,
        "codebook_size": tokenizer.codebook_size,
        "latent_dim": tokenizer.latent_dim,
        "frame_rate_hz": tokenizer.frame_rate_hz,
    }
    return from_mapping(ModelConfig, {**given, **decided, **derived}, where="language.model")


def taken_over(start: Checkpoint, given: Mapping[str, Any]) -> HybridLM:
    """A trained model to go on with.

    Args:
        start: The model.
        given: Fields of `ModelConfig` to change; the weights must still fit.

    Raises:
        UserError: they don't.
    """
    _refuse_derived(given)
    fields = {name: getattr(start.model.config, name) for name in ModelConfig.__slots__}
    model = HybridLM(from_mapping(ModelConfig, {**fields, **given}, where="language.model"))
    try:
        model.load_state_dict(start.model.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"language.model={dict(given)} does not fit the model's weights; change dropout, condition_dropout or "
            "history_noise alone"
        ) from error
    return model


def set_scale(model: HybridLM, cache: TokenCache, max_frames: int = 50_000) -> None:
    """Tell a new model the mean and standard deviation of latents and features, from clips throughout the cache."""
    latents, features, seen = [], [], 0
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).tolist()
    for clip in order:
        part = cache.read(Window(clip, 0, min(cache.num_frames(clip), 500)))
        latents.append(part.latents)
        features += [part.features] if part.features is not None else []
        seen += len(part.latents)
        if seen >= max_frames:
            break
    joined = torch.cat(latents)
    model.statistics.set(latent_mean=joined.mean(dim=0), latent_std=_std(joined))
    if features:
        joined = torch.cat(features)
        model.statistics.set(feature_mean=joined.mean(dim=0), feature_std=_std(joined))


@torch.no_grad()
def codebook_vectors(tokenizer: Tokenizer) -> Float[Tensor, "K V D"]:
    """What each code adds to the dequantized latent after codes of 0: the codebooks, for a residual codec."""
    size, vectors = tokenizer.codebook_size, []
    before: Tensor | float = 0.0
    for k in range(tokenizer.num_codebooks):
        codes = torch.zeros(1, k + 1, size, dtype=torch.int64)
        codes[0, k] = torch.arange(size)
        latents = tokenizer.dequantize(codes.to(device_of(tokenizer)))[0].cpu()
        vectors.append(latents - before)
        before = latents[:1]
    return torch.stack(vectors)


@torch.no_grad()
def start_from_codebooks(model: HybridLM, codebooks: Float[Tensor, "K V D"]) -> None:
    """Write the codec's codebooks into the first D columns of the code embeddings.

    They are scaled so that the sum over the codebooks has unit variance, and the latent head's read-out undoes the
    scale: the untrained mean is the dequantized latent (nearly: the other columns are small).

    Args:
        model: Knows the scale of the latents already (`set_scale`).
        codebooks: What each code adds to a latent.

    Raises:
        ValueError: for codebooks of another shape, or a model without codes.
    """
    config = model.config
    if model.code_embedding is None:
        raise ValueError("representation=continuous has no code embeddings to initialize")
    expected = (config.num_codebooks, config.codebook_size, config.latent_dim)
    if tuple(codebooks.shape) != expected or config.latent_dim > config.code_embedding_dim:
        raise ValueError(
            f"codebooks of shape {tuple(codebooks.shape)} must be (num_codebooks, codebook_size, latent_dim)="
            f"{expected} with latent_dim <= code_embedding_dim={config.code_embedding_dim}"
        )
    table, statistics, dim = model.code_embedding.table.weight, model.statistics, config.latent_dim
    vectors = codebooks[: model.code_embedding.num_codebooks].to(table) / statistics.latent_std
    scale = 1.0 / vectors.var(dim=1).sum(dim=0).mean().sqrt().clamp(min=1e-6)
    table[:, :dim] = (vectors * scale).flatten(0, 1)
    if model.latent_head is not None:
        model.latent_head.read_out.weight[:, :dim] = torch.eye(dim).to(vectors) / scale
        model.latent_head.read_out.bias.copy_(-statistics.latent_mean / statistics.latent_std)


def _refuse_derived(given: Mapping[str, Any]) -> None:
    for name in DERIVED:
        if name in given:
            raise UserError(f"language.model.{name} is decided by the tokenizer and the text; leave it out")


def _std(values: Tensor) -> Tensor:
    return values.std(dim=0).clamp(min=1e-4)
