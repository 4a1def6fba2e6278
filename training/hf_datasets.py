"""Recordings in data sets of Hugging Face's `datasets`: a folder made by `save_to_disk`, or one of the hub.

The column of audio holds encoded files, which are read as such, one at a time when they are needed; the library decodes
nothing. Its other columns are what a line of a manifest would say; of some common names for the text the first counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError
from training.manifest import Clip, described

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text")
_AUDIO_COLUMNS = ("audio", "speech", "file")
_ROWS_AT_A_TIME = 1000
PREFIX = "hf:"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """The recording of one row."""

    rows: Any
    """A `datasets.Dataset` of nothing but the audio."""
    number: int
    column: str
    root: Path
    """Files that rows name instead of holding them must lie here."""
    name: str

    def open(self) -> io.BufferedIOBase:
        """Its bytes."""
        found = self.rows[self.number][self.column]
        if found is None:
            raise UserError(f"{self}: holds no audio")
        if found["bytes"] is not None:
            return io.BytesIO(found["bytes"])
        path = self.root / (found["path"] or "")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{self}: its audio, {found['path']}, lies outside {self.root}; move it inside")
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{self}: its audio, {found['path']}: {error.strerror}") from error

    def __str__(self) -> str:
        return self.name


def is_saved_dataset(source: Path) -> bool:
    """Whether a folder was made by `save_to_disk`."""
    return (source / "dataset_dict.json").is_file() or (
        (source / "dataset_info.json").is_file() and (source / "state.json").is_file()
    )


def read_dataset(folder: Path) -> Iterator[Clip | str]:
    """The clips of a folder made by `save_to_disk`.

    Raises:
        UserError: without `datasets`, or what it says of the folder.
    """
    datasets = _library(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is a damaged data set ({_line(error)}); save it again") from error
    return _read(datasets, found, str(folder), folder)


def read_hub(name: str) -> Iterator[Clip | str]:
    """The clips of `hf:OWNER/NAME`, or with a configuration `hf:OWNER/NAME:CONFIG`, downloaded once to its cache.

    Raises:
        UserError: without `datasets`, or what it says of the data set.
    """
    datasets = _library(name)
    hub_id, _, config = name.removeprefix(PREFIX).partition(":")
    try:
        found = datasets.load_dataset(hub_id, config or None)
    except Exception as error:
        raise UserError(
            f"{name} cannot be loaded ({_line(error)}); check the name and the network, or give a folder that "
            "save_to_disk made"
        ) from error
    return _read(datasets, found, name, Path(datasets.config.HF_CACHE_HOME))


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source} is a data set of Hugging Face, which needs its library; pip install 'hybridlm[datasets]'"
        ) from error
    return datasets


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(datasets: Any, found: Any, source: str, root: Path) -> Iterator[Clip | str]:
    if not isinstance(found, dict):
        yield from _split(datasets, found, source, root, None)
        return
    for split, rows in found.items():
        yield from _split(datasets, rows, source, root, str(split))


def _split(datasets: Any, rows: Any, source: str, root: Path, split: str | None) -> Iterator[Clip | str]:
    sound = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Audio)]
    sound.sort(key=lambda name: _AUDIO_COLUMNS.index(name) if name in _AUDIO_COLUMNS else len(_AUDIO_COLUMNS))
    if not sound:
        names = ", ".join(rows.column_names)
        yield f"{source}: no column of type Audio among {names}; use cast_column('audio', Audio())"
        return
    column = sound[0]
    audio = rows.select_columns([column]).cast_column(column, datasets.Audio(decode=False))
    others = [name for name in rows.column_names if name not in sound]
    text = next((name for name in TEXT_COLUMNS if name in others), None)
    named = {name: f for name, f in rows.features.items() if name in others and isinstance(f, datasets.ClassLabel)}
    files = rows.cache_files
    path = Path(files[0]["filename"]) if files else root
    for number, entry in enumerate(_entries(rows.select_columns(others) if others else None, len(rows))):
        for name, feature in named.items():
            if entry[name] is not None and entry[name] >= 0:
                entry[name] = feature.int2str(entry[name])
        if text is not None:
            entry["text"] = entry.pop(text)
        key = f"{split}/{number}" if split else str(number)
        member = DatasetRow(rows=audio, number=number, column=column, root=root, name=f"{source}, row {key}")
        try:
            yield described(Clip(path=path, key=key, member=member), {"split": split, **_plain(entry)})
        except ValueError as error:
            yield f"{source}, row {key}: {error}"


def _entries(rows: Any, count: int) -> Iterator[dict[str, Any]]:
    """The other columns of each row; reading them leaves the audio alone."""
    if rows is None:
        for _ in range(count):
            yield {}
        return
    for batch in rows.iter(batch_size=_ROWS_AT_A_TIME):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON does not know, such as pictures and times: no label is made of these."""
    return {k: v for k, v in entry.items() if isinstance(v, (str, int, float, bool, list)) or v is None}
