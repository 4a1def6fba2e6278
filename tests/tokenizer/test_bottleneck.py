"""Normalization and noise of the F3 bottleneck."""

from __future__ import annotations

import torch

from tokenizer.bottleneck import (
    add_noise,
    add_sigma_vae_noise,
    centre_and_scale,
    coding_rate,
    kl_to_standard_normal,
    normalize_channels,
)


def test_normalization_is_the_published_formula() -> None:
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True, unbiased=False) + 1e-5)
    torch.testing.assert_close(normalize_channels(z), expected, atol=1e-5, rtol=1e-5)


def test_equal_channels_have_a_finite_gradient() -> None:
    z = torch.full((1, 2, 8), 0.7, requires_grad=True)
    normalize_channels(z).sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()


def test_noise_has_one_uniform_strength_per_row() -> None:
    z = torch.zeros(400, 50, 40)
    noise = add_noise(z, 0.5, torch.Generator().manual_seed(0))
    strength = noise.std(dim=(1, 2))
    assert strength.min() < 0.02 and 0.48 < strength.max() < 0.52
    assert abs(strength.mean() - 0.25) < 0.02
    halves = noise[:, :25].std(dim=(1, 2)) / noise[:, 25:].std(dim=(1, 2))
    torch.testing.assert_close(halves, torch.ones(400), atol=0.15, rtol=0)


def test_the_generator_decides() -> None:
    z = torch.zeros(2, 3, 4)
    first, second = (add_noise(z, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, add_noise(z, 0.5, torch.Generator().manual_seed(4)))


def test_coding_rate_by_hand_and_by_rank() -> None:
    z = torch.randn(10, 1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.5])
    expected = 0.5 * torch.log1p(torch.tensor([1.0, 4.0, 0.25]) / 0.04).mean()
    torch.testing.assert_close(coding_rate(z + 5.0, 0.2), expected, atol=0.01, rtol=0)
    collapsed = z[..., :1].expand(-1, -1, 3)
    assert coding_rate(collapsed, 0.2) < 0.5 * expected


def test_sigma_vae_draws_one_normal_strength_per_row_around_the_mean() -> None:
    mean = torch.full((4000, 5, 40), 3.0)
    noise = add_sigma_vae_noise(mean, 0.625, torch.Generator().manual_seed(0)) - mean
    strength = noise.square().mean(dim=(1, 2)).sqrt()
    # Of |N(0, s^2)|: the mean is s sqrt(2 / pi), the root mean square is s; a tenth of the rows lie above 1.645 s.
    assert abs(strength.mean() - 0.625 * (2 / torch.pi) ** 0.5) < 0.02
    assert abs(strength.square().mean().sqrt() - 0.625) < 0.02
    assert abs((strength > 1.645 * 0.625).float().mean() - 0.1) < 0.02
    halves = noise[:, :, :20].std(dim=(1, 2)) / noise[:, :, 20:].std(dim=(1, 2))
    assert 0.9 < halves.mean() < 1.1
    again = add_sigma_vae_noise(mean, 0.625, torch.Generator().manual_seed(0)) - mean
    assert torch.equal(noise, again)


def test_kl_is_that_of_two_gaussians_up_to_what_the_strength_decides() -> None:
    mean = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 1.0
    normal, sigma = torch.distributions.Normal(0.0, 1.0), 0.3
    posterior = torch.distributions.kl_divergence(torch.distributions.Normal(mean, sigma), normal).mean()
    constant = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, sigma), normal)
    torch.testing.assert_close(kl_to_standard_normal(mean), posterior - constant)


def test_scale_is_of_what_lies_about_the_channels_means() -> None:
    z = torch.randn(50, 100, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    mean, scale = centre_and_scale(z + torch.tensor([10.0, 0.0, -5.0]))
    torch.testing.assert_close(mean, torch.tensor([10.0, 0.0, -5.0]), atol=0.15, rtol=0)
    assert abs(scale - (14 / 3) ** 0.5) < 0.05
