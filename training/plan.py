"""`hybridlm plan CONFIG`: what a run would take, before anything is allocated, downloaded or prepared.

Memory is what a micro-batch's forward and backward pass would hold (`training.dry_run`), and what the loop keeps
besides: weights, gradients, AdamW's two moments and averaged weights, all in fp32. How parameters, gradients and states
are shared out over GPUs is ZeRO's (arXiv 1910.02054); the buffers of a framework, the CUDA context and fragmentation
come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridlm.backbone import Backbone
from hybridlm.checkpoint import open_tokenizer
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer
from tokenizer.text import TextTokenizer
from training.config import RunConfig, resolve
from training.dry_run import COPIES, Answers, DryRun, dry_run
from training.language_task import LanguageTask, LanguageTaskConfig
from training.loop import autocast_dtype
from training.new_model import new_config
from training.task import Batch
from training.zero import BUCKET, MAX_LIVE

Backend = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
PIECES_A_SECOND = 8
"""Of text, as quick speech has them; a large published vocabulary needs half of it."""
NUM_TAGS = 2
"""Of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A micro-batch of one GPU."""

    rows: int
    frames: int
    """Of each row."""
    columns: int
    """Of the prefix: tags, pieces of text and `<audio>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run would take; memory is a GPU's, in bytes."""

    gpus: int
    backend: Backend
    precision: str
    parameters: Mapping[str, int]
    """By part of the model."""
    shape: Shape
    memory: Mapping[str, int]
    """What is held at the moment of the peak, by part."""
    steps: int
    frames_per_step: int
    codes_per_step: int
    hours_of_audio: float
    """That the run hears, counting repetitions."""
    flop_per_step: int
    """Of all GPUs."""

    @property
    def peak(self) -> int:
        """Bytes a GPU."""
        return sum(self.memory.values())

    @property
    def flop(self) -> int:
        """Of the whole run."""
        return self.flop_per_step * self.steps

    def hours(self, tflops: float) -> float:
        """Of the run, where each GPU does `tflops` TFLOP a second."""
        return self.flop / (tflops * 1e12 * self.gpus) / 3600


def plan(
    mapping: Mapping[str, Any],
    where: str,
    *,
    gpus: int = 1,
    backend: Backend = "ddp",
    hours_of_audio: float | None = None,
) -> Plan:
    """Work out what a run would take.

    Args:
        mapping: Its settings.
        where: What to call them in messages.
        gpus: How many, each with a process.
        backend: How they share the model.
        hours_of_audio: That the run is to hear, instead of its `max_steps`.

    Raises:
        UserError: bad settings, another task than `language`, or a tokenizer or backbone that is not there.
    """
    if mapping.get("task") != "language":
        raise UserError(f"{where}: task={mapping.get('task')} cannot be planned; only task: language can")
    run, task, _ = resolve(mapping, LanguageTaskConfig, where=where)
    tokenizer = open_tokenizer(task.tokenizer)
    config = _model_config(task, tokenizer)
    shape = _shape(task, config)
    found = _dry(task, config, shape, run)
    with torch.device("meta"):
        model = HybridLM(config)
    frames = shape.rows * shape.frames * run.accumulate * gpus
    steps = run.max_steps
    if hours_of_audio is not None:
        steps = math.ceil(hours_of_audio * 3600 * config.frame_rate_hz / frames)
    return Plan(
        gpus=gpus,
        backend=backend,
        precision="fp32" if _autocast(run) is None else "bf16 autocast",
        parameters=parts(model),
        shape=shape,
        memory=memory(
            model,
            tokenizer,
            found,
            gpus=gpus,
            backend=backend,
            averaged=run.ema_decay > 0,
            accumulated=run.accumulate > 1,
        ),
        steps=steps,
        frames_per_step=frames,
        codes_per_step=frames * config.output_codebooks,
        hours_of_audio=steps * frames / config.frame_rate_hz / 3600,
        flop_per_step=found.flop * run.accumulate * gpus,
    )


def parts(model: HybridLM) -> dict[str, int]:
    """Weights of each part of a model."""
    return {name: count for name, child in model.named_children() if (count := _count(child))}


def memory(
    model: HybridLM,
    tokenizer: Tokenizer,
    found: DryRun,
    *,
    gpus: int,
    backend: Backend,
    averaged: bool,
    accumulated: bool = False,
) -> dict[str, int]:
    """Bytes that one GPU holds at its fullest, by part.

    Args:
        model: For its sizes alone.
        tokenizer: Lies on the GPU too, for it gives noised latents their codes.
        found: A micro-batch's own.
        gpus: How many share.
        backend: What they share.
        averaged: Whether there are averaged weights.
        accumulated: Whether gradients of an earlier micro-batch are there already.
    """
    whole = 4 * model.num_parameters()
    layer = 4 * max(_count(model.decoder.layers[0]), model.num_parameters() - _count(model.decoder.layers))
    share = -(-whole // gpus)
    shares = backend in ("zero3", "fsdp2")
    held = share if shares else whole
    states = {
        "weights": held,
        "optimizer": 2 * (whole if backend == "ddp" else share),
        "averaged weights": held if averaged else 0,
    }
    if isinstance(tokenizer, nn.Module):
        states["tokenizer"] = sum(t.numel() * t.element_size() for t in (*tokenizer.parameters(), *tokenizer.buffers()))
    activations = {name: size for name, size in found.activations.items() if not (shares and name == COPIES)}
    step = {"gradients": found.gradients, **activations}
    if backend == "fsdp2":
        step["gradients"] = min(found.gradients, share + layer)
        step["gathered weights"] = 2 * layer  # of the layer at work, and of the next
    if backend.startswith("zero"):
        states["DeepSpeed's copy"] = share  # it steps a flat one of its share of the weights
        bucket = min(whole, 4 * BUCKET)
        kept = share if backend == "zero3" or accumulated or bucket < whole else 0
        step = _step_of_deepspeed(
            activations,
            gradients=(min(found.gradients, layer) + kept, kept),
            bucket=(bucket, bucket * (3 if backend == "zero3" else 2)),
            emptied=bucket < whole,
        )
        if backend == "zero3":
            step["gathered weights"] = min(whole, 4 * MAX_LIVE)
    if backend == "ddp" and gpus > 1:
        # The exchange has the gradients three times: a parameter's own, all in one piece, and their mean.
        exchange = {"gradients": 3 * whole}
        step = max(step, exchange, key=lambda moment: sum(moment.values()))
    return {name: size for name, size in {**states, **step}.items() if size}


def _step_of_deepspeed(
    activations: Mapping[str, int], *, gradients: tuple[int, int], bucket: tuple[int, int], emptied: bool
) -> dict[str, int]:
    """The fullest moment of a step: in the backward pass, or when gradients are exchanged.

    Gradients gather in a bucket, which has its whole size from the start, and go from there into the share that is
    kept; for the exchange the bucket is copied, in stage 3 twice.

    Args:
        activations: In the backward pass.
        gradients: Outside the bucket, in the pass and after it.
        bucket: Without its copies and with them.
        emptied: The bucket is smaller than all gradients, so that it is exchanged in the midst of the pass.
    """
    backward = {"gradients": gradients[0], "DeepSpeed's bucket": bucket[emptied], **activations}
    exchange = {"gradients": gradients[1], "DeepSpeed's bucket": bucket[True]}
    return max(backward, exchange, key=lambda moment: sum(moment.values()))


def made_up_batch(config: ModelConfig, shape: Shape) -> Batch:
    """A batch as `LanguageTask.batch` makes them: every row is full and a complete utterance of its text."""
    rows, frames, columns = shape.rows, shape.frames, shape.columns
    ids = torch.full((rows, columns), config.first_text_id)
    text_mask = torch.ones(rows, columns, dtype=torch.bool)
    ids[:, :NUM_TAGS] = ids[:, -1:] = max(config.first_text_id - 1, 0)
    text_mask[:, :NUM_TAGS] = text_mask[:, -1:] = False
    everything = torch.ones(rows, dtype=torch.bool)
    batch: Batch = {
        "prefix": ids,
        "prefix_mask": torch.ones(rows, columns, dtype=torch.bool),
        "text_mask": text_mask,
        "codes": torch.zeros(rows, config.num_codebooks, frames, dtype=torch.int64),
        "latents": torch.randn(rows, frames, config.latent_dim),
        "lengths": torch.full((rows,), frames),
        "ended": everything,
        "aligned": everything.clone(),
    }
    if config.feature_dim:
        batch["features"] = torch.randn(rows, frames, config.feature_dim)
    if config.reader_layer is not None:
        batch["places"] = torch.arange(frames + 1.0).expand(rows, -1) / frames * (columns - NUM_TAGS - 1)
        batch["places_known"] = everything.clone()
    return batch


class PlannedTask(LanguageTask):
    """A language task without data: what its loss reads, and no more."""

    def __init__(self, config: LanguageTaskConfig, model: HybridLM) -> None:
        self.config, self.model = config, model

    def _frames(self, batch: Batch, latents: Tensor) -> AudioFrames:
        """The codes of noised latents are not looked up: next to the model that costs nothing."""
        features = batch.get("features")
        return AudioFrames(codes=batch["codes"], latents=latents, lengths=batch["lengths"], features=features)


def _dry(task: LanguageTaskConfig, config: ModelConfig, shape: Shape, run: RunConfig) -> DryRun:
    return dry_run(
        lambda: (PlannedTask(task, _model(config, run)), made_up_batch(config, shape)),
        Answers(scored=task.losses.head_fraction, columns=NUM_TAGS + 1),
        autocast=_autocast(run),
        fused=run.device != "cpu",
        keep_gradients=run.accumulate > 1,
    )


def _model(config: ModelConfig, run: RunConfig) -> HybridLM:
    model = HybridLM(config)
    model.decoder.gradient_checkpointing = run.gradient_checkpointing
    return model


def _autocast(run: RunConfig) -> torch.dtype | None:
    """As on a GPU of these years, wherever the plan is made."""
    if run.device == "cpu":
        return autocast_dtype(run.precision, torch.device("cpu"))
    return None if run.precision == "fp32" else torch.bfloat16


def _model_config(task: LanguageTaskConfig, tokenizer: Tokenizer) -> ModelConfig:
    settings, backbone = task.text, None
    text: TextTokenizer | None = None
    if task.backbone is not None:
        backbone = Backbone.open(task.backbone, weights=False)
        text = backbone.text(settings.tags)
    elif settings.model is not None:
        text = TextTokenizer.load(Path(settings.model))
    # A text model that is yet to be learned begins with padding, unknown, `<audio>` and the tags.
    sizes = {
        "vocab_size": settings.vocab_size if text is None else text.vocab_size,
        "first_text_id": 3 + len(settings.tags) if text is None else text.first_text_id,
        "feature_dim": tokenizer.feature_dim,
    }
    return new_config(task.model, tokenizer, sizes, backbone)


def _shape(task: LanguageTaskConfig, config: ModelConfig) -> Shape:
    """As many full windows as a micro-batch holds, each with as much text as is spoken in it."""
    frames = min(task.data.max_frames, config.max_frames, task.data.batch_frames)
    pieces = math.ceil(PIECES_A_SECOND * frames / config.frame_rate_hz)
    columns = min(NUM_TAGS + pieces + 1, task.text.max_pieces)
    return Shape(rows=max(task.data.batch_frames // frames, 1), frames=frames, columns=max(columns, NUM_TAGS + 2))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
