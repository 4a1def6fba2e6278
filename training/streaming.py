"""An order of clips that reads tar files from front to back, as object stores and spinning disks like it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from training.index import ClipIndex
from training.packing import shuffled


def front_to_back(
    index: ClipIndex,
    in_tar: Sequence[bool],
    copies: npt.NDArray[np.int64],
    pieces: npt.NDArray[np.int64],
    reach: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """The clips of an epoch's windows, in order.

    The tar files of a cache come in random order, each is read once through (twice, if clips come twice), and clips
    move by at most `reach` windows from there: what a shuffle buffer of that size does. Others are shuffled whole.
    The caches are spread evenly over the epoch.

    Args:
        index: Of the clips.
        in_tar: Whether a cache holds tar files, by number.
        copies: Times that each clip comes.
        pieces: Windows of each clip, each time.
        reach: In windows.
        rng: Decides.
    """
    orders, moments = [], []
    for number, sequential in enumerate(in_tar):
        here = np.flatnonzero(index.reader == number)
        if sequential:
            passes = []
            for time in range(int(copies[here].max(initial=0))):
                wanted = here[copies[here] > time]
                shards, which = np.unique(index.shard[wanted], return_inverse=True)
                order = np.lexsort((index.row[wanted], rng.permutation(len(shards))[which]))
                passes.append(np.repeat(wanted[order], pieces[wanted[order]]))
            clips = np.concatenate(passes) if passes else here[:0]
            clips = clips[shuffled(len(clips), reach, rng)]
        else:
            clips = np.repeat(here, copies[here] * pieces[here])
            rng.shuffle(clips)
        orders.append(clips)
        moments.append((np.arange(len(clips)) + rng.random(len(clips))) / max(len(clips), 1))
    return np.concatenate(orders)[np.argsort(np.concatenate(moments), kind="stable")]
