"""Acoustics injected into frozen semantics (DashengTokenizer), beside semantics alone and other codecs.

    python -m benchmarks.injection probes.data=MANIFEST [--config benchmarks/injection.yaml] [key=value ...] [--jobs 2]
        [--markdown FILE] [--json FILE] [--one NAME]

A semantic encoder is trained once (OUTPUT/semantic-encoder; or `semantic` names one) and frozen. Every variant and seed
is then one training of one thread in OUTPUT/VARIANT/seedN, on the same audio and for the same steps: decoders of frozen
semantics alone, of semantics with acoustics injected, and codecs without semantics. Each is probed, and reconstructs
test recordings; so are tokenizers trained elsewhere (`given`). What is finished is kept, what was interrupted goes on;
`--one` makes a single run and no report.

No probed clip is trained on. Intervals: 95 %, seeds and clips (or the groups left out) drawn; differences are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.injection_report import report_of
from benchmarks.probe_tables import FLOOR, ProbeClips, ProbeConfig, probed_by, read_tasks, tell
from benchmarks.reconstruction import ReconstructionConfig, read_reconstruction, reconstruct
from benchmarks.study import run_study
from hybridlm.checkpoint import load_codec
from tokenizer.frames import Tokenizer
from training.config import OptimizerConfig
from training.embeddings import LogMel, TokenizerFrames, default_input
from training.machine import machine
from training.manifest import apply_rules, read_manifest
from training.masked_spectrogram import MaskedSpectrogramConfig
from training.probe import write_json
from training.run import train_mapping
from training.runs import RESULT, Run, plain, progress_of, read_result, training_settings
from training.segments import PcmCache
from training.tokenizer_data import TokenizerDataConfig

HERE = Path(__file__).resolve().parent
SEMANTIC = "semantic-encoder"


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """The semantic encoder that is trained where no published one can be had."""

    steps: int
    encoder: MaskedSpectrogramConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """A tokenizer to train."""

    task: Literal["dasheng", "tokenizer"]
    tokenizer: dict[str, Any]
    """Its shape: fields of `DashengConfig` or of `F3Config`."""
    losses: dict[str, Any] = field(default_factory=dict)
    segment_frames: int | None = None
    """Where its frames are not as long as the others'; None: as `data` says."""
    window_frames: int | None = None
    """Of a dasheng: frames that the semantic encoder hears together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is compared; see benchmarks/injection.yaml."""

    output: str
    data: TokenizerDataConfig
    """What all tokenizers are trained on."""
    probes: ProbeConfig
    reconstruction: ReconstructionConfig
    variants: dict[str, VariantConfig]
    base: str
    """Variant that the others are held against."""
    steps: int
    given: dict[str, str] = field(default_factory=dict)
    """Tokenizers trained elsewhere, by the table's name: folders, or `box`."""
    semantic: str | None = None
    """Folder or hub id of a semantic encoder; None: train `semantic_model`."""
    semantic_model: SemanticConfig | None = None
    seeds: int
    validate_every: int
    precision: str = "auto"
    ema_decay: float
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    notes: tuple[str, ...] = ()
    """What the report says of the data before its tables."""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if (self.semantic is None) == (self.semantic_model is None):
            raise ValueError("give either semantic, an encoder to freeze, or semantic_model, which is trained")
        if self.base not in self.variants:
            raise ValueError(f"base={self.base} must be one of the variants, {', '.join(self.variants)}")
        names = [FLOOR, SEMANTIC, *self.variants, *self.given]
        if len(set(names)) < len(names):
            raise ValueError(f"the names {', '.join(names)} must all differ")


def runs_of(study: Study) -> list[Run]:
    """The semantic encoder first, for others wait for it; then seed after seed."""
    output, trained = Path(study.output), []
    for seed in range(study.seeds):
        for name, variant in study.variants.items():
            needs = (SEMANTIC,) if variant.task == "dasheng" and study.semantic is None else ()
            trained.append(Run(name=f"{name}/{seed}", folder=output / name / f"seed{seed}", needs=needs))
    first = [Run(name=SEMANTIC, folder=output / SEMANTIC)] if any(run.needs for run in trained) else []
    given = [Run(name=name, folder=output / name) for name in (FLOOR, *study.given)]
    return [*first, *given, *trained]


def settings_of(study: Study, run: Run) -> dict[str, Any]:
    """A run's training settings, or which tokenizer is given."""
    shared = {
        "folder": run.folder,
        "precision": study.precision,
        "ema_decay": study.ema_decay,
        "validate_every": study.validate_every,
    }
    if run.name == SEMANTIC:
        assert study.semantic_model is not None
        model = study.semantic_model
        return training_settings(
            task="masked_spectrogram",
            section=asdict(model.encoder),
            seed=0,
            steps=model.steps,
            optimizer=model.optimizer,
            **shared,
        )
    name, slash, seed = run.name.rpartition("/")
    if not slash:
        return {"tokenizer": study.given.get(run.name)}
    variant = study.variants[name]
    data = asdict(study.data) | ({"segment_frames": variant.segment_frames} if variant.segment_frames else {})
    section = {"data": data, "tokenizer": variant.tokenizer, "losses": variant.losses}
    if variant.task == "dasheng":
        semantic = study.semantic or str(Path(study.output) / SEMANTIC / "model")
        section |= {"semantic": semantic, "window_frames": variant.window_frames}
        if study.semantic_model is not None:
            encoder = study.semantic_model.encoder.encoder
            encoder = replace(encoder, window_frames=variant.window_frames or encoder.window_frames)
            section["tokenizer"] = {**variant.tokenizer, "semantic": asdict(encoder)}
    return training_settings(
        task=variant.task,
        section=section,
        seed=int(seed),
        steps=study.steps,
        optimizer=study.optimizer,
        **shared,
    )


def is_done(study: Study, run: Run) -> bool:
    """Whether a run is trained, probed and heard.

    Raises:
        UserError: it was made with other settings.
    """
    parts: list[Any] = [read_result(run.folder, {"made": settings_of(study, run)})]
    if run.name != SEMANTIC:
        parts += [read_tasks(study.probes, one.folder, one.seed) for one in probed_by(run, study.seeds)]
    if run.name not in (SEMANTIC, FLOOR):
        parts.append(read_reconstruction(study.reconstruction, study.probes.data, run.folder))
    return None not in parts


def make(study: Study, run: Run) -> bool:
    """Train, probe and reconstruct, as far as that is not done; False when it was interrupted.

    Raises:
        UserError: what training says, or probed clips among those trained on.
    """
    torch.set_num_threads(1)
    check(study)
    settings = settings_of(study, run)
    about: dict[str, Any] = {"made": settings, "machine": machine(study.precision)}
    if run.name == SEMANTIC or "/" in run.name:
        if not train_mapping(settings, run.name, resume=True).finished:
            return False
        progress = progress_of(run.folder)
        about |= {"steps": progress["step"], "training_seconds": progress["seconds"]}
    if run.name != SEMANTIC:
        clips = ProbeClips(study.probes)
        if run.name == FLOOR:
            vectors = clips.embed(LogMel())
        else:
            tokenizer = load_codec(study.given.get(run.name) or str(run.folder / "model"))
            reconstruct(study.reconstruction, study.probes.data, run.folder, run.name, tokenizer)
            vectors = clips.embed(TokenizerFrames(tokenizer, (default_input(tokenizer),), run.name))
            about |= {"weights": weights_of(tokenizer), "tokenizer": tokenizer.fingerprint()}
        for variant, seed, folder in probed_by(run, study.seeds):
            clips.score(folder, variant, vectors, seed)
    write_json(run.folder / RESULT, about)
    return True


def weights_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Numbers of weights: those that are frozen, those of the decoder, and all."""
    if not isinstance(tokenizer, nn.Module):
        return {}
    named = list(tokenizer.named_parameters())
    decoder = ("decoder.", "upsampler.", "expand.")
    return {
        "frozen": sum(p.numel() for name, p in named if name.startswith("encoder.model.")),
        "decoder": sum(p.numel() for name, p in named if name.startswith(decoder)),
        "all": sum(p.numel() for _, p in named),
    }


def check(study: Study) -> None:
    """See `ProbeClips.check_unheard`; of all that is trained here."""
    clips = ProbeClips(study.probes)
    for data in [study.data, *([study.semantic_model.encoder.data] if study.semantic_model else [])]:
        if data.caches:
            cache = PcmCache([Path(folder) for folder in data.caches], split="train", rules=data.rules)
            keys = [cache.index.clip(number).key for number in range(len(cache))]
        else:
            found = [clip for source in data.sources for clip in read_manifest(Path(source), split="train").clips]
            keys = [clip.key for clip in apply_rules(found, data.rules)]
        clips.check_unheard(keys)


def report(study: Study, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown and figures of finished runs."""
    probes: dict[str, list[dict[str, Any]]] = {name: [] for name in (FLOOR, *study.given, *study.variants)}
    heard: dict[str, list[dict[str, Any]]] = {}
    abouts: dict[str, list[dict[str, Any]]] = {}
    for run in runs_of(study):
        about = read_result(run.folder, {"made": settings_of(study, run)}) or {}
        abouts.setdefault(run.name.rpartition("/")[0] or run.name, []).append(about)
        if run.name == SEMANTIC:
            continue
        for variant, seed, folder in probed_by(run, study.seeds):
            probes[variant].append(read_tasks(study.probes, folder, seed) or {})
            if variant != FLOOR:
                found = read_reconstruction(study.reconstruction, study.probes.data, run.folder)
                heard.setdefault(variant, []).append(found or {})
    others = [f"{name}: {variant.segment_frames}" for name, variant in study.variants.items() if variant.segment_frames]
    frames = f"{study.data.segment_frames} frames" + (f" ({', '.join(others)})" if others else "")
    lines = [
        "# Acoustics injected into frozen semantics",
        "",
        f"`{command}`",
        "",
        f"{study.seeds} seeds, {study.steps} steps of {study.data.batch_size} segments of {frames} for all that is "
        f"trained, the same segments, peak learning rate {study.optimizer.learning_rate:g}. Probed is the mean over "
        "time of the features, or of the latents where a tokenizer has no features; of the log-mel, mean and standard "
        "deviation. Brackets: 95 % intervals with seeds and clips (or the groups left out) drawn; differences are "
        "paired. What is not trained here has no seeds but those of its linear probes.",
        "",
        *(line for note in study.notes for line in (note, "")),
        f"{machine(study.precision)}.",
        "",
    ]
    heard = {name: heard[name] for name in probes if name in heard}
    body, figures = report_of(study.base, study.probes, study.reconstruction, probes, heard, abouts)
    return "\n".join([*lines, *body]) + "\n", {"command": command, "study": plain(asdict(study)), **figures}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study(
        arguments,
        module="benchmarks.injection",
        description=__doc__,
        config=HERE / "injection.yaml",
        settings=Study,
        runs_of=runs_of,
        make=make,
        is_done=is_done,
        report=report,
        check=check,
        tell=lambda study, run: tell(study.probes, run, study.seeds) if run.name != SEMANTIC else None,
    )


if __name__ == "__main__":
    sys.exit(main())
