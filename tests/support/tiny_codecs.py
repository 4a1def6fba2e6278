"""Published codecs of `transformers` in small: their own classes, random weights, saved as they publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.23")  # which Python 3.10 can't have

from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

CODECS = ("encodec", "mimi", "dac", "dac-odd")
"""Each family; `dac-odd` has a hop with an odd factor, as the published models at 16 and 24 kHz have."""
CHUNKED = "encodec-48khz"
"""EnCodec's 48 kHz layout, in chunks of ten frames."""
HOPS = {"encodec": 8, "mimi": 16, "dac": 8, "dac-odd": 10, CHUNKED: 8}


def tiny_codec(name: str, **changes: Any) -> Any:
    """A model of `transformers` whose signals stay alive through all layers, so that every part of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(name, changes)
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 0 or key.endswith(("inited", "initialized")):
                continue
            if "embed" in key or "codebook.weight" in key:
                tensor.copy_(torch.randn(tensor.shape) * 0.8 ** _codebook(key))
            elif key.endswith(("cluster_usage", "alpha")):
                tensor.copy_(0.5 + torch.rand(tensor.shape))
            elif key.endswith("layer_scale.scale"):
                tensor.fill_(0.5)
            elif key.endswith("original0"):
                tensor.copy_(1.2 + 0.2 * torch.rand(tensor.shape))
            elif tensor.dim() == 1:
                tensor.add_(0.05 * torch.randn(tensor.shape))
            else:
                gain = 0.75 if isinstance(model, DacModel) else 1.2  # DAC's residual units add up
                tensor.copy_(torch.randn(tensor.shape) * gain * tensor.shape[1:].numel() ** -0.5)
    return model.eval()


def save_tiny_codec(folder: Path, name: str, **changes: Any) -> Path:
    """Write it as `save_pretrained` does; returns the folder."""
    tiny_codec(name, **changes).save_pretrained(folder)
    return folder


def _codebook(key: str) -> int:
    return next(int(part) for part in key.split(".") if part.isdigit())


def _build(name: str, changes: dict[str, Any]) -> nn.Module:
    if name == "encodec":
        sizes = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_size": 16}
        return EncodecModel(EncodecConfig(**{**sizes, "target_bandwidths": [48.0], **changes}))
    if name == CHUNKED:
        sizes = {
            **{"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_size": 16},
            **{"sampling_rate": 16_000, "chunk_length_s": 0.005, "target_bandwidths": [32.0]},
            **{"audio_channels": 2, "normalize": True, "overlap": 0.01},
            **{"norm_type": "time_group_norm", "use_causal_conv": False},
        }
        return EncodecModel(EncodecConfig(**{**sizes, **changes}))
    if name == "mimi":
        sizes = {
            **{"hidden_size": 32, "num_filters": 4, "upsampling_ratios": [4, 2], "num_hidden_layers": 2},
            **{"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "codebook_size": 16},
            **{"codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4},
            **{"upsample_groups": 32, "sliding_window": 5},
        }
        return MimiModel(MimiConfig(**{**sizes, **changes}))
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 4, "codebook_size": 16}
    ratios = [2, 5] if name == "dac-odd" else [2, 4]
    rate = 16_000 if name == "dac-odd" else 44_100
    return DacModel(
        DacConfig(**{**sizes, "codebook_dim": 4, "downsampling_ratios": ratios, "sampling_rate": rate, **changes})
    )
