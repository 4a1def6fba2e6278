"""Distances between recordings: known values, known orderings, and clips for which a figure is not defined."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torchaudio.functional import resample

from tokenizer.errors import UserError
from tokenizer.metrics import (
    Undefined,
    bootstrap_interval,
    codes_bitrate,
    compare_audio,
    level_db,
    log_spectral_distance,
    mel_cepstral_distortion,
    mel_distance,
    multi_resolution_mel_distance,
    multi_resolution_stft_distance,
    pesq_wb,
    si_sdr,
    silence_ratio,
    stoi,
)

RATE = 24000


def noise(seed: int, samples: int = RATE) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def syllables(samples: int = 2 * RATE) -> Tensor:
    """A buzz with formant-like partials whose level comes and goes four times a second, as speech does."""
    time = torch.arange(samples) / RATE
    partials = [torch.sin(2 * math.pi * 120 * k * time) / k for k in range(1, 30)]
    return 0.1 * torch.stack(partials).sum(dim=0) * torch.sin(math.pi * 4 * time).clamp(min=0)


def test_mel_distance_of_a_louder_copy_is_the_gain() -> None:
    waveform = noise(0)
    assert mel_distance(waveform, waveform, RATE) == 0.0
    assert mel_distance(waveform, 2.0 * waveform, RATE) == pytest.approx(math.log(2.0), abs=1e-4)


def test_spectral_distances_in_db() -> None:
    waveform = noise(0)
    assert log_spectral_distance(waveform, 10.0 * waveform) == pytest.approx(20.0, abs=0.05)
    # Level is no part of the cepstral distortion; a tilt of the spectrum is.
    assert mel_cepstral_distortion(waveform, 2.0 * waveform, RATE) == pytest.approx(0.0, abs=1e-3)
    tilted = waveform - 0.9 * torch.nn.functional.pad(waveform, (1, -1))
    assert mel_cepstral_distortion(waveform, tilted, RATE) > 1.0


def test_mel_cepstral_distortion_of_one_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """log|X| that differs by a cos(m w) has a root-mean-square difference of a / sqrt(2) nats: the formula, in dB."""
    bands = torch.arange(80)
    spectra = [torch.zeros(3, 80), 0.5 * torch.cos(math.pi * 4 * (bands + 0.5) / 80).expand(3, 80)]
    monkeypatch.setattr("tokenizer.metrics.log_mel", lambda waveform, rate: spectra[int(waveform[0])])
    found = mel_cepstral_distortion(torch.zeros(1), torch.ones(1), RATE)
    assert found == pytest.approx(20.0 / math.log(10.0) * 0.5 / math.sqrt(2.0), rel=1e-4)


def test_si_sdr() -> None:
    waveform, other = noise(0), noise(1)
    other = other - other.mean()
    centred = waveform - waveform.mean()
    other = other - (other @ centred) / (centred @ centred) * centred  # orthogonal, so the ratio is the energies'
    other = other * (centred.norm() / other.norm()) * 0.1
    assert si_sdr(waveform, waveform + other) == pytest.approx(20.0, abs=1e-3)
    assert si_sdr(waveform, -3.0 * (waveform + other)) == pytest.approx(20.0, abs=1e-3)
    assert si_sdr(waveform + 0.5, waveform + other - 0.2) == pytest.approx(20.0, abs=1e-3)  # offsets don't count
    with pytest.raises(Undefined, match="the reference is silent"):
        si_sdr(torch.zeros(100), noise(0, 100))


def test_multi_resolution_mel_distance_of_a_louder_copy_is_the_gain() -> None:
    waveform = noise(0)
    assert multi_resolution_mel_distance(waveform, waveform, RATE) == 0.0
    assert multi_resolution_mel_distance(waveform, 2.0 * waveform, RATE) == pytest.approx(math.log(2.0), abs=1e-4)


def test_multi_resolution_stft_distance_is_its_formula() -> None:
    """By discrete Fourier transforms of windows cut by hand, from the sources' constants."""
    reference, estimate = noise(0, 3000).double(), 0.5 * noise(0, 3000).double() + 0.3 * noise(1, 3000).double()
    total = 0.0
    for n_fft, hop, width in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        window = torch.nn.functional.pad(torch.hann_window(width, dtype=torch.float64), ((n_fft - width) // 2,) * 2)
        magnitudes = []
        for signal in (reference, estimate):
            frames = torch.nn.functional.pad(signal, (n_fft // 2, n_fft // 2)).unfold(0, n_fft, hop) * window
            magnitudes.append(torch.fft.rfft(frames).abs().clamp(min=1e-4))
        wanted, found = magnitudes
        total += ((wanted - found).square().sum() / wanted.square().sum()).sqrt() + (wanted / found).log().abs().mean()
    assert multi_resolution_stft_distance(reference, estimate) == pytest.approx(float(total) / 3, rel=1e-4)
    assert multi_resolution_stft_distance(reference, reference) == 0.0
    assert multi_resolution_stft_distance(torch.zeros(9), torch.zeros(9)) == 0.0


@pytest.mark.parametrize(
    ("samples", "of_stoi", "of_pesq"),
    [
        (RATE // 5, "0.20 s are too short, STOI needs 0.4 s", "0.20 s are too short for PESQ"),
        (0, "the reference is silent", "the reference is silent"),
    ],
)
def test_what_is_too_short_says_so(samples: int, of_stoi: str, of_pesq: str) -> None:
    waveform = noise(0, samples)
    for measure, reason in ((stoi, of_stoi), (pesq_wb, of_pesq)):
        with pytest.raises(Undefined, match=reason):
            measure(waveform, waveform, RATE)


def test_a_silent_estimate_has_no_pesq() -> None:
    with pytest.raises(Undefined, match="the estimate is silent"):
        pesq_wb(syllables(), torch.zeros(2 * RATE), RATE)
    assert stoi(syllables(), torch.zeros(2 * RATE), RATE) == pytest.approx(0.0, abs=0.01)


def test_stoi_and_pesq_fall_with_noise() -> None:
    speech = syllables()
    noisy = [speech + level * noise(1, len(speech)) for level in (0.0, 0.01, 0.1)]
    figures = [(stoi(speech, estimate, RATE), pesq_wb(speech, estimate, RATE)) for estimate in noisy]
    assert figures[0][0] == pytest.approx(1.0, abs=1e-6)
    assert figures[0][1] == pytest.approx(4.64, abs=0.01)
    assert figures[0][0] > figures[1][0] > figures[2][0]
    assert figures[0][1] > figures[1][1] > figures[2][1] > 1.0


def test_pesq_does_not_depend_on_the_rate() -> None:
    speech = syllables()
    noisy = speech + 0.01 * noise(1, len(speech))
    at_pesq_s_rate = [resample(x, RATE, 16000) for x in (speech, noisy)]
    assert pesq_wb(speech, noisy, RATE) == pytest.approx(pesq_wb(*at_pesq_s_rate, 16000), abs=1e-3)


@pytest.mark.parametrize("waveform", [torch.zeros(RATE), torch.ones(1), noise(0, 1000)], ids=["silence", "1", "1000"])
def test_what_is_no_speech_has_no_speech_figures(waveform: Tensor) -> None:
    figures = compare_audio(waveform, waveform, RATE, speech=True)
    assert math.isnan(figures.stoi)
    assert math.isnan(figures.pesq_wb)
    assert figures.mel_distance == 0.0


def test_speech_figures_are_only_computed_when_asked_for() -> None:
    figures = compare_audio(syllables(), syllables(), RATE, speech=False)
    assert math.isnan(figures.stoi)
    assert math.isnan(figures.pesq_wb)
    assert figures.loudness_change_db == 0.0


@pytest.mark.parametrize(("function", "package"), [(stoi, "pystoi"), (pesq_wb, "pesq")])
def test_a_missing_library_names_the_extra(function: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}; install it: pip install 'hybridlm\[metrics\]'"):
        function(noise(0), noise(0), RATE)


def test_level_and_silence() -> None:
    waveform = torch.cat([torch.ones(RATE), torch.zeros(3 * RATE)])
    assert level_db(torch.ones(100)) == pytest.approx(0.0)
    assert level_db(0.1 * torch.ones(100)) == pytest.approx(-20.0, abs=1e-4)
    assert level_db(torch.zeros(0)) == level_db(torch.zeros(9)) == -120.0
    assert silence_ratio(waveform, RATE) == pytest.approx(0.75)
    assert silence_ratio(0.001 * torch.ones(RATE), RATE) == 1.0
    assert silence_ratio(0.001 * torch.ones(RATE), RATE, threshold_db=-70.0) == 0.0


def test_bitrate() -> None:
    flat, constant = torch.arange(1024), torch.zeros(1024, dtype=torch.long)
    rate = codes_bitrate([torch.stack([flat, constant])[:, :512], torch.stack([flat, constant])[:, 512:]], 1024, 75.0)
    assert rate.nominal_bits_per_second == pytest.approx(1500.0)
    assert rate.entropy_bits_per_second == pytest.approx(750.0)
    assert rate.codes_used == pytest.approx((1 + 1 / 1024) / 2)
    with pytest.raises(ValueError, match="at least one frame"):
        codes_bitrate([torch.zeros(2, 0, dtype=torch.long)], 1024, 75.0)


def test_bootstrap_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    interval = bootstrap_interval([*values, float("nan")])
    assert interval.count == 400
    assert interval.mean == pytest.approx(sum(values) / 400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
    assert interval == bootstrap_interval(values)
    assert bootstrap_interval([1.0, 1.0]).low == bootstrap_interval([1.0, 1.0]).high == 1.0
    assert math.isnan(bootstrap_interval([float("nan")]).mean)
