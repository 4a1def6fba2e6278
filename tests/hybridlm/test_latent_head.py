import math

import pytest
import torch
from torch import distributions

from hybridlm.latent_head import GaussianMixture
from hybridlm.model import HybridLM
from tests.support.tiny_frames import CODEBOOKS, LATENT, SIZE, tiny_config, tiny_model
from training.new_model import start_from_codebooks


def _mixture(dim=2, components=3, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GaussianMixture(
        log_weights=torch.randn(rows, components, generator=generator).log_softmax(dim=-1),
        means=torch.randn(rows, components, dim, generator=generator),
        scales=0.2 + torch.rand(rows, components, dim, generator=generator),
    )


def test_log_prob_is_that_of_torch_distributions():
    mixture = _mixture(dim=6, components=4, rows=20)
    latents = torch.randn(20, 6)
    reference = distributions.MixtureSameFamily(
        distributions.Categorical(logits=mixture.log_weights),
        distributions.Independent(distributions.Normal(mixture.means, mixture.scales), 1),
    )
    torch.testing.assert_close(mixture.log_prob(latents), reference.log_prob(latents), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixture.mean(), reference.mean, rtol=1e-5, atol=1e-5)


def test_the_density_of_a_head_integrates_to_one():
    model = tiny_model(latent_dim=2)
    model.statistics.set(latent_mean=torch.tensor([0.5, -0.5]), latent_std=torch.tensor([0.7, 1.5]))
    axis = torch.linspace(-12, 12, 481)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        codes = torch.randint(0, SIZE, (1, CODEBOOKS))
        density = model.latent_distribution(torch.randn(1, 32), codes)
        rows = len(grid)
        spread = GaussianMixture(
            log_weights=density.log_weights.expand(rows, -1),
            means=density.means.expand(rows, -1, -1),
            scales=density.scales.expand(rows, -1, -1),
        )
        integral = spread.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert integral.item() == pytest.approx(1.0, abs=1e-3)


def test_samples_have_the_moments_of_the_density():
    mixture = _mixture(dim=2)
    rows = 10_000
    many = GaussianMixture(
        log_weights=mixture.log_weights.expand(rows, -1),
        means=mixture.means.expand(rows, -1, -1),
        scales=mixture.scales.expand(rows, -1, -1),
    )
    drawn = many.sample([torch.Generator().manual_seed(0)] * rows)
    weights = mixture.log_weights.exp()[..., None]
    mean = (weights * mixture.means).sum(dim=1)[0]
    variance = (weights * (mixture.scales**2 + mixture.means**2)).sum(dim=1)[0] - mean**2
    torch.testing.assert_close(drawn.mean(dim=0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.var(dim=0), variance, rtol=0.1, atol=0.0)


def test_temperature_scales_the_standard_deviation_by_its_root():
    mixture = _mixture(components=1)
    draws = [mixture.sample([torch.Generator().manual_seed(3)], t) - mixture.means[:, 0] for t in (1.0, 0.25, 0.0)]
    torch.testing.assert_close(draws[1], 0.5 * draws[0])
    torch.testing.assert_close(draws[2], torch.zeros_like(draws[2]))
    assert draws[0].abs().min() > 0


def test_a_row_draws_the_same_alone_and_in_a_batch():
    mixture = _mixture(rows=3)
    together = mixture.sample([torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    for i in range(3):
        one = GaussianMixture(
            log_weights=mixture.log_weights[i : i + 1], means=mixture.means[i : i + 1], scales=mixture.scales[i : i + 1]
        )
        assert torch.equal(one.sample([torch.Generator().manual_seed(i + 1)]), together[i : i + 1])


def test_scales_keep_their_floor():
    model = tiny_model(scale_floor=0.3)
    with torch.no_grad():
        model.latent_head.output.bias.fill_(-50.0)
        density = model.latent_distribution(torch.randn(4, 32), torch.randint(0, SIZE, (4, CODEBOOKS)))
    torch.testing.assert_close(density.scales, torch.full_like(density.scales, 0.3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("representation", ["continuous", "hybrid"])
def test_the_density_of_a_new_model_is_about_standard_normal(representation):
    torch.manual_seed(0)
    model = HybridLM(tiny_config(representation=representation, latent_dim=8))
    codes = torch.randint(0, SIZE, (500, CODEBOOKS)) if representation == "hybrid" else None
    density = model.latent_distribution(torch.randn(500, 32), codes)
    nll = -density.log_prob(torch.randn(500, 8)).mean().item() / 8
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert entropy <= nll < entropy + 0.15
    assert density.means.std(dim=1).mean(dim=-1).min() > 0.1, "components that coincide can never part"


@pytest.mark.parametrize("normalized", [True, False])
def test_codebooks_written_into_the_embeddings_make_the_first_mean_the_dequantized_latent(normalized):
    torch.manual_seed(0)
    model = HybridLM(tiny_config())
    if not normalized:
        model.statistics.set(latent_mean=torch.randn(LATENT), latent_std=torch.rand(LATENT) + 1.0)
    codebooks = torch.randn(CODEBOOKS, SIZE, LATENT) * torch.tensor([1.0, 0.4, 0.2])[:, None, None]
    start_from_codebooks(model, codebooks)
    codes = torch.randint(0, SIZE, (200, CODEBOOKS))
    dequantized = sum(codebooks[k, codes[:, k]] for k in range(CODEBOOKS))
    with torch.no_grad():
        mean = model.latent_distribution(torch.randn(200, 32), codes).mean()
        total = model.code_embedding(codes).sum(dim=1)[:, :LATENT]
    for d in range(LATENT):
        pair = torch.stack([mean[:, d], dequantized[:, d]])
        assert torch.corrcoef(pair)[0, 1] > 0.97
    assert (mean - dequantized).square().mean() < 0.1 * dequantized.var()
    assert 0.7 < total.std() < 1.4


def test_codebooks_of_another_shape_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"shape \(3, 11, 4\) must be .*\(3, 11, 5\)"):
        start_from_codebooks(model, torch.randn(CODEBOOKS, SIZE, LATENT - 1))
    with pytest.raises(ValueError, match="continuous has no code embeddings"):
        start_from_codebooks(tiny_model(representation="continuous"), torch.randn(CODEBOOKS, SIZE, LATENT))


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="latent_std has the value 0, but must be positive"):
        tiny_model().statistics.set(latent_std=torch.zeros(LATENT))


def test_a_model_without_latents_has_no_density():
    with pytest.raises(ValueError, match="representation=discrete predicts no latents"):
        tiny_model(representation="discrete").latent_distribution(torch.randn(1, 32), None)
