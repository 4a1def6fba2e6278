"""The commands hand their files to each other: prepare, train, resume, evaluate, fine-tune, generate, info."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from hybridlm.checkpoint import load_model
from tests.support.command import Command, assert_refused, runner
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_backbones import save_tiny_backbone

TINY_MODEL = {
    **{"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 32, "code_embedding_dim": 16},
    **{"depth_dim": 16, "depth_layers": 1, "depth_ffn_dim": 16, "num_mixtures": 2, "latent_head_dim": 16},
    **{"latent_head_layers": 1, "latent_head_ffn_dim": 16, "short_context_dim": 16, "alignment_layer": 1},
    "max_frames": 50,
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight hums of a second, with a sentence each, two of them the test split."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    seconds = np.arange(24000) / 24000
    lines = []
    for index in range(8):
        hum = 0.3 * np.sin(2 * np.pi * (200 + 40 * index) * seconds)
        soundfile.write(folder / f"{index}.wav", hum, 24000)
        split = "test" if index < 2 else "train"
        lines.append({"path": f"{index}.wav", "text": f"good morning {index}", "tags": ["speech"], "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def succeed(command: Command, *words: object) -> str:
    result = command(*words)
    assert result.status == 0, result
    return result.out


def test_from_recordings_to_a_model_that_speaks(command: Command, corpus: Path, tmp_path: Path) -> None:
    codec, tokens, run = save_tiny_model(tmp_path / "codec"), tmp_path / "tokens", tmp_path / "run"
    succeed(command, "prepare", corpus, "--output", tokens, "--tokenizer", codec, "--workers", 1)

    language = {
        "tokenizer": str(codec),
        "data": {"caches": [str(tokens)], "validation_fraction": 0.3, "batch_frames": 60, "max_frames": 50},
        "text": {"vocab_size": 320},
        "model": TINY_MODEL,
    }
    settings = {"task": "language", "output": str(run), "max_steps": 2, "validate_every": 1, "checkpoint_every": 1}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**settings, "language": language}))
    succeed(command, "train", config, "precision=fp32", "device=cpu")
    succeed(command, "train", config, "precision=fp32", "device=cpu", "max_steps=3", "--resume")
    steps = [json.loads(line).get("step", 0) for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 3

    trained, figures = run / "model", tmp_path / "figures.json"
    succeed(command, "evaluate", "--model", trained, "--data", corpus, "--json", figures)
    report = json.loads(figures.read_text())["report"]
    assert report["num_clips"] == 2
    assert report["total"] is not None

    tuned = tmp_path / "tuned"
    words = ("finetune", "--model", trained, "--data", corpus, "--output", tuned)
    succeed(command, *words, "max_steps=2", "device=cpu")
    assert "speech" in succeed(command, "info", tuned)
    spoken = tmp_path / "spoken.wav"
    succeed(command, "generate", "--model", tuned, "--text", "good morning", "--duration", 0.4, "--output", spoken)
    assert 0 < soundfile.info(spoken).duration <= 0.4


def test_a_published_text_model_becomes_one_that_speaks(command: Command, corpus: Path, tmp_path: Path) -> None:
    codec, tokens, run = save_tiny_model(tmp_path / "codec"), tmp_path / "tokens", tmp_path / "run"
    published = save_tiny_backbone(tmp_path / "published", "qwen2")
    succeed(command, "prepare", corpus, "--output", tokens, "--tokenizer", codec, "--workers", 1)
    decided = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
    language = {
        "tokenizer": str(codec),
        "data": {"caches": [str(tokens)], "validation_fraction": 0.3, "batch_frames": 60, "max_frames": 50},
        "text": {"tags": ["music"]},
        "model": {name: value for name, value in TINY_MODEL.items() if name not in decided},
        "backbone": f"hf:{tmp_path / 'published'}",
    }
    settings = {"task": "language", "output": str(run), "max_steps": 2, "validate_every": 1, "checkpoint_every": 1}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**settings, "language": language, "ema_decay": 0}))
    train = ("train", config, "precision=fp32", "device=cpu")
    refused = command(*train, "language.model.num_layers=3")
    assert_refused(refused, "language.model.num_layers is decided by the backbone; leave it out")
    assert_refused(command(*train, "language.text.model=x"), "has text pieces of its own")
    succeed(command, *train, "max_steps=1", "optimizer.learning_rate=1e-9")
    untrained = load_model(run / "model").model
    layer = published.get_submodule("model.layers.1.self_attn.o_proj").weight
    torch.testing.assert_close(untrained.decoder.layers[1].attention.out.weight, layer, rtol=0.01, atol=0)
    succeed(command, *train, "--resume")

    shutil.rmtree(tmp_path / "published")  # the model's folder needs nothing else
    figures, tuned, spoken = tmp_path / "figures.json", tmp_path / "tuned", tmp_path / "spoken.wav"
    succeed(command, "evaluate", "--model", run / "model", "--data", corpus, "--json", figures)
    assert json.loads(figures.read_text())["report"]["num_clips"] == 2
    words = ("finetune", "--model", run / "model", "--data", corpus, "--output", tuned)
    succeed(command, *words, "max_steps=1", "device=cpu")
    assert "music" in succeed(command, "info", tuned)
    succeed(command, "generate", "--model", tuned, "--text", "Good morning", "--duration", 0.4, "--output", spoken)
    assert 0 < soundfile.info(spoken).duration <= 0.4


def test_audio_is_kept_for_training_a_tokenizer(command: Command, corpus: Path, tmp_path: Path) -> None:
    succeed(command, "prepare", corpus, "--output", tmp_path / "audio", "--audio", "--workers", 1)
    stored = sum(file.stat().st_size for file in (tmp_path / "audio").rglob("*") if file.is_file())
    assert stored > 8 * 24000 * 2
    succeed(command, "prepare", corpus, "--output", tmp_path / "test", "--audio", "--split", "test", "--workers", 1)
    clips = [len((tmp_path / name / "clips.jsonl").read_text().splitlines()) for name in ("audio", "test")]
    assert 0 < clips[1] < clips[0]
