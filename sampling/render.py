"""`hybridlm render`: the audio of a plan, with the latents it had or others, or with one span of it drawn anew.

The frame loop of generation runs again over the plan's codes. It takes the same random numbers as it did when they were
drawn, so the same settings give the same latents, and with them the same samples.

An edit draws codes and latents of a span anew, given all that comes before. What follows keeps its codes and latents,
but a decoder remembers: after the span it would make other samples of the same frames. So the old recording is
cross-faded to the new one in the last CROSS_FADE_SECONDS before the span (where a causal decoder makes the same samples
in both), and back to the old one in the first CROSS_FADE_SECONDS after it; all else outside is the old recording's,
sample for sample.

Shapes: B rows, K codebooks, T frames, S samples.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sampling.assemble import GeneratedAudio, assemble, at_loudness
from sampling.controls import Controls, changed
from sampling.files import check_writable, output_paths, tell_rows, write_rows
from sampling.generate import Drawn, FrameLoop, Request
from sampling.pipeline import AudioModel, load
from sampling.plan import Plan, moved
from sampling.request import LARGEST_SEED, check_latent_steps
from tokenizer.errors import UserError

CROSS_FADE_SECONDS = 0.04
"""On either side of an edited span."""


def run(
    *,
    plan: str | Path,
    model: str | Path | None = None,
    seed: int | None = None,
    edit: str | None = None,
    device: str = "cpu",
    output: str | Path = "rendered.wav",
    precision: str | None = None,
    **changes: float | int | None,
) -> list[Path]:
    """`hybridlm render`: write the recordings of a plan and print one line for each.

    Args:
        plan: What `hybridlm generate --save-plan` wrote.
        model: The model that drew it; None: by the name it had then.
        seed: Of the latents; None for the plan's own. For an edit, of the span; None draws one, which is printed.
        edit: "START:END" in seconds of the recording: only this span is drawn anew.
        device: "cpu", "cuda", ...
        output: WAV or FLAC; several recordings become NAME-1.wav, NAME-2.wav, ...
        precision: Of the weights (`AudioModel.pack`); None for that of the plan.
        changes: `latent_temperature` and `latent_steps` of `Controls`; None for the plan's own.

    Returns:
        The audio files; each has a spectrogram of the same name ending in .png.

    Raises:
        UserError: for no plan, another model's plan, a request that makes no sense, or a place that can't be written.
    """
    found = Plan.load(plan)
    span = None if edit is None else parse_span(edit)
    paths = output_paths(Path(output), len(found.lengths))
    check_writable(paths[0])
    if seed is None and span is not None:
        seed = secrets.randbelow(2**31)
    precision = found.origin.precision if precision is None else precision
    audio_model = load(found.origin.name if model is None else model, device=device, precision=precision)
    for line in audio_model.told:
        print(line)
    began = time.perf_counter()
    made = render(audio_model, found, seed=seed, edit=span, **changes)
    took = time.perf_counter() - began
    write_rows(made, paths)
    tell_rows(made, paths, took)
    return paths


def parse_span(text: str) -> tuple[float, float]:
    """Two numbers of seconds, from "START:END".

    Raises:
        UserError: for anything else.
    """
    try:
        start, end = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"edit={text!r} must be START:END in seconds, such as 1.2:2.5") from None
    return start, end


def render(
    model: AudioModel,
    plan: Plan,
    *,
    seed: int | None = None,
    edit: tuple[float, float] | None = None,
    **changes: float | int | None,
) -> GeneratedAudio:
    """Make the audio of a plan.

    Args:
        model: The one that drew it.
        plan: Whose codes are kept, all of them or all outside the edited span.
        seed: Row i draws with `seed + i`; None for the plan's own.
        edit: Begin and end, in seconds of the recording, of the only span that is drawn anew, by `seed` and `changes`.
        changes: Fields of `Controls`; None for the plan's own.

    Raises:
        UserError: for a plan of another model, or a request that makes no sense.
    """
    check_origin(model, plan)
    new = changed(plan.request.controls, **changes)
    check_latent_steps(new, model.model)
    rows = len(plan.lengths)
    seed = plan.request.seeds[0] if seed is None else seed
    if not 0 <= seed <= LARGEST_SEED - rows:
        raise UserError(f"seed={seed} must be at least 0 and below 2**63 - {rows}")
    device = next(model.model.parameters()).device
    request, seeds = moved(plan.request, device), tuple(seed + row for row in range(rows))
    if edit is None:
        request = replace(request, seeds=seeds, controls=new)
        made = assemble(model.tokenizer, model.source, request, list(_replay(model, plan, request)))
        return at_loudness(made, new.loudness)
    span = _span_frames(plan, edit)
    old_frames = list(_replay(model, plan, request))
    new_frames = [*_replay(model, plan, request, span, seeds, new), *old_frames[span.stop :]]
    old = assemble(model.tokenizer, model.source, request, old_frames)
    made = assemble(model.tokenizer, model.source, request, new_frames)
    before, hop = plan.prompt_frames, model.tokenizer.hop_length
    spliced = splice(
        old.waveform,
        made.waveform,
        (before + span.start) * hop,
        (before + span.stop) * hop,
        round(CROSS_FADE_SECONDS * model.sample_rate_hz),
    )
    made = replace(made, waveform=spliced, seed=seed, seconds_made=rows * len(span) / plan.frame_rate_hz)
    return at_loudness(made, plan.request.controls.loudness, like=old)


def check_origin(model: AudioModel, plan: Plan) -> None:
    """Raises:
    UserError: a plan of another model, or of one that sounds otherwise.
    """
    ours, theirs = model.origin, plan.origin
    if (ours.model, ours.tokenizer) != (theirs.model, theirs.tokenizer):
        raise UserError(f"the plan was drawn by {theirs}, but this is {ours}; give the plan's model with --model")
    config = model.model.config
    if plan.codes.shape[1] != config.output_codebooks or int(plan.codes.max()) >= config.codebook_size:
        raise UserError(
            f"the plan's codes do not fit {config.output_codebooks} codebooks of {config.codebook_size}; it is "
            "damaged, make it again"
        )


def _span_frames(plan: Plan, edit: tuple[float, float]) -> range:
    """The drawn frames of a span of the recording."""
    start, end = edit
    rate, prompt = plan.frame_rate_hz, plan.prompt_frames
    shortest = int(plan.lengths.min())
    first, last = prompt / rate, (prompt + shortest) / rate
    name = f"edit={start:g}:{end:g}"
    if not (math.isfinite(start) and math.isfinite(end) and round(start * rate) < round(end * rate)):
        raise UserError(f"{name} must be START:END in seconds, at least one frame ({1 / rate:g} s) apart")
    span = range(round(start * rate) - prompt, round(end * rate) - prompt)
    if span.start < 0 or span.stop > shortest:
        raise UserError(
            f"{name} must lie within {first:g}:{last:g}, what was drawn"
            + (" in the shortest recording" if len(plan.lengths) > 1 else "")
        )
    return span


def _replay(
    model: AudioModel,
    plan: Plan,
    request: Request,
    span: range | None = None,
    seeds: Sequence[int] = (),
    controls: Controls | None = None,
) -> Iterator[Drawn]:
    """The plan's frames again; with a span, up to its end, and in it new ones by these seeds and controls."""
    time, stop = plan.codes.shape[2], plan.codes.shape[2] if span is None else span.stop
    device = next(model.model.parameters()).device
    codes = plan.codes.to(device)
    active = (torch.arange(time) < plan.lengths[:, None]).to(device)  # (B, T)
    if span is None and not model.model.config.predicts_latents:
        yield from (Drawn(codes=codes[:, :, t : t + 1], latents=None, active=active[:, t]) for t in range(time))
        return
    loop = FrameLoop(model.model, request, model.hear(request))
    for t in range(stop):
        if span is not None and t == span.start:
            assert controls is not None
            loop.redraw(seeds, controls)
        known = None if span is not None and t in span else codes[:, :, t]
        frame = loop.draw(may_stop=False, codes=known)
        assert frame is not None
        yield replace(frame, active=active[:, t])
        if t + 1 < stop:
            loop.advance(frame)


def splice(
    old: Float[Tensor, "B 1 S"], new: Float[Tensor, "B 1 S"], start: int, stop: int, fade: int
) -> Float[Tensor, "B 1 S"]:
    """The new recording from sample `start` to `stop`, the old one outside, with `fade` samples of both around.

    Where both agree, the result is exactly theirs.
    """
    time = torch.arange(old.shape[-1], device=old.device)
    distance = torch.maximum(start - time, time - stop + 1).clamp(min=0)  # 0 within the span
    weight = 0.5 + 0.5 * torch.cos(math.pi * (distance / (fade + 1)).clamp(max=1.0))
    weight = torch.where(distance > fade, torch.zeros_like(weight), weight)
    mixed = old + weight * (new - old)
    return torch.where(distance == 0, new, mixed)
