"""A tiny model configuration, random frames of three unequal rows, and a left-padded prefix for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.frames import AudioFrames

CODEBOOKS, SIZE, LATENT, FEATURE, VOCABULARY = 3, 11, 5, 7, 50
LENGTHS = (9, 5, 7)
PREFIX_LENGTHS = (6, 3, 1)

VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {"representation": "hybrid"},
    "hybrid-concat": {"representation": "hybrid", "fusion": "concat"},
    "hybrid-coarse": {"representation": "hybrid", "num_input_codebooks": 2, "num_output_codebooks": 1},
    "hybrid-features": {"representation": "hybrid", "continuous_input": "features"},
    "continuous": {"representation": "continuous"},
    "discrete": {"representation": "discrete"},
    "whisper-gpt": {
        "representation": "discrete",
        "continuous_input": "features",
        "fusion": "concat",
        "num_input_codebooks": 1,
        "num_output_codebooks": 1,
        "slice_layers": 2,
        "slice_dim": 16,
        "slice_heads": 2,
        "slice_ffn_dim": 24,
        "slice_window_frames": 3,
    },
    "reader": {
        "representation": "hybrid",
        "reader_layer": 0,
        "reader_heads": 3,
        "reader_head_dim": 8,
        "first_text_id": 5,
    },
    "reader-alone": {
        "representation": "hybrid",
        "reader_layer": 0,
        "reader_heads": 3,
        "reader_head_dim": 8,
        "first_text_id": 15,
        "text_in_prefix": False,
        "alignment_heads": 0,
    },
    "flow": {"representation": "hybrid", "flow_layers": 2, "flow_dim": 24, "flow_draws": 2, "flow_distill": 0.5},
    "continuous-flow": {"representation": "continuous", "flow_layers": 2, "flow_dim": 24, "flow_draws": 2},
    "no-short-context": {"representation": "hybrid", "short_context_frames": 0},
}


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers of width 32."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_codebooks=CODEBOOKS,
        codebook_size=SIZE,
        latent_dim=LATENT,
        feature_dim=FEATURE,
        hidden_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=48,
        code_embedding_dim=16,
        depth_dim=16,
        depth_ffn_dim=24,
        num_mixtures=3,
        latent_head_dim=16,
        latent_head_ffn_dim=24,
        short_context_frames=4,
        short_context_dim=12,
        alignment_layer=1,
        alignment_heads=2,
    )
    return dataclasses.replace(config, **changes)


def tiny_model(seed: int = 0, **changes: Any) -> HybridLM:
    """A model with random weights, in evaluation mode, whose outputs really depend on its inputs."""
    torch.manual_seed(seed)
    model = HybridLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Small initial weights would let a wrong past pass unseen.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_prefix(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask (3, 6), rows of 6, 3 and 1 real ids; the last id stands for `<audio>` and is no text."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(0, VOCABULARY, (3, 6), generator=generator)
    prefix[:, -1] = 1
    mask = torch.arange(6) >= 6 - torch.tensor(PREFIX_LENGTHS)[:, None]
    return prefix, mask


def tiny_frames(seed: int = 0) -> AudioFrames:
    """Three rows of 9, 5 and 7 frames; the padding holds garbage."""
    generator = torch.Generator().manual_seed(seed)
    length = max(LENGTHS)
    return AudioFrames(
        codes=torch.randint(0, SIZE, (3, CODEBOOKS, length), generator=generator),
        latents=torch.randn(3, length, LATENT, generator=generator),
        features=torch.randn(3, length, FEATURE, generator=generator),
        lengths=torch.tensor(LENGTHS),
    )


def select(frames: AudioFrames, row: int, start: int = 0, end: int | None = None) -> AudioFrames:
    """One row, without its padding unless `end` says otherwise."""
    end = int(frames.lengths[row]) if end is None else end
    assert frames.features is not None
    return AudioFrames(
        codes=frames.codes[row : row + 1, :, start:end],
        latents=frames.latents[row : row + 1, start:end],
        features=frames.features[row : row + 1, start:end],
        lengths=torch.tensor([end - start]),
    )
