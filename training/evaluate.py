"""`hybridlm evaluate`: a model's likelihood of recordings, per stream, in nats a frame and bits a second of audio.

What is scored are latents z + sigma * eps, with a sigma published in the model and a noise decided by the clip's key,
and the codes of these same latents (hybridlm/likelihood.py says why). Clips longer than a window are scored in windows
that see the frames before them as context.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from hybridlm.checkpoint import Checkpoint, load_model
from hybridlm.frame_nll import FrameNLL
from hybridlm.likelihood import ClipNLL, LikelihoodReport, StreamLikelihood, clip_nlls, noise_latents, summarize
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import AudioFrames
from training.corpus import CachedClip, TokenCache, prepare
from training.examples import GOES_ON, MAX_PIECES, clip_seed, make_prefix, with_latents
from training.looseness import cell_mass
from training.manifest import TagRule
from training.positions import PositionNLL

WINDOW_SECONDS = 30.0
"""Longest piece scored at once; the first half of every later window is context."""
BATCH_FRAMES = 2000
CELL_CLIPS, CELL_FRAMES, CELL_LENGTH = 16, 25, 100
"""Clips, and frames of the first so many of each, from which it is estimated how loose a hybrid's bound is: few, for a
model that reads walks through them one by one."""
GROUP_LABEL = "set"
"""Label of a manifest by which figures are also given apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredClip:
    """The likelihood of one clip."""

    key: str
    labels: dict[str, str]
    nll: ClipNLL


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


class _Window(NamedTuple):
    clip: int
    context: int
    """First frame seen."""
    start: int
    """First frame scored."""
    stop: int
    ended: bool


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
    picture: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a model and print a table.

    Args:
        model: "box", a folder or a hub id.
        data: A manifest, a folder of audio, or a cache made by `hybridlm prepare` with the model's tokenizer.
        split: Only clips of this split and those without one; None: all.
        json_file: Where the figures go, with those of every clip.
        adapter: An adapter of that model.
        device: Where to compute.
        rules: Tags and use of text by label, as in training; none: as the manifest has them.
        with_text: Whether the model is told text and tags.
        picture: Where nats a frame by position in the clip and by codebook are drawn, as a PNG.
        console: Where the table goes; standard output by default.

    Raises:
        UserError: a model or data that can't be read, or no clip of that split.
    """
    console = console or Console()
    found = load_model(model, device, adapter)
    name = str(model) if adapter is None else f"{model} with {adapter}"
    with tempfile.TemporaryDirectory(prefix="hybridlm-evaluate-") as scratch:
        cache = open_data(Path(data), found, Path(scratch), split=split, rules=rules)
        positions = PositionNLL(found.model.config.output_codebooks, found.model.config.frame_rate_hz)
        result = evaluate(found, cache, with_text=with_text, positions=positions)
    _print(console, result, name, str(data), split)
    if json_file is not None:
        _write(Path(json_file), result, model=name, data=str(data), split=split)
    if picture is not None:
        positions.write_picture(Path(picture), f"{name} ({result.report.representation}) on {data}")
    return result


def open_data(
    data: Path, found: Checkpoint, scratch: Path, *, split: str | None = None, rules: Sequence[TagRule] = ()
) -> TokenCache:
    """A cache as it is; audio is encoded by the model's tokenizer into `scratch` first, long clips piece by piece."""
    if (data / "meta.json").is_file():
        return TokenCache(data, tokenizer=found.tokenizer, split=split, rules=rules)
    folder = scratch / "tokens"
    console = Console(stderr=True) if Console(stderr=True).is_terminal else Console(file=io.StringIO())
    report = prepare(data, folder, found.tokenizer, workers=1, split=split, latent_dtype="float32", console=console)
    if report.problems:
        problems = Console(stderr=True)
        text = f"{len(report.problems)} clips skipped, the first: {report.problems[0]}"
        problems.print(text, markup=False, highlight=False, soft_wrap=True)
    return TokenCache(folder, tokenizer=found.tokenizer, split=split, rules=rules)


def evaluate(
    found: Checkpoint, cache: TokenCache, *, with_text: bool = True, positions: PositionNLL | None = None
) -> Evaluation:
    """Score every clip of a cache and sum up.

    Args:
        found: Model, tokenizer and text.
        cache: Frames of the model's tokenizer.
        with_text: Whether the model is told text and tags.
        positions: Also counts every frame by its place in the clip.
    """
    config = found.model.config
    window = min(config.max_frames, max(2, round(WINDOW_SECONDS * config.frame_rate_hz)))
    unknown = sorted({tag for tag in cache.index.all_tags() if tag not in found.text.tags})
    clips = list(score_clips(found, cache, window_frames=window, with_text=with_text, positions=positions))
    by_set: dict[str, list[ClipNLL]] = {}
    for clip in clips:
        if GROUP_LABEL in clip.labels:
            by_set.setdefault(clip.labels[GROUP_LABEL], []).append(clip.nll)
    groups = by_set if len(by_set) > 1 else {}
    return Evaluation(
        report=summarize([clip.nll for clip in clips], config),
        groups={name: summarize(nlls, config, num_resamples=500) for name, nlls in sorted(groups.items())},
        clips=clips,
        conditions={
            "window_frames": window,
            "context_frames": window // 2,
            "with_text": with_text,
            "unknown_tags": unknown if with_text else [],
        },
        cell_mass=_cell_mass(found, cache, window, with_text),
    )


def _cell_mass(found: Checkpoint, cache: TokenCache, window: int, with_text: bool) -> tuple[float, ...]:
    """Of some clips, evenly spread; nothing for a model that bounds nothing."""
    if found.model.config.representation != "hybrid":
        return ()
    count = min(len(cache), CELL_CLIPS)
    clips = [noised(found, cache, index * len(cache) // count) for index in range(count)]
    return cell_mass(found, clips, frames_a_clip=CELL_FRAMES, max_frames=min(window, CELL_LENGTH), with_text=with_text)


@torch.inference_mode()
def score_clips(
    found: Checkpoint,
    cache: TokenCache,
    *,
    window_frames: int,
    with_text: bool = True,
    batch_frames: int = BATCH_FRAMES,
    positions: PositionNLL | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[ScoredClip]:
    """Likelihood of every clip, in the cache's order; what else is in a batch changes nothing.

    Args:
        found: Model (in evaluation mode), tokenizer and text.
        cache: Frames of that tokenizer.
        window_frames: Longest piece scored at once. Later windows of a clip begin with `window_frames // 2` frames of
            context, and are not told the text, which is read from the clip's beginning.
        with_text: Whether the model is told text and tags.
        batch_frames: Frames a batch, padding counted; it bounds memory.
        positions: Also counts every frame by its place in the clip.
        indices: Only these clips of the cache.
    """
    pending: list[CachedClip] = []
    frames = 0
    indices = range(len(cache)) if indices is None else indices
    for number, index in enumerate(indices, start=1):
        pending.append(noised(found, cache, index))
        frames += len(pending[-1].latents)
        # Sorting windows by length within a few batches' worth of clips saves padding.
        if frames >= 10 * batch_frames or number == len(indices):
            yield from _score(found, cache, pending, window_frames, with_text, batch_frames, positions)
            pending, frames = [], 0


def noised(found: Checkpoint, cache: TokenCache, index: int) -> CachedClip:
    """A clip with noised latents and their codes; found clip by clip, for in a batch a tie could fall otherwise."""
    clip = cache[index]
    device = next(found.model.parameters()).device
    frames = cache.frames([clip])
    latents = noise_latents(frames.latents, found.model.config.sigma, [clip_seed(clip.key)])
    if latents is frames.latents:
        return clip
    frames = dataclasses.replace(frames, codes=frames.codes.to(device), latents=frames.latents.to(device))
    noised = with_latents(found.tokenizer, frames, latents.to(device))
    return dataclasses.replace(clip, codes=noised.codes[0].cpu(), latents=noised.latents[0].cpu())


def _score(
    found: Checkpoint,
    cache: TokenCache,
    clips: Sequence[CachedClip],
    window_frames: int,
    with_text: bool,
    batch_frames: int,
    positions: PositionNLL | None,
) -> Iterator[ScoredClip]:
    windows = [window for number, clip in enumerate(clips) for window in _windows(number, clip, window_frames)]
    windows.sort(key=lambda window: window.stop - window.context)
    sums: dict[int, ClipNLL] = {}
    for batch in _batches(windows, batch_frames):
        scored = _score_batch(found, cache, clips, batch, with_text)
        if positions is not None:
            positions.add(scored, [window.context for window in batch])
        for window, nll in zip(batch, clip_nlls(scored), strict=True):
            sums[window.clip] = sums[window.clip] + nll if window.clip in sums else nll
    for number, clip in enumerate(clips):
        yield ScoredClip(key=clip.key, labels=clip.labels, nll=sums[number])


def _windows(number: int, clip: CachedClip, window_frames: int) -> Iterator[_Window]:
    """Cut a clip so that every frame is scored once."""
    length, start = len(clip.latents), 0
    while start < length:
        context = max(0, start - window_frames // 2)
        stop = min(length, context + window_frames)
        yield _Window(number, context, start, stop, stop == length and GOES_ON not in clip.labels)
        start = stop


def _batches(windows: Sequence[_Window], batch_frames: int) -> Iterator[list[_Window]]:
    """Group windows that are sorted by length."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * (window.stop - window.context) > batch_frames:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score_batch(
    found: Checkpoint, cache: TokenCache, clips: Sequence[CachedClip], windows: Sequence[_Window], with_text: bool
) -> FrameNLL:
    device = next(found.model.parameters()).device
    parts, rows = [], []
    for window in windows:
        clip, cut = clips[window.clip], slice(window.context, window.stop)
        parts.append(
            dataclasses.replace(
                clip,
                codes=clip.codes[:, cut],
                latents=clip.latents[cut],
                features=None if clip.features is None else clip.features[cut],
            )
        )
        tags = [tag for tag in clip.tags if tag in found.text.tags] if with_text else []
        rows.append((clip.text if with_text and window.context == 0 else None, tags))
    prefix = make_prefix(found.text, rows, max_pieces=MAX_PIECES)
    frames = cache.frames(parts)
    nll = found.model.nll(
        prefix.ids.to(device),
        prefix.mask.to(device),
        AudioFrames(
            codes=frames.codes.to(device),
            latents=frames.latents.to(device),
            lengths=frames.lengths.to(device),
            features=None if frames.features is None else frames.features.to(device),
        ),
        ended=torch.tensor([window.ended for window in windows], device=device),
    )
    return _without_context(nll, [window.start - window.context for window in windows])


def _without_context(nll: FrameNLL, context: Sequence[int]) -> FrameNLL:
    """Drop what is context; the stop before frame t counts with frame t."""
    first = torch.tensor(context, device=nll.mask.device)[:, None]
    length = nll.mask.shape[1]
    frames = torch.arange(length, device=first.device) >= first  # (B, T)
    states = torch.arange(length + 1, device=first.device) >= first
    return FrameNLL(
        codes=nll.codes * frames[:, None],
        latents=nll.latents * frames,
        stop=nll.stop * states,
        correct=nll.correct & frames[:, None],
        mask=nll.mask & frames,
        stop_mask=nll.stop_mask & states,
    )


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
