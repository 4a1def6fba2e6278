"""The F3 autoencoder: causal, equal when streamed, alone or in a batch, and whole on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tokenizer.bottleneck import centre_and_scale
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config

TINY = F3Config(
    hop_length=96,
    sample_rate_hz=2400,
    analysis_window=64,
    num_mels=8,
    num_phase_bins=8,
    encoder_dim=16,
    encoder_blocks=1,
    decoder_dim=16,
    decoder_blocks=1,
    frame_dim=24,
    encoder_frame_blocks=1,
    decoder_frame_blocks=1,
    kernel_size=3,
    synthesis_window=48,
    latent_dim=8,
    num_codebooks=3,
    codebook_size=16,
)


@pytest.fixture
def tokenizer() -> F3Tokenizer:
    torch.manual_seed(0)
    return F3Tokenizer(TINY).eval()


@pytest.fixture
def plain() -> F3Tokenizer:
    """Without normalization, with codebooks and biases that are not about zero."""
    torch.manual_seed(0)
    tokenizer = F3Tokenizer(dataclasses.replace(TINY, normalization="none")).eval()
    with torch.no_grad():
        tokenizer.encoder.project.weight.mul_(7.0)
        tokenizer.encoder.project.bias.normal_(std=4.0)
        latents = tokenizer.encoder(audio(8, 960, seed=9)[:, 0])[0]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        tokenizer.quantizer.update(latents, decay=0.5, revive_below=0.1, generator=generator)
    return tokenizer


def audio(batch: int, samples: int, seed: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_latents_are_normalized_per_frame(tokenizer: F3Tokenizer) -> None:
    latents = tokenizer.encode(audio(1, 960)).latents
    torch.testing.assert_close(latents.mean(-1), torch.zeros(1, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(-1, unbiased=False), torch.ones(1, 10), atol=1e-3, rtol=0)


def test_encoder_and_decoder_are_causal_by_gradient(tokenizer: F3Tokenizer) -> None:
    waveform = audio(1, 960)[:, 0].requires_grad_()
    latents, _ = tokenizer.encoder(waveform)
    (gradient,) = torch.autograd.grad(latents[0, 4].square().sum() + latents[0, 4, 0], waveform)
    assert gradient[0, : 5 * 96].abs().max() > 0
    assert gradient[0, 5 * 96 :].abs().max() == 0
    inputs = latents.detach().requires_grad_()
    samples, _ = tokenizer.decoder(inputs)
    (gradient,) = torch.autograd.grad(samples[0, 4 * 96 : 5 * 96].sum(), inputs)
    assert gradient[0, 4].abs().max() > 0
    assert gradient[0, 5:].abs().max() == 0


def test_stored_precision_costs_little(tokenizer: F3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded, waveform = F3Tokenizer.load(tmp_path), audio(1, 960)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    torch.testing.assert_close(loaded.encode(waveform).latents, tokenizer.encode(waveform).latents, atol=0.1, rtol=0)


def test_the_fingerprint_is_that_of_the_frames(tokenizer: F3Tokenizer) -> None:
    for part, same in ((tokenizer.decoder, True), (tokenizer.encoder, False)):
        before = tokenizer.fingerprint()
        with torch.no_grad():
            next(iter(part.parameters())).add_(1.0)
        assert (tokenizer.fingerprint() == before) == same


def test_without_normalization_latents_keep_their_scale_until_it_is_folded_away(plain: F3Tokenizer) -> None:
    waveform = audio(2, 960)
    before = plain.encode(waveform)
    mean, scale = centre_and_scale(before.latents)
    assert scale > 2 and mean.abs().max() > 2
    found = plain.standardized(mean, float(scale))
    after = found.encode(waveform)
    torch.testing.assert_close(after.latents, (before.latents - mean) / scale, atol=1e-5, rtol=1e-5)
    assert torch.equal(after.codes, before.codes) and len(after.codes.unique()) > 4
    sounds = found.decode_latents(after.latents), plain.decode_latents(before.latents)
    torch.testing.assert_close(*sounds, atol=1e-5, rtol=1e-4)
    codes = after.codes[:, :2]
    torch.testing.assert_close(found.decode_codes(codes), plain.decode_codes(codes), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.encode(waveform).latents, before.latents, atol=0, rtol=0)  # nothing is changed
    # Training goes on from there as it would have from here.
    for tokenizer, latents in ((plain, before.latents), (found, after.latents)):
        generator = torch.Generator().manual_seed(0)
        tokenizer.quantizer.update(latents, decay=0.5, revive_below=0.0, generator=generator)
    assert torch.equal(found.quantize(after.latents), plain.quantize(before.latents))


def test_without_normalization_streaming_equals_offline_and_saved_equals_loaded(
    plain: F3Tokenizer, tmp_path: Path
) -> None:
    waveform = audio(1, 1000)
    offline = plain.encode(waveform)
    encoder = plain.streaming_encoder()
    found = [encoder.push(piece) for piece in waveform.split([1, 95, 96, 808], dim=-1)] + [encoder.flush()]
    latents = torch.cat([frames.latents for frames in found], dim=1)
    torch.testing.assert_close(latents, offline.latents, atol=1e-4, rtol=1e-5)
    assert torch.equal(torch.cat([frames.codes for frames in found], dim=2), offline.codes)
    plain.save(tmp_path)
    loaded = F3Tokenizer.load(tmp_path)
    assert loaded.config.normalization == "none" and loaded.fingerprint() == plain.fingerprint()
    torch.testing.assert_close(loaded.encode(waveform).latents, offline.latents, atol=0.5, rtol=0.05)


def test_folders_from_before_the_choice_of_normalization_are_unaffected(tokenizer: F3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("normalization") == "channels"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert F3Tokenizer.load(tmp_path).config == TINY
    with pytest.raises(ValueError, match="normalization=channels"):
        tokenizer.standardized(torch.zeros(8), 2.0)
    # As it was before there was a choice, so that what was trained on these latents goes on working.
    for tensor in tokenizer.state_dict().values():
        tensor.fill_(0.5)
    assert tokenizer.fingerprint() == "e02e2e7e8fdb689c"


def test_weights_of_another_shape_are_refused(tokenizer: F3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_dim": 9}))
    with pytest.raises(UserError, match="does not fit"):
        F3Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hops_per_frame": 7}, "hops_per_frame=7 must divide hop_length=960"),
        ({"synthesis_window": 500}, "synthesis_window=500 must be a multiple"),
        ({"num_phase_bins": 600}, "num_phase_bins=600 must be at most"),
        ({"latent_dim": 0}, "latent_dim=0 must be positive"),
    ],
)
def test_bad_settings(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F3Config(**change)  # type: ignore[arg-type]


def test_overlapping_windows_add_up_to_one() -> None:
    decoder = F3Tokenizer(TINY).decoder
    windows = decoder.window.expand(1, 20, -1)
    samples, tail = decoder._overlap_add(windows, torch.zeros(1, 24))
    torch.testing.assert_close(samples[:, 24:], torch.ones(1, 456), atol=1e-5, rtol=0)
    assert tail.shape == (1, 24)
