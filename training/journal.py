"""What a run tells: `log.jsonl` for programs, boards and `samples/` for eyes and ears, one line for the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.audio import write_audio, write_spectrogram
from tokenizer.errors import UserError
from training.boards import Board, audible
from training.state import new_folder
from training.task import Sample


class Journal:
    """Writes only on the main process; elsewhere every method does nothing.

    Args:
        output: Folder of the run.
        step: Step from which the run goes on; later lines of an interrupted run are dropped.
        max_steps: For the progress line.
        active: Whether this is the main process.
        boards: Make what else is told figures and samples.

    Raises:
        UserError: a board that cannot be had.
    """

    def __init__(
        self, output: Path, *, step: int, max_steps: int, active: bool, boards: Sequence[Callable[[], Board]] = ()
    ) -> None:
        self._active = active
        self._output, self._max_steps = output, max_steps
        self._boards: list[Board] = []
        self._progress = None
        if not active:
            return
        path = output / "log.jsonl"
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._boards = [make() for make in boards]
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._progress.start()
            self._bar = self._progress.add_task("", total=max_steps, completed=step)

    def say(self, text: str) -> None:
        """One line to the person, now."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def record(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """One line of `log.jsonl`, and every number to the boards as `<kind>/<name>`.

        Raises:
            UserError: the disk is full.
        """
        if not self._active:
            return
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in figures.items()}
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
            self._file.flush()
            numbers = {f"{kind}/{k}": float(v) for k, v in figures.items() if isinstance(v, (int, float))}
            for board in self._boards:
                board.figures(step, numbers)
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written: {error.strerror}; make room and go on with --resume"
            ) from error

    def line(self, step: int, losses: Mapping[str, float], speed: float, remaining_s: float) -> None:
        """Progress on a terminal, a plain line elsewhere."""
        if not self._active:
            return
        figures = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        text = f"{figures}  {speed:,.0f} frames/s  {clock(remaining_s)} left"
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._max_steps}  {text}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Audio with its spectrogram, to the boards and to the run's `samples/step_.../`.

        Raises:
            UserError: the disk is full.
        """
        if not self._active:
            return
        for sample in samples:
            for board in self._boards:
                board.sample(step, sample)
        if samples:
            with new_folder(self._output / "samples" / f"step_{step:08d}") as folder:
                for sample in samples:
                    waveform, path = audible(sample)[None], folder / f"{sample.name.replace('/', '-')}.wav"
                    write_audio(path, waveform, sample.sample_rate_hz)
                    write_spectrogram(path.with_suffix(".png"), waveform, sample.sample_rate_hz)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        with contextlib.suppress(OSError):  # a full disk: `record` has said so
            self._file.close()
        for board in self._boards:
            board.close()


class Meter:
    """Means over the steps since the last line of the log."""

    def __init__(self, seconds_per_step: float = 0.0) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._frames, self._seconds = 0, 0.0
        self.seconds_per_step = seconds_per_step

    def add(self, losses: Mapping[str, Tensor], frames: int, seconds: float) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._frames += frames
        self._seconds += seconds
        weight = 0.05 if self.seconds_per_step else 1.0
        self.seconds_per_step += weight * (seconds - self.seconds_per_step)

    @property
    def speed(self) -> float:
        return self._frames / max(self._seconds, 1e-9)

    def totals(self) -> dict[str, tuple[float, int]]:
        """Sum and number of each figure."""
        return {name: (float(value), self._counts[name]) for name, value in self._sums.items()}


def pooled_means(totals: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over the meters of all processes, some of which may not have seen a figure."""
    names = dict.fromkeys(name for each in totals for name in each)
    found = {name: [each[name] for each in totals if name in each] for name in names}
    return {name: sum(s for s, _ in pairs) / sum(n for _, n in pairs) for name, pairs in found.items()}


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines that a killed run wrote after its last checkpoint, and a last line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
