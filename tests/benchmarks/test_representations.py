"""The comparison of representations: trains, resumes, refuses unequal models, and its differences are paired."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import representations, representations_report
from benchmarks.representations_report import compare, markdown
from tests.support.toy_corpus import TINY_MODEL, write_cache
from tokenizer.errors import UserError
from training import estimates


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    made = write_cache(folder)
    shared = {name: value for name, value in TINY_MODEL.items() if name not in ("ffn_dim", "max_frames")}
    return {
        "output": str(folder / "runs"),
        "tokenizer": made["tokenizer"],
        "domains": {"tones": {"caches": [made["cache"]], "rules": [{"text": False}], "about": "sines"}},
        "variants": {
            "discrete": {"representation": "discrete", "ffn_dim": 64},
            "continuous": {"representation": "continuous", "ffn_dim": 80},
            "hybrid": {"representation": "hybrid", "ffn_dim": 48},
        },
        "model": {**shared, "short_context_frames": 0, "history_noise": 0, "condition_dropout": 0},
        "steps": 2,
        "seeds": 2,
        "validate_every": 200,
        "ema_decay": 0.99,
        "batch_frames": 40,
        "max_frames": 16,
        "test_seconds": 0.8,
        "losses": {"alignment_weight": 0},
    }


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (representations_report, estimates):
        monkeypatch.setattr(module, "RESAMPLES", 100)


def run(study: dict[str, Any], folder: Path, *arguments: str) -> int:
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    reports = ["--markdown", str(folder / "report.md"), "--json", str(folder / "report.json")]
    return representations.main(["--config", str(config), *reports, *arguments])


def test_three_models_from_one_command(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(study, tmp_path) == 0
    table = capsys.readouterr().out
    assert "## tones (sines)" in table and table.strip() == (tmp_path / "report.md").read_text().strip()
    report = json.loads((tmp_path / "report.json").read_text())["domains"]["tones"]
    found = report["variants"]
    assert {name: set(row["streams"]) for name, row in found.items()} == {
        "discrete": {"codes", "stop", "total"},
        "continuous": {"latents", "stop", "total"},
        "hybrid": {"codes", "latents", "stop", "total"},
    }
    sizes = [row["parameters"] for row in found.values()]
    assert max(sizes) <= 1.05 * min(sizes)
    differences = {(row["first"], row["second"], row["stream"]): row for row in report["differences"]}
    codes = differences["hybrid", "discrete", "codes"]
    expected = found["hybrid"]["streams"]["codes"]["value"] - found["discrete"]["streams"]["codes"]["value"]
    assert codes["value"] == pytest.approx(expected)
    assert len(codes["per_seed"]) == 2 and codes["per_seed"][0] != codes["per_seed"][1]
    assert ("hybrid", "discrete", "codebook 2") in differences and ("hybrid", "continuous", "total") in differences
    # Test clips have 20 frames (0.8 s) and more: all are cut there.
    folder = Path(study["output"]) / "tones"
    result = json.loads((folder / "hybrid" / "seed1" / "result.json").read_text())
    assert [clip["nll"]["num_frames"] for clip in result["clips"]] == [20, 20] == [report["test_frames"] // 2] * 2
    assert all(clip["labels"]["goes_on"] == "true" for clip in result["clips"])

    # What is there is not made again, what is missing is, by another process from the last checkpoint.
    (folder / "hybrid" / "seed1" / "result.json").unlink()
    monkeypatch.setattr(representations, "run_one", lambda *_: pytest.fail("must run in a process of its own"))
    assert run(study, tmp_path, "--jobs", "2") == 0
    assert "resumed from" in (folder / "hybrid" / "seed1" / "output.txt").read_text()
    assert json.loads((folder / "hybrid" / "seed1" / "result.json").read_text())["clips"] == result["clips"]
    capsys.readouterr()
    assert run(study, tmp_path, "score=validation") == 2
    assert "other settings (split, validation_fraction)" in capsys.readouterr().err
    assert run({**study, "max_frames": 12}, tmp_path) == 2
    assert "language.data.max_frames" in capsys.readouterr().err


def test_settings_are_chosen_on_clips_held_back(study: dict[str, Any], tmp_path: Path) -> None:
    changes = [f"output={tmp_path / 'runs'}", "score=validation", "validation_fraction=0.3", "steps=1", "seeds=1"]
    assert run(study, tmp_path, *changes, "--one", "tones/discrete/0") == 0
    result = json.loads((tmp_path / "runs" / "tones" / "discrete" / "seed0" / "result.json").read_text())
    tests = {"3.wav", "7.wav"}
    assert result["clips"] and not tests & {clip["key"] for clip in result["clips"]}


def test_unequal_sizes_are_refused(study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study, tmp_path, "variants.discrete.ffn_dim=400", f"output={tmp_path / 'runs'}") == 2
    assert "must agree within 5%" in capsys.readouterr().err


def test_models_of_audio_alone(study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = {"tones": {**study["domains"]["tones"], "rules": [{}]}}
    assert run({**study, "domains": domains}, tmp_path) == 2
    assert "text: false" in capsys.readouterr().err


def results(kind: str, nats: float, seeds: int = 2) -> list[dict[str, Any]]:
    """Clips of unequal difficulty and length, every frame `nats` above it; sets a and b; seeds 0.1 apart."""
    found = []
    for seed in range(seeds):
        clips = []
        for number in range(12):
            frames = 10 + number
            code = 0.0 if kind == "continuous" else (number + nats + 0.1 * seed) * frames
            latent = 0.0 if kind == "discrete" else 2.0 * frames
            nll = {"num_frames": frames, "codes": [] if kind == "continuous" else [code], "latents": latent}
            nll |= {"stop": 0.0, "correct": [] if kind == "continuous" else [1]}
            clips.append({"key": str(number), "labels": {"set": "ab"[number % 2]}, "nll": nll})
        about = {"sigma": 0.1, "scale_floor": 0.02, "machine": "a machine", "tokenizer": "f3 1", "frame_rate_hz": 25.0}
        about |= {"steps": 5, "frames_trained": 100 + seed, "training_seconds": 60.0, "parameters": 1000}
        found.append({"representation": kind, "clips": clips, **about})
    return found


def test_differences_are_paired() -> None:
    """A difference far below the spread of the clips is exact when each clip is held against itself."""
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    figures = compare(made)
    rows = {(row["stream"], row["set"]): row for row in figures["differences"]}
    assert set(rows) == {("codes", "all"), ("codes", "a"), ("codes", "b"), ("codebook 0", "all")}
    for row in rows.values():
        assert [row["value"], row["low"], row["high"], *row["seeds_too"]] == pytest.approx([-0.25] * 5)
        assert row["per_seed"] == pytest.approx([-0.25, -0.25]) and row["excludes_zero"]
    absolute = figures["variants"]["hybrid"]["streams"]["codes"]
    assert absolute["high"] - absolute["low"] > 1.0
    assert absolute["per_seed"][1] - absolute["per_seed"][0] == pytest.approx(0.1)
    text = markdown({"speech": figures}, {}, [])
    # 0.25 nats at 25 Hz are 9.0 bits a second.
    assert "| hybrid - discrete | codes | 12 | -0.250 [-0.250, -0.250] | [-0.250, -0.250]" in text
    assert "-9.0 [-9.0, -9.0] | yes |" in text


def test_a_difference_of_seeds_widens_the_second_interval() -> None:
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    for clip in made["hybrid"][1]["clips"]:
        clip["nll"]["codes"][0] += 0.5 * clip["nll"]["num_frames"]
    row = compare(made)["differences"][0]
    assert row["per_seed"] == pytest.approx([-0.25, 0.25])
    assert row["value"] == pytest.approx(0.0) and not row["excludes_zero"]
    assert row["seeds_too"] == pytest.approx([-0.25, 0.25])


@pytest.mark.parametrize("key", ["steps", "frames_trained", "tokenizer", "sigma"])
def test_runs_that_differ_do_not_compare(key: str) -> None:
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    made["hybrid"][1][key] = "other"
    with pytest.raises(UserError, match="differ"):
        compare(made)


def test_other_clips_do_not_compare() -> None:
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    short = copy.deepcopy(made)
    short["hybrid"][1]["clips"].pop()
    with pytest.raises(UserError, match="test clips"):
        compare(short)
