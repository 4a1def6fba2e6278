"""Progress over clips, told to a person."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.manifest import Clip

_LOG_EVERY_S = 30.0


class ClipMeter:
    """How far, how fast, how long still: a bar on a terminal, a line now and then in a log.

    Args:
        console: Where it is told.
        clips: All that will be done; where each says its duration, time left is counted in seconds of audio.
        doing: Before the bar, such as "preparing".
        done: Begins a line of the log, such as "prepared".
    """

    def __init__(self, console: Console, clips: Sequence[Clip], *, doing: str, done: str) -> None:
        self._console, self._done_word = console, done
        durations = [clip.duration for clip in clips]
        self._by_duration = None not in durations  # the better clock where all durations are known
        self._total = float(sum(d or 0.0 for d in durations)) if self._by_duration else float(len(clips))
        self._done, self._seconds, self._count, self._num_clips = 0.0, 0.0, 0, len(clips)
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("clips, {task.fields[rate]:.0f}x real time,"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(doing, total=len(clips), rate=0.0)

    def __enter__(self) -> ClipMeter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, clip: Clip, seconds: float) -> None:
        """Count a finished clip of so many seconds of audio."""
        self._count += 1
        self._seconds += seconds
        self._done += (clip.duration or 0.0) if self._by_duration else 1.0
        now = time.monotonic()
        passed = max(now - self._began, 1e-6)
        rate = self._seconds / passed
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count, rate=rate)
        elif now - self._told >= _LOG_EVERY_S:
            self._told = now
            left = passed * (self._total - self._done) / max(self._done, 1e-6)
            self._console.print(
                f"{self._done_word} {self._count}/{self._num_clips} clips, {self._seconds / 3600:.2f} h, "
                f"{rate:.0f}x real time, {left / 60:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )
