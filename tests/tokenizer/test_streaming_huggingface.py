"""Codecs of `transformers` in pieces of any size: the same frames and the same samples as the library's in one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.tiny_codecs import CODECS, HOPS, save_tiny_codec
from tokenizer.frames import AudioFrames, Source
from tokenizer.huggingface import HuggingFaceTokenizer


@cache
def tokenizer_of(name: str) -> HuggingFaceTokenizer:
    with TemporaryDirectory() as folder:
        return HuggingFaceTokenizer.pretrained(str(save_tiny_codec(Path(folder), name)))


def noise(samples: int, batch: int = 1) -> Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(0))


def pieces_of(x: Tensor, cuts: list[int], dim: int) -> list[Tensor]:
    """Cut `x` at uneven places; a size of 0 is an empty piece."""
    pieces, at = [], 0
    for size in cuts:
        size = min(size, x.shape[dim] - at)
        pieces.append(x.narrow(dim, at, size))
        at += size
    return [*pieces, x.narrow(dim, at, x.shape[dim] - at)]


def assert_same_frames(pieces: list[AudioFrames], whole: AudioFrames) -> None:
    assert torch.equal(torch.cat([piece.codes for piece in pieces], dim=2), whole.codes)
    for name in ("latents", "features"):
        joined = torch.cat([getattr(piece, name) for piece in pieces], dim=1)
        torch.testing.assert_close(joined, getattr(whole, name), atol=1e-5, rtol=0)
    assert sum(int(piece.lengths[0]) for piece in pieces) == int(whole.lengths[0])


def library_latents(model: Any, waveform: Tensor) -> Tensor:
    """What the library's own encoder gives; it knows no streams of ours."""
    found = model.encoder(waveform)
    return (found.latents if model.config.model_type == "mimi" else found).transpose(1, 2)


@torch.no_grad()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(CODECS),
    samples=st.integers(1, 400),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
def test_encoding_in_pieces(name: str, samples: int, cuts: list[int]) -> None:
    tokenizer = tokenizer_of(name)
    waveform = noise(samples, batch=2)
    stream = tokenizer.streaming_encoder(batch_size=2)
    pieces = [stream.push(piece) for piece in pieces_of(waveform, cuts, -1)]
    pieces.append(stream.flush())
    assert_same_frames(pieces, tokenizer.encode(waveform))
    silent_end = torch.nn.functional.pad(waveform, (0, -samples % HOPS[name]))
    joined = torch.cat([piece.latents for piece in pieces], dim=1)
    torch.testing.assert_close(joined, library_latents(tokenizer.model, silent_end), atol=1e-5, rtol=0)


@torch.no_grad()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(CODECS),
    source=st.sampled_from(["codes", "latents"]),
    steps=st.integers(1, 50),
    cuts=st.lists(st.integers(0, 12), max_size=8),
)
def test_decoding_in_pieces(name: str, source: Source, steps: int, cuts: list[int]) -> None:
    tokenizer = tokenizer_of(name)
    codes = torch.randint(16, (2, 4, steps), generator=torch.Generator().manual_seed(steps))
    frames = codes if source == "codes" else tokenizer.dequantize(codes)
    stream = tokenizer.streaming_decoder(batch_size=2, source=source)
    pieces = [stream.push(piece) for piece in pieces_of(frames, cuts, 2 if source == "codes" else 1)]
    joined = torch.cat([*pieces, stream.flush()], dim=-1)
    torch.testing.assert_close(joined, tokenizer.decode_codes(codes), atol=1e-5, rtol=0)
    found = tokenizer.model.decoder(tokenizer.dequantize(codes).transpose(1, 2))
    expected = found.audio_values if name == "mimi" else found
    assert joined.shape == (2, 1, steps * HOPS[name])
    torch.testing.assert_close(joined[..., : expected.shape[-1]], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_a_frame_waits_for_what_it_depends_on_and_no_longer(name: str) -> None:
    tokenizer = tokenizer_of(name)
    stream = tokenizer.streaming_encoder()
    counts = [stream.push(piece).codes.shape[2] for piece in noise(30 * HOPS[name]).split(HOPS[name], dim=-1)]
    ahead = tokenizer.lookahead_frames
    if name == "encodec":  # the reflected start waits, what follows doesn't
        assert counts == [0] * ahead + [ahead + 1] + [1] * (29 - ahead)
    else:
        assert counts == [0] * ahead + [1] * (30 - ahead)
    assert stream.flush().codes.shape[2] == 30 - sum(counts)


@torch.no_grad()
def test_a_causal_decoder_gives_a_frame_s_samples_at_once() -> None:
    tokenizer = tokenizer_of("mimi")
    stream = tokenizer.streaming_decoder(source="codes")
    for _ in range(12):
        assert stream.push(torch.zeros(1, 4, 1, dtype=torch.long)).shape[-1] == HOPS["mimi"]
    assert stream.flush().shape[-1] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_a_flush_starts_anew(name: str) -> None:
    tokenizer = tokenizer_of(name)
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder()
    whole = tokenizer.encode(noise(333))
    audio = tokenizer.decode_latents(whole.latents)
    for _ in range(2):
        assert_same_frames([encoder.push(noise(333)), encoder.flush()], whole)
        joined = torch.cat([decoder.push(whole.latents), decoder.flush()], dim=-1)
        torch.testing.assert_close(joined, audio, atol=1e-5, rtol=0)
    assert encoder.flush().latents.shape == (1, 0, tokenizer.latent_dim)
    assert decoder.flush().shape == (1, 1, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_blocks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(name)
    waveform = noise(45 * HOPS[name] - 5)
    whole = tokenizer.encode(waveform)
    audio = tokenizer.decode_codes(whole.codes)
    monkeypatch.setattr("tokenizer.huggingface.BLOCK_SAMPLES", 3 * HOPS[name])
    assert_same_frames([tokenizer.encode(waveform)], whole)
    torch.testing.assert_close(tokenizer.decode_codes(whole.codes), audio, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_long_stream_keeps_only_its_window() -> None:
    tokenizer = tokenizer_of("mimi")
    stream = tokenizer.streaming_encoder()
    for piece in noise(100 * HOPS["mimi"]).split(7 * HOPS["mimi"], dim=-1):
        stream.push(piece)
    transformer = stream._network.layers[-2]
    kept = [layer.keys.shape[-2] for layer in transformer.cache.layers]
    assert max(kept) < 5 == tokenizer.model.config.sliding_window
