"""Several processes through the same loop: one run of twice the batch, stopped and resumed together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from tests.support.toy_task import ToyTask
from training.config import OptimizerConfig, RunConfig
from training.loop import fit
from training.processes import leave
from training.state import checkpoints
from training.task import Batch

ROOT = Path(__file__).parents[2]


class PlainTask(ToyTask):
    """No randomness but the data's, so that two processes and two micro-batches see the same."""

    def __init__(self, seed: int = 0, signal_at: int | None = None) -> None:
        super().__init__(seed=seed, signal_at=signal_at)
        self.model[1] = torch.nn.Identity()

    def turns(self, step: int) -> tuple[str, ...]:
        return ("model",)

    def loss(self, turn: str, batch: Batch, *, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.model(batch["x"]) - 2 * batch["x"]).pow(2).mean(), {}


def settings(output: str | Path, accumulate: int, device: Literal["auto", "cpu"] = "cpu") -> RunConfig:
    return RunConfig(
        task="tokenizer",
        output=str(output),
        max_steps=6,
        precision="fp32",
        device=device,
        tensorboard=False,
        accumulate=accumulate,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
    )


def test_two_processes_equal_two_micro_batches_and_stop_together(tmp_path: Path) -> None:
    fit(PlainTask(), settings(tmp_path / "one", 2), {})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(2):
        about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        about |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.training.test_processes", str(tmp_path / "two"), str(rank)]
        processes.append(subprocess.Popen(command, env={**os.environ, **about}, cwd=ROOT))
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    one, two = (load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("one", "two"))
    assert checkpoints(tmp_path / "two")[-1].name == "step_00000006"
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def run_one_of_two(output: str, rank: int) -> None:
    """Stop when the second process alone is asked to, then go on; its own weights are not those of the first."""
    stopped = fit(PlainTask(seed=rank, signal_at=2 if rank == 1 else None), settings(output, 1, "auto"), {})
    assert not stopped.finished
    assert stopped.step == 3
    assert fit(PlainTask(seed=rank), settings(output, 1, "auto"), {}, resume=True).step == 6


if __name__ == "__main__":
    run_one_of_two(sys.argv[1], int(sys.argv[2]))
    leave()  # as the command line does
