"""WHISPER-GPT's table (arXiv 2412.11449), with the controls that could prove it wrong.

    python -m benchmarks.whisper_gpt [--config benchmarks/whisper_gpt.yaml] [key=value ...] [--jobs 2]
        [--markdown FILE] [--json FILE] [--one DOMAIN/VARIANT/SEED]

Every model predicts the coarsest code of the next frame, and nothing else: from codes alone, from codes and mel slices,
and from what else could explain the gain. A run, of one thread, is in OUTPUT/DOMAIN/VARIANT/seedN; finished ones are
kept, interrupted ones go on. All see the same batches for the same steps. Controls are written once as caches of their
own (OUTPUT/controls): the slices of a clip in random order, so that they tell of the clip but not of the moment, or all
zero. Codes are those of latents without noise (`model.sigma` is 0).

NLL is in nats a coarse code, as in the paper; perplexity is exp(NLL). Differences are paired by clip; intervals, 95 %,
with seeds and clips drawn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.audio_alone import Beginnings, empty_text
from benchmarks.probe_tables import header, row
from benchmarks.representations import DomainConfig
from benchmarks.representations_report import Scores, machine
from benchmarks.study import run_study
from hybridlm.checkpoint import load_model
from tokenizer.errors import UserError
from training.config import OptimizerConfig
from training.corpus import TokenCache
from training.estimates import estimate
from training.evaluate import score_clips
from training.examples import clip_seed
from training.probe import write_json
from training.run import train_mapping
from training.runs import RESULT, Run, plain, progress_of, read_result, training_settings
from training.shards import ShardWriter, Stream

HERE = Path(__file__).resolve().parent
Control = Literal["none", "shuffled", "zeroed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """A model of the table."""

    model: dict[str, Any]
    """Fields of `ModelConfig` of its own."""
    control: Control = "none"
    """What is done to the slices that it reads, in training and in the test."""
    seeds: int | None = None
    """None: as many as the study has; large models may have fewer."""
    about: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is compared; see benchmarks/whisper_gpt.yaml."""

    output: str
    tokenizer: str
    """Name or folder of what made the caches; its features are the slices."""
    domains: dict[str, DomainConfig]
    variants: dict[str, VariantConfig]
    base: str
    """Variant that the others are held against."""
    model: dict[str, Any]
    """Fields that all variants share."""
    steps: int
    seeds: int
    batch_frames: int
    max_frames: int
    score: Literal["test", "validation"] = "test"
    """Settings are chosen on `validation`, the part of the training split that is held back."""
    test_seconds: float
    """Of each clip its beginning is scored, at most this much."""
    validation_fraction: float = 0.02
    validate_every: int
    precision: str = "auto"
    ema_decay: float
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_frames", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.base not in self.variants:
            raise ValueError(f"base={self.base} must be one of the variants, {', '.join(self.variants)}")
        for name, variant in self.variants.items():
            if variant.seeds is not None and not 1 <= variant.seeds <= self.seeds:
                raise ValueError(f"variants.{name}.seeds={variant.seeds} must be from 1 to seeds={self.seeds}")


def seeds_of(study: Study, variant: str) -> int:
    return study.variants[variant].seeds or study.seeds


def runs_of(study: Study) -> list[Run]:
    """Seed after seed."""
    output = Path(study.output)
    return [
        Run(name=f"{domain}/{variant}/{seed}", folder=output / domain / variant / f"seed{seed}")
        for seed in range(study.seeds)
        for domain in study.domains
        for variant in study.variants
        if seed < seeds_of(study, variant)
    ]


def caches_of(study: Study, domain: str, control: Control, *, test: bool = False) -> list[str]:
    """A domain's caches under a control."""
    config = study.domains[domain]
    caches = config.test_caches if test and config.test_caches else config.caches
    if control == "none":
        return list(caches)
    return [str(Path(study.output) / "controls" / control / cache.strip("/").replace("/", "_")) for cache in caches]


def settings_of(study: Study, run: Run) -> dict[str, Any]:
    """What a result says of how it was made: the training run's settings, and what is scored."""
    domain, variant, seed = run.name.split("/")
    config, chosen = study.domains[domain], study.variants[variant]
    fraction = study.validation_fraction
    section = {
        "tokenizer": study.tokenizer,
        "data": {
            "caches": caches_of(study, domain, chosen.control),
            "rules": plain([asdict(rule) for rule in config.rules]),
            "validation_fraction": fraction,
            "validation_frames": 5000,
            "batch_frames": study.batch_frames,
            "max_frames": study.max_frames,
        },
        "text": {"model": str(Path(study.output) / "text.model")},
        "model": {**study.model, "max_frames": study.max_frames, **chosen.model},
        "losses": study.losses,
    }
    training = training_settings(
        task="language",
        section=section,
        folder=run.folder,
        seed=int(seed),
        steps=study.steps,
        optimizer=study.optimizer,
        precision=study.precision,
        ema_decay=study.ema_decay,
        validate_every=study.validate_every,
    )
    test = {
        "caches": caches_of(study, domain, chosen.control, test=study.score == "test"),
        "split": study.score,
        "validation_fraction": fraction if study.score == "validation" else 0.0,
        "seconds": study.test_seconds,
    }
    return {"training": training, "test": test}


def make(study: Study, run: Run) -> bool:
    """Train and score one model; False when it was interrupted."""
    torch.set_num_threads(1)
    about = settings_of(study, run)
    if not train_mapping(about["training"], run.name, resume=True).finished:
        return False
    found = load_model(run.folder / "model")
    tests = Beginnings(
        [Path(cache) for cache in about["test"]["caches"]],
        tokenizer=found.tokenizer,
        split=study.score,
        validation_fraction=about["test"]["validation_fraction"],
        rules=study.domains[run.name.split("/")[0]].rules,
    )
    tests.max_frames = max(1, round(study.test_seconds * tests.frame_rate_hz))
    clips = [asdict(clip) for clip in score_clips(found, tests, window_frames=study.max_frames, with_text=False)]
    progress = progress_of(run.folder)
    result = {
        **about,
        "parameters": found.model.num_parameters(),
        "frame_rate_hz": tests.frame_rate_hz,
        "codebook_size": tests.codebook_size,
        "steps": progress["step"],
        "training_seconds": progress["seconds"],
        "tokenizer": tests.tokenizer,
        "machine": machine(study.precision),
        "clips": clips,
    }
    write_json(run.folder / RESULT, result)
    return True


def write_controls(study: Study) -> None:
    """The caches of the controls, as far as they are missing."""
    for control in dict.fromkeys(variant.control for variant in study.variants.values()):
        if control == "none":
            continue
        for domain in study.domains:
            for test in (False, True):
                from_to = zip(
                    caches_of(study, domain, "none", test=test),
                    caches_of(study, domain, control, test=test),
                    strict=True,
                )
                for source, target in from_to:
                    write_control(Path(source), Path(target), control)


def write_control(source: Path, target: Path, control: Control) -> None:
    """A cache of the same frames but for their features, going on where an earlier call stopped.

    Raises:
        UserError: a cache without features.
    """
    cache = TokenCache(source)
    reader = cache.index.readers[0]
    if "features" not in reader.streams:
        raise UserError(f"{source} has no features; prepare it with a tokenizer that gives slices, such as log-mel:box")
    streams = {name: Stream(dtype=found.dtype, width=found.width) for name, found in reader.streams.items()}
    about = {name: reader.meta[name] for name in ("tokenizer", "frame_rate_hz", "codebook_size")}
    records: list[tuple[str, dict[str, Any]]] = []
    with ShardWriter(target, kind="tokens", streams=streams, about=about) as writer:
        for number in range(len(cache)):
            clip = cache[number]
            facts = {"split": clip.split, "text": clip.text, "tags": list(clip.tags), "labels": clip.labels}
            records.append((clip.key, facts))
            if clip.key in writer.places:
                continue
            assert clip.features is not None
            features = torch.zeros_like(clip.features)
            if control == "shuffled":
                generator = torch.Generator().manual_seed(clip_seed(clip.key))
                features = clip.features[torch.randperm(len(clip.features), generator=generator)]
            rows = {"codes": clip.codes.T.numpy(), "latents": clip.latents.numpy(), "features": features.numpy()}
            writer.append(clip.key, control, rows)
        writer.finish(records)


def compare(study: Study, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One domain's figures by variant; seeds that the base lacks are left out of a difference.

    Raises:
        UserError: runs of other test frames.
    """
    scores = {variant: Scores(results) for variant, results in found.items()}
    base = scores[study.base]
    frames = torch.tensor([count for _, count in base.names], dtype=torch.float64)
    figures: dict[str, Any] = {}
    for variant, score in scores.items():
        if score.names != base.names:
            raise UserError("the runs are of different test clips; remove them and run again")
        nats = score.nats(lambda clip: clip.codes[0])
        right = score.nats(lambda clip: float(clip.correct[0]))
        nll = estimate(nats, frames)
        figures[variant] = {
            "parameters": score.results[0]["parameters"],
            "training_seconds": [result["training_seconds"] for result in score.results],
            "nll": nll,
            "accuracy": estimate(right, frames),
            "perplexity": math.exp(nll["value"]),
            "bits_per_second": nll["value"] / math.log(2) * score.results[0]["frame_rate_hz"],
        }
        if variant != study.base:
            shared = min(len(nats), len(base.results))
            figures[variant]["difference"] = estimate(
                nats[:shared] - base.nats(lambda clip: clip.codes[0])[:shared], frames
            )
    return figures


def report(study: Study, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown and figures of finished runs."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {domain: {} for domain in study.domains}
    for run in runs_of(study):
        domain, variant, _ = run.name.split("/")
        results[domain].setdefault(variant, []).append(read_result(run.folder, settings_of(study, run)) or {})
    domains = {domain: compare(study, found) for domain, found in results.items()}
    one = results[next(iter(study.domains))][study.base][0]
    lines = [
        "# WHISPER-GPT's table, with controls",
        "",
        f"`{command}`",
        "",
        f"Predicted is the coarsest code of the next frame, 1 of {one['codebook_size']}, {one['frame_rate_hz']:g} a "
        f"second. {study.steps} steps of at most {study.batch_frames} frames for all, the same batches, peak learning "
        f"rate {study.optimizer.learning_rate:g}; of each clip of split {study.score} the first {study.test_seconds:g} "
        f"s. NLL in nats a code; differences from {study.base}, paired by clip; brackets: 95 % intervals with seeds "
        "and clips drawn.",
        "",
        f"{one['machine']}; tokenizer {one['tokenizer']}.",
    ]
    for domain, figures in domains.items():
        about = study.domains[domain].about
        lines += ["", f"## {domain}" + (f" ({about})" if about else ""), ""]
        names = ["model", "parameters", "seeds", "NLL", "accuracy, %", "perplexity", f"NLL - {study.base}", "each seed"]
        lines += header([*names, "training, min a run"])
        for variant, found in figures.items():
            difference = found.get("difference")
            each = ", ".join(f"{value:+.3f}" for value in difference["per_seed"]) if difference else "-"
            minutes = sum(found["training_seconds"]) / len(found["training_seconds"]) / 60
            cells = [variant, f"{found['parameters']:,}", str(len(found["training_seconds"])), _cell(found["nll"], 3)]
            cells += [_cell(found["accuracy"], 1, scale=100), f"{found['perplexity']:.1f}"]
            lines.append(row([*cells, _cell(difference, 3, "+") if difference else "-", each, f"{minutes:.1f}"]))
    lines += ["", *(f"- {name}: {variant.about}" for name, variant in study.variants.items() if variant.about)]
    return "\n".join(lines) + "\n", {"command": command, "study": plain(asdict(study)), "domains": domains}


def _cell(figure: dict[str, Any], digits: int, sign: str = "", scale: float = 1.0) -> str:
    value, low, high = (f"{scale * x:{sign}.{digits}f}" for x in (figure["value"], *figure["interval"]))
    return f"{value} [{low}, {high}]"


def check(study: Study) -> None:
    """What all runs share is made before they begin."""
    empty_text(Path(study.output))
    write_controls(study)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study(
        arguments,
        module="benchmarks.whisper_gpt",
        description=__doc__,
        config=HERE / "whisper_gpt.yaml",
        settings=Study,
        runs_of=runs_of,
        make=make,
        is_done=lambda study, run: read_result(run.folder, settings_of(study, run)) is not None,
        report=report,
        check=check,
    )


if __name__ == "__main__":
    sys.exit(main())
