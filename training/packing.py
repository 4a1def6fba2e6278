"""Which clips share a row of a batch: first fit, longest first, so that rows are full whatever the clips' lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

POOL = 2048
"""Windows that are packed together; among these, like lengths come into one batch."""
_MOST_PADDING = 4
"""What is not packed (a frame's embedding, the heads' states) lies side by side, as long as the longest window: at most
so many times the frames of a batch."""


def first_fit(lengths: Sequence[int], capacity: int, widest: int) -> list[list[int]]:
    """Put items into rows, each into the first that has room; a row holds their numbers, in order.

    Lengths that fall make at most 11/9 of the fewest possible rows (Johnson 1973).

    Args:
        lengths: At most `capacity` each, the longest first.
        capacity: Of a row.
        widest: A row's first length times its number of items, at most.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    places = np.zeros(len(lengths), dtype=np.int64)
    for number, length in enumerate(lengths):
        fits = (room[: len(rows)] >= length) & (places[: len(rows)] > 0)
        first = int(fits.argmax()) if fits.any() else len(rows)
        if first == len(rows):
            rows.append([])
            room[first], places[first] = capacity, max(widest // length, 1)
        rows[first].append(number)
        room[first] -= length
        places[first] -= 1
    return rows


def shuffled(count: int, reach: float | None, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers below `count` in random order, moved by at most `reach` from where they were; None: anywhere."""
    if reach is None:
        return rng.permutation(count)
    return np.argsort(np.arange(count) + reach * rng.random(count), kind="stable")


def packed_batches(
    lengths: npt.NDArray[np.int64],
    row_frames: int,
    batch_frames: int,
    rng: np.random.Generator,
    reach: int | None = None,
) -> Iterator[list[list[int]]]:
    """An epoch's batches: rows of windows, by number.

    Args:
        lengths: Frames of each window, in the epoch's random order.
        row_frames: Most frames of a row.
        batch_frames: Most frames of a batch: so many rows.
        rng: Shuffles the batches.
        reach: Windows that a batch may move by; None: any.
    """
    batches: list[list[list[int]]] = []
    widest = _MOST_PADDING * batch_frames
    for start in range(0, len(lengths), POOL):
        pool = start + np.argsort(-lengths[start : start + POOL], kind="stable")
        batch: list[list[int]] = []
        windows = 0
        for row in first_fit(lengths[pool].tolist(), row_frames, widest):
            too_wide = bool(batch) and (windows + len(row)) * lengths[batch[0][0]] > widest  # rows come longest first
            if len(batch) == batch_frames // row_frames or too_wide:
                batches.append(batch)
                batch, windows = [], 0
            batch.append(pool[row].tolist())
            windows += len(row)
        batches.append(batch)
    batches_reach = None if reach is None else reach * len(batches) / len(lengths)
    for number in shuffled(len(batches), batches_reach, rng):
        yield batches[number]
