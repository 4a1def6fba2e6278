"""Pulses run on through hops, calls and rows; the noise is always the same."""

from __future__ import annotations

import math

import torch

from tokenizer.excitation import NOISE_PERIOD_HOPS, Excitation

RATE, HOP, WINDOW = 24000, 240, 480


def overlap_add(spectra: torch.Tensor, excitation: Excitation) -> torch.Tensor:
    windows = torch.fft.irfft(spectra, n=WINDOW) * excitation.window
    wave = torch.zeros(len(windows) * HOP + HOP)
    for hop, window in enumerate(windows):
        wave[hop * HOP : hop * HOP + WINDOW] += window
    return wave


def test_a_steady_pitch_gives_the_sum_of_its_cosines() -> None:
    excitation = Excitation(RATE, HOP, WINDOW)
    pulses, _, _ = excitation(torch.full((1, 40), 1300.0))
    wave = overlap_add(pulses[0], excitation)[WINDOW : 38 * HOP]
    time = torch.arange(WINDOW, 38 * HOP, dtype=torch.float64) / RATE
    cosines = sum(torch.cos(2 * math.pi * 1300.0 * k * time) for k in range(1, 10))  # below 12 kHz
    torch.testing.assert_close(wave.double(), cosines * math.sqrt(2 / 9), rtol=0, atol=2e-4)  # type: ignore[arg-type]


def test_the_phase_runs_on_when_the_pitch_moves() -> None:
    excitation = Excitation(RATE, HOP, WINDOW)
    pitch = torch.linspace(150.0, 165.0, 50)[None]
    pulses, _, state = excitation(pitch)
    wave = overlap_add(pulses[0], excitation)[WINDOW : 48 * HOP]
    # Pulses stand where the integral of the pitch passes whole numbers.
    cycles = (pitch[0].double() * HOP / RATE).cumsum(0)
    expected = int(cycles[47]) - int(cycles[1])
    assert abs(int((wave > 0.4 * wave.max()).int().diff().clamp(min=0).sum()) - expected) <= 1
    torch.testing.assert_close(state.phase, (2 * math.pi * cycles[-1:]).remainder(2 * math.pi))


def test_pieces_continue_each_other() -> None:
    excitation = Excitation(RATE, HOP, WINDOW)
    pitch = 100 + 300 * torch.rand(2, 2 * NOISE_PERIOD_HOPS, generator=torch.Generator().manual_seed(0))
    pulses, noise, _ = excitation(pitch)
    state, pieces = None, []
    for piece in pitch.split([1, 7, 150, 242], dim=1):
        found, hiss, state = excitation(piece, state)
        pieces.append((found, hiss))
    torch.testing.assert_close(torch.cat([p for p, _ in pieces], dim=1), pulses)
    assert torch.equal(torch.cat([n for _, n in pieces]), noise)
    torch.testing.assert_close(excitation(pitch[1:])[0], pulses[1:])


def test_the_noise_is_noise() -> None:
    excitation = Excitation(RATE, HOP, WINDOW)
    _, noise, _ = excitation(torch.full((1, NOISE_PERIOD_HOPS), 100.0))
    wave = overlap_add(noise, excitation)[WINDOW:-WINDOW]
    assert abs(wave.std().item() - 1) < 0.02 and abs(wave.mean().item()) < 0.02
    power = torch.fft.rfft(wave).abs().square()
    low, high = power[: len(power) // 2].mean(), power[len(power) // 2 :].mean()
    assert 0.9 < (low / high).item() < 1.1
