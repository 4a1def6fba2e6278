"""`hybridlm generate --stream`: recordings of any length, written while they are made."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from sampling.growing import GrowingFile, Recording, StandardOutput
from sampling.pipeline import AudioModel
from sampling.progress import RecordingMeter
from sampling.stream import AudioStream
from tokenizer.audio import read_audio, write_spectrogram
from tokenizer.errors import UserError
from tokenizer.files import replacing

STDOUT = "-"
FORMATS = ("wav", "pcm")
READER_LEFT = 141
"""What a shell tells of a process that SIGPIPE ended."""
LONGEST_PICTURE_SECONDS = 600.0
"""Of a longer recording no spectrogram is drawn: it would have to be held in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What became of one recording."""

    path: str
    seconds: float
    """A continued prompt included."""
    took_s: float
    seed: int
    interrupted: bool
    warnings: tuple[str, ...]
    report: dict[str, Any]
    """See `AudioStream.report`."""


def check_format(output: str | Path, form: str | None) -> bool:
    """Whether the output is standard output.

    Raises:
        UserError: an unknown format, or one for a file, whose name tells it.
    """
    stdout = str(output) == STDOUT
    if form is not None and form not in FORMATS:
        raise UserError(f"format={form!r} must be one of {', '.join(FORMATS)}")
    if form is not None and not stdout:
        raise UserError(f"format={form!r} is for --output -; a file's format is told by its name, .wav or .flac")
    return stdout


def write_streams(
    model: AudioModel,
    asked: dict[str, Any],
    paths: Sequence[Path],
    *,
    form: str | None = None,
    json_file: Path | None = None,
) -> None:
    """Make recordings one after the other, each written while it is made, and print a line for each.

    Args:
        model: Makes them.
        asked: Keyword arguments of `AudioModel.generate_stream`; recording i has `seed + i`.
        paths: Files, or STDOUT alone: then nothing else is written there, and what is told goes to stderr.
        form: "wav" or "pcm", for standard output.
        json_file: Where figures of all recordings go.

    Raises:
        UserError: as `AudioModel.generate_stream`, or a disk that is full.
        KeyboardInterrupt: after what was made is complete, if it is not the last recording's end.
        SystemExit: with 141, quietly, when the reader of standard output has left.
    """
    to_stdout = [str(path) for path in paths] == [STDOUT]
    tell = sys.stderr if to_stdout else sys.stdout
    done: list[Written] = []
    for row, path in enumerate(paths):
        stream = model.generate_stream(**{**asked, "seed": asked["seed"] + row})
        if to_stdout:
            stdout = cast(io.BufferedIOBase, sys.stdout.buffer)
            place: Recording = StandardOutput(stdout, model.sample_rate_hz, header=form != "pcm")
        else:
            file = GrowingFile(path, model.sample_rate_hz)
            print(f"{path} grows as {file.partial}", file=sys.stderr)
            place = file
        try:
            done.append(_write(stream, place, model, asked["seed"] + row))
        except BrokenPipeError:
            # What Python still holds for the pipe must not fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(READER_LEFT) from None
        if not to_stdout and path.exists() and done[-1].seconds <= LONGEST_PICTURE_SECONDS:
            write_spectrogram(path.with_suffix(".png"), read_audio(path, model.sample_rate_hz), model.sample_rate_hz)
        _tell(done[-1], tell)
        if json_file is not None:
            _write_json(done, json_file)
        if done[-1].interrupted:
            raise KeyboardInterrupt


def _write(stream: AudioStream, place: Recording, model: AudioModel, seed: int) -> Written:
    began, interrupted, rate = time.perf_counter(), False, model.sample_rate_hz
    whole = None if stream.num_frames is None else stream.num_frames * model.tokenizer.hop_length
    try:
        with place, RecordingMeter(Console(stderr=True), rate) as meter:
            for piece in stream:
                place.write(piece)
                meter.update(stream.num_samples, stream.num_samples / whole if whole else stream.share_done)
    except KeyboardInterrupt:
        if place.num_samples == 0:
            raise
        interrupted = True
    seconds = place.num_samples / rate
    told = (f"interrupted: {seconds:.2f} s were made",) if interrupted else ()
    return Written(
        path=place.name,
        seconds=seconds,
        took_s=time.perf_counter() - began,
        seed=seed,
        interrupted=interrupted,
        warnings=(*stream.warnings, *told),
        report=stream.report(),
    )


def _tell(written: Written, where: Any) -> None:
    speed = written.seconds / written.took_s
    print(f"{written.path}  {written.seconds:.2f} s  {speed:.1f}x real time  seed {written.seed}", file=where)
    for anchored in written.report["re_anchorings"]:
        what = f"{anchored['measure']} {anchored['drift']:+.1f} bands off"
        print(f"re-anchored at {anchored['at_s']:.1f} s: {what}", file=where)
    for warning in written.warnings:
        print(f"warning: {warning}", file=where)


def _write_json(done: Sequence[Written], json_file: Path) -> None:
    figures = [
        {
            "output": one.path,
            "seconds": one.seconds,
            "speed": one.seconds / one.took_s,
            "seed": one.seed,
            "interrupted": one.interrupted,
            "warnings": list(one.warnings),
            **one.report,
        }
        for one in done
    ]
    with replacing(json_file) as path:
        path.write_text(json.dumps({"recordings": figures}, indent=2) + "\n", encoding="utf-8")
