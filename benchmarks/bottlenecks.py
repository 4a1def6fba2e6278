"""Four bottlenecks of one autoencoder: how they sound, how they bear noise on their latents, what a model says of them.

    python -m benchmarks.bottlenecks [--config benchmarks/bottlenecks.yaml] [key=value ...] [--jobs 2]
        [--markdown FILE] [--json FILE] [--one VARIANT/SEED]

A run, of one thread, in OUTPUT/VARIANT/seedN: an autoencoder is trained, frames of the same recordings are cached, test
clips are decoded from clean and from noised latents, and a small continuous language model is trained on the frames and
scored. Networks, data and its order, steps and optimizers are the same for all; only the bottleneck differs. Runs whose
result (`test.json`, `validation.json`) is there are not made again, interrupted ones go on, and another split is
scored without another training. The report is written anew after every run.

Noise is relative: sigma times the root mean square of a codec's latents about their channels' means, measured on the
training frames. So every codec has the same signal-to-noise ratio 1 / sigma^2, whatever its latents' scale.

Densities of different latents do not compare. What does is the information that latents carry above the noise. The
model scores y = z + sigma * spread * eps, and h(y) - h(noise) = I(z; y) for the frames of a clip together, so that
(NLL - D / 2 log(2 pi e (sigma * spread)^2)) / ln 2 times the frame rate is an upper bound on the bits a second that y
tells of z; it does not change when latents are scaled or rotated. How loose the bound is depends on the model: it is
the price of the latents for this model, trained for so long. It says nothing of what the bits are good for: latents
that lose the recording are cheap. So it stands next to the distances at the same sigma, and a codec is better when it
is nearer at no higher a price.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.bottleneck_scores import (
    judged_parts,
    noise_distances,
    noise_floor,
    spread_of,
    training_parts,
    write_frames,
)
from benchmarks.bottlenecks_report import compare, markdown
from benchmarks.study import run_study
from hybridlm.checkpoint import load_model
from tokenizer.f3 import F3Tokenizer
from training.audio_alone import empty_text
from training.config import OptimizerConfig
from training.corpus import PcmCache
from training.machine import machine
from training.manifest import TagRule
from training.probe import write_json
from training.run import train_mapping
from training.runs import Run, progress_of, read_result, training_settings
from training.scoring import score_clips

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What is a bottleneck's own."""

    about: str = ""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `F3Config`."""
    losses: dict[str, Any] = field(default_factory=dict)
    """Fields of `TokenizerLossConfig`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is compared; see benchmarks/bottlenecks.yaml."""

    output: str
    caches: tuple[str, ...]
    """Decoded audio, made by `hybridlm prepare DATA --output DIR --audio`; split `train` is trained on."""
    variants: dict[str, Variant]
    first: str
    """The variant that the others are held against."""
    steps: int
    """Of an autoencoder."""
    model_steps: int
    """Of a language model."""
    test_caches: tuple[str, ...] = ()
    """Where split `test` is; none: the same caches."""
    rules: tuple[TagRule, ...] = ()
    """Which clips, with which weight, as in training."""
    speech_sets: tuple[str, ...] = ()
    """Values of the label `set` that STOI and PESQ are for."""
    seeds: int
    score: Literal["test", "validation"]
    """Split of the figures; settings are chosen on `validation`, the part of the training split that is held back."""
    validation_fraction: float = 0.02
    test_clips: int
    """Of each set, evenly spread over it."""
    test_seconds: float
    """Of each clip its beginning is scored, at most this much."""
    sigmas: tuple[float, ...]
    """Noise on the latents that are decoded, beside none."""
    sigma: float
    """Noise on the latents that the language model learns and is scored on; one of `sigmas`."""
    precision: str = "auto"
    batch_size: int
    segment_frames: int
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `F3Config` that all share, as the next two."""
    losses: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig`."""
    model_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model_ema_decay: float
    model_seconds: float
    """Audio of the training split that a language model hears, in parts of at most a window."""
    batch_frames: int
    max_frames: int
    """Longest window of a language model."""

    def __post_init__(self) -> None:
        for name in ("steps", "model_steps", "seeds", "test_clips", "batch_frames", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.first not in self.variants:
            raise ValueError(f"first={self.first} is none of the variants {', '.join(self.variants)}")
        if self.sigma not in self.sigmas or min(self.sigmas) <= 0:
            raise ValueError(f"sigma={self.sigma} must be one of sigmas={list(self.sigmas)}, all above 0")


# What is run


def runs_of(study: Study) -> list[Run]:
    """Seed after seed."""
    output = Path(study.output)
    names = [(variant, seed) for seed in range(study.seeds) for variant in study.variants]
    return [Run(name=f"{variant}/{seed}", folder=output / variant / f"seed{seed}") for variant, seed in names]


def variant_and_seed(run: Run) -> tuple[str, int]:
    variant, _, seed = run.name.rpartition("/")
    return variant, int(seed)


def codec_settings(study: Study, run: Run) -> dict[str, Any]:
    """The autoencoder's training run."""
    name, seed = variant_and_seed(run)
    variant = study.variants[name]
    data = {
        "caches": study.caches,
        "rules": [asdict(rule) for rule in study.rules],
        "validation_fraction": study.validation_fraction,
        "batch_size": study.batch_size,
        "segment_frames": study.segment_frames,
    }
    section = {
        "data": data,
        "tokenizer": {**study.tokenizer, **variant.tokenizer},
        "losses": {**study.losses, **variant.losses},
    }
    return training_settings(
        task="tokenizer",
        section=section,
        folder=run.folder / "codec",
        seed=seed,
        steps=study.steps,
        optimizer=study.optimizer,
        precision=study.precision,
        ema_decay=study.ema_decay,
        validate_every=study.steps,
    )


def model_settings(study: Study, run: Run, spread: float) -> dict[str, Any]:
    """The language model's training run, on latents of this spread."""
    data = {
        "caches": [str(run.folder / "train")],
        "validation_fraction": 0.0,  # nothing is chosen by it
        "validation_frames": study.batch_frames,
        "batch_frames": study.batch_frames,
        "max_frames": study.max_frames,
    }
    own = {"representation": "continuous", "sigma": study.sigma * spread, "max_frames": study.max_frames}
    section = {
        "tokenizer": str(run.folder / "codec" / "model"),
        "data": data,
        "text": {"model": str(Path(study.output) / "text.model")},
        "model": {**study.model, **own},
        "losses": {"alignment_weight": 0},
    }
    return training_settings(
        task="language",
        section=section,
        folder=run.folder / "model",
        seed=variant_and_seed(run)[1],
        steps=study.model_steps,
        optimizer=study.model_optimizer,
        precision=study.precision,
        ema_decay=study.model_ema_decay,
        validate_every=study.model_steps,
    )


def scoring_settings(study: Study) -> dict[str, Any]:
    """What is measured, and on what."""
    test = study.score == "test"
    return {
        "caches": list(study.test_caches if test and study.test_caches else study.caches),
        "split": study.score,
        "validation_fraction": 0.0 if test else study.validation_fraction,
        "clips": study.test_clips,
        "seconds": study.test_seconds,
        "sigmas": list(study.sigmas),
        "speech_sets": list(study.speech_sets),
        "model_seconds": study.model_seconds,
    }


def result_settings(study: Study, run: Run, spread: float) -> dict[str, Any]:
    """What a run's result says of how it was made."""
    return {
        "codec_settings": codec_settings(study, run),
        "model_settings": model_settings(study, run, spread),
        "test": scoring_settings(study),
    }


def result_of(study: Study, run: Run) -> dict[str, Any] | None:
    """A finished run's result, if it is there.

    Raises:
        UserError: it was made with other settings.
    """
    name = f"{study.score}.json"
    found = read_result(run.folder, {}, name)
    return found and read_result(run.folder, result_settings(study, run, found["spread"]), name)


def make(study: Study, run: Run) -> bool:
    """Train and score one codec and its language model, as far as that is not done; False when it was interrupted.

    Raises:
        UserError: what training says.
    """
    torch.set_num_threads(1)
    folder, test = run.folder, scoring_settings(study)
    if not train_mapping(codec_settings(study, run), f"{run.name}: codec", resume=True).finished:
        return False
    codec = F3Tokenizer.load(folder / "codec" / "model")
    heard = PcmCache(
        [Path(cache) for cache in study.caches],
        split="train",
        validation_fraction=study.validation_fraction,
        rules=study.rules,
    )
    judged = PcmCache(
        [Path(cache) for cache in test["caches"]],
        split=study.score,
        validation_fraction=test["validation_fraction"],
        rules=study.rules,
    )
    window_s = study.max_frames / codec.frame_rate_hz
    frames = write_frames(heard, training_parts(heard, study.model_seconds, window_s), codec, folder / "train")
    spread = spread_of(frames)
    empty_text(Path(study.output))
    if not train_mapping(model_settings(study, run, spread), f"{run.name}: model", resume=True).finished:
        return False
    parts = judged_parts(judged, study.test_seconds, study.test_clips)
    tests = write_frames(judged, parts, codec, folder / study.score)
    clips = score_clips(load_model(folder / "model" / "model"), tests, window_frames=study.max_frames, with_text=False)
    sigmas = (0.0, *study.sigmas)
    result = {
        **result_settings(study, run, spread),
        "codec": _progress(folder / "codec"),
        "model": _progress(folder / "model"),
        "parameters": sum(weights.numel() for weights in codec.parameters()),
        "frame_rate_hz": codec.frame_rate_hz,
        "latent_dim": codec.latent_dim,
        "spread": spread,
        "latent_scale": _last_figure(folder / "codec" / "log.jsonl", "latent_scale"),
        "sigma": study.sigma,
        "noise_floor": noise_floor(codec.latent_dim, study.sigma * spread),
        "machine": machine(study.precision),
        "clips": [asdict(clip) for clip in clips],
        "distances": list(
            noise_distances(codec, judged, parts, spread=spread, sigmas=sigmas, speech_sets=study.speech_sets)
        ),
    }
    write_json(folder / f"{study.score}.json", result)
    return True


def _progress(folder: Path) -> dict[str, Any]:
    progress = progress_of(folder)
    return {"steps": progress["step"], "skipped_steps": progress["bad_steps"], "seconds": progress["seconds"]}


def _last_figure(log: Path, name: str) -> float | None:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return next((line[name] for line in reversed(lines) if name in line), None)


# The report


def report(study: Study, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown and figures of the runs that are there."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.variants}
    runs = runs_of(study)
    for run in runs:
        if (result := result_of(study, run)) is not None:
            variant, seed = variant_and_seed(run)
            found[variant][seed] = result
    figures = compare(found, study.first)
    count = sum(map(len, found.values()))
    missing = "" if count == len(runs) else f" **{count} of {len(runs)} runs are done.**"
    head = [
        f"`{command}`",
        f"{study.seeds} seeds; autoencoders: {study.steps} steps of {study.batch_size} x {study.segment_frames} "
        f"frames; language models: {study.model_steps} steps of at most {study.batch_frames} frames, from "
        f"{study.model_seconds:g} s of audio. Tests: at most {study.test_clips} clips a set of split {study.score}, "
        f"the first {study.test_seconds:g} s of each.{missing}",
    ]
    text = markdown(figures, {name: variant.about for name, variant in study.variants.items()}, head)
    return text, {"command": command, "study": asdict(study), **figures}


def check(study: Study) -> None:
    """The empty prefix is learned before processes share it."""
    empty_text(Path(study.output))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study(
        arguments,
        module="benchmarks.bottlenecks",
        description=__doc__,
        config=HERE / "bottlenecks.yaml",
        settings=Study,
        runs_of=runs_of,
        make=make,
        is_done=lambda study, run: result_of(study, run) is not None,
        report=report,
        check=check,
        report_each=True,
    )


if __name__ == "__main__":
    sys.exit(main())
