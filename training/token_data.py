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
    rules: tuple[TagRule, ...] = ()
    """Tags, use of text and weights by label; none: clips as the caches hold them."""
    validation_fraction: float = 0.02
    """Share of the training split held back for validation."""
    batch_frames: int = 4000
    """Frames a micro-batch, padding counted."""
    max_frames: int = 750
    """Longer clips are cut into windows of this many frames."""
    validation_frames: int = 20_000
    """Most frames that a validation reads."""

    def __post_init__(self) -> None:
        if not self.caches:
            raise ValueError("caches=[] must name at least one folder made by `hybridlm prepare`")
        for name in ("batch_frames", "max_frames", "validation_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


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
    )
