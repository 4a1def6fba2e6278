"""Drift: how a model's continuations change over time, beside frames drawn one step from the truth.

    python -m benchmarks.drift MODEL [MODEL ...] --data MANIFEST [--where LABEL=VALUE ...] [--split test] [--prompt 3]
        [--continue 10] [--clips 16] [--seeds 3] [--window 1] [--json FILE] [--markdown FILE] [--picture PNG]

A MODEL is a folder, `box`, or NAME=FOLDER[,FOLDER ...]: models that differ in their training's seed alone, which are
then the seeds of the figures (each model's own samples are averaged). Of the clips of the split that are long enough,
--clips are taken, evenly spread; each is cut to its first --prompt plus --continue seconds. A model is told no text and
no tags.

- free-running: the model continues the prompt by itself, and is decoded.
- teacher-forced: every frame is drawn given the real frames before it (codes, latents, slices), with the random numbers
  that the free-running model has there, and the drawn frames are decoded as one sequence: a single step's error, which
  does not add up. The first frame is the same in both.
- codec: the real frames, decoded from what the model predicts: latents, or the first codebooks.
- real: the recording itself.

A model that reads what it does not predict can't run free, and is only teacher-forced.

Measured is each window of --window seconds after the prompt (in whole frames of the model): the log-mel distance to the
real continuation, which tells divergence, not quality, since a good continuation may go its own way; and how far
statistics (`sampling.drift`) are from the prompt's, which are the means over its own windows. These distances are
divided by those of real continuations from their prompts, the mean over clips and windows: 1 is as real audio does.

Intervals are 95 % bootstraps with clips and seeds drawn; differences are paired by clip. What is drawn follows from
--seed and the clip's key alone, whatever else is measured with it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.codec_quality import finite
from benchmarks.drift_measure import (
    FREE,
    Span,
    Values,
    forced_continuations,
    free_running,
    measure,
    span_of,
)
from benchmarks.drift_report import Variant, figures, table, write_picture
from sampling.controls import Controls
from sampling.files import check_writable
from sampling.pipeline import AudioModel, load
from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.examples import clip_seed
from training.index import VALIDATION, split_clips
from training.machine import machine
from training.manifest import Clip, TagRule, apply_rules, read_manifest
from training.probe import write_json

VALIDATION_FRACTION = 0.02
"""As in the recipes."""


class Entry(NamedTuple):
    """What the command line names: models that differ in their training's seed, or one."""

    name: str
    folders: list[str]
    models: list[AudioModel]
    span: Span


def load_entries(words: Sequence[str], window_s: float, before: int, after: int, device: str) -> list[Entry]:
    """Load all models.

    Raises:
        UserError: a model that can't be read, or models that can't be compared.
    """
    entries: list[Entry] = []
    for word in words:
        name, equals, rest = word.partition("=")
        named = bool(equals) and not Path(word).is_dir()
        folders = rest.split(",") if named else [word]
        models = [load(folder, device=device) for folder in folders]
        facts = [(model.tokenizer.fingerprint(), model.model.config) for model in models]
        if any(fact != facts[0] for fact in facts):
            raise UserError(f"{word}: the models differ in more than their training's seed; name them apart")
        name = name if named else word
        entries.append(Entry(name, folders, models, span_of(models[0], name, window_s, before, after)))
    for entry in entries[1:]:
        first = entries[0]
        rates = [one.models[0].sample_rate_hz for one in (entry, first)]
        if rates[0] != rates[1]:
            raise UserError(f"{entry.name} makes {rates[0]} Hz and {first.name} {rates[1]} Hz; measure them apart")
        if len(entry.folders) != len(first.folders):
            raise UserError(
                f"{entry.name} has {len(entry.folders)} folders and {first.name} {len(first.folders)}; give every "
                "model as many"
            )
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"two models are called {max(names, key=names.count)}; name them NAME=FOLDER")
    return entries


def choose(
    manifest: Path, split: str, where: Sequence[str], seconds: float, count: int, sample_rate_hz: int
) -> tuple[dict[str, Float[Tensor, "1 S"]], list[str]]:
    """The beginnings of clips that are long enough, evenly spread over all such, by key; and what could not be read.

    Raises:
        UserError: there is none.
    """
    conditions = {}
    for condition in where:
        label, equals, value = condition.partition("=")
        if not (label and equals):
            raise UserError(f"--where {condition} must be LABEL=VALUE, such as set=librispeech")
        conditions[label] = value
    held_out = VALIDATION_FRACTION if split == VALIDATION else 0.0
    clips = list(apply_rules(read_manifest(manifest).clips, [TagRule(where=conditions)]))
    clips = sorted(split_clips(clips, split, held_out), key=lambda clip: clip.key)
    long, problems, longest = [], [], 0.0
    for clip in clips:
        try:
            duration = _duration(clip)
        except UserError as error:
            problems.append(f"{clip.key}: {error}")
            continue
        longest = max(longest, duration)
        if duration > seconds - 1e-6:
            long.append(clip)
    chosen = [long[index * len(long) // count] for index in range(count)] if len(long) > count else long
    found: dict[str, Tensor] = {}
    for clip in chosen:
        try:
            waveform = read_audio(clip.audio, sample_rate_hz, clip.start, seconds)
        except UserError as error:
            problems.append(f"{clip.key}: {error}")
            continue
        if waveform.shape[-1] < round(seconds * sample_rate_hz):
            problems.append(f"{clip.key}: ends after {waveform.shape[-1] / sample_rate_hz:.2f} s")
            continue
        found[clip.key] = waveform
    if not found:
        raise UserError(
            f"{manifest} has no clip of {seconds:g} s in split '{split}' that can be read; the longest of {len(clips)} "
            f"has {longest:.1f} s: use a smaller --prompt or --continue, or other clips"
        )
    return found, problems


def _duration(clip: Clip) -> float:
    """Seconds of a clip: of its part, or from its start to the end of the file."""
    if clip.read_duration is not None:
        return clip.read_duration
    return audio_info(clip.audio).duration_s - (clip.start or 0.0)


def run(entry: Entry, clips: dict[str, Tensor], num_seeds: int, seed: int, controls: Controls) -> Variant:
    """Measure a model on all clips."""
    cannot_run: str | None = None
    rows: list[list[Values]] = []
    norms: list[float] = []
    span = entry.span
    for folder, model in zip(entry.folders, entry.models, strict=True):
        device = next(model.model.parameters()).device
        hop = model.tokenizer.hop_length
        found = []
        for number, (key, whole) in enumerate(clips.items(), start=1):
            print(f"{folder} {number}/{len(clips)} {key}", file=sys.stderr, flush=True)
            first = clip_seed(f"{seed}/{key}") % 2**32
            seeds = range(first, first + num_seeds)
            waveform = whole[:, : span.total * hop]
            with torch.inference_mode():
                frames = model.tokenizer.encode(waveform[None].to(device))
            made = forced_continuations(model, frames, span, seeds, controls)
            if cannot_run is None:
                try:
                    made[FREE] = free_running(model, waveform[:, : span.prompt * hop], span, seeds, controls)
                except UserError as error:
                    cannot_run = str(error)
            values, prompt = measure(model, waveform, frames, span, made)
            found.append(values)
            if prompt.latent_norm is not None:
                norms.append(prompt.latent_norm)
        rows.append(found)
    kinds = [kind for kind in rows[0][0] if kind != FREE or cannot_run is None]
    return Variant(
        name=entry.name,
        about=_about(entry),
        values={
            kind: {
                name: torch.stack([torch.stack([clip[kind][name] for clip in model], dim=1) for model in rows])
                for name in rows[0][0][kind]
            }
            for kind in kinds
        },
        prompt_norms=torch.tensor(norms[: len(clips)], dtype=torch.float64) if norms else None,
        cannot_run=cannot_run,
    )


def _about(entry: Entry) -> dict[str, Any]:
    model = entry.models[0]
    config, tokenizer = model.model.config, model.tokenizer
    reads = [f"{config.input_codebooks} of {config.num_codebooks} codebooks"] if config.uses_codes else []
    reads += [config.continuous] if config.continuous != "none" else []
    source = (
        "latents" if model.source == "latents" else f"{config.output_codebooks} of {config.num_codebooks} codebooks"
    )
    return {
        "folders": entry.folders,
        "parameters": model.model.num_parameters(),
        "representation": config.representation,
        "reads": " and ".join(reads),
        "decoded_from": source,
        "tokenizer": tokenizer.fingerprint(),
        "window_frames": entry.span.window,
        "frame_rate_hz": tokenizer.frame_rate_hz,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder, 'box', or NAME=FOLDER[,FOLDER ...]")
    parser.add_argument("--data", type=Path, required=True, metavar="MANIFEST", help="or a folder of audio")
    parser.add_argument("--where", nargs="+", default=[], metavar="LABEL=VALUE", help="only clips with these labels")
    parser.add_argument("--split", default="test", help="test, train, or validation: what the recipes hold back")
    parser.add_argument("--prompt", type=float, default=3.0, metavar="S", help="seconds that are continued")
    parser.add_argument("--continue", type=float, default=10.0, metavar="S", dest="after", help="by so many seconds")
    parser.add_argument("--clips", type=int, default=16, help="at most so many, evenly spread")
    parser.add_argument("--seeds", type=int, default=3, help="samples of each clip")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--window", type=float, default=1.0, metavar="S", help="seconds; divides the two others")
    parser.add_argument("--temperature", type=float, help="as of `hybridlm generate`, and with its default")
    parser.add_argument("--top-p", type=float, help="as of `hybridlm generate`, and with its default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures here, those of every clip too")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw drift over time here")
    options = parser.parse_args(arguments)
    for name in ("clips", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    if not options.window > 0:
        parser.error(f"--window={options.window:g} must be above 0")
    for name, value in (("prompt", options.prompt), ("continue", options.after)):
        windows = value / options.window
        if round(windows) < 1 or abs(windows - round(windows)) > 1e-6:
            parser.error(f"--{name}={value:g} must be a multiple of --window={options.window:g}")
    return options


def report(variants: Sequence[Variant], options: argparse.Namespace, command: str, num_clips: int) -> tuple[str, Any]:
    """Markdown and figures."""
    found = figures(variants, options.window)
    many = len(variants[0].about["folders"])
    seeds = f"{options.seeds} samples of each" + (f" of {many} models" if many > 1 else "")
    lines = [
        "# Drift of continuations",
        "",
        f"`{command}`",
        "",
        f"{num_clips} clips of split {options.split}, {seeds}: {options.prompt:g} s continued by {options.after:g} s, "
        f"in windows of {options.window:g} s. But for the first table, distances of statistics from the prompt's, 1 "
        "being what real continuations have in the mean. Brackets: 95 % intervals with clips and seeds drawn.",
        "",
    ]
    for variant in variants:
        about = variant.about
        kind = f"{about['representation']}, {about['parameters']:,} parameters, reads {about['reads']}"
        line = f"- {variant.name}: {kind}; decoded from {about['decoded_from']}; tokenizer {about['tokenizer']}"
        lines.append(line + (f"; teacher-forced only: {variant.cannot_run}" if variant.cannot_run else ""))
    lines += ["", f"{machine('fp32')}."]
    return "\n".join([*lines, *table(found, options.window)]) + "\n", found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        for path in filter(None, (options.json, options.markdown, options.picture)):
            check_writable(path)
        controls = Controls()
        for name in ("temperature", "top_p"):
            if getattr(options, name) is not None:
                controls = replace(controls, **{name: getattr(options, name)})
        before, after = round(options.prompt / options.window), round(options.after / options.window)
        entries = load_entries(options.models, options.window, before, after, options.device)
        seconds, rate = options.prompt + options.after, entries[0].models[0].sample_rate_hz
        clips, problems = choose(options.data, options.split, options.where, seconds, options.clips, rate)
        variants = [run(entry, clips, options.seeds, options.seed, controls) for entry in entries]
        command = shlex.join(["python", "-m", "benchmarks.drift", *(sys.argv[1:] if arguments is None else arguments)])
        text, found = report(variants, options, command, len(clips))
        print(text)
        if problems:
            print(f"{len(problems)} clips left out, the first: {problems[0]}")
        if options.markdown:
            with replacing(options.markdown) as path:
                path.write_text(text, encoding="utf-8")
        if options.picture:
            write_picture(options.picture, found, options.window)
        if options.json:
            values = {
                variant.name: {
                    kind: {name: x.tolist() for name, x in measures.items()}
                    for kind, measures in variant.values.items()
                }
                for variant in variants
            }
            about = {"command": command, "machine": machine("fp32"), "split": options.split, "seed": options.seed}
            about |= {"window_s": options.window, "controls": asdict(controls), "clips": list(clips)}
            write_json(options.json, finite({**about, "problems": problems, **found, "values": values}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
