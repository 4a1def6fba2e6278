"""The representation encoder: causal, bounded, streamed exactly, and harmless to latents and codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.tokenizer.test_f3 import TINY, audio
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.representation import RepresentationConfig, RepresentationEncoder

CONFIG = RepresentationConfig(feature_dim=16, num_layers=2, num_heads=2, ffn_dim=24, window_frames=4)


@pytest.fixture
def encoder() -> RepresentationEncoder:
    torch.manual_seed(1)
    return RepresentationEncoder(TINY.latent_dim, CONFIG).eval()


@pytest.fixture
def tokenizer(encoder: RepresentationEncoder) -> F3Tokenizer:
    torch.manual_seed(0)
    return F3Tokenizer(TINY).eval().with_representation(encoder)


def latents(frames: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, frames, TINY.latent_dim, generator=torch.Generator().manual_seed(seed))


def test_features_depend_on_the_present_and_a_bounded_past(encoder: RepresentationEncoder) -> None:
    """Two layers of four frames: a frame sees itself and the six before it, no more and no less."""
    z = latents().requires_grad_()
    features, _ = encoder(z)
    features[0, 8].sum().backward()
    assert z.grad is not None
    seen = z.grad[0].abs().sum(dim=-1) > 0
    assert seen.tolist() == [2 <= frame <= 8 for frame in range(12)]


def test_blocks_of_any_size_give_the_features_of_the_whole(encoder: RepresentationEncoder) -> None:
    z = latents(23)
    whole, _ = encoder(z)
    state, parts, start = None, [], 0
    for size in (1, 5, 2, 9, 6):
        part, state = encoder(z[:, start : start + size], state)
        parts.append(part)
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.features(z, block=4), whole, atol=1e-5, rtol=0)
    assert all(past.keys.shape[2] == CONFIG.window_frames - 1 for past in state.layers)


def test_order_matters(encoder: RepresentationEncoder) -> None:
    """Without rotary angles the first layer would see its window as a bag."""
    z = latents(4)
    turned = z[:, [1, 0, 2, 3]]
    assert not torch.allclose(encoder(z)[0][0, 3], encoder(turned)[0][0, 3], atol=1e-4)


def test_latents_and_codes_are_the_same_with_and_without_it(tokenizer: F3Tokenizer) -> None:
    waveform = audio(2, 1000)
    plain = tokenizer.without_representation()
    with_it, without = tokenizer.encode(waveform), plain.encode(waveform)
    assert torch.equal(with_it.latents, without.latents) and torch.equal(with_it.codes, without.codes)
    assert without.features is None and plain.feature_dim == 0
    assert with_it.features is not None and with_it.features.shape == (2, 11, tokenizer.feature_dim)
    assert tokenizer.fingerprint() != plain.fingerprint()


def test_folders_from_before_there_were_features_keep_their_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = F3Tokenizer(TINY).eval()
    plain.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(',\n  "representation": null', ""))
    assert "representation" not in (tmp_path / "config.json").read_text()
    assert load_tokenizer(tmp_path).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide feature_dim=16 into even widths; use 4"),
        ({"window_frames": 0}, "window_frames=0 must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_weights_of_another_encoder_are_refused(tokenizer: F3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(UserError, match="does not fit config"):
        load_tokenizer(tmp_path)


def test_standardized_features_have_no_mean_and_unit_variance(encoder: RepresentationEncoder) -> None:
    recordings = [5 + latents(frames, seed)[0] for seed, frames in enumerate((30, 7, 50))]
    twice = encoder.standardized(recordings[:1]).standardized(recordings)
    features = torch.cat([twice.features(one[None])[0] for one in recordings])
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    assert bool((encoder.feature_mean == 0).all()) and bool((encoder.feature_scale == 1).all())
    z = 5 + latents(23, seed=9)
    whole, _ = twice(z)
    torch.testing.assert_close(twice.features(z, block=4), whole, atol=1e-5, rtol=0)
    again = F3Tokenizer(TINY).eval().with_representation(twice)
    state = again.state_dict()
    assert torch.equal(state["representation.feature_mean"], twice.feature_mean)


def test_features_that_never_move_are_not_blown_up(encoder: RepresentationEncoder) -> None:
    still = torch.zeros(1, TINY.latent_dim)
    assert encoder.standardized([still]).features(torch.zeros(1, 3, TINY.latent_dim)).abs().max() < 10
