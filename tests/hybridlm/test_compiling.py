"""The compiled step: the same states, and a loud way back where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hybridlm.compiling
from hybridlm.compiling import _trial, compile_step, drop
from hybridlm.model import HybridLM
from hybridlm.precision import PackedLinear
from sampling.files import run
from sampling.pipeline import AudioModel, load
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_model as tiny_audio_model
from tests.support.tiny_frames import tiny_model

Function = Callable[..., Tensor]
TRIAL = _trial


def as_if(patch: pytest.MonkeyPatch, compile: Callable[..., Function], seconds: tuple[float, float, float]) -> None:
    """Another compiler, and the times of a step: uncompiled, in the warm-up, compiled."""
    times = iter(seconds)
    patch.setattr(torch, "compile", compile)
    patch.setattr(hybridlm.compiling, "_trial", lambda *given: (TRIAL(*given)[0], next(times)))


def test_compiled_equals_eager() -> None:
    """By the compiler of this machine, where there is one."""
    script = [sys.executable, "-m", "tests.support.compiled_step"]
    done = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    told, numbers = done.stdout.strip().splitlines()
    assert told.startswith("compile: on for 2 rows: a step takes 1000.00 ms, uncompiled 3000.00 ms; warm-up ")
    error, largest = map(float, numbers.split())
    assert error < 1e-5 < 0.1 < largest


def test_only_steps_of_its_rows_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []

    def recording(function: Function, **settings: object) -> Function:
        assert settings["dynamic"] is False
        return lambda x, *more: (used.append(x.shape), function(x, *more))[1]

    model = tiny_model()
    expected = {rows: _trial(model, rows)[0] for rows in (2, 3)}
    as_if(monkeypatch, recording, (2.0, 2.0, 1.0))
    assert compile_step(model, 2).startswith("compile: on for 2 rows")
    assert {shape[:2] for shape in used if len(shape) == 3} == {(2, 1)}  # never the prefix
    assert {shape[0] for shape in used if len(shape) == 2} == {2}  # the codes' network
    count = len(used)
    assert torch.equal(TRIAL(model, 2)[0], expected[2]) and len(used) > count
    count = len(used)
    assert torch.equal(TRIAL(model, 3)[0], expected[3]) and len(used) == count
    drop(model)
    assert torch.equal(TRIAL(model, 2)[0], expected[2]) and len(used) == count


def test_what_can_not_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Function, **settings: object) -> Function:
        def fail(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler\nand more")

        return fail

    model: AudioModel = tiny_audio_model()
    expected = model.generate(tags=["music"], duration=0.3, seed=1).waveform
    for compiler, seconds, told in (
        (broken, (2.0, 2.0, 1.0), "compile: off, for this machine can't: RuntimeError: no C++ compiler"),
        (lambda function, **_: function, (2.0, 2.0, 2.0), "compile: off, for it is not faster here"),
        (
            lambda function, **_: lambda x, *y: function(x + 1, *y),
            (2.0, 2.0, 1.0),
            "compile: off, for states differ by",
        ),
    ):
        with monkeypatch.context() as patch:
            as_if(patch, compiler, seconds)
            assert compile_step(model.model, 1).startswith(told)
        assert torch.equal(model.generate(tags=["music"], duration=0.3, seed=1).waveform, expected)


def test_a_loaded_model_is_compiled_for_the_rows_that_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("hybridlm.precision.BLOCKED_FROM", 1000)
    asked: list[int] = []

    def compile(model: HybridLM, rows: int) -> str:
        asked.append(rows)
        assert not any(isinstance(one, PackedLinear) for one in model.modules())  # no compiler reads its blocks
        return "compile: told"

    monkeypatch.setattr("sampling.loaded.compile_step", compile)
    folder = save_tiny_model(tmp_path / "model")
    for settings in ({"tags": ("music",)}, {"text": "hi", "num_samples": 3}, {"tags": ("music",), "cfg": 2.0}):
        run(model=folder, compile=True, duration=0.2, output=tmp_path / "a.wav", **settings)  # type: ignore[arg-type]
        assert "compile: told\n" in capsys.readouterr().out
    assert asked == [1, 6, 2]
    model = load(folder)
    assert asked == [1, 6, 2] and any(isinstance(one, PackedLinear) for one in model.model.modules())
