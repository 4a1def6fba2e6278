"""AdamW with decay groups, the schedule of its learning rate, gradient clipping and averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokenizer.errors import UserError
from training.config import OptimizerConfig

RATE_FACTOR = "rate_factor"
"""A group's share of the learning rate."""


@runtime_checkable
class Widened(Protocol):
    """A module whose layers within want a lower learning rate the wider they are; `HybridLM` is one."""

    @property
    def width(self) -> int: ...

    def hidden_matrices(self) -> Iterable[nn.Parameter]: ...


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients: matrices decay; gains, biases and norms do not.

    Raises:
        UserError: `base_width` is given for a module that has no width.
    """
    hidden, factor = _hidden(module, config)
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if decays(p)]
    vectors = [p for p in parameters if not decays(p)]
    groups = [
        {"params": [p for p in matrices if id(p) not in hidden], "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [p for p in matrices if id(p) in hidden], "weight_decay": config.weight_decay, RATE_FACTOR: factor},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def _hidden(module: nn.Module, config: OptimizerConfig) -> tuple[set[int], float]:
    """The matrices, by id, whose rate depends on the width, and their share of the learning rate."""
    if config.base_width is None:
        return set(), 1.0
    if not isinstance(module, Widened):
        raise UserError(
            f"optimizer.base_width={config.base_width} is for language models, and {type(module).__name__} is none; "
            "leave it out"
        )
    return {id(parameter) for parameter in module.hidden_matrices()}, config.base_width / module.width


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Have the next update made at `rate`, and in groups with a factor at that share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


def decays(parameter: Tensor) -> bool:
    """Whether the parameter mixes inputs; the gain of a weight normalization, (C, 1, 1), does not."""
    return parameter.ndim >= 2 and parameter.numel() > parameter.shape[0]


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear warm-up, then half a cosine to `final_ratio` of the peak.

    Args:
        config: The peak, the warm-up and the final ratio.
        step: Updates already made.
        max_steps: Updates of the whole run.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)


def gradient_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Global norm of the gradients before clipping; clips them in place to `max_norm` unless that is 0."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State by parameter name, flat, so that safetensors can hold it: `<parameter>:<entry>`."""
    flat = {}
    for name, parameter in module.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}:{entry}"] = value
    return flat


def load_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, flat: Iterable[tuple[str, Tensor]]
) -> None:
    """The inverse of `optimizer_state`, entry by entry.

    Raises:
        KeyError: an entry belongs to no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    for key, value in flat:
        name, _, entry = key.rpartition(":")
        parameter = parameters[name]
        device = parameter.device if entry != "step" or parameter.device.type == "cuda" else torch.device("cpu")
        optimizer.state[parameter][entry] = value.to(device)


class AveragedWeights:
    """Exponential moving average of a module's parameters, in fp32; buffers are taken as they are.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first random weights are soon
    forgotten.

    Args:
        module: What is averaged.
        decay: The largest.
        held: What of a parameter is kept here and moves with it, where processes share the module out.
    """

    def __init__(
        self, module: nn.Module, decay: float, held: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter
    ) -> None:
        self.decay = decay
        self.updates = 0
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters = [held(parameter) for _, parameter in module.named_parameters()]
        self._averages = [parameter.detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._averages, [p.detach().float() for p in self._parameters], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._averages, strict=True))

    def load_state(self, state: dict[str, Tensor], updates: int) -> None:
        """Raises KeyError when a parameter has no average."""
        self.updates = updates
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])

    def _swap(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._averages[index] = self._averages[index], parameter.data
