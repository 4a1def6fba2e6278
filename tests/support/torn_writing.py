"""A cache's writer that is cut off in the midst of its work, and another that goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.layouts import Place, Stream
from training.shards import ShardReader, ShardWriter

STREAMS = {"a": Stream(dtype="int16", width=2), "b": Stream(dtype="float32", width=1)}


def assert_all_comes_back(
    folder: Path, lengths: Sequence[int], stop: int, tear: Callable[[], None], **how: Any
) -> None:
    """Write `stop` clips, tear the files, write what is missing, and read every clip as it went in.

    Args:
        folder: Of the cache.
        lengths: Rows of each clip.
        stop: Clips that are written before the cut.
        tear: What the cut does to the files.
        how: More about the `ShardWriter`.
    """
    clips = {
        f"clip{i}": {
            "a": np.full((n, 2), i, np.int16) + np.arange(n, dtype=np.int16)[:, None],
            "b": np.arange(n, dtype=np.float32)[:, None] / 7,
        }
        for i, n in enumerate(lengths)
    }

    def writer() -> ShardWriter:
        return ShardWriter(folder, kind="toy", streams=STREAMS, about={}, **how)

    with writer() as first:
        for key in list(clips)[:stop]:
            first.append(key, "v", clips[key], {"text": "x" * len(key)})
    tear()
    with writer() as second:
        for key, arrays in clips.items():
            if key not in second.places:
                second.append(key, "v", arrays)
        assert second.finish((key, {}) for key in clips) == len(clips)
    reader = ShardReader(folder, "toy")
    lines = list(reader.lines())
    assert [line["key"] for _, line in lines] == list(clips)
    for offset, line in lines:
        assert reader.line(offset) == line
        for name in STREAMS:
            rows = reader.rows(name, Place(line["shard"], line["row"], line["rows"]), 0, line["rows"])
            np.testing.assert_array_equal(rows, clips[line["key"]][name])


def cut(paths: Sequence[Path], size: int) -> None:
    """Take so many bytes from the end of the last file, if there is one."""
    for path in sorted(paths)[-1:]:
        path.write_bytes(path.read_bytes()[: max(path.stat().st_size - size, 0)])
