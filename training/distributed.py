"""One run on many processes: all that the loop need not know of how they share a model.

`Replicas` is one process, or several that hold the whole model each and average their gradients (DDP). What the loop
asks of a backend is what it asks of `Replicas`: the loss of a micro-batch, its gradients, an update, and the whole
model where a person or a file is to see it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from tokenizer.errors import UserError
from training.config import OptimizerConfig
from training.optimizer import AveragedWeights, gradient_norm, load_optimizer_state, make_optimizer, optimizer_state
from training.processes import Processes, find_processes, on_cpu
from training.state import module_state
from training.task import Batch, Task

Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]


class Replicas:
    """Every process holds every weight.

    Args:
        accelerator: The processes.
        dtype: Of autocast; None: fp32 throughout.
    """

    compiles = True
    """Whether layers can be compiled under it."""
    limits_norm = True
    """Whether it knows a gradient's norm before it makes the update."""

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype | None) -> None:
        self.accelerator, self.dtype = accelerator, dtype
        self.device: torch.device = accelerator.device
        self.is_main: bool = accelerator.is_main_process
        self.rank: int = accelerator.process_index
        self.num_processes: int = accelerator.num_processes
        self.processes = Processes(self.rank, self.num_processes, self.device)
        self.warnings: list[str] = []
        """Settings that are not in force, and why."""

    @property
    def name(self) -> str:
        """For people."""
        return "DDP" if self.num_processes > 1 else "one process"

    # Before the first step

    def place(self, modules: Modules) -> None:
        """Move modules, still whole, to where they are filled with weights."""
        for module in modules.values():
            module.to(self.device)

    def check(self, modules: Modules) -> None:
        """Whether it can train them.

        Raises:
            UserError: it cannot.
        """

    def prepare(
        self, task: Task, modules: Modules, optimizer_config: Callable[[str], OptimizerConfig]
    ) -> dict[str, torch.optim.Optimizer]:
        """Take filled modules over from the main process, share them out, and make their optimizers."""
        self.task = task
        self._broadcast(modules, parameters=True)
        return {name: make_optimizer(module, optimizer_config(name)) for name, module in modules.items()}

    # Steps

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """As `Task.loss`, under autocast."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.task.loss(turn, batch, step=step, generator=generator)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` says that the update follows."""
        self.accelerator.backward(loss)

    def update(
        self,
        turn: str,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        total: Tensor,
        max_grad_norm: float,
        norm_limit: float = math.inf,
    ) -> tuple[Tensor, bool]:
        """One update from the mean of the processes' gradients, unless loss or gradient is not finite.

        Args:
            turn: The module.
            parameters: All of it that is trained.
            optimizer: Its optimizer.
            total: This process's loss.
            max_grad_norm: Norm to which the mean gradient is clipped; 0: not at all.
            norm_limit: Norm above which there is no update, if the backend `limits_norm`.

        Returns:
            The norm before clipping, and whether there was an update.
        """
        total, norm = self._average_gradients(turn, parameters, total, max_grad_norm)
        healthy = bool(torch.isfinite(total) and torch.isfinite(norm) and norm <= norm_limit)
        if healthy:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, healthy

    def _average_gradients(
        self, turn: str, trained: list[nn.Parameter], total: Tensor, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Mean of loss and gradients over the processes, in one exchange; then clip.

        Tasks call many methods of their modules, not `forward` alone, which a wrapped module would not see.
        """
        parameters = [p for p in trained if p.grad is not None]
        if self.num_processes > 1:
            parameters = trained
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat = torch.cat([total.reshape(1), *(p.grad.reshape(-1) for p in parameters)])  # type: ignore[union-attr]
            flat = self.accelerator.reduce(flat, "mean")
            total, offset = flat[0], 1
            for p in parameters:
                p.grad = flat[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
        if not parameters:
            raise UserError(f"the loss of '{turn}' reaches none of its weights; check what is frozen")
        return total, gradient_norm(parameters, max_grad_norm)

    def mean(self, value: Tensor) -> float:
        """Over all processes."""
        return float(value if self.num_processes == 1 else self.accelerator.reduce(value.detach().clone(), "mean"))

    def agreed(self, holds: bool) -> bool:
        """Whether it holds on any process: all must take the same way."""
        if self.num_processes == 1:
            return holds
        return bool(self.accelerator.reduce(torch.tensor(float(holds), device=self.device), "sum") > 0)

    def everybody(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return self.processes.gather(value)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def share_buffers(self, modules: Modules) -> None:
        """Hand out the main process's buffers (running statistics)."""
        self._broadcast(modules, parameters=False)

    def _broadcast(self, modules: Modules, *, parameters: bool) -> None:
        if self.num_processes == 1:
            return
        with torch.no_grad():
            for module in modules.values():
                for tensor in (*(module.parameters() if parameters else ()), *module.buffers()):
                    tensor.copy_(broadcast(tensor.detach().to(self.device, copy=True)))

    # The whole model

    def averages(self, module: nn.Module, decay: float) -> AveragedWeights:
        """Averages of what this process holds of the module."""
        return AveragedWeights(module, decay, held=self._held)

    @contextlib.contextmanager
    def whole(self, modules: Modules, ema: AveragedWeights | None) -> Iterator[None]:
        """Within the block, which all processes enter, the main one's modules are whole, with averaged weights."""
        with ema.swapped_in() if ema else contextlib.nullcontext():
            yield

    def states(
        self, modules: Modules, optimizers: Optimizers, ema: AveragedWeights | None
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """The files of a checkpoint by stem, each whole on the main process; all processes go through them together."""
        for name, module in modules.items():
            yield name, self._module_state(module)
            yield f"optimizer_{name}", self._optimizer_state(module, optimizers[name])
        if ema is not None:
            parameters = dict(modules["model"].named_parameters())
            yield "ema", {name: self._full(parameters[name], held) for name, held in ema.state().items()}

    def load_optimizer(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Fill an optimizer with the state of another run, whatever the number of its processes.

        Raises:
            KeyError: an entry belongs to no parameter of the module.
        """
        load_optimizer_state(module, optimizer, state)

    def load_averages(
        self, module: nn.Module, ema: AveragedWeights, state: Iterable[tuple[str, Tensor]], updates: int
    ) -> None:
        """Fill averages.

        Raises:
            KeyError: a parameter has no average.
        """
        parameters = dict(module.named_parameters())
        ema.load_state({name: self._share(parameters[name], tensor) for name, tensor in state}, updates)

    def _module_state(self, module: nn.Module) -> Mapping[str, Tensor]:
        return module_state(module)

    def _optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        return optimizer_state(module, optimizer)

    def _held(self, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a parameter."""
        return parameter

    def _full(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """What all processes hold, put together."""
        return held

    def _share(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """The inverse of `_full`: this process's share of a whole tensor."""
        return full


def open_backend(device: str, autocast: Callable[[torch.device], torch.dtype | None]) -> Replicas:
    """Join the processes that accelerate or torchrun started, in the way that their environment asks for.

    Args:
        device: `auto`, `cpu` or `cuda`.
        autocast: The precision on a device.

    Raises:
        UserError: no such device, or a backend that cannot be had.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine has no CUDA device that PyTorch can use; set device=cpu")
    if _asked("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported; launch with one of configs/accelerate/")
    cpu = on_cpu(device)
    kind: type[Replicas] = Replicas
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        kind = _deepspeed(cpu or not torch.cuda.is_available())
        cpu = False  # accelerate would leave DeepSpeed out
    elif _asked("ACCELERATE_USE_FSDP"):
        kind = _fsdp()
    accelerator = find_processes(cpu=cpu)
    backend = kind(accelerator, autocast(accelerator.device))
    for variable, off, asked in (
        ("ACCELERATE_MIXED_PRECISION", "no", "mixed_precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "no", "dynamo_backend"),
    ):
        value = os.environ.get(variable, off).lower()
        if value != off:
            backend.warnings.append(f"accelerate's {asked}={value} is not used; the run's own settings decide")
    return backend


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _deepspeed(cpu: bool) -> type[Replicas]:
    try:
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            PartialState(cpu=True)  # made here, it counts all processes; made by an Accelerator with DeepSpeed, one
        import deepspeed  # noqa: F401

        from training.zero import ZeRO
    except ImportError as error:
        raise UserError("DeepSpeed is asked for, but not installed; pip install 'hybridlm[deepspeed]'") from error
    return ZeRO


def _fsdp() -> type[Replicas]:
    try:
        from training.fsdp import FSDP2
    except ImportError as error:
        raise UserError(f"FSDP2 needs PyTorch 2.6 or newer, this is {torch.__version__}; use ddp.yaml") from error
    return FSDP2


def on_any_process(holds: bool, device: torch.device) -> bool:
    """Whether it holds on any process of a run: for a loss, whose parts all processes must compute if one does.

    ZeRO adds gradients up in the order in which they come, so all processes need the same graph.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return holds
    flag = torch.tensor(float(holds), device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)
