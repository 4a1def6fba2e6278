"""What the training of a tokenizer reads: random segments of audio, in batches, and the same ones at every validation.

Shapes: B batch, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.errors import UserError
from training.index import split_clips
from training.manifest import TagRule, apply_rules, read_manifest
from training.segments import AudioFiles, PcmCache, SegmentSource
from training.task import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerDataConfig:
    """What is read, and in which portions."""

    caches: tuple[str, ...] = ()
    """Folders of decoded audio made by `hybridlm prepare SOURCE --output DIR --audio`."""
    sources: tuple[str, ...] = ()
    """Folders or manifests whose files are decoded anew for every segment: no disk, more time. Instead of `caches`."""
    rules: tuple[TagRule, ...] = ()
    """Weights by label; none: all audio alike."""
    validation_fraction: float = 0.02
    """Share of the training split held back for validation."""
    batch_size: int = 16
    segment_frames: int = 25
    """Length of a segment in frames of the tokenizer."""
    validation_segments: int = 32

    def __post_init__(self) -> None:
        if bool(self.caches) == bool(self.sources):
            raise ValueError("give either caches or sources, with at least one folder")
        for name in ("batch_size", "segment_frames", "validation_segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def open_segments(data: TokenizerDataConfig, split: str, sample_rate_hz: int) -> SegmentSource:
    """The audio of one split.

    Raises:
        UserError: caches or sources that cannot be read, or caches of another sample rate.
    """
    if data.caches:
        cache = PcmCache(
            [Path(folder) for folder in data.caches],
            split=split,
            validation_fraction=data.validation_fraction,
            rules=data.rules,
        )
        if cache.sample_rate_hz != sample_rate_hz:
            raise UserError(
                f"the caches have sample_rate_hz={cache.sample_rate_hz}, the tokenizer {sample_rate_hz}; "
                "prepare them at the tokenizer's rate"
            )
        return cache
    clips = [clip for source in data.sources for clip in read_manifest(Path(source)).clips]
    clips = split_clips(clips, split, data.validation_fraction)
    return AudioFiles(list(apply_rules(clips, data.rules)), sample_rate_hz)


def training_batches(
    source: SegmentSource, batch_size: int, num_samples: int, *, seed: int, rank: int, world_size: int, skip: int
) -> Iterator[Batch]:
    """Endless batches `{"waveform": (B, 1, S)}` of random segments at random loudness; see `Task.batches`."""
    segments = source.segments(batch_size, num_samples, seed=seed, rank=rank, world_size=world_size, skip=skip)
    for number, waveform in enumerate(segments, start=skip):
        generator = torch.Generator().manual_seed(hash((seed, rank, number)) & 0x7FFFFFFF)
        decibels = -8.0 + 11.0 * torch.rand(batch_size, 1, 1, generator=generator)
        yield {"waveform": (waveform * 10 ** (decibels / 20)).clamp(-1.0, 1.0)}


def validation_segments(data: TokenizerDataConfig, sample_rate_hz: int, num_samples: int) -> Float[Tensor, "B 1 S"]:
    """The same segments at every validation; of the training data where none are held back."""
    split = "validation" if data.validation_fraction > 0 else "train"
    return next(open_segments(data, split, sample_rate_hz).segments(data.validation_segments, num_samples, seed=0))
