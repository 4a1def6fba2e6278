"""A model of the real classes, small enough that a test waits for milliseconds: random weights, 24 kHz, 25 Hz."""

from __future__ import annotations

from pathlib import Path

import torch

from hybridlm.checkpoint import save_model
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.f3 import F3Config, F3Tokenizer
from tokenizer.text import TextTokenizer

TAGS = ("speech", "music", "sound", "speaker:kathleen")
SENTENCES = ("Good morning.", "The quick brown fox jumps over the lazy dog.", "How are you today?")


def tiny_tokenizer(seed: int = 0) -> F3Tokenizer:
    """An untrained F3 with 4 codebooks of 16 codes and 8-d latents, at the real rates."""
    torch.manual_seed(seed)
    sizes = {"encoder_dim": 16, "decoder_dim": 16, "frame_dim": 16}
    blocks = {"encoder_blocks": 1, "decoder_blocks": 1, "encoder_frame_blocks": 1, "decoder_frame_blocks": 1}
    config = F3Config(**sizes, **blocks, num_mels=16, num_phase_bins=8, latent_dim=8, num_codebooks=4, codebook_size=16)
    return F3Tokenizer(config).eval()


def tiny_text() -> TextTokenizer:
    """Pieces of three sentences, with four tags."""
    return TextTokenizer.train(SENTENCES, vocab_size=400, tags=TAGS)


def tiny_lm(representation: str = "hybrid", seed: int = 0, vocab_size: int = 400) -> HybridLM:
    """An untrained two-layer model of the tiny tokenizer's frames."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=vocab_size,
        num_codebooks=4,
        codebook_size=16,
        latent_dim=8,
        representation=representation,  # type: ignore[arg-type]
        hidden_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=64,
        code_embedding_dim=16,
        depth_dim=16,
        depth_layers=1,
        depth_ffn_dim=32,
        num_mixtures=2,
        latent_head_dim=16,
        latent_head_layers=1,
        latent_head_ffn_dim=32,
        short_context_dim=16,
        alignment_layer=1,
    )
    return HybridLM(config).eval()


def save_tiny_model(folder: Path, representation: str = "hybrid", seed: int = 0) -> Path:
    """Write the whole folder that `--model` takes; returns it."""
    text = tiny_text()
    model = tiny_lm(representation, seed, vocab_size=text.vocab_size)
    save_model(folder, model, tiny_tokenizer(), text, card="# Tiny\n\nRandom weights, for tests.\n")
    return folder
