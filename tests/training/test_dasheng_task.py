"""Injection into a frozen encoder: it provably stays as it was, everything else moves, and one batch is learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.test_dasheng import TINY
from tests.tokenizer.test_dasheng_weights import SMALL_CONFIG, random, tokenizer_shapes, write
from tests.training.test_masked_spectrogram import DATA, semantic_encoder
from tokenizer.audio import read_audio
from tokenizer.dasheng import DashengTokenizer, Injection
from tokenizer.dasheng_weights import load_published_tokenizer, load_semantic_encoder
from tokenizer.errors import UserError
from tokenizer.loading import load_tokenizer
from tokenizer.settings import from_mapping
from training.dasheng_task import DashengTask, DashengTaskConfig, preservation_loss
from training.run import train_mapping

SHAPE = asdict(TINY)
LOSSES = {"discriminator_n_ffts": [64, 128], "discriminator_channels": 2, "adversarial_from_step": 1}


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return semantic_encoder(tmp_path_factory.mktemp("encoder"))


def mapping(output: Path, **task: Any) -> dict[str, Any]:
    return {
        "task": "dasheng",
        "output": str(output),
        "max_steps": 4,
        "validate_every": 4,
        "checkpoint_every": 2,
        "precision": "fp32",
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "dasheng": {
            "data": {"sources": [str(DATA)], "batch_size": 8, "segment_frames": 5, "validation_fraction": 0.0},
            "losses": LOSSES,
            **task,
        },
    }


def test_the_frozen_encoder_does_not_change_and_all_else_does(
    semantic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_semantic_encoder(semantic)
    torch.manual_seed(0)
    before = DashengTokenizer(from_mapping(type(TINY), SHAPE)).state_dict()
    settings = mapping(tmp_path / "run", semantic=str(semantic), tokenizer=SHAPE)
    train_mapping({**settings, "ema_decay": 0.9}, "test")
    printed = "".join(capsys.readouterr())
    frozen = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert f" M trained weights, {frozen:.2f} M frozen" in printed
    after = DashengTokenizer.load(tmp_path / "run" / "model")
    assert after.config.semantic == encoder.config
    for key, value in encoder.state_dict().items():
        assert torch.equal(after.encoder.model.state_dict()[key], value), key
    moved = {key for key, value in after.state_dict().items() if not torch.equal(value, before[key].bfloat16().float())}
    assert {key for key in before if not key.startswith("encoder.model.")} <= moved


def test_an_interrupted_run_equals_an_uninterrupted_one(semantic: Path, tmp_path: Path) -> None:
    task = {"semantic": str(semantic), "tokenizer": SHAPE}
    constant = {"learning_rate": 1e-2, "warmup_steps": 10}
    train_mapping({**mapping(tmp_path / "whole", **task), "optimizer": constant}, "test")
    train_mapping({**mapping(tmp_path / "halves", **task), "optimizer": constant, "max_steps": 2}, "test")
    train_mapping({**mapping(tmp_path / "halves", **task), "optimizer": constant}, "test", resume=True)
    one, two = (load_tokenizer(tmp_path / name / "model") for name in ("whole", "halves"))
    assert isinstance(one, DashengTokenizer) and isinstance(two, DashengTokenizer)
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_one_batch_is_learned(semantic: Path, tmp_path: Path) -> None:
    losses = {"adversarial_weight": 0, "feature_matching_weight": 0}
    section = mapping(tmp_path, semantic=str(semantic), tokenizer=SHAPE, losses=losses)["dasheng"]
    torch.manual_seed(0)
    task = DashengTask(from_mapping(DashengTaskConfig, section))
    waveform = read_audio(DATA / "kathleen-1.opus", 1600)[:, : 8 * task.num_samples].reshape(8, 1, -1)
    optimizer = torch.optim.Adam([p for p in task.tokenizer.parameters() if p.requires_grad], lr=5e-3)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(50):
        loss, figures = task.loss("model", {"waveform": waveform}, step=step, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value) for name, value in figures.items()})
    for name, share in (("mel", 0.85), ("preservation", 0.9)):
        first, last = (sum(part[name] for part in some) / 10 for some in (history[:10], history[-10:]))
        assert last < share * first, (name, first, last)


def test_the_compact_projection_learns(semantic: Path, tmp_path: Path) -> None:
    """8 of 24 dimensions come to hold most of the features' variance; with `compress` left as it was, they do not."""
    losses = {"mel_weight": 0, "preservation_weight": 0, "adversarial_weight": 0, "feature_matching_weight": 0}
    section = mapping(tmp_path, semantic=str(semantic), tokenizer=SHAPE, losses=losses)["dasheng"]
    torch.manual_seed(0)
    task = DashengTask(from_mapping(DashengTaskConfig, section))
    tokenizer = task.tokenizer
    waveform = read_audio(DATA / "kathleen-1.opus", 1600)[:, : 8 * task.num_samples].reshape(8, 1, -1)

    def unexplained() -> float:
        with torch.no_grad():
            features = tokenizer.encoder(waveform[:, 0]).features
            back = tokenizer.expand(tokenizer.encode(waveform).latents)
            return float((back - features).square().mean() / (features - features.mean(dim=(0, 1))).square().mean())

    first = unexplained()
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        loss, _ = task.loss("model", {"waveform": waveform}, step=step, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = unexplained()
    assert first > 1 and last < 0.35, (first, last)


def test_preservation_by_hand() -> None:
    injection = Injection(torch.full((1, 2, 3), 2.0), torch.full((1, 2, 3), 0.5))
    assert float(preservation_loss(injection)) == 2.25


def test_rows_are_decoded_from_features_codes_and_noisy_latents(semantic: Path, tmp_path: Path) -> None:
    losses = {"features_share": 0.25, "quantized_share": 1.0, "full_depth_share": 1.0}
    section = mapping(tmp_path, semantic=str(semantic), tokenizer=SHAPE, losses=losses)["dasheng"]
    task = DashengTask(from_mapping(DashengTaskConfig, section))
    features = torch.randn(8, 5, 24)
    latents = task.tokenizer.project(features)
    seen = task.decodable(features, latents, torch.Generator().manual_seed(0))
    assert torch.equal(seen[:2], features[:2])
    full = task.tokenizer.expand(task.tokenizer.dequantize(task.tokenizer.quantize(latents)))
    torch.testing.assert_close(seen[2:], full[2:])


def test_semantics_alone_have_no_acoustic_weights_and_no_preservation(semantic: Path, tmp_path: Path) -> None:
    """The features are the frozen encoder's, before and after; the decoder alone learns from them."""
    alone = {**SHAPE, "inject": False}
    train_mapping(mapping(tmp_path / "run", semantic=str(semantic), tokenizer=alone), "test")
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "mel" in log and "preservation" not in log
    made, encoder = load_tokenizer(tmp_path / "run" / "model"), load_semantic_encoder(semantic)
    assert isinstance(made, DashengTokenizer) and not made.config.inject
    assert all(key.startswith("encoder.model.") for key in made.state_dict() if key.startswith("encoder."))
    waveform = read_audio(DATA / "kathleen-1.opus", 1600)[None, :, : 20 * made.hop_length]
    features = made.encode(waveform).features
    assert features is not None
    with torch.no_grad():
        torch.testing.assert_close(features, encoder(waveform[:, 0]), atol=1e-5, rtol=1e-5)


def test_a_published_tokenizer_gets_latents_and_codes_and_stays_as_it_was(tmp_path: Path) -> None:
    folder = write(tmp_path / "published", SMALL_CONFIG, random(tokenizer_shapes(SMALL_CONFIG)))
    sizes = {"latent_dim": 4, "num_codebooks": 2, "codebook_size": 8}
    before = load_published_tokenizer(folder, **sizes).state_dict()
    losses = {**LOSSES, "adversarial_weight": 0, "feature_matching_weight": 0}
    train_mapping(mapping(tmp_path / "run", published=str(folder), tokenizer=sizes, losses=losses), "test")
    after = load_tokenizer(tmp_path / "run" / "model")
    assert isinstance(after, DashengTokenizer) and not after.config.causal
    moved = {key for key, value in after.state_dict().items() if not torch.equal(value, before[key].bfloat16().float())}
    assert {"compress.weight", "expand.weight", "quantizer.codebooks"} <= moved
    assert all(key.startswith(("compress.", "expand.", "quantizer.")) for key in moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give either semantic, the encoder to freeze"),
        ({"semantic": "a", "published": "b"}, "give either semantic"),
        ({"semantic": "nowhere"}, "nowhere is neither a folder nor a hub id"),
        ({"published": "a", "tokenizer": {"causal": False}}, "with published, set only latent_dim"),
        ({"semantic": "a", "losses": {"mel_weight": -1}}, "mel_weight=-1.0 must not be negative"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_mapping(mapping(tmp_path / "run", **change), "test")


def test_settings_must_fit_the_loaded_encoder(semantic: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"does not fit the encoder .*: n_fft=1024 must be even and less than 128"):
        train_mapping(mapping(run, semantic=str(semantic)), "test")
    other = {**SHAPE, "semantic": {**SHAPE["semantic"], "num_layers": 3}}
    with pytest.raises(UserError, match=r"has num_layers=3, but the encoder .* has 2; leave tokenizer.semantic out"):
        train_mapping(mapping(run, semantic=str(semantic), tokenizer=other), "test")
