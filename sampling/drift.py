"""What a stretch of audio is like, in a few figures, and how far these are from a reference's: the measure of drift.

A continuation that stays itself keeps, second by second, the figures of what it continues. Each is biased by the length
of the stretch it is taken of (a long one has more different codes), so stretches of one length are compared, and a
longer reference is the mean of its parts (`average`).

Shapes: S samples, T frames, K codebooks, D latent, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.metrics import MEL_WINDOW, codes_bitrate, level_db, log_mel, magnitudes

FLOOR_DB = -100.0
"""White noise of this level, in dB of full scale, is added to spectra: silence, too, has a centroid and a tilt."""
TILT_LOWEST_HZ, TILT_HIGHEST_HZ = 100.0, 8000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowStatistics:
    """Figures of a stretch of audio."""

    log_mel_mean: Float[Tensor, " M"]
    """Of each band over time, in nats; the spectrogram of `tokenizer.metrics.log_mel`."""
    log_mel_std: Float[Tensor, " M"]
    """Of each band over time, in nats."""
    loudness_db: float
    """Root-mean-square level in dB of full scale, at least -120."""
    centroid_hz: float
    """Mean frequency, weighted by power."""
    tilt_db_per_octave: float
    """Slope of the power spectrum in dB, every octave from 100 Hz to 8 kHz weighing the same: 0 for white noise, -3 for
    pink noise."""
    latent_norm: float | None = None
    """Mean length of a latent vector; None without latents."""
    code_entropy_bits: float | None = None
    """Entropy of a codebook's codes as they occur, the mean over codebooks; None without codes."""


def window_statistics(
    waveform: Float[Tensor, " S"],
    sample_rate_hz: int,
    *,
    latents: Float[Tensor, "T D"] | None = None,
    codes: Int[Tensor, "K T"] | None = None,
) -> WindowStatistics:
    """Take the figures of a stretch of audio.

    Args:
        waveform: At least one sample, usually in [-1, 1].
        sample_rate_hz: Its rate.
        latents: Of the same stretch, at least one frame.
        codes: Of the same stretch, at least one frame.
    """
    mel = log_mel(waveform, sample_rate_hz)
    power = _power(waveform)
    hertz = torch.linspace(0.0, sample_rate_hz / 2, len(power), dtype=power.dtype, device=power.device)
    entropy = None
    if codes is not None:
        entropy = codes_bitrate([codes], int(codes.max()) + 1, 1.0).entropy_bits_per_second / len(codes)
    return WindowStatistics(
        log_mel_mean=mel.mean(dim=0),
        log_mel_std=mel.std(dim=0, correction=0),
        loudness_db=level_db(waveform),
        centroid_hz=((hertz * power).sum() / power.sum()).item(),
        tilt_db_per_octave=_tilt(hertz, power),
        latent_norm=None if latents is None else latents.float().norm(dim=-1).mean().item(),
        code_entropy_bits=entropy,
    )


def average(windows: Sequence[WindowStatistics]) -> WindowStatistics:
    """The mean of each figure over stretches of one length; None where a stretch lacks it.

    Raises:
        ValueError: there is no stretch.
    """
    if not windows:
        raise ValueError("the mean of statistics needs at least one window")
    means: dict[str, Any] = {}
    for field in fields(WindowStatistics):
        found = [getattr(window, field.name) for window in windows]
        if isinstance(found[0], Tensor):
            means[field.name] = torch.stack(found).mean(dim=0)
        else:
            means[field.name] = None if None in found else sum(found) / len(found)
    return WindowStatistics(**means)


def changes(found: WindowStatistics, reference: WindowStatistics) -> dict[str, float]:
    """How far each figure is from the reference's, by its name; one that either lacks is left out.

    Figures of bands give the mean absolute difference over the bands; the others keep their sign, above 0 for more than
    the reference has.
    """
    differences = {}
    for field in fields(WindowStatistics):
        now, before = getattr(found, field.name), getattr(reference, field.name)
        if isinstance(now, Tensor):
            differences[field.name] = (now - before).abs().mean().item()
        elif now is not None and before is not None:
            differences[field.name] = now - before
    return differences


def _power(waveform: Tensor) -> Float[Tensor, " N"]:
    """Mean power by frequency, in double precision, over the floor."""
    power = magnitudes(waveform).double().square().mean(dim=0)
    window = torch.hann_window(MEL_WINDOW, dtype=torch.float64)
    noise = 10.0 ** (FLOOR_DB / 10.0) * (window.square().sum() / window.sum().square()).item()
    return power + noise


def _tilt(hertz: Tensor, power: Tensor) -> float:
    """Least squares over the bins, each weighing as much as the share of an octave that it covers."""
    used = (hertz >= TILT_LOWEST_HZ) & (hertz <= TILT_HIGHEST_HZ)
    weight = hertz[used].reciprocal()
    weight = weight / weight.sum()
    octaves, decibels = hertz[used].log2(), 10.0 * power[used].log10()
    octaves = octaves - (weight * octaves).sum()
    return ((weight * octaves * decibels).sum() / (weight * octaves.square()).sum()).item()
