"""The frame loop: from a prefix and perhaps a prompt to frames, one at a time.

Shapes: B rows, K codebooks, D latent, F feature, C hidden. With classifier-free guidance the model runs on 2B rows, the
first B with their condition and the last B without.

Classifier-free guidance. Codes: the log-probabilities are extrapolated, u + cfg (c - u). A hybrid model draws its
latent from the conditional density given the guided codes, which already pin it down. A continuous-only model has no
logits to extrapolate, and the product c^cfg u^(1 - cfg) of two mixtures of Gaussians has no sampler: there, candidates
are drawn from the conditional density and one of them is chosen with weights (c / u)^(cfg - 1). This is
sampling-importance-resampling: exact in the limit of many candidates, and with few it stays on what the conditional
model can make (GIVT, arXiv 2312.02116, rejects instead, without a bound on the time). A flow head has no density: its
state is extrapolated, u + cfg (c - u) (SLED).

Equal results. Every row draws from a generator of its own, the same count of numbers a frame whatever the others do, so
that a row depends on its seed alone. What is left is rounding: a matrix product may differ in the last bits between
batch sizes, which moves a draw across the boundary of two codes about once in a million draws.

Any length. A request may be longer than the model's longest sequence: with `sink_frames`, once `window_frames` are
held, the oldest fall out, an eighth at a time, but for the prefix and the first ones, which attention leans on
(StreamingLLM, arXiv 2309.17453). What stays moves up, so that no distance is one that the model was not trained on.
Memory and time a frame are bounded, the latter by the window: keys and values are read at every frame, beside the
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridlm.code_head import draw, row_uniforms
from hybridlm.latent_head import GaussianMixture
from hybridlm.model import HybridLM
from sampling.controls import Controls, penalize, restrict, sharpen
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames

FORGOTTEN_SHARE = 8
"""One of so many parts of the frames that are held falls out at once: to forget is to copy what stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many frames to draw."""

    minimum: int
    """Frames before which the model's wish to stop is not heard."""
    maximum: int
    """Frames after which every row stops; equal to `minimum` for an exact length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to draw, in the model's own terms. All rows share it but for their seeds."""

    prefix: Sequence[int]
    """Ids of tags and text, ending in <audio>."""
    unconditional: Sequence[int]
    """The prefix of a row without what guidance strengthens."""
    prompt: AudioFrames | None
    """One row of frames that the drawn ones follow."""
    context_frames: int
    """So many of the prompt's last frames the model looks at."""
    limits: Limits
    seeds: Sequence[int]
    """One per row."""
    controls: Controls
    """Without a `cfg`, nothing is guided."""
    reference: bool = False
    """Whether the prompt is looked at only, and no part of the result."""
    place: int | None = None
    """Pieces of the text that the prompt has spoken, which a reader goes on from; None: it finds out by itself."""
    sink_frames: int | None = None
    """First frames that are never forgotten, where more are drawn than `window_frames`; None: nothing is forgotten, and
    no more can be drawn than the model's longest sequence has."""
    window_frames: int | None = None
    """Most frames that are held, with `sink_frames`; None: as many as the model's longest sequence has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One frame of every row."""

    codes: Int[Tensor, "B K 1"] | None
    """None for a continuous model."""
    latents: Float[Tensor, "B 1 D"] | None
    """None for a discrete model."""
    active: Bool[Tensor, " B"]
    """False for rows that have stopped: their frame means nothing."""


Hear = Callable[[Drawn], Float[Tensor, "B 1 F"]]
"""Features of a frame that was drawn."""


def generate_frames(model: HybridLM, request: Request, hear: Hear | None = None) -> Iterator[Drawn]:
    """Draw frame by frame, until every row has stopped or the limit is reached.

    Args:
        model: In evaluation mode.
        request: See `Request`; its prompt has features, if the model reads such.
        hear: Gives them of drawn frames, which it is called with once each, in order (`sampling.heard`).

    Yields:
        At least one frame; the first one is active in every row.

    Raises:
        UserError: more frames than the model's longest sequence without `sink_frames`, or more than memory holds.
    """
    with _memory_told(model, request):
        loop = FrameLoop(model, request, hear)
    for index in range(request.limits.maximum):
        frame = loop.draw(may_stop=index >= max(1, request.limits.minimum))
        if frame is None:
            return
        yield frame
        if index + 1 < request.limits.maximum:
            with _memory_told(model, request):
                loop.advance(frame)


class FrameLoop:
    """The rows of a request on their way; each method is one inference-mode call, so nothing is kept for gradients."""

    @torch.inference_mode()
    def __init__(self, model: HybridLM, request: Request, hear: Hear | None = None) -> None:
        self.model, self.request, self.controls, self.hear = model, request, request.controls, hear
        self.cfg = self.controls.guidance(with_text=False)
        self.rows = len(request.seeds)
        self.device = next(model.parameters()).device
        self.guided = _guided(request)
        # On the CPU, so that a seed means the same on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        self.active = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        prefix, mask = _prefixes(request, self.guided, self.device)
        context = _context(request, prefix.shape[0])
        place = None
        if request.place is not None:
            place = torch.full((prefix.shape[0],), float(request.place), device=self.device)
        _check_length(request, model.config.max_frames)
        self.h, self.cache = model.start(prefix, mask, context, place)
        self.held = 0 if context is None else context.latents.shape[1]
        """Frames that the cache has."""
        self.window = _window(request, model.config.max_frames)
        """As many as it may have; None: all."""
        self.sinks = self.cache.positions[:, 0] - self.held + (request.sink_frames or 0)
        """First positions of every row that are never forgotten: the prefix, and frames."""
        self.recent = torch.zeros(self.rows, model.config.output_codebooks, 0, dtype=torch.int64, device=self.device)
        """Codes (B, K, W) that a penalty on repetition looks at."""
        if context is not None:
            self._remember(context.codes[: self.rows])

    @torch.inference_mode()
    def draw(self, *, may_stop: bool, codes: Int[Tensor, "B K"] | None = None) -> Drawn | None:
        """The next frame of every row; None when all have stopped.

        Args:
            may_stop: Whether the model's wish to stop is heard.
            codes: The frame's codes, where they are known; latents are drawn with the same random numbers as ever.
        """
        model, controls, config = self.model, self.controls, self.model.config
        conditional, free = (self.h[: self.rows], self.h[self.rows :]) if self.guided else (self.h, None)
        stops = _stops(model.stop_logit(conditional), row_uniforms(self.generators, 1, self.device), controls)
        if may_stop:
            self.active = self.active & ~stops
            if not bool(self.active.any()):
                return None
        latents = None
        if codes is not None:
            row_uniforms(self.generators, config.output_codebooks, self.device)  # those that drew them
        elif config.uses_codes:
            codes = model.code_head.sample(
                conditional,
                self.generators,
                lambda logits, k: restrict(penalize(logits, self.recent[:, k], controls), controls),
                unconditional=free,
                cfg=self.cfg,
            )
        if config.predicts_latents:
            latents = _draw_latents(model, conditional, free, codes, self.generators, controls, self.cfg)
        return Drawn(
            codes=None if codes is None else codes[:, :, None],
            latents=None if latents is None else latents[:, None],
            active=self.active,
        )

    def redraw(self, seeds: Sequence[int], controls: Controls) -> None:
        """Draw what follows with fresh generators and other controls; guidance stays as it began."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.controls = controls

    @torch.inference_mode()
    def advance(self, frame: Drawn) -> None:
        """Take in the frame that was drawn."""
        codes, latents, features = self.take(frame)
        if self.full:
            self.cache = self.cache.forget(self.sinks, self.make_room(), self.model.decoder.rotation)
        self.h, self.cache = self.model.step(codes, latents, features, self.cache)
        self.held += 1

    @property
    def full(self) -> bool:
        """Whether frames have to be forgotten before another is taken in."""
        return self.window is not None and self.held >= self.window

    def make_room(self) -> Int[Tensor, " R"]:
        """Positions of every row of the cache that fall out now, after its `sinks`: none unless it is `full`."""
        gone = 0
        if self.full:
            assert self.window is not None and self.request.sink_frames is not None
            gone = self.held - self.window + max(1, (self.window - self.request.sink_frames) // FORGOTTEN_SHARE)
        self.held -= gone
        return torch.full_like(self.sinks, gone)

    def take(self, frame: Drawn) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the model's step gets of a frame that was drawn: codes, latents, features of all rows of the cache."""
        if frame.codes is not None:
            self._remember(frame.codes)
        features = None if self.hear is None else self.hear(frame)
        return self._all_rows(frame.codes), self._all_rows(frame.latents), self._all_rows(features)

    @staticmethod
    def joined(loops: Sequence[FrameLoop]) -> FrameLoop:
        """One to `draw` the next frame of several by, which have the same controls, guidance and memory; no more."""
        joint = copy.copy(loops[0])
        joint.rows = sum(loop.rows for loop in loops)
        joint.generators = [generator for loop in loops for generator in loop.generators]
        joint.active = torch.cat([loop.active for loop in loops])
        # Without a penalty nobody looks at it, and rows may remember unequally much.
        looked_at = slice(None) if joint.controls.repetition_penalty != 1 else slice(0)
        joint.recent = torch.cat([loop.recent[:, :, looked_at] for loop in loops])
        with_condition = [loop.h[: loop.rows] for loop in loops]
        joint.h = torch.cat([*with_condition, *(loop.h[loop.rows :] for loop in loops)])
        return joint

    def _remember(self, codes: Int[Tensor, "B K T"]) -> None:
        heard = torch.cat([self.recent, codes[:, : self.recent.shape[1]]], dim=2)
        self.recent = heard[:, :, -self.controls.repetition_window :]

    def _all_rows(self, x: Tensor | None) -> Tensor | None:
        return torch.cat([x, x]) if self.guided and x is not None else x


def _guided(request: Request) -> bool:
    """Whether every row has another without its condition."""
    return request.controls.guidance(with_text=False) != 1.0 and list(request.prefix) != list(request.unconditional)


def _prefixes(request: Request, guided: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded prefixes (B or 2B, P) and their mask."""
    lines = [list(request.prefix)] * len(request.seeds)
    if guided:
        lines += [list(request.unconditional)] * len(request.seeds)
    length = max(map(len, lines))
    prefix = torch.tensor([[0] * (length - len(line)) + line for line in lines], device=device)
    mask = torch.tensor([[False] * (length - len(line)) + [True] * len(line) for line in lines], device=device)
    return prefix, mask


@contextmanager
def _memory_told(model: HybridLM, request: Request) -> Iterator[None]:
    """Raises:
    UserError: where the allocator says that memory is out.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        config, rows, frames = model.config, len(request.seeds), request.limits.maximum
        frames = min(frames, _window(request, config.max_frames) or frames)
        columns = (2 if _guided(request) else 1) * rows * (frames + len(request.prefix))
        held = columns * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
        raise UserError(
            f"memory is out: {frames} frames x {rows} at once hold {held / 2**30:.2g} GiB of keys and values beside "
            "the weights; ask for fewer at once, for less, or give sink_frames"
        ) from error


def _window(request: Request, longest: int) -> int | None:
    """Most frames that are held; None: all."""
    if request.sink_frames is None:
        return None
    return longest if request.window_frames is None else request.window_frames


def _check_length(request: Request, longest: int) -> None:
    sinks, frames, window = request.sink_frames, request.limits.maximum, request.window_frames
    if sinks is None and frames > longest:
        raise UserError(
            f"{frames} frames are more than max_frames={longest}, the model's longest sequence; give sink_frames (4, "
            "say), and the oldest frames are forgotten"
        )
    if window is not None and sinks is None:
        raise UserError(f"window_frames={window} needs sink_frames, the first frames that stay; give 0 or more")
    if window is not None and not 1 <= window <= longest:
        raise UserError(f"window_frames={window} must be at least 1 and at most max_frames={longest}")
    name, most = ("max_frames", longest) if window is None else ("window_frames", window)
    if sinks is not None and not 0 <= sinks < most:
        raise UserError(f"sink_frames={sinks} must be at least 0 and below {name}={most}")


def _context(request: Request, rows: int) -> AudioFrames | None:
    if request.prompt is None:
        return None
    prompt, seen = request.prompt, min(request.context_frames, request.prompt.latents.shape[1])
    start = prompt.latents.shape[1] - seen
    return AudioFrames(
        codes=prompt.codes[:, :, start:].expand(rows, -1, -1),
        latents=prompt.latents[:, start:].expand(rows, -1, -1),
        lengths=torch.full((rows,), seen, device=prompt.latents.device),
        features=None if prompt.features is None else prompt.features[:, start:].expand(rows, -1, -1),
    )


def _stops(logit: Float[Tensor, " B"], uniforms: Float[Tensor, "B 1"], controls: Controls) -> Bool[Tensor, " B"]:
    """Whether each row stops here: drawn, and probabilities below the floor count as 0; or by a threshold alone."""
    probability = logit.float().sigmoid()
    if controls.stops_at is not None:
        return probability >= controls.stops_at
    return (probability >= controls.stop_floor) & (uniforms[:, 0] < probability)


def _draw_latents(
    model: HybridLM,
    conditional: Float[Tensor, "B C"],
    free: Float[Tensor, "B C"] | None,
    codes: Int[Tensor, "B K"] | None,
    generators: Sequence[torch.Generator],
    controls: Controls,
    cfg: float,
) -> Float[Tensor, "B D"]:
    if controls.latent_steps is not None:
        guided = conditional if free is None else free + cfg * (conditional - free)
        return model.flow_head.sample(
            guided, codes, generators, num_steps=controls.latent_steps, temperature=controls.latent_variance_scale
        )
    mixture = model.latent_head.distribution(conditional, codes)
    if free is None or codes is not None:
        return _draw(mixture, generators, controls)
    candidates = torch.stack([_draw(mixture, generators, controls) for _ in range(controls.num_candidates)], dim=1)
    unguided = model.latent_head.distribution(free, None)
    ratio = torch.stack([mixture.log_prob(z) - unguided.log_prob(z) for z in candidates.unbind(dim=1)], dim=1)  # (B, N)
    chosen = draw((cfg - 1.0) * ratio, row_uniforms(generators, 1, candidates.device)[:, 0])
    return candidates[torch.arange(len(chosen), device=chosen.device), chosen]


def _draw(mixture: GaussianMixture, generators: Sequence[torch.Generator], controls: Controls) -> Float[Tensor, "B D"]:
    sharper = replace(mixture, log_weights=sharpen(mixture.log_weights, controls.temperature))
    return sharper.sample(generators, temperature=controls.latent_variance_scale)
