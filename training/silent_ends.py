"""Cutting silence off the ends of clips: of music that ends in it a model learns to fall silent."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor

from tokenizer.audio import audio_blocks, audio_info
from tokenizer.errors import UserError
from training.manifest import Clip

LOUD_DB = -50.0
"""Frames of 20 ms below this, in dB of full scale, are silent."""


def sound_span(blocks: Iterable[Tensor], sample_rate_hz: int) -> tuple[float, float] | None:
    """When sound begins and ends, in seconds, to 20 ms; None where there is none.

    Args:
        blocks: The samples, (S,) each, one block after the other.
        sample_rate_hz: Their rate.
    """
    width, least = max(sample_rate_hz // 50, 1), 10 ** (LOUD_DB / 10)
    begin, end, before = None, 0, 0
    for block in blocks:
        x = block.numpy()
        x = np.pad(x, (0, -len(x) % width)).reshape(-1, width)
        loud = np.flatnonzero((x.astype(np.float64) ** 2).mean(axis=1) >= least)
        if len(loud):
            begin = before + int(loud[0]) * width if begin is None else begin
            end = before + min((int(loud[-1]) + 1) * width, len(block))
        before += len(block)
    return None if begin is None else (begin / sample_rate_hz, end / sample_rate_hz)


class SilentEnds:
    """Shortens clips to their sound, which takes reading them once more; may be called by several threads.

    Args:
        keep_s: How many seconds of the silence at each end stay.

    Raises:
        UserError: `keep_s` is no number of seconds.
    """

    def __init__(self, keep_s: float) -> None:
        if not 0 <= keep_s < math.inf:
            raise UserError(f"trim_silence_s={keep_s} must be a number of seconds from 0, such as 0.3")
        self.keep_s = keep_s
        self.num_cut, self.seconds = 0, 0.0
        self._lock = threading.Lock()

    def __call__(self, clip: Clip) -> Clip:
        """The part of the clip to read.

        Raises:
            UserError: it is silent throughout, or can't be read.
        """
        info, first = audio_info(clip.audio), clip.start or 0.0
        rate = info.sample_rate_hz
        length = 0

        def heard() -> Iterable[Tensor]:
            nonlocal length
            for block in audio_blocks(clip.audio, rate, clip.start, clip.read_duration):
                length += block.shape[1]
                yield block[0]

        span = sound_span(heard(), rate)
        if span is None:
            raise UserError(f"{clip.key}: silent throughout (below {LOUD_DB:g} dB); make it louder, or leave it out")
        begin, end = max(0.0, span[0] - self.keep_s), min(length / rate, span[1] + self.keep_s)
        cut = length / rate - (end - begin)
        if cut < 1 / rate:
            return clip
        with self._lock:
            self.num_cut, self.seconds = self.num_cut + 1, self.seconds + cut
        return replace(clip, start=first + begin, end=first + end)
