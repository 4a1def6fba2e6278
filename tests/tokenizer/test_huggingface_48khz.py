"""EnCodec at 48 kHz: parity with the library's chunks, the loudness in the frames, streams that answer once a chunk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.tokenizer_layouts import PUBLISHED
from tests.support.tiny_codecs import CHUNKED, HOPS, save_tiny_codec
from tokenizer.huggingface import HuggingFaceTokenizer

HOP, CHUNK = HOPS[CHUNKED], 10


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.pretrained(str(save_tiny_codec(tmp_path_factory.mktemp("tiny"), CHUNKED)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """The published configuration at its full width, with random weights."""
    sizes = {"num_filters": 32, "hidden_size": 128, "upsampling_ratios": [8, 5, 4, 2], "codebook_size": 1024}
    settings = {**sizes, **PUBLISHED["facebook/encodec_48khz"]}
    settings.pop("model_type")
    folder = save_tiny_codec(tmp_path_factory.mktemp("published"), CHUNKED, **settings)
    return HuggingFaceTokenizer.pretrained(str(folder))


class Chunks(NamedTuple):
    """What the library gives for chunks that do not overlap."""

    codes: Tensor
    """(chunks, B, K, T)"""
    scales: list[Tensor]
    last_pad: int


def library(tokenizer: HuggingFaceTokenizer, waveform: Tensor) -> tuple[Any, Chunks]:
    model = tokenizer.model
    model.config.overlap = 0.0
    bandwidth = model.config.target_bandwidths[-1]
    found = model.encode(waveform.expand(-1, 2, -1), bandwidth=bandwidth)
    return model, Chunks(found.audio_codes, found.audio_scales, found.last_frame_pad_length or 0)


def loud_then_soft(samples: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.logspace(-0.5, -3, samples) * torch.randn(batch, 1, samples, generator=generator)


def compare(tokenizer: HuggingFaceTokenizer, waveform: Tensor) -> None:
    """Codes, loudness and both decodings against the library's."""
    model, chunks = library(tokenizer, waveform)
    frames = tokenizer.encode(waveform)
    total = frames.codes.shape[2]
    flat = torch.cat(list(chunks.codes), dim=-1)[..., :total]
    assert torch.equal(frames.codes[:, 1:], flat)
    size = chunks.codes.shape[-1]
    scales = torch.cat([scale.expand(-1, size) for scale in chunks.scales], dim=1)[:, :total]
    torch.testing.assert_close(frames.latents[..., -1].exp(), scales, atol=0, rtol=1e-5)
    step = 128 / tokenizer.codebook_size
    of_codes = 10 ** ((frames.codes[:, 0] * step - 100) / 20)
    assert (20 * (of_codes / scales).log10()).abs().max() <= step / 2 + 1e-3
    content = model.quantizer.decode(flat.transpose(0, 1)).transpose(1, 2)
    for given, decoded in (
        (scales, tokenizer.decode_latents(torch.cat([content, scales.log()[..., None]], dim=-1))),
        (of_codes, tokenizer.decode_codes(frames.codes)),
    ):
        expected = model.decode(
            chunks.codes, list(given[:, ::size].T[..., None]), last_frame_pad_length=chunks.last_pad
        ).audio_values
        assert expected.shape[1] == 2
        torch.testing.assert_close(decoded, expected.mean(dim=1, keepdim=True), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 7, 10, 11, 37])
def test_parity_with_the_library(tokenizer: HuggingFaceTokenizer, steps: int) -> None:
    compare(tokenizer, loud_then_soft(steps * HOP, batch=2))


@torch.no_grad()
def test_parity_of_the_published_layout(published: HuggingFaceTokenizer) -> None:
    assert (published.sample_rate_hz, published.num_codebooks, published.latent_dim) == (48_000, 17, 129)
    assert (published.frame_rate_hz, published.lookahead_frames) == (150.0, 149)
    compare(published, loud_then_soft(170 * 320))


@torch.no_grad()
def test_each_chunk_comes_out_as_loud_as_it_went_in(tokenizer: HuggingFaceTokenizer) -> None:
    """Twice as loud a chunk has the same content, and twice as loud an output; the others stay as they are."""
    waveform = loud_then_soft(3 * CHUNK * HOP)
    louder = waveform.clone()
    louder[..., CHUNK * HOP : 2 * CHUNK * HOP] *= 2.0
    before, after = tokenizer.encode(waveform), tokenizer.encode(louder)
    gain = torch.zeros(3 * CHUNK)
    gain[CHUNK : 2 * CHUNK] = math.log(2.0)
    torch.testing.assert_close(after.latents[0, :, -1] - before.latents[0, :, -1], gain, atol=1e-5, rtol=0)
    assert torch.equal(after.codes[:, 1:], before.codes[:, 1:])
    audio, expected = (tokenizer.decode_latents(frames.latents) for frames in (after, before))
    expected = expected * gain.exp().repeat_interleave(HOP)
    torch.testing.assert_close(audio, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_silence_stays_silent(tokenizer: HuggingFaceTokenizer) -> None:
    frames = tokenizer.encode(torch.zeros(1, 1, CHUNK * HOP))
    assert not frames.codes[:, 0].any()
    assert tokenizer.decode_latents(frames.latents).abs().max() < 1e-6
    assert tokenizer.decode_codes(frames.codes).abs().max() < 1e-3


@torch.no_grad()
def test_loudness_that_differs_within_a_chunk_is_averaged_in_decibels(tokenizer: HuggingFaceTokenizer) -> None:
    latents = tokenizer.encode(loud_then_soft(CHUNK * HOP)).latents
    uneven = latents.clone()
    uneven[..., -1] += torch.linspace(-1.0, 1.0, CHUNK)
    torch.testing.assert_close(tokenizer.decode_latents(uneven), tokenizer.decode_latents(latents), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_loudness_alone_decodes(tokenizer: HuggingFaceTokenizer) -> None:
    codes = tokenizer.encode(loud_then_soft(12 * HOP)).codes
    latents = tokenizer.dequantize(codes[:, :1])
    assert latents.shape == (1, 12, 17) and not latents[..., :-1].any()
    assert tokenizer.decode_codes(codes[:, :1]).shape == (1, 1, 12 * HOP)


@torch.no_grad()
def test_streams_answer_once_a_chunk(tokenizer: HuggingFaceTokenizer) -> None:
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder()
    latents = tokenizer.encode(loud_then_soft(25 * HOP)).latents
    pieces = loud_then_soft(25 * HOP).split(HOP, dim=-1)
    frames = [encoder.push(piece).codes.shape[2] for piece in pieces]
    samples = [decoder.push(latents[:, t : t + 1]).shape[-1] for t in range(25)]
    assert frames == ([0] * (CHUNK - 1) + [CHUNK]) * 2 + [0] * 5
    assert samples == [HOP * count for count in frames]
    assert encoder.flush().codes.shape[2] == 5 and decoder.flush().shape[-1] == 5 * HOP


@torch.no_grad()
def test_a_chunk_depends_on_no_other_and_on_all_of_itself(tokenizer: HuggingFaceTokenizer) -> None:
    waveform = loud_then_soft(3 * CHUNK * HOP)
    changed = waveform.clone()
    changed[..., 2 * CHUNK * HOP - 1] += 0.5
    before, after = tokenizer.encode(waveform).latents, tokenizer.encode(changed).latents
    same = (before == after).all(dim=-1)[0]
    assert same.tolist() == [True] * CHUNK + [False] * CHUNK + [True] * CHUNK
