"""What F3's representation encoder learns, and from which loss: RQ-MTP, a frozen language model, both, or neither.

    python -m benchmarks.understanding probes.data=MANIFEST [--config benchmarks/understanding.yaml] [key=value ...]
        [--jobs 2] [--markdown FILE] [--json FILE] [--one NAME]

Every variant and seed is one training of one thread on the cached latents of the frozen codec, in OUTPUT/VARIANT/seedN:
the same encoder, batches and steps for all. Where `llm` names no language model, a small one is trained first
(OUTPUT/text-lm). Every run is then probed on every task, beside the raw latents, the log-mel floor and the same encoder
with its first, random weights, which alone raise a linear probe by their width: what was learned is what exceeds them.
What is finished is kept, what was interrupted goes on; `--one` makes a single run and no report.

No figure rests on labels that training saw: the program refuses probed clips among those trained on, and captions that
name a class. Intervals: 95 %, seeds and clips (or the groups left out) drawn; differences are paired by clip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.probe_tables import (
    FLOOR,
    ProbeClips,
    ProbeConfig,
    Probed,
    compare,
    header,
    probed_by,
    read_tasks,
    row,
    tables,
    tell,
)
from benchmarks.study import run_study
from hybridlm.checkpoint import load_codec
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.representation import RepresentationConfig, RepresentationEncoder
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig
from training.corpus import TokenCache, Window
from training.embeddings import LogMel
from training.machine import machine
from training.probe import write_json
from training.representation_task import RepresentationLossConfig, drawn_latents
from training.run import train_mapping
from training.runs import RESULT, Run, plain, progress_of, read_result, training_settings
from training.text_task import TextTaskConfig
from training.token_data import TokenDataConfig

HERE = Path(__file__).resolve().parent
RAW, UNTRAINED, TEXT_LM = "raw latent", "untrained", "text-lm"
BATCH_FRAMES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModelConfig:
    """The small language model that supervises where no published one can be had."""

    steps: int
    text: TextTaskConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is compared; see benchmarks/understanding.yaml."""

    output: str
    tokenizer: str
    """Folder of the frozen codec that made the caches of latents."""
    data: TokenDataConfig
    """What is trained on, with its captions. Its caches also hold the latents of the probed clips."""
    probes: ProbeConfig
    variants: dict[str, dict[str, Any]]
    """Fields of `RepresentationLossConfig` by the variant's name, such as llm_weight."""
    losses: dict[str, Any]
    """Fields that all variants share."""
    steps: int
    llm: str | None = None
    """Folder or hub id of the language model; None: train `text_model`."""
    text_model: TextModelConfig | None = None
    encoder: RepresentationConfig = field(default_factory=RepresentationConfig)
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
        if (self.llm is None) == (self.text_model is None):
            raise ValueError("give either llm, a language model, or text_model, of which one is trained")
        for name in self.variants:
            if name in (FLOOR, RAW, UNTRAINED, TEXT_LM):
                raise ValueError(f"variants.{name} is a name in use; choose another")
            self.losses_of(name)

    def losses_of(self, variant: str) -> RepresentationLossConfig:
        """A variant's losses."""
        llm = self.llm or str(Path(self.output) / TEXT_LM / "model")
        merged = {**self.losses, **self.variants[variant]}
        found = from_mapping(RepresentationLossConfig, {"llm": llm, **merged}, where=f"variants.{variant}")
        return found if found.llm_weight > 0 else replace(found, llm=None)


# What is run


def runs_of(study: Study) -> list[Run]:
    """The text model first, for others wait for it; then all seeds of the variants that need none."""
    output, runs, waiting = Path(study.output), [], []
    text_lm = Run(name=TEXT_LM, folder=output / TEXT_LM)
    for seed in range(study.seeds):
        for variant in study.variants:
            needs = (TEXT_LM,) if study.text_model is not None and study.losses_of(variant).llm_weight > 0 else ()
            run = Run(name=f"{variant}/{seed}", folder=output / variant / f"seed{seed}", needs=needs)
            (waiting if needs else runs).append(run)
    given = [Run(name=name, folder=output / name) for name in (FLOOR, RAW)]
    given += [Run(name=f"{UNTRAINED}/{seed}", folder=output / UNTRAINED / f"seed{seed}") for seed in range(study.seeds)]
    return [*([text_lm] if waiting else []), *runs, *given, *waiting]


def settings_of(study: Study, run: Run) -> dict[str, Any]:
    """A run's training settings; none of what is not trained."""
    shared = {"folder": run.folder, "precision": study.precision, "ema_decay": study.ema_decay}
    if run.name == TEXT_LM:
        assert study.text_model is not None
        model = study.text_model
        return training_settings(
            task="text",
            section=asdict(model.text),
            seed=0,
            steps=model.steps,
            optimizer=model.optimizer,
            validate_every=model.steps,
            **shared,
        )
    variant, _, seed = run.name.rpartition("/")
    if variant not in study.variants:
        return {}
    section = {
        "tokenizer": study.tokenizer,
        "data": asdict(study.data),
        "encoder": asdict(study.encoder),
        "losses": asdict(study.losses_of(variant)),
    }
    return training_settings(
        task="representation",
        section=section,
        seed=int(seed),
        steps=study.steps,
        optimizer=study.optimizer,
        validate_every=study.validate_every,
        **shared,
    )


def probed(study: Study, run: Run) -> list[Probed]:
    """What a run probes; the text model nothing."""
    return [] if run.name == TEXT_LM else probed_by(run, study.seeds)


def is_done(study: Study, run: Run) -> bool:
    """Whether a run is trained and probed.

    Raises:
        UserError: it was made with other settings.
    """
    found = [read_tasks(study.probes, one.folder, one.seed) for one in probed(study, run)]
    return read_result(run.folder, {"training": settings_of(study, run)}) is not None and None not in found


def make(study: Study, run: Run) -> bool:
    """Train and probe, as far as that is not done; False when it was interrupted.

    Raises:
        UserError: what training says, or probed clips among those trained on.
    """
    torch.set_num_threads(1)
    settings = settings_of(study, run)
    if run.name == TEXT_LM:
        if not train_mapping(settings, run.name, resume=True).finished:
            return False
        write_json(run.folder / RESULT, {"training": settings, **_about(run.folder)})
        return True
    clips = ProbeClips(study.probes)
    check_unheard(study, clips)
    about: dict[str, Any] = {"training": settings, "machine": machine(study.precision)}
    if settings:
        if not train_mapping(settings, run.name, resume=True).finished:
            return False
        about |= _about(run.folder)
    vectors = vectors_of(study, run, clips)
    for variant, seed, folder in probed(study, run):
        clips.score(folder, variant, vectors, seed)
    write_json(run.folder / RESULT, about)
    return True


def _about(folder: Path) -> dict[str, Any]:
    progress = progress_of(folder)
    return {"steps": progress["step"], "training_seconds": progress["seconds"]}


def check_unheard(study: Study, clips: ProbeClips) -> None:
    """See `ProbeClips.check_unheard`."""
    trained = heard(study)
    keys = (trained.index.clip(number).key for number in range(len(trained)))
    clips.check_unheard(keys, trained.index.all_tags())


def heard(study: Study) -> TokenCache:
    """What is trained on."""
    return TokenCache([Path(cache) for cache in study.data.caches], split="train", rules=study.data.rules)


def vectors_of(study: Study, run: Run, clips: ProbeClips) -> Float[Tensor, "N E"]:
    """The mean over time of each clip's frames; of the floor, deviation too. All are standardized on training's frames,
    as what is trained is when it is saved."""
    if run.name == FLOOR:
        return clips.embed(LogMel())
    cache, keys = TokenCache([Path(folder) for folder in study.data.caches]), [clip.key for clip in clips.clips]
    if run.name == RAW:
        frames = torch.cat(list(drawn_latents(heard(study), study.data)))
        mean, deviation = frames.mean(dim=0), frames.std(dim=0)
        return pooled(cache, keys, lambda latents: (latents - mean) / deviation)
    if run.name.startswith(f"{UNTRAINED}/"):
        torch.manual_seed(int(run.name.rpartition("/")[2]))
        untrained = RepresentationEncoder(cache.latent_dim, study.encoder).eval()
        return pooled(cache, keys, untrained.standardized(drawn_latents(heard(study), study.data)).features)
    made = load_codec(run.folder / "model")
    assert isinstance(made, F3Tokenizer) and made.representation is not None
    return pooled(cache, keys, made.representation.features)


@torch.inference_mode()
def pooled(cache: TokenCache, keys: Sequence[str], encode: Callable[[Tensor], Tensor]) -> Float[Tensor, "N E"]:
    """Means over time of what `encode` makes of clips' latents; it is causal, so padding on the right harms none.

    Raises:
        UserError: a clip that the cache lacks.
    """
    numbers = {cache.index.clip(number).key: number for number in range(len(cache))}
    if missing := [key for key in keys if key not in numbers]:
        raise UserError(f"the caches of latents lack {missing[0]}; prepare them of the same recordings as probes.data")
    rows = sorted(range(len(keys)), key=lambda row: cache.num_frames(numbers[keys[row]]))
    found: dict[int, Tensor] = {}
    for batch in _batches(rows, [cache.num_frames(numbers[key]) for key in keys]):
        windows = [Window(numbers[keys[row]], 0, cache.num_frames(numbers[keys[row]])) for row in batch]
        frames = cache.frames([cache.read(window) for window in windows])
        encoded = encode(frames.latents)
        found.update((row, encoded[i, : windows[i].frames].double().mean(dim=0).float()) for i, row in enumerate(batch))
    return torch.stack([found[row] for row in range(len(keys))])


def _batches(rows: Sequence[int], frames: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in rows:
        if batch and frames[number] * (len(batch) + 1) > BATCH_FRAMES:
            yield batch
            batch = []
        batch.append(number)
    yield batch


# The report


def report(study: Study, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown and figures of finished runs."""
    runs = runs_of(study)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (FLOOR, RAW, UNTRAINED, *study.variants)}
    minutes: dict[str, list[float]] = {}
    for run in runs:
        about = read_result(run.folder, {"training": settings_of(study, run)}) or {}
        for variant, seed, folder in probed(study, run):
            results[variant].append(read_tasks(study.probes, folder, seed) or {})
        if "training_seconds" in about:
            minutes.setdefault(run.name.rpartition("/")[0] or run.name, []).append(about["training_seconds"] / 60)
    figures = compare(results, [FLOOR, RAW, UNTRAINED], study.probes.methods)
    lines = [
        "# What F3's representation encoder understands",
        "",
        f"`{command}`",
        "",
        f"{study.seeds} seeds, {study.steps} steps of at most {study.data.batch_frames} frames for all, the same "
        f"encoder and batches, peak learning rate {study.optimizer.learning_rate:g}. The mean over time of a clip's "
        "frames is probed; of the log-mel, mean and standard deviation. Brackets: 95 % intervals with seeds and clips "
        "(or the groups left out) drawn; differences are paired. Raw latents and log-mel are the same for all seeds, "
        "whose linear probes alone differ. `untrained` is the encoder with its first, random weights, others for each "
        "seed: wider and nonlinear, it raises a linear probe by itself, so what was learned is what exceeds it. Frames "
        "of all rows are standardized. The linear probe is X-ARES', of ten epochs; the logistic regression is at its "
        "optimum.",
        "",
        *(line for note in study.notes for line in (note, "")),
        f"{machine(study.precision)}; tokenizer {load_codec(study.tokenizer).fingerprint()}.",
        "",
        *header(["trained", "RQ-MTP weight", "LLM weight", "training, min a run"]),
    ]
    for name, times in minutes.items():
        weights = ["-", "-"]
        if name in study.variants:
            losses = study.losses_of(name)
            weights = [f"{losses.rq_weight:g}", f"{losses.llm_weight:g}"]
        lines.append(row([name, *weights, f"{sum(times) / len(times):.1f}"]))
    lines += tables(figures, study.probes, results[FLOOR][0])
    return "\n".join(lines) + "\n", {"command": command, "study": plain(asdict(study)), "probes": figures}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_study(
        arguments,
        module="benchmarks.understanding",
        description=__doc__,
        config=HERE / "understanding.yaml",
        settings=Study,
        runs_of=runs_of,
        make=make,
        is_done=is_done,
        report=report,
        check=lambda study: check_unheard(study, ProbeClips(study.probes)),
        tell=lambda study, run: tell(study.probes, run, study.seeds) if run.name != TEXT_LM else None,
    )


if __name__ == "__main__":
    sys.exit(main())
