"""`hybridlm evaluate`: a model's likelihood of recordings, per stream, in nats a frame and bits a second of audio.

What is scored are latents z + sigma * eps, with a sigma published in the model and a noise decided by the clip's key,
and the codes of these same latents (hybridlm/likelihood.py says why). Clips longer than a window are scored in windows
that see the frames before them as context.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hybridlm.checkpoint import Checkpoint, load_model
from hybridlm.likelihood import ClipNLL, LikelihoodReport, StreamLikelihood, summarize
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.audio_clips import AudioClips
from training.background import in_order
from training.corpus import CachedClip, TokenCache
from training.looseness import cell_mass
from training.manifest import TagRule, read_manifest
from training.positions import PositionNLL
from training.processes import Processes, joined
from training.scoring import ClipSource, ScoredClip, noised, plan_groups, score_group, share_out

WINDOW_SECONDS = 30.0
"""Longest piece scored at once; the first half of every later window is context."""
CELL_CLIPS, CELL_FRAMES, CELL_LENGTH = 16, 25, 100
"""Clips, and frames of the first so many of each, from which it is estimated how loose a hybrid's bound is."""
GROUP_LABEL = "set"
"""Label of a manifest by which figures are also given apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A model's figures on a set of recordings."""

    report: LikelihoodReport
    groups: dict[str, LikelihoodReport]
    """By the label `set`, where there are at least two."""
    clips: list[ScoredClip]
    conditions: dict[str, Any]
    """What the figures rest on, beside the model and the data: windows, context, text, tags left out."""
    cell_mass: tuple[float, ...] = ()
    """Of a hybrid model: how tight its bound is (`training.looseness`), by the number of codebooks."""
    skipped: tuple[str, ...] = ()
    """A line for each clip that could not be read, and so counts nowhere."""


def run(
    model: str | Path,
    data: Path,
    split: str | None = "test",
    json_file: Path | None = None,
    *,
    adapter: str | Path | None = None,
    device: str | None = "cpu",
    rules: Sequence[TagRule] = (),
    with_text: bool = True,
    batch_size: int | None = None,
    picture: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a model and print a table; on several processes each takes its share, and the first tells of all.

    Args:
        model: "box", a folder or a hub id.
        data: A manifest, a folder of audio, or a cache made by `hybridlm prepare` with the model's tokenizer.
        split: Only clips of this split and those without one; None: all.
        json_file: Where the figures go, with those of every clip.
        adapter: An adapter of that model.
        device: Where to compute; None for CUDA where there is one.
        rules: Tags and use of text by label, as in training; none: as the manifest has them.
        with_text: Whether the model is told text and tags.
        batch_size: Windows scored at once, at most; None: as many as 2000 frames hold.
        picture: Where nats a frame by position in the clip and by codebook are drawn, as a PNG.
        console: Where the table goes; standard output by default.

    Raises:
        UserError: a model or data that can't be read, or no clip of that split.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    name = str(model) if adapter is None else f"{model} with {adapter}"
    with joined(device) as processes:
        with processes.agreed():
            found = load_model(model, processes.device, adapter)
            source, problems = open_data(Path(data), found, split=split, rules=rules)
        positions = PositionNLL(found.model.config.output_codebooks, found.model.config.frame_rate_hz)
        result = evaluate(
            found,
            source,
            with_text=with_text,
            batch_size=batch_size,
            positions=positions,
            problems=problems,
            processes=processes,
        )
        with processes.agreed():
            if processes.rank == 0:
                _tell(console or Console(), result, name, str(data), split)
                if json_file is not None:
                    _write(Path(json_file), result, model=name, data=str(data), split=split)
                if picture is not None:
                    title = f"{name} ({result.report.representation}) on {data}"
                    positions.write_picture(Path(picture), title)
    return result


def open_data(
    data: Path, found: Checkpoint, *, split: str | None = None, rules: Sequence[TagRule] = ()
) -> tuple[ClipSource, list[str]]:
    """A cache, or audio that the model's tokenizer encodes when it is asked for; and what was wrong in the manifest."""
    if (data / "meta.json").is_file():
        return TokenCache(data, tokenizer=found.tokenizer, split=split, rules=rules), []
    manifest = read_manifest(data, split)
    return AudioClips(manifest, found.tokenizer, rules), manifest.problems


def evaluate(
    found: Checkpoint,
    source: ClipSource,
    *,
    with_text: bool = True,
    batch_size: int | None = None,
    positions: PositionNLL | None = None,
    problems: Sequence[str] = (),
    processes: Processes | None = None,
) -> Evaluation:
    """Score every clip and sum up; no audio, frames or outputs outlive their batch.

    Args:
        found: Model, tokenizer and text.
        source: Clips as frames of the model's tokenizer.
        with_text: Whether the model is told text and tags.
        batch_size: Windows scored at once, at most.
        positions: Also counts every frame by its place in the clip.
        problems: What was skipped before.
        processes: Which of several this one is. All of them get all figures, the same as one alone would.

    Raises:
        UserError: no clip can be read.
    """
    config, processes = found.model.config, processes or Processes()
    window = min(config.max_frames, max(2, round(WINDOW_SECONDS * config.frame_rate_hz)))
    groups = plan_groups(source, with_text=with_text, batch_size=batch_size)
    count = min(len(source), CELL_CLIPS) if config.representation == "hybrid" else 0
    looked_at = {index * len(source) // count for index in range(count)}
    scored: list[tuple[int, ScoredClip]] = []
    skipped: list[tuple[int, str]] = []
    beginnings: list[tuple[int, CachedClip]] = []
    with processes.agreed(), _half_the_threads(found):
        share = share_out(source, groups, processes.count)[processes.rank]
        for numbers, clips in _ahead(found, source, share, told=processes.rank == 0):
            good = [(number, clip) for number, clip in zip(numbers, clips, strict=True) if isinstance(clip, CachedClip)]
            skipped += [(n, str(clip)) for n, clip in zip(numbers, clips, strict=True) if isinstance(clip, UserError)]
            results = score_group(
                found,
                [clip for _, clip in good],
                window_frames=window,
                with_text=with_text,
                batch_size=batch_size,
                positions=positions,
            )
            scored += [(number, result) for (number, _), result in zip(good, results, strict=True)]
            beginnings += [(n, clip.cut(0, min(window, CELL_LENGTH))) for n, clip in good if n in looked_at]
    every = processes.gather((scored, skipped, beginnings))
    by_number = sorted((item for part in every for item in part[0]), key=lambda item: item[0])
    skipped = sorted(item for part in every for item in part[1])
    beginnings = sorted((item for part in every for item in part[2]), key=lambda item: item[0])
    lines = (*problems, *(line for _, line in skipped))
    with processes.agreed():
        if not by_number:
            raise UserError(f"{source.name} has no usable clip ({len(lines)} problems, the first: {lines[0]})")
    if positions is not None:
        positions.join(processes.total)
    return _summed_up(
        found,
        [clip for _, clip in by_number],
        cell_mass=_cell_mass(found, [clip for _, clip in beginnings], with_text),
        skipped=lines,
        conditions={
            "window_frames": window,
            "context_frames": window // 2,
            "with_text": with_text,
            "unknown_tags": [tag for tag in source.all_tags() if tag not in found.text.tags] if with_text else [],
        },
    )


@contextlib.contextmanager
def _half_the_threads(found: Checkpoint) -> Iterator[None]:
    """On a CPU, encoding and scoring go on side by side: with all threads for both they would wait for each other."""
    threads = torch.get_num_threads()
    if next(found.model.parameters()).device.type == "cpu":
        torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ahead(
    found: Checkpoint, source: ClipSource, groups: Sequence[list[int]], *, told: bool
) -> Iterator[tuple[list[int], list[CachedClip | UserError]]]:
    """Groups of noised clips, read and encoded while those before are scored."""

    def load(numbers: list[int]) -> list[CachedClip | UserError]:
        clips: list[CachedClip | UserError] = []
        for number in numbers:
            try:
                clips.append(noised(found, source[number]))
            except UserError as error:
                clips.append(error)
        return clips

    console = Console(stderr=True)
    quiet = not (told and console.is_terminal)
    loaded = in_order(groups, load, workers=1)
    for numbers, clips in track(loaded, "scoring", len(groups), console=console, transient=True, disable=quiet):
        assert not isinstance(clips, UserError), "a clip's error is in its place"
        yield numbers, clips


def _cell_mass(found: Checkpoint, clips: Sequence[CachedClip], with_text: bool) -> tuple[float, ...]:
    """Of the beginnings of some clips, evenly spread; nothing for a model that bounds nothing."""
    if not clips:
        return ()
    return cell_mass(found, clips, frames_a_clip=CELL_FRAMES, max_frames=CELL_LENGTH, with_text=with_text)


def _summed_up(found: Checkpoint, clips: list[ScoredClip], **rest: Any) -> Evaluation:
    """The clips' figures together and by set."""
    config = found.model.config
    by_set: dict[str, list[ClipNLL]] = {}
    for clip in clips:
        if GROUP_LABEL in clip.labels:
            by_set.setdefault(clip.labels[GROUP_LABEL], []).append(clip.nll)
    groups = by_set if len(by_set) > 1 else {}
    return Evaluation(
        report=summarize([clip.nll for clip in clips], config),
        groups={name: summarize(nlls, config, num_resamples=500) for name, nlls in sorted(groups.items())},
        clips=clips,
        **rest,
    )


def _tell(console: Console, result: Evaluation, model: str, data: str, split: str | None) -> None:
    """The table; what was skipped goes to standard error."""
    if result.skipped:
        text = f"{len(result.skipped)} clips skipped, the first: {result.skipped[0]}"
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
    _print(console, result, model, data, split)


def _print(console: Console, result: Evaluation, model: str, data: str, split: str | None) -> None:
    report = result.report
    title = f"{model} ({report.representation}) on {data}" + (f", split {split}" if split else "")
    console.print(
        f"{title}\n{report.num_clips} clips, {report.num_frames} frames, {report.seconds:.1f} s; "
        f"sigma {report.sigma:g}, scale floor {report.scale_floor:g}; [95 % interval over clips]",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None)
    for name in ("stream", "nats a frame", "bits a second of audio"):
        table.add_column(name, justify="left" if name == "stream" else "right")
    for name, stream in _streams(report):
        table.add_row(name, _interval(stream.nats_per_frame, 3), _interval(stream.bits_per_second, 1))
    console.print(table)
    if report.codebook_nats:
        books = Table(box=None)
        for name in ("codebook", "nats a code", "perplexity a code", "accuracy"):
            books.add_column(name, justify="right")
        for k, nats in enumerate(report.codebook_nats):
            accuracy = _interval(report.codebook_accuracy[k], 3)
            books.add_row(str(k), _interval(nats, 3), f"{report.perplexity[k]:.1f}", accuracy)
        console.print(books)
    if result.groups:
        groups = Table(box=None)
        for name in (GROUP_LABEL, "clips", "codes, nats a frame", "latents, nats a frame", "total, bits a second"):
            groups.add_column(name, justify="left" if name == GROUP_LABEL else "right")
        for name, group in result.groups.items():
            streams = dict(_streams(group))
            cells = [_interval(streams[s].nats_per_frame, 3) if s in streams else "-" for s in ("codes", "latents")]
            groups.add_row(name, str(group.num_clips), *cells, _interval(group.total.bits_per_second, 1))
        console.print(groups)
    if result.cell_mass:
        shares = ", ".join(f"{k}: {share:.2f}" for k, share in enumerate(result.cell_mass, start=1))
        console.print(
            f"latents drawn given the codes have the same first codes, by their number: {shares}; what is missing to 1 "
            "makes codes + latents a looser bound on the latents' own likelihood",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if result.conditions["unknown_tags"]:
        tags = ", ".join(result.conditions["unknown_tags"])
        console.print(f"tags that the model does not know were left out: {tags}", markup=False, soft_wrap=True)


def _streams(report: LikelihoodReport) -> list[tuple[str, StreamLikelihood]]:
    streams = (("codes", report.codes), ("latents", report.latents), ("stop", report.stop), ("total", report.total))
    return [(name, stream) for name, stream in streams if stream is not None]


def _interval(interval: Any, digits: int) -> str:
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _write(path: Path, result: Evaluation, **about: str | None) -> None:
    content = {**about, **dataclasses.asdict(result)}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}; choose another place") from error
