"""The clips of one or more caches as a recipe sees them: split, tags, weights, and whether text is used."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.errors import UserError
from training.layouts import Place
from training.manifest import Clip, TagRule, apply_rules
from training.shards import ShardReader

VALIDATION = "validation"


class ClipIndex:
    """Numbers of every clip in memory, about 40 bytes each; texts and labels are read from disk when asked for.

    Args:
        folders: Caches of one kind.
        kind: `audio` or `tokens`.
        split: Keep clips of this split and those without one; None keeps all.
        validation_fraction: Share of the sentences (clips, where there is no text) of split `train`, and of those
            without a split, that become split `validation`. Which ones depends on their text or key alone.
        rules: Tags, use of text, and weights; see `TagRule`.

    Raises:
        UserError: not such caches, or no clip is left.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        kind: str,
        *,
        split: str | None = None,
        validation_fraction: float = 0.0,
        rules: Sequence[TagRule] = (),
    ) -> None:
        if not 0.0 <= validation_fraction < 1.0:
            raise UserError(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
        paths = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
        if not paths:
            raise UserError("no cache is given; name at least one folder made by `hybridlm prepare`")
        self.readers = [ShardReader(path, kind) for path in paths]
        places: list[tuple[int, int, int, int, int]] = []  # reader, offset of its line, shard, row, rows
        weights: list[float] = []
        tag_ids: list[int] = []
        texts: list[bool] = []
        splits: list[str | None] = []
        hashes: list[int] = []
        tag_sets: dict[tuple[str, ...], int] = {}
        current: list[tuple[int, int, dict[str, Any]]] = []

        def clips() -> Iterator[Clip]:
            for number, reader in enumerate(self.readers):
                for offset, record in reader.lines():
                    current[:] = [(number, offset, record)]
                    yield _clip(record)

        for clip in apply_rules(clips(), rules):
            number, offset, record = current[0]
            if record["rows"] == 0:
                continue
            places.append((number, offset, record["shard"], record["row"], record["rows"]))
            weights.append(clip.weight)
            tag_ids.append(tag_sets.setdefault(clip.tags, len(tag_sets)))
            texts.append(bool(clip.text))
            splits.append(sys.intern(clip.split) if clip.split else None)
            hashes.append(_split_hash(record["text"], clip.key))
        keep = _members(splits, np.array(hashes, dtype=np.int64), split, validation_fraction)
        table = np.array(places, dtype=np.int64).reshape(-1, 5)[keep]
        self.reader, self.offset, self.shard, self.row, self.rows = (table[:, column] for column in range(5))
        self.weight = np.array(weights, dtype=np.float64)[keep]
        self.has_text = np.array(texts, dtype=bool)[keep]
        self._tag_ids = np.array(tag_ids, dtype=np.int32)[keep]
        self._tag_sets = list(tag_sets)
        if len(self) == 0 and keep.size and not keep.any() and set(splits) <= {None, "train"} and split == "train":
            raise UserError(
                f"{', '.join(map(str, paths))}: validation_fraction={validation_fraction} holds back all {len(splits)} "
                "clips (those of one text stay together); set it to 0, or add recordings of other texts"
            )
        if len(self) == 0:
            raise UserError(
                f"{', '.join(map(str, paths))}: no clip of split '{split}' is left under {len(rules)} tag rules; "
                f"the splits there are {', '.join(sorted({s or 'none' for s in splits})) or 'none'}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, clip: int) -> Place:
        """Where a clip's rows are in its cache."""
        return Place(int(self.shard[clip]), int(self.row[clip]), int(self.rows[clip]))

    def tags(self, clip: int) -> tuple[str, ...]:
        """Tags of a clip."""
        return self._tag_sets[int(self._tag_ids[clip])]

    def all_tags(self) -> list[str]:
        """Every tag in use, sorted."""
        used = {int(i) for i in np.unique(self._tag_ids)}
        return sorted({tag for i in used for tag in self._tag_sets[i]})

    def clip(self, clip: int) -> Clip:
        """Key, split, text, tags and labels of a clip, read from disk."""
        record = self.readers[int(self.reader[clip])].line(int(self.offset[clip]))
        found = _clip(record)
        return Clip(
            path=found.path,
            key=found.key,
            split=found.split,
            text=found.text if self.has_text[clip] else None,
            tags=self.tags(clip),
            labels=found.labels,
            weight=float(self.weight[clip]),
        )


def _clip(record: dict[str, Any]) -> Clip:
    return Clip(
        path=Path(record["key"]),
        key=record["key"],
        split=record["split"],
        text=record["text"],
        tags=tuple(record["tags"]),
        labels=record["labels"],
    )


def split_clips(clips: Sequence[Clip], split: str | None, validation_fraction: float) -> list[Clip]:
    """The clips of `split`, divided exactly as `ClipIndex` divides a cache of them."""
    hashes = np.array([_split_hash(clip.text, clip.key) for clip in clips], dtype=np.int64)
    keep = _members([clip.split for clip in clips], hashes, split, validation_fraction)
    return [clip for clip, kept in zip(clips, keep, strict=True) if kept]


def _split_hash(text: str | None, key: str) -> int:
    """What decides whether a clip is held back: its sentence, so that no sentence stands on both sides."""
    return zlib.crc32((text or key).encode())


def _members(
    splits: Sequence[str | None], hashes: npt.NDArray[np.int64], split: str | None, validation_fraction: float
) -> npt.NDArray[np.bool_]:
    """Which clips belong to `split`, once a part of the training split is held back."""
    if split is None:
        return np.ones(len(splits), dtype=bool)
    unmarked = np.array([s is None for s in splits], dtype=bool)
    marked = np.array([s == split for s in splits], dtype=bool)
    if validation_fraction == 0.0:
        return marked | unmarked
    eligible = unmarked | np.array([s == "train" for s in splits], dtype=bool)
    held = eligible & (hashes < validation_fraction * 2**32)
    if eligible.any() and not held.any():
        held = eligible & (hashes == hashes[eligible].min())  # a small corpus holds back one sentence
    return marked | held if split == VALIDATION else (marked | unmarked) & ~held
