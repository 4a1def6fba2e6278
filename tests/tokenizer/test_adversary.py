"""Discriminators and their losses."""

from __future__ import annotations

import torch

from tokenizer.adversary import (
    MultiResolutionDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)


def judgement(score: float, activation: float) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    return [(torch.full((2, 1, 3, 3), score), [torch.full((2, 4), activation)])]


def test_losses_by_hand() -> None:
    assert float(discriminator_loss(judgement(0.25, 0), judgement(0.5, 0))) == 0.75 + 1.5
    assert float(discriminator_loss(judgement(2.0, 0), judgement(-2.0, 0))) == 0.0
    assert float(adversarial_loss(judgement(0.5, 0))) == -0.5
    torch.testing.assert_close(feature_matching_loss(judgement(0, 2.0), judgement(0, 3.0)), torch.tensor(0.5))


def test_it_learns_to_tell_noise_from_tones_and_its_gradient_reaches_the_audio() -> None:
    torch.manual_seed(0)
    discriminator = MultiResolutionDiscriminator((64, 128), channels=4)
    time = torch.arange(2400) / 24000
    tones = torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (200, 440, 900, 1700)])[:, None]
    noise = 0.2 * torch.randn(4, 1, 2400)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = discriminator_loss(discriminator(tones), discriminator(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 1.8 and losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in discriminator.parameters())
    noise.requires_grad_()
    adversarial_loss(discriminator(noise)).backward()
    assert noise.grad is not None and noise.grad.abs().max() > 0
