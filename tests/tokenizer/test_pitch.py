"""Pitch is measured exactly on tones with overtones, and its distribution gives back what it was taught."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer.pitch import GRID_POINTS, pitch_grid, pitch_loss, pitch_of, track_pitch

RATE = 24000


def voice(hertz: float, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(seconds * RATE)) / RATE
    return 0.1 * sum(torch.sin(2 * math.pi * hertz * k * time + k) / k for k in range(1, 8))[None]  # type: ignore[index]


@pytest.mark.parametrize("hertz", [70.0, 110.3, 203.7, 440.0, 700.0])
def test_the_pitch_of_a_voice_is_found(hertz: float) -> None:
    pitch, periodicity = track_pitch(voice(hertz), RATE, 240)
    assert pitch.shape == periodicity.shape == (1, 50)
    torch.testing.assert_close(pitch[0, 10:40], torch.full((30,), hertz), rtol=1e-3, atol=0)
    assert periodicity[0, 10:40].min() > 0.98


def test_noise_and_silence_have_little_periodicity() -> None:
    noise = 0.1 * torch.randn(1, RATE // 2, generator=torch.Generator().manual_seed(0))
    assert track_pitch(noise, RATE, 240)[1].mean() < 0.4
    assert track_pitch(torch.zeros(1, RATE // 2), RATE, 240)[1].max() == 0.0


def test_loudness_does_not_move_the_pitch() -> None:
    loud, quiet = track_pitch(voice(150.0), RATE, 240), track_pitch(0.05 * voice(150.0), RATE, 240)
    torch.testing.assert_close(loud[0][:, 10:40], quiet[0][:, 10:40], rtol=1e-3, atol=0)


def test_logits_trained_by_the_loss_give_the_pitch_back() -> None:
    target = torch.tensor([[61.0, 123.4, 200.0, 333.3, 790.0]])
    logits = torch.zeros(1, 5, GRID_POINTS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        pitch_loss(logits, target, torch.ones_like(target)).backward()
        optimizer.step()
    torch.testing.assert_close(pitch_of(logits.detach(), pitch_grid()), target, rtol=5e-3, atol=0)


def test_unvoiced_hops_teach_nothing() -> None:
    logits = torch.zeros(1, 2, GRID_POINTS, requires_grad=True)
    pitch_loss(logits, torch.tensor([[100.0, 100.0]]), torch.tensor([[0.9, 0.3]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().max() > 0 and logits.grad[0, 1].abs().max() == 0
