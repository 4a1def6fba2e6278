"""The comparison of injection with semantics alone: four trainings and a given codec, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import injection
from benchmarks.injection_report import reconstruction_rows
from benchmarks.reconstruction import FIGURES
from tests.support.recorded_parts import write_parts
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.dasheng import DashengTokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.settings import from_mapping
from training import estimates
from training.config import read_yaml
from training.dasheng_task import DashengTaskConfig
from training.tokenizer_task import TokenizerTaskConfig

ENCODER = {"sample_rate_hz": 24000, "hop_length": 240, "n_fft": 768, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}
SMALL = {"decoder_dim": 16, "decoder_blocks": 1, "latent_dim": 8, "num_codebooks": 2, "codebook_size": 16}
NO_ADVERSARY = {"adversarial_weight": 0, "feature_matching_weight": 0}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 100)


@pytest.fixture
def study(tmp_path: Path) -> dict[str, Any]:
    manifest = write_parts(tmp_path / "data")
    tiny_tokenizer().save(tmp_path / "codec")
    data = {"sources": [str(manifest)], "rules": [{"where": {"set": "read"}}, {"where": {"set": "loops"}}]}
    data |= {"batch_size": 2, "segment_frames": 5, "validation_fraction": 0.0, "validation_segments": 2}
    shape = {**SMALL, "decoder_hidden_dim": 32, "causal": False, "upsampling": 4, "synthesis_window": 720}
    dasheng = {"task": "dasheng", "window_frames": 10, "losses": NO_ADVERSARY}
    frames = dict.fromkeys(("encoder_dim", "frame_dim"), 16) | {"excitation": "none", "encoder_blocks": 1}
    masked = {"encoder": {**ENCODER, "window_frames": 10}, "decoder_dim": 16, "decoder_layers": 1, "decoder_heads": 2}
    return {
        "output": str(tmp_path / "runs"),
        "data": data,
        "variants": {
            "semantic only": {**dasheng, "tokenizer": {**shape, "inject": False}},
            "injection": {**dasheng, "tokenizer": shape},
            "no preservation": {
                **dasheng,
                "tokenizer": shape,
                "losses": {**NO_ADVERSARY, "preservation_weight": 0},
            },
            "codec": {"task": "tokenizer", "tokenizer": {**SMALL, **frames}, "losses": NO_ADVERSARY},
        },
        "base": "semantic only",
        "given": {"box": str(tmp_path / "codec")},
        "steps": 2,
        "seeds": 1,
        "validate_every": 500,
        "ema_decay": 0.99,
        "semantic_model": {"steps": 2, "encoder": {"data": data, **masked}},
        "reconstruction": {"speech": ["read"], "other": ["parts"], "clips": 2, "seconds": 1.5},
        "probes": {
            "data": str(manifest),
            "tasks": {"kind": {"label": "kind", "where": ["set=parts", "split=test"], "folds": "fold"}},
        },
    }


def run(study: dict[str, Any], folder: Path, *arguments: str) -> int:
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(study, sort_keys=False))
    reports = ["--markdown", str(folder / "report.md"), "--json", str(folder / "report.json")]
    return injection.main(["--config", str(config), *reports, *arguments])


def test_the_shipped_study_is_valid() -> None:
    study = from_mapping(injection.Study, read_yaml(injection.HERE / "injection.yaml"))
    runs = {run.name: run for run in injection.runs_of(study)}
    assert runs["injection/0"].needs == (injection.SEMANTIC,) and runs["EnCodec-shaped/0"].needs == ()
    found = {}
    for name in study.variants:
        settings = injection.settings_of(study, runs[f"{name}/0"])
        config = TokenizerTaskConfig if settings["task"] == "tokenizer" else DashengTaskConfig
        section = settings["tokenizer_task" if config is TokenizerTaskConfig else "dasheng"]
        found[name] = from_mapping(config, section, where=name)
    alone, injected, free = (found[f] for f in ("semantic only", "injection", "injection without preservation"))
    assert not alone.tokenizer.inject and injected.tokenizer.inject and free.tokenizer.inject
    assert injected.losses.preservation_weight == 45 and free.losses.preservation_weight == 0
    assert found["EnCodec-shaped"].data.segment_frames == 3 * injected.data.segment_frames


def test_understanding_and_reconstruction_side_by_side(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(study, tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    said = capsys.readouterr().out
    assert text.strip() in said and "injection/0 reconstruction of read: STOI" in said
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {cells[0].strip("| "): cells for cells in rows if len(cells) == 14}
    assert list(table) == ["tokenizer", "log-mel", "box", "semantic only", "injection", "no preservation", "codec"]
    assert table["injection"][9] == "features" and table["box"][9] == "latents" and table["log-mel"][9] == "-"
    assert "Reconstruction: parts (2 clips of split test)" in text
    figures = json.loads((tmp_path / "report.json").read_text())
    folder = Path(study["output"])
    alone, injected = (load_tokenizer(folder / name / "seed0" / "model") for name in ("semantic only", "injection"))
    assert isinstance(alone, DashengTokenizer) and isinstance(injected, DashengTokenizer)
    semantic = injected.encoder.model.state_dict()
    assert all(torch.equal(value, semantic[key]) for key, value in alone.encoder.model.state_dict().items())
    assert set(figures["probes"]["knn"]["differences"]["semantic only"]) == set(table) - {"tokenizer", "semantic only"}

    monkeypatch.setattr(injection, "train_mapping", lambda *_, **__: pytest.fail("all is trained"))
    assert run(study, tmp_path) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == figures
    assert run(study, tmp_path, "reconstruction.clips=1") == 2
    assert "other settings (clips)" in capsys.readouterr().err


def test_a_study_that_would_have_heard_its_test_does_not_begin(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study, tmp_path, "probes.tasks.kind.where=[set=parts]", "data.rules=[{}]") == 2
    assert "trained on, such as saxophone.opus" in capsys.readouterr().err
    assert run(study, tmp_path, "base=nothing") == 2
    assert "base=nothing must be one of the variants" in capsys.readouterr().err
    assert not Path(study["output"]).exists()


def test_differences_of_reconstruction_are_paired_by_clip() -> None:
    def heard(stoi: list[float | None], source: str) -> dict[str, Any]:
        rest = {field: 1.0 for field in FIGURES if field != "stoi"}
        return {"rows": [{"from": source, "speech": True, "stoi": value, **rest} for value in stoi]}

    base, other = [0.1, 0.5, 0.9, None], [0.3, 0.7, 1.1, 0.2]
    rows = reconstruction_rows("base", {"base": [heard(base, "features")], "other": [heard(other, "latents")]})
    difference = rows[1]["differences"]["stoi"]
    assert [difference["value"], *difference["interval"]] == pytest.approx([0.2] * 3) and difference["clips"] == 3
    assert rows[1]["figures"]["stoi"]["clips"] == 4 and rows[0]["differences"] == {}
