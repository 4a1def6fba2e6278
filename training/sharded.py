"""What ZeRO and FSDP2 have in common: weights, or what belongs to them, shared out among the processes.

Both act around the forward of a module, but a task calls many methods of its module; so the task's whole loss becomes
the forward of one module (`TaskLoss`). Where a person or a file is to see the model, the main process holds it whole
for a while, as a plain module (`Sharded.whole`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.errors import UserError
from training.config import OptimizerConfig
from training.distributed import Modules, Replicas
from training.optimizer import AveragedWeights
from training.task import Batch, Task

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class TaskLoss(nn.Module):
    """A task's loss as a forward without arguments: those that wrap a module would scan, copy or cast them."""

    def __init__(self, task: Task, modules: Modules, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.task, self.dtype = task, dtype
        self.parts = nn.ModuleDict(modules)
        self.arguments: tuple[str, Batch, int, torch.Generator]
        """Set before a call: turn, batch, step, generator."""
        self.figures: Mapping[str, Tensor | float] = {}
        """Set by a call, beside the loss that it returns."""
        self.reached: list[tuple[nn.Module, str]] = []
        """Weights, by their module and name, that get a gradient from every batch, were it zero."""

    def forward(self) -> Tensor:
        turn, batch, step, generator = self.arguments
        with torch.autocast(generator.device.type, self.dtype, enabled=self.dtype is not None):
            loss, self.figures = self.task.loss(turn, batch, step=step, generator=generator)
        for part, name in self.reached:
            loss = loss + getattr(part, name).flatten()[:0].sum()
        return loss


class Sharded(Replicas, ABC):
    """A backend that takes over the one module of a task."""

    partitions_weights = True
    """Whether a process holds a part of the weights alone."""
    task_loss: TaskLoss

    def place(self, modules: Modules) -> None:
        """Whole modules stay in main memory, where a model has room that has none on one device."""

    def check(self, modules: Modules) -> None:
        if len(modules) > 1:
            raise UserError(
                f"{self.name} trains one module with one optimizer, but this task has {len(modules)}: "
                f"{', '.join(modules)}; use configs/accelerate/ddp.yaml, or switch the adversary's losses off"
            )

    def prepare(
        self, task: Task, modules: Modules, optimizer_config: Callable[[str], OptimizerConfig]
    ) -> dict[str, torch.optim.Optimizer]:
        self._broadcast(modules, parameters=True)
        self.task_loss = TaskLoss(task, modules, self.dtype)
        ((name, module),) = modules.items()
        self._plain = [
            (part, part.__class__, {hooks: getattr(part, hooks).copy() for hooks in HOOKS}) for part in module.modules()
        ]
        return {name: self._shard(module, optimizer_config(name))}

    @abstractmethod
    def _shard(self, module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Share out `task_loss`, whose part `module` is, and make the optimizer."""

    def _call(self) -> Tensor:
        return self.task_loss()

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        self.task_loss.arguments = (turn, batch, step, generator)
        loss = self._call()
        # A loss that is not finite must spoil the gradients of all processes, so that all skip the step.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), self.task_loss.figures

    @contextlib.contextmanager
    def whole(self, modules: Modules, ema: AveragedWeights | None) -> Iterator[None]:
        if not self.partitions_weights:
            with super().whole(modules, ema):
                yield
            return
        full = {}
        for module in modules.values():
            averages = ema.state() if ema is not None else {}
            for name, parameter in module.named_parameters():
                tensor = self._full(parameter, averages.get(name, self._held(parameter)))
                if self.is_main:
                    full[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        with self._plain_modules(full) if self.is_main else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _plain_modules(self, full: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
        """Within the block modules have these weights, and nothing watches their forward."""
        before: list[tuple[nn.Module, dict[str, Any]]] = []
        for part, plain_class, hooks in self._plain:
            before.append((part, {name: getattr(part, name) for name in ("__class__", "_parameters", *HOOKS)}))
            weights = {name: None if p is None else full[p] for name, p in part._parameters.items()}
            for name, value in {"__class__": plain_class, "_parameters": weights, **hooks}.items():
                object.__setattr__(part, name, value)
        try:
            yield
        finally:
            for part, attributes in before:
                for name, value in attributes.items():
                    object.__setattr__(part, name, value)

    def _module_state(self, module: nn.Module) -> Mapping[str, Tensor]:
        found = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
        return {
            name: self._kept(self._full(tensor, self._held(tensor))) if isinstance(tensor, nn.Parameter) else tensor
            for name, tensor in found.items()
        }

    def _kept(self, full: Tensor) -> Tensor:
        """A whole tensor for a file: the device has no room for all of them, and the other processes need none."""
        return full.detach().cpu() if self.is_main else full.new_empty(0)
