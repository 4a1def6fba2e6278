"""Clean speech mixed with noise on the fly: what enhancement is trained and measured on.

Shapes: B batch, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from training.manifest import TagRule
from training.task import Batch
from training.tokenizer_data import TokenizerDataConfig, open_segments, training_batches, validation_segments

FRAME_S = 0.02
ACTIVE_RANGE_DB = 30.0
SILENCE_DB = -90.0
NOISE_SEED = 1_000_003
"""Added to a run's seed, so that the draws of noise are unrelated to those of speech."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """Which noise is added, and how loud."""

    caches: tuple[str, ...] = ()
    """Folders of decoded audio, as of `TokenizerDataConfig`."""
    sources: tuple[str, ...] = ()
    """Folders or manifests of audio, instead of `caches`."""
    rules: tuple[TagRule, ...] = ()
    """Which clips are noise, such as `{where: {set: esc10}}`; of the training split alone."""
    validation_fraction: float = 0.1
    """Share of the training split's noise held back for validation."""
    snr_db: tuple[float, ...] = (-5.0, 20.0)
    """Lowest and highest ratio of speech to noise (`mix_at_snr`), drawn uniformly in between."""
    clean_share: float = 0.1
    """Share of the segments that get no noise, so that what is clean stays as it is."""

    def __post_init__(self) -> None:
        if bool(self.caches) == bool(self.sources):
            raise ValueError("give either caches or sources of noise, with at least one folder")
        if len(self.snr_db) != 2 or not all(map(math.isfinite, self.snr_db)) or self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db={list(self.snr_db)} must be two numbers, the lower one first")
        if not 0 <= self.clean_share < 1:
            raise ValueError(f"clean_share={self.clean_share} must be at least 0 and below 1")


class Mixture(NamedTuple):
    """Noisy speech and the speech in it, sample by sample at the same level."""

    noisy: Float[Tensor, "B 1 S"]
    clean: Float[Tensor, "B 1 S"]


def active_power(waveform: Float[Tensor, "B 1 S"], sample_rate_hz: int) -> Float[Tensor, " B"]:
    """Mean square over the frames in which a signal is active, so that pauses don't count; 0 for silence.

    Frames last 20 ms, whole ones only (a shorter signal is one frame). Active are those at most 30 dB below the loudest
    one and above -90 dB of full scale.
    """
    batch, _, samples = waveform.shape
    if samples == 0:
        return waveform.new_zeros(batch)
    width = min(round(FRAME_S * sample_rate_hz), samples)
    power = waveform[:, 0].double().unfold(1, width, width).square().mean(dim=2)  # (B, frames)
    loudest = power.amax(dim=1, keepdim=True)
    active = (power >= loudest * 10 ** (-ACTIVE_RANGE_DB / 10)) & (power > 10 ** (SILENCE_DB / 10))
    return ((power * active).sum(dim=1) / active.sum(dim=1).clamp(min=1)).to(waveform.dtype)


def mix_at_snr(
    speech: Float[Tensor, "B 1 S"],
    noise: Float[Tensor, "B 1 S"],
    snr_db: Float[Tensor, " B"],
    sample_rate_hz: int,
) -> Mixture:
    """Add noise to speech, scaled so that the ratio of their active powers is `snr_db`.

    Each power is `active_power` of that signal alone, so that a bark between pauses is as loud as rain at the same
    ratio. Silent noise leaves speech as it is. To silent speech, to which there is no ratio, noise is added unscaled.
    A sum beyond full scale is turned down, and the speech with it.

    Args:
        speech: Clean segments.
        noise: As long.
        snr_db: A row's ratio in dB; infinity for no noise at all.
        sample_rate_hz: Rate of both.
    """
    spoken, noised = active_power(speech, sample_rate_hz), active_power(noise, sample_rate_hz)
    scale = (spoken / noised.clamp(min=1e-30)).sqrt() * 10 ** (-snr_db / 20)
    scale = torch.where((spoken > 0) & (noised > 0) | snr_db.isposinf(), scale, torch.ones_like(scale))
    noisy = speech + scale[:, None, None] * noise
    gain = 1.0 / noisy.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1.0)
    return Mixture(noisy * gain, speech * gain)


class NoisySpeech:
    """Batches `{"noisy": (B, 1, S), "clean": (B, 1, S)}`, and the same mixtures at every validation.

    Args:
        data: The speech, and how much of it is read at once.
        noise: What is added to it.
        sample_rate_hz: Of both.
        num_samples: Length of a segment.

    Raises:
        UserError: caches or sources that cannot be read, or of another sample rate.
    """

    def __init__(self, data: TokenizerDataConfig, noise: NoiseConfig, sample_rate_hz: int, num_samples: int) -> None:
        self.data, self.noise = data, noise
        self.sample_rate_hz, self.num_samples = sample_rate_hz, num_samples
        self.speech_source = open_segments(data, "train", sample_rate_hz)
        held = TokenizerDataConfig(
            caches=noise.caches,
            sources=noise.sources,
            rules=noise.rules,
            validation_fraction=noise.validation_fraction,
            validation_segments=data.validation_segments,
        )
        self.noise_source = open_segments(held, "train", sample_rate_hz)
        self.validation = mix_at_snr(
            validation_segments(data, sample_rate_hz, num_samples),
            validation_segments(held, sample_rate_hz, num_samples),
            torch.linspace(noise.snr_db[0], noise.snr_db[1], data.validation_segments),
            sample_rate_hz,
        )

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Random segments of speech and noise, random loudness, random ratios; see `Task.batches`."""
        size = self.data.batch_size
        place = {"rank": rank, "world_size": world_size, "skip": skip}
        speech = training_batches(self.speech_source, size, self.num_samples, seed=seed, **place)
        noise = self.noise_source.segments(size, self.num_samples, seed=seed + NOISE_SEED, **place)
        for number, (spoken, noised) in enumerate(zip(speech, noise, strict=True), start=skip):
            generator = torch.Generator().manual_seed(hash((seed, rank, number, NOISE_SEED)) & 0x7FFFFFFF)
            mixture = mix_at_snr(spoken["waveform"], noised, self.draw_snr(size, generator), self.sample_rate_hz)
            yield mixture._asdict()

    def draw_snr(self, count: int, generator: torch.Generator) -> Float[Tensor, " B"]:
        """Ratios in dB, uniform over the range; infinity for the rows that stay clean."""
        low, high = self.noise.snr_db
        snr_db = low + (high - low) * torch.rand(count, generator=generator)
        clean = torch.rand(count, generator=generator) < self.noise.clean_share
        return snr_db.masked_fill(clean, math.inf)
