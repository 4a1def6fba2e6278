"""DashengTokenizer: frozen semantics, a stated look-ahead, equal when streamed, alone or in a batch, whole on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizer.dasheng import DashengConfig, DashengTokenizer
from tokenizer.dasheng_encoder import DashengEncoderConfig
from tokenizer.errors import UserError

TINY = DashengConfig(
    semantic=DashengEncoderConfig(
        sample_rate_hz=1600,
        n_fft=48,
        hop_length=16,
        num_mels=8,
        hidden_dim=24,
        num_layers=2,
        num_heads=3,
        mlp_ratio=2,
        window_frames=5,
    ),
    n_fft=64,
    num_mels=12,
    decoder_dim=16,
    decoder_hidden_dim=32,
    decoder_blocks=2,
    kernel_size=3,
    synthesis_window=128,
    latent_dim=8,
    num_codebooks=3,
    codebook_size=16,
)
HOP = TINY.semantic.frame_samples


def make(config: DashengConfig = TINY) -> DashengTokenizer:
    """Random weights, with running statistics that matter and windows that add up to audible samples."""
    torch.manual_seed(0)
    tokenizer = DashengTokenizer(config)
    with torch.no_grad():
        tokenizer.encoder.model.init_bn.running_mean.uniform_(-30.0, 0.0)  # type: ignore[union-attr]
        tokenizer.encoder.model.init_bn.running_var.uniform_(50.0, 300.0)  # type: ignore[union-attr]
        for block in tokenizer.decoder.backbone.convnext:
            block.dwconv.weight.normal_()  # type: ignore[union-attr, operator]
            block.pwconv1.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
            block.pwconv2.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
        tokenizer.decoder.backbone.embed.weight.normal_(std=0.2)
        tokenizer.decoder.head.out.weight.normal_(std=0.1)
        tokenizer.decoder.head.out.bias.fill_(-1.0)
    return tokenizer.eval()


@pytest.fixture
def tokenizer() -> DashengTokenizer:
    return make()


def audio(batch: int, samples: int, seed: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_the_published_layout_looks_252_frames_ahead() -> None:
    with torch.device("meta"):
        tokenizer = DashengTokenizer(DashengConfig(causal=False))
    assert (tokenizer.sample_rate_hz, tokenizer.frame_rate_hz, tokenizer.feature_dim) == (16000, 25.0, 1280)
    assert tokenizer.lookahead_frames == 252
    assert tokenizer.decoder_lookahead_frames == 21
    injected = sum(p.numel() for p in tokenizer.encoder.parameters() if p.requires_grad)
    assert injected == 1280 * 128 * 4 + 3 * 1280  # 0.66 M


def test_a_frame_depends_on_its_window_and_what_the_spectrogram_reaches_beyond(tokenizer: DashengTokenizer) -> None:
    waveform = audio(1, 12 * HOP)[:, 0]
    assert tokenizer.lookahead_frames == 5  # 4 more of its window, and half a spectrogram window
    for frame, last in ((0, 5), (4, 5), (5, 10)):
        before = tokenizer.encoder(waveform).features[0, frame]
        changed = waveform.clone()
        changed[:, (last + 1) * HOP :] += 0.1
        assert torch.equal(tokenizer.encoder(changed).features[0, frame], before)
        changed[:, last * HOP : (last + 1) * HOP] += 0.1
        assert not torch.equal(tokenizer.encoder(changed).features[0, frame], before)


def test_features_are_the_sum_and_latents_are_normalized(tokenizer: DashengTokenizer) -> None:
    waveform = audio(1, 7 * HOP)
    injection = tokenizer.encoder(waveform[:, 0])
    frames = tokenizer.encode(waveform)
    torch.testing.assert_close(frames.features, injection.semantic + injection.acoustic)
    torch.testing.assert_close(injection.semantic, tokenizer.encoder.model(waveform[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.latents.mean(-1), torch.zeros(1, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.latents.std(-1, unbiased=False), torch.ones(1, 7), atol=1e-3, rtol=0)


def test_gradients_reach_the_injection_and_not_the_semantics(tokenizer: DashengTokenizer) -> None:
    tokenizer.train()
    assert not tokenizer.encoder.model.training and tokenizer.decoder.training
    before = {key: value.clone() for key, value in tokenizer.encoder.model.state_dict().items()}
    features = tokenizer.encoder(audio(2, 6 * HOP)[:, 0]).features
    waveform, _ = tokenizer.synthesize(features + tokenizer.expand(tokenizer.project(features)))
    waveform.square().sum().backward()
    without = {name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert without == {f"encoder.model.{name}" for name, _ in tokenizer.encoder.model.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.encoder.model.state_dict().items())


def test_the_causal_decoder_sees_no_later_frame_and_the_centred_one_as_far_as_it_says() -> None:
    for causal in (True, False):
        tokenizer = make(replace(TINY, causal=causal))
        reach = tokenizer.decoder_lookahead_frames
        assert reach == (0 if causal else 3)
        features = torch.randn(1, 12, 24, requires_grad=True)
        samples, _ = tokenizer.synthesize(features)
        (gradient,) = torch.autograd.grad(samples[0, 4 * HOP : 5 * HOP].square().sum(), features)
        seen = gradient[0].abs().sum(dim=-1).nonzero()[:, 0]
        assert int(seen.max()) == 4 + reach


def test_the_streaming_encoder_answers_when_the_look_ahead_has_passed(tokenizer: DashengTokenizer) -> None:
    encoder = tokenizer.streaming_encoder()
    counts = [encoder.push(piece).latents.shape[1] for piece in audio(1, 12 * HOP).split(HOP, dim=-1)]
    assert counts == [0] * 5 + [5] + [0] * 4 + [5] + [0]
    assert encoder.flush().latents.shape[1] == 2


def test_the_fingerprint_is_that_of_the_frames(tokenizer: DashengTokenizer) -> None:
    assert make(replace(TINY, causal=False)).fingerprint() == tokenizer.fingerprint()
    semantic = replace(TINY.semantic, window_frames=6)
    assert make(replace(TINY, semantic=semantic)).fingerprint() != tokenizer.fingerprint()
    for part, same in ((tokenizer.decoder, True), (tokenizer.expand, True), (tokenizer.encoder.patch_embed, False)):
        before = tokenizer.fingerprint()
        with torch.no_grad():
            next(iter(part.parameters())).add_(1.0)
        assert (tokenizer.fingerprint() == before) == same


def test_weights_of_another_shape_are_refused(tokenizer: DashengTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_dim": 9}))
    with pytest.raises(UserError, match="does not fit"):
        DashengTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "semantic": {"hiden_dim": 24}}))
    with pytest.raises(UserError, match=r"semantic: unknown key 'hiden_dim'; did you mean 'hidden_dim'"):
        DashengTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_fft": 1280}, "n_fft=1280 must be even and less than 1280"),
        ({"upsampling": 3}, "upsampling=3 must divide a frame's 640 samples"),
        ({"synthesis_window": 1000}, "synthesis_window=1000 must be a multiple of the decoder's hop 320"),
        ({"kernel_size": 6}, "kernel_size=6 must be odd"),
        ({"latent_dim": 0}, "latent_dim=0 must be positive"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DashengConfig(**change)


def test_bad_settings_of_the_semantic_encoder() -> None:
    with pytest.raises(ValueError, match="num_heads=7 must divide hidden_dim=1280"):
        DashengEncoderConfig(num_heads=7)
    with pytest.raises(ValueError, match="window_frames=0 must be positive"):
        DashengEncoderConfig(window_frames=0)
