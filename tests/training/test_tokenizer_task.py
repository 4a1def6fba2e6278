"""Training of the autoencoder through the one loop."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.tokenizer.test_f3 import TINY
from tokenizer.audio import write_audio
from tokenizer.bottleneck import add_sigma_vae_noise, centre_and_scale
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.settings import from_mapping
from training.run import train_mapping
from training.tokenizer_task import TokenizerLossConfig, TokenizerTask, TokenizerTaskConfig, bottleneck

RATE = TINY.sample_rate_hz


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    time = torch.arange(RATE) / RATE
    for index, pitch in enumerate((100, 150, 220, 330, 500, 700)):
        write_audio(folder / f"{index}.wav", 0.5 * torch.sin(2 * torch.pi * pitch * time)[None], RATE)
    return folder


def mapping(corpus: Path, output: Path, **changes: object) -> dict[str, object]:
    settings: dict[str, object] = {
        "task": "tokenizer",
        "output": str(output),
        "max_steps": 6,
        "log_every": 2,
        "validate_every": 6,
        "checkpoint_every": 3,
        "precision": "fp32",
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    }
    task: dict[str, object] = {
        "data": {"sources": [str(corpus)], "batch_size": 4, "segment_frames": 10, "validation_fraction": 0.0},
        "tokenizer": asdict(TINY),
        "losses": {"discriminator_n_ffts": [64, 128], "discriminator_channels": 2, "adversarial_from_step": 2},
    }
    for key, value in changes.items():
        (task if key in ("part", "data", "losses") else settings)[key] = value
    return {**settings, "tokenizer_task": task}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return F3Tokenizer.load(folder).state_dict()


def test_a_run_moves_every_weight_and_exports_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = F3Tokenizer(TINY).state_dict()
    train_mapping(mapping(corpus, tmp_path / "run", ema_decay=0.0), "test")
    after = weights(tmp_path / "run" / "model")
    still = [key for key in after if torch.equal(after[key], before[key].bfloat16().float())]
    assert not still


def test_the_decoder_part_leaves_latents_and_codes_alone(corpus: Path, tmp_path: Path) -> None:
    train_mapping(mapping(corpus, tmp_path / "whole"), "test")
    start = str(tmp_path / "whole" / "model")
    train_mapping(mapping(corpus, tmp_path / "part", part="decoder", init_from=start, ema_decay=0.0), "test")
    first, second = F3Tokenizer.load(tmp_path / "whole" / "model"), F3Tokenizer.load(tmp_path / "part" / "model")
    waveform = 0.3 * torch.randn(1, 1, 960)
    assert torch.equal(first.encode(waveform).latents, second.encode(waveform).latents)
    assert torch.equal(first.encode(waveform).codes, second.encode(waveform).codes)
    moved = [k for k, v in second.state_dict().items() if not torch.equal(v, first.state_dict()[k])]
    assert moved and all(key.startswith("decoder.") for key in moved)


def test_an_interrupted_run_equals_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    """Also across the moment when the discriminator joins."""
    train_mapping(mapping(corpus, tmp_path / "whole"), "test")
    halfway = mapping(corpus, tmp_path / "halves", max_steps=3)
    train_mapping({**halfway, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 6}}, "test")
    train_mapping(mapping(corpus, tmp_path / "again", optimizer={"learning_rate": 1e-3, "warmup_steps": 6}), "test")
    resumed = mapping(corpus, tmp_path / "halves", optimizer={"learning_rate": 1e-3, "warmup_steps": 6})
    train_mapping(resumed, "test", resume=True)
    one, two = weights(tmp_path / "halves" / "model"), weights(tmp_path / "again" / "model")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_bottleneck_quantizes_its_share_and_gives_the_encoder_no_gradient_there() -> None:
    torch.manual_seed(0)
    tokenizer = F3Tokenizer(TINY)
    latents = tokenizer.encoder(0.3 * torch.randn(8, 960))[0].detach().requires_grad_()
    shares = {"noise_gamma": 0.5, "quantized_share": 0.5, "full_depth_share": 0.5}
    seen, error = bottleneck(tokenizer.quantizer, latents, **shares, generator=torch.Generator().manual_seed(0))
    full = tokenizer.dequantize(tokenizer.quantize(latents))
    torch.testing.assert_close(seen[:2], full[:2])
    noise = (seen - latents).detach()[4:].std(dim=(1, 2))
    assert noise.max() < 0.55 and noise.min() > 0
    torch.testing.assert_close(error, (latents - full).square().mean())
    seen.sum().backward()
    expected = torch.cat([torch.zeros_like(latents[:4]), torch.ones_like(latents[4:])])
    torch.testing.assert_close(latents.grad, expected)


def test_bottleneck_of_a_sigma_vae() -> None:
    torch.manual_seed(0)
    tokenizer = F3Tokenizer(TINY)
    latents = torch.randn(6, 5, TINY.latent_dim)
    shares = {"noise_gamma": 0.0, "quantized_share": 0.0, "full_depth_share": 0.5}
    noisy, _ = bottleneck(
        tokenizer.quantizer, latents, sigma_vae_noise=0.7, **shares, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(noisy, add_sigma_vae_noise(latents, 0.7, torch.Generator().manual_seed(1)))
    clean, _ = bottleneck(tokenizer.quantizer, latents, **shares, generator=torch.Generator().manual_seed(1))
    assert torch.equal(clean, latents)


def test_one_kind_of_noise() -> None:
    with pytest.raises(ValueError, match=r"noise_gamma=0.35 and sigma_vae_noise=0.6 are two kinds"):
        TokenizerLossConfig(sigma_vae_noise=0.6)


def test_latents_without_normalization_are_exported_at_unit_scale(corpus: Path, tmp_path: Path) -> None:
    """And the decoder's part, trained from there, leaves them alone."""
    plain = mapping(corpus, tmp_path / "run", losses={"noise_gamma": 0, "sigma_vae_noise": 0.6, "kl_weight": 0.01})
    plain["tokenizer_task"]["losses"] |= {"adversarial_weight": 0, "feature_matching_weight": 0}  # type: ignore[index]
    plain["tokenizer_task"]["tokenizer"]["normalization"] = "none"  # type: ignore[index]
    train_mapping(plain, "test")
    found = F3Tokenizer.load(tmp_path / "run" / "model")
    section = from_mapping(TokenizerTaskConfig, plain["tokenizer_task"])  # type: ignore[arg-type]
    segments = TokenizerTask(section).train_data.segments(32, 960, seed=0)
    latents = found.encode(next(segments)).latents
    mean, scale = centre_and_scale(latents)
    assert abs(scale - 1.0) < 0.2 and mean.abs().max() < 0.5, (mean, scale)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line for line in log if "latent_scale" in line]
    assert logged and abs(logged[-1]["latent_scale"] - 1.0) > 0.3 and logged[-1]["kl"] > 0

    plain["tokenizer_task"]["part"] = "decoder"  # type: ignore[index]
    start = {"output": str(tmp_path / "part"), "init_from": str(tmp_path / "run" / "model")}
    train_mapping({**plain, **start}, "test")
    again = F3Tokenizer.load(tmp_path / "part" / "model")
    waveform = 0.3 * torch.randn(1, 1, 960)
    assert torch.equal(again.encode(waveform).latents, found.encode(waveform).latents)


def test_the_discriminator_waits_for_its_step(corpus: Path, tmp_path: Path) -> None:
    section = mapping(corpus, tmp_path)["tokenizer_task"]
    task = TokenizerTask(from_mapping(TokenizerTaskConfig, section))  # type: ignore[arg-type]
    assert task.turns(1) == ("model",)
    assert task.turns(2) == ("model", "discriminator")


def test_caches_and_sources_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="either caches or sources"):
        train_mapping(mapping(corpus, tmp_path, data={"batch_size": 2}), "test")
