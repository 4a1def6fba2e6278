"""Enhanced magnitudes on noisy phases."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer.metrics import si_sdr
from tokenizer.spectral_mask import FLOOR, SpectralMask, mask_noise

RATE = 24000


def noise(samples: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(rows, 1, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [0, 1, 255, 256, 1024, 5001])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_what_enhancement_leaves_alone_passes_unchanged(samples: int, rate: int) -> None:
    """Whatever the codec made of it."""
    waveform, flawed = noise(samples, rows=2), noise(samples, seed=1, rows=2)
    torch.testing.assert_close(mask_noise(waveform, flawed, flawed, rate), waveform, atol=1e-6, rtol=1e-5)


def test_what_is_louder_changes_nothing_and_silence_leaves_the_floor() -> None:
    waveform, decoded = noise(8000), noise(8000, seed=1)
    torch.testing.assert_close(mask_noise(waveform, decoded, 3 * decoded, RATE), waveform, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mask_noise(waveform, decoded, 0.5 * decoded, RATE), 0.5 * waveform, atol=1e-6, rtol=1e-4)
    quiet = mask_noise(waveform, decoded, torch.zeros_like(waveform), RATE)
    torch.testing.assert_close(quiet, FLOOR * waveform, atol=1e-6, rtol=1e-4)


def test_magnitudes_of_other_phases_take_noise_away() -> None:
    time = torch.arange(RATE) / RATE
    tone = 0.3 * (2 * math.pi * 440 * time).sin()[None, None]
    other_phase = 0.3 * (2 * math.pi * 440 * time + 2.0).sin()[None, None]
    noisy, decoded = tone + noise(RATE), other_phase + noise(RATE, seed=1)
    masked = mask_noise(noisy, decoded, other_phase, RATE)
    before, after = si_sdr(tone[0, 0], noisy[0, 0]), si_sdr(tone[0, 0], masked[0, 0])
    assert after > before + 8
    assert si_sdr(tone[0, 0], other_phase[0, 0]) < 0


def test_any_pieces_give_the_same_and_any_side_may_run_ahead() -> None:
    noisy, decoded, enhanced = noise(9001, rows=2), noise(9001, seed=2, rows=2), 0.5 * noise(9001, seed=1, rows=2)
    whole = mask_noise(noisy, decoded, enhanced, RATE)
    mask, parts = SpectralMask(2, RATE), []
    cuts = [(0, 0, 0), (700, 0, 960), (700, 960, 960), (701, 3000, 961), (5000, 3001, 4000), (9001, 8000, 9001)]
    cuts.append((9001, 9001, 9001))
    for before, after in zip(cuts, cuts[1:], strict=False):
        pieces = [x[..., a:b] for x, a, b in zip((noisy, decoded, enhanced), before, after, strict=True)]
        parts.append(mask.push(*pieces))
    late = 9001 - sum(part.shape[-1] for part in parts)
    assert 0 < late < mask.size + mask.hop  # nothing is held back longer than it must be
    torch.testing.assert_close(torch.cat([*parts, mask.flush()], dim=-1), whole, atol=1e-6, rtol=1e-5)


def test_the_shortest_recording_ends_the_output() -> None:
    waveform = noise(4000)
    mask = SpectralMask(1, RATE)
    out = torch.cat([mask.push(waveform[..., :3500], waveform, waveform), mask.flush()], dim=-1)
    torch.testing.assert_close(out, waveform[..., :3500], atol=1e-6, rtol=1e-5)
