"""Requests of any kind side by side: waiting ones enter and finished ones leave while the others go on.

The model's step, which costs most, is taken for all rows at once, whatever their age; frames are drawn at once for rows
that share their settings. Every request draws from a generator of its own, so its result is the same alone, in any
company and in any order (but for rounding, see `sampling.generate`). What drives it, such as a server, submits requests
when they come and calls `step` as long as it has something to do.

Shapes: R rows of the cache (a guided request has two, with its condition and without), C hidden, K codebooks, D latent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridlm.model import HybridLM
from hybridlm.model_cache import ModelCache
from sampling.generate import Drawn, FrameLoop, Hear, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What a step brought for one request."""

    ticket: int
    frame: Drawn | None
    """One row; None where the request ended by itself instead."""
    finished: bool
    """Nothing follows."""


@dataclass(kw_only=True, slots=True)
class _Running:
    """A request that has entered."""

    ticket: int
    request: Request
    loop: FrameLoop
    """Its generator, state and memory of codes; the cache is the scheduler's."""
    drawn: int = 0


class Scheduler:
    """See the module's text.

    Args:
        model: In evaluation mode.
        max_rows: Most requests that run at once; the others wait.
    """

    def __init__(self, model: HybridLM, *, max_rows: int = 8) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self.model, self.max_rows = model, max_rows
        self._waiting: deque[tuple[int, Request, Hear | None]] = deque()
        self._running: list[_Running] = []
        self._cache: ModelCache | None = None
        """Of the running requests, in their order; a guided one's two rows together."""
        self._tickets = 0

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: Request, hear: Hear | None = None) -> int:
        """Line a request up.

        Args:
            request: With one seed.
            hear: As `generate_frames` takes it.

        Returns:
            Its ticket, by which events name it.
        """
        if len(request.seeds) != 1:
            raise ValueError(f"a request has one seed here, not {len(request.seeds)}; submit it once for each")
        self._tickets += 1
        self._waiting.append((self._tickets, request, hear))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Forget a request; nothing happens if it is finished or unknown."""
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        self._keep([one.ticket != ticket for one in self._running])

    def run(self) -> Iterator[Event]:
        """Step until nothing is left to do."""
        while len(self):
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let waiting requests enter, and draw the next frame of every running one."""
        self._admit()
        events: dict[int, Event] = {}
        for group in self._groups():
            for one, frame in zip(group, draw_together(self.model, group), strict=True):
                one.drawn += frame is not None
                finished = frame is None or one.drawn == one.request.limits.maximum
                events[one.ticket] = Event(ticket=one.ticket, frame=frame, finished=finished)
        told = [events[one.ticket] for one in self._running]
        self._keep([not event.finished for event in told])
        self._advance([event.frame for event in told if event.frame is not None and not event.finished])
        return told

    def _admit(self) -> None:
        caches = [] if self._cache is None else [self._cache]
        while self._waiting and len(self._running) < self.max_rows:
            ticket, request, hear = self._waiting.popleft()
            loop = FrameLoop(self.model, request, hear)
            caches.append(loop.cache)
            self._running.append(_Running(ticket=ticket, request=request, loop=loop))
        if len(caches) > (self._cache is not None):
            self._cache = ModelCache.join(caches) if len(caches) > 1 else caches[0]

    def _groups(self) -> list[list[_Running]]:
        """Requests whose frames can be drawn in one call."""
        groups: dict[tuple[object, ...], list[_Running]] = {}
        for one in self._running:
            loop = one.loop
            alike = (loop.controls, loop.cfg, loop.guided)
            remembered = loop.recent.shape[2] if loop.controls.repetition_penalty != 1 else 0
            may_stop = one.drawn >= max(1, one.request.limits.minimum)
            groups.setdefault((*alike, remembered, may_stop), []).append(one)
        return list(groups.values())

    def _keep(self, kept: Sequence[bool]) -> None:
        """Let the other requests leave."""
        if all(kept):
            return
        rows: list[int] = []
        at = 0
        for one, stays in zip(self._running, kept, strict=True):
            count = len(one.loop.h)
            rows += range(at, at + count) if stays else ()
            at += count
        self._running = [one for one, stays in zip(self._running, kept, strict=True) if stays]
        if not self._running or self._cache is None:
            self._cache = None
            return
        chosen = torch.tensor(rows, device=self._running[0].loop.h.device)
        self._cache = self._cache.select(chosen).compact()

    def _advance(self, frames: Sequence[Drawn]) -> None:
        """Take in one frame of every running request."""
        if not frames:
            return
        taken = [one.loop.take(frame) for one, frame in zip(self._running, frames, strict=True)]

        def together(parts: Sequence[Tensor | None]) -> Tensor | None:
            return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None

        codes, latents, features = (together(parts) for parts in zip(*taken, strict=True))
        assert self._cache is not None
        loops = [one.loop for one in self._running]
        if any(loop.full for loop in loops):
            sinks, dropped = (
                torch.cat(parts) for parts in zip(*((x.sinks, x.make_room()) for x in loops), strict=True)
            )
            self._cache = self._cache.forget(sinks, dropped, self.model.decoder.rotation)
        h, self._cache = self.model.step(codes, latents, features, self._cache)
        for loop in loops:
            loop.held += 1
        for one, own in zip(self._running, h.split([len(one.loop.h) for one in self._running]), strict=True):
            one.loop.h = own


def draw_together(model: HybridLM, group: Sequence[_Running]) -> list[Drawn | None]:
    """The next frames of requests with the same settings; None for one that stops."""
    loops = [one.loop for one in group]
    joint = loops[0].joined(loops)
    frame = joint.draw(may_stop=group[0].drawn >= max(1, group[0].request.limits.minimum))
    if frame is None:
        return [None] * len(group)
    active = frame.active.tolist()
    return [_row(frame, number) if goes_on else None for number, goes_on in enumerate(active)]


def _row(frame: Drawn, number: int) -> Drawn:
    part = slice(number, number + 1)
    return replace(
        frame,
        codes=None if frame.codes is None else frame.codes[part],
        latents=None if frame.latents is None else frame.latents[part],
        active=frame.active[part],
    )
