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

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.audio_alone import empty_text
from benchmarks.bottleneck_scores import (
    judged_parts,
    noise_distances,
    noise_floor,
    spread_of,
    training_parts,
    write_frames,
)
from benchmarks.bottlenecks_report import compare, markdown
from benchmarks.jobs import plain, run_jobs, write
from benchmarks.representations_report import machine
from hybridlm.checkpoint import load_model
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig, apply_overrides, changed_keys, read_yaml
from training.corpus import PcmCache
from training.evaluate import score_clips
from training.manifest import TagRule
from training.run import train_mapping
from training.state import checkpoints

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
    seeds: int = 3
    score: Literal["test", "validation"] = "validation"
    """Split of the figures; settings are chosen on `validation`, the part of the training split that is held back."""
    validation_fraction: float = 0.02
    test_clips: int = 12
    """Of each set, evenly spread over it."""
    test_seconds: float = 6.0
    """Of each clip its beginning is scored, at most this much."""
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Noise on the latents that are decoded, beside none."""
    sigma: float = 0.1
    """Noise on the latents that the language model learns and is scored on; one of `sigmas`."""
    precision: str = "auto"
    batch_size: int = 16
    segment_frames: int = 25
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `F3Config` that all share, as the next two."""
    losses: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.99
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig`."""
    model_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model_ema_decay: float = 0.99
    model_seconds: float = 5400.0
    """Audio of the training split that a language model hears, in parts of at most a window."""
    batch_frames: int = 1500
    max_frames: int = 250
    """Longest window of a language model."""

    def __post_init__(self) -> None:
        for name in ("steps", "model_steps", "seeds", "test_clips", "batch_frames", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.first not in self.variants:
            raise ValueError(f"first={self.first} is none of the variants {', '.join(self.variants)}")
        if self.sigma not in self.sigmas or min(self.sigmas) <= 0:
            raise ValueError(f"sigma={self.sigma} must be one of sigmas={list(self.sigmas)}, all above 0")


class Job(NamedTuple):
    """One run."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}/{self.seed}"


def folder_of(study: Study, job: Job) -> Path:
    return Path(study.output) / job.variant / f"seed{job.seed}"


def result_path(study: Study, job: Job) -> Path:
    return folder_of(study, job) / f"{study.score}.json"


def _run(study: Study, output: Path, seed: int, steps: int) -> dict[str, Any]:
    """Settings that all trainings share."""
    return {
        "output": str(output),
        "seed": seed,
        "max_steps": steps,
        "device": "cpu",
        "precision": study.precision,
        "threads": 1,
        "validate_every": steps,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "tensorboard": False,
    }


def codec_settings(study: Study, job: Job) -> dict[str, Any]:
    """The autoencoder's training run."""
    variant = study.variants[job.variant]
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
    run = _run(study, folder_of(study, job) / "codec", job.seed, study.steps)
    run |= {"task": "tokenizer", "ema_decay": study.ema_decay, "optimizer": asdict(study.optimizer)}
    return dict(plain({**run, "tokenizer_task": section}))


def model_settings(study: Study, job: Job, spread: float) -> dict[str, Any]:
    """The language model's training run, on latents of this spread."""
    folder = folder_of(study, job)
    data = {
        "caches": [str(folder / "train")],
        "validation_fraction": 0.0,  # nothing is chosen by it
        "validation_frames": study.batch_frames,
        "batch_frames": study.batch_frames,
        "max_frames": study.max_frames,
    }
    own = {"representation": "continuous", "sigma": study.sigma * spread, "max_frames": study.max_frames}
    section = {
        "tokenizer": str(folder / "codec" / "model"),
        "data": data,
        "text": {"model": str(Path(study.output) / "text.model")},
        "model": {**study.model, **own},
        "losses": {"alignment_weight": 0},
    }
    run = _run(study, folder / "model", job.seed, study.model_steps)
    run |= {"task": "language", "ema_decay": study.model_ema_decay, "optimizer": asdict(study.model_optimizer)}
    return dict(plain({**run, "language": section}))


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


def run_one(study: Study, job: Job) -> dict[str, Any] | None:
    """Train and score one codec and its language model, unless that is done; None when it was interrupted.

    Raises:
        UserError: the run's folder holds a result of other settings; or what training says.
    """
    torch.set_num_threads(1)
    if (done := read_result(study, job)) is not None:
        return done
    folder, test = folder_of(study, job), scoring_settings(study)
    if not train_mapping(codec_settings(study, job), f"{job}: codec", resume=True).finished:
        return None
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
    settings = model_settings(study, job, spread)
    if not train_mapping(settings, f"{job}: model", resume=True).finished:
        return None
    parts = judged_parts(judged, study.test_seconds, study.test_clips)
    tests = write_frames(judged, parts, codec, folder / study.score)
    clips = score_clips(load_model(folder / "model" / "model"), tests, window_frames=study.max_frames, with_text=False)
    sigmas = (0.0, *study.sigmas)
    result = {
        "codec_settings": codec_settings(study, job),
        "model_settings": settings,
        "test": test,
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
    write(result_path(study, job), json.dumps(result, indent=1) + "\n")
    return result


def _progress(folder: Path) -> dict[str, Any]:
    """How far a training run came."""
    state = json.loads((checkpoints(folder)[-1] / "state.json").read_text(encoding="utf-8"))["progress"]
    return {"steps": state["step"], "skipped_steps": state["bad_steps"], "seconds": state["seconds"]}


def _last_figure(log: Path, name: str) -> float | None:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return next((line[name] for line in reversed(lines) if name in line), None)


def read_result(study: Study, job: Job) -> dict[str, Any] | None:
    """A finished run's result, if it is there.

    Raises:
        UserError: it was made with other settings.
    """
    path = result_path(study, job)
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now = {
        "codec_settings": codec_settings(study, job),
        "model_settings": model_settings(study, job, result["spread"]),
        "test": scoring_settings(study),
    }
    for part, settings in now.items():
        if changed := changed_keys(result[part], settings):
            raise UserError(f"{path} was made with other settings ({', '.join(changed)}); choose another output")
    return result


def report(study: Study, jobs: Sequence[Job], command: str, options: argparse.Namespace) -> str:
    """Write the figures of the runs that are there."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.variants}
    for job in jobs:
        if (result := read_result(study, job)) is not None:
            found[job.variant][job.seed] = result
    figures = compare(found, study.first)
    count = sum(map(len, found.values()))
    missing = "" if count == len(jobs) else f" **{count} of {len(jobs)} runs are done.**"
    head = [
        f"`{command}`",
        f"{study.seeds} seeds; autoencoders: {study.steps} steps of {study.batch_size} x {study.segment_frames} "
        f"frames; language models: {study.model_steps} steps of at most {study.batch_frames} frames, from "
        f"{study.model_seconds:g} s of audio. Tests: at most {study.test_clips} clips a set of split {study.score}, "
        f"the first {study.test_seconds:g} s of each.{missing}",
    ]
    text = markdown(figures, {name: variant.about for name, variant in study.variants.items()}, head)
    write(options.markdown, text)
    write(options.json, json.dumps({"command": command, "study": asdict(study), **figures}, indent=1) + "\n")
    return text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "bottlenecks.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seeds=1 steps=50")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--one", help="VARIANT/SEED: only this run")
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "bottlenecks.md")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bottlenecks.json")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = shlex.join(["python", "-m", "benchmarks.bottlenecks", *given])
    try:
        mapping = apply_overrides(read_yaml(options.config), options.overrides)
        study = from_mapping(Study, mapping, where=str(options.config))
        jobs = [Job(variant, seed) for seed in range(study.seeds) for variant in study.variants]
        if options.one:
            named = {str(job): job for job in jobs}
            if options.one not in named:
                raise UserError(f"--one {options.one} is none of {', '.join(named)}")
            return 0 if run_one(study, named[options.one]) is not None else 130
        empty_text(Path(study.output))
        run_jobs(
            [job for job in jobs if read_result(study, job) is None],
            processes=options.jobs,
            run_one=lambda job: run_one(study, job),
            module="benchmarks.bottlenecks",
            arguments=["--config", str(options.config), *options.overrides],
            folder_of=lambda job: folder_of(study, job),
            done=lambda job: print(report(study, jobs, command, options), file=sys.stderr, flush=True),
        )
        print(report(study, jobs, command, options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
