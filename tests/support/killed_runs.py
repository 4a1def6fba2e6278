"""A run that is killed again and again, mostly at moments drawn by chance, and after each what can be loaded.

How much of a step is writing depends on the disk, so that chance alone would leave out one moment or the other
somewhere: one kill of five is inside a step, and one of five while files are written, where the child waits for it.

    python -m tests.support.killed_runs FOLDER KILLS

Every child is a fork of this one process, which has imported everything, and goes on with the run where the one before
it was killed. It ends with an error if what is found after a kill is not, to the last bit, what a run without kills had
at that step.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from tests.support.toy_task import ToyTask
from training.config import OptimizerConfig, RunConfig
from training.loop import fit
from training.state import checkpoints, clear_leftovers, load_checkpoint
from training.task import Batch

real_rmtree = shutil.rmtree
KEEP = 2
MOST_STEPS = 3
"""That a child begins, at most, where the moment is drawn."""
FLUSHES = 12
"""Files that a child has written, at most, where it waits while writing."""


def settings(output: Path, max_steps: int, keep: int) -> RunConfig:
    """A checkpoint every step, the oldest of which goes; a best model every few."""
    return RunConfig(
        task="tokenizer",
        output=str(output),
        max_steps=max_steps,
        precision="fp32",
        device="cpu",
        threads=1,
        tensorboard=False,
        log_every=1,
        validate_every=2,
        checkpoint_every=1,
        keep_checkpoints=keep,
        # The rate does not depend on the length of the run, which is not known.
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, final_ratio=1.0),
    )


class ImprovingTask(ToyTask):
    """Every validation is the best, so that `best/` is written over and over.

    Args:
        begun: Descriptor to which a byte is written at every step.
        waits: Whether each step then waits to be killed.
    """

    def __init__(self, begun: int | None = None, waits: bool = False) -> None:
        super().__init__()
        self.begun, self.waits = begun, waits

    def loss(self, turn: str, batch: Batch, *, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        if self.begun is not None and turn == "model":
            os.write(self.begun, b".")
            if self.waits:
                signal.pause()
        return super().loss(turn, batch, step=step, generator=generator)

    def validate(self) -> dict[str, float]:
        super().validate()
        return {"loss": -time.monotonic()}


def state(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor file of a checkpoint."""
    return {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))}


def slowly_removed(folder: Path, ignore_errors: bool = False) -> None:
    """As `shutil.rmtree`, at the pace of a large checkpoint on a slow disk."""
    for file in folder.iterdir() if folder.is_dir() else ():
        file.unlink()
        time.sleep(0.001)
    real_rmtree(folder, ignore_errors)


def quietly(config: RunConfig, begun: int | None = None, waits: bool = False) -> None:
    """Train, or go on."""
    with contextlib.redirect_stderr(io.StringIO()):
        fit(ImprovingTask(begun, waits), config, {}, resume=True)


def waits_in_write(number: int, begun: int) -> Callable[[int], None]:
    """What takes the place of `os.fsync`: the call of this number says so and waits to be killed."""
    left = iter(range(number - 1, -1, -1))

    def flush(descriptor: int) -> None:
        if next(left) == 0:
            os.write(begun, b"w")
            signal.pause()

    return flush


def killed_child(output: Path, draw: random.Random, pace: float, moment: str) -> float:
    """Go on with the run in a fork of this process, and kill it at some moment of one of its first steps.

    Args:
        output: Folder of the run.
        draw: Of the moment.
        pace: Seconds a step, saving included.
        moment: "step", "write" or "any".

    Returns:
        The pace, as the child had it.
    """
    reading, writing = os.pipe()
    steps, flushes = draw.randint(1, MOST_STEPS), draw.randint(1, FLUSHES)
    child = os.fork()
    if child == 0:
        if moment == "write":
            os.fsync = waits_in_write(flushes, writing)
        try:
            quietly(settings(output, 10**6, KEEP), begun=writing, waits=moment == "step")
        finally:
            os._exit(1)
    os.close(writing)
    begun = []
    while len(begun) < steps:
        sign = os.read(reading, 1)
        assert sign, "the child ended by itself"
        begun.append(time.monotonic())
        if moment == "step" or sign == b"w":
            break
        if moment == "write":
            steps += 1
    pace = begun[-1] - begun[-2] if len(begun) > 1 and moment == "any" else pace
    time.sleep(draw.uniform(0.0, pace))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return pace


def examine(output: Path) -> dict[Path, dict[str, bytes]]:
    """What a kill left: every checkpoint whole, and `model/` and `best/` readable."""
    clear_leftovers(output)
    clear_leftovers(output / "checkpoints")
    for name in ("model", "best"):
        if (output / name).exists():
            with safe_open(output / name / "model.safetensors", framework="pt") as file:
                assert [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (no mapping)
    found = checkpoints(output)
    for checkpoint in found:
        task = ImprovingTask()
        progress = load_checkpoint(checkpoint, task.modules(), {}).progress
        assert checkpoint.name == f"step_{progress.step:08d}" and progress.batches == progress.step
    assert len(found) <= KEEP + 1, found
    return {checkpoint: state(checkpoint) for checkpoint in found}


def main(folder: Path, kills: int) -> None:
    os.fsync = lambda descriptor: None  # what a killed process has written stays, without waiting for the disk
    shutil.rmtree = slowly_removed  # type: ignore[assignment]
    torch.set_num_threads(1)
    output, draw = folder / "killed", random.Random(0)
    quietly(settings(folder / "first", 2, KEEP))  # what is imported on the way, no child has to
    pace, seen = 0.02, dict[str, dict[str, bytes]]()
    moments = {"while writing": 0, "elsewhere": 0}
    for kill in range(kills):
        pace = killed_child(output, draw, pace, ("step", "any", "write", "any", "any")[kill % 5])
        half = any(output.rglob(".*.writing")) or any(output.rglob(".*.retired"))
        moments["while writing" if half else "elsewhere"] += 1
        before = max(seen, default="")
        found = {checkpoint.name: content for checkpoint, content in examine(output).items()}
        assert max(found, default="") >= before, f"after {before} only {sorted(found)} was left"
        seen |= found
    last = int(max(seen).removeprefix("step_"))
    quietly(settings(folder / "whole", last, last))
    for name, content in seen.items():
        assert content == state(folder / "whole" / "checkpoints" / name), f"{name} is not what it must be"
    print(json.dumps({**moments, "steps": last, "compared": len(seen)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
