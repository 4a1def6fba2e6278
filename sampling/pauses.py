"""The pause between two sentences: how long it is already, and quiet frames for what it lacks.

A voice that stops as soon as it may and begins at once leaves a tenth of a second between two sentences, where a reader
leaves a quarter or more. So the audio on both sides of a joint is decoded once more, and frames of an encoded silence
are put there until the quiet is long enough. The model never sees them.

Shapes: T frames, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from sampling.generate import Drawn
from tokenizer.frames import AudioFrames, Source, Tokenizer

BLOCKS_PER_SECOND = 100
CONTEXT_SECONDS = 1.0
"""Of the sentence before, which is decoded again: what it sounds like at its end depends little on more."""
BELOW_LOUDEST_DB = 30.0
"""Quiet is what lies so far below the loudest block on either side: breath and the ends of vowels lie above."""
SILENT_DB = -60.0
"""Below this, everything is quiet."""
ENCODED_SECONDS = 2.0
"""Of silence, the middle of which is what a frame of it is taken from."""


class Pauses:
    """Sees to the pauses of one recording.

    Args:
        tokenizer: Of the frames.
        source: Which stream of them the audio is decoded from.
        seconds: Least quiet at a joint; 0 for none.
        num_codebooks: Codebooks that drawn frames have; None: no codes.
        with_latents: Whether they have latents.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: Source, seconds: float, num_codebooks: int | None, *, with_latents: bool
    ) -> None:
        self.tokenizer, self.source, self.seconds = tokenizer, source, seconds
        self.num_codebooks, self.with_latents = num_codebooks, with_latents
        self._silence: Drawn | None = None

    def lengthened(self, before: Sequence[Drawn], frames: Iterator[Drawn]) -> Iterator[Drawn]:
        """The frames of a sentence, after those of silence that the joint lacks.

        As many of its first frames as a whole pause has are drawn before any is handed out.

        Args:
            before: Frames (one row each) that came last, CONTEXT_SECONDS of them if there are.
            frames: Of the sentence.
        """
        rate = self.tokenizer.frame_rate_hz
        first = list(islice(frames, round(self.seconds * rate)))
        if first and before:
            lacking = self.seconds - self._quiet(before, first)
            for _ in range(round(lacking * rate)):
                yield self._silent(first[0])
        yield from first
        yield from frames

    @torch.no_grad()
    def _quiet(self, before: Sequence[Drawn], after: Sequence[Drawn]) -> float:
        """Seconds around the joint in which nothing is said."""
        streams = [frame.codes if self.source == "codes" else frame.latents for frame in (*before, *after)]
        known = [stream for stream in streams if stream is not None]
        if self.source == "codes":
            waveform = self.tokenizer.decode_codes(torch.cat(known, dim=2))
        else:
            waveform = self.tokenizer.decode_latents(torch.cat(known, dim=1))
        return quiet_around(waveform[0, 0], len(before) * self.tokenizer.hop_length, self.tokenizer.sample_rate_hz)

    def _silent(self, like: Drawn) -> Drawn:
        """One frame of silence."""
        if self._silence is None:
            self._silence = self._encoded(like)
        return self._silence

    @torch.no_grad()
    def _encoded(self, like: Drawn) -> Drawn:
        tokenizer, device = self.tokenizer, like.active.device
        length = round(ENCODED_SECONDS * tokenizer.frame_rate_hz) * tokenizer.hop_length
        frames: AudioFrames = tokenizer.encode(torch.zeros(1, 1, length, device=device))
        middle = frames.latents.shape[1] // 2
        return Drawn(
            codes=None if self.num_codebooks is None else frames.codes[:, : self.num_codebooks, middle : middle + 1],
            latents=frames.latents[:, middle : middle + 1] if self.with_latents else None,
            active=torch.ones_like(like.active),
        )


def quiet_around(waveform: Float[Tensor, " S"], joint: int, sample_rate_hz: int) -> float:
    """Seconds of quiet, without a break, before and after the sample at which a sentence ends and the next begins."""
    block = max(1, sample_rate_hz // BLOCKS_PER_SECOND)
    before, after = waveform[joint % block : joint], waveform[joint:]
    # From the joint outwards.
    levels = [_levels(before, block).flip(0), _levels(after, block)]
    loudest = max((float(side.max()) for side in levels if len(side)), default=SILENT_DB)
    quiet_below = max(SILENT_DB, loudest - BELOW_LOUDEST_DB)
    blocks = sum(int((side < quiet_below).long().cumprod(dim=0).sum()) for side in levels)
    return blocks * block / sample_rate_hz


def _levels(samples: Tensor, block: int) -> Tensor:
    """Of whole blocks, in dB of full scale."""
    whole = samples[: len(samples) // block * block].float().reshape(-1, block)
    return 10.0 * (whole.square().mean(dim=1) + 1e-12).log10()
