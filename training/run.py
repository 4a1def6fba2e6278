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
    task: Task
    if mapping.get("task") == "tokenizer":
        from training.tokenizer_task import TokenizerTask, TokenizerTaskConfig

        run, task_config, resolved = resolve(mapping, TokenizerTaskConfig, where=where)
        torch.manual_seed(run.seed)
        task = TokenizerTask(task_config)
    elif mapping.get("task") == "representation":
        from training.representation_task import RepresentationTask, RepresentationTaskConfig

        run, task_config, resolved = resolve(mapping, RepresentationTaskConfig, where=where)
        torch.manual_seed(run.seed)
        task = RepresentationTask(task_config)
    elif mapping.get("task") == "text":
        from training.text_task import TextTask, TextTaskConfig

        run, task_config, resolved = resolve(mapping, TextTaskConfig, where=where)
        torch.manual_seed(run.seed)
        task = TextTask(task_config, output=Path(run.output))
    else:
        from training.language_task import LanguageTask, LanguageTaskConfig

        run, task_config, resolved = resolve(mapping, LanguageTaskConfig, where=where)
        torch.manual_seed(run.seed)
        task = LanguageTask(task_config, sampler=sampler, output=Path(run.output))
    return fit(task, run, resolved, resume=resume)
