"""`hybridlm finetune`: go on training a model on someone's recordings, with or without transcripts.

Either all weights move and a model's folder results, or, with LoRA, a small adapter is trained beside them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hybridlm.adapter import LoraConfig, adapter_names, adapter_size, is_adapter, peft_library, save_adapter
from hybridlm.checkpoint import Checkpoint, load_model, resolve, save_model
from hybridlm.likelihood import bits_per_second
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.adapter_task import AdapterTask
from training.config import RunConfig, apply_overrides
from training.config import resolve as resolve_config
from training.corpus import TokenCache
from training.finetune_data import Prepared, align_texts, prepare_recordings
from training.finetune_report import (
    Change,
    OutputChange,
    changes_nothing,
    compare,
    compare_output,
    old_recordings,
    write_report,
)
from training.language_task import LanguageTask, LanguageTaskConfig
from training.listening import Sampler
from training.loop import RunResult, fit
from training.state import checkpoints

HELD_OUT = 0.1
LEARNING_RATE, LORA_LEARNING_RATE = 2e-4, 2e-3
"""Adapters want about ten times the rate of full training (Schulman et al. 2025, "LoRA Without Regret"); here too, of
1e-3, 2e-3 and 5e-3 the first learns less, the last forgets far more and learns hardly more (README)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Settings of fine-tuning itself; those of a run (`optimizer.learning_rate`, `max_steps`, ...) are taken too."""

    tags: tuple[str, ...] | None = None
    """Tags of every clip, out of those the model knows. None: the clips' own as far as the model knows them, and
    `speech` for clips that have text and no tag."""
    passes: float = 15.0
    """Times that the recordings are gone through, unless `max_steps` is given."""
    alpha: float | None = None
    """Of an adapter: what it adds is scaled by alpha / rank; None: twice the rank."""

    def __post_init__(self) -> None:
        if not self.passes > 0:
            raise ValueError(f"passes={self.passes} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """What came of it."""

    output: Path
    finished: bool
    """False when it was interrupted; the same command goes on."""
    before: dict[str, float]
    """Held-out figures of the model before, in nats a frame: `codes`, `latents`, `stop`, and `loss`, their sum."""
    after: dict[str, float]
    """Of the model that was saved."""
    held_out: Change | None = None
    """The same clips scored by both models as `hybridlm evaluate` does; None when interrupted."""
    old: Change | None = None
    """Of `old_data`."""
    outputs: tuple[OutputChange, ...] = ()
    """What both make at a fixed seed, where a sampler is given."""
    changes_nothing: bool = False


def run(
    model: str | Path,
    data: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    lora: bool = False,
    rank: int | None = None,
    old_data: Path | None = None,
    sampler: Sampler | None = None,
    console: Console | None = None,
) -> FinetuneResult:
    """Fine-tune a model and save a complete model folder, or an adapter's.

    The best weights on a held-out tenth are kept; if training makes nothing better, they are the model's own.

    Args:
        model: "box", a folder or a hub id.
        data: A manifest, a folder of audio, or a cache made by `hybridlm prepare` with the model's tokenizer.
        output: The new model's or adapter's folder; `run/` inside has the log, `tokens/` the encoded recordings,
            `finetune.json` the figures.
        overrides: `key.sub=value` for `FinetuneConfig` and `training.config.RunConfig`.
        lora: Train an adapter and leave the model's weights as they are.
        rank: The adapter's; None: 16.
        old_data: Recordings of what the model should not forget, scored before and after.
        sampler: Makes a model sound, to tell whether its output changed; training itself does not know sampling.
        console: Where the figures go; standard output by default.

    Raises:
        UserError: a model, data or settings that can't be used, or an output that holds a model already.
    """
    console = console or Console()
    output = Path(output)
    if (output / "config.json").exists() or is_adapter(output):
        raise UserError(f"--output {output} holds a model already; choose another folder")
    if rank is not None and not lora:
        raise UserError(f"--rank {rank} is an adapter's; add --lora, or leave it out")
    start = load_model(model)
    if adapter_names(start.model):
        raise UserError(f"model {str(model)!r} is an adapter; merge it (`hybridlm merge`) and fine-tune the result")
    own, run_overrides = _split(overrides)
    config = from_mapping(FinetuneConfig, apply_overrides({}, own), where="finetune")
    size = (
        from_mapping(LoraConfig, {"rank": 16 if rank is None else rank, "alpha": config.alpha}, where="finetune")
        if lora
        else None
    )
    if lora:
        peft_library()  # before recordings are encoded
    for tag in config.tags or ():
        start.text.tag_id(tag)
    prepared = prepare_recordings(Path(data), output / "tokens", start, config.tags)
    old = None if old_data is None else old_recordings(Path(old_data), output / "old-tokens", start)
    notes = list(prepared.notes)
    if start.model.reader is not None:
        notes += [note] if (note := align_texts(prepared.cache)) else []
    mapping = apply_overrides(_defaults(str(model), prepared.cache, output, config, start, lora), run_overrides)
    run_config, task_config, resolved = resolve_config(mapping, LanguageTaskConfig, where="finetune")
    if lora and (base := run_config.optimizer.base_width) is not None:
        raise UserError(f"optimizer.base_width={base} is for whole models; leave it out, or fine-tune without --lora")
    torch.manual_seed(run_config.seed)
    task = _task(task_config, run_config, start, size)
    if size is not None:
        resolved["lora"] = asdict(size)
    for note in [*notes, *_plan(task, run_config, config, size)]:
        _say(console, note)
    result = fit(task, run_config, resolved, resume=bool(checkpoints(Path(run_config.output))))
    if not result.finished:
        _say(console, f"interrupted at step {result.step}; the same command goes on")
        return FinetuneResult(output=output, finished=False, before=dict(result.first), after=dict(result.best))
    tuned = _save(result, output, str(model), task)
    held_out = compare(start, tuned, task.validation_data or task.train_data)
    forgotten = None if old is None else dataclasses.replace(compare(start, tuned, old[0]), of_clips=old[1])
    outputs = [] if sampler is None else compare_output(start, tuned, sampler)
    done = FinetuneResult(
        output=output,
        finished=True,
        before=dict(result.first),
        after=dict(result.best),
        held_out=held_out,
        old=forgotten,
        outputs=tuple(outputs),
        changes_nothing=changes_nothing(held_out, outputs),
    )
    _report(console, done, start, lora)
    write_report(output, _figures(done, result, start, prepared, task, run_config, size))
    return done


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of fine-tuning, and those of the run."""
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    own = [override for override in overrides if override.split("=")[0].strip() in names]
    return own, [override for override in overrides if override not in own]


def _defaults(
    model: str, cache: Path, output: Path, config: FinetuneConfig, start: Checkpoint, lora: bool
) -> dict[str, Any]:
    """Settings fit for minutes to hours of recordings: a step sees at most a quarter of them."""
    rows = TokenCache(cache, tokenizer=start.tokenizer, split="train").index.rows
    frames = int(rows.sum())
    held_out = TokenCache(cache, tokenizer=start.tokenizer, split="validation", validation_fraction=HELD_OUT)
    batch_frames = min(2000, max(frames // 4, int(rows.max())))
    steps = min(max(round(config.passes * frames / batch_frames), 20), 5000)
    every = max(steps // 10, 1)
    return {
        "task": "language",
        "output": str(output / "run"),
        "max_steps": steps,
        "ema_decay": 0.99,
        "validate_first": True,
        "validate_every": every,
        "checkpoint_every": every,
        "keep_checkpoints": 1,
        "log_every": max(every // 5, 1),
        "patience": 3,
        "optimizer": {
            "learning_rate": LORA_LEARNING_RATE if lora else LEARNING_RATE,
            "warmup_steps": max(steps // 20, 1),
        },
        "language": {
            "tokenizer": model,
            "data": {
                "caches": [str(cache)],
                "validation_fraction": HELD_OUT if len(held_out) < len(rows) else 0.0,
                "batch_frames": batch_frames,
                "rules": [{"tags": list(config.tags)}] if config.tags is not None else [],
            },
        },
    }


def _task(config: LanguageTaskConfig, run: RunConfig, start: Checkpoint, size: LoraConfig | None) -> LanguageTask:
    if size is None:
        return LanguageTask(config, output=Path(run.output), start=start)
    assert start.base is not None
    return AdapterTask(config, size, output=Path(run.output), start=start, base=start.base, seed=run.seed)


def _plan(task: LanguageTask, run: RunConfig, config: FinetuneConfig, size: LoraConfig | None) -> list[str]:
    """What will be done, and why so: the settings that were found from the recordings."""
    data, frames = task.train_data, int(task.train_data.index.rows.sum())
    batch = task.config.data.batch_frames
    if task.validation_data is None:
        held_out = "too few recordings to hold any out: the figures are of the training clips themselves"
    else:
        held_out = f"{len(task.validation_data)} clips are held out"
    if size is None:
        what = f"all {task.model.num_parameters():,} weights"
    else:
        alpha = 2 * size.rank if size.alpha is None else size.alpha
        what = f"an adapter (LoRA, rank {size.rank}, alpha {alpha:g}) of {adapter_size(task.model):,} weights"
    patience = "" if run.patience is None else f", ended by {run.patience} in a row without improvement"
    return [
        f"{len(data)} clips, {data.duration_s / 60:.1f} min to train on; {held_out}",
        f"training {what}: at most {run.max_steps} steps of {batch} frames, {run.max_steps * batch / frames:.1f} "
        f"passes, learning rate {run.optimizer.learning_rate:g}; validated every {run.validate_every} steps{patience}",
    ]


def _save(result: RunResult, output: Path, model: str, task: LanguageTask) -> Checkpoint:
    """Turn the best of the run into `output`, drop what only the run needed, and return the model that was saved."""
    if isinstance(task, AdapterTask):
        best = load_model(model, adapter=result.output / "best")
        save_adapter(output, best.model, task.base, card=_card(result, model, task))
    else:
        best = load_model(result.output / "best")
        save_model(output, best.model, best.tokenizer, best.text, card=_card(result, model, task))
    for name in ("checkpoints", "model", "best"):
        shutil.rmtree(result.output / name, ignore_errors=True)
    return best


def _card(result: RunResult, model: str, task: LanguageTask) -> str:
    data = task.train_data
    rate = task.model.config.frame_rate_hz
    rows = "".join(
        f"| {name} | {result.first[key]:.3f} | {result.best[key]:.3f} |\n"
        for name, key in (("codes", "codes"), ("latents", "latents"), ("stop", "stop"), ("total", "loss"))
    )
    base = resolve(model) / "README.md"
    rest = f"\n# The model it began as\n\n{base.read_text(encoding='utf-8')}" if base.is_file() else ""
    kind = "An adapter, fine-tuned" if isinstance(task, AdapterTask) else "Fine-tuned"
    return (
        f"# {kind} from `{Path(model).name}`\n\n"
        f"On {len(data)} clips, {data.duration_s / 60:.1f} minutes. The rights of these recordings, and of whoever "
        "speaks in them, go along with the weights.\n\n"
        f"Nats a frame ({rate:g} frames a second; latents noised with sigma = {task.model.config.sigma:g}, scale floor "
        f"{task.model.config.scale_floor:g}) on held-out clips:\n\n"
        f"| stream | before | after |\n|---|---|---|\n{rows}{rest}"
    )


def _report(console: Console, done: FinetuneResult, start: Checkpoint, lora: bool) -> None:
    rate = start.model.config.frame_rate_hz
    for name, figures in (("before", done.before), ("after", done.after)):
        streams = ", ".join(f"{key} {figures[key]:.3f}" for key in ("codes", "latents", "stop"))
        _say(
            console,
            f"{name}: {figures['loss']:.3f} nats a frame ({streams}), "
            f"{bits_per_second(figures['loss'], rate):.1f} bits a second of audio, on held-out clips",
        )
    if done.held_out is not None:
        _say(console, f"held-out recordings: {done.held_out.line()}")
    if done.old is not None:
        _say(console, f"old recordings: {done.old.line()}")
        if done.old.difference.low > 0:
            _say(console, "the model forgot: the old recordings are less likely than before")
    for change in done.outputs:
        _say(console, change.line())
    what = "adapter" if lora else "model"
    if done.changes_nothing:
        _say(console, f"WARNING: this {what} changes nothing: what was saved does exactly what the model did before")
    if done.after["loss"] >= done.before["loss"]:
        _say(console, "training made nothing better; the saved weights are the model's own")
    _say(console, f"{what}: {done.output}")


def _figures(
    done: FinetuneResult,
    result: RunResult,
    start: Checkpoint,
    prepared: Prepared,
    task: LanguageTask,
    run: RunConfig,
    size: LoraConfig | None,
) -> dict[str, Any]:
    """The report as plain types."""
    letters = prepared.letters
    return {
        "base": None if start.base is None else start.base._asdict(),
        "kind": "model" if size is None else "adapter",
        "lora": None if size is None else asdict(size),
        "data": {
            "clips": len(task.train_data),
            "held_out_clips": 0 if task.validation_data is None else len(task.validation_data),
            "minutes": task.train_data.duration_s / 60,
            "skipped": prepared.num_skipped,
            "texts": letters.num_texts,
            "texts_with_unknown_letters": letters.num_partly_unknown,
            "texts_in_another_script": letters.num_foreign,
            "unknown_letters": dict(letters.scripts),
        },
        "steps": result.step,
        "max_steps": run.max_steps,
        "batch_frames": task.config.data.batch_frames,
        "learning_rate": run.optimizer.learning_rate,
        "before": done.before,
        "after": done.after,
        "held_out": None if done.held_out is None else asdict(done.held_out),
        "old_data": None if done.old is None else asdict(done.old),
        "outputs": [asdict(change) for change in done.outputs],
        "changes_nothing": done.changes_nothing,
    }


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
