"""Training of F3's representation encoder on cached latents of the frozen autoencoder: RQ-MTP and a frozen LLM.

Shapes: B batch, T frames, D latent, F feature, K offsets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hybridlm.checkpoint import resolve
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.representation import RepresentationConfig, RepresentationEncoder
from training.corpus import TokenCache, Window
from training.distributed import on_any_process
from training.llm_supervision import FrozenLLM, Projector, load_llm
from training.rq_mtp import MultiTokenHeads, RandomProjectionQuantizer, codebook_use
from training.task import Batch, Sample
from training.token_data import TokenDataConfig, open_frames

STANDARDIZING_BATCHES, STANDARDIZING_FRAMES = 100, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class RepresentationLossConfig:
    """The two losses; a weight of 0 leaves one out."""

    rq_weight: float = 1.0
    num_offsets: int = 4
    """K of RQ-MTP: codes of the next K frames are predicted at once."""
    codebook_size: int = 1024
    projection_dim: int = 16
    projection_seed: int = 0
    llm_weight: float = 1.0
    llm: str | None = None
    """Folder or hub id of a causal language model, such as Qwen/Qwen2.5-0.5B; needed unless `llm_weight` is 0."""
    llm_stride: int = 4
    """Frames that make one position of the language model's prefix."""
    captions: bool = True
    """Let the words of the tags be the text of clips without one (`caption_of`)."""

    def __post_init__(self) -> None:
        for name in ("rq_weight", "llm_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.rq_weight == self.llm_weight == 0:
            raise ValueError("rq_weight and llm_weight are both 0; nothing would be learned")
        if self.llm_weight > 0 and self.llm is None:
            raise ValueError("llm_weight is above 0, but llm names no language model; name one, or set llm_weight=0")
        for name in ("num_offsets", "codebook_size", "projection_dim", "llm_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepresentationTaskConfig:
    """Settings of `task: representation`, under `representation:`."""

    tokenizer: str
    """Folder of the F3 autoencoder that made the caches; it stays as it is."""
    data: TokenDataConfig
    """A clip's tags are its caption where it has no text and `captions` is on."""
    encoder: RepresentationConfig = field(default_factory=RepresentationConfig)
    losses: RepresentationLossConfig = field(default_factory=RepresentationLossConfig)


class Learner(nn.Module):
    """What learns: the encoder, which is kept, and what only training needs."""

    def __init__(self, latent_dim: int, config: RepresentationTaskConfig, llm: FrozenLLM | None) -> None:
        super().__init__()
        losses, width = config.losses, config.encoder.feature_dim
        self.encoder = RepresentationEncoder(latent_dim, config.encoder)
        self.heads = None
        if losses.rq_weight > 0:
            self.heads = MultiTokenHeads(width, losses.codebook_size, losses.num_offsets)
        self.projector = Projector(width, llm.embedding_dim, losses.llm_stride) if llm is not None else None


def drawn_latents(cache: TokenCache, data: TokenDataConfig) -> Iterator[Float[Tensor, "_ D"]]:
    """Latents of windows drawn as in training, always the same, over which targets and features are standardized.

    A batch is of like clips, so a few windows of each of many batches are taken.
    """
    batches = cache.batches(seed=0, batch_frames=data.batch_frames, max_frames=data.max_frames)
    for batch in itertools.islice(batches, STANDARDIZING_BATCHES):
        left = STANDARDIZING_FRAMES
        for window in batch:
            if left > 0:
                yield cache.read(window).latents[:left]
                left -= window.frames


def caption_of(tags: Sequence[str]) -> str:
    """The words of a clip's tags: `("sound", "glass_tap-2")` is "sound glass tap"."""
    return " ".join(re.findall(r"[^\W\d_]+", " ".join(tags)))


class RepresentationTask:
    """See `training.task.Task`.

    Raises:
        UserError: a tokenizer, caches or a language model that cannot be read or do not fit together.
    """

    def __init__(self, config: RepresentationTaskConfig) -> None:
        self.config = config
        found = load_tokenizer(resolve(config.tokenizer))
        if not isinstance(found, F3Tokenizer):
            raise UserError(f"tokenizer={config.tokenizer} is of type {found.name}; this encoder is for f3")
        self.tokenizer = found.without_representation().requires_grad_(False)
        self.train_data = open_frames(config.data, "train", self.tokenizer)
        self.validation_data = self.train_data
        if config.data.validation_fraction > 0:
            self.validation_data = open_frames(config.data, "validation", self.tokenizer)
        losses = config.losses
        self.llm = load_llm(losses.llm) if losses.llm_weight > 0 and losses.llm is not None else None
        self.targets = None
        if losses.rq_weight > 0:
            self.targets = RandomProjectionQuantizer(
                self.tokenizer.latent_dim,
                projection_dim=losses.projection_dim,
                codebook_size=losses.codebook_size,
                seed=losses.projection_seed,
            ).standardize(torch.cat(list(drawn_latents(self.train_data, config.data))))
        self.learner = Learner(self.tokenizer.latent_dim, config, self.llm)

    def modules(self) -> Mapping[str, nn.Module]:
        """The encoder with its heads and projector."""
        return {"model": self.learner}

    def turns(self, step: int) -> Sequence[str]:
        """The learner, always."""
        return ("model",)

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Windows of about equal length."""
        limits = {"batch_frames": self.config.data.batch_frames, "max_frames": self.config.data.max_frames}
        self.train_data.check_shared(world_size, min(limits.values()))
        windows = self.train_data.batches(seed=seed, rank=rank, world_size=world_size, skip=skip, **limits)
        return (self._batch(self.train_data, batch) for batch in windows)

    def size(self, batch: Batch) -> int:
        """Frames without padding."""
        return int(batch["lengths"].sum())

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """rq_weight * RQ-MTP, in nats a code, + llm_weight * cross-entropy, in nats a token."""
        losses, latents, lengths = self.config.losses, batch["latents"], batch["lengths"]
        features, _ = self.learner.encoder(latents)
        mask = torch.arange(latents.shape[1], device=latents.device) < lengths[:, None]
        total = torch.zeros((), device=latents.device)
        figures: dict[str, Tensor | float] = {}
        if self.learner.heads is not None and self.targets is not None:
            codes = self.targets.to(latents.device)(latents)
            each, hits = self.learner.heads(features, codes, mask)
            total = total + losses.rq_weight * each.mean()
            use, perplexity = codebook_use(codes, mask, losses.codebook_size)
            figures |= {"rq_mtp": each.detach().mean(), "rq_accuracy": hits[0]}
            figures |= {"target_codes_in_use": use, "target_perplexity": perplexity}
        rows = [row for row, text in enumerate(batch["texts"]) if text]
        if self.learner.projector is not None and self.llm is not None and self._any_text(rows, latents.device):
            # Without a text of its own, this process lets the others' graph run over a row that does not count.
            texts = [batch["texts"][row] for row in rows] or ["a"]
            chosen = rows or [0]
            prefix, real = self.learner.projector(features[chosen], lengths[chosen])
            scores = self.llm.to(latents.device).nll(prefix, real, texts)
            # A mean a text: a caption of two tokens counts as much as a transcript of forty.
            cross_entropy = (scores.nats / scores.tokens).mean()
            total = total + losses.llm_weight * cross_entropy * bool(rows)
            if rows:
                figures["llm"] = cross_entropy.detach()
        # A batch without any text still has to reach every weight's gradient, if only with zero.
        return total + 0.0 * features.sum(), figures

    def _any_text(self, rows: Sequence[int], device: torch.device) -> bool:
        """Whether a process has a row with text; a validation is the main one's alone."""
        return on_any_process(bool(rows), device) if self.learner.training else bool(rows)

    def validate(self) -> Mapping[str, float]:
        """The training losses on held-out clips."""
        device = next(self.learner.parameters()).device
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for windows in self._validation_windows():
            batch = self._batch(self.validation_data, windows)
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            loss, figures = self.loss("model", batch, step=0, generator=torch.Generator())
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0) + 1
        return {name: sums[name] / counts[name] for name in sums}

    def export(self, folder: Path) -> None:
        """The tokenizer's folder, now with features."""
        encoder = self.learner.encoder.standardized(drawn_latents(self.train_data, self.config.data))
        self.tokenizer.with_representation(encoder).save(folder)

    def samples(self) -> Sequence[Sample]:
        """Nothing: features make no sound."""
        return ()

    def _batch(self, cache: TokenCache, windows: Sequence[Window]) -> Batch:
        clips = [cache.read(window) for window in windows]
        frames = cache.frames(clips)
        texts = []
        for clip, window in zip(clips, windows, strict=True):
            whole = window.start == 0 and window.frames == cache.num_frames(window.clip)
            caption = caption_of(clip.tags) if self.config.losses.captions and not clip.text else None
            texts.append((clip.text if whole else None) or caption or None)
        return {"latents": frames.latents, "lengths": frames.lengths, "texts": texts}

    def _validation_windows(self) -> Iterator[list[Window]]:
        cache, data = self.validation_data, self.config.data
        windows = cache.batches(seed=0, batch_frames=data.batch_frames, max_frames=data.max_frames)
        left = min(data.validation_frames, int(np.minimum(cache.index.rows, data.max_frames).sum()))
        while left > 0:
            batch = next(windows)
            left -= sum(window.frames for window in batch)
            yield batch
