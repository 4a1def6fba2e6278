"""A random model, tokenizer and text pieces, small enough that a test takes a fraction of a second."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from sampling.pipeline import AudioModel
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config
from tokenizer.text import TextTokenizer

SENTENCES = ["good morning", "the quick brown fox jumps over the lazy dog", "she sells sea shells", "how are you"]
TAGS = ("speech", "music", "sound", "speaker:kathleen")


@lru_cache
def tiny_tokenizer() -> F3Tokenizer:
    """25 Hz, 24 kHz, 8-d latents, 3 codebooks of 32."""
    torch.manual_seed(0)
    tokenizer = F3Tokenizer(
        F3Config(
            encoder_dim=16,
            decoder_dim=16,
            frame_dim=16,
            encoder_blocks=1,
            decoder_blocks=1,
            encoder_frame_blocks=1,
            decoder_frame_blocks=1,
            latent_dim=8,
            num_codebooks=3,
            codebook_size=32,
        )
    ).eval()
    with torch.no_grad():
        for weight in tokenizer.state_dict().values():
            weight.copy_(weight.bfloat16())  # the precision on disk, so that saving and loading changes nothing
    return tokenizer


@lru_cache
def tiny_text() -> TextTokenizer:
    """Bytes, a few pieces and four tags."""
    return TextTokenizer.train(SENTENCES, vocab_size=320, tags=TAGS)


def tiny_model(
    representation: str = "hybrid",
    *,
    stop_bias: float = -4.0,
    tokenizer: F3Tokenizer | None = None,
    **settings: Any,
) -> AudioModel:
    """A random model whose outputs are spread out, so that two draws are hardly ever equal by chance.

    Args:
        representation: "discrete", "continuous" or "hybrid".
        stop_bias: Logit of stopping at every frame: -30 never stops, 30 always wants to.
        tokenizer: Instead of `tiny_tokenizer`.
        settings: Further fields of `ModelConfig`.
    """
    torch.manual_seed(0)
    tokenizer, text = tokenizer or tiny_tokenizer(), tiny_text()
    config = ModelConfig(
        **{
            "vocab_size": text.vocab_size,
            "num_codebooks": tokenizer.num_codebooks,
            "codebook_size": tokenizer.codebook_size,
            "latent_dim": tokenizer.latent_dim,
            "feature_dim": tokenizer.feature_dim,
            "frame_rate_hz": tokenizer.frame_rate_hz,
            "representation": representation,
            "hidden_dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_dim": 64,
            "code_embedding_dim": 16,
            "depth_dim": 16,
            "depth_layers": 1,
            "depth_ffn_dim": 32,
            "num_mixtures": 3,
            "latent_head_dim": 16,
            "latent_head_layers": 1,
            "latent_head_ffn_dim": 32,
            "short_context_frames": 3,
            "short_context_dim": 16,
            "max_frames": 250,
            **settings,
        }
    )
    model = HybridLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        model.stop.weight.zero_()
        model.stop.bias.fill_(stop_bias)
    return AudioModel(model, tokenizer, text)
