"""Figures of stretches of audio whose values are known, and their distances."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sampling.drift import FLOOR_DB, WindowStatistics, average, changes, window_statistics

RATE = 24_000


def noise(seconds: float = 2.0, slope_db: float = 0.0, rate: int = RATE) -> Tensor:
    """Gaussian noise whose power falls or rises by so many dB an octave."""
    white = 0.1 * torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = torch.fft.rfft(white)
    hertz = torch.linspace(0.0, rate / 2, len(spectrum), dtype=torch.float64).clamp(min=20.0)
    shaped = torch.fft.irfft(spectrum * (hertz / 1000.0) ** (slope_db / 20.0 / math.log10(2.0)), n=len(white))
    return (0.1 * shaped / shaped.std()).float()


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_white_noise(rate: int) -> None:
    found = window_statistics(noise(rate=rate), rate)
    assert found.centroid_hz == pytest.approx(rate / 4, rel=0.01)
    assert found.tilt_db_per_octave == pytest.approx(0.0, abs=0.15)
    assert found.loudness_db == pytest.approx(-20.0, abs=0.1)
    assert found.latent_norm is None and found.code_entropy_bits is None
    spread = found.log_mel_mean.std().item()
    assert found.log_mel_mean.shape == found.log_mel_std.shape == (80,) and spread < 0.2, "flat over the bands"


@pytest.mark.parametrize("slope", [-6.0, -3.0, 3.0])
def test_tilt_of_coloured_noise(slope: float) -> None:
    assert window_statistics(noise(slope_db=slope), RATE).tilt_db_per_octave == pytest.approx(slope, abs=0.25)


def test_every_octave_weighs_the_same_in_the_tilt() -> None:
    """The octave from 4 to 8 kHz 10 dB louder: the regression line of a step, by the integrals over octaves."""
    spectrum = torch.fft.rfft(noise().double())
    hertz = torch.linspace(0.0, RATE / 2, len(spectrum))
    louder = torch.fft.irfft(torch.where(hertz > 4000, 10**0.5, 1.0) * spectrum).float()
    octaves = math.log2(80)
    expected = 6 * 10 * (octaves - 1) / octaves**3
    assert window_statistics(louder, RATE).tilt_db_per_octave == pytest.approx(expected, abs=0.15)


def test_a_sine() -> None:
    time = torch.arange(RATE) / RATE
    found = window_statistics(0.5 * torch.sin(2 * math.pi * 3000 * time), RATE)
    assert found.centroid_hz == pytest.approx(3000, rel=0.01)
    assert found.loudness_db == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.01)
    middle = found.log_mel_std[found.log_mel_mean.argmax()]
    beating = window_statistics(0.5 * torch.sin(2 * math.pi * 3000 * time) * (time * 4 % 1 < 0.5), RATE)
    assert beating.log_mel_std[beating.log_mel_mean.argmax()] > 5 * middle, "it comes and goes"


@pytest.mark.parametrize("decibels", [-12.0, 6.0])
def test_gain_changes_loudness_alone_by_exactly_so_many_decibels(decibels: float) -> None:
    waveform = noise()
    change = changes(
        window_statistics(waveform * 10 ** (decibels / 20), RATE),
        window_statistics(waveform, RATE),
    )
    assert change["loudness_db"] == pytest.approx(decibels, abs=1e-4)
    assert change["log_mel_mean"] == pytest.approx(abs(decibels) * math.log(10) / 20, abs=1e-4)
    assert change["log_mel_std"] == pytest.approx(0.0, abs=1e-5)
    assert change["centroid_hz"] == pytest.approx(0.0, abs=1e-2)
    assert change["tilt_db_per_octave"] == pytest.approx(0.0, abs=1e-4)


def test_frames() -> None:
    latents = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [0.0, 2.0]]).repeat(2, 1)
    codes = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [7, 7, 7, 7, 7, 7, 7, 7], [5, 5, 5, 5, 900, 900, 900, 900]])
    found = window_statistics(noise(0.1), RATE, latents=latents, codes=codes)
    assert found.latent_norm == pytest.approx(2.0)
    assert found.code_entropy_bits == pytest.approx((2.0 + 0.0 + 1.0) / 3)


def test_identical_audio_has_drifted_by_nothing() -> None:
    codes = torch.arange(5)[None]
    one, other = (window_statistics(noise(), RATE, latents=torch.ones(5, 2), codes=codes) for _ in range(2))
    found = changes(one, other)
    assert found == dict.fromkeys([field.name for field in fields(WindowStatistics)], 0.0)


def test_silence_has_figures_of_its_own() -> None:
    silent = window_statistics(torch.zeros(RATE), RATE)
    assert silent.centroid_hz == pytest.approx(RATE / 4, rel=1e-3) and silent.loudness_db == -120.0
    assert silent.tilt_db_per_octave == pytest.approx(0.0, abs=1e-6)
    quiet = window_statistics(noise(slope_db=-6.0) * 10 ** ((FLOOR_DB - 20) / 20), RATE)
    assert abs(quiet.tilt_db_per_octave) < 1.0, "what is far below the floor has no colour"
    assert window_statistics(torch.full((1,), 0.1), RATE).loudness_db == pytest.approx(-20.0)


def test_the_mean_of_windows_and_what_they_lack() -> None:
    waveform, latents = noise(), torch.ones(5, 4)
    windows = [
        window_statistics(waveform * gain, RATE, latents=latents * gain, codes=torch.zeros(1, 5, dtype=torch.int64))
        for gain in (1.0, 0.1)
    ]
    mean = average(windows)
    assert mean.loudness_db == pytest.approx(-30.0, abs=0.1) and mean.latent_norm == pytest.approx(1.1)
    torch.testing.assert_close(mean.log_mel_mean, windows[0].log_mel_mean - math.log(10) / 2, atol=1e-3, rtol=0)
    lacking = replace(windows[1], latent_norm=None)
    assert average([windows[0], lacking]).latent_norm is None
    assert "latent_norm" not in changes(windows[0], lacking) and "code_entropy_bits" in changes(windows[0], lacking)
    with pytest.raises(ValueError, match="at least one window"):
        average([])
