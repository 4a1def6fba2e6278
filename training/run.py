"""`hybridlm train CONFIG.yaml [key=value ...] [--resume]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.config import apply_overrides, read_yaml, resolve
from training.loop import RunResult, fit
from training.task import Task

if TYPE_CHECKING:
    from training.language_task import Sampler


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
    return train_mapping(apply_overrides(read_yaml(config_path), overrides), str(config_path), resume, sampler)


def train_mapping(
    mapping: dict[str, Any], where: str, resume: bool = False, sampler: Sampler | None = None
) -> RunResult:
    """As `train`, from settings already read; `where` names them in messages."""
    run, settings, resolved = resolve(mapping, task_config(mapping.get("task")), where=where)
    torch.manual_seed(run.seed)
    task: Task
    if run.task == "tokenizer":
        from training.tokenizer_task import TokenizerTask

        task = TokenizerTask(settings)
    elif run.task == "masked_spectrogram":
        from training.masked_spectrogram import MaskedSpectrogramTask

        task = MaskedSpectrogramTask(settings)
    elif run.task == "dasheng":
        from training.dasheng_task import DashengTask

        task = DashengTask(settings)
    else:
        from training.language_task import LanguageTask

        task = LanguageTask(settings, sampler=sampler, output=Path(run.output))
    return fit(task, run, resolved, resume=resume)


def task_config(task: object) -> type[Any]:
    """The dataclass of a task's own settings; `language`'s for an unknown task, which `resolve` then refuses."""
    if task == "tokenizer":
        from training.tokenizer_task import TokenizerTaskConfig

        return TokenizerTaskConfig
    if task == "masked_spectrogram":
        from training.masked_spectrogram import MaskedSpectrogramConfig

        return MaskedSpectrogramConfig
    if task == "dasheng":
        from training.dasheng_task import DashengTaskConfig

        return DashengTaskConfig
    from training.language_task import LanguageTaskConfig

    return LanguageTaskConfig
