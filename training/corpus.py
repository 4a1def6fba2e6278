"""Corpora to train on. Here: batches of cached frames, for language models; `training.segments` has the audio.

Every batch is a function of (seed, rank, number of the batch), so that a run goes on where it stopped by skipping.

Shapes: B batch, T frames, K codebooks, D latent, F feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer
from training.index import ClipIndex
from training.manifest import TagRule
from training.packing import packed_batches, shuffled
from training.prepare import PrepareReport, prepare, prepare_audio
from training.segments import AudioFiles, PcmCache, SegmentSource
from training.streaming import front_to_back

__all__ = [
    "AudioFiles",
    "CachedClip",
    "PcmCache",
    "PrepareReport",
    "SegmentSource",
    "TokenCache",
    "Window",
    "prepare",
    "prepare_audio",
]

SHUFFLE_BUFFER = 10_000


class Window(NamedTuple):
    """A part of a clip."""

    clip: int
    start: int
    """First frame."""
    frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedClip:
    """Frames of a clip, or of a part of it, and what is known of it."""

    key: str
    split: str | None
    text: str | None
    tags: tuple[str, ...]
    labels: dict[str, str]
    codes: Int[Tensor, "K T"]
    """int64."""
    latents: Float[Tensor, "T D"]
    """float32."""
    features: Float[Tensor, "T F"] | None

    def cut(self, start: int, stop: int) -> CachedClip:
        """A copy of its frames from `start` to before `stop`: it keeps nothing of the rest."""
        return replace(
            self,
            codes=self.codes[:, start:stop].clone(),
            latents=self.latents[start:stop].clone(),
            features=None if self.features is None else self.features[start:stop].clone(),
        )


class TokenCache:
    """Frames from caches written by `prepare`; nothing is loaded but what is read.

    Args:
        folders: One cache or several, all made by one tokenizer.
        tokenizer: The tokenizer that must have made them; None takes any.
        split: Keep clips of this split and those without one; None keeps all.
        validation_fraction: Share of the training split that is held back as split `validation`.
        rules: Tags, use of text, and weights by label; see `TagRule`.
        shares: Of each folder among the frames that batches hold, relative to each other; none: as they come.
        shuffle_buffer: Windows that are shuffled among each other where a folder holds tar files; None: 10,000.

    Raises:
        UserError: not such caches, made by different tokenizers, or no clip is left (with shares, of one folder).
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        *,
        tokenizer: Tokenizer | None = None,
        split: str | None = None,
        validation_fraction: float = 0.0,
        rules: Sequence[TagRule] = (),
        shares: Sequence[float] = (),
        shuffle_buffer: int | None = None,
    ) -> None:
        self.index = ClipIndex(folders, "tokens", split=split, validation_fraction=validation_fraction, rules=rules)
        self.shares = np.array(shares, dtype=np.float64) / sum(shares) if shares else None
        if self.shares is not None:
            for number, reader in enumerate(self.index.readers):
                if not bool((self.index.reader == number).any()):
                    raise UserError(
                        f"{reader.folder} has no clip of split '{split}' under the rules, but is to be "
                        f"{self.shares[number]:.1%} of what is heard; leave it out of the caches"
                    )
        first = self.index.readers[0]
        self._in_tar = [reader.in_tar for reader in self.index.readers]
        self._reach = (shuffle_buffer or SHUFFLE_BUFFER) if any(self._in_tar) else None
        self.name = ", ".join(str(reader.folder) for reader in self.index.readers)
        """Its folders."""
        self.tokenizer: str = first.meta["tokenizer"]
        """Name and fingerprint of the tokenizer that made the frames."""
        self.frame_rate_hz: float = first.meta["frame_rate_hz"]
        self.codebook_size: int = first.meta["codebook_size"]
        self.num_codebooks = first.streams["codes"].width
        self.latent_dim = first.streams["latents"].width
        self.feature_dim = first.streams["features"].width if "features" in first.streams else 0
        wanted = self.tokenizer if tokenizer is None else f"{tokenizer.name} {tokenizer.fingerprint()}"
        for reader in self.index.readers:
            if reader.meta["tokenizer"] != wanted:
                raise UserError(
                    f"{reader.folder} was made by tokenizer {reader.meta['tokenizer']}, but {wanted} is asked for; "
                    "prepare it again with that one"
                )
            if ("features" in reader.streams) != ("features" in first.streams):
                raise UserError(f"{reader.folder} and {first.folder}: only one has features; prepare them alike")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, clip: int) -> CachedClip:
        if not 0 <= clip < len(self):
            raise IndexError(clip)
        return self.read(Window(clip, 0, self.num_frames(clip)))

    @property
    def duration_s(self) -> float:
        """Seconds of audio, each clip counted once."""
        return float(self.index.rows.sum()) / self.frame_rate_hz

    def num_frames(self, clip: int) -> int:
        """Length of a clip in frames."""
        return int(self.index.rows[clip])

    def has_text(self, clip: int) -> bool:
        """Whether a clip has a text that is used."""
        return bool(self.index.has_text[clip])

    def all_tags(self) -> list[str]:
        """Every tag in use, sorted."""
        return self.index.all_tags()

    def found_shares(self, windows: Sequence[Window]) -> dict[str, float]:
        """Of each folder in the frames of some windows, as `share/FOLDER`."""
        frames = np.zeros(len(self.index.readers))
        for window in windows:
            frames[self.index.reader[window.clip]] += window.frames
        return {f"share/{name}": float(share) for name, share in zip(self._names(), frames / frames.sum(), strict=True)}

    def _names(self) -> list[str]:
        """Folders by their own names, where these tell them apart."""
        folders = [reader.folder for reader in self.index.readers]
        short = [folder.name for folder in folders]
        return short if len(set(short)) == len(short) else [str(folder) for folder in folders]

    def mixture(self, max_frames: int) -> list[str]:
        """A line for each folder: its share of what is heard, and how often an epoch hears it.

        Args:
            max_frames: Longest window.
        """
        index = self.index
        frames = np.where(index.has_text, 1, -(-index.rows // max_frames)) * np.minimum(index.rows, max_frames)
        passes = index.weight * self._lift(frames)
        lines = []
        for number, name in enumerate(self._names()):
            here = index.reader == number
            heard, whole = float((passes * frames)[here].sum()), float(frames[here].sum())
            share = heard / float((passes * frames).sum())
            hours = float(index.rows[here].sum()) / self.frame_rate_hz / 3600
            lines.append(f"{name}: {share:.1%} of the frames, {hours:.2f} h, heard {heard / whole:.2f} times an epoch")
        return lines

    def read(self, window: Window) -> CachedClip:
        """Read a part of a clip; its text is the whole clip's."""
        index = self.index
        about = index.clip(window.clip)
        reader, place = index.readers[int(index.reader[window.clip])], index.place(window.clip)
        stop = window.start + window.frames
        arrays = {name: reader.rows(name, place, window.start, stop) for name in reader.streams}
        return CachedClip(
            key=about.key,
            split=about.split,
            text=about.text,
            tags=about.tags,
            labels=about.labels,
            codes=torch.from_numpy(arrays["codes"].astype(np.int64)).T.contiguous(),
            latents=torch.from_numpy(arrays["latents"].astype(np.float32)),
            features=torch.from_numpy(arrays["features"].astype(np.float32)) if "features" in arrays else None,
        )

    @staticmethod
    def frames(clips: Sequence[CachedClip]) -> AudioFrames:
        """Clips of one tokenizer as one batch, padded on the right with zeros."""
        lengths = torch.tensor([clip.latents.shape[0] for clip in clips])
        longest, first = int(lengths.max()), clips[0]
        codes = torch.zeros(len(clips), first.codes.shape[0], longest, dtype=torch.int64)
        latents = torch.zeros(len(clips), longest, first.latents.shape[1])
        features = None if first.features is None else torch.zeros(len(clips), longest, first.features.shape[1])
        for row, clip in enumerate(clips):
            length = clip.latents.shape[0]
            codes[row, :, :length] = clip.codes
            latents[row, :length] = clip.latents
            if features is not None and clip.features is not None:
                features[row, :length] = clip.features
        return AudioFrames(codes=codes, latents=latents, features=features, lengths=lengths)

    def check_shared(self, world_size: int, max_frames: int) -> None:
        """Whether there is something to learn from for each of so many ranks.

        Args:
            world_size: Number of processes.
            max_frames: Most frames of a window.

        Raises:
            UserError: an epoch has fewer windows than ranks, so that several would hear the same at once.
        """
        windows = int(np.where(self.index.has_text, 1, -(-self.index.rows // max_frames)).sum())
        if windows < world_size:
            raise UserError(
                f"{self.name}: {len(self)} clips to learn from, in {windows} windows of at most {max_frames} frames, "
                f"are too few for {world_size} processes; start at most {windows}, or prepare more recordings"
            )

    def batches(
        self,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        batch_size: int | None = None,
        batch_frames: int | None = None,
        max_frames: int | None = None,
    ) -> Iterator[list[Window]]:
        """Endless batches of windows of about equal length.

        In an epoch each clip comes `weight` times (a fraction by lot). A clip longer than `max_frames` gives as many
        random windows as it would take to cover it; with text it gives its beginning, since text is read from there.
        All ranks get equally many batches, of about equal length at the same step; a few come twice for that.

        Args:
            seed: Decides everything.
            rank: This process among `world_size`.
            world_size: Number of processes; the ranks share an epoch's batches out.
            skip: Batches of this rank to leave out at the beginning; costs no reading.
            batch_size: Most windows a batch.
            batch_frames: Most frames a batch, padding counted; also the most frames of a window.
            max_frames: Most frames of a window.

        Raises:
            ValueError: when neither `batch_size` nor `batch_frames` is given, or one is below 1.
        """
        limits = [limit for limit in (batch_size, batch_frames, max_frames) if limit is not None]
        if (batch_size is None and batch_frames is None) or min(limits) < 1:
            raise ValueError(f"{batch_size=} or {batch_frames=} must be given, and with {max_frames=} be at least 1")
        longest = min(max_frames or 1 << 62, batch_frames or 1 << 62)
        for epoch in itertools.count():
            windows, groups = self._plan(
                np.random.default_rng([seed, epoch]), world_size, batch_size, batch_frames, longest
            )
            if skip >= len(groups):
                skip -= len(groups)
                continue
            for group in groups[skip:]:
                first, last = group[rank]
                yield [Window(*window) for window in windows[first:last].tolist()]
            skip = 0

    def packed(
        self,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        batch_frames: int,
        row_frames: int,
        max_frames: int,
    ) -> Iterator[list[list[Window]]]:
        """Endless batches of rows of windows, as `batches` has them but of any lengths, row by row as they fit.

        Batches are numbered over all ranks, which take them in turn: their order does not depend on `world_size`.

        Args:
            seed: Decides everything.
            rank: This process among `world_size`.
            world_size: Number of processes.
            skip: Batches of this rank to leave out at the beginning; costs no reading.
            batch_frames: Most frames a batch; so many whole rows.
            row_frames: Most frames a row.
            max_frames: Most frames of a window.
        """
        longest = min(max_frames, row_frames)
        number = -(skip * world_size + rank)  # of the next batch, counted from the first that this rank is to have
        for epoch in itertools.count():
            rng = np.random.default_rng([seed, epoch])
            windows = self._windows(rng, longest)
            for rows in packed_batches(windows[:, 2], row_frames, batch_frames, rng, self._reach):
                if number >= 0 and number % world_size == 0:
                    yield [[Window(*window) for window in windows[row].tolist()] for row in rows]
                number += 1

    def _windows(self, rng: np.random.Generator, longest: int) -> npt.NDArray[np.int64]:
        """The windows (clip, start, frames) of an epoch, in random order."""
        index = self.index
        pieces = np.where(index.has_text, 1, -(-index.rows // longest))
        weight = index.weight * self._lift(pieces * np.minimum(index.rows, longest))
        copies = np.floor(weight + rng.random(len(index))).astype(np.int64)
        if self._reach is None:
            clips = np.repeat(np.arange(len(index)), copies * pieces)
            rng.shuffle(clips)
        else:
            clips = front_to_back(index, self._in_tar, copies, pieces, self._reach, rng)
        frames = np.minimum(index.rows[clips], longest)
        starts = rng.integers(0, np.where(index.has_text[clips], 0, index.rows[clips] - frames) + 1)
        return np.stack([clips, starts, frames], axis=1)

    def _lift(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | float:
        """Of each clip, which has so many frames a copy: what gives every folder its share of an equally long epoch."""
        if self.shares is None:
            return 1.0
        found = np.bincount(self.index.reader, self.index.weight * frames, minlength=len(self.shares))
        return (self.shares * found.sum() / found)[self.index.reader]

    def _plan(
        self,
        rng: np.random.Generator,
        world_size: int,
        batch_size: int | None,
        batch_frames: int | None,
        longest: int,
    ) -> tuple[npt.NDArray[np.int64], list[list[tuple[int, int]]]]:
        """An epoch: its windows (n, 3), and for each step the range of windows of every rank's batch."""
        windows = self._windows(rng, longest)
        # Windows of one pool are sorted by length: little padding, yet the order of the epoch stays random.
        pool = 32 * batch_size if batch_size else 2048
        windows = windows[np.lexsort((windows[:, 2], np.arange(len(windows)) // pool))]
        ranges: list[tuple[int, int]] = []
        first = 0
        for last, length in enumerate(windows[:, 2].tolist()):
            count = last - first
            new_pool = last % pool == 0 and count > 0
            too_many = batch_size is not None and count + 1 > batch_size
            too_long = batch_frames is not None and count > 0 and (count + 1) * length > batch_frames
            if new_pool or too_many or too_long:
                ranges.append((first, last))
                first = last
        if len(windows):
            ranges.append((first, len(windows)))
        if ranges:
            missing = -len(ranges) % world_size
            ranges += [ranges[i % len(ranges)] for i in range(missing)]
        groups = [ranges[i : i + world_size] for i in range(0, len(ranges), world_size)]
        reach = None if self._reach is None else self._reach * len(groups) / len(windows)
        return windows, [groups[i] for i in shuffled(len(groups), reach, rng)]
