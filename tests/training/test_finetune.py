"""Fine-tuning: a better model of someone's recordings, complete, and never a worse one."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import training.finetune as finetune
from hybridlm.adapter import merge_adapter, use_adapter
from hybridlm.checkpoint import load_model, save_model
from hybridlm.model import HybridLM
from sampling.pipeline import AudioModel
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import write_cache
from tokenizer.audio import write_audio
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.text import TextTokenizer
from training.corpus import TokenCache
from training.examples import GOES_ON
from training.finetune import run
from training.finetune_report import compare
from training.manifest import read_manifest
from training.task import Sample

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
        "README.md", "config.json", "finetune.json", "model.safetensors", "run", "text.model", "tokenizer", "tokens",
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


def sampled(model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer) -> list[Sample]:
    made = AudioModel(model, tokenizer, text).generate(tags=["music"], duration=0.4, seed=3)
    return [Sample(name="music", waveform=made.row(0)[0], sample_rate_hz=made.sample_rate_hz)]


def test_an_adapter_is_trained_and_the_base_stays(folders: dict[str, str], tmp_path: Path) -> None:
    text, output = io.StringIO(), tmp_path / "mine"
    result = run(
        folders["model"],
        Path(folders["clips"]),
        output,
        FAST,
        lora=True,
        rank=2,
        old_data=Path(folders["cache"]),
        sampler=sampled,
        console=Console(file=text, width=200),
    )
    assert result.after["loss"] < result.before["loss"] - 1.0
    assert result.held_out is not None
    assert result.held_out.difference.high < -1.0
    assert [(change.name, change.identical) for change in result.outputs] == [("music", False)]
    assert not result.changes_nothing
    said = text.getvalue().splitlines()
    assert "an adapter (LoRA, rank 2, alpha 4)" in said[1]
    assert "at most 30 steps" in said[1]
    assert "learning rate 0.01" in said[1]
    assert {file.name for file in output.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base.json", "README.md", "finetune.json"),
        *("run", "tokens"),
    }
    tuned, base = load_model(output), load_model(folders["model"])
    assert tuned.base == base.base
    use_adapter(tuned.model, None)
    merge_adapter(tuned.model)
    state = base.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tuned.model.state_dict().items())
    # The figures are of what was saved: scored anew, they are the same.
    again = compare(base, load_model(output), TokenCache(Path(folders["cache"])))
    assert result.old is not None
    assert again.after == pytest.approx(result.old.after)
    report = json.loads((output / "finetune.json").read_text())
    assert report["held_out"]["difference"]["value"] == pytest.approx(result.held_out.difference.value)
    assert report["old_data"]["num_clips"] == 8
    with pytest.raises(UserError, match="holds a model already"):
        run(folders["model"], Path(folders["clips"]), output, FAST)
    with pytest.raises(UserError, match="is an adapter; merge it"):
        run(output, Path(folders["clips"]), tmp_path / "more", FAST)


def test_an_adapter_that_changes_nothing_is_told_loudly(folders: dict[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    still = [*FAST[:2], "optimizer.learning_rate=1e-30", "max_steps=2"]
    data = Path(folders["cache"])
    console = Console(file=text, width=200)
    result = run(folders["model"], data, tmp_path / "m", still, lora=True, sampler=sampled, console=console)
    assert result.changes_nothing
    assert "WARNING: this adapter changes nothing" in text.getvalue()
    assert "music at a fixed seed: the same to the last bit" in text.getvalue()
    assert json.loads((tmp_path / "m/finetune.json").read_text())["changes_nothing"] is True


def test_what_was_forgotten_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for number in range(4):
        noise = torch.randn(1, 24_000, generator=torch.Generator().manual_seed(number)).clamp(-1, 1)
        write_audio(old / f"{number}.wav", noise, 24_000)
    first = tmp_path / "first"
    run(folders["model"], old, first, FAST)
    text = io.StringIO()
    console = Console(file=text, width=200)
    result = run(first, Path(folders["cache"]), tmp_path / "second", FAST, old_data=old, console=console)
    assert result.old is not None
    assert result.old.num_clips == 4
    assert result.old.difference.low > 0.5
    assert "the model forgot" in text.getvalue()


def test_an_interrupted_adapter_goes_on_with_the_same_size_alone(folders: dict[str, str], tmp_path: Path) -> None:
    short = [*FAST[:3], "validate_every=1", "checkpoint_every=1"]
    data = Path(folders["cache"])
    run(folders["model"], data, tmp_path / "whole", [*short, "max_steps=4"], lora=True, rank=2)
    # As a kill after the second step leaves it: a checkpoint, and no adapter yet.
    whole, fit = tmp_path / "parts", finetune.fit

    def killed(*args: Any, **settings: Any) -> Any:
        task, config, *rest = args
        return dataclasses.replace(
            fit(task, dataclasses.replace(config, max_steps=2), *rest, **settings), finished=False
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "fit", killed)
        assert not run(folders["model"], data, whole, [*short, "max_steps=4"], lora=True, rank=2).finished
    assert not (whole / "adapter_config.json").exists()
    with pytest.raises(UserError, match=r"'lora.rank' was 2 and is now 3"):
        run(folders["model"], data, whole, [*short, "max_steps=4"], lora=True, rank=3)
    assert run(folders["model"], data, whole, [*short, "max_steps=4"], lora=True, rank=2).finished
    assert load_model(whole).base == load_model(tmp_path / "whole").base


def test_texts_in_another_script_are_counted(folders: dict[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    words = ["good morning", "доброе утро", "the quick brown fox и лиса", None]
    lines = [{"path": str(Path(folders["clips"]) / f"{n}.wav"), "text": text} for n, text in enumerate(words)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"path": "gone.wav"}]))
    text = io.StringIO()
    run(folders["model"], manifest, tmp_path / "m", [*FAST[:2], "max_steps=1"], console=Console(file=text, width=200))
    assert "1 files or rows skipped, the first: manifest.jsonl:5: no such file: gone.wav" in text.getvalue()
    assert "2 of 3 texts have letters that the model's text pieces do not know (CYRILLIC" in text.getvalue()
    data = json.loads((tmp_path / "m/finetune.json").read_text())["data"]
    assert (data["skipped"], data["texts_with_unknown_letters"], data["texts_in_another_script"]) == (1, 2, 1)


def test_a_rank_without_an_adapter_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rank 4 is an adapter's; add --lora"):
        run(folders["model"], Path(folders["cache"]), tmp_path / "m", FAST, rank=4)
    with pytest.raises(UserError, match="rank=-1 must be at least 1"):
        run(folders["model"], Path(folders["cache"]), tmp_path / "m", FAST, lora=True, rank=-1)
    with pytest.raises(UserError, match=r"optimizer.base_width=64 is for whole models"):
        run(folders["model"], Path(folders["cache"]), tmp_path / "m", ["optimizer.base_width=64"], lora=True)


def test_without_the_library_nothing_is_encoded(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="adapters need the package peft"):
        run(folders["model"], Path(folders["clips"]), tmp_path / "out", lora=True)
    assert not (tmp_path / "out").exists()


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
