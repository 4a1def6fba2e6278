"""One process against two on this machine's CPUs, at the same global batch: a part of `benchmarks.training_speed`.

Each run is one of the trainer's own, launched by `accelerate` with a file of configs/accelerate, on made-up batches. It
is also what a launched process runs: `python -m benchmarks.training_ranks SETTINGS.json`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizer_memory import peak_bytes
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig, RunConfig
from training.language_task import LanguageTaskConfig
from training.loop import fit
from training.plan import PlannedTask, Shape, made_up_batch
from training.processes import leave
from training.task import Batch, Sample

BACKENDS = ("ddp", "zero1", "zero2", "zero3")
COLUMNS = 4
WARM_UP = 2
"""Steps that are not counted."""
ROOT = Path(__file__).resolve().parent.parent


class MadeUpTask(PlannedTask):
    """A language task of the same batch over and over, with nothing to validate or to export."""

    def __init__(self, config: ModelConfig, shape: Shape) -> None:
        about = {"tokenizer": "none", "data": {"caches": ["none"]}, "losses": {"alignment_weight": 0.0}}
        super().__init__(from_mapping(LanguageTaskConfig, about), HybridLM(config))
        self._batch = made_up_batch(config, shape)

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """See `Task`."""
        while True:
            yield dict(self._batch)

    def validate(self) -> Mapping[str, float]:
        """See `Task`."""
        return {"loss": 0.0}

    def export(self, folder: Path) -> None:
        """See `Task`."""

    def samples(self) -> Sequence[Sample]:
        """See `Task`."""
        return ()


def measure_ranks(
    config: ModelConfig, *, rows: int, frames: int, backends: Sequence[str], steps: int, processes: int = 2
) -> list[dict[str, Any]]:
    """One process, then as many as are asked for under each backend.

    Args:
        config: The model.
        rows: Of the global batch.
        frames: Of a row.
        backends: Files of configs/accelerate.
        steps: Counted in each run.
        processes: That share the batch out.

    Raises:
        UserError: rows that cannot be shared out evenly, or a launch that fails.
    """
    if rows % processes:
        raise UserError(f"--rows={rows} must be a multiple of {processes}, for as many processes share them out")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for backend, count in (("one process", 1), *((name, processes) for name in backends)):
            output = Path(folder) / backend.replace(" ", "-")
            settings = {
                "model": asdict(config),
                "rows": rows // processes,
                "frames": frames,
                "accumulate": processes // count,
                "steps": steps + WARM_UP,
                "output": str(output),
            }
            path = Path(folder) / f"{output.name}.json"
            path.write_text(json.dumps(settings), encoding="utf-8")
            _launch(path, None if count == 1 else backend, count)
            found.append({"backend": backend, "processes": count, **_read(output, count)})
    base = found[0]
    return [{**row, "speedup": row["frames_per_s"] / base["frames_per_s"]} for row in found]


def _launch(settings: Path, backend: str | None, count: int) -> None:
    command = [sys.executable, "-m"]
    if backend is not None:
        launcher = ["accelerate.commands.launch", "--config_file", f"configs/accelerate/{backend}.yaml"]
        command += [*launcher, "--num_processes", str(count), "-m"]
    command += ["benchmarks.training_ranks", str(settings)]
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A thread each: two processes with as many threads as cores would stand in one another's way.
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"{backend or 'one process'} failed: {' '.join(last) or 'no message'}")


def _read(output: Path, count: int) -> dict[str, Any]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [r["frames_per_s"] for r in records if r["kind"] == "train"][WARM_UP:]
    memory = [json.loads((output / f"memory-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
    return {
        "frames_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "loss": [r["model_loss"] for r in records if r["kind"] == "train"][-1],
        "peak_bytes": [entry["peak"] - entry["imported"] for entry in memory],
        "held_bytes": [entry["held"] for entry in memory],
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table."""
    lines = [
        "| ranks | processes | frames/s (slowest-fastest step) | against one process | peak MiB a process | MiB of "
        "tensors before a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory, held = (", ".join(f"{size / 2**20:.0f}" for size in row[name]) for name in ("peak_bytes", "held_bytes"))
        lines.append(
            f"| {row['backend']} | {row['processes']} | {row['frames_per_s']:,.0f} ({row['slowest']:,.0f}-"
            f"{row['fastest']:,.0f}) | {row['speedup']:.2f}x | {memory} | {held} |"
        )
    return "\n".join(lines)


def held_bytes() -> int:
    """Of all tensors of this process that have a content, storages that several share counted once."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the objects that are asked whether they are tensors are deprecated
        for thing in gc.get_objects():
            if type(thing) not in (torch.Tensor, torch.nn.Parameter):
                continue
            if thing.layout == torch.strided and not thing.is_meta:  # DeepSpeed notes shapes in tensors on `meta`
                storage = thing.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def main(settings: Path) -> None:
    """One process of a launch."""
    given = json.loads(settings.read_text(encoding="utf-8"))
    imported = peak_bytes()
    config = from_mapping(ModelConfig, given["model"])
    output = Path(given["output"])
    run = RunConfig(
        task="language",
        output=str(output),
        max_steps=given["steps"],
        precision="fp32",
        threads=1,
        accumulate=given["accumulate"],
        ema_decay=0.0,
        optimizer=OptimizerConfig(warmup_steps=0),
        log_every=1,
        validate_every=10**9,
        checkpoint_every=10**9,
        tensorboard=False,
    )
    task = MadeUpTask(config, Shape(rows=given["rows"], frames=given["frames"], columns=COLUMNS))
    steps = task.loss
    peak = held = 0

    def loss(*arguments: Any, **named: Any) -> Any:
        nonlocal peak, held
        peak, held = peak_bytes(), held_bytes()  # before the checkpoint at the end, which gathers everything
        return steps(*arguments, **named)

    task.loss = loss  # type: ignore[method-assign]
    try:
        fit(task, run, {})
    finally:
        leave()
    rank = os.environ.get("RANK", "0")
    (output / f"memory-{rank}.json").write_text(json.dumps({"imported": imported, "peak": peak, "held": held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
