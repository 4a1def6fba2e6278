"""What a model cannot make at once: text of any length, sentence by sentence; music of any length, on and on.

Settings, and whether what is asked for is made in one of these ways; `sampling.long_run` does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sampling.controls import Controls
from sampling.limits import SECONDS_PER_BYTE
from sampling.monitor import Watch
from sampling.request import Past, RequestBuilder
from sampling.sentences import sentences
from tokenizer.errors import UserError

PAUSE_SECONDS = 0.25
MUSIC_MAX_DRIFT = 8.0
"""Widths of the bands; of real music, 3 % of all windows are farther from the first seconds, and a model that has
fallen silent is 20 off (`python -m benchmarks.longform`)."""
LONGEST_SECONDS = 24 * 3600.0
"""A WAV file of 16 bits at 24 kHz holds no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongForm:
    """How what is too long to be made at once is made."""

    window_seconds: float = 12.0
    """Music, sound and continuations: the latest seconds that the model holds, as long as the clips that the box was
    trained on. A longer window takes longer a frame."""
    segment_seconds: float = 2.0
    """Of them: drawn between two looks at the drift."""
    carry_seconds: float = 6.0
    """Of the first seconds, what is read when they are re-anchored."""
    speech_carry_seconds: float = 0.4
    """Of the sentence before, which the next one follows."""
    pause_seconds: float = PAUSE_SECONDS
    """Least quiet between two sentences, to half a frame; what the voice leaves out is silence."""
    at_once_seconds: float = 12.0
    """A text of several sentences is read sentence by sentence where a reader takes longer than this for it."""
    sentence_seconds: float = 20.0
    """A longer sentence is cut."""
    max_drift: float | None = None
    """Widths of the bands (`sampling.monitor`) beyond which the next segment is re-anchored; all that is longer than a
    segment is made in segments then. Infinity: never, drift is at most measured. None: MUSIC_MAX_DRIFT for what is
    longer than can be made at once, and never for a text, whose sentences begin anew anyway."""
    watch: Watch = field(default_factory=Watch)
    """What is compared with what."""

    def __post_init__(self) -> None:
        for name in ("window_seconds", "segment_seconds", "at_once_seconds", "sentence_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value} must be above 0; give seconds")
        for name in ("carry_seconds", "speech_carry_seconds", "pause_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}={value} must be at least 0; give seconds")
        if self.max_drift is not None and not self.max_drift > 0:
            raise UserError(f"max_drift={self.max_drift} must be above 0; use {MUSIC_MAX_DRIFT:g}, or inf for never")

    def limit(self, *, reads: bool) -> float | None:
        """Widths of the bands beyond which what is made in segments is re-anchored; None: never."""
        if self.max_drift is None:
            return None if reads else MUSIC_MAX_DRIFT
        return None if math.isinf(self.max_drift) else self.max_drift

    def unused(self, *, in_segments: bool = False) -> tuple[str, ...]:
        """What is told of settings that what is made at once has no use for, or what is made in segments, but not of
        sentences."""
        limit, pause, found = self.max_drift, self.pause_seconds, []
        if limit is not None and math.isfinite(limit) and not in_segments:
            found.append(f"max_drift={limit:g} has no effect: this is made at once, not in segments")
        if pause != PAUSE_SECONDS:
            found.append(f"pause_seconds={pause:g} has no effect: this is not read sentence by sentence")
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a long recording is made from."""

    sentences: Sequence[str] | None
    """None for what is not read."""
    tags: Sequence[str]
    past: Past | None
    frames: int | None
    """So many exactly without a text, at most so many with one; None: until the text is read."""
    seed: int
    controls: Controls


def segment_sentences(
    text: str | None, duration: float | None, long_form: LongForm, frame_rate_hz: float, max_frames: int
) -> Sequence[str] | None:
    """Whether what is asked for is made in segments, and the sentences of which: none without a text.

    Returns:
        None for what is made at once.

    Raises:
        UserError: a duration that is no number of seconds, or beyond LONGEST_SECONDS.
    """
    if duration is not None and not (math.isfinite(duration) and 0 < duration <= LONGEST_SECONDS):
        raise UserError(f"duration={duration} s must be above 0 and at most {LONGEST_SECONDS:g} s, which is a day")
    longest = max_frames / frame_rate_hz
    asked_for = None if long_form.max_drift is None else long_form.limit(reads=text is not None)
    if text is None:
        beyond = longest if asked_for is None else long_form.segment_seconds
        return () if duration is not None and duration > beyond else None
    takes = len(text.strip().encode()) * SECONDS_PER_BYTE
    # A sentence needs room for the carry-over.
    most = min(long_form.sentence_seconds, max(longest / 2, longest - long_form.speech_carry_seconds))
    found = sentences(text, max(1, int(most / SECONDS_PER_BYTE)))
    at_once = min(long_form.at_once_seconds, longest)
    long = takes > longest or (duration or 0.0) > longest or (len(found) > 1 and takes > at_once)
    return found if found and (long or (len(found) > 1 and asked_for is not None)) else None


def asked_in_segments(
    requests: RequestBuilder,
    text: str | None,
    tags: Sequence[str],
    past: Past | None,
    duration: float | None,
    seed: int,
    controls: Controls,
    long_form: LongForm,
) -> Asked | None:
    """What a `LongRun` makes; None for what is made at once.

    Raises:
        UserError: as `segment_sentences`.
    """
    rate = requests.tokenizer.frame_rate_hz
    found = segment_sentences(text, duration, long_form, rate, requests.model.config.max_frames)
    if found is None:
        return None
    return Asked(
        sentences=found or None,
        tags=tags,
        past=past,
        frames=None if duration is None else max(1, round(duration * rate)),
        seed=seed,
        controls=controls,
    )
