"""`hybridlm finetune`: go on training a model on someone's recordings, with or without transcripts."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hybridlm.checkpoint import Checkpoint, load_model, resolve, save_model
from hybridlm.likelihood import bits_per_second
from tokenizer.audio import audio_info
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.align import FILE_NAME as ALIGNMENT
from training.align import align_caches
from training.config import apply_overrides
from training.config import resolve as resolve_config
from training.corpus import TokenCache, prepare
from training.examples import GOES_ON
from training.language_task import LanguageTask, LanguageTaskConfig
from training.loop import RunResult, fit
from training.manifest import Clip, Manifest, read_manifest
from training.state import checkpoints

SPEECH_TAG = "speech"
HELD_OUT = 0.1
PIECE_SECONDS = 20.0
"""About what recordings without text are cut into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Settings of fine-tuning itself; those of a run (`optimizer.learning_rate`, `max_steps`, ...) are taken too."""

    tags: tuple[str, ...] | None = None
    """Tags of every clip, out of those the model knows. None: the clips' own as far as the model knows them, and
    `speech` for clips that have text and no tag."""
    passes: float = 15.0
    """Times that the recordings are gone through, unless `max_steps` is given."""

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


def run(
    model: str | Path, data: Path, output: Path, overrides: Sequence[str] = (), *, console: Console | None = None
) -> FinetuneResult:
    """Fine-tune a model and save a complete model folder.

    The best weights on a held-out tenth are kept; if training makes nothing better, they are the model's own.

    Args:
        model: "box", a folder or a hub id.
        data: A manifest, a folder of audio, or a cache made by `hybridlm prepare` with the model's tokenizer.
        output: The new model's folder; `run/` inside has the log, `tokens/` the encoded recordings.
        overrides: `key.sub=value` for `FinetuneConfig` and `training.config.RunConfig`.
        console: Where the figures go; standard output by default.

    Raises:
        UserError: a model, data or settings that can't be used, or an output that holds a model already.
    """
    console = console or Console()
    output = Path(output)
    if (output / "config.json").exists():
        raise UserError(f"--output {output} holds a model already; choose another folder")
    start = load_model(model)
    own, run_overrides = _split(overrides)
    config = from_mapping(FinetuneConfig, apply_overrides({}, own), where="finetune")
    for tag in config.tags or ():
        start.text.tag_id(tag)
    cache = _tokens(Path(data), output, start, config, console)
    if start.model.reader is not None:
        _align(cache, console)
    mapping = apply_overrides(_defaults(str(model), cache, output, config, start), run_overrides)
    run_config, task_config, resolved = resolve_config(mapping, LanguageTaskConfig, where="finetune")
    torch.manual_seed(run_config.seed)
    task = LanguageTask(task_config, output=Path(run_config.output), start=start)
    if task.validation_data is None:
        _say(console, "too few recordings to hold any out: the figures are of the training clips themselves")
    minutes = task.train_data.duration_s / 60
    _say(console, f"{len(task.train_data)} clips, {minutes:.1f} min; at most {run_config.max_steps} steps")
    result = fit(task, run_config, resolved, resume=bool(checkpoints(Path(run_config.output))))
    if result.finished:
        _save(result, output, str(model), task)
    _report(console, result, output, start)
    return FinetuneResult(output=output, finished=result.finished, before=dict(result.first), after=dict(result.best))


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of fine-tuning, and those of the run."""
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    own = [override for override in overrides if override.split("=")[0].strip() in names]
    return own, [override for override in overrides if override not in own]


def _tokens(data: Path, output: Path, start: Checkpoint, config: FinetuneConfig, console: Console) -> Path:
    """The cache to train on, encoded now unless the data is one."""
    if (data / "meta.json").is_file():
        return data
    manifest = read_manifest(data)
    dropped: set[str] = set()
    clips = [_tagged(part, config, start, dropped) for clip in manifest.clips for part in _pieces(clip)]
    if dropped:
        _say(console, f"tags that the model does not know are left out: {', '.join(sorted(dropped))}")
    manifest = Manifest(source=manifest.source, clips=clips, problems=manifest.problems)
    prepare(manifest, output / "tokens", start.tokenizer, workers=1)
    return output / "tokens"


def _align(cache: Path, console: Console) -> None:
    """Tell a model that reads where the texts are spoken; it learns to read on its own where they are too few."""
    if (cache / ALIGNMENT).exists():
        return
    try:
        count = align_caches([cache])
    except UserError as error:
        _say(console, f"texts are not aligned: {error}")
    else:
        _say(console, f"{count} texts aligned with their recordings")


def _pieces(clip: Clip) -> Iterator[Clip]:
    """Cut a long recording without text, so that a part of it can be held out; pieces know that they go on."""
    if clip.text:
        yield clip
        return
    start = clip.start or 0.0
    try:
        end = clip.end if clip.end is not None else audio_info(clip.path).duration_s
    except UserError:  # `prepare` counts and reports what can't be read
        end = start
    count = max(round((end - start) / PIECE_SECONDS), 1)
    borders = [start + (end - start) * number / count for number in range(count + 1)]
    if count == 1:
        yield clip
        return
    for number, (first, last) in enumerate(itertools.pairwise(borders)):
        labels = clip.labels if number == count - 1 else {**clip.labels, GOES_ON: "yes"}
        yield dataclasses.replace(
            clip, start=first, end=last, key=f"{clip.key}#{first:g}-{last:g}", duration=last - first, labels=labels
        )


def _tagged(clip: Clip, config: FinetuneConfig, start: Checkpoint, dropped: set[str]) -> Clip:
    known = start.text.tags
    if config.tags is not None:
        return dataclasses.replace(clip, tags=config.tags)
    dropped.update(tag for tag in clip.tags if tag not in known)
    tags = tuple(tag for tag in clip.tags if tag in known)
    if not tags and clip.text and SPEECH_TAG in known:
        tags = (SPEECH_TAG,)
    return dataclasses.replace(clip, tags=tags)


def _defaults(model: str, cache: Path, output: Path, config: FinetuneConfig, start: Checkpoint) -> dict[str, Any]:
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
        "optimizer": {"learning_rate": 2e-4, "warmup_steps": max(steps // 20, 1)},
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


def _save(result: RunResult, output: Path, model: str, task: LanguageTask) -> None:
    """Turn the best model of the run into `output`, and drop what only the run needed."""
    best = load_model(result.output / "best")
    save_model(output, best.model, best.tokenizer, best.text, card=_card(result, model, task))
    for name in ("checkpoints", "model", "best"):
        shutil.rmtree(result.output / name, ignore_errors=True)


def _card(result: RunResult, model: str, task: LanguageTask) -> str:
    data = task.train_data
    rate = task.model.config.frame_rate_hz
    rows = "".join(
        f"| {name} | {result.first[key]:.3f} | {result.best[key]:.3f} |\n"
        for name, key in (("codes", "codes"), ("latents", "latents"), ("stop", "stop"), ("total", "loss"))
    )
    base = resolve(model) / "README.md"
    rest = f"\n# The model it began as\n\n{base.read_text(encoding='utf-8')}" if base.is_file() else ""
    return (
        f"# Fine-tuned from `{Path(model).name}`\n\n"
        f"On {len(data)} clips, {data.duration_s / 60:.1f} minutes. The rights of these recordings, and of whoever "
        "speaks in them, go along with the weights.\n\n"
        f"Nats a frame ({rate:g} frames a second; latents noised with sigma = {task.model.config.sigma:g}, scale floor "
        f"{task.model.config.scale_floor:g}) on held-out clips:\n\n"
        f"| stream | before | after |\n|---|---|---|\n{rows}{rest}"
    )


def _report(console: Console, result: RunResult, output: Path, start: Checkpoint) -> None:
    if not result.finished:
        _say(console, f"interrupted at step {result.step}; the same command goes on")
        return
    rate = start.model.config.frame_rate_hz
    for name, figures in (("before", result.first), ("after", result.best)):
        streams = ", ".join(f"{key} {figures[key]:.3f}" for key in ("codes", "latents", "stop"))
        _say(
            console,
            f"{name}: {figures['loss']:.3f} nats a frame ({streams}), "
            f"{bits_per_second(figures['loss'], rate):.1f} bits a second of audio, on held-out clips",
        )
    if result.best["loss"] >= result.first["loss"]:
        _say(console, "training made nothing better; the saved weights are the model's own")
    _say(console, f"model: {output}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
