"""The bench: turns, quartiles, bytes, and the command's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sampling.bench
from hybridlm.precision import pack
from sampling.bench import Timing, in_turns, run, speed_row, time_row, weight_bytes
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_frames import tiny_model
from tokenizer.errors import UserError


def test_cases_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    timings = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and all(len(timing.seconds) == 3 for timing in timings.values())


def test_rows_have_medians_and_quartiles() -> None:
    timing = Timing(seconds=(4.0, 1.0, 2.0, 2.0, 8.0))
    assert timing.median == 2.0 and timing.quartiles == (2.0, 4.0)
    speed = speed_row("x", timing, 8.0, "x real time", "1.5x peer")
    assert (speed.value, speed.low, speed.high) == (4.0, 2.0, 4.0)
    assert str(speed) == "| x | 4 x real time | 2 - 4 | 1.5x peer |"
    assert time_row("x", Timing(seconds=(0.5, 0.25))).low == 250.0


def test_bytes_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridlm.precision.BLOCKED_FROM", 1000)
    monkeypatch.setattr("hybridlm.precision.ROUNDED_FROM", 200)
    model = tiny_model()
    plain = weight_bytes(model.decoder)
    assert plain == 4 * sum(parameter.numel() for parameter in model.decoder.parameters())
    pack(model, "fp32")
    assert weight_bytes(model.decoder) == plain
    model = tiny_model()
    pack(model, "int8")
    assert 0.2 * plain < weight_bytes(model.decoder) < 0.35 * plain


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.bench, "READ_BYTES", 2**20)
    monkeypatch.setattr("hybridlm.precision._has_bf16", lambda device: False)
    model = save_tiny_model(tmp_path / "model")
    run(model=model, duration=0.2, repeats=1, json_file=tmp_path / "bench.json")
    told = capsys.readouterr().out
    assert "not on this machine: bf16" in told and "precision auto: " in told and "attention: sdpa" in told
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        f"{name}: {what}"
        for name in ("fp32", "int8")
        for what in ("one recording", "one, guided (cfg 2)", "4 at once", "first sound")
    ]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in report["rows"])
    assert "x fp32" in report["rows"][4]["beside"] and torch.__version__ in report["told"][-1]
    for settings in ({"repeats": 0}, {"duration": 0.0}, {"precision": "fp8"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            run(model=model, **settings)  # type: ignore[arg-type]
