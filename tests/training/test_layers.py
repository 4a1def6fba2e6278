"""Gradient checkpointing and compilation: the same gradients, less memory, and a reason where something is not on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hybridlm.decoder
import training.layers
from hybridlm.model import HybridLM
from tests.support.toy_corpus import TINY_MODEL, write_cache
from tests.support.toy_task import ToyTask
from tests.training.test_dry_run import SHAPE, config, found_for, measured_step, settings
from tokenizer.errors import UserError
from tokenizer.transformer import rotate
from training.config import RunConfig
from training.distributed import Replicas
from training.layers import compile_layers, compiler_errors
from training.loop import fit
from training.plan import PlannedTask, made_up_batch, plan
from training.processes import find_processes
from training.run import train_mapping
from training.state import checkpoints

MODELS: list[dict[str, Any]] = [
    {"dropout": 0.3},
    {"reader_layer": 0, "alignment_heads": 0, "text_in_prefix": False},
]


def gradients(model: HybridLM, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.manual_seed(5)  # of dropout
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        generator = torch.Generator().manual_seed(0)
        loss, _ = PlannedTask(settings(0.5), model).loss(
            "model", made_up_batch(model.config, SHAPE), step=0, generator=generator
        )
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", MODELS, ids=["dropout", "reader"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointed_gradients_are_the_same_to_the_last_bit(sizes: dict[str, Any], dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = HybridLM(config(**sizes))
    expected = gradients(model, dtype)
    model.decoder.gradient_checkpointing = True
    found = gradients(model, dtype)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_checkpointing_takes_the_memory_that_the_plan_says() -> None:
    sizes = config()
    kept = found_for(sizes)
    again = found_for(sizes, gradient_checkpointing=True)
    model = HybridLM(sizes)
    model.decoder.gradient_checkpointing = True
    _, added = measured_step(PlannedTask(settings(), model), None)
    assert again.peak == pytest.approx(added, rel=0.02)
    assert again.peak < 0.7 * kept.peak
    assert 1.2 * kept.flop < again.flop < 1.4 * kept.flop


def language(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    data = {"caches": [str(folder / "cache")], "validation_fraction": 0.2, "batch_frames": 50}
    return {
        "task": "language",
        "output": str(folder / name),
        "max_steps": 3,
        "precision": "fp32",
        "device": "cpu",
        "tensorboard": False,
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
        "language": {
            "tokenizer": str(folder / "tokenizer"),
            "data": data,
            "text": {"vocab_size": 320},
            "model": {**TINY_MODEL},
        },
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_cache(folder)
    train_mapping(language(folder, "plain"), "test")
    return folder


def last(run: Path) -> bytes:
    return (checkpoints(run)[-1] / "model.safetensors").read_bytes()


def test_a_run_says_that_it_checkpoints_and_ends_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_mapping(language(folder, "again", gradient_checkpointing=True), "test")
    assert "gradient checkpointing on" in capsys.readouterr().err
    assert last(folder / "again") == last(folder / "plain")
    small, large = (plan(language(folder, "x", gradient_checkpointing=on), "test").peak for on in (True, False))
    assert small < large


def test_a_run_compiles_its_layers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(training.layers, "COMPILER", compiler)
    monkeypatch.setattr(hybridlm.decoder, "rotate", inspect.unwrap(rotate))  # the tests' type checks can't be traced
    train_mapping(language(folder, "compiled", compile=True, gradient_checkpointing=True), "test")
    said = capsys.readouterr().err
    assert "compile on" in said, said
    assert 1 < len(calls) < 12  # not one a step and layer
    assert last(folder / "compiled") == last(folder / "plain")


def test_what_cannot_be_compiled_runs_uncompiled_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(training.layers, "COMPILER", broken)
    train_mapping(language(folder, "uncompiled", compile=True), "test")
    said = capsys.readouterr().err
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: compile is not used")]
    assert "no working C++ compiler" in warning and "compile off" in said
    assert last(folder / "uncompiled") == last(folder / "plain")


def test_what_another_process_cannot_compile_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneOfTwo(Replicas):
        def everybody(self, value: Any) -> list[Any]:
            return [value, "no working C++ compiler"]

    monkeypatch.setattr(training.layers, "_reason_against", lambda *given: None)
    model = HybridLM(config())
    backend = OneOfTwo(find_processes(cpu=True), None)
    (warning,) = compile_layers({"model": model}, backend)
    assert warning == "compile is not used, layers run uncompiled: no working C++ compiler"
    assert all(part._compiled_call_impl is None for part in model.modules())


def test_other_tasks_are_told_that_nothing_comes_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"compile": True, "gradient_checkpointing": True, "precision": "fp32", "device": "cpu"}
    fit(ToyTask(), RunConfig(task="tokenizer", output=str(tmp_path), max_steps=1, **asked), {})  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "warning: compile is not used: this task trains no" in said
    assert "warning: gradient_checkpointing is not used: this task" in said


def test_a_compiler_that_fails_later_is_one_line() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no room for\na kernel")

    function = torch.compile(torch.sin, backend=broken)
    message = r"compile=true: .*no room for a kernel; set compile=false and go on"
    with pytest.raises(UserError, match=message) as told, compiler_errors():
        function(torch.ones(1))
    assert "\n" not in str(told.value)
    with pytest.raises(ZeroDivisionError), compiler_errors():
        raise ZeroDivisionError
