"""Rows of arrays on disk: clips one after another in memory-mapped shards that survive a kill at any moment.

A cache is a folder:

    meta.json         what it holds: kind, streams (dtype and width of a row), and who made it
    00000.NAME.bin    rows of one stream, clip after clip, up to a bounded number of rows a shard; or 00000.tar
                      (`training.layouts`)
    written.jsonl     a line for each clip whose rows are complete; appended after the rows are
    clips.jsonl       the index: place, text, tags and labels of each clip; written at the end, as a whole

Rows without a line in `written.jsonl` are cut off when writing goes on, so nothing is ever half there.

Several processes may fill one cache: each has shards, a lock and a `written.RANK.jsonl` of its own (the first has
`written.jsonl`), and the index names the shards of all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.layouts import CacheLayout, Place, Stream, layout_of

FORMAT_VERSION = 1
_SHARDS_A_RANK = 100_000
_MAX_SHARD_BYTES = 1 << 30


def _full(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"{folder} cannot be written: {reason}; what is complete stays, make room there and run it again")


class ShardWriter:
    """Appends clips to a cache, going on where an earlier writer stopped.

    Args:
        folder: The cache's folder; made when missing.
        kind: `audio` or `tokens`.
        streams: Arrays of a clip, by name; all have the same number of rows.
        about: What else `meta.json` says; must be equal when writing goes on.
        max_rows: Rows (blocks of tar files) a shard; a longer clip has a shard of its own. By default about 1 GiB.
        layout: Of the files.
        rank: Of this writer, among those that fill the folder at once.

    Raises:
        UserError: the folder holds another kind of cache, cannot be written, or is being written by another process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        streams: Mapping[str, Stream],
        about: Mapping[str, Any],
        max_rows: int | None = None,
        layout: CacheLayout = "rows",
        rank: int = 0,
    ) -> None:
        self.folder = folder
        self._rank = rank
        self.streams = dict(streams)
        self._layout = layout_of(layout, self.streams)
        self._max_units = max_rows or max(_MAX_SHARD_BYTES // max(self._layout.files(folder, 0).values()), 1)
        self._stack = ExitStack()
        self._files: list[BinaryIO] = []
        self.places: dict[str, tuple[str, Place]] = {}
        """Complete clips: key to stamp and place."""
        meta = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            **about,
            "streams": {name: {"dtype": s.dtype, "width": s.width} for name, s in streams.items()},
            "layout": layout,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._check_meta(meta)
            self._recover()
            self._log = self._stack.enter_context(self._log_path.open("ab"))
            self._open_shard()
        except OSError as error:
            self._stack.close()
            raise _full(folder, error) from error
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end_shard()
        except OSError as error:
            raise _full(self.folder, error) from error
        finally:
            self._stack.close()

    @property
    def _log_path(self) -> Path:
        return self.folder / (f"written.{self._rank}.jsonl" if self._rank else "written.jsonl")

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no advisory locks; there the user must not start two writers
            return
        file = self._stack.enter_context((self.folder / (f".lock.{self._rank}" if self._rank else ".lock")).open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is being written by another process; wait for it or stop it") from error

    def _check_meta(self, meta: dict[str, Any]) -> None:
        path = self.folder / "meta.json"
        if path.is_file():
            found = read_meta(self.folder)
            for key, value in meta.items():
                if found.get(key, "rows" if key == "layout" else None) != value:
                    raise UserError(
                        f"{self.folder} was made with {key}={found.get(key)}, but {value} is asked for; "
                        "choose another output folder, or delete this one"
                    )
            return
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def _recover(self) -> None:
        """Take over complete clips; cut off what a killed writer left behind."""
        self._shard, self._row = self._rank * _SHARDS_A_RANK, 0
        if self._log_path.is_file():
            valid = 0
            for key, stamp, place, units, end in self._complete(self._log_path):
                self.places[key] = (stamp, place)
                self._shard, self._row, valid = place.shard, place.row + units, end
            os.truncate(self._log_path, valid)
        for path, unit in self._layout.files(self.folder, self._shard).items():
            if path.is_file():
                os.truncate(path, self._row * unit)
        later = self._shard + 1
        while left := [path for path in self._layout.files(self.folder, later) if path.is_file()]:
            for path in left:
                path.unlink()
            later += 1

    def _complete(self, log: Path) -> Iterator[tuple[str, str, Place, int, int]]:
        """Key, stamp, place and units of the clips of a log that are whole, and where in the log each line ends."""
        sizes: dict[int, int] = {}
        end = 0
        with log.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    return
                place = Place(entry["shard"], entry["row"], entry["rows"])
                units = entry.get("units", place.rows)
                if place.row + units > sizes.get(place.shard, -1):  # a shard that is being written has grown since
                    sizes[place.shard] = self._units_on_disk(place.shard)
                if place.row + units > sizes[place.shard]:  # the machine, not just the program, went down
                    return
                end += len(line)
                yield entry["key"], entry["stamp"], place, units, end

    def take_over(self, stamps: Mapping[str, str]) -> None:
        """Know also what other writers have completed so far of the clips with these stamps, by key."""
        for log in sorted(self.folder.glob("written*.jsonl")):
            if log == self._log_path:
                continue
            for key, stamp, place, _, _ in self._complete(log):
                if stamps.get(key) == stamp and self.places.get(key, ("", None))[0] != stamp:
                    self.places[key] = (stamp, place)

    def _units_on_disk(self, shard: int) -> int:
        files = self._layout.files(self.folder, shard)
        return min(path.stat().st_size // unit if path.is_file() else 0 for path, unit in files.items())

    def _open_shard(self) -> None:
        self._end_shard()
        files = self._layout.files(self.folder, self._shard)
        self._files = [self._stack.enter_context(path.open("ab")) for path in files]

    def _end_shard(self) -> None:
        for file in self._files:
            file.write(self._layout.ending())
            file.close()
        self._files = []

    def append(
        self, key: str, stamp: str, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any] | None = None
    ) -> None:
        """Add a clip; an earlier clip of the same key is forgotten.

        Args:
            key: Names the clip.
            stamp: Tells versions of the clip's source apart.
            arrays: One (rows, width) array a stream.
            about: What tar files say of it beside its frames; training reads the index.

        Raises:
            UserError: when the disk is full; the cache stays as it was before this clip.
        """
        rows = {len(array) for array in arrays.values()}
        assert arrays.keys() == self.streams.keys(), "one array a stream"
        assert len(rows) == 1, "equally many rows in all"
        place = Place(self._shard, self._row, rows.pop())
        stored = {
            name: np.ascontiguousarray(arrays[name], dtype=stream.dtype).reshape(place.rows, stream.width)
            for name, stream in self.streams.items()
        }
        facts = {"key": key, **(about or {})}
        try:
            units, parts = self._layout.encoded(place, stored, facts)
            if self._row and self._row + units > self._max_units:
                place = Place(self._shard + 1, 0, place.rows)
                units, parts = self._layout.encoded(place, stored, facts)
                self._shard = place.shard
                self._open_shard()
            for file, part in zip(self._files, parts, strict=True):
                file.write(part)
                file.flush()
            entry = {"key": key, "stamp": stamp, **place._asdict()}
            entry |= {"units": units} if units != place.rows else {}
            self._log.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._log.flush()
        except OSError as error:
            raise _full(self.folder, error) from error
        self._row = place.row + units
        self.places[key] = (stamp, place)

    def finish(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Write the index: one line for each (key, record), in order, leaving out clips that are not here.

        Returns:
            The number of clips in the index.
        """
        count = 0
        with replacing(self.folder / "clips.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for key, record in records:
                if key in self.places:
                    _, place = self.places[key]
                    file.write(json.dumps({**place._asdict(), "key": key, **record}, ensure_ascii=False) + "\n")
                    count += 1
        return count


def read_meta(folder: Path) -> dict[str, Any]:
    """Read and check a cache's `meta.json`.

    Raises:
        UserError: not a cache, or one of another version.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared cache (it has no meta.json); make one with `hybridlm prepare`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete the folder and prepare it again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format_version={version}, but must be {FORMAT_VERSION}; prepare it again")
    return dict(meta)


class ShardReader:
    """Reads clips' rows from a finished cache, mapping files into memory as they are touched.

    Raises:
        UserError: not a cache of this kind, or not finished.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        if self.meta["kind"] != kind:
            raise UserError(f"{folder} is a cache of {self.meta['kind']}, but must be one of {kind}")
        self.streams = {name: Stream(**stream) for name, stream in self.meta["streams"].items()}
        self.in_tar = self.meta.get("layout") == "tar"
        """Whether it is to be read from front to back."""
        self._layout = layout_of("tar" if self.in_tar else "rows", self.streams)
        self._index = folder / "clips.jsonl"
        if not self._index.is_file():
            raise UserError(f"{folder} is not complete (it has no clips.jsonl); prepare it again, it will go on")
        self._maps: dict[Path, npt.NDArray[Any]] = {}

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The index: byte offset and content of each line."""
        offset = 0
        with self._index.open("rb") as file:
            for line in file:
                yield offset, json.loads(line)
                offset += len(line)

    def line(self, offset: int) -> dict[str, Any]:
        """The line of the index at a byte offset."""
        with self._index.open("rb") as file:
            file.seek(offset)
            return dict(json.loads(file.readline()))

    def rows(self, name: str, place: Place, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of a clip's stream, (rows, width); a view of the file.

        Raises:
            UserError: when the file is shorter than the index says.
        """
        stream = self.streams[name]
        found = self._layout.where(self.folder, name, place, start, stop)
        path = found.path
        if path not in self._maps:
            if not path.is_file():
                raise UserError(f"{path} is missing; prepare {self.folder} again")
            size = path.stat().st_size
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        mapped = self._maps[path]
        if found.stop > len(mapped):
            raise UserError(f"{path} is cut short; prepare {self.folder} again")
        return mapped[found.start : found.stop].view(stream.dtype).reshape(-1, stream.width)
