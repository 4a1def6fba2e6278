"""What a tokenizer loses of test recordings before any model: bits a second are to be read beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenizer.audio import read_audio
from tokenizer.frames import Tokenizer
from tokenizer.metrics import AudioDistance, compare_audio
from training.manifest import Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityConfig:
    """Which clips of split test are coded and decoded."""

    clips: int = 16
    """At most so many, evenly spread over the corpus."""
    seconds: float = 10.0
    """Of a clip its beginning, at most this much."""
    speech: bool = True
    """Whether STOI and PESQ are measured, which mean something for speech alone."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.seconds <= 0:
            raise ValueError(f"clips={self.clips} and seconds={self.seconds} must be at least 1 and above 0")


FIGURES = ("mel_distance", "stoi", "pesq_wb")
"""Fields of `tokenizer.metrics.AudioDistance`."""


@torch.inference_mode()
def fidelity(tokenizer: Tokenizer, clips: Sequence[Clip], config: FidelityConfig) -> dict[str, dict[str, float | None]]:
    """Means of `FIGURES` (None where one is not defined) by what is decoded: `latents`, `codes 1`, and all codes.

    Args:
        tokenizer: What codes and decodes.
        clips: Test clips.
        config: How many of them, and how much of each.

    Raises:
        UserError: a clip that cannot be read, or speech without the libraries of STOI and PESQ.
    """
    count = min(config.clips, len(clips))
    rate = tokenizer.sample_rate_hz
    rows: dict[str, list[AudioDistance]] = {}
    for clip in [clips[number * len(clips) // count] for number in range(count)]:
        seconds = min(config.seconds, clip.read_duration or config.seconds)
        waveform = read_audio(clip.audio, rate, clip.start, seconds)
        frames = tokenizer.encode(waveform[None])
        made = {"latents": tokenizer.decode_latents(frames.latents)}
        for books in sorted({1, tokenizer.num_codebooks}):
            made[f"codes {books}"] = tokenizer.decode_codes(frames.codes[:, :books])
        for name, audio in made.items():
            audio = audio[0, 0, : waveform.shape[-1]]
            distance = compare_audio(waveform[0, : len(audio)], audio, rate, speech=config.speech)
            rows.setdefault(name, []).append(distance)
    return {
        name: {figure: _mean([getattr(distance, figure) for distance in found]) for figure in FIGURES}
        for name, found in rows.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else None
