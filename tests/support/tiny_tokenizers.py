"""One small tokenizer of every kind, for what all of them must do alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.tokenizer.test_dasheng import TINY as DASHENG
from tests.tokenizer.test_dasheng import make as dasheng
from tests.tokenizer.test_f3 import TINY as F3
from tokenizer.encodec import EncodecConfig, EncodecTokenizer
from tokenizer.f3 import F3Tokenizer
from tokenizer.frames import AudioFrames, Tokenizer
from tokenizer.representation import RepresentationConfig, RepresentationEncoder


class Kind(NamedTuple):
    """How to make a tokenizer, and how far it looks ahead, in frames."""

    make: Callable[[], Any]
    lookahead: int
    decoder_lookahead: int


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The tokenizer of a kind, its weights as they are on disk."""
    torch.manual_seed(0)
    tokenizer = KINDS[kind].make()
    assert isinstance(tokenizer, nn.Module)
    if tokenizer.name in ("f3", "dasheng"):
        with torch.no_grad():
            for weight in tokenizer.state_dict().values():
                weight.copy_(weight.bfloat16())
    return tokenizer.eval()


def noise(samples: int, batch: int = 1, seed: int = 0) -> Tensor:
    """(B, 1, S)"""
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def pieces_of(x: Tensor, cuts: list[int], dim: int) -> list[Tensor]:
    """Cut `x` at uneven places; a size of 0 is an empty piece."""
    pieces, at = [], 0
    for size in cuts:
        size = min(size, x.shape[dim] - at)
        pieces.append(x.narrow(dim, at, size))
        at += size
    return [*pieces, x.narrow(dim, at, x.shape[dim] - at)]


def assert_same_frames(found: AudioFrames, expected: AudioFrames) -> None:
    """The same codes, and latents and features to 1e-5."""
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=0)


def _f3() -> F3Tokenizer:
    return F3Tokenizer(F3)


def _with_representation() -> F3Tokenizer:
    config = RepresentationConfig(feature_dim=16, num_layers=2, num_heads=2, ffn_dim=24, window_frames=4)
    return _f3().with_representation(RepresentationEncoder(F3.latent_dim, config))


def _hugging_face(name: str) -> Callable[[], Any]:
    def make() -> Any:
        from tests.support.tiny_codecs import save_tiny_codec  # skips where there is no library
        from tokenizer.huggingface import HuggingFaceTokenizer

        with TemporaryDirectory() as folder:
            return HuggingFaceTokenizer.pretrained(str(save_tiny_codec(Path(folder), name)))

    return make


KINDS = {
    "f3": Kind(_f3, 0, 0),
    "f3-representation": Kind(_with_representation, 0, 0),
    "f3-log-mel": Kind(lambda: _f3().with_log_mel(num_mels=8, window=500), 0, 0),
    "dasheng": Kind(dasheng, 5, 0),
    "dasheng-centred": Kind(lambda: dasheng(replace(DASHENG, causal=False)), 5, 3),
    "encodec": Kind(EncodecTokenizer.random, 6, 6),
    "encodec-causal": Kind(lambda: EncodecTokenizer.random(EncodecConfig(start="silence")), 0, 0),
    "hf-encodec": Kind(_hugging_face("encodec"), 6, 6),
    "hf-encodec-48khz": Kind(_hugging_face("encodec-48khz"), 9, 9),
    "hf-mimi": Kind(_hugging_face("mimi"), 0, 0),
    "hf-dac": Kind(_hugging_face("dac"), 17, 19),
    "hf-dac-odd": Kind(_hugging_face("dac-odd"), 14, 16),
}
