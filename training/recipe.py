"""What `hybridlm compare` compares: a recipe's settings, and the runs that follow from them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizer.settings import from_mapping
from training.config import OptimizerConfig
from training.derived import Control
from training.fidelity import FidelityConfig
from training.manifest import TagRule
from training.runs import Run, plain, training_settings

AUDIO_ALONE = (TagRule(text=False),)


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainConfig:
    """One kind of audio; its models hear nothing else."""

    data: str | None = None
    """A manifest or a folder of audio, which is prepared with every tokenizer that is compared."""
    caches: tuple[str, ...] = ()
    """Or: what `hybridlm prepare` made of it with the recipe's own tokenizer; split `train` is trained on."""
    test_caches: tuple[str, ...] = ()
    """Where split `test` is; none: the same caches."""
    rules: tuple[TagRule, ...] = AUDIO_ALONE
    """Which clips, as in training."""
    fidelity: FidelityConfig | None = None
    """What of the test clips is coded and decoded, to say what the tokenizers lose; it needs `data`. None: nothing."""
    about: str = ""
    """What the recordings are, for the report."""

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.caches):
            raise ValueError("give either data, a manifest or a folder of audio, or caches made by `hybridlm prepare`")
        if self.fidelity is not None and self.data is None:
            raise ValueError("fidelity needs the recordings themselves; give data")
        if not self.rules:
            raise ValueError("rules=[] would leave all clips out; leave it away for all clips, without text and tags")


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """A model of the comparison."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` of its own."""
    tokenizer: str | None = None
    """None: the recipe's."""
    control: Control = "none"
    """What is done to the features that it reads, in training and in the test."""
    share: float = 1.0
    """Of the frames to be trained on; the test is the same for all."""
    against: tuple[str, ...] | None = None
    """Variants that it is held against. None: the recipe's base."""
    seeds: int | None = None
    """None: as many as the recipe has; large models may have fewer."""
    steps: int | None = None
    """None: as many as the recipe has."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `OptimizerConfig` of its own; the rate that suits a small model is too much for a large one."""
    about: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A comparison; configs/compare.yaml is one."""

    output: str
    """Folder of all runs, and of the report."""
    title: str = "Variants compared"
    notes: tuple[str, ...] = ()
    """What the report says before its tables."""
    tokenizer: str = "box"
    """Name or folder."""
    text_model: str | None = None
    """A text model, or a model's folder that has one, for models that hear text and tags as the rules leave them.
    None: models of audio alone."""
    domains: dict[str, DomainConfig]
    variants: dict[str, VariantConfig]
    base: str
    """Variant that the others are held against, where they name none."""
    same_parameters: float | None = None
    """Largest relative difference of two variants' numbers of parameters; None: they may differ."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that all variants share."""
    steps: int | None = None
    """Training steps of every variant; or"""
    compute: float | None = None
    """floating-point operations of a training, which buy a cheaper variant more steps."""
    seeds: int = 3
    batch_frames: int = 2000
    max_frames: int = 250
    """Longest window, in training and in the test."""
    score: Literal["test", "validation"] = "test"
    """Split of the figures; settings are chosen on `validation`, the part of the training split that is held back."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights of a run are scored: the last, or those of its best validation, for variants that overfit sooner
    than others."""
    test_seconds: float = 60.0
    """Of each clip its beginning is scored, at most this much."""
    calibration_clips: int = 16
    """Clips, evenly spread, of which a model's own draws are scored too; 0: none."""
    validation_fraction: float = 0.02
    validation_frames: int = 5000
    validate_every: int = 100
    """Steps between the points of the curves against compute."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    precision: str = "auto"
    threads: int = 1
    """Of a run."""
    ema_decay: float = 0.99
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_frames", "max_frames", "validate_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.domains or not self.variants:
            raise ValueError("domains and variants must each name at least one")
        if (self.steps is None) == (self.compute is None):
            raise ValueError(f"give either steps={self.steps} or compute={self.compute}")
        if (self.steps or 1) < 1 or (self.compute or 1.0) <= 0:
            raise ValueError(f"steps={self.steps} and compute={self.compute} must be above 0")
        if self.text_model is None and any(
            r.text or r.tags or r.keep_tags for d in self.domains.values() for r in d.rules
        ):
            raise ValueError(
                "without a text_model the models hear audio alone: every rule needs text: false and no tags"
            )
        if named := [name for name in (*self.domains, *self.variants) if "/" in name]:
            raise ValueError(f"the name {named[0]} must have no '/': it is a folder's")
        names = ", ".join(self.variants)
        if self.base not in self.variants:
            raise ValueError(f"base={self.base} must be one of the variants, {names}")
        for name, variant in self.variants.items():
            self.optimizer_of(name)
            for other in variant.against or ():
                if other not in self.variants or other == name:
                    raise ValueError(f"variants.{name}.against={other} must be another one of {names}")
            if variant.seeds is not None and not 1 <= variant.seeds <= self.seeds:
                raise ValueError(f"variants.{name}.seeds={variant.seeds} must be from 1 to seeds={self.seeds}")
            if variant.steps is not None and self.compute is not None:
                raise ValueError(f"variants.{name}.steps={variant.steps}: compute={self.compute:g} decides the steps")
            for domain, config in self.domains.items():
                if config.caches and variant.tokenizer not in (None, self.tokenizer):
                    raise ValueError(
                        f"variants.{name}.tokenizer={variant.tokenizer}: the caches of domain {domain} are the "
                        f"tokenizer {self.tokenizer}'s; give data instead, which is prepared with every tokenizer"
                    )

    def against(self, variant: str) -> tuple[str, ...]:
        """Variants that one is held against."""
        others = self.variants[variant].against
        return (() if variant == self.base else (self.base,)) if others is None else others

    def seeds_of(self, variant: str) -> int:
        """How often a variant is trained."""
        return self.variants[variant].seeds or self.seeds

    def tokenizer_of(self, variant: str) -> str:
        """A variant's tokenizer."""
        return self.variants[variant].tokenizer or self.tokenizer

    def model_of(self, variant: str) -> dict[str, Any]:
        """Fields of a variant's `ModelConfig`."""
        return {**self.model, "max_frames": self.max_frames, **self.variants[variant].model}

    def optimizer_of(self, variant: str) -> OptimizerConfig:
        """A variant's optimizer."""
        own = self.variants[variant].optimizer
        return from_mapping(OptimizerConfig, {**asdict(self.optimizer), **own}, where=f"variants.{variant}.optimizer")


def slug(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def runs_of(recipe: Recipe) -> list[Run]:
    """One for each domain, variant and seed, seed after seed."""
    return [
        Run(name=f"{domain}/{variant}/{seed}", folder=folder_of(recipe, domain, variant) / f"seed{seed}")
        for seed in range(recipe.seeds)
        for domain in recipe.domains
        for variant in recipe.variants
        if seed < recipe.seeds_of(variant)
    ]


def folder_of(recipe: Recipe, domain: str, variant: str) -> Path:
    """Of a variant's runs."""
    return Path(recipe.output) / domain / variant


def sources_of(recipe: Recipe, domain: str, tokenizer: str) -> tuple[list[str], list[str]]:
    """Caches of all clips that are trained on, and of those that are scored."""
    config = recipe.domains[domain]
    if config.data is not None:
        folder = str(Path(recipe.output) / "tokens" / slug(tokenizer) / domain)
        return [folder], [folder]
    test = config.test_caches if recipe.score == "test" else ()
    return list(config.caches), list(test or config.caches)


def caches_of(recipe: Recipe, domain: str, variant: str) -> tuple[list[str], list[str]]:
    """As `sources_of`, under the variant's control and share."""
    config = recipe.variants[variant]
    train, test = sources_of(recipe, domain, recipe.tokenizer_of(variant))
    if config.control != "none" or config.share < 1:
        train = [str(derived_folder(recipe, cache, config.control, config.share)) for cache in train]
    if config.control != "none":
        test = [str(derived_folder(recipe, cache, config.control, 1.0)) for cache in test]
    return train, test


def derived_folder(recipe: Recipe, cache: str, control: Control, share: float) -> Path:
    """Where the cache under a control is written, or with a share of what is trained on."""
    name = control if share == 1 else f"{control}-{share:g}"
    return Path(recipe.output) / "derived" / name / slug(cache)


def settings_of(recipe: Recipe, run: Run, steps: int) -> dict[str, Any]:
    """What a result says of how it was made: the training run's settings, and what is scored."""
    domain, variant, seed = run.name.split("/")
    train, test = caches_of(recipe, domain, variant)
    fraction = recipe.validation_fraction
    section = {
        "tokenizer": recipe.tokenizer_of(variant),
        "data": {
            "caches": train,
            "rules": plain([asdict(rule) for rule in recipe.domains[domain].rules]),
            "validation_fraction": fraction,
            "validation_frames": recipe.validation_frames,
            "batch_frames": recipe.batch_frames,
            "max_frames": recipe.max_frames,
        },
        "text": {"model": recipe.text_model or str(Path(recipe.output) / "text.model")},
        "model": recipe.model_of(variant),
        "losses": recipe.losses,
    }
    training = training_settings(
        task="language",
        section=section,
        folder=run.folder,
        seed=int(seed),
        steps=steps,
        optimizer=recipe.optimizer_of(variant),
        precision=recipe.precision,
        ema_decay=recipe.ema_decay,
        validate_every=recipe.validate_every,
        device=recipe.device,
        threads=recipe.threads,
    )
    scored: dict[str, Any] = {
        "caches": test,
        "split": recipe.score,
        "validation_fraction": fraction if recipe.score == "validation" else 0.0,
        "seconds": recipe.test_seconds,
        "calibration_clips": recipe.calibration_clips,
    }
    if recipe.checkpoint != "last":
        scored["checkpoint"] = recipe.checkpoint
    return {"training": training, "test": scored}
