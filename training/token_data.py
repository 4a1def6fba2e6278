"""Settings of tasks that read cached frames, and the caches that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizer.frames import Tokenizer
from training.corpus import TokenCache
from training.manifest import TagRule


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDataConfig:
    """What is read, and in which portions."""

    caches: tuple[str, ...]
    """Folders made by `hybridlm prepare`, all by the same tokenizer."""
    weights: tuple[float, ...] = ()
    """Share of each cache among the frames that are heard, relative to each other: [2, 1] hears two frames of the first
    for each of the second, whatever their sizes. None: as they are long. Weights of rules count within a cache."""
    rules: tuple[TagRule, ...] = ()
    """Tags, use of text and weights by label; none: clips as the caches hold them."""
    validation_fraction: float = 0.02
    """Share of the training split held back for validation."""
    shuffle_buffer: int | None = None
    """Windows that are shuffled among each other where a cache is in tar files, which are read from front to back.
    None: 10,000. Caches in rows are shuffled whole."""
    batch_frames: int = 4000
    """Frames a micro-batch, padding counted."""
    max_frames: int = 750
    """Longer clips are cut into windows of this many frames."""
    validation_frames: int = 20_000
    """Most frames that a validation reads."""

    def __post_init__(self) -> None:
        if not self.caches:
            raise ValueError("caches=[] must name at least one folder made by `hybridlm prepare`")
        for name in ("batch_frames", "max_frames", "validation_frames", "shuffle_buffer"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.weights and (len(self.weights) != len(self.caches) or min(self.weights) <= 0):
            raise ValueError(
                f"weights={list(self.weights)} must be {len(self.caches)} numbers above 0, one for each of caches"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDataConfig(TokenDataConfig):
    """Of a task that can pack several windows into one row."""

    pack_frames: int | None = None
    """Most frames of a row that windows share, which attend to themselves alone: a batch is batch_frames / pack_frames
    full rows, and rows cost no padding. Prefixes come on top. None: a window has a row of its own, with its like."""

    def __post_init__(self) -> None:
        super(PackedDataConfig, self).__post_init__()  # a dataclass with slots is another class than the one written
        if self.pack_frames is not None and not self.max_frames <= self.pack_frames <= self.batch_frames:
            raise ValueError(
                f"pack_frames={self.pack_frames} must lie between max_frames={self.max_frames} and "
                f"batch_frames={self.batch_frames}"
            )


def open_frames(data: TokenDataConfig, split: str, tokenizer: Tokenizer) -> TokenCache:
    """The frames of one split.

    Raises:
        UserError: caches that cannot be read or were made by another tokenizer.
    """
    return TokenCache(
        [Path(folder) for folder in data.caches],
        tokenizer=tokenizer,
        split=split,
        validation_fraction=data.validation_fraction,
        rules=data.rules,
        shares=data.weights if split == "train" else (),
        shuffle_buffer=data.shuffle_buffer,
    )
