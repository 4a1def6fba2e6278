"""The benchmarks of fine-tuning and of `prepare` run at a tiny size, and keep what is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import finetune, prepare_speed
from tests.support.saved_model import save_tiny_model
from tests.support.toy_corpus import write_clips
from training.loop import RunResult


def test_all_weights_and_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, model = write_clips(tmp_path / "clips", 8), save_tiny_model(tmp_path / "model")
    options = ["--data", str(manifest), "--where", "set=tones", "--model", str(model), "--output", str(tmp_path / "o")]
    options += ["max_steps=3", "--rank", "2", "--json", str(tmp_path / "f.json")]
    stopped: list[Path] = []

    def interrupted(task, run, resolved, **about) -> RunResult:
        stopped.append(Path(run.output))
        return RunResult(output=Path(run.output), step=1, finished=False, first={}, best={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.finetune.fit", interrupted)
        assert finetune.main(options) == 130
    assert finetune.main(options) == 0
    report = json.loads((tmp_path / "f.json").read_text())
    assert (report["train_clips"], report["test_clips"]) == (6, 2) and stopped
    full, lora = report["runs"]["full"], report["runs"]["lora"]
    for row in (full, lora):
        value, low, high = row["after"]
        assert low <= value <= high and row["minutes"] > 0 and row["steps"] <= 3
        assert row["change"][0] == pytest.approx(row["after"][0] - row["before"][0], abs=1e-6)
    assert full["before"] == lora["before"] and full["after"] != lora["after"]
    assert "| LoRA, rank 2 |" in capsys.readouterr().out
    monkeypatch.setattr(finetune, "finetune", None)  # what is finished is not made again
    assert finetune.main(options) == 0
    assert json.loads((tmp_path / "f.json").read_text()) == report
    assert finetune.main([*options, "passes=2"]) == 2
    assert "was made with other settings (overrides)" in capsys.readouterr().err
    assert finetune.main([*options, "--where", "set=none"]) == 2
    assert "no clip of split train meets set=none" in capsys.readouterr().err


def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, model = write_clips(tmp_path / "clips", 3), save_tiny_model(tmp_path / "model")
    options = ["--data", str(manifest), "--tokenizer", str(model), "--rounds", "2", "--json", str(tmp_path / "p.json")]
    assert prepare_speed.main(options) == 0
    one, two = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert (one["workers"], two["workers"]) == (1, 2) and one["clips"] == two["clips"] == 3
    assert one["audio_s"] == pytest.approx(0.6 + 0.68 + 0.76, abs=0.1) and one["times_real_time"]["min"] > 0
    assert "times real time" in capsys.readouterr().out
    assert prepare_speed.main(["--data", str(tmp_path / "nowhere")]) == 2
