"""How a cache's clips lie in files: rows of a stream one after another, or tar files in WebDataset's layout.

A shard is one or more files; a clip takes a number of units in each of them, and begins at the unit that its `Place`
says.

Shapes: R rows of a clip, W numbers a row.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

CacheLayout = Literal["rows", "tar"]
_NPY_HEADER = 128
"""Bytes that numpy gives the header of an array of two dimensions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One array of a clip: `width` numbers a row."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return np.dtype(self.dtype).itemsize * self.width


class Place(NamedTuple):
    """Where a clip's rows are."""

    shard: int
    row: int
    """Unit at which the clip begins."""
    rows: int


class Bytes(NamedTuple):
    """Some rows of a stream in a file."""

    path: Path
    start: int
    stop: int


@runtime_checkable
class Layout(Protocol):
    """Of a cache with certain streams."""

    def files(self, folder: Path, shard: int) -> dict[Path, int]:
        """The files of a shard, and the bytes of a unit in each."""
        ...

    def encoded(
        self, place: Place, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]
    ) -> tuple[int, list[bytes | memoryview]]:
        """The units that a clip takes, and what to add to each file for it."""
        ...

    def where(self, folder: Path, name: str, place: Place, start: int, stop: int) -> Bytes:
        """Rows [start, stop) of a clip's stream."""
        ...

    def ending(self) -> bytes:
        """What follows the last clip of a shard."""
        ...


class RowLayout:
    """A file `00000.NAME.bin` for each stream; a unit is a row."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams

    def files(self, folder: Path, shard: int) -> dict[Path, int]:
        """See `Layout`."""
        return {self._path(folder, shard, name): stream.row_bytes for name, stream in self._streams.items()}

    def encoded(
        self, place: Place, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]
    ) -> tuple[int, list[bytes | memoryview]]:
        """See `Layout`; what a clip is about stands in the index alone."""
        return place.rows, [arrays[name].data.cast("B") if arrays[name].size else b"" for name in self._streams]

    def where(self, folder: Path, name: str, place: Place, start: int, stop: int) -> Bytes:
        """See `Layout`."""
        width = self._streams[name].row_bytes
        return Bytes(self._path(folder, place.shard, name), (place.row + start) * width, (place.row + stop) * width)

    def ending(self) -> bytes:
        """Nothing."""
        return b""

    @staticmethod
    def _path(folder: Path, shard: int, name: str) -> Path:
        return folder / f"{shard:05d}.{name}.bin"


class TarLayout:
    """A file `00000.tar`; a clip is a member `KEY.NAME.npy` for each stream and `KEY.json`; a unit is a block of tar.

    The arrays come first, so that where they begin follows from the rows alone, and any of them can be read without
    those before it.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams

    def files(self, folder: Path, shard: int) -> dict[Path, int]:
        """See `Layout`."""
        return {folder / f"{shard:05d}.tar": tarfile.BLOCKSIZE}

    def encoded(
        self, place: Place, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]
    ) -> tuple[int, list[bytes | memoryview]]:
        """See `Layout`."""
        key = f"{place.shard:06d}-{place.row:09d}"
        parts = []
        for name in self._streams:
            content = io.BytesIO()
            np.lib.format.write_array(content, arrays[name], version=(1, 0), allow_pickle=False)
            assert content.tell() == _NPY_HEADER + arrays[name].nbytes, "numpy's header has one size"
            parts.append(_member(f"{key}.{name}.npy", content.getvalue()))
        parts.append(_member(f"{key}.json", json.dumps(about, ensure_ascii=False).encode()))
        joined = b"".join(parts)
        return len(joined) // tarfile.BLOCKSIZE, [joined]

    def where(self, folder: Path, name: str, place: Place, start: int, stop: int) -> Bytes:
        """See `Layout`."""
        begin = place.row * tarfile.BLOCKSIZE
        for other, stream in self._streams.items():
            if other == name:
                break
            begin += tarfile.BLOCKSIZE + _whole_blocks(_NPY_HEADER + place.rows * stream.row_bytes)
        begin += tarfile.BLOCKSIZE + _NPY_HEADER
        width = self._streams[name].row_bytes
        return Bytes(folder / f"{place.shard:05d}.tar", begin + start * width, begin + stop * width)

    def ending(self) -> bytes:
        """Two empty blocks."""
        return bytes(2 * tarfile.BLOCKSIZE)


def layout_of(name: CacheLayout, streams: Mapping[str, Stream]) -> Layout:
    """The layout of this name."""
    return TarLayout(streams) if name == "tar" else RowLayout(streams)


def _member(name: str, content: bytes) -> bytes:
    """A file in a tar file; its time is 0, so that the same clips make the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == tarfile.BLOCKSIZE, "short names need one block"
    return header + content + bytes(_whole_blocks(len(content)) - len(content))


def _whole_blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
