"""A model is calibrated on its own draws, and too sure on others'."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from hybridlm.checkpoint import Checkpoint, load_model
from tests.support.saved_model import save_tiny_model
from training.calibration import calibrate
from training.corpus import CachedClip


def clip(codes: torch.Tensor, latents: torch.Tensor) -> CachedClip:
    return CachedClip(key="a", split="test", text=None, tags=(), labels={}, codes=codes, latents=latents, features=None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


def test_what_is_expected_is_the_entropy(found: Checkpoint) -> None:
    """Of a uniform head the entropy is known; of a Gaussian too."""
    model = found.model
    config = model.config
    assert model.code_head is not None and model.latent_head is not None
    with torch.no_grad():
        model.code_head.output.zero_()
        for weights in (model.latent_head.output.weight, model.latent_head.output.bias):
            weights.zero_()
        assert model.latent_head.read_out is not None and model.latent_head.codes is not None
        model.latent_head.read_out.weight.zero_()
        model.latent_head.codes.weight.zero_()
    frames = 60
    codes = torch.randint(config.codebook_size, (config.num_codebooks, frames))
    latents = 5.0 + torch.randn(frames, config.latent_dim)
    result = calibrate(found, [clip(codes, latents)], frames_a_clip=frames, max_frames=frames)
    uniform = config.num_codebooks * math.log(config.codebook_size)
    assert result["codes"].expected == result["codes"].empirical == pytest.approx(uniform, rel=1e-5)
    scales = (math.log(2.0) * model.statistics.latent_std + config.scale_floor).double()  # softplus(0) is log 2
    entropy = float((scales.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())
    assert result["latents"].expected == pytest.approx(entropy, rel=0.02)
    assert result["latents"].empirical > 2 * result["latents"].expected  # the true ones lie far from what is predicted


def test_streams_that_are_not_predicted_are_not_there(tmp_path: Path) -> None:
    made = load_model(save_tiny_model(tmp_path / "model", representation="discrete"))
    config = made.model.config
    codes = torch.zeros(config.num_codebooks, 4, dtype=torch.int64)
    result = calibrate(made, [clip(codes, torch.zeros(4, config.latent_dim))], frames_a_clip=2, max_frames=4)
    assert set(result) == {"codes"}
    assert dataclasses.asdict(result["codes"]).keys() == {"expected", "empirical"}
