"""The comparison of a representation encoder's losses: three trainings and two floors from one command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks import understanding
from tests.support.recorded_parts import write_parts
from tests.support.tiny_audio_model import SENTENCES, tiny_tokenizer
from tokenizer.settings import from_mapping
from training import estimates
from training.config import read_yaml
from training.prepare import prepare

TINY = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "vocab_size": 320, "batch_size": 2}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("study")
    manifest = write_parts(folder / "data")
    tiny_tokenizer().save(folder / "codec")
    prepare(manifest, folder / "cache", folder / "codec", workers=1, console=Console(file=io.StringIO()))
    (folder / "sentences.txt").write_text("\n".join(SENTENCES))
    return {
        "output": str(folder / "runs"),
        "tokenizer": str(folder / "codec"),
        "data": {
            "caches": [str(folder / "cache")],
            "batch_frames": 100,
            "validation_fraction": 0.0,
            "rules": [{"where": {"set": "read"}}, {"where": {"set": "loops"}, "tags": ["drums"]}],
        },
        "variants": {"RQ": {"llm_weight": 0}, "LLM": {"rq_weight": 0}, "both": {}},
        "encoder": {"feature_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "window_frames": 8},
        "losses": {"num_offsets": 2, "codebook_size": 8, "projection_dim": 4},
        "steps": 2,
        "seeds": 2,
        "validate_every": 500,
        "ema_decay": 0.99,
        "text_model": {"steps": 2, "text": {"sentences": str(folder / "sentences.txt"), **TINY}},
        "notes": ["Trained on two recordings."],
        "probes": {
            "data": str(manifest),
            "tasks": {"kind": {"label": "kind", "where": ["set=parts", "split=test"], "folds": "fold"}},
        },
    }


def run(study: dict[str, Any], folder: Path, *arguments: str) -> int:
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(study, sort_keys=False))
    reports = ["--markdown", str(folder / "report.md"), "--json", str(folder / "report.json")]
    return understanding.main(["--config", str(config), *reports, *arguments])


def test_the_shipped_study_is_valid() -> None:
    study = from_mapping(understanding.Study, read_yaml(understanding.HERE / "understanding.yaml"))
    weights = {name: study.losses_of(name) for name in study.variants}
    assert {name: (one.rq_weight, one.llm_weight) for name, one in weights.items()} == {
        "RQ-MTP": (1.0, 0.0),
        "LLM": (0.0, 1.0),
        "both": (1.0, 1.0),
    }
    assert weights["RQ-MTP"].llm is None and weights["both"].llm == "runs/understanding/text-lm/model"
    labels = {task.label for task in study.probes.tasks.values()}
    assert labels == {"digit", "speaker", "emotion", "sound", "instrument", "note", "language"} and study.seeds == 3


def test_three_trainings_beside_what_is_not_trained(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(study, tmp_path) == 0
    said = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in said and "both seed 1 kind: linear" in said
    assert "| task | chance | log-mel | raw latent | untrained | RQ | LLM | both |" in text
    assert "linear probe: points above untrained" in text and "knn probe: points above log-mel" in text
    assert "Trained on two recordings." in text and "| LLM | 0 | 1 |" in text and "| text-lm | - | - |" in text
    figures = json.loads((tmp_path / "report.json").read_text())["probes"]
    accuracy = figures["knn"]["accuracy"]
    raised = figures["knn"]["differences"]["raw latent"]["both"]["kind"]["value"]
    assert raised == pytest.approx(accuracy["both"]["kind"]["value"] - accuracy["raw latent"]["kind"]["value"])
    assert set(figures["linear"]["differences"]["log-mel"]) == {"raw latent", "untrained", "RQ", "LLM", "both"}
    folder = Path(study["output"])
    log = (folder / "RQ" / "seed0" / "log.jsonl").read_text()
    assert "rq_mtp" in log and "llm" not in log
    log = (folder / "LLM" / "seed0" / "log.jsonl").read_text()
    assert "llm" in log and "rq_mtp" not in log

    # What is there is not made again; a missing task is probed, without another training.
    (folder / "both" / "seed1" / "kind" / "result.json").unlink()
    before = (folder / "both" / "seed1" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(study, tmp_path) == 0
    said = capsys.readouterr().out
    assert "both seed 1 kind" in said and "both seed 0 kind" not in said
    assert (folder / "both" / "seed1" / "model" / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(understanding, "make", lambda *_: pytest.fail("all is there"))
    assert run(study, tmp_path) == 0
    assert json.loads((tmp_path / "report.json").read_text())["probes"] == figures
    assert run(study, tmp_path, "losses.num_offsets=1") == 2
    assert "other settings (representation.losses.num_offsets)" in capsys.readouterr().err


def test_a_study_that_would_have_heard_its_test_does_not_begin(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path / 'runs'}"
    assert run(study, tmp_path, output, "probes.tasks.kind.where=[set=parts]", "data.rules=[{}]") == 2
    assert "1 probed clips are trained on, such as saxophone.opus" in capsys.readouterr().err
    assert run(study, tmp_path, output, "data.rules=[{tags: [music], where: {set: loops}}]") == 2
    assert "a caption names what probes ask for: music" in capsys.readouterr().err
    assert run(study, tmp_path, output, "text_model=null") == 2
    assert "give either llm, a language model, or text_model" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_padding_changes_no_mean(study: dict[str, Any]) -> None:
    cache = understanding.TokenCache([Path(folder) for folder in study["data"]["caches"]])
    keys = ["kathleen-2.opus", "tabla.opus#0-0.3", "saxophone.opus"]
    together = understanding.pooled(cache, keys, lambda latents: latents + 1.0)
    for row, key in zip(together, keys, strict=True):
        number = next(n for n in range(len(cache)) if cache.index.clip(n).key == key)
        assert row.tolist() == pytest.approx((cache[number].latents.mean(dim=0) + 1.0).tolist(), abs=1e-5)
