"""Totals of models of different representation bound the same entropy: shown on a source whose entropy is known.

The source: a hidden Markov chain walks over a few centres in the plane, and each frame's latent is the centre plus
Gaussian noise, sigma included. Codes are the nearest centre of these same noised latents. The centres are so far apart
that the code tells the state, so the true entropy rate is that of the chain plus that of the Gaussian.
"""

from __future__ import annotations

import math

import pytest
import torch

from hybridlm.likelihood import bootstrap_ratio, clip_nlls, noise_latents, paired_difference
from hybridlm.model import HybridLM
from tests.support.tiny_frames import tiny_config
from tokenizer.frames import AudioFrames

CENTRES = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
NOISE, SIGMA, STAY, LENGTH = 0.3, 0.1, 0.7, 12
PREFIX = torch.zeros(1, 1, dtype=torch.int64)


def _source(clips, seed):
    """Frames of the source, and the exact -log p of each clip's latents in nats."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(0, 4, (clips,), generator=generator)
    states, chain = [], torch.full((clips,), math.log(4.0))
    for t in range(LENGTH):
        if t > 0:
            move = torch.rand(clips, generator=generator) >= STAY
            state = (state + move * torch.randint(1, 4, (clips,), generator=generator)) % 4
            chain = chain - torch.where(move, math.log((1 - STAY) / 3), math.log(STAY))
        states.append(state)
    means = CENTRES[torch.stack(states, dim=1)]  # (B, T, 2)
    clean = means + NOISE * torch.randn(means.shape, generator=generator)
    latents = noise_latents(clean, SIGMA, range(seed * clips, (seed + 1) * clips))
    density = torch.distributions.Normal(means, math.hypot(NOISE, SIGMA))
    exact = chain - density.log_prob(latents).sum(dim=(1, 2))
    codes = torch.cdist(latents, CENTRES).argmin(dim=-1)[:, None]
    return AudioFrames(codes=codes, latents=latents, lengths=torch.full((clips,), LENGTH)), exact


def _trained(representation, steps=200):
    torch.manual_seed(0)
    model = HybridLM(
        tiny_config(
            representation=representation,
            num_codebooks=1,
            codebook_size=4,
            latent_dim=2,
            feature_dim=0,
            num_mixtures=4,
            history_noise=0.0,
            vocab_size=1,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * min(1.0, (steps - step) / (0.7 * steps), (step + 1) / 20)
        frames, _ = _source(32, seed=100 + step)
        nll = model(PREFIX.expand(32, -1), torch.ones(32, 1, dtype=torch.bool), frames)
        optimizer.zero_grad()
        (nll.total().sum() / (32 * LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def scored():
    frames, exact = _source(400, seed=1)
    prefix, mask = PREFIX.expand(400, -1), torch.ones(400, 1, dtype=torch.bool)
    result = {}
    for representation in ("hybrid", "continuous", "discrete"):
        model = _trained(representation)
        with torch.no_grad():
            result[representation] = clip_nlls(model.nll(prefix, mask, frames))
    return result, exact


def _without_stop(clip):
    return sum(clip.codes) + clip.latents


def test_the_exact_likelihood_of_the_source_has_the_entropy_of_its_formula():
    _, exact = _source(4000, seed=2)
    move = -(STAY * math.log(STAY) + (1 - STAY) * math.log((1 - STAY) / 3))
    gaussian = math.log(2 * math.pi * math.e * (NOISE**2 + SIGMA**2))
    rate = (math.log(4.0) + (LENGTH - 1) * move) / LENGTH + gaussian
    assert (exact.mean() / LENGTH).item() == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("representation", ["hybrid", "continuous"])
def test_a_total_stays_above_the_true_entropy_and_comes_near_it(scored, representation):
    result, exact = scored
    excess = [_without_stop(clip) - true for clip, true in zip(result[representation], exact.tolist(), strict=True)]
    interval = bootstrap_ratio(excess, [LENGTH] * len(excess))
    assert interval.high > 0, "below the entropy of the source: no likelihood of the scored latents"
    assert interval.value < 0.05


def test_the_total_of_the_hybrid_is_comparable_with_the_continuous_one(scored):
    """Same latents, same unit: on a source that both can learn they agree, where a mere loss would not."""
    result, _ = scored
    difference = paired_difference(result["hybrid"], result["continuous"], _without_stop)
    assert abs(difference.value) < 0.05


def test_the_codes_of_the_hybrid_are_scored_like_those_of_the_discrete_model(scored):
    result, _ = scored
    difference = paired_difference(result["hybrid"], result["discrete"], lambda clip: sum(clip.codes))
    assert abs(difference.value) < 0.05
    rate = sum(sum(clip.codes) for clip in result["discrete"]) / (400 * LENGTH)
    chain = -(STAY * math.log(STAY) + (1 - STAY) * math.log((1 - STAY) / 3))
    assert rate == pytest.approx((math.log(4.0) + (LENGTH - 1) * chain) / LENGTH, abs=0.05)
