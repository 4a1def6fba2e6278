"""Spikes are skipped, counted and named; a loader that hangs is told of, or ends the run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.toy_task import ToyTask
from tokenizer.errors import UserError
from training.background import Prefetch
from training.config import OptimizerConfig, RunConfig, SpikeConfig
from training.loop import fit
from training.state import checkpoints


class SpikingTask(ToyTask):
    """One module; batches of some numbers are a thousand times too loud."""

    def __init__(self, loud: tuple[int, ...] = (), **about: Any) -> None:
        super().__init__(**about)
        self.loud = loud

    def turns(self, step: int) -> tuple[str, ...]:
        return ("model",)

    def batches(self, *, skip: int, **where: Any) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(super().batches(skip=skip, **where), skip):
            yield {**batch, "x": batch["x"] * (1000.0 if number in self.loud else 1.0)}


def settings(output: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "task": "tokenizer",
        "output": str(output),
        "max_steps": 20,
        "precision": "fp32",
        "device": "cpu",
        "tensorboard": False,
        "log_every": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        "spikes": SpikeConfig(loss_deviations=8.0, window=16, min_updates=4),
    }
    return RunConfig(**(values | changes))


def skipped(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "skipped"]


@pytest.mark.parametrize(
    ("spikes", "reason"),
    [
        (SpikeConfig(loss_deviations=8.0, window=16, min_updates=4), "standard deviations above"),
        (SpikeConfig(norm_ratio=20.0, window=16, min_updates=4), "is above 20 times the median"),
    ],
    ids=["loss", "norm"],
)
def test_a_spike_changes_nothing_and_names_its_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spikes: SpikeConfig, reason: str
) -> None:
    task = SpikingTask(loud=(9, 15))
    before: list[torch.Tensor] = []
    original = task.loss

    def loss(turn: str, batch: Any, *, step: int, generator: torch.Generator) -> Any:
        before.append(task.model[0].weight.detach().clone())
        return original(turn, batch, step=step, generator=generator)

    task.loss = loss  # type: ignore[method-assign]
    fit(task, settings(tmp_path, spikes=spikes), {})
    first, second = skipped(tmp_path)
    assert (first["step"], second["step"]) == (10, 16)
    assert reason in first["reason"] and first["clips"] == [f"clip 9.{row}" for row in range(8)]
    assert f"step 10: {first['reason']}; skipped (batch 10 of clip 9.0, clip 9.1" in capsys.readouterr().err
    moved = [not torch.equal(a, b) for a, b in zip(before, before[1:], strict=False)]
    assert moved == [step not in (9, 15) for step in range(19)]
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())["progress"]
    assert state["bad_steps"] == 2 and len(state["latest"]["model"]) == 16


def test_without_the_settings_nothing_finite_is_skipped(tmp_path: Path) -> None:
    fit(SpikingTask(loud=(9,)), settings(tmp_path, spikes=SpikeConfig()), {})
    assert skipped(tmp_path) == []


def test_spikes_without_end_stop_the_run_in_one_line(tmp_path: Path) -> None:
    task = SpikingTask(loud=tuple(range(9, 99)))
    message = r"^3 steps in a row were skipped, up to step 12 \(batch 12 of clip 11.0, .*\): model's loss .* standard "
    with pytest.raises(UserError, match=message) as told:
        fit(task, settings(tmp_path, max_bad_steps=3), {})
    assert "\n" not in str(told.value) and "lower optimizer.learning_rate, then resume from" in str(told.value)


def test_a_resumed_run_judges_as_an_uninterrupted_one(tmp_path: Path) -> None:
    loud = (8,)  # the fifth update after the interruption would be too early to judge
    fit(SpikingTask(loud), settings(tmp_path / "whole"), {})
    fit(SpikingTask(loud, signal_at=5), settings(tmp_path / "parts"), {})
    fit(SpikingTask(loud), settings(tmp_path / "parts"), {}, resume=True)
    assert [record["step"] for record in skipped(tmp_path / "parts")] == [9]
    one, other = (load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("whole", "parts"))
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_ratio": 0.5}, "norm_ratio=0.5 0 or above 1"),
        ({"loss_deviations": -1.0}, "loss_deviations=-1.0 must be at least 0"),
        ({"window": 10}, "min_updates=50 must lie between 2 and window=10"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeConfig(**values)


class SlowFile:
    """What hangs while it reads a file."""

    def __init__(self, path: Path, released: threading.Event) -> None:
        self.path, self.released, self.reached = path, released, threading.Event()

    def read(self) -> Iterator[dict[str, Any]]:
        while True:
            self.reached.set()
            self.released.wait()
            yield {}


def test_a_loader_that_hangs_is_told_of_and_waited_for(tmp_path: Path) -> None:
    released, said = threading.Event(), list[str]()

    def tell(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            released.set()

    source = SlowFile(tmp_path / "shard-3.bin", released)
    with Prefetch(source.read(), warning_s=0.05, tell=tell) as stream:
        source.reached.wait()
        assert next(stream) == {}
    waits = [float(line.removeprefix("warning: no batch for ").split()[0]) for line in said]
    assert waits[0] >= 0.05 and waits[1] >= 0.1
    assert "the data thread is in _fill, training/background.py:" in said[0]
    assert said[0].endswith(f", at {tmp_path}/shard-3.bin")


def test_a_loader_that_hangs_for_too_long_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.background.LAST_WAIT_S", 0.1)
    released = threading.Event()

    class Hanging(ToyTask):
        def batches(self, **where: Any) -> Iterator[dict[str, Any]]:
            yield next(super().batches(**where))
            yield from SlowFile(tmp_path / "shard-3.bin", released).read()

    rescue = threading.Timer(300, released.set)  # only a run that waits for the loader comes to that
    rescue.start()
    with pytest.raises(
        UserError, match=r"no batch for [\d.]+ s; .*shard-3.bin; look at that disk, or raise stall_limit_s=1"
    ):
        fit(Hanging(), settings(tmp_path / "run", stall_limit_s=1.0), {})
    assert not released.is_set()
    rescue.cancel()
    released.set()
