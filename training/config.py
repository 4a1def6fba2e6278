"""Settings of a run: the part every task shares. A task's own settings stand beside its code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tokenizer.errors import UserError
from tokenizer.settings import from_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay over the whole run."""

    learning_rate: float = 3e-4
    """Peak, reached after the warm-up."""
    warmup_steps: int = 500
    final_ratio: float = 0.05
    """Learning rate at the last step, as a share of the peak."""
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """On matrices alone; gains, biases and norms never decay."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 switches clipping off."""
    base_width: int | None = None
    """`hidden_dim` of a language model whose decoder's matrices learn at `learning_rate`, as everything else does;
    those of a wider one learn at base_width / hidden_dim of it, so that rates found with a small model suit a large one
    (muP, Yang et al. 2022, arXiv 2203.03466). None: everything learns at one rate, whatever the width."""

    def __post_init__(self) -> None:
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"base_width={self.base_width} must be at least 1: a hidden_dim")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio} must lie in [0, 1]")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.weight_decay < 0 or self.max_grad_norm < 0:
            raise ValueError(
                f"weight_decay={self.weight_decay} and max_grad_norm={self.max_grad_norm} must be at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeConfig:
    """Which steps are skipped although loss and gradient are finite; as it stands, none."""

    loss_deviations: float = 0.0
    """Those whose loss lies more than so many standard deviations above the mean of the latest; 0: none."""
    norm_ratio: float = 0.0
    """Those whose gradient norm is above so many times the median of the latest; 0: none. Not under ZeRO."""
    window: int = 200
    """How many updates are the latest; what was skipped is not among them."""
    min_updates: int = 50
    """Updates before which nothing is skipped."""

    def __post_init__(self) -> None:
        if self.loss_deviations < 0 or 0 < self.norm_ratio <= 1 or self.norm_ratio < 0:
            raise ValueError(
                f"loss_deviations={self.loss_deviations} must be at least 0, norm_ratio={self.norm_ratio} 0 or above 1"
            )
        if not 2 <= self.min_updates <= self.window:
            raise ValueError(f"min_updates={self.min_updates} must lie between 2 and window={self.window}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    task: Literal["tokenizer", "masked_spectrogram", "dasheng", "representation", "enhancement", "text", "language"]
    output: str
    """Folder of the run: `checkpoints/`, `model/` (latest averaged weights), `best/`, `samples/`, `log.jsonl`,
    `tensorboard/`."""
    max_steps: int
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast where the hardware multiplies bf16 natively, fp32 elsewhere. Weights stay fp32."""
    threads: int | None = None
    """CPU threads of PyTorch; None leaves its default."""
    gradient_checkpointing: bool = False
    """Keep the inputs of a language model's layers and heads alone and compute the rest again in the backward pass: the
    same gradients in a fraction of the memory, for about a third more computing."""
    compile: bool = False
    """Compile a language model's layers with `torch.compile`; where that fails, a warning says why. The first steps
    take minutes."""
    accumulate: int = 1
    """Micro-batches a step whose gradients are averaged."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """For every module that `optimizers` does not name."""
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    """Complete settings by module name, such as `discriminator`; what is left out takes the class's default."""
    ema_decay: float = 0.999
    """Of the averaged weights; 0 exports the raw ones."""
    init_from: str | None = None
    """Folder with `model.safetensors` (a model's or a checkpoint's folder) whose weights start the run."""
    init_partial: bool = False
    """Let `init_from` lack weights, or have them in another shape: those start untrained, and the run says which."""
    log_every: int = 20
    validate_every: int = 1000
    validate_first: bool = False
    """Also before the first step, so that the best model is never worse than the one that the run began with."""
    patience: int | None = None
    """Validations in a row without improvement after which the run ends; None: never before `max_steps`."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_bad_steps: int = 10
    """Steps in a row that are skipped, since loss or gradient is not finite or a spike, before the run stops."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    stall_warning_s: float = 60.0
    """Wait for a batch after which a line says where the data thread is; again whenever the wait has doubled."""
    stall_limit_s: float | None = None
    """Wait for a batch after which the run ends; None: never."""
    sample_every: int | None = None
    """Steps between samples, such as clips that a language model makes of held-out texts and tags: `samples/` has them
    as WAV and PNG, boards too. None: with every validation."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases that is told as well (`pip install 'hybridlm[wandb]'`); `WANDB_MODE=offline` keeps it
    on the disk. None: none."""
    tokenizer_task: dict[str, Any] | None = None
    """Settings of `task: tokenizer` (training/tokenizer_task.py)."""
    masked_spectrogram: dict[str, Any] | None = None
    """Settings of `task: masked_spectrogram` (training/masked_spectrogram.py)."""
    dasheng: dict[str, Any] | None = None
    """Settings of `task: dasheng` (training/dasheng_task.py)."""
    language: dict[str, Any] | None = None
    """Settings of `task: language` (training/language_task.py)."""
    representation: dict[str, Any] | None = None
    """Settings of `task: representation` (training/representation_task.py)."""
    enhancement: dict[str, Any] | None = None
    """Settings of `task: enhancement` (training/enhancement_task.py)."""
    text: dict[str, Any] | None = None
    """Settings of `task: text` (training/text_task.py)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        for name in ("stall_warning_s", "stall_limit_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("max_bad_steps", "patience", "sample_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


FREE_ON_RESUME = (
    "accumulate",
    "gradient_checkpointing",
    "compile",
    "output",
    "max_steps",
    "device",
    "precision",
    "threads",
    "log_every",
    "validate_every",
    "validate_first",
    "patience",
    "checkpoint_every",
    "keep_checkpoints",
    "max_bad_steps",
    "spikes",
    "stall_warning_s",
    "stall_limit_s",
    "tensorboard",
    "wandb",
    "sample_every",
    "init_from",
    "init_partial",
    "optimizer",
    "optimizers",
    "ema_decay",
)
"""Settings that a resumed run may change: they bend its course, but leave the saved state meaningful."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping of settings.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; see configs/ for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, but must be a mapping of settings")
    return content


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with `key.sub=value` settings laid over it; values are YAML.

    Raises:
        UserError: an override without `=`, not YAML, or one that reaches into something that is not a mapping.
    """
    result = _copy(mapping)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"override '{override}' must have the form key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override '{override}': the value is not YAML; quote it as key='text'") from error
        here = result
        for depth, part in enumerate(parts[:-1]):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
            if not isinstance(here, dict):
                raise UserError(
                    f"override '{override}': {'.'.join(parts[: depth + 1])} is {here!r}, not a group of settings"
                )
        here[parts[-1]] = value
    return result


def resolve(mapping: Mapping[str, Any], task_config: type, *, where: str) -> tuple[RunConfig, Any, dict[str, Any]]:
    """Check the settings of a run and of its task.

    Args:
        mapping: The settings, overrides applied.
        task_config: Dataclass of the task's settings, found in `mapping` under the task's section.
        where: Name of the settings in messages.

    Returns:
        The run's settings, the task's, and the resolved mapping with every default written out (plain JSON types).
    """
    run = from_mapping(RunConfig, mapping, where=where)
    section = SECTIONS[run.task]
    task: Any = from_mapping(task_config, getattr(run, section) or {}, where=f"{where}: {section}")
    resolved = _plain(dataclasses.asdict(run))
    for other in SECTIONS.values():
        resolved.pop(other)
    resolved[section] = _plain(dataclasses.asdict(task))
    return run, task, resolved


SECTIONS = {
    "tokenizer": "tokenizer_task",
    "masked_spectrogram": "masked_spectrogram",
    "dasheng": "dasheng",
    "representation": "representation",
    "enhancement": "enhancement",
    "text": "text",
    "language": "language",
}
"""Key of each task's own settings: a tokenizer under training would read as the tokenizer in use."""


def changed_keys(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings that differ; one that is new since and switched off does not."""
    names = []
    for key in dict.fromkeys((*saved, *now)):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{key}.{name}" for name in changed_keys(old, new)]
        elif old != new and (key in saved or new not in (None, False, [], {})):
            names.append(key)
    return names


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    """Only what JSON knows: tuples become lists, paths text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
