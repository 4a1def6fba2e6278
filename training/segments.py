"""Random segments of audio, for training tokenizers: from a cache of decoded audio, or straight from files.

Every batch is a function of (seed, rank, number of the batch), so that a run goes on where it stopped by skipping.

Shapes: B batch, S samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from training.index import ClipIndex
from training.manifest import Clip, TagRule


@runtime_checkable
class SegmentSource(Protocol):
    """Audio from which training of a tokenizer draws random segments."""

    sample_rate_hz: int

    def segments(
        self, batch_size: int, num_samples: int, *, seed: int, rank: int = 0, world_size: int = 1, skip: int = 0
    ) -> Iterator[Float[Tensor, "B 1 S"]]:
        """Endless batches of segments, uniform over the audio's duration times the clips' weights.

        Args:
            batch_size: Segments a batch and rank.
            num_samples: Samples a segment; shorter clips are followed by silence.
            seed: Decides all batches.
            rank: This process among `world_size`, each of which gets batches of its own.
            world_size: Number of processes.
            skip: Batches of this rank to leave out at the beginning; costs nothing.
        """
        ...


class _Draw:
    """Draws (clip, start) uniformly over weighted duration."""

    def __init__(self, lengths: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> None:
        self._lengths = lengths
        self._cumulative = np.cumsum(lengths * weights)

    def __call__(self, count: int, num_samples: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        points = rng.random(count) * self._cumulative[-1]
        clips = np.minimum(np.searchsorted(self._cumulative, points, side="right"), len(self._lengths) - 1)
        starts = rng.integers(0, np.maximum(self._lengths[clips] - num_samples, 0) + 1)
        return list(zip(clips.tolist(), starts.tolist(), strict=True))


class PcmCache:
    """Segments from caches written by `prepare_audio`; nothing is loaded but what is drawn.

    Args:
        folders: One cache or several, all of one rate.
        split: Keep clips of this split and those without one; None keeps all.
        validation_fraction: Share of the training split that is held back as split `validation`.
        rules: Weights by label; see `TagRule`.

    Raises:
        UserError: not such caches, different rates, or no clip is left.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        *,
        split: str | None = None,
        validation_fraction: float = 0.0,
        rules: Sequence[TagRule] = (),
    ) -> None:
        self.index = ClipIndex(folders, "audio", split=split, validation_fraction=validation_fraction, rules=rules)
        rates = {reader.meta["sample_rate_hz"] for reader in self.index.readers}
        if len(rates) > 1:
            raise UserError(f"the caches have sample_rate_hz={sorted(rates)}, but must share one; prepare them alike")
        self.sample_rate_hz: int = rates.pop()
        self._draw = _Draw(self.index.rows, self.index.weight)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def duration_s(self) -> float:
        """Seconds of audio, each clip counted once."""
        return float(self.index.rows.sum()) / self.sample_rate_hz

    def read(self, clip: int, start: int = 0, num_samples: int | None = None) -> Float[Tensor, "1 S"]:
        """Samples of a clip from `start` on; fewer where it ends before."""
        index = self.index
        rows = int(index.rows[clip])
        stop = rows if num_samples is None else min(start + num_samples, rows)
        reader = index.readers[int(index.reader[clip])]
        samples = reader.rows("audio", index.place(clip), start, stop)
        return torch.from_numpy(samples[:, 0].astype(np.float32) / 32767.0)[None]

    def segments(
        self, batch_size: int, num_samples: int, *, seed: int, rank: int = 0, world_size: int = 1, skip: int = 0
    ) -> Iterator[Float[Tensor, "B 1 S"]]:
        """See `SegmentSource.segments`."""
        for step in itertools.count(skip):
            rng = np.random.default_rng([seed, step * world_size + rank])
            batch = torch.zeros(batch_size, 1, num_samples)
            for row, (clip, start) in enumerate(self._draw(batch_size, num_samples, rng)):
                samples = self.read(clip, start, num_samples)
                batch[row, :, : samples.shape[-1]] = samples
            yield batch


class AudioFiles:
    """Segments straight from audio files: no cache, but every segment is decoded anew.

    Args:
        clips: What to draw from. Clips whose header cannot be read are left out.
        sample_rate_hz: Rate to resample to.
        workers: Threads that decode.

    Attributes:
        problems: One line for each clip that could not be read; it grows when a file turns out to be damaged.

    Raises:
        UserError: when no clip is left.
    """

    def __init__(self, clips: Sequence[Clip], sample_rate_hz: int = 24_000, workers: int = 2) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.problems: list[str] = []
        self._pool = ThreadPoolExecutor(workers)
        self._clips: list[Clip] = []
        lengths: list[int] = []
        for clip, seconds in zip(clips, self._pool.map(_seconds, clips), strict=True):
            if isinstance(seconds, UserError):
                self.problems.append(str(seconds))
            else:
                self._clips.append(clip)
                lengths.append(max(round(seconds * sample_rate_hz), 1))
        if not self._clips:
            first = self.problems[0] if self.problems else "the list is empty"
            raise UserError(f"no clip can be read ({first}); give a manifest.jsonl or a folder of audio files")
        weights = np.array([clip.weight for clip in self._clips], dtype=np.float64)
        self._draw = _Draw(np.array(lengths, dtype=np.int64), weights)

    def __len__(self) -> int:
        return len(self._clips)

    def segments(
        self, batch_size: int, num_samples: int, *, seed: int, rank: int = 0, world_size: int = 1, skip: int = 0
    ) -> Iterator[Float[Tensor, "B 1 S"]]:
        """See `SegmentSource.segments`. A damaged file is noted in `problems` and another segment drawn.

        Raises:
            UserError: when a hundred segments in a row cannot be read.
        """
        for step in itertools.count(skip):
            rng = np.random.default_rng([seed, step * world_size + rank])
            batch = torch.zeros(batch_size, 1, num_samples)
            rows = list(range(batch_size))
            for _ in range(100):
                drawn = self._draw(len(rows), num_samples, rng)
                results = self._pool.map(lambda place: self._read(place[0], place[1], num_samples), drawn)
                failed = []
                for row, found in zip(rows, results, strict=True):
                    if isinstance(found, UserError):
                        failed.append(row)
                        if str(found) not in self.problems:
                            self.problems.append(str(found))
                    else:
                        batch[row, :, : found.shape[-1]] = found[:, :num_samples]
                rows = failed
                if not rows:
                    break
            else:
                raise UserError(f"too many damaged files, the latest: {self.problems[-1]}")
            yield batch

    def _read(self, number: int, start: int, num_samples: int) -> Tensor | UserError:
        clip = self._clips[number]
        try:
            seconds = (clip.start or 0.0) + start / self.sample_rate_hz
            length = (num_samples + 1) / self.sample_rate_hz  # one more, against rounding at the file's own rate
            if clip.end is not None:
                length = min(length, clip.end - seconds)
            return read_audio(clip.audio, self.sample_rate_hz, seconds, max(length, 1.0 / self.sample_rate_hz))
        except UserError as error:
            return error


def _seconds(clip: Clip) -> float | UserError:
    """Length of a clip by its file's header."""
    try:
        whole = audio_info(clip.audio).duration_s
    except UserError as error:
        return error
    start, end = clip.start or 0.0, min(clip.end or whole, whole)
    if end <= start:
        return UserError(
            f"{clip.audio}: the part from {start} s lies past its end at {whole:.3f} s; correct the manifest"
        )
    return end - start
