"""What a step of the trainer allocates on one of several ranks."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.training_ranks import COLUMNS, MadeUpTask
from benchmarks.training_speed import model_config
from training.config import OptimizerConfig, RunConfig
from training.loop import fit
from training.plan import Shape

SHAPE = Shape(rows=1, frames=8, columns=COLUMNS)
CONFIG = model_config("tiny", SHAPE.frames)
STEPS = 2
"""The first makes what stays; the second is measured."""


def settings(output: Path) -> RunConfig:
    return RunConfig(
        task="language",
        output=str(output),
        max_steps=STEPS,
        precision="fp32",
        tensorboard=False,
        ema_decay=0.0,
        optimizer=OptimizerConfig(warmup_steps=0),
    )


def measure(output: Path) -> None:
    """Write the most bytes that a step of the first rank adds to what lies there before it, to `added.json`."""
    task = MadeUpTask(CONFIG, SHAPE)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    loss, main = task.loss, os.environ["RANK"] == "0"

    def watched(*arguments: Any, step: int, **named: Any) -> Any:
        if step == STEPS - 1 and main:
            gc.collect()  # of runs before it
            profiler.start()
        return loss(*arguments, step=step, **named)

    def stop() -> dict[str, float]:  # the first rank alone validates
        profiler.stop()
        return {"loss": 0.0}

    task.loss, task.validate = watched, stop  # type: ignore[method-assign]
    fit(task, settings(output), {})
    if not main:
        return
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    (output / "added.json").write_text(json.dumps(most))
