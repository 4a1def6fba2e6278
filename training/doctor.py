"""`hybridlm doctor`: what is wrong with recordings, and with a model or adapter on them, before time is spent on them.

Every check ends in one line: `fine`, `look` (see whether it is meant so) or `broken` (training or figures would be
worth nothing), and what to do. All rows are gone through without decoding; what costs more is done on a sample, whose
size is said. So ten thousand hours take the memory of one.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hybridlm.adapter import adapter_names
from hybridlm.checkpoint import Checkpoint, load_model
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.text import TextTokenizer
from training.background import in_order
from training.corpus import TokenCache, prepare
from training.doctor_corpus import TABLE_SIZE, CorpusPass
from training.doctor_model import (
    adapter_verdict,
    codec_verdict,
    latents_verdict,
    learning_verdict,
    scratch_clips,
    stop_verdict,
)
from training.doctor_sound import Sound, copies_verdict, listen, sound_verdicts
from training.letters import Letters
from training.listening import Sampler
from training.manifest import Clip, Manifest, iterate_clips
from training.verdict import Verdict, judge

MODEL_CLIPS, MODEL_SECONDS = 24, 15.0
"""What is shown to the model."""


def run(
    data: Path,
    model: str | Path = "box",
    adapter: str | Path | None = None,
    *,
    num_clips: int = 200,
    json_file: Path | None = None,
    device: str | None = "cpu",
    sampler: Sampler | None = None,
    console: Console | None = None,
) -> list[Verdict]:
    """Examine recordings and a model, and print a verdict a line.

    Args:
        data: A manifest, an LJSpeech `metadata.csv` or a folder of audio.
        model: "box", a folder or a hub id.
        adapter: An adapter of that model.
        num_clips: Size of the sample that is decoded; the model is shown a part of it.
        json_file: Where the verdicts go as JSON.
        device: Where the model computes.
        sampler: Makes a model sound, to tell whether an adapter changes its output.
        console: Where the lines go; standard output by default.

    Returns:
        The verdicts, in the order of the checks.

    Raises:
        UserError: data or a model that can't be read at all.
    """
    if num_clips < 1:
        raise UserError(f"--clips {num_clips} must be at least 1")
    console = console or Console()
    if (Path(data) / "meta.json").is_file():
        raise UserError(f"--data {data} is a cache; give the recordings that it was made of")
    rows = iterate_clips(Path(data))
    found = load_model(model, device, adapter)
    base = None
    if adapter_names(found.model) and found.base is not None:
        base = load_model(model if adapter is not None else found.base.name, device)
    verdicts: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory(prefix="hybridlm-doctor-") as scratch,
        console.status("looking at the recordings, then at the model on some of them"),  # on a terminal
    ):
        for verdict in _examine(rows, found, base, num_clips, Path(scratch), sampler):
            verdicts.append(verdict)
            console.print(verdict.line(), markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        _write(Path(json_file), verdicts, data=str(data), model=str(model), adapter=adapter and str(adapter))
    return verdicts


def is_broken(verdicts: list[Verdict]) -> bool:
    """Whether anything is."""
    return any(verdict.level == "broken" for verdict in verdicts)


def _examine(
    rows: Iterator[Clip | str],
    found: Checkpoint,
    base: Checkpoint | None,
    num_clips: int,
    scratch: Path,
    sampler: Sampler | None,
) -> Iterator[Verdict]:
    sounds = yield from examine_recordings(rows, num_clips, found.tokenizer.sample_rate_hz, found.text)
    if sounds:
        yield from _with_model(sounds, found, base, scratch, sampler)


def examine_recordings(
    rows: Iterable[Clip | str], num_clips: int, model_rate_hz: int, text: TextTokenizer
) -> Generator[Verdict, None, list[Sound]]:
    """The checks that need no model.

    Args:
        rows: Clips, and lines about what is wrong (`iterate_clips`).
        num_clips: How many are decoded.
        model_rate_hz: Sampling rate of the model's tokenizer.
        text: The model's text pieces.

    Returns:
        The clips that were decoded.
    """
    corpus = CorpusPass(num_clips, table_size=TABLE_SIZE)
    corpus.read(rows)
    yield from corpus.verdicts()
    sounds: list[Sound] = []
    unreadable: list[str] = []
    for clip, heard in in_order(corpus.sample, listen, 1):
        if isinstance(heard, UserError):
            unreadable.append(str(heard))
            continue
        sounds.append(heard)
        if clip.text and not (clip.read_duration or clip.duration):
            corpus.pace.add(clip.text, heard.duration_s, clip.key)
    yield _reading(corpus, unreadable)
    if sounds:
        yield from sound_verdicts(sounds, corpus.num_clips, model_rate_hz)
        yield copies_verdict(sounds, corpus.num_clips)
        yield corpus.pace.verdict()
        yield _letters(sounds, text)
    return sounds


def _reading(corpus: CorpusPass, unreadable: list[str]) -> Verdict:
    count = len(corpus.sample)
    on = f"{count} clips" + ("" if count == corpus.num_clips else f" sampled from {corpus.num_clips}")
    return judge(
        "reading",
        f"{len(unreadable)} of {on} cannot be decoded",
        look=bool(unreadable),
        broken=2 * len(unreadable) > count or count == 0,
        remedy="mend, convert or drop them",
        figures={"unreadable": len(unreadable), "sampled": count, "clips": corpus.num_clips},
        examples=unreadable,
    )


def _letters(sounds: list[Sound], text: TextTokenizer) -> Verdict:
    letters = Letters()
    for sound in sounds:
        if sound.clip.text:
            letters.add(sound.clip.text, text)
    return judge(
        "letters",
        letters.line() or f"the model's text pieces know every letter of {letters.num_texts} texts",
        look=letters.num_foreign > 0,
        remedy="write the texts in a script that the model knows, or train text pieces of your own",
        figures={
            "texts": letters.num_texts,
            "with_unknown": letters.num_partly_unknown,
            "another_script": letters.num_foreign,
        },
    )


def _with_model(
    sounds: list[Sound], found: Checkpoint, base: Checkpoint | None, scratch: Path, sampler: Sampler | None
) -> Iterator[Verdict]:
    timed = [replace(sound.clip, duration=sound.duration_s) for sound in sounds]
    clips = scratch_clips(timed, MODEL_CLIPS, MODEL_SECONDS)
    quiet = Console(file=io.StringIO())
    manifest = Manifest(source=scratch, clips=clips, problems=[])
    prepare(manifest, scratch / "tokens", found.tokenizer, workers=1, latent_dtype="float32", console=quiet)
    cache = TokenCache(scratch / "tokens", tokenizer=found.tokenizer)
    yield latents_verdict(found, cache)
    yield codec_verdict(found, clips)
    yield learning_verdict(found, cache)
    yield stop_verdict(found, cache)
    if base is not None:
        yield adapter_verdict(base, found, cache, sampler)


def _write(path: Path, verdicts: list[Verdict], **about: Any) -> None:
    levels = [verdict.level for verdict in verdicts]
    worst = next(level for level in ("broken", "look", "fine") if level in levels)
    content = {**about, "verdict": worst, "checks": [asdict(verdict) for verdict in verdicts]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
