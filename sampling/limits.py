"""How long a recording may get: exactly as asked without a text, between a fast and a slow reader's time with one."""

from __future__ import annotations

import math

from sampling.controls import Controls
from sampling.generate import Limits
from tokenizer.errors import UserError

DEFAULT_SECONDS = 10.0
"""Of music, sound and continuations, when no duration is asked for."""
SECONDS_PER_BYTE = 0.065
"""Of read English, in the median; a byte of UTF-8, so that a Chinese character counts three times."""
FASTEST_SECONDS_PER_BYTE = 0.03
"""Nobody reads faster (of 1,620 recordings of one voice, none below 0.044): an earlier stop is a mistake."""
SLOWEST_SECONDS_PER_BYTE = 0.12
SLACK_SECONDS = 2.0
"""The longest speech is 2 s + 0.12 s a byte; of those recordings, none is longer."""


def frame_limits(
    text: str | None, duration: float | None, controls: Controls, frame_rate_hz: float, max_frames: int
) -> Limits:
    """The fewest and the most frames of what is asked for.

    Args:
        text: What is said, if anything.
        duration: Seconds; exactly so many without a text, at most so many with one.
        controls: Their `min_duration` is the least with a text.
        frame_rate_hz: Frames a second.
        max_frames: The model's longest sequence.

    Raises:
        UserError: for a duration that the model can't make, a text that is empty or too long, a `min_duration` without
            a text or above the longest.
    """
    rate, longest, least = frame_rate_hz, max_frames / frame_rate_hz, controls.min_duration
    if duration is not None and not (math.isfinite(duration) and 0 < duration <= longest):
        raise UserError(f"duration={duration} s must be above 0 and at most {longest:g} s, this model's longest")
    if text is None:
        if least is not None:
            raise UserError(f"min_duration={least} s needs a text; without one, duration is the exact length")
        exact = max(1, round((duration or min(DEFAULT_SECONDS, longest)) * rate))
        return Limits(minimum=exact, maximum=exact)
    if least is not None and least > (duration or longest):
        most = f"duration={duration} s" if duration is not None else f"{longest:g} s, this model's longest"
        raise UserError(f"min_duration={least} s must be at most {most}; ask for less")
    size = len(text.strip().encode())
    if size == 0:
        raise UserError("text is empty; say something, or leave it out and use a tag")
    if size * SECONDS_PER_BYTE * rate > max_frames:
        raise UserError(
            f"text has {size} bytes, but this model says at most about {int(longest / SECONDS_PER_BYTE)} "
            f"({longest:g} s) at once; split it into sentences"
        )
    maximum = min(max_frames, math.ceil((SLACK_SECONDS + SLOWEST_SECONDS_PER_BYTE * size) * rate))
    if duration is not None:
        maximum = max(1, round(duration * rate))
    if least is None:
        return Limits(minimum=min(maximum, max(1, math.floor(FASTEST_SECONDS_PER_BYTE * size * rate))), maximum=maximum)
    minimum = min(max_frames, max(1, math.ceil(least * rate)))
    return Limits(minimum=minimum, maximum=max(minimum, maximum))
