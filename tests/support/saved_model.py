"""The tiny model and a tiny enhancer as folders, the form in which every command takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridlm.checkpoint import save_model
from tests.support.tiny_audio_model import tiny_model, tiny_tokenizer
from tokenizer.enhancer import EmbeddingSpace, Enhancer, EnhancerConfig, SpeechEnhancer


def save_tiny_model(folder: Path, representation: str = "hybrid", **settings: Any) -> Path:
    """Write the folder that `--model` takes; `settings` as of `tiny_model`. Returns the folder."""
    made = tiny_model(representation, **settings)
    save_model(folder, made.model, made.tokenizer, made.text, card="# Tiny\n\nRandom weights, for tests.\n")
    return folder


def save_tiny_enhancer(folder: Path) -> Path:
    """Write the folder that `hybridlm enhance --model` takes, with random weights. Returns the folder."""
    space = EmbeddingSpace(tiny_tokenizer())
    torch.manual_seed(0)
    config = EnhancerConfig(hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=24, window_frames=4)
    network = Enhancer(space.dim, config, normalized=True).eval()
    torch.nn.init.normal_(network.head.weight, std=0.3)
    SpeechEnhancer(space, network).save(folder)
    return folder
