"""Disturbance of loudness: none for the same sound, more for what an ear minds more."""

from __future__ import annotations

import math

import pytest
import torch

from tokenizer.loudness import LoudnessLoss, bark

RATE = 24000


@pytest.fixture(scope="module")
def loss() -> LoudnessLoss:
    return LoudnessLoss(RATE)


def tone(hertz: float, level: float = 0.1) -> torch.Tensor:
    return level * math.sqrt(2) * torch.sin(2 * math.pi * hertz * torch.arange(RATE) / RATE)[None, None]


def noise(level: float = 0.1, seed: int = 0) -> torch.Tensor:
    return level * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(seed))


def test_the_same_sound_does_not_disturb(loss: LoudnessLoss) -> None:
    assert loss(noise(), noise()).item() == pytest.approx(1e-3, abs=1e-6)  # the root's guard alone


def test_small_errors_fall_into_the_dead_zone(loss: LoudnessLoss) -> None:
    assert loss(0.9 * noise(), noise()).item() < 0.01
    assert loss(0.1 * noise(), noise()).item() > 1


def test_bands_hold_the_whole_power(loss: LoudnessLoss) -> None:
    # Of a tone in the middle of the range all of it, wherever it lies between two bands.
    for hertz in (500.0, 1000.0, 1111.0, 4000.0):
        powers = loss.powers(tone(hertz)[0])
        assert powers[0, 5:-5].sum(dim=-1).mean().item() == pytest.approx(0.01, rel=0.02)


def test_a_tone_at_79_db_is_loud_and_one_at_threshold_is_not(loss: LoudnessLoss) -> None:
    sones = loss.loudness(loss.powers(tone(1000.0, 1.0)[0]))[0, 5:-5].sum(dim=-1).mean() * loss.band_width_bark
    assert 4 < sones < 30  # 1 kHz at 79 dB is about 15 sones; its neighbours' masking is not modelled
    assert loss.loudness(loss.threshold[None, None]).max() < 1e-6


def test_added_sound_disturbs_more_than_missing_sound(loss: LoudnessLoss) -> None:
    both, one = tone(500.0) + tone(3000.0), tone(500.0)
    symmetric = LoudnessLoss(RATE, asymmetric_weight=0.0)
    added, missing = loss(both, one) - symmetric(both, one), loss(one, both) - symmetric(one, both)
    assert added > 10 * missing.clamp(min=1e-3)


def test_what_counts_is_relative_to_the_target(loss: LoudnessLoss) -> None:
    quiet = loss(0.1 * (noise() + noise(0.03, 1)), 0.1 * noise())
    torch.testing.assert_close(quiet, loss(noise() + noise(0.03, 1), noise()), rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_prediction_alone_and_is_finite(loss: LoudnessLoss) -> None:
    predicted, target = torch.zeros(1, 1, RATE).requires_grad_(), noise().requires_grad_()
    loss(predicted, target).backward()
    assert predicted.grad is not None and torch.isfinite(predicted.grad).all()
    assert target.grad is None or not target.grad.any()
    found = (0.5 * noise(seed=3)).requires_grad_()
    before = loss(found, noise())
    (gradient,) = torch.autograd.grad(before, found)
    assert loss(found - 0.01 * gradient / gradient.norm(), noise()) < before


def test_the_bark_scale() -> None:
    torch.testing.assert_close(
        bark(torch.tensor([100.0, 1000.0, 8000.0])), torch.tensor([1.0, 7.7, 19.7]), rtol=0, atol=0.1
    )
