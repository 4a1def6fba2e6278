"""The encoder that the package `xares` takes: its rules, and the package's own checker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from xares.audio_encoder_checker import check_audio_encoder
from xares.utils import attr_from_py_path

from tests.support.recordings import BlockTokenizer
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.errors import UserError
from training import embeddings, xares_encoder
from training.xares_encoder import HybridlmEncoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def chosen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDLM_TOKENIZER", str(model))
    monkeypatch.delenv("HYBRIDLM_INPUT", raising=False)


def test_keeps_the_rules_of_xares() -> None:
    """One name of the module ends in `Encoder`; it takes no argument and maps (B, S) to (B, T, output_dim)."""
    assert [name for name in dir(xares_encoder) if name.endswith("Encoder")] == ["HybridlmEncoder"]
    encoder = HybridlmEncoder()
    assert isinstance(encoder, nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (24_000, 8, 40.0)
    audio = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    frames = encoder(audio)
    assert frames.shape == (2, -(-50_000 // 960), 8)
    torch.testing.assert_close(frames, tiny_tokenizer().encode(audio[:, None]).latents)
    torch.testing.assert_close(encoder(audio[0]), frames[:1], atol=1e-5, rtol=1e-5)


def test_long_audio_passes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(0))
    whole = HybridlmEncoder()(audio)
    monkeypatch.setattr(xares_encoder, "PIECE_S", 0.3)
    torch.testing.assert_close(HybridlmEncoder()(audio), whole, atol=1e-5, rtol=1e-5)


def test_the_view_is_chosen_by_argument_or_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = torch.randn(1, 9_600, generator=torch.Generator().manual_seed(0))
    codes = HybridlmEncoder(str(model), "codes")(audio)
    assert not torch.equal(codes, HybridlmEncoder()(audio))
    monkeypatch.setenv("HYBRIDLM_INPUT", "codes")
    assert torch.equal(HybridlmEncoder()(audio), codes)
    with pytest.raises(UserError, match="has no features"):
        HybridlmEncoder(input="features")
    with pytest.raises(UserError, match="input='sound' must be one of features, latents, codes"):
        HybridlmEncoder(input="sound")
    monkeypatch.setattr(xares_encoder, "load_codec", lambda name: BlockTokenizer(feature_dim=6))
    assert HybridlmEncoder(input="features").output_dim == 6
    assert embeddings.default_input(BlockTokenizer(feature_dim=6)) == "features"


def test_the_checker_of_the_package_passes_it() -> None:
    encoder_class = attr_from_py_path("training/xares_encoder.py", endswith="Encoder")
    assert check_audio_encoder(encoder_class())
