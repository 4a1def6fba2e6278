"""Recordings in tar files, as WebDataset lays them out: the members of a clip have one name and follow each other.

`dir/0001.flac`, `dir/0001.txt` and `dir/0001.json` are one clip: its audio, its text, and what a line of a manifest
would say. Nothing is unpacked and nothing unpickled: a clip is a place in the tar file, read when it is needed, by any
number of threads and in any order.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError
from training.manifest import AUDIO_SUFFIXES, Clip, described

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_DESCRIPTION = 1 << 20
"""Bytes of a `.txt` or `.json`; longer ones are not about a clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """Bytes of a tar file."""

    tar: Path
    name: str
    offset: int
    size: int

    def open(self) -> io.BufferedIOBase:
        """All of them."""
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self}: {error.strerror}") from error
        if len(found) < self.size:
            raise UserError(f"{self}: the tar file is cut short")
        return io.BytesIO(found)

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"


def is_tar_source(source: Path) -> bool:
    """Whether a source names tar files: by its name, or a folder with some and no manifest."""
    if source.is_dir():
        manifest = any((source / name).is_file() for name in ("manifest.jsonl", "metadata.csv"))
        return not manifest and any(source.glob("*.tar"))
    return source.name.endswith((".tar", ".tar.gz", ".tgz"))


def read_tar_files(source: Path) -> Iterator[Clip | str]:
    """The clips of one tar file, a folder of them, or a pattern such as `clips-{000000..000009}.tar`.

    What is wrong gives a line instead, and the clips after it are still found: a tar file that is missing, compressed
    or damaged, a member that is no plain file, a clip without audio or with more than one, an unreadable description.
    """
    if source.is_dir():
        root, paths = source, sorted(source.glob("*.tar"))
    else:
        paths = [Path(path) for path in _expanded(str(source))]
        root = source.parent if len(paths) == 1 else _shared_parent(paths)
    for path in paths:
        yield from _read_tar(path, path.relative_to(root).as_posix())


def _shared_parent(paths: list[Path]) -> Path:
    parents = [path.parent.parts for path in paths]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return Path(*(parts[0] for parts in shared))


def _expanded(pattern: str) -> Iterator[str]:
    """Every name that `{000..009}` stands for; the width of the first number is kept."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _read_tar(path: Path, name: str) -> Iterator[Clip | str]:
    if not path.is_file():
        yield f"{path}: no such file"
        return
    try:
        # Compressed files can't be read from the middle; "r:" refuses them.
        with tarfile.open(path, "r:") as tar:
            members = (member for member in tar if not member.isdir())
            for stem, group in itertools.groupby(members, key=lambda member: _split(member.name)[0]):
                yield from _sample(tar, path, name, stem, list(group))
            yield from _ending(tar, path, name)
    except (tarfile.TarError, OSError, EOFError) as error:
        if _is_compressed(path):
            yield f"{name}: compressed tar files can't be read from the middle; unpack it to a plain .tar"
        else:
            yield f"{name}: damaged, or no tar file ({error}); what follows is left out"


def _split(name: str) -> tuple[str, str]:
    """A clip's name and the kind of a member: up to the first dot of the last part, and what follows it."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _sample(
    tar: tarfile.TarFile, path: Path, name: str, stem: str, members: list[tarfile.TarInfo]
) -> Iterator[Clip | str]:
    where = f"{name}/{stem}"
    audio = []
    entry: dict[str, Any] = {}
    for member in members:
        kind = _split(member.name)[1]
        if f".{kind}" not in AUDIO_SUFFIXES and kind not in ("txt", "json"):
            continue
        if not member.isreg() or member.issparse():
            yield f"{name}/{member.name}: is a link or no plain file"
            return
        if f".{kind}" in AUDIO_SUFFIXES:
            audio.append(member)
            continue
        try:
            said = _description(tar, member)
            entry |= {"text": " ".join(said.split()) or None} if kind == "txt" else _object(said)
        except ValueError as error:
            yield f"{name}/{member.name}: {error}"
            return
    if len(audio) != 1:
        kinds = ", ".join(_split(member.name)[1] for member in members)
        yield f"{where}: has {len(audio)} recordings among {kinds}, but must have one"
        return
    member = audio[0]
    found = TarMember(tar=path, name=member.name, offset=member.offset_data, size=member.size)
    if found.offset + found.size > path.stat().st_size:
        yield f"{name}/{member.name}: the tar file is cut short"
        return
    try:
        yield described(Clip(path=path, key=f"{name}/{member.name}", member=found), entry)
    except ValueError as error:
        yield f"{where}: {error}"


def _description(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Raises ValueError where it is too long, cut short or not UTF-8."""
    if member.size > _LONGEST_DESCRIPTION:
        raise ValueError(f"is {member.size} bytes long, but must be at most {_LONGEST_DESCRIPTION}")
    file = tar.extractfile(member)
    assert file is not None, "a plain file"
    found = file.read()
    if len(found) < member.size:
        raise ValueError("the tar file is cut short")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error


def _object(said: str) -> dict[str, Any]:
    try:
        found = json.loads(said)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def _ending(tar: tarfile.TarFile, path: Path, name: str) -> Iterator[str]:
    """A line where `tarfile` stopped at something that is not an end: it takes damage for one."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            yield f"{name}: damaged at byte {tar.offset}; what follows is left out"


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
