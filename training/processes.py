"""Several processes that share out work which is not training: who they are, what they tell each other, how they end.

They are found as `training.loop` finds them: started by `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.loading import resolve_device

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


@contextlib.contextmanager
def joined(device: str | None = "cpu") -> Iterator[Processes]:
    """The processes of this launch, until the end of the block; one without a launcher.

    Args:
        device: As `resolve_device` takes it; on several GPUs, each process has its own.

    Raises:
        UserError: a device that is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=device)
        return
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.cuda.is_available() or (device is not None and not device.startswith("cuda"))
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
    try:
        with processes.agreed():
            resolve_device(device)
        yield processes
    finally:
        accelerator.end_training()
