"""Codecs of `transformers` in pieces: when a piece is answered, and that memory does not grow with the length.

That streams equal the whole is in test_contract.py, that the whole equals the library in test_huggingface.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_codecs import CODECS, HOPS
from tests.support.tiny_tokenizers import assert_same_frames, noise, tokenizer_of
from tokenizer.huggingface import HuggingFaceTokenizer


def codec_of(name: str) -> HuggingFaceTokenizer:
    tokenizer = tokenizer_of(f"hf-{name}")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_a_frame_waits_for_what_it_depends_on_and_no_longer(name: str) -> None:
    tokenizer = codec_of(name)
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
    tokenizer = codec_of("mimi")
    stream = tokenizer.streaming_decoder(source="codes")
    for _ in range(12):
        assert stream.push(torch.zeros(1, 4, 1, dtype=torch.long)).shape[-1] == HOPS["mimi"]
    assert stream.flush().shape[-1] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_blocks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = codec_of(name)
    waveform = noise(45 * HOPS[name] - 5)
    whole = tokenizer.encode(waveform)
    audio = tokenizer.decode_codes(whole.codes)
    monkeypatch.setattr("tokenizer.huggingface.BLOCK_SAMPLES", 3 * HOPS[name])
    assert_same_frames(tokenizer.encode(waveform), whole)
    torch.testing.assert_close(tokenizer.decode_codes(whole.codes), audio, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_long_stream_keeps_only_its_window() -> None:
    tokenizer = codec_of("mimi")
    stream = tokenizer.streaming_encoder()
    for piece in noise(100 * HOPS["mimi"]).split(7 * HOPS["mimi"], dim=-1):
        stream.push(piece)
    transformer = stream._network.layers[-2]
    kept = [layer.keys.shape[-2] for layer in transformer.cache.layers]
    assert max(kept) < 5 == tokenizer.model.config.sliding_window
