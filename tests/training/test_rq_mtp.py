"""Random-quantized multi-token prediction, against its equations written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.rq_mtp import MultiTokenHeads, RandomProjectionQuantizer, codebook_use


def test_a_code_is_the_nearest_normalized_vector_to_the_normalized_projection() -> None:
    quantizer = RandomProjectionQuantizer(6, projection_dim=4, codebook_size=32, seed=5)
    targets = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    projected = F.normalize(targets @ quantizer.projection, dim=-1)
    distances = (projected[:, :, None] - quantizer.codebook).norm(dim=-1)
    assert torch.equal(quantizer(targets), distances.argmin(dim=-1))
    assert torch.equal(quantizer(3.0 * targets), quantizer(targets))


def test_the_targets_are_fixed_by_the_seed_and_never_learn() -> None:
    one, same, other = (RandomProjectionQuantizer(6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.projection, same.projection) and torch.equal(one.codebook, same.codebook)
    assert not torch.equal(one.projection, other.projection)
    assert not list(one.parameters())


def test_each_head_is_asked_for_the_code_its_offset_later() -> None:
    """Features that spell the code two frames later: the head of offset 2 can read them, that of offset 1 cannot."""
    torch.manual_seed(0)
    size, frames = 5, 40
    codes = torch.randint(0, size, (2, frames))
    features = F.one_hot(codes.roll(-2, dims=1), size).float()
    heads = MultiTokenHeads(size, size, num_offsets=2)
    with torch.no_grad():
        for head in heads.heads:
            head.weight.copy_(20 * torch.eye(size))
            head.bias.zero_()
    mask = torch.ones(2, frames, dtype=torch.bool)
    losses, hits = heads(features, codes, mask)
    assert losses[1] < 1e-3 and hits[1] == 1
    assert losses[0] > 5 and hits[0] < 0.6


def test_padding_counts_neither_as_source_nor_as_target() -> None:
    torch.manual_seed(0)
    heads = MultiTokenHeads(3, 4, num_offsets=3)
    features, codes = torch.randn(1, 6, 3), torch.randint(0, 4, (1, 6))
    padded_features = torch.cat([features, 100 * torch.randn(1, 5, 3)], dim=1)
    padded_codes = torch.cat([codes, torch.randint(0, 4, (1, 5))], dim=1)
    mask = torch.arange(11)[None] < 6
    expected, _ = heads(features, codes, torch.ones(1, 6, dtype=torch.bool))
    found, _ = heads(padded_features, padded_codes, mask)
    torch.testing.assert_close(found, expected)
    short, _ = heads(features[:, :2], codes[:, :2], torch.ones(1, 2, dtype=torch.bool))
    assert short.isfinite().all() and short[1] == 0  # two frames have no pair two apart


def test_collapse_is_seen() -> None:
    mask = torch.ones(1, 64, dtype=torch.bool)
    assert codebook_use(torch.zeros(1, 64, dtype=torch.int64), mask, 64) == (1 / 64, 1.0)
    share, perplexity = codebook_use(torch.arange(64)[None], mask, 64)
    assert share == 1.0 and abs(perplexity - 64) < 0.1


def test_targets_of_any_mean_and_scale_use_the_codebook() -> None:
    """Offsets that all frames share send them to a few codes; standardized, they spread as if there were none."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 2000, 16, generator=generator)
    moved = 5 + torch.linspace(0.01, 3, 16) * plain
    mask = torch.ones(1, 2000, dtype=torch.bool)
    quantizer = RandomProjectionQuantizer(16, projection_dim=8, codebook_size=64)
    best = codebook_use(quantizer(plain), mask, 64)[1]
    assert codebook_use(quantizer(moved), mask, 64)[1] < best / 3
    quantizer.standardize(moved[0])
    assert codebook_use(quantizer(moved), mask, 64)[1] > 0.9 * best
    constant = torch.cat([moved, torch.full((1, 2000, 1), 4.0)], dim=2)
    wider = RandomProjectionQuantizer(17, projection_dim=8, codebook_size=64).standardize(constant[0])
    assert wider.target_scale.isfinite().all() and wider(constant).shape == (1, 2000)
