"""The benchmark of the training step runs at a tiny size, and compares like with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import training_ranks, training_speed
from benchmarks.training_speed import SIZES, model_config
from hybridlm.model import HybridLM
from tests.support.toy_corpus import write_cache
from tests.training.test_layers import language


def test_step_and_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(language(tmp_path, "run")))
    options = ["--parts", "step", "loader", "--size", "tiny", "--device", "cpu", "--rows", "2", "--frames", "12"]
    options += ["--rounds", "2", "--steps", "1", "--peak-tflops", "0.1", "--precision", "fp32"]
    options += ["--config", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "speed.json")]
    assert training_speed.main(options) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    ours, theirs = report["step"]["hybridlm"], report["step"]["transformers"]
    # The same layers; but ours predicts no text of the prefix, a quarter of so few positions.
    assert ours["flop"] == pytest.approx(theirs["flop"], rel=0.15)
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.15)
    assert ours["mfu"] == pytest.approx(ours["flop"] / ours["seconds"]["median"] / 1e11)
    assert report["step"]["ratio"]["min"] > 0
    loader = report["loader"]
    assert loader["batches"] == 2 and loader["codes_per_frame"] == 3
    assert loader["share_of_step"] == pytest.approx(
        loader["seconds_per_batch"]["median"] / loader["seconds_per_step"]["median"]
    )
    said = capsys.readouterr().out
    assert "| hybridlm |" in said and "| transformers |" in said and "loader: frames a batch" in said
    codec = Path(__file__).parents[2] / "configs/codec-box.yaml"
    assert training_speed.main(["--parts", "loader", "--config", str(codec)]) == 2


def test_sizes_are_what_they_are_called() -> None:
    for name, millions in (("30M", 30), ("300M", 300)):
        with torch.device("meta"):
            count = HybridLM(model_config(name, 250)).num_parameters()
        assert count == pytest.approx(millions * 1e6, rel=0.1), name
    assert SIZES.keys() == {"tiny", "30M", "300M"}


def test_two_processes_have_the_batch_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(settings: Path, backend: str | None, count: int) -> None:
        """In this process, alone: what only starts others takes long."""
        given = json.loads(settings.read_text())
        launched.append((backend, count, given["rows"] * given["accumulate"] * count))
        training_ranks.main(settings)
        (Path(given["output"]) / "memory-1.json").write_text('{"imported": 1, "peak": 3, "held": 2}')

    monkeypatch.setattr(training_ranks, "_launch", launch)
    options = ["--parts", "ranks", "--size", "tiny", "--rows", "4", "--frames", "12", "--steps", "2"]
    assert training_speed.main([*options, "--backends", "ddp", "zero3", "--json", str(tmp_path / "ranks.json")]) == 0
    assert launched == [(None, 1, 4), ("ddp", 2, 4), ("zero3", 2, 4)]
    one, ddp, _ = json.loads((tmp_path / "ranks.json").read_text())["ranks"]
    assert len(one["peak_bytes"]) == 1 and ddp["peak_bytes"][1] == 2
    weights = 4 * HybridLM(model_config("tiny", 12)).num_parameters()
    assert one["held_bytes"][0] > 3 * weights and ddp["held_bytes"][1] == 2  # with AdamW's moments
    assert one["speedup"] == 1.0 and ddp["speedup"] == ddp["frames_per_s"] / one["frames_per_s"]
    assert training_speed.main(["--parts", "ranks", "--rows", "3"]) == 2
