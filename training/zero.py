"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients too (2), weights too (3) shared out among the processes.

Weights and gradients are fp32 with autocast around the loss, as everywhere here. DeepSpeed keeps a flat share of the
weights a process and parameter group, and steps our AdamW over it; it clips, and skips a step whose gradient norm is
not finite. A file gets the state by parameter, in full.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.errors import UserError
from training.config import OptimizerConfig
from training.optimizer import make_optimizer
from training.sharded import Sharded

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000
"""Gradients that are exchanged at once, by DeepSpeed's default; they take this memory even if a model has fewer."""
MAX_LIVE = 1_000_000_000
"""Weights of others that stage 3 keeps between their uses, by DeepSpeed's default."""


class ZeRO(Sharded):
    """See `training.distributed.Replicas`; accelerate's plugin says which stage, and what is kept in main memory."""

    engine: Any
    limits_norm = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On CPUs a C++ extension would be compiled while the processes start, and one that is killed leaves it locked.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._version = deepspeed.__version__
        self._settings: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.stage = usable_stage(self._settings)
        self.partitions_weights = self.stage == 3
        self.compiles = self.stage < 3

    @property
    def name(self) -> str:
        words = {"optimizer": "optimizer state", "param": "weights"}
        kept = [words[part] for part, place in places(self._settings).items() if place != "none"]
        kept_text = f", {' and '.join(kept)} in main memory" if kept else ""
        return f"ZeRO-{self.stage} (DeepSpeed {self._version}{kept_text})"

    def _shard(self, module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        for name, own in (("gradient_accumulation_steps", 1), ("gradient_clipping", config.max_grad_norm)):
            if self._settings.get(name, "auto") not in ("auto", own):
                self.warnings.append(
                    f"DeepSpeed's {name}={self._settings[name]} is not used; the run's settings decide"
                )
        self._settings |= {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed would have the number; only its own loader uses it
            "gradient_accumulation_steps": 1,  # `backward` says where a step ends
            "gradient_clipping": config.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on CPUs, and need not be compiled
        }
        zero = self._settings["zero_optimization"]
        if own_bucket := zero.get("reduce_bucket_size", "auto") == "auto":
            zero["reduce_bucket_size"] = min(BUCKET, sum(p.numel() for p in module.parameters()))
        self.engine, _ = self.accelerator.prepare(self.task_loss, make_optimizer(module, config))
        if own_bucket:
            del zero["reduce_bucket_size"]  # accelerate keeps the settings for another model of this process
        self._zero = self.engine.optimizer
        if self.partitions_weights:
            self._gather_for_methods(module)
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        for share in self._shares:
            # As AdamW would at its first step: DeepSpeed ties parameters to the state of the first group alone.
            moments = {entry: torch.zeros_like(share) for entry in MOMENTS}
            optimizer.state[share] = {"step": torch.zeros((), device=share.device), **moments}
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        return optimizer

    @property
    def _shares(self) -> list[Tensor]:
        """The flat fp32 weights that this process steps."""
        zero = self._zero
        shares: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return shares

    def _gather_for_methods(self, module: nn.Module) -> None:
        """Have weights that a module of ours holds itself at hand during the whole loss.

        DeepSpeed hands weights out around the forward of the module that holds them; a method other than `forward`
        (`CodeHead.score`, `Glance.move`) may find its own ones empty.
        """
        from deepspeed import zero

        for part in module.modules():
            if not type(part).__module__.startswith("torch.nn."):
                for parameter in part.parameters(recurse=False):
                    zero.register_external_parameter(self.task_loss, parameter)

    def _call(self) -> Tensor:
        loss: Tensor = self.engine()
        return loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def update(
        self,
        turn: str,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        total: Tensor,
        max_grad_norm: float,
        norm_limit: float = math.inf,
    ) -> tuple[Tensor, bool]:
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        return norm, bool(self.engine.was_step_applied())

    # Stage 3: every process holds a flat share of each weight, the last one padded

    def _held(self, parameter: nn.Parameter) -> Tensor:
        return parameter.ds_tensor if self.partitions_weights else parameter  # type: ignore[attr-defined,no-any-return]

    def _full(self, parameter: Any, held: Tensor) -> Tensor:
        if not self.partitions_weights:
            return held
        shares = torch.empty(self.num_processes * held.numel(), dtype=held.dtype, device=self.device)
        torch.distributed.all_gather_into_tensor(shares, held.detach().to(self.device).contiguous())
        return shares[: parameter.ds_numel].view(parameter.ds_shape)

    def _share(self, parameter: Any, full: Tensor) -> Tensor:
        if not self.partitions_weights:
            return full
        size = parameter.ds_tensor.numel()
        share = full.new_zeros(size)
        mine = full.flatten()[self.rank * size : (self.rank + 1) * size]
        share[: mine.numel()] = mine
        return share

    # Optimizer

    def _optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = optimizer.state[self._shares[0]]["step"]
        flat: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                for entry in MOMENTS:
                    flat[f"{name}:{entry}"] = self._kept(safe_get_full_optimizer_state(parameter, entry))
                flat[f"{name}:step"] = step
        return flat

    def load_optimizer(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: Iterable[tuple[str, Tensor]]
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameters = dict(module.named_parameters())
        step = 0.0
        for key, value in state:
            name, _, entry = key.rpartition(":")
            parameter = parameters[name]
            if entry == "step":
                step = max(step, float(value))  # one count for all: DeepSpeed steps whole groups
            elif self.stage == 3:
                safe_set_local_optimizer_state(parameter, self._share(parameter, value), entry)
            else:
                safe_set_full_optimizer_state(parameter, value, entry)
        for share in self._shares:
            optimizer.state[share]["step"].fill_(step)


def usable_stage(settings: Mapping[str, Any]) -> int:
    """The stage that DeepSpeed's settings ask for.

    Raises:
        UserError: something in them that a run here cannot have.
    """
    stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    if stage not in (1, 2, 3):
        raise UserError(f"zero_stage={stage} shares nothing out; set 1, 2 or 3, or use configs/accelerate/ddp.yaml")
    if "nvme" in places(settings).values():
        raise UserError("offloading to nvme is not supported, for checkpoints read the state in memory; use cpu")
    for kind in ("fp16", "bf16"):
        if settings.get(kind, {}).get("enabled") is True:
            raise UserError(
                f"DeepSpeed's {kind} would change the weights themselves; leave it out, for the run's setting "
                "`precision` decides"
            )
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UserError(
                f"DeepSpeed's section '{section}' is not supported; leave it out, for the run's setting `optimizer` "
                "decides"
            )
    return stage


def places(settings: Mapping[str, Any]) -> dict[str, str]:
    """Where the optimizer's state and the weights are kept; `none` is the device itself."""
    zero = settings["zero_optimization"]
    return {part: zero.get(f"offload_{part}", {}).get("device", "none") for part in ("optimizer", "param")}
