"""Recordings for fine-tuning: a folder, `metadata.csv` or manifest becomes a cache, with tags that the model knows.

What is left out or hard for the model is counted: bad files, tags, and texts in letters that its pieces do not know.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybridlm.checkpoint import Checkpoint
from tokenizer.audio import audio_info
from tokenizer.errors import UserError
from training.align import FILE_NAME as ALIGNMENT
from training.align import align_caches
from training.corpus import TokenCache, prepare
from training.examples import GOES_ON
from training.letters import Letters, letters_of
from training.manifest import Clip, Manifest, read_manifest

SPEECH_TAG = "speech"
PIECE_SECONDS = 20.0
"""About what recordings without text are cut into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A cache to train on, and what became of the source."""

    cache: Path
    notes: list[str]
    """Lines for a person."""
    num_skipped: int = 0
    letters: Letters = field(default_factory=Letters)


def prepare_recordings(data: Path, output: Path, start: Checkpoint, tags: Sequence[str] | None) -> Prepared:
    """The cache to train on, encoded now into `output` unless the data is one.

    Args:
        data: A manifest, a folder of audio, or a cache made with the model's tokenizer.
        output: Where tokens go; what is there already is not encoded again.
        start: The model.
        tags: Tags of every clip; None: the clips' own that the model knows, and `speech` for text without any.

    Raises:
        UserError: nothing usable.
    """
    if (data / "meta.json").is_file():
        index = TokenCache(data, tokenizer=start.tokenizer).index
        letters = letters_of((index.clip(i).text for i in range(len(index)) if index.has_text[i]), start.text)
        return Prepared(cache=data, notes=_lines(letters), letters=letters)
    manifest = read_manifest(data)
    dropped: set[str] = set()
    clips = [_tagged(part, tags, start.text.tags, dropped) for clip in manifest.clips for part in _pieces(clip)]
    letters = letters_of((clip.text for clip in manifest.clips), start.text)
    manifest = Manifest(source=manifest.source, clips=clips, problems=manifest.problems)
    report = prepare(manifest, output, start.tokenizer, workers=1)
    notes = []
    if report.problems:
        notes.append(
            f"{len(report.problems)} files or rows skipped, the first: {report.problems[0]}; "
            f"all in {output / 'problems.txt'}"
        )
    if dropped:
        notes.append(f"tags that the model does not know are left out: {', '.join(sorted(dropped))}")
    return Prepared(cache=output, notes=notes + _lines(letters), num_skipped=len(report.problems), letters=letters)


def align_texts(cache: Path) -> str | None:
    """Tell a model that reads where the texts are spoken; it learns to read on its own where they are too few.

    Returns:
        What became of it; None where it is known already.
    """
    if (cache / ALIGNMENT).exists():
        return None
    try:
        return f"{align_caches([cache])} texts aligned with their recordings"
    except UserError as error:
        return f"texts are not aligned: {error}"


def _lines(letters: Letters) -> list[str]:
    line = letters.line()
    return [line] if line else []


def _pieces(clip: Clip) -> Iterator[Clip]:
    """Cut a long recording without text, so that a part of it can be held out; pieces know that they go on."""
    if clip.text:
        yield clip
        return
    start = clip.start or 0.0
    try:
        end = clip.end if clip.end is not None else audio_info(clip.audio).duration_s
    except UserError:  # `prepare` counts and reports what can't be read
        end = start
    count = max(round((end - start) / PIECE_SECONDS), 1)
    borders = [start + (end - start) * number / count for number in range(count + 1)]
    if count == 1:
        yield clip
        return
    for number, (first, last) in enumerate(itertools.pairwise(borders)):
        labels = clip.labels if number == count - 1 else {**clip.labels, GOES_ON: "yes"}
        yield dataclasses.replace(
            clip, start=first, end=last, key=f"{clip.key}#{first:g}-{last:g}", duration=last - first, labels=labels
        )


def _tagged(clip: Clip, given: Sequence[str] | None, known: Sequence[str], dropped: set[str]) -> Clip:
    if given is not None:
        return dataclasses.replace(clip, tags=tuple(given))
    dropped.update(tag for tag in clip.tags if tag not in known)
    tags = tuple(tag for tag in clip.tags if tag in known)
    if not tags and clip.text and SPEECH_TAG in known:
        tags = (SPEECH_TAG,)
    return dataclasses.replace(clip, tags=tags)
