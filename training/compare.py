"""`hybridlm compare RECIPE.yaml`: variants trained on the same data, and their likelihoods side by side.

Every variant and seed of a domain is one training run in OUTPUT/DOMAIN/VARIANT/seedN. What is finished is kept, what
was interrupted goes on. All see the same batches in the same order, so far as they share tokenizer and steps, and are
scored on the same clips as `hybridlm evaluate` does: latents z + sigma * eps, eps decided by the clip, and the codes of
these same latents (hybridlm/likelihood.py says what may be compared).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hybridlm.checkpoint import Checkpoint, load_model, open_tokenizer
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.settings import from_mapping
from training.audio_alone import Beginnings, empty_text
from training.calibration import calibrate
from training.compare_report import markdown, report_of, write_picture
from training.config import apply_overrides, read_yaml
from training.corpus import TokenCache
from training.derived import clips_beyond, write_derived
from training.fidelity import fidelity
from training.flops import step_flop
from training.language_task import LanguageTask, LanguageTaskConfig
from training.looseness import cell_mass
from training.machine import machine
from training.manifest import Manifest, apply_rules, read_manifest
from training.prepare import prepare
from training.probe import write_json
from training.recipe import Recipe, caches_of, derived_folder, folder_of, runs_of, settings_of, slug, sources_of
from training.run import train_mapping
from training.runs import RESULT, Run, carry_out, progress_of, read_result
from training.scoring import noised, score_clips

COUNTED_STEPS = 4
"""Batches of which the floating-point operations are counted."""
SAMPLED_FRAMES, SAMPLED_LENGTH = 25, 100
"""Frames of a clip from which draws are scored, among the first so many."""


def run(
    recipe_file: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: int | None = None,
    output: Path | None = None,
    report: Path | None = None,
    jobs: int = 1,
    one: str | None = None,
) -> int:
    """Make the runs that are missing, then write and print the report.

    Args:
        recipe_file: `training.recipe.Recipe` as YAML.
        overrides: `key.sub=value`, values in YAML.
        seeds: In place of the recipe's.
        output: In place of the recipe's.
        report: Where the report goes, without a suffix: `.md`, `.json` and `.png`. None: `report` in the output.
        jobs: Runs at a time, each a process of its own where there are several.
        one: Name of the only run to make, DOMAIN/VARIANT/SEED.

    Returns:
        The program's exit code.

    Raises:
        UserError: a recipe, data or results that do not fit; or a run that failed.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    settings = [*overrides]
    settings += [f"seeds={seeds}"] if seeds is not None else []
    settings += [f"output={json.dumps(str(output))}"] if output is not None else []
    mapping = apply_overrides(read_yaml(recipe_file), settings)
    if isinstance(variants := mapping.get("variants"), dict):  # a variant is left out by variants.NAME=null
        mapping["variants"] = {name: variant for name, variant in variants.items() if variant is not None}
    recipe = from_mapping(Recipe, mapping, where=str(recipe_file))
    given = Path(report) if report is not None else Path(recipe.output) / "report"
    told = ["hybridlm", "compare", str(recipe_file), *settings]
    return carry_out(
        runs_of(recipe),
        lambda run: make(recipe, run),
        is_done=lambda run: result_of(recipe, run) is not None,
        one=one,
        jobs=jobs,
        command=["hybridlm.cli", "compare", str(recipe_file), *settings],
        check=lambda: check(recipe),
        when_done=lambda run: None,
        when_all_done=lambda: write_report(recipe, given, shlex.join(told)),
    )


# Before any run


def check(recipe: Recipe) -> None:
    """What runs share is made before they begin: tokens, controls, text pieces, and what a step costs.

    Raises:
        UserError: data that cannot be read, or variants of unequal size where they must agree.
    """
    if recipe.text_model is None:
        empty_text(Path(recipe.output))
    for domain in recipe.domains:
        for tokenizer in dict.fromkeys(recipe.tokenizer_of(variant) for variant in recipe.variants):
            prepare_domain(recipe, domain, tokenizer)
        for variant in recipe.variants:
            derive(recipe, domain, variant)
        costs = {variant: cost_of(recipe, domain, variant) for variant in recipe.variants}
        for variant, cost in costs.items():
            steps = steps_of(recipe, domain, variant)
            text = (
                f"{domain} {variant}: {cost['parameters']:,} parameters, {steps} steps of {cost['step_flop']:.3g} FLOP"
            )
            print(text, file=sys.stderr, flush=True)
        counts = {variant: cost["parameters"] for variant, cost in costs.items()}
        allowed = recipe.same_parameters
        if allowed is not None and max(counts.values()) > (1 + allowed) * min(counts.values()):
            raise UserError(
                f"parameters {counts} must agree within same_parameters={allowed:.0%}; change the variants' ffn_dim"
            )


def prepare_domain(recipe: Recipe, domain: str, tokenizer: str) -> None:
    """Tokens of a domain's recordings, and what the tokenizer loses of them, as far as they are missing."""
    config = recipe.domains[domain]
    if config.data is None:
        return
    found = read_manifest(Path(config.data))
    clips = list(apply_rules(found.clips, config.rules))
    wanted = {clip.key for clip in clips}
    kept = [clip for clip in found.clips if clip.key in wanted]
    folder = Path(sources_of(recipe, domain, tokenizer)[0][0])
    codec = open_tokenizer(tokenizer)
    prepare(Manifest(source=found.source, clips=kept, problems=found.problems), folder, codec)
    if config.fidelity is None:
        return
    path = fidelity_file(recipe, domain, tokenizer)
    about = {"fidelity": asdict(config.fidelity), "tokenizer": f"{codec.name} {codec.fingerprint()}"}
    if read_result(path.parent, about, path.name) is None:
        tests = [clip for clip in kept if clip.split in (None, "test")]
        if not tests:
            raise UserError(f"{config.data} has no clip of split 'test' for domains.{domain}.fidelity; leave it out")
        write_json(path, {**about, "figures": fidelity(codec, tests, config.fidelity)})


def fidelity_file(recipe: Recipe, domain: str, tokenizer: str) -> Path:
    """Where it is kept what a tokenizer loses of a domain."""
    return Path(recipe.output) / domain / f"fidelity-{slug(tokenizer)}.json"


def derive(recipe: Recipe, domain: str, variant: str) -> None:
    """The caches of a variant's control and share, as far as they are missing."""
    config = recipe.variants[variant]
    train, test = sources_of(recipe, domain, recipe.tokenizer_of(variant))
    if config.share < 1:
        rules = recipe.domains[domain].rules
        left_out = clips_beyond([Path(cache) for cache in train], config.share, recipe.validation_fraction, rules)
        for cache in train:
            target = derived_folder(recipe, cache, config.control, config.share)
            write_derived(Path(cache), target, control=config.control, left_out=left_out)
    if config.control != "none":
        for cache in dict.fromkeys([*(train if config.share == 1 else []), *test]):
            write_derived(Path(cache), derived_folder(recipe, cache, config.control, 1.0), control=config.control)


def cost_of(recipe: Recipe, domain: str, variant: str) -> dict[str, Any]:
    """A variant's `parameters`, and `step_flop` of a training step: counted once, on the first batches of seed 0."""
    folder = folder_of(recipe, domain, variant)
    run = Run(name=f"{domain}/{variant}/0", folder=folder / "seed0")
    section = settings_of(recipe, run, 1)["training"]["language"]
    if (known := read_result(folder, {"section": section}, "cost.json")) is not None:
        return known
    config = from_mapping(LanguageTaskConfig, section, where=f"variants.{variant}")
    task = LanguageTask(config, output=run.folder)
    batches = itertools.islice(task.batches(seed=0, rank=0, world_size=1, skip=0), COUNTED_STEPS)
    counts = [step_flop(task, batch) for batch in batches]
    cost = {"parameters": task.model.num_parameters(), "step_flop": sum(counts) / len(counts)}
    write_json(folder / "cost.json", {"section": section, **cost})
    return cost


def steps_of(recipe: Recipe, domain: str, variant: str) -> int:
    """Training steps of a variant."""
    if recipe.compute is not None:
        return max(1, round(recipe.compute / cost_of(recipe, domain, variant)["step_flop"]))
    steps = recipe.variants[variant].steps or recipe.steps
    assert steps is not None, "a recipe has steps or compute"
    return steps


# A run


def about_run(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What a run's result says of how it was made."""
    domain, variant, _ = run.name.split("/")
    return settings_of(recipe, run, steps_of(recipe, domain, variant))


def result_of(recipe: Recipe, run: Run) -> dict[str, Any] | None:
    """A finished run's result.

    Raises:
        UserError: it was made with other settings.
    """
    if not (run.folder / RESULT).is_file():
        return None
    return read_result(run.folder, about_run(recipe, run))


def make(recipe: Recipe, run: Run) -> bool:
    """Train and score one model; False when it was interrupted."""
    torch.set_num_threads(recipe.threads)
    domain, variant, seed = run.name.split("/")
    about = about_run(recipe, run)
    if not train_mapping(about["training"], run.name, resume=True).finished:
        return False
    progress = progress_of(run.folder)
    weights = "model" if recipe.checkpoint == "last" else "best"
    found = load_model(run.folder / weights, None if recipe.device == "auto" else recipe.device)
    tests = Beginnings(
        [Path(cache) for cache in about["test"]["caches"]],
        tokenizer=found.tokenizer,
        split=recipe.score,
        validation_fraction=about["test"]["validation_fraction"],
        rules=recipe.domains[domain].rules,
    )
    tests.max_frames = max(1, round(recipe.test_seconds * tests.frame_rate_hz))
    with_text = recipe.text_model is not None
    clips = [asdict(clip) for clip in score_clips(found, tests, window_frames=recipe.max_frames, with_text=with_text)]
    config = found.model.config
    result = {
        **about,
        "parameters": found.model.num_parameters(),
        "flop": cost_of(recipe, domain, variant)["step_flop"] * progress["step"],
        "frame_rate_hz": tests.frame_rate_hz,
        "codebook_size": tests.codebook_size,
        "representation": config.representation,
        "output_codebooks": config.output_codebooks,
        "sigma": config.sigma,
        "scale_floor": config.scale_floor,
        "steps": progress["step"],
        "scored_step": progress["step" if recipe.checkpoint == "last" else "best_step"],
        "skipped_steps": progress["bad_steps"],
        "frames_trained": frames_trained(recipe, domain, variant, int(seed), progress["step"]),
        "training_seconds": progress["seconds"],
        "tokenizer": tests.tokenizer,
        "targets": targets_of(tests, config.output_codebooks),
        "machine": machine(recipe.precision, recipe.threads, recipe.device),
        "curve": curve_of(run.folder),
        **sampled(recipe, found, tests),
        "clips": clips,
    }
    write_json(run.folder / RESULT, result)
    return True


def sampled(recipe: Recipe, found: Checkpoint, tests: TokenCache) -> dict[str, Any]:
    """What is estimated from draws: calibration, and how tight a hybrid's bound is."""
    count = min(len(tests), recipe.calibration_clips)
    clips = [noised(found, tests[number * len(tests) // count]) for number in range(count)]
    length = min(SAMPLED_LENGTH, recipe.max_frames)
    if not clips:
        return {"calibration": {}, "cell_mass": []}
    settings = {"frames_a_clip": SAMPLED_FRAMES, "max_frames": length}
    with_text = recipe.text_model is not None
    calibration = calibrate(found, clips, **settings, with_text=with_text)
    mass: tuple[float, ...] = ()
    if found.model.config.representation == "hybrid":
        mass = cell_mass(found, clips, **settings, with_text=with_text)
    return {"calibration": {name: asdict(one) for name, one in calibration.items()}, "cell_mass": list(mass)}


def targets_of(tests: TokenCache, num_codebooks: int) -> dict[str, str]:
    """Digests of what is scored, before noise: only models with the same one may be held against each other."""
    codes, latents = hashlib.sha256(str(num_codebooks).encode()), hashlib.sha256()
    for number in range(len(tests)):
        clip = tests[number]
        codes.update(clip.codes[:num_codebooks].numpy().tobytes())
        latents.update(clip.latents.numpy().tobytes())
    return {"codes": codes.hexdigest()[:16], "latents": latents.hexdigest()[:16]}


def frames_trained(recipe: Recipe, domain: str, variant: str, seed: int, steps: int) -> int:
    """Frames in the batches of a run, padding not counted."""
    cache = TokenCache(
        [Path(folder) for folder in caches_of(recipe, domain, variant)[0]],
        split="train",
        validation_fraction=recipe.validation_fraction,
        rules=recipe.domains[domain].rules,
    )
    batches = cache.batches(seed=seed, batch_frames=recipe.batch_frames, max_frames=recipe.max_frames)
    return sum(window.frames for batch in itertools.islice(batches, steps) for window in batch)


def curve_of(folder: Path) -> list[dict[str, float]]:
    """Validations during training: step, and nats a frame of codes and latents."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {"step": line["step"], **{name: line[name] for name in ("codes", "latents") if name in line}}
        for line in lines
        if line["kind"] == "validate"
    ]


# The report


def write_report(recipe: Recipe, path: Path, command: str) -> None:
    """Markdown, JSON and picture of all finished runs; the Markdown is also printed."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {domain: {} for domain in recipe.domains}
    for run in runs_of(recipe):
        domain, variant, _ = run.name.split("/")
        results[domain].setdefault(variant, []).append(result_of(recipe, run) or {})
    domains = {domain: report_of(recipe, found) for domain, found in results.items()}
    for domain, figures in domains.items():
        for tokenizer in dict.fromkeys(map(recipe.tokenizer_of, recipe.variants)):
            place = fidelity_file(recipe, domain, tokenizer)
            if recipe.domains[domain].fidelity is not None and place.is_file():
                figures["fidelity"][tokenizer] = json.loads(place.read_text(encoding="utf-8"))["figures"]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(recipe, domains, command, picture=f"{path.name}.png")
    with replacing(path.with_name(f"{path.name}.md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(path.with_name(f"{path.name}.json"), {"command": command, "recipe": asdict(recipe), "domains": domains})
    write_picture(path.with_name(f"{path.name}.png"), domains)
    print(text, flush=True)
