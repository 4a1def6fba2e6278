"""Published codecs through the commands: prepare, reconstruct, train and generate, at their own rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from hybridlm.checkpoint import load_model
from tests.support.command import Command, assert_refused, runner
from tests.support.tiny_codecs import save_tiny_codec
from tokenizer.loading import load_tokenizer
from training.corpus import TokenCache

CODECS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # family, changes, sampling rate, hop
    "encodec": ("encodec", {"upsampling_ratios": [8, 5, 4, 2], "target_bandwidths": [1.2]}, 24_000, 320),
    "mimi": ("mimi", {"upsampling_ratios": [8, 6, 5, 4]}, 24_000, 1920),
    "dac at 44.1 kHz": ("dac", {"downsampling_ratios": [2, 4, 8, 8]}, 44_100, 512),
    "dac at 16 kHz": ("dac-odd", {"downsampling_ratios": [2, 4, 5, 8]}, 16_000, 320),
}
TINY_MODEL = {
    **{"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 32, "code_embedding_dim": 16},
    **{"depth_dim": 16, "depth_layers": 1, "depth_ffn_dim": 16, "num_mixtures": 2, "latent_head_dim": 16},
    **{"latent_head_layers": 1, "latent_head_ffn_dim": 16, "short_context_dim": 16, "alignment_layer": 1},
    "max_frames": 100,
}
SECONDS = 0.5


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two hums of half a second at 22.05 kHz, a rate that no codec has."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    time = np.arange(int(22_050 * SECONDS)) / 22_050
    lines = []
    for index in range(2):
        soundfile.write(folder / f"{index}.wav", 0.3 * np.sin(2 * np.pi * (200 + 40 * index) * time), 22_050)
        lines.append({"path": f"{index}.wav", "tags": ["music"], "text": f"tone {index}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def succeed(command: Command, *words: object) -> str:
    result = command(*words)
    assert result.status == 0, result
    return result.out


@pytest.mark.parametrize("name", CODECS)
def test_recordings_are_brought_to_the_codec_s_rate(name: str, command: Command, corpus: Path, tmp_path: Path) -> None:
    family, changes, rate, hop = CODECS[name]
    codec = f"hf:{save_tiny_codec(tmp_path / 'codec', family, **changes)}"
    cache, sound = tmp_path / "tokens", tmp_path / "sound.wav"
    succeed(command, "prepare", corpus, "--output", cache, "--tokenizer", codec, "--workers", 1)
    kept = TokenCache(cache, tokenizer=load_tokenizer(codec))
    assert [kept.num_frames(index) for index in range(2)] == [-(-int(rate * SECONDS) // hop)] * 2
    assert (kept.num_codebooks, kept.feature_dim) == (4, 80)

    words = ("reconstruct", corpus / "0.wav", sound, "--tokenizer", codec)
    succeed(command, *words, "--from", "codes", "--num-codebooks", 2)
    assert soundfile.info(sound).samplerate == rate
    assert soundfile.info(sound).duration == pytest.approx(SECONDS, abs=hop / rate)


@pytest.mark.parametrize("name", ["mimi", "dac at 44.1 kHz"])
def test_from_a_published_codec_to_a_model_that_plays(
    name: str, command: Command, corpus: Path, tmp_path: Path
) -> None:
    family, changes, rate, _ = CODECS[name]
    codec = f"hf:{save_tiny_codec(tmp_path / 'codec', family, **changes)}"
    cache, run, sound = tmp_path / "tokens", tmp_path / "run", tmp_path / "sound.wav"
    succeed(command, "prepare", corpus, "--output", cache, "--tokenizer", codec, "--workers", 1)
    data = {"caches": [str(cache)], "validation_fraction": 0.0, "batch_frames": 200, "max_frames": 100}
    language = {"tokenizer": codec, "data": data, "text": {"vocab_size": 300}, "model": TINY_MODEL}
    settings = {"task": "language", "output": str(run), "max_steps": 2, "checkpoint_every": 2, "tensorboard": False}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**settings, "language": language}))
    succeed(command, "train", config, "precision=fp32", "device=cpu")
    trained = run / "model"
    assert load_model(trained).tokenizer.fingerprint() == load_tokenizer(codec).fingerprint()
    succeed(command, "generate", "--model", trained, "--tag", "music", "--duration", 0.4, "--output", sound)
    assert soundfile.info(sound).samplerate == rate
    assert soundfile.info(sound).duration == pytest.approx(0.4, abs=0.2)


def test_what_can_t_be_used_is_one_line(command: Command, corpus: Path, tmp_path: Path) -> None:
    absent = f"hf:{tmp_path / 'absent'}"
    words = ("prepare", corpus, "--output", tmp_path / "tokens", "--tokenizer")
    assert_refused(command(*words, absent), "no such folder, and no hub id either")
    assert_refused(command("reconstruct", corpus / "0.wav", tmp_path / "x.wav", "--tokenizer", absent), "no such")
    assert_refused(command("info", absent), "is a tokenizer, not a model")
    raw = save_tiny_codec(tmp_path / "codec", "mimi")
    assert_refused(command(*words, raw), f"give its folder as hf:{raw}")
