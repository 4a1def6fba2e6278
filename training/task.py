"""What the loop trains: a task owns its modules, its batches and its losses; the loop owns everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Batch = dict[str, Any]
"""Tensors by name. The loop moves them to the device. The turns of one step share the very dict, so that an earlier
turn may leave something (a detached fake waveform, say) for a later one. `clips`, a list of names, is told of a batch
whose loss is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Audio for a listener; the loop writes it and its spectrogram to TensorBoard and to the run's folder."""

    name: str
    """Tag in TensorBoard, such as `reconstruction/0`."""
    waveform: Float[Tensor, " S"]
    sample_rate_hz: int


@runtime_checkable
class Task(Protocol):
    """One kind of training (a tokenizer, a language model).

    All randomness of `loss` comes from the given generator (on the modules' device) or from torch's global
    generators; the loop seeds both from (seed, step, micro-batch, rank) alone, so that a resumed run equals an
    uninterrupted one. All turns of one step see the same seeds.
    """

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules by name, one optimizer each. `model` is the one averaged (EMA), exported and shown as the result."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """Names of the modules updated at this step (0-based), in order. During a turn only that module's parameters
        require gradients."""
        ...

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Scalar loss to minimise in this turn, and figures for the log (detached scalars, named `part` or
        `group/part`). Runs under autocast."""
        ...

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Endless, deterministic batches of the training data of this rank, on the CPU, without the first `skip`.

        Called once per run; runs in a thread of its own."""
        ...

    def size(self, batch: Batch) -> int:
        """Frames in the batch, for the speed shown."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Figures on held-out data, `loss` among them (lower is better: it decides which model is the best).

        Runs in evaluation mode, without gradients, with the averaged weights of `model` swapped in."""
        ...

    def export(self, folder: Path) -> None:
        """Write the releasable model folder into the existing, empty `folder` (averaged weights are swapped in)."""
        ...

    def samples(self) -> Sequence[Sample]:
        """Audio for TensorBoard, made under the conditions of `validate`."""
        ...
