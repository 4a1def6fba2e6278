"""FSDP2 (`fully_shard`): weights, gradients and optimizer state shared out among the processes, unit by unit.

accelerate's plugin says which layers are units, gathered one at a time; everything else is one unit, gathered for the
whole loss. Our own AdamW steps over the shares. accelerate itself starts FSDP2 on GPUs alone; the call below is all
that it would do for us, and runs on CPUs too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenizer.errors import UserError
from training.config import OptimizerConfig
from training.optimizer import make_optimizer, optimizer_state
from training.sharded import Sharded


class FSDP2(Sharded):
    """See `training.distributed.Replicas`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._plugin = FullyShardedDataParallelPlugin()
        if self._plugin.fsdp_version != 2:
            raise UserError("fsdp_version=1 is not supported; set it to 2, as configs/accelerate/fsdp2.yaml does")
        if self._plugin.activation_checkpointing:
            self.warnings.append(
                "accelerate's fsdp_activation_checkpointing is not used; the run's own gradient_checkpointing decides"
            )
        self._units: list[nn.Module] = []

    @property
    def name(self) -> str:
        return f"FSDP2 ({len(self._units)} layers gathered one by one)"

    def _shard(self, module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        names = set(self._plugin.transformer_cls_names_to_wrap or ())
        self._units = [part for part in module.modules() if type(part).__name__ in names]
        if not self._units:
            self.warnings.append(
                "all weights are gathered at once: fsdp_transformer_layer_cls_to_wrap names no layer of this model"
            )
        inside = {parameter for unit in self._units for parameter in unit.parameters()}
        # Processes add gradients up weight by weight, and a batch may use fewer of them; layers are always used whole.
        self.task_loss.reached = [
            (part, name)
            for part in module.modules()
            for name, parameter in part.named_parameters(recurse=False)
            if parameter not in inside and parameter.requires_grad
        ]
        mesh, policy = init_device_mesh(self.device.type, (self.num_processes,)), self._plugin.cpu_offload
        for unit in reversed(self._units):  # inner ones first
            again = self._plugin.reshard_after_forward
            fully_shard(unit, mesh=mesh, reshard_after_forward=again, offload_policy=policy)
        fully_shard(self.task_loss, mesh=mesh, offload_policy=policy)
        return make_optimizer(module, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(
        self,
        turn: str,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        total: Tensor,
        max_grad_norm: float,
        norm_limit: float = math.inf,
    ) -> tuple[Tensor, bool]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        healthy = bool(norm.isfinite() and norm <= norm_limit)
        if healthy:
            if max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, healthy

    def _full(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        return held.full_tensor() if isinstance(held, DTensor) else held

    def _share(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        where = parameter.to_local().device
        return distribute_tensor(full.to(where), parameter.device_mesh, parameter.placements, src_data_rank=None)

    def _optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        parameters = dict(module.named_parameters())
        return {
            key: self._kept(self._full(parameters[key.rpartition(":")[0]], held))
            for key, held in optimizer_state(module, optimizer).items()
        }

    def load_optimizer(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: Iterable[tuple[str, Tensor]]
    ) -> None:
        parameters = dict(module.named_parameters())

        def shares() -> Iterable[tuple[str, Tensor]]:
            for key, value in state:
                name, _, entry = key.rpartition(":")
                yield key, value if entry == "step" else self._share(parameters[name], value)

        super().load_optimizer(module, optimizer, shares())
