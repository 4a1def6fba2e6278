"""Discrete, continuous and hybrid models of the same size, trained on the same batches, scored on the same frames.

    python -m benchmarks.representations [--config benchmarks/representations.yaml] [key=value ...] [--jobs 2]
        [--markdown FILE] [--json FILE] [--one DOMAIN/VARIANT/SEED]

Every variant of a domain is one training run of one thread in OUTPUT/DOMAIN/VARIANT/seedN. Runs whose `result.json` is
there are not made again, interrupted ones go on; `--one` makes a single run and no report. Variants share everything
but the sizes and the representation: data and its order, steps, noise, optimizer, and parameters to within 5 %.

Test clips are scored as `hybridlm evaluate` does: latents z + sigma * eps, eps decided by the clip, and the codes of
these same latents. So codes of hybrid and discrete models compare, and a hybrid's codes + latents bound the NLL of the
very latents that a continuous model scores. Differences are paired by clip; below 0 the first model is the better one.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.audio_alone import Beginnings, empty_text
from benchmarks.representations_report import compare, machine, markdown
from benchmarks.study import run_study
from hybridlm.checkpoint import load_model
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig
from training.corpus import TokenCache
from training.evaluate import score_clips
from training.manifest import TagRule
from training.probe import write_json
from training.run import train_mapping
from training.runs import RESULT, Run, plain, progress_of, read_result, training_settings

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.05
"""Largest relative difference of two variants' parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainConfig:
    """One kind of audio; its models hear nothing else."""

    caches: tuple[str, ...]
    """Made by `hybridlm prepare`; split `train` is trained on."""
    test_caches: tuple[str, ...] = ()
    """Where split `test` is; none: the same caches."""
    rules: tuple[TagRule, ...] = ()
    """Which clips, as in training. Give them no tags and no text, for models of audio alone."""
    about: str = ""
    """What the recordings are, for the report."""

    def __post_init__(self) -> None:
        if any(rule.text or rule.tags or rule.keep_tags for rule in self.rules) or not self.rules:
            raise ValueError("rules must be given, with text: false and no tags: the models compared hear audio alone")


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is compared; see benchmarks/representations.yaml."""

    output: str
    tokenizer: str
    """Name or folder of what made the caches."""
    domains: dict[str, DomainConfig]
    variants: dict[str, dict[str, Any]]
    """Fields of `ModelConfig` by the variant's name, such as representation and ffn_dim."""
    model: dict[str, Any]
    """Fields that all variants share."""
    steps: int
    seeds: int
    batch_frames: int
    max_frames: int
    """Longest window, in training and in the test."""
    score: Literal["test", "validation"] = "test"
    """Split of the figures; settings are chosen on `validation`, the part of the training split that is held back."""
    test_seconds: float
    """Of each clip its beginning is scored, at most this much."""
    validation_fraction: float = 0.02
    validation_frames: int = 5000
    validate_every: int
    precision: str = "auto"
    ema_decay: float
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_frames", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.domains or not self.variants:
            raise ValueError("domains and variants must each name at least one")


class Job(NamedTuple):
    """One run."""

    domain: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.domain}/{self.variant}/{self.seed}"


# What is run


def folder_of(study: Study, job: Job) -> Path:
    return Path(study.output) / job.domain / job.variant / f"seed{job.seed}"


def model_settings(study: Study, variant: str) -> dict[str, Any]:
    return {**study.model, "max_frames": study.max_frames, **study.variants[variant]}


def settings_of(study: Study, job: Job) -> dict[str, Any]:
    """The training run's settings."""
    domain = study.domains[job.domain]
    section = {
        "tokenizer": study.tokenizer,
        "data": {
            "caches": list(domain.caches),
            "rules": plain([asdict(rule) for rule in domain.rules]),
            "validation_fraction": study.validation_fraction,
            "validation_frames": study.validation_frames,
            "batch_frames": study.batch_frames,
            "max_frames": study.max_frames,
        },
        "text": {"model": str(Path(study.output) / "text.model")},
        "model": model_settings(study, job.variant),
        "losses": study.losses,
    }
    return training_settings(
        task="language",
        section=section,
        folder=folder_of(study, job),
        seed=job.seed,
        steps=study.steps,
        optimizer=study.optimizer,
        precision=study.precision,
        ema_decay=study.ema_decay,
        validate_every=study.validate_every,
    )


def scoring_settings(study: Study, domain: str) -> dict[str, Any]:
    config = study.domains[domain]
    caches = config.test_caches if study.score == "test" and config.test_caches else config.caches
    fraction = study.validation_fraction if study.score == "validation" else 0.0
    return {
        "caches": list(caches),
        "split": study.score,
        "validation_fraction": fraction,
        "seconds": study.test_seconds,
    }


def check_sizes(study: Study, domain: str) -> dict[str, int]:
    """Parameters by variant.

    Raises:
        UserError: when two variants differ by more than 5 %.
    """
    vocab_size = empty_text(Path(study.output)).vocab_size
    cache = TokenCache([Path(folder) for folder in study.domains[domain].caches], rules=study.domains[domain].rules)
    derived = {name: getattr(cache, name) for name in ("num_codebooks", "codebook_size", "latent_dim", "feature_dim")}
    derived |= {"vocab_size": vocab_size, "frame_rate_hz": cache.frame_rate_hz}
    counts = {}
    for variant in study.variants:
        config = from_mapping(ModelConfig, {**model_settings(study, variant), **derived}, where=f"variants.{variant}")
        counts[variant] = HybridLM(config).num_parameters()
    if max(counts.values()) > (1 + TOLERANCE) * min(counts.values()):
        raise UserError(f"parameters {counts} must agree within {TOLERANCE:.0%}; change the variants' ffn_dim")
    return counts


def run_one(study: Study, job: Job) -> dict[str, Any] | None:
    """Train and score one model, unless that is done; None when it was interrupted.

    Raises:
        UserError: the run's folder holds a result of other settings; or what training says.
    """
    torch.set_num_threads(1)
    folder, settings = folder_of(study, job), settings_of(study, job)
    about = result_settings(study, job)
    if (done := read_result(folder, about)) is not None:
        return done
    empty_text(Path(study.output))
    if not train_mapping(settings, str(job), resume=True).finished:
        return None
    found = load_model(folder / "model")
    tests = Beginnings(
        [Path(cache) for cache in about["test"]["caches"]],
        tokenizer=found.tokenizer,
        split=study.score,
        validation_fraction=about["test"]["validation_fraction"],
        rules=study.domains[job.domain].rules,
    )
    tests.max_frames = max(1, round(study.test_seconds * tests.frame_rate_hz))
    started = time.perf_counter()
    clips = [asdict(clip) for clip in score_clips(found, tests, window_frames=study.max_frames, with_text=False)]
    progress = progress_of(folder)
    result = {
        **about,
        "parameters": found.model.num_parameters(),
        "frame_rate_hz": tests.frame_rate_hz,
        "representation": found.model.config.representation,
        "sigma": found.model.config.sigma,
        "scale_floor": found.model.config.scale_floor,
        "steps": progress["step"],
        "skipped_steps": progress["bad_steps"],
        "frames_trained": frames_trained(study, job),
        "training_seconds": progress["seconds"],
        "test_wall_seconds": time.perf_counter() - started,
        "tokenizer": tests.tokenizer,
        "machine": machine(study.precision),
        "clips": clips,
    }
    write_json(folder / RESULT, result)
    return result


def result_settings(study: Study, job: Job) -> dict[str, Any]:
    """What a run's result says of how it was made."""
    return {"training": settings_of(study, job), "test": scoring_settings(study, job.domain)}


def frames_trained(study: Study, job: Job) -> int:
    """Frames in the batches of the run, padding not counted: a matter of the seed, not of the variant."""
    domain = study.domains[job.domain]
    cache = TokenCache(
        [Path(folder) for folder in domain.caches],
        split="train",
        validation_fraction=study.validation_fraction,
        rules=domain.rules,
    )
    batches = cache.batches(seed=job.seed, batch_frames=study.batch_frames, max_frames=study.max_frames)
    return sum(window.frames for batch in itertools.islice(batches, study.steps) for window in batch)


def conditions(study: Study, command: str) -> list[str]:
    """What the report says of the runs before its tables."""
    return [
        f"`{command}`",
        f"{study.seeds} seeds, {study.steps} steps of at most {study.batch_frames} frames, windows of at most "
        f"{study.max_frames} frames, peak learning rate {study.optimizer.learning_rate:g} for all. Of each clip "
        f"of split {study.score} the first {study.test_seconds:g} s are scored.",
    ]


def jobs_of(study: Study) -> dict[str, Job]:
    """By name, seed after seed."""
    names = [(domain, variant) for domain in study.domains for variant in study.variants]
    jobs = [Job(domain, variant, seed) for seed in range(study.seeds) for domain, variant in names]
    return {str(job): job for job in jobs}


def check_all_sizes(study: Study) -> None:
    """See `check_sizes`."""
    for domain in study.domains:
        for variant, count in check_sizes(study, domain).items():
            print(f"{domain} {variant}: {count:,} parameters", file=sys.stderr, flush=True)


def result_of(study: Study, job: Job) -> dict[str, Any] | None:
    """A finished run's result, if it is there."""
    return read_result(folder_of(study, job), result_settings(study, job))


def report(study: Study, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown and figures of finished runs."""
    figures = {}
    for domain in study.domains:
        found = {v: [result_of(study, Job(domain, v, seed)) for seed in range(study.seeds)] for v in study.variants}
        figures[domain] = compare({v: [r for r in results if r is not None] for v, results in found.items()})
    about = {name: domain.about for name, domain in study.domains.items()}
    text = markdown(figures, about, conditions(study, command))
    return text, {"command": command, "study": asdict(study), "domains": figures}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study(
        arguments,
        module="benchmarks.representations",
        description=__doc__,
        config=HERE / "representations.yaml",
        settings=Study,
        runs_of=lambda study: [Run(name=n, folder=folder_of(study, job)) for n, job in jobs_of(study).items()],
        make=lambda study, run: run_one(study, jobs_of(study)[run.name]) is not None,
        is_done=lambda study, run: result_of(study, jobs_of(study)[run.name]) is not None,
        report=report,
        check=check_all_sizes,
    )


if __name__ == "__main__":
    sys.exit(main())
