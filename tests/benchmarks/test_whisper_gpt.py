"""WHISPER-GPT's table: controls change the slices alone, the base is paired by clip, and what is there is kept."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from benchmarks import whisper_gpt
from tests.support.toy_corpus import TINY_MODEL, write_cache
from tokenizer.settings import from_mapping
from training import estimates
from training.config import read_yaml
from training.corpus import TokenCache
from training.prepare import prepare

SLICES = {"continuous_input": "features", "fusion": "concat", "slice_layers": 1, "slice_dim": 16, "slice_ffn_dim": 16}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    made = write_cache(folder)
    tokenizer = f"log-mel:{made['tokenizer']}"
    manifest = Path(made["clips"]) / "manifest.jsonl"
    prepare(manifest, folder / "slices", tokenizer, workers=1, console=Console(file=io.StringIO()))
    shared = {name: value for name, value in TINY_MODEL.items() if name != "max_frames"}
    one = {"representation": "discrete", "sigma": 0, "num_input_codebooks": 1, "num_output_codebooks": 1}
    return {
        "output": str(folder / "runs"),
        "tokenizer": tokenizer,
        "domains": {"tones": {"caches": [str(folder / "slices")], "rules": [{"text": False}], "about": "sines"}},
        "base": "codes",
        "variants": {
            "codes": {"model": {}},
            "hybrid": {"model": SLICES, "about": "with slices"},
            "shuffled": {"model": SLICES, "control": "shuffled"},
            "zeroed": {"model": SLICES, "control": "zeroed", "seeds": 1},
        },
        "model": {**shared, **one, "short_context_frames": 0, "history_noise": 0, "condition_dropout": 0},
        "steps": 2,
        "seeds": 2,
        "validate_every": 200,
        "ema_decay": 0.99,
        "batch_frames": 40,
        "max_frames": 16,
        "test_seconds": 0.8,
        "losses": {"alignment_weight": 0},
    }


def run(study: dict[str, Any], folder: Path, *arguments: str) -> int:
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    reports = ["--markdown", str(folder / "report.md"), "--json", str(folder / "report.json")]
    return whisper_gpt.main(["--config", str(config), *reports, *arguments])


def test_the_shipped_study_has_every_control() -> None:
    study = from_mapping(whisper_gpt.Study, read_yaml(whisper_gpt.HERE / "whisper_gpt.yaml"))
    hybrid = study.variants["hybrid"]
    controls = {study.variants[name].control for name in ("hybrid", "shuffled", "zeroed")}
    assert controls == {"none", "shuffled", "zeroed"}
    assert study.variants["shuffled"].model == study.variants["zeroed"].model == hybrid.model
    assert study.variants["latents"].model == {**hybrid.model, "continuous_input": "latents"}
    assert study.variants["all codebooks"].model["num_input_codebooks"] == 8
    assert study.seeds >= 3 and study.model["sigma"] == 0


def test_the_table(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(study, tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "## tones (sines)" in text and "- hybrid: with slices" in text and "1 of 32, 25 a second" in text
    found = json.loads((tmp_path / "report.json").read_text())["domains"]["tones"]
    assert list(found) == ["codes", "hybrid", "shuffled", "zeroed"]
    nll = {name: row["nll"] for name, row in found.items()}
    difference = found["hybrid"]["difference"]
    assert difference["value"] == pytest.approx(nll["hybrid"]["value"] - nll["codes"]["value"])
    alone = found["zeroed"]["difference"]  # one seed, held against the same one of the base
    assert alone["per_seed"] == pytest.approx([nll["zeroed"]["per_seed"][0] - nll["codes"]["per_seed"][0]])
    assert found["codes"]["perplexity"] == pytest.approx(math.exp(nll["codes"]["value"]))
    assert 0 <= found["codes"]["accuracy"]["value"] <= 1
    # A random model is nearly uniform over its 32 codes: a second codebook in the sum would double it.
    assert all(math.log(32) - 1 < row["value"] < math.log(32) + 1 for row in nll.values())
    assert len({row["value"] for row in nll.values()}) == 4

    monkeypatch.setattr(whisper_gpt, "make", lambda *_: pytest.fail("all is there"))
    assert run(study, tmp_path) == 0
    assert run(study, tmp_path, "test_seconds=0.5") == 2
    assert "other settings (seconds)" in capsys.readouterr().err


def test_controls_change_the_slices_alone(study: dict[str, Any], tmp_path: Path) -> None:
    source = Path(study["domains"]["tones"]["caches"][0])
    plain = TokenCache(source)
    for control in ("shuffled", "zeroed"):
        whisper_gpt.write_control(source, tmp_path / control, control)
        whisper_gpt.write_control(source, tmp_path / control, control)  # goes on, and has nothing to do
        changed = TokenCache(tmp_path / control)
        assert len(changed) == len(plain) and changed.tokenizer == plain.tokenizer
        for number in range(len(plain)):
            a, b = plain[number], changed[number]
            assert torch.equal(a.codes, b.codes) and torch.equal(a.latents, b.latents)
            assert (a.key, a.split, a.text, a.tags, a.labels) == (b.key, b.split, b.text, b.tags, b.labels)
            assert a.features is not None and b.features is not None and not torch.equal(a.features, b.features)
            if control == "zeroed":
                assert bool((b.features == 0).all())
            else:
                assert torch.equal(a.features.sort(dim=0).values, b.features.sort(dim=0).values)


def test_bad_settings(study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study, tmp_path, "base=GPT-X") == 2
    assert "base=GPT-X must be one of the variants" in capsys.readouterr().err
    assert run(study, tmp_path, "variants.zeroed.seeds=3") == 2
    assert "seeds=3 must be from 1 to seeds=2" in capsys.readouterr().err
    bare = {"tones": {**study["domains"]["tones"], "caches": [str(Path(study["output"]).parent / "cache")]}}
    assert run({**study, "domains": bare, "output": str(tmp_path / "runs")}, tmp_path) == 2
    assert "has no features" in capsys.readouterr().err
