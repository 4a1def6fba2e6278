"""Progress of one recording, told on stderr: how much, how fast, how long still."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 30.0


class RecordingMeter:
    """A bar on a terminal; elsewhere a line now and then.

    Args:
        console: Where it is told.
        sample_rate_hz: Of what is made.
    """

    def __init__(self, console: Console, sample_rate_hz: int) -> None:
        self._console, self._rate = console, sample_rate_hz
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("generating"),
                BarColumn(),
                TextColumn("{task.fields[seconds]:.0f} s, {task.fields[speed]:.1f}x real time,"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("generating", total=None, seconds=0.0, speed=0.0)

    def __enter__(self) -> RecordingMeter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, num_samples: int, share: float | None) -> None:
        """Tell that so many samples are made, which is such a share of the whole; None where nobody knows."""
        now = time.monotonic()
        passed = max(now - self._began, 1e-6)
        seconds = num_samples / self._rate
        if self._bar is not None:
            total = None if share is None else 1.0
            self._bar.update(self._task, completed=share or 0.0, total=total, seconds=seconds, speed=seconds / passed)
        elif now - self._told >= LOG_EVERY_S:
            self._told = now
            left = f", {passed * (1 / share - 1) / 60:.1f} min left" if share else ""
            line = f"generated {seconds:.0f} s, {seconds / passed:.1f}x real time{left}"
            self._console.print(line, highlight=False, soft_wrap=True)
