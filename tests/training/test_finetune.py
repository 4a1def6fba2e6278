"""Fine-tuning: a better model of someone's recordings, complete, and never a worse one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hybridlm.checkpoint import load_model, save_model
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import write_cache
from tokenizer.audio import write_audio
from tokenizer.errors import UserError
from tokenizer.loading import load_tokenizer
from training.corpus import TokenCache
from training.examples import GOES_ON
from training.finetune import run
from training.manifest import read_manifest

FAST = ["tensorboard=false", "device=cpu", "optimizer.learning_rate=0.01", "max_steps=30", "validate_every=10"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpus")
    made = write_cache(folder)
    model = tiny_model()
    tokenizer = load_tokenizer(made["tokenizer"])
    save_model(folder / "model", model.model, tokenizer, model.text, card="# The base\n\nMade of tones.\n")
    return {**made, "model": str(folder / "model")}


def test_held_out_likelihood_improves_and_the_folder_is_complete(folders: dict[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    output = tmp_path / "mine"
    result = run(folders["model"], Path(folders["clips"]), output, FAST, console=Console(file=text, width=200))
    assert result.finished
    assert result.after["loss"] < result.before["loss"] - 1.0
    assert f"{result.before['loss']:.3f} nats a frame" in text.getvalue()
    assert f"{result.after['loss']:.3f} nats a frame" in text.getvalue()
    found, base = load_model(output), load_model(folders["model"])
    assert found.model.config == base.model.config
    assert found.tokenizer.fingerprint() == base.tokenizer.fingerprint()
    assert not torch.equal(found.model.stop.weight, base.model.stop.weight)
    card = (output / "README.md").read_text()
    assert "Made of tones." in card
    assert f"{result.after['loss']:.3f}" in card
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "run", "text.model", "tokenizer", "tokens",
    ]  # fmt: skip
    with pytest.raises(UserError, match="holds a model already"):
        run(folders["model"], Path(folders["clips"]), output, FAST)


def test_training_that_harms_keeps_the_model(folders: dict[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    harmful = [*FAST[:2], "optimizer.learning_rate=30", "optimizer.warmup_steps=0", "max_steps=12", "validate_every=2"]
    harmful += ["patience=2", "ema_decay=0"]
    result = run(
        folders["model"], Path(folders["cache"]), tmp_path / "m", harmful, console=Console(file=text, width=200)
    )
    assert result.after == result.before
    assert "made nothing better" in text.getvalue()
    steps = [json.loads(line) for line in (tmp_path / "m/run/log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 4  # two validations without improvement
    found, base = load_model(tmp_path / "m"), load_model(folders["model"])
    assert torch.equal(found.model.stop.weight, base.model.stop.weight)


def test_tags_are_the_models_own(folders: dict[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    clips = Path(folders["clips"])
    lines = [
        {"path": str(clips / f"{n}.wav"), "text": f"good morning {n}"}
        | ({"tags": ["unheard", "music"]} if n == 1 else {})
        for n in range(4)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_manifest(manifest).clips) == 4
    text = io.StringIO()
    short = [*FAST[:2], "max_steps=1"]
    run(folders["model"], manifest, tmp_path / "a", short, console=Console(file=text, width=200))
    cache = TokenCache(tmp_path / "a/tokens")
    assert [cache.index.tags(i) for i in range(4)] == [("speech",), ("music",), ("speech",), ("speech",)]
    assert "left out: unheard" in text.getvalue()
    run(folders["model"], manifest, tmp_path / "b", [*short, "tags=[speaker:kathleen]"])
    cache = TokenCache(tmp_path / "b/tokens")
    assert cache.index.all_tags() == ["speaker:kathleen"]
    with pytest.raises(UserError, match="unknown tag 'speaker:kathlen'; did you mean speaker:kathleen"):
        run(folders["model"], manifest, tmp_path / "c", ["tags=[speaker:kathlen]"])


def test_recordings_without_transcripts(folders: dict[str, str], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(4):
        (plain / f"{number}.wav").write_bytes((Path(folders["clips"]) / f"{number}.wav").read_bytes())
    (plain / "broken.wav").write_bytes(b"RIFF")
    result = run(folders["model"], plain, tmp_path / "m", [*FAST[:4]])
    assert result.after["loss"] < result.before["loss"]


def test_one_long_recording_is_cut_and_its_pieces_go_on(folders: dict[str, str], tmp_path: Path) -> None:
    write_audio(tmp_path / "long.wav", 0.1 * torch.randn(1, 24_000 * 65), 24_000)
    run(folders["model"], tmp_path / "long.wav", tmp_path / "m", [*FAST[:2], "max_steps=1"])
    cache = TokenCache(tmp_path / "m/tokens")
    assert [cache.num_frames(i) for i in range(len(cache))] == [542, 542, 542]
    assert [GOES_ON in cache[i].labels for i in range(3)] == [True, True, False]


def test_a_single_short_recording_still_trains(folders: dict[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    run(folders["model"], Path(folders["clips"]) / "0.wav", tmp_path / "m", [*FAST[:2], "max_steps=1"], console=console)
    assert "too few recordings to hold any out" in text.getvalue()
    assert load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.learning_rate=1", "unknown key 'optimzer'; did you mean 'optimizer'"),
        ("passes=0", "passes=0.0 must be above 0"),
        ("language.model.ffn_dim=8", "does not fit the model's weights"),
    ],
)
def test_bad_settings_are_one_line(folders: dict[str, str], tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(folders["model"], Path(folders["cache"]), tmp_path / "m", [override])
    assert "\n" not in str(error.value)
