"""The semantic encoder and the decoder against plain forms of the published formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from tests.tokenizer.test_dasheng import HOP, TINY, audio, make
from tokenizer.centred_mel import CentredMel, reflect
from tokenizer.dasheng_encoder import DashengEncoder, DashengEncoderConfig
from tokenizer.vocos import Vocos


@pytest.mark.parametrize(("n_fft", "num_mels", "power"), [(512, 64, 2), (1024, 128, 1)])
def test_mel_is_torchaudio_s(n_fft: int, num_mels: int, power: int) -> None:
    """The published front ends are `torchaudio.transforms.MelSpectrogram` at 16 kHz, hop 160."""
    published = torchaudio.transforms.MelSpectrogram(
        sample_rate=16000, n_fft=n_fft, hop_length=160, n_mels=num_mels, power=power, center=True
    )
    ours = CentredMel(sample_rate_hz=16000, n_fft=n_fft, hop_length=160, num_mels=num_mels, power=power)
    waveform = audio(2, 3200)[:, 0]
    found = ours(reflect(waveform, ours.margin, ours.margin))
    torch.testing.assert_close(found, published(waveform), atol=1e-5, rtol=1e-5)


def test_acoustic_side_is_the_stated_formula() -> None:
    """LayerNorm(conv(log max(mel, 1e-7))) on patches of 4 hops."""
    tokenizer = make()
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=1600, n_fft=64, hop_length=16, n_mels=12, power=1, center=True
    )
    waveform = audio(2, 7 * HOP)[:, 0]
    encoder = tokenizer.encoder
    patches = encoder.patch_embed(mel(waveform).clip(min=1e-7).log().unsqueeze(1))  # (B, C, 1, T)
    expected = encoder.norm(patches.flatten(2).transpose(1, 2))
    torch.testing.assert_close(encoder(waveform).acoustic, expected, atol=1e-5, rtol=1e-5)


def published_encoder(encoder: DashengEncoder, waveform: Tensor) -> Tensor:
    """Dasheng by its formulas, in one piece: dB mel, batch norm, patches, positions, blocks with explicit softmax."""
    config = encoder.config
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=config.sample_rate_hz, n_fft=config.n_fft, hop_length=config.hop_length, n_mels=config.num_mels
    )
    decibels = torchaudio.transforms.AmplitudeToDB(top_db=120)(mel(waveform).unsqueeze(1))  # (B, 1, M, H)
    bn = encoder.init_bn
    x = (decibels - bn.running_mean[:, None]) / (bn.running_var[:, None] + 1e-5).sqrt()  # type: ignore[index]
    x = x * bn.weight[:, None] + bn.bias[:, None]
    x = encoder.patch_embed.proj(x)
    x = x + encoder.time_pos_embed[..., : x.shape[-1]] + encoder.freq_pos_embed
    x = x.flatten(2).transpose(1, 2)
    for block in encoder.blocks:
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        query, key, value = block.attn.qkv(y).chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(*(part.chunk(config.num_heads, -1) for part in (query, key, value)), strict=True):
            heads.append((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)
        x = x + block.attn.proj(torch.cat(heads, dim=-1))
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    return F.layer_norm(x, x.shape[-1:], encoder.norm.weight, encoder.norm.bias, 1e-6)


def test_encoder_is_the_published_one_within_a_window() -> None:
    encoder = make().encoder.model
    for name, parameter in encoder.named_parameters():
        if "norm" in name or name.startswith("init_bn"):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    waveform = audio(2, 5 * HOP)[:, 0]
    torch.testing.assert_close(encoder(waveform), published_encoder(encoder, waveform), atol=1e-5, rtol=1e-5)


def test_windows_are_independent_and_restart_the_positions() -> None:
    """Frames 5 to 9 as a recording of their own, up to the spectrogram windows at its ends."""
    encoder = DashengEncoder(replace(TINY.semantic, n_fft=16)).eval()  # windows end with their hops' frame
    waveform = audio(1, 10 * HOP)[:, 0]
    whole = encoder(waveform)
    extended = reflect(waveform, 8, 8)
    second = encoder.window(extended[:, 5 * HOP :])
    torch.testing.assert_close(whole[:, 5:], second, atol=1e-5, rtol=0)


def test_dynamic_range_is_limited_per_row() -> None:
    encoder = DashengEncoder(DashengEncoderConfig(hidden_dim=16, num_layers=1, num_heads=1)).eval()
    loud = torch.cat([torch.zeros(1, 1600), torch.sin(torch.arange(1600.0))[None]], dim=1)
    samples = reflect(torch.cat([loud, 1e-6 * loud]), 256, 256)
    found = encoder.decibels(samples)
    top = found.amax(dim=(1, 2))
    assert float(top[0] - found[0].min()) == pytest.approx(120.0, abs=1e-3)
    assert float(found[1].min()) == pytest.approx(-100.0)
    torch.testing.assert_close(found[1:], encoder.decibels(samples[1:]))


def test_centred_decoder_is_vocos_with_same_padding() -> None:
    decoder: Vocos = make(replace(TINY, causal=False)).decoder
    x = torch.randn(2, 11, 24)
    y = decoder.backbone.embed(F.pad(x.transpose(1, 2), (1, 1))).transpose(1, 2)
    y = decoder.backbone.norm(y)
    for block in decoder.backbone.convnext:
        z = block.dwconv(F.pad(y.transpose(1, 2), (1, 1))).transpose(1, 2)  # type: ignore[union-attr, operator]
        y = y + block.gamma * block.pwconv2(F.gelu(block.pwconv1(block.norm(z))))  # type: ignore[union-attr, operator]
    out = decoder.head.out(decoder.backbone.final_layer_norm(y)).transpose(1, 2)
    magnitude, phase = out.chunk(2, dim=1)
    spectrum = magnitude.exp().clip(max=1e2) * (phase.cos() + 1j * phase.sin())
    # torch.istft trims half a window; "same" padding trims (n_fft - hop) / 2 = 48 at both ends instead.
    window = torch.hann_window(128)
    frames = torch.fft.irfft(spectrum, n=128, dim=1) * window[:, None]
    summed, squares = torch.zeros(2, 10 * 32 + 128), torch.zeros(10 * 32 + 128)
    for hop in range(11):
        summed[:, 32 * hop : 32 * hop + 128] += frames[..., hop]
        squares[32 * hop : 32 * hop + 128] += window.square()
    expected = (summed / squares)[:, 48:-48]
    torch.testing.assert_close(decoder(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_causal_windows_are_divided_by_their_squares() -> None:
    """Every window holds the constant 100 / 128, so the samples are it times sum w / sum w^2 once all overlap."""
    head = make().decoder.head
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.copy_(torch.cat([torch.full((65,), -100.0), torch.zeros(65)]))
        head.out.bias[0] = 1000.0  # clipped to a magnitude of 100 at 0 Hz
    samples, tail = head.causal(torch.zeros(1, 20, 16), None)
    window = torch.hann_window(128).reshape(-1, 32)
    expected = 100 / 128 * window.sum(0) / window.square().sum(0)
    torch.testing.assert_close(samples[0, 96:], expected.repeat(17), atol=1e-5, rtol=1e-4)
    assert tail.shape == (1, 96)
