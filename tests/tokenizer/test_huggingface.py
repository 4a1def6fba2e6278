"""Codecs of `transformers` as tokenizers: parity with the library, look-ahead, batches, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.tiny_codecs import CODECS, save_tiny_codec, tiny_codec
from tokenizer.huggingface import HuggingFaceTokenizer
from tokenizer.loading import load_tokenizer


class Pair(NamedTuple):
    """A tokenizer and the model of the library with the same weights."""

    tokenizer: HuggingFaceTokenizer
    model: Any
    folder: Path


@pytest.fixture(scope="module", params=CODECS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = save_tiny_codec(tmp_path_factory.mktemp(request.param), request.param)
    return Pair(HuggingFaceTokenizer.pretrained(str(folder)), tiny_codec(request.param), folder)


class Reference(NamedTuple):
    """What the library makes of a waveform."""

    codes: Tensor
    latents: Tensor


def encode(model: Any, waveform: Tensor) -> Reference:
    kind = model.config.model_type
    if kind == "encodec":
        codes = model.encode(waveform, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
        return Reference(codes, model.encoder(waveform).transpose(1, 2))
    codes = model.encode(waveform).audio_codes
    latents = model.encoder(waveform).latents if kind == "mimi" else model.encoder(waveform)
    return Reference(codes, latents.transpose(1, 2))


def decode(model: Any, codes: Tensor) -> Tensor:
    kind = model.config.model_type
    if kind == "encodec":
        return model.decode(codes[None], [None]).audio_values
    if kind == "mimi":
        return model.decode(codes).audio_values
    return model.decode(audio_codes=codes).audio_values[:, None]


def decode_latents(model: Any, latents: Tensor) -> Tensor:
    found = model.decoder(latents.transpose(1, 2))
    return found.audio_values if model.config.model_type == "mimi" else found


def noise(samples: int, batch: int = 1, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_encoding_is_the_library_s(pair: Pair, steps: int) -> None:
    waveform = noise(steps * pair.tokenizer.hop_length, batch=2)
    frames, expected = pair.tokenizer.encode(waveform), encode(pair.model, waveform)
    assert torch.equal(frames.codes, expected.codes)
    assert_close(frames.latents, expected.latents)
    if steps == 40:  # the weights are alive: codes vary in every codebook, and so do the latents
        assert all(len(codebook.unique()) > 2 for codebook in frames.codes.transpose(0, 1))
        assert frames.latents.std(dim=1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_decoding_is_the_library_s(pair: Pair, steps: int) -> None:
    tokenizer = pair.tokenizer
    generator = torch.Generator().manual_seed(steps)
    codes = torch.randint(tokenizer.codebook_size, (2, tokenizer.num_codebooks, steps), generator=generator)
    previous = None
    for k in range(1, tokenizer.num_codebooks + 1):
        audio, expected = tokenizer.decode_codes(codes[:, :k]), decode(pair.model, codes[:, :k])
        assert audio.shape == (2, 1, steps * tokenizer.hop_length)
        assert_close(audio[..., : expected.shape[-1]], expected)
        assert not audio[..., expected.shape[-1] :].any()
        assert previous is None or (audio - previous).abs().max() > 1e-3
        previous = audio
        assert_close(tokenizer.decode_latents(tokenizer.dequantize(codes[:, :k])), audio)
    latents = torch.randn(2, steps, tokenizer.latent_dim, generator=generator)
    expected = decode_latents(pair.model, latents)
    assert_close(tokenizer.decode_latents(latents)[..., : expected.shape[-1]], expected)


@torch.no_grad()
def test_fewer_codebooks_are_a_prefix(pair: Pair, tmp_path: Path) -> None:
    waveform = noise(20 * pair.tokenizer.hop_length)
    few = HuggingFaceTokenizer.pretrained(f"hf:{pair.folder}", num_codebooks=2)
    frames = few.encode(waveform)
    assert torch.equal(frames.codes, pair.tokenizer.encode(waveform).codes[:, :2])
    assert torch.equal(few.decode_codes(frames.codes), pair.tokenizer.decode_codes(frames.codes))
    few.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < (pair.folder / "model.safetensors").stat().st_size
    assert load_tokenizer(tmp_path).num_codebooks == 2
    with pytest.raises(ValueError, match="3 codebooks, but the tokenizer has 1 to 2"):
        few.decode_codes(torch.zeros(1, 3, 4, dtype=torch.long))


def test_the_library_itself_looks_as_far_ahead(pair: Pair) -> None:
    tokenizer, steps = pair.tokenizer, 60
    waveform = noise(steps * tokenizer.hop_length).requires_grad_()
    latents = encode(pair.model, waveform).latents
    reach = []
    for t in range(40):
        (gradient,) = torch.autograd.grad(latents[:, t].square().sum(), waveform, retain_graph=True)
        reach.append(int(gradient.abs().flatten().nonzero().max()) // tokenizer.hop_length - t)
    assert max(reach) == tokenizer.lookahead_frames


def test_saved_folders_load_by_both_names(pair: Pair, tmp_path: Path) -> None:
    pair.tokenizer.save(tmp_path / "codec")
    config = json.loads((tmp_path / "codec" / "config.json").read_text())
    assert (config["type"], config["codec"]["model_type"]) == ("hf", pair.model.config.model_type)
    loaded = [load_tokenizer(name) for name in (str(tmp_path / "codec"), f"hf:{tmp_path / 'codec'}")]
    assert loaded[0].fingerprint() == loaded[1].fingerprint() == pair.tokenizer.fingerprint()


@torch.no_grad()
def test_a_partial_frame_is_filled_with_silence(pair: Pair) -> None:
    hop = pair.tokenizer.hop_length
    waveform = noise(20 * hop - 3)
    silent_end = torch.cat([waveform, torch.zeros(1, 1, 3)], dim=-1)
    assert torch.equal(pair.tokenizer.encode(waveform).codes, encode(pair.model, silent_end).codes)


@torch.no_grad()
def test_features_are_the_causal_log_mel(pair: Pair) -> None:
    tokenizer = pair.tokenizer
    waveform = noise(30 * tokenizer.hop_length)
    assert_close(tokenizer.encode(waveform).features, tokenizer.mel(waveform))
    assert tokenizer.feature_dim == 80
    assert tokenizer.mel.n_fft == 1024


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    prints = set()
    for name in CODECS:
        folder = save_tiny_codec(tmp_path / name, name)
        tokenizers = [HuggingFaceTokenizer.pretrained(str(folder), num_codebooks=k) for k in (None, 3)]
        prints |= {tokenizer.fingerprint() for tokenizer in tokenizers}
    window = save_tiny_codec(tmp_path / "window", "mimi", sliding_window=7)  # the same weights, other frames
    prints.add(HuggingFaceTokenizer.pretrained(str(window)).fingerprint())
    assert len(prints) == 2 * len(CODECS) + 1


def test_an_older_configuration_says_the_same(tmp_path: Path) -> None:
    folder = save_tiny_codec(tmp_path, "mimi", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    new = HuggingFaceTokenizer.pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 50.0
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 50.0, "frame_rate": 1500.0}))
    assert HuggingFaceTokenizer.pretrained(str(folder)).fingerprint() == new.fingerprint()


def test_the_global_generator_stays_as_it_is(pair: Pair) -> None:
    state = torch.random.get_rng_state()
    HuggingFaceTokenizer.pretrained(str(pair.folder))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_codebooks_first_used_in_inference_serve_gradients_later(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer.pretrained(str(save_tiny_codec(tmp_path, "mimi")))
    with torch.inference_mode():
        codes = tokenizer.encode(noise(64)).codes
    tokenizer.dequantize(codes.clone())
    waveform = noise(64).requires_grad_()
    tokenizer.encode(waveform).latents.sum().backward()
    assert waveform.grad is not None
