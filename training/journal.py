"""What a run tells: `log.jsonl` for programs, TensorBoard for eyes and ears, one line for the terminal or the log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import UserError
from training.task import Sample


class Journal:
    """Writes only on the main process; elsewhere every method does nothing.

    Args:
        output: Folder of the run.
        step: Step from which the run goes on; later lines of an interrupted run are dropped.
        max_steps: For the progress line.
        active: Whether this is the main process.
        tensorboard: Whether to write event files.
    """

    def __init__(self, output: Path, *, step: int, max_steps: int, active: bool, tensorboard: bool) -> None:
        self._active = active
        self._max_steps = max_steps
        self._board = None
        self._progress = None
        if not active:
            return
        path = output / "log.jsonl"
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else None)
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
        """One line of `log.jsonl`, and every number to TensorBoard as `<kind>/<name>`."""
        if not self._active:
            return
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in figures.items()}
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written: {error.strerror}; make room and go on with --resume"
            ) from error
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def line(self, step: int, losses: Mapping[str, float], speed: float, remaining_s: float) -> None:
        """Progress on a terminal, a plain line elsewhere."""
        if not self._active:
            return
        figures = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        text = f"{figures}  {speed:,.0f} frames/s  {_clock(remaining_s)} left"
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._max_steps}  {text}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Audio with its spectrogram."""
        if self._board is None:
            return
        for sample in samples:
            waveform = sample.waveform.detach().float().cpu().clamp(-1, 1)
            self._board.add_audio(sample.name, waveform[None], step, sample_rate=sample.sample_rate_hz)
            self._board.add_image(f"{sample.name}/spectrogram", spectrogram_image(waveform), step)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        with contextlib.suppress(OSError):  # a full disk: `record` has said so
            self._file.close()
        if self._board is not None:
            self._board.close()


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


def spectrogram_image(waveform: Tensor) -> Tensor:
    """Log-magnitude spectrogram (1, 257, frames) in [0, 1], low frequencies at the bottom, 80 dB deep."""
    if waveform.numel() < 512:
        waveform = torch.nn.functional.pad(waveform, (0, 512 - waveform.numel()))
    spectrum = torch.stft(waveform, 512, 256, window=torch.hann_window(512), return_complex=True).abs()
    decibels = 20 * torch.log10(spectrum.clamp_min(1e-5))
    return ((decibels - decibels.max()) / 80 + 1).clamp(0, 1).flip(0)[None]


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
