"""The three models of WHISPER-GPT's table have the sizes that the paper gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.settings import from_mapping
from training.config import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "whisper-gpt"
ENCODEC = {"num_codebooks": 8, "codebook_size": 1024, "latent_dim": 128, "feature_dim": 80, "frame_rate_hz": 75.0}


def model_of(name: str) -> HybridLM:
    language = read_yaml(CONFIGS / f"{name}.yaml")["language"]
    settings = {**language["model"], **ENCODEC, "vocab_size": language["text"]["vocab_size"]}
    return HybridLM(from_mapping(ModelConfig, settings, where=name))


@pytest.mark.parametrize(("name", "millions"), [("gpt-s", 3.7), ("hybrid", 4.0), ("gpt-l", 40.0)])
def test_sizes(name: str, millions: float) -> None:
    model = model_of(name)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)
    config = model.config
    assert (config.input_codebooks, config.output_codebooks, config.predicts_latents) == (1, 1, False)
    assert (config.continuous == "features") == (name == "hybrid") == (model.fusion.slices is not None)


def test_fusion_costs_what_the_paper_says() -> None:
    """About 0.3 M; everything behind the fusion is as in GPT-S."""
    small, hybrid = model_of("gpt-s"), model_of("hybrid")
    assert hybrid.num_parameters() - small.num_parameters() == pytest.approx(0.3e6, abs=0.05e6)
    for part in ("decoder", "code_head"):
        sizes = [sum(weights.numel() for weights in getattr(model, part).parameters()) for model in (small, hybrid)]
        assert sizes[0] == sizes[1]
