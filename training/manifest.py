"""Which clips there are: manifests, folders, and rules that turn their labels into tags."""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokenizer.audio import Member
from tokenizer.errors import UserError

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One recording, or a part of one."""

    path: Path
    """The file; where recordings lie in something else, that."""
    key: str
    """Names the clip within its source: the relative path, with `#start-end` for a part."""
    member: Member | None = None
    """The recording in `path`, if it does not fill it."""
    duration: float | None = None
    """Seconds, where the manifest says so."""
    split: str | None = None
    text: str | None = None
    tags: tuple[str, ...] = ()
    start: float | None = None
    """Seconds into the file."""
    end: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    """Every other key of the manifest."""
    weight: float = 1.0
    """How often it is drawn, against the others."""

    @property
    def audio(self) -> Path | Member:
        """What to read."""
        return self.path if self.member is None else self.member

    def open(self) -> io.BufferedIOBase:
        """The bytes of the recording.

        Raises:
            OSError: they cannot be read.
            UserError: they are not there.
        """
        return self.path.open("rb") if self.member is None else self.member.open()

    @property
    def read_duration(self) -> float | None:
        """Seconds to read from `start`; None: to the end of the file."""
        return None if self.end is None else self.end - (self.start or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The clips of a source in its own order, and what was wrong with the rest."""

    source: Path
    clips: list[Clip]
    problems: list[str]
    """One line each: where, what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TagRule:
    """Says what a recipe makes of the clips that match: their tags, whether their text counts, how often they come.

    A clip follows the first rule that matches it; with rules given, a clip that matches none is left out.
    """

    where: dict[str, str] = field(default_factory=dict)
    """Label (or `split`, `path`, `tag`) to wanted value; `*` and `?` match as in file names. Empty: every clip."""
    tags: tuple[str, ...] = ()
    """Tags in order; `{name}` stands for the clip's label `name`: `speaker:{speaker}`. They replace the clip's own."""
    keep_tags: bool = False
    """Also keep the clip's own tags, after these."""
    text: bool = True
    """Whether the text is used."""
    weight: float = 1.0
    """How often a clip is drawn: 2 is twice an epoch, 0.5 every other epoch, 0 never."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight} must be a number of at least 0")

    def matches(self, clip: Clip) -> bool:
        """Whether every condition of `where` holds."""
        for name, pattern in self.where.items():
            if name == "tag":
                if not any(fnmatchcase(tag, pattern) for tag in clip.tags):
                    return False
                continue
            value = {"split": clip.split, "path": clip.key}.get(name, clip.labels.get(name))
            if value is None or not fnmatchcase(value, pattern):
                return False
        return True

    def apply(self, clip: Clip) -> Clip:
        """The clip with this rule's tags, text and weight.

        Raises:
            UserError: when a tag asks for a label that the clip lacks.
        """
        tags = [_filled(tag, clip) for tag in self.tags]
        if self.keep_tags:
            tags += [tag for tag in clip.tags if tag not in tags]
        return replace(clip, tags=tuple(tags), text=clip.text if self.text else None, weight=clip.weight * self.weight)


def _filled(template: str, clip: Clip) -> str:
    """Put labels into a tag's braces, lower-case and without spaces, as tags are."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            if name not in clip.labels:
                raise UserError(
                    f"tag '{template}': clip {clip.key} has no label '{name}'; "
                    f"its labels are {', '.join(clip.labels) or 'none'}: narrow the rule's 'where' or drop the tag"
                )
            parts.append("-".join(clip.labels[name].lower().split()))
    return "".join(parts)


def apply_rules(clips: Iterator[Clip] | Sequence[Clip], rules: Sequence[TagRule]) -> Iterator[Clip]:
    """Give every clip the tags, text and weight of its first matching rule; without rules, clips pass as they are.

    Clips that match no rule, or one of weight 0, are left out.

    Raises:
        UserError: after the last clip, for a rule whose `where` names a label that no clip has.
    """
    seen: set[str] = {"split", "path", "tag"}
    for clip in clips:
        seen.update(clip.labels)
        if not rules:
            yield clip
            continue
        for rule in rules:
            if rule.matches(clip):
                changed = rule.apply(clip)
                if changed.weight > 0:
                    yield changed
                break
    for rule in rules:
        for name in rule.where:
            if name not in seen:
                near = difflib.get_close_matches(name, seen, n=1, cutoff=0.0)
                raise UserError(f"tag rule: no clip has the label '{name}'; did you mean '{near[0]}'?")


def read_manifest(source: Path, split: str | None = None) -> Manifest:
    """List the clips of a source; see `iterate_clips` for what a source is.

    Args:
        source: One of these.
        split: Keep only clips of this split; clips without a split belong to every split.

    Raises:
        UserError: when the source is not there or nothing usable is left; the first problem is named.
    """
    source = Path(source)
    clips: list[Clip] = []
    problems: list[str] = []
    for found in iterate_clips(source):
        if isinstance(found, str):
            problems.append(found)
        else:
            clips.append(found)
    if not clips:
        why = f"{len(problems)} problems, the first: {problems[0]}" if problems else "no audio found"
        raise UserError(f"{source} has no usable clip ({why}); give a manifest.jsonl or a folder of audio files")
    if split is not None:
        splits = sorted({clip.split for clip in clips if clip.split is not None})
        clips = [clip for clip in clips if clip.split in (None, split)]
        if not clips:
            raise UserError(f"{source} has no clip of split '{split}'; its splits are {', '.join(splits)}")
    return Manifest(source=source, clips=clips, problems=problems)


def iterate_clips(source: Path) -> Iterator[Clip | str]:
    """The clips of a source one by one, in its own order, and in place of what is wrong a line that says so.

    Sources: a JSON-lines file (keys `audio` or `path`, relative to the file's folder; `text`, `duration`, `start`,
    `end`, `split`, `tags`; every other key is a label), an LJSpeech `metadata.csv` (`id|text|normalized text`, audio in
    `wavs/` or beside it), a folder that holds a `manifest.jsonl` or a `metadata.csv`, any other folder (audio found at
    every depth, text in a `.txt` or `.lab` of the same name), or one audio file; tar files as WebDataset makes them
    (`training.tar_files`: one, a folder of them, or `name-{000..009}.tar`); data sets of Hugging Face's `datasets`
    (`training.hf_datasets`: a folder made by `save_to_disk`, or `hf:` and a hub id).

    Raises:
        UserError: when the source is not there.
    """
    # Imported here, since they make clips.
    from training.hf_datasets import is_saved_dataset, read_dataset, read_hub
    from training.tar_files import is_tar_source, read_tar_files

    if str(source).startswith("hf:"):
        return read_hub(str(source))
    source = Path(source)
    if is_tar_source(source):
        return read_tar_files(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    return read_dataset(source) if is_saved_dataset(source) else _read(source)


def _read(source: Path) -> Iterator[Clip | str]:
    if source.is_dir():
        for name in ("manifest.jsonl", "metadata.csv"):
            if (source / name).is_file():
                return _read(source / name)
        return _read_folder(source)
    if source.suffix.lower() == ".csv":
        return _read_ljspeech(source)
    if source.suffix.lower() in AUDIO_SUFFIXES:
        return iter([_with_sidecar(source, source.parent)])
    return _read_json_lines(source)


def _lines(source: Path) -> Iterator[tuple[str, str | None]]:
    """Lines that are not blank, as (where, text); text None: not UTF-8."""
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{source.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield where, None
                continue
            if text:
                yield where, text


def _read_json_lines(source: Path) -> Iterator[Clip | str]:
    for where, line in _lines(source):
        if line is None:
            yield f"{where}: not UTF-8 text"
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield f"{where}: not JSON ({error})"
            continue
        if not isinstance(entry, dict):
            yield f"{where}: is not a JSON object"
            continue
        try:
            yield _clip(entry, source.parent)
        except ValueError as error:
            yield f"{where}: {error}"


def _clip(entry: Mapping[str, Any], root: Path) -> Clip:
    """One clip of a manifest's object; ValueError says what is wrong with it."""
    rest = dict(entry)
    names = [name for name in ("audio", "path") if name in rest]
    if not names:
        raise ValueError(f"has neither 'audio' nor 'path'; its keys are {', '.join(rest) or 'none'}")
    name = rest.pop(names[0])
    if not isinstance(name, str) or not name:
        raise ValueError(f"{names[0]}={name!r} must be a path")
    clip = described(Clip(path=root / name, key=name), rest)
    if leaves(name):
        raise ValueError(
            f"{names[0]}={name!r} leaves the manifest's folder; move the audio inside, or give a whole path"
        )
    if not (root / name).is_file():
        raise ValueError(f"no such file: {name}")
    return clip


def described(clip: Clip, entry: Mapping[str, Any]) -> Clip:
    """The clip with what an object says of it besides its place: `text`, `duration`, ..., and labels.

    Raises:
        ValueError: what is wrong with it.
    """
    rest = dict(entry)
    duration = _seconds(rest, "duration")
    start, end = _seconds(rest, "start"), _seconds(rest, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end={end} must be after start={start or 0.0}")
    if duration is not None and duration <= 0:
        raise ValueError(f"duration={duration} must be above 0")
    text, split = (_text(rest, key) for key in ("text", "split"))
    tags = rest.pop("tags", None) or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags={tags!r} must be a list of texts")
    part = "" if start is None and end is None else f"#{start or 0.0:g}-{'' if end is None else f'{end:g}'}"
    labels = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in rest.items() if value is not None
    }
    return replace(
        clip,
        key=clip.key + part,
        duration=duration,
        split=split,
        text=text,
        tags=tuple(tags),
        start=start,
        end=end,
        labels=labels,
    )


def leaves(name: str) -> bool:
    """Whether a relative path climbs out of the folder it starts in: a corpus that was handed on must not read on."""
    return os.path.normpath(name).split(os.sep)[0] == os.pardir


def _seconds(entry: dict[str, Any], key: str) -> float | None:
    value = entry.pop(key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{key}={value!r} must be a number of seconds, at least 0")
    return float(value)


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.pop(key, None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}={value!r} must be text")
    return value


def _read_ljspeech(source: Path) -> Iterator[Clip | str]:
    for where, line in _lines(source):
        if line is None:
            yield f"{where}: not UTF-8 text"
            continue
        fields = [part.strip() for part in line.split("|")]
        if len(fields) < 2:
            yield f"{where}: must be id|text or id|text|normalized text"
            continue
        name, text = fields[0], (fields[2] if len(fields) > 2 and fields[2] else fields[1])
        if leaves(name) or Path(name).is_absolute():
            yield f"{where}: id {name} leaves the folder of {source.name}; move the audio inside"
            continue
        places = [
            source.parent / folder / f"{name}{suffix}"
            for folder in ("wavs", "")
            for suffix in ("", *sorted(AUDIO_SUFFIXES))
        ]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            yield f"{where}: no audio for id {name} in wavs/ or beside {source.name}"
            continue
        yield Clip(path=path, key=path.relative_to(source.parent).as_posix(), text=text)


def _read_folder(root: Path) -> Iterator[Clip | str]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES:
                try:
                    yield _with_sidecar(Path(folder) / name, root)
                except UnicodeDecodeError:
                    yield f"{Path(folder) / name}: the text beside it is not UTF-8"


def _with_sidecar(path: Path, root: Path) -> Clip:
    """A clip with the text of the file beside it, where there is one."""
    text = None
    for suffix in (".txt", ".lab"):
        if path.with_suffix(suffix).is_file():
            text = " ".join(path.with_suffix(suffix).read_text(encoding="utf-8-sig").split()) or None
            break
    return Clip(path=path, key=path.relative_to(root).as_posix(), text=text)
