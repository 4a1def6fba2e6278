"""Runs of one small task under every backend, on two ranks that `start` starts and that share one process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn

import training.layers
from tests.support import rank_memory
from tests.support.toy_corpus import TINY_MODEL
from tests.support.toy_task import ToyTask
from tokenizer.errors import UserError
from training.config import OptimizerConfig, RunConfig, SpikeConfig
from training.loop import fit
from training.processes import leave
from training.run import train_mapping
from training.task import Batch, Sample

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {
    # DeepSpeed last: accelerate does not come back from it in one process.
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Residual,DecoderLayer",
    },
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    # A file, since small weights stay whole by default; DeepSpeed reads no path with a space in it.
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json"},
}
PACKED = ("ddp", "zero2", "zero3")
"""Backends under which clips share rows: which rows a process has does not depend on how weights are shared out."""
ZERO3 = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "gradient_clipping": "auto"}'


class Residual(nn.Module):
    """A layer of its own, whose weights have odd sizes; its matrix learns at a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Has no forward; holds a weight that a method uses, a frozen one, one that few batches use, and a statistic."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.out = nn.Parameter(0.3 * torch.randn(3, 7))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.seldom = nn.Parameter(torch.zeros(5))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    width = 7

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        return (layer.linear.weight for layer in self.layers)

    def read(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x @ self.out.T * self.frozen


class SharedTask:
    """Fits y = 2x; one global batch has a loss that is not finite, one is loud, and one in four uses another weight.

    Args:
        seed: Of the initial weights.
        same_graph: All batches use all weights.
    """

    def __init__(self, seed: int, *, same_graph: bool = True) -> None:
        torch.manual_seed(seed)
        self.model, self.same_graph = Stack(), same_graph

    def modules(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(self, turn: str, batch: Batch, *, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        loss = (self.model.read(batch["x"]) - 2 * batch["x"]).pow(2).mean()
        if self.same_graph or batch["number"] % 4 == 1:
            loss = loss + (self.model.seldom - 1).pow(2).sum() * (batch["number"] % 4 == 1)
        # The gradient stays finite: only the loss tells.
        return loss + (torch.inf if batch["number"] == 21 else 0.0), {"absolute": loss.detach().abs()}

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        number = skip * world_size + rank
        while True:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
            yield {"x": x * (30 if 60 <= number < 64 else 1), "number": number}
            number += world_size

    def size(self, batch: Batch) -> int:
        return 8

    def validate(self) -> Mapping[str, float]:
        x = torch.linspace(-1, 1, 30).reshape(10, 3)
        return {"loss": float((self.model.read(x) - 2 * x).pow(2).mean())}

    def export(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")

    def samples(self) -> Sequence[Sample]:
        return []


def settings(output: Path, accumulate: int) -> RunConfig:
    """Twenty steps of four batches, with all that a backend might get wrong."""
    return RunConfig(
        task="tokenizer",
        output=str(output),
        max_steps=20,
        precision="fp32",
        tensorboard=False,
        log_every=1,
        validate_every=10,
        checkpoint_every=10,
        accumulate=accumulate,
        spikes=SpikeConfig(loss_deviations=50.0, window=8, min_updates=4),
        ema_decay=0.9,
        optimizer=OptimizerConfig(
            learning_rate=0.01, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, base_width=3
        ),
    )


def start(module: str, *arguments: str) -> None:
    """Run a module on two ranks over gloo, and fail with what they said if one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(2):
        about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        about |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", module, *arguments]
        ranks.append(
            subprocess.Popen(
                command,
                env={**os.environ, **about},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # one that waits for another that has failed
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def under(backend: str) -> None:
    """From now on runs of this process use the backend."""
    AcceleratorState._reset_state()
    for name in {name for each in ENVIRONMENTS.values() for name in each}:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENTS[backend])


def language(folder: Path, output: str) -> dict[str, Any]:
    """Settings of a few steps of a tiny language model that reads, on a cache whose batches do not all have text."""
    return {
        "task": "language",
        "output": str(folder / output),
        "max_steps": 4,
        "precision": "fp32",
        "tensorboard": False,
        "log_every": 1,
        "gradient_checkpointing": not output.startswith("ddp"),
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
        "language": {
            "tokenizer": str(folder / "tokenizer"),
            "data": {"caches": [str(folder / "cache")], "validation_fraction": 0.2, "batch_frames": 25},
            "text": {"vocab_size": 320},
            "model": {**TINY_MODEL, "reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8},
        },
    }


def packed(folder: Path, output: str, accumulate: int) -> dict[str, Any]:
    """The same with clips that share rows, two batches a step over all processes, and no noise: it is drawn by rank."""
    settings = language(folder, output)
    parts = settings["language"]
    parts["data"] |= {"max_frames": 20, "pack_frames": 45, "batch_frames": 90}
    parts["model"] |= {"sigma": 0.0, "history_noise": 0.0, "condition_dropout": 0.0}
    parts["losses"] = {"text_dropout": 0.0}
    return {**settings, "accumulate": accumulate, "max_steps": 4, "checkpoint_every": 2, "validate_every": 2}


def run_all(folder: Path, backends: Sequence[str]) -> None:
    """Under each backend a run, one that goes on from where a single process was, and one of a language model.

    Under those that let a batch leave weights out, also a run whose batches do; under some also one with packed rows.
    """
    rank = int(os.environ["RANK"])
    ENVIRONMENTS["zero3"]["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / "zero3.json")
    for backend in backends:
        under(backend)
        fit(SharedTask(rank), settings(folder / backend, 2), {})
        fit(SharedTask(rank), settings(folder / f"{backend}-resumed", 2), {}, resume=True)
        if not backend.startswith("zero"):
            fit(SharedTask(rank, same_graph=False), settings(folder / f"{backend}-seldom", 2), {})
        train_mapping(language(folder, f"{backend}-language"), "test")
        if backend in PACKED:
            train_mapping(packed(folder, f"{backend}-packed", 1), "test")
        if backend == "ddp":
            train_mapping(packed(folder, "ddp-packed-resumed", 1), "test", resume=True)
        if backend == "zero2":
            rank_memory.measure(folder / "zero2-memory")
        refused(folder / f"{backend}-two", fit, ToyTask(), settings(folder / f"{backend}-two", 2), {})
        if backend == "ddp":
            bad = {"max_step": 1} if rank else {}
            refused(folder / "bad-key", train_mapping, {**language(folder, "never"), **bad}, "test")
            alone = language(folder / "few", "run")
            alone["language"]["data"]["validation_fraction"] = 0.0
            refused(folder / "few", train_mapping, alone, "test")
            compiled(folder)
    leave()


def compiled(folder: Path) -> None:
    """A run whose layers are compiled, by a compiler that leaves them as they are: what is left is to trace them."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    training.layers.COMPILER = compiler  # type: ignore[assignment]
    train_mapping({**packed(folder, "ddp-compiled", 1), "compile": True}, "test")
    (folder / "ddp-compiled" / f"graphs-{os.environ['RANK']}").write_text(str(len(graphs)))


def refused(folder: Path, call: Callable[..., object], *arguments: Any) -> None:
    """Keep how a call ends on this rank: with a line, or in silence and with a status."""
    folder.mkdir(exist_ok=True)
    try:
        call(*arguments)
    except (UserError, SystemExit) as error:
        (folder / f"said-{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), sys.argv[2:])
