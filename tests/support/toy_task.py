"""A task of a few weights, with a real one's randomness: data order, noise, dropout; and a buffer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.task import Batch, Sample


class Critic(nn.Linear):
    """Counts its calls in a buffer that models' folders leave out, and answers by it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)


class ToyTask:
    """Fits y = 2x with a small network under dropout and noise, and a critic that learns every second step.

    Args:
        seed: Of the initial weights.
        bad_steps: Steps whose loss is not a number.
        signal_at: Step in which the process is sent SIGINT.
    """

    def __init__(self, seed: int = 0, bad_steps: Sequence[int] = (), signal_at: int | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 3))
        self.discriminator = Critic()
        self.bad_steps, self.signal_at = set(bad_steps), signal_at
        self.fail_export = False  # True: raise as a full disk does
        self.validated: list[Tensor] = []

    def modules(self) -> Mapping[str, nn.Module]:
        return {"model": self.model, "discriminator": self.discriminator}

    def turns(self, step: int) -> Sequence[str]:
        return ("discriminator", "model") if step % 2 else ("model",)

    def loss(self, turn: str, batch: Batch, *, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step == self.signal_at:
            self.signal_at = None
            os.kill(os.getpid(), signal.SIGINT)
        noise = 0.1 * torch.randn(batch["x"].shape, generator=generator)
        output = self.model(batch["x"] + noise)
        if turn == "discriminator":
            self.discriminator.calls += 1
            return (self.discriminator(output.detach()) + 0.01 * self.discriminator.calls).pow(2).mean(), {}
        loss = (output - 2 * batch["x"]).pow(2).mean() + 0.1 * self.discriminator(output).mean()
        if step in self.bad_steps:
            loss = loss * torch.nan
        return loss, {"absolute": (output - 2 * batch["x"]).abs().mean().detach()}

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        index = skip
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + index * world_size + rank)
            yield {"x": torch.randn(8, 3, generator=generator), "clips": [f"clip {index}.{row}" for row in range(8)]}
            index += 1

    def size(self, batch: Batch) -> int:
        return batch["x"].shape[0]

    def validate(self) -> Mapping[str, float]:
        torch.randn(5)  # a validation may use random numbers, without bending the training
        x = torch.linspace(-1, 1, 30).reshape(10, 3)
        self.validated.append(self.model[0].weight.detach().clone())
        return {"loss": float((self.model(x) - 2 * x).pow(2).mean())}

    def export(self, folder: Path) -> None:
        if self.fail_export:
            (folder / "half").write_text("written before the disk was full")
            raise OSError(28, "No space left on device")
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")

    def samples(self) -> Sequence[Sample]:
        return [Sample(name="tone", waveform=torch.sin(torch.arange(4000) / 10.0), sample_rate_hz=24000)]
