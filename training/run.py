"""`hybridlm train CONFIG.yaml [key=value ...] [--resume]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.config import RunConfig, apply_overrides, read_yaml, resolve
from training.loop import RunResult, fit
from training.processes import before_joining, leave
from training.task import Task

if TYPE_CHECKING:
    from training.listening import Sampler


def train(
    config_path: str | Path, overrides: Sequence[str] = (), resume: bool = False, sampler: Sampler | None = None
) -> RunResult:
    """Train what the YAML file describes.

    Args:
        config_path: Settings (`training.config.RunConfig`).
        overrides: `key.sub=value`, values in YAML.
        resume: Go on from the newest checkpoint of the output folder.
        sampler: How a language model is made to sound for TensorBoard; training itself does not know sampling.

    Raises:
        UserError: bad settings, data or output.
    """
    try:
        with before_joining():
            mapping = apply_overrides(read_yaml(config_path), overrides)
        return train_mapping(mapping, str(config_path), resume, sampler)
    finally:
        leave()


def train_mapping(
    mapping: dict[str, Any], where: str, resume: bool = False, sampler: Sampler | None = None
) -> RunResult:
    """As `train`, from settings already read; `where` names them in messages."""
    with before_joining():
        config, make = task_parts(str(mapping.get("task")))
        run, task_config, resolved = resolve(mapping, config, where=where)
        torch.manual_seed(run.seed)
        task = make(task_config, run, sampler)
    return fit(task, run, resolved, resume=resume)


def task_parts(name: str) -> tuple[type, Callable[[Any, RunConfig, Sampler | None], Task]]:
    """The settings of a task and what makes it of them; a task's modules are imported when it is asked for."""
    if name == "tokenizer":
        from training.tokenizer_task import TokenizerTask, TokenizerTaskConfig

        return TokenizerTaskConfig, lambda config, run, sampler: TokenizerTask(config)
    if name == "masked_spectrogram":
        from training.masked_spectrogram import MaskedSpectrogramConfig, MaskedSpectrogramTask

        return MaskedSpectrogramConfig, lambda config, run, sampler: MaskedSpectrogramTask(config)
    if name == "dasheng":
        from training.dasheng_task import DashengTask, DashengTaskConfig

        return DashengTaskConfig, lambda config, run, sampler: DashengTask(config)
    if name == "representation":
        from training.representation_task import RepresentationTask, RepresentationTaskConfig

        return RepresentationTaskConfig, lambda config, run, sampler: RepresentationTask(config)
    if name == "enhancement":
        from training.enhancement_task import EnhancementTask, EnhancementTaskConfig

        return EnhancementTaskConfig, lambda config, run, sampler: EnhancementTask(config)
    if name == "text":
        from training.text_task import TextTask, TextTaskConfig

        return TextTaskConfig, lambda config, run, sampler: TextTask(config, output=Path(run.output))
    from training.language_task import LanguageTask, LanguageTaskConfig

    return LanguageTaskConfig, lambda config, run, sampler: LanguageTask(
        config, sampler=sampler, output=Path(run.output)
    )
