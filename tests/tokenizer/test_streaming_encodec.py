"""EnCodec in pieces of any size: the same frames and the same samples as in one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenizer.encodec import EncodecConfig, EncodecTokenizer
from tokenizer.frames import AudioFrames, Source

HOP = 320
TOKENIZERS = {
    start: EncodecTokenizer.random(EncodecConfig(start=start), seed=0)  # type: ignore[arg-type]
    for start in ("reflect", "silence")
}


def noise(samples: int, batch: int = 1) -> Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(0))


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


@torch.no_grad()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    start=st.sampled_from(["reflect", "silence"]),
    samples=st.integers(1, 14 * HOP),
    cuts=st.lists(st.integers(0, 5 * HOP), max_size=6),
)
def test_encoding_in_pieces(start: str, samples: int, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[start]
    waveform = noise(samples, batch=2)
    stream = tokenizer.streaming_encoder(batch_size=2)
    pieces = [stream.push(piece) for piece in pieces_of(waveform, cuts, -1)]
    assert_same_frames([*pieces, stream.flush()], tokenizer.encode(waveform))


@torch.no_grad()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    start=st.sampled_from(["reflect", "silence"]),
    source=st.sampled_from(["codes", "latents"]),
    steps=st.integers(1, 14),
    cuts=st.lists(st.integers(0, 6), max_size=6),
)
def test_decoding_in_pieces(start: str, source: Source, steps: int, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[start]
    generator = torch.Generator().manual_seed(steps)
    codes = torch.randint(1024, (2, 8, steps), generator=generator)
    frames = codes if source == "codes" else tokenizer.dequantize(codes)
    whole = tokenizer.decode_codes(codes)
    stream = tokenizer.streaming_decoder(batch_size=2, source=source)
    pieces = [stream.push(piece) for piece in pieces_of(frames, cuts, 2 if source == "codes" else 1)]
    joined = torch.cat([*pieces, stream.flush()], dim=-1)
    if source == "codes" or start == "reflect":
        torch.testing.assert_close(joined, whole, atol=1e-5, rtol=0)
    else:  # the silence before latents is not quantized
        torch.testing.assert_close(joined, tokenizer.decode_latents(frames), atol=1e-5, rtol=0)


@torch.no_grad()
def test_causal_frames_and_samples_come_at_once() -> None:
    tokenizer = TOKENIZERS["silence"]
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder(source="codes")
    for _ in range(3):
        frames = encoder.push(noise(HOP))
        assert frames.codes.shape[2] == 1
        assert decoder.push(frames.codes[:, :2]).shape[-1] == HOP
    assert encoder.flush().codes.shape[2] == decoder.flush().shape[-1] == 0


@torch.no_grad()
def test_reflecting_start_waits_for_the_seventh_frame() -> None:
    tokenizer = TOKENIZERS["reflect"]
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder()
    frames = [encoder.push(piece) for piece in noise(9 * HOP).split(HOP, dim=-1)]
    assert [piece.latents.shape[1] for piece in frames] == [0] * tokenizer.lookahead_frames + [7, 1, 1]
    latents = torch.cat([piece.latents for piece in frames], dim=1)
    samples = [decoder.push(latents[:, t : t + 1]).shape[-1] for t in range(9)]
    assert samples == [0] * 6 + [7 * HOP, HOP, HOP]


@torch.no_grad()
@pytest.mark.parametrize("start", ["reflect", "silence"])
def test_a_flush_starts_anew(start: str) -> None:
    tokenizer = TOKENIZERS[start]
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder()
    whole = tokenizer.encode(noise(1000))
    audio = tokenizer.decode_latents(whole.latents)
    for _ in range(2):
        assert_same_frames([encoder.push(noise(1000)), encoder.flush()], whole)
        joined = torch.cat([decoder.push(whole.latents), decoder.flush()], dim=-1)
        torch.testing.assert_close(joined, audio, atol=1e-5, rtol=0)
    assert encoder.flush().latents.shape == (1, 0, 128)
    assert decoder.flush().shape == (1, 1, 0)
