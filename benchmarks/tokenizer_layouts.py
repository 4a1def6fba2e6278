"""Tokenizers to measure: those that `--tokenizer` loads, and published layouts with random weights.

Weights change nothing in what is computed, so speed and memory can be measured where the published files can't be had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from hybridlm.checkpoint import load_codec
from tokenizer.dasheng import DashengConfig, DashengTokenizer
from tokenizer.dasheng_encoder import DashengEncoderConfig
from tokenizer.encodec import EncodecTokenizer
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from tokenizer.settings import from_mapping

CONFIGS = Path(__file__).parent.parent / "configs"
RANDOM = "random:"
PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/encodec_24khz": {
        **{"model_type": "encodec", "sampling_rate": 24000, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0]},
    },
    "facebook/encodec_48khz": {
        **{"model_type": "encodec", "sampling_rate": 48000, "target_bandwidths": [3.0, 6.0, 12.0, 24.0]},
        **{"audio_channels": 2, "normalize": True, "chunk_length_s": 1.0, "overlap": 0.01},
        **{"norm_type": "time_group_norm", "use_causal_conv": False},
    },
    "kyutai/mimi": {"model_type": "mimi", "frame_rate": 12.5, "rope_theta": 10000.0, "use_causal_conv": True},
    "descript/dac_44khz": {
        **{"model_type": "dac", "downsampling_ratios": [2, 4, 8, 8], "n_codebooks": 9, "sampling_rate": 44100},
    },
    "descript/dac_16khz": {
        # hop_length and hidden_size stand in published files, where they need not be right: they follow from the rest
        **{"model_type": "dac", "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 12, "hop_length": 512},
    },
    "descript/dac_24khz": {
        **{"model_type": "dac", "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32, "sampling_rate": 24000},
    },
}
"""What the configurations of published codecs of `transformers` say beyond the library's defaults, by hub id."""


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by `random:` and a layout's name, or by what `hybridlm` takes: a folder, `box`, `encodec`, `hf:ID`.

    Raises:
        UserError: there is no such tokenizer.
    """
    if not name.startswith(RANDOM):
        return load_codec(name)
    layouts = _layouts()
    if name.removeprefix(RANDOM) not in layouts:
        raise UserError(f"--tokenizer {name}: no such layout; the layouts are {', '.join(layouts)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return layouts[name.removeprefix(RANDOM)]()


def layout_names(*, large: bool = False) -> list[str]:
    """All layouts as `--tokenizer` takes them; those of more than half a billion weights only where asked for."""
    return [RANDOM + name for name in _layouts() if large or name != "dasheng-published"]


def _layouts() -> dict[str, Callable[[], Tokenizer]]:
    return {
        "encodec": EncodecTokenizer.random,
        **{name: lambda name=name: _codec(PUBLISHED[name]) for name in PUBLISHED},  # type: ignore[misc]
        "dasheng-small": lambda: DashengTokenizer(small_dasheng()).eval(),
        "dasheng-published": lambda: DashengTokenizer(DashengConfig(causal=False)).eval(),
    }


def small_semantics() -> DashengEncoderConfig:
    """The semantic encoder of configs/dasheng-semantic-small.yaml."""
    recipe = yaml.safe_load((CONFIGS / "dasheng-semantic-small.yaml").read_text(encoding="utf-8"))
    return from_mapping(DashengEncoderConfig, recipe["masked_spectrogram"]["encoder"])


def small_dasheng() -> DashengConfig:
    """The tokenizer of configs/dasheng-small.yaml."""
    recipe = yaml.safe_load((CONFIGS / "dasheng-small.yaml").read_text(encoding="utf-8"))["dasheng"]
    semantic = replace(small_semantics(), window_frames=recipe["window_frames"])
    return replace(from_mapping(DashengConfig, recipe["tokenizer"]), semantic=semantic)


def _codec(config: dict[str, Any]) -> Tokenizer:
    from tokenizer.huggingface import HuggingFaceTokenizer
    from tokenizer.huggingface_codec import HuggingFaceConfig, build_codec
    from tokenizer.huggingface_weights import own_weights

    settings = HuggingFaceConfig(codec=config)
    codec, _, rename = build_codec(settings)
    weights = own_weights(codec.model, rename)
    # The library starts codebooks at zero, where every distance is a tie.
    return HuggingFaceTokenizer(settings, {k: w if w.any() else torch.randn_like(w) for k, w in weights.items()})
