"""Scoring clips with a model: batches of windows, planned so that the figures are the same on any number of processes.

What is scored together is decided by the lengths of all clips (`plan_groups`), and processes share whole groups out:
every batch then holds the same rows wherever it is computed.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.checkpoint import Checkpoint
from hybridlm.frame_nll import FrameNLL
from hybridlm.likelihood import ClipNLL, clip_nlls, noise_latents
from training.corpus import CachedClip, TokenCache
from training.examples import GOES_ON, MAX_PIECES, clip_seed, make_prefix, with_latents
from training.positions import PositionNLL

BATCH_FRAMES = 2000
"""Frames a batch, padding counted; it bounds memory."""


@runtime_checkable
class ClipSource(Protocol):
    """Clips by number, made or read when they are asked for."""

    name: str
    """What messages call it."""

    def __len__(self) -> int: ...

    def __getitem__(self, clip: int) -> CachedClip:
        """The clip.

        Raises:
            UserError: one that can't be read.
        """
        ...

    def num_frames(self, clip: int) -> int:
        """Its length, or what its header promises: batches are planned by it."""
        ...

    def has_text(self, clip: int) -> bool:
        """Whether it has a text."""
        ...

    def all_tags(self) -> list[str]:
        """Every tag in use, sorted."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredClip:
    """The likelihood of one clip."""

    key: str
    labels: dict[str, str]
    nll: ClipNLL


class _Window(NamedTuple):
    clip: int
    context: int
    """First frame seen."""
    start: int
    """First frame scored."""
    stop: int
    ended: bool
    told: bool
    """Whether it is told its clip's text."""


def plan_groups(
    source: ClipSource,
    *,
    with_text: bool = True,
    batch_size: int | None = None,
    batch_frames: int = BATCH_FRAMES,
    indices: Sequence[int] | None = None,
) -> list[list[int]]:
    """Clips that are scored together: of about equal length, with or without text, one batch as far as they fit.

    Returns:
        Clip numbers, all or those of `indices`; the longest clips come first.
    """

    def told(clip: int) -> bool:
        return with_text and source.has_text(clip)

    # Only a batch with text has its reader walk through it, so those without keep apart.
    order = sorted(((told(clip), source.num_frames(clip), clip) for clip in _all(source, indices)), reverse=True)
    groups: list[list[int]] = []
    longest, kind = 0, None
    for text, frames, clip in order:
        full = bool(groups) and ((len(groups[-1]) + 1) * longest > batch_frames or len(groups[-1]) == batch_size)
        if not groups or full or text != kind:
            groups.append([])
            longest, kind = frames, text
        groups[-1].append(clip)
    return groups


def share_out(source: ClipSource, groups: Sequence[list[int]], count: int) -> list[list[list[int]]]:
    """Groups for each of `count` processes, so that they have about equally many frames; the same on all of them."""
    frames = [sum(source.num_frames(clip) for clip in group) for group in groups]
    shares: list[list[list[int]]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(groups)), key=lambda number: -frames[number]):
        rank = loads.index(min(loads))
        shares[rank].append(groups[number])
        loads[rank] += frames[number]
    return shares


def score_clips(
    found: Checkpoint,
    source: ClipSource,
    *,
    window_frames: int,
    with_text: bool = True,
    batch_size: int | None = None,
    batch_frames: int = BATCH_FRAMES,
    positions: PositionNLL | None = None,
    indices: Sequence[int] | None = None,
) -> list[ScoredClip]:
    """Likelihood of every clip, in the source's order; what else is in a batch changes nothing.

    Args:
        found: Model (in evaluation mode), tokenizer and text.
        source: Frames of that tokenizer.
        window_frames: See `score_group`.
        with_text: See `score_group`.
        batch_size: See `score_group`.
        batch_frames: See `score_group`.
        positions: See `score_group`.
        indices: Only these clips, in this order.
    """
    scored: dict[int, ScoredClip] = {}
    groups = plan_groups(source, with_text=with_text, batch_size=batch_size, batch_frames=batch_frames, indices=indices)
    for group in groups:
        clips = score_group(
            found,
            [noised(found, source[clip]) for clip in group],
            window_frames=window_frames,
            with_text=with_text,
            batch_size=batch_size,
            batch_frames=batch_frames,
            positions=positions,
        )
        scored |= dict(zip(group, clips, strict=True))
    return [scored[clip] for clip in _all(source, indices)]


def _all(source: ClipSource, indices: Sequence[int] | None) -> Sequence[int]:
    return range(len(source)) if indices is None else indices


@torch.inference_mode()
def noised(found: Checkpoint, clip: CachedClip) -> CachedClip:
    """A clip with noised latents and their codes; found clip by clip, for in a batch a tie could fall otherwise."""
    device = next(found.model.parameters()).device
    frames = TokenCache.frames([clip])
    latents = noise_latents(frames.latents, found.model.config.sigma, [clip_seed(clip.key)])
    if latents is frames.latents:
        return clip
    frames = dataclasses.replace(frames, codes=frames.codes.to(device), latents=frames.latents.to(device))
    changed = with_latents(found.tokenizer, frames, latents.to(device))
    return dataclasses.replace(clip, codes=changed.codes[0].cpu(), latents=changed.latents[0].cpu())


@torch.inference_mode()
def score_group(
    found: Checkpoint,
    clips: Sequence[CachedClip],
    *,
    window_frames: int,
    with_text: bool = True,
    batch_size: int | None = None,
    batch_frames: int = BATCH_FRAMES,
    positions: PositionNLL | None = None,
) -> list[ScoredClip]:
    """Likelihood of some clips, in their order.

    Args:
        found: Model (in evaluation mode), tokenizer and text.
        clips: What is scored: `noised` ones.
        window_frames: Longest piece scored at once. Later windows of a clip begin with `window_frames // 2` frames of
            context, and are not told the text, which is read from the clip's beginning.
        with_text: Whether the model is told text and tags.
        batch_size: Windows a batch at most; None: as many as `batch_frames` holds.
        batch_frames: Frames a batch, padding counted; it bounds memory.
        positions: Also counts every frame by its place in the clip.
    """
    windows = [w for number, clip in enumerate(clips) for w in _windows(number, clip, window_frames, with_text)]
    windows.sort(key=lambda window: (window.told, window.stop - window.context))
    sums: dict[int, ClipNLL] = {}
    for batch in _batches(windows, batch_frames, batch_size):
        scored = _score_batch(found, clips, batch, with_text)
        if positions is not None:
            positions.add(scored, [window.context for window in batch])
        for window, nll in zip(batch, clip_nlls(scored), strict=True):
            sums[window.clip] = sums[window.clip] + nll if window.clip in sums else nll
    return [ScoredClip(key=clip.key, labels=clip.labels, nll=sums[number]) for number, clip in enumerate(clips)]


def _windows(number: int, clip: CachedClip, window_frames: int, with_text: bool) -> Iterator[_Window]:
    """Cut a clip so that every frame is scored once."""
    length, start = len(clip.latents), 0
    while start < length:
        context = max(0, start - window_frames // 2)
        stop = min(length, context + window_frames)
        told = with_text and context == 0 and bool(clip.text)
        yield _Window(number, context, start, stop, stop == length and GOES_ON not in clip.labels, told)
        start = stop


def _batches(windows: Sequence[_Window], batch_frames: int, batch_size: int | None) -> Iterator[list[_Window]]:
    """Group windows that are sorted by length, those without text first."""
    batch: list[_Window] = []
    for window in windows:
        too_long = (len(batch) + 1) * (window.stop - window.context) > batch_frames
        if batch and (too_long or len(batch) == batch_size or window.told != batch[0].told):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score_batch(
    found: Checkpoint, clips: Sequence[CachedClip], windows: Sequence[_Window], with_text: bool
) -> FrameNLL:
    device = next(found.model.parameters()).device
    parts, rows = [], []
    for window in windows:
        clip = clips[window.clip]
        parts.append(clip.cut(window.context, window.stop))
        tags = [tag for tag in clip.tags if tag in found.text.tags] if with_text else []
        rows.append((clip.text if window.told else None, tags))
    prefix = make_prefix(found.text, rows, max_pieces=MAX_PIECES)
    frames = TokenCache.frames(parts)
    nll = found.model.nll(
        prefix.ids.to(device),
        prefix.mask.to(device),
        frames.to(device),
        ended=torch.tensor([window.ended for window in windows], device=device),
    )
    return _without_context(nll, [window.start - window.context for window in windows])


def states_of(found: Checkpoint, clips: Sequence[CachedClip], *, with_text: bool) -> Float[Tensor, "B L C"]:
    """The model's states along whole clips, side by side.

    Args:
        found: Model, tokenizer and text.
        clips: Frames as they are scored.
        with_text: Whether the model is told text and tags.
    """
    device = next(found.model.parameters()).device
    rows: list[tuple[str | None, list[str]]] = [(None, []) for _ in clips]
    if with_text:
        rows = [(clip.text, [tag for tag in clip.tags if tag in found.text.tags]) for clip in clips]
    prefix = make_prefix(found.text, rows, max_pieces=MAX_PIECES)
    frames = TokenCache.frames(clips).to(device)
    return found.model.states(prefix.ids.to(device), prefix.mask.to(device), frames)


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
