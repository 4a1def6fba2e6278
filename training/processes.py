"""Several processes that share out work: how they find one another, what they tell each other, how they part.

A launcher starts them (`accelerate launch` or `torchrun`). `training.distributed` builds on this what training needs
besides: who holds which weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.loading import resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
PATIENCE = timedelta(days=1)
"""How long one process waits for another that has more to do."""


class Processes:
    """One process among `count`.

    Args:
        rank: Its number; 0 speaks for all.
        count: How many there are.
        device: Where this one computes; None for CUDA where there is one.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str | torch.device | None = "cpu") -> None:
        self.rank, self.count, self.device = rank, count, device

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, in order of their ranks, on all of them."""
        if self.count == 1:
            return [item]
        from accelerate.utils import gather_object

        return list(gather_object([item]))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on all of them."""
        return torch.stack(self.gather(tensor)).sum(dim=0)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What follows succeeds on all processes or ends all of them.

        Raises:
            UserError: on the first process, what went wrong on any. The others leave quietly and with status 0: a
                launcher kills the rest at the first failure, which might be before the line is out.
        """
        problem: Exception | None = None
        try:
            yield
        except (UserError, OSError) as error:
            if self.count == 1:
                raise
            problem = error
        if self.count == 1:
            return
        told = [message for message in self.gather(None if problem is None else str(problem)) if message is not None]
        if told and self.rank == 0:
            raise UserError(told[0]) from problem
        if told:
            raise SystemExit(0)


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu(device: str | None) -> bool:
    """Whether accelerate has to be told that these processes compute on CPUs.

    Several without GPUs talk to each other only if it is told that they have none.

    Args:
        device: As `resolve_device` takes it, or `auto`.
    """
    asked = device not in (None, "auto") and not str(device).startswith("cuda")
    return asked or not (launched() == 1 or torch.cuda.is_available())


@contextlib.contextmanager
def before_joining() -> Iterator[None]:
    """What each process of a launch does by itself before they join; if it fails on one, it ends all of them.

    The first that the processes tell each other after they have joined must be whether all is well
    (`Processes.agreed`): one that fails here joins for that alone.

    Raises:
        UserError: see `Processes.agreed`.
    """
    try:
        yield
    except (UserError, OSError):
        if launched() == 1:
            raise
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu(None))
        with Processes(state.process_index, state.num_processes, state.device).agreed():
            raise


def find_processes(*, cpu: bool, patience: timedelta | None = None) -> Accelerator:
    """Join the others of this launch.

    Args:
        cpu: See `on_cpu`.
        patience: How long one waits for another; None: as long as PyTorch would.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    handlers = [] if patience is None else [InitProcessGroupKwargs(timeout=patience)]
    # Precision is a run's own setting, and a gradient scaler would hide what is not finite.
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)


@contextlib.contextmanager
def joined(device: str | None = "cpu") -> Iterator[Processes]:
    """The processes of this launch, until the end of the block; one without a launcher.

    Args:
        device: As `resolve_device` takes it; on several GPUs, each process has its own.

    Raises:
        UserError: a device that is not there.
    """
    if launched() == 1:
        yield Processes(device=device)
        return
    accelerator = find_processes(cpu=on_cpu(device), patience=PATIENCE)
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
    try:
        with processes.agreed():
            resolve_device(device)
        yield processes
    finally:
        leave()


def leave() -> None:
    """Part from the other processes, if there are any; a process that ends without it may hang or crash."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
