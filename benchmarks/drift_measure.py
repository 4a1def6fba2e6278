"""What `benchmarks.drift` measures of one model on one clip: its continuations, window by window.

Shapes: B rows (seeds), S samples, T frames, K codebooks, D latent, W windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.controls import Controls
from sampling.drift import WindowStatistics, average, changes, window_statistics
from sampling.generate import Drawn, FrameLoop, Limits, Request
from sampling.pipeline import AudioModel
from sampling.request import PROMPT_SECONDS
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames
from tokenizer.metrics import mel_distance

REAL, CODEC, TEACHER, FREE = "real", "codec", "teacher-forced", "free-running"
MEL_DISTANCE = "mel_distance"
Values = dict[str, dict[str, Float[Tensor, "B W"]]]
"""By kind of continuation and measure: distances to the prompt's statistics, with their sign where they have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What is continued and by how much, in a model's frames."""

    window: int
    """Frames in a window."""
    before: int
    """Windows of the prompt."""
    after: int
    """Windows of the continuation."""

    @property
    def prompt(self) -> int:
        """Frames of the prompt."""
        return self.before * self.window

    @property
    def total(self) -> int:
        """Frames of prompt and continuation."""
        return (self.before + self.after) * self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """Frames and sound after the prompt."""

    waveform: Float[Tensor, "B S"]
    latents: Float[Tensor, "B T D"] | None
    """None where the model predicts none."""
    codes: Int[Tensor, "B K T"] | None
    """Of the codebooks that the model predicts; None where it predicts none."""


class DrawnFrames(NamedTuple):
    """Frames, one after the other."""

    codes: Int[Tensor, "B K T"] | None
    """None for a continuous model."""
    latents: Float[Tensor, "B T D"] | None
    """None for a discrete model."""


def span_of(model: AudioModel, name: str, window_s: float, before: int, after: int) -> Span:
    """The windows in a model's frames, rounded down to whole ones.

    Raises:
        UserError: a window without a frame, or more frames than the model is meant for.
    """
    rate, longest = model.tokenizer.frame_rate_hz, model.model.config.max_frames
    span = Span(window=int(window_s * rate + 1e-6), before=before, after=after)
    if span.window < 1:
        raise UserError(f"--window {window_s:g} s holds no frame of {name}; use at least {1 / rate:g}")
    if span.prompt / rate > PROMPT_SECONDS:
        raise UserError(f"--prompt {before * window_s:g} s must be at most {PROMPT_SECONDS:g} s")
    if span.total > longest:
        allowed = longest // span.window - before
        remedy = f"use --continue {allowed * window_s:g} or less" if allowed >= 1 else "use shorter ones"
        raise UserError(
            f"--prompt {before * window_s:g} and --continue {after * window_s:g} are {span.total} frames of {name}, "
            f"whose max_frames={longest}; {remedy}"
        )
    return span


def teacher_forced(
    model: AudioModel, frames: AudioFrames, first: int, seeds: Sequence[int], controls: Controls
) -> DrawnFrames:
    """Draw every frame from `first` on given the real ones before it, with the random numbers of generation there.

    Args:
        model: Told nothing: no text, no tags.
        frames: One row of real frames.
        first: The first frame that is drawn; at least one comes before.
        seeds: One a row of the result.
        controls: As in generation.
    """
    count, rows = frames.latents.shape[1] - first, len(seeds)
    ids = model.text.encode("", [])
    prompt = AudioFrames(
        codes=frames.codes[:, :, :first],
        latents=frames.latents[:, :first],
        lengths=torch.tensor([first], device=frames.lengths.device),
        features=None if frames.features is None else frames.features[:, :first],
    )
    request = Request(
        prefix=ids,
        unconditional=ids,
        prompt=prompt,
        context_frames=first,
        limits=Limits(minimum=count, maximum=count),
        seeds=seeds,
        controls=replace(controls, cfg=controls.guidance(with_text=False)),
    )
    hear = None
    if model.model.config.continuous == "features":
        assert frames.features is not None
        heard = iter(frames.features[:, first:].expand(rows, -1, -1).split(1, dim=1))
        hear = lambda frame: next(heard)  # noqa: E731 (what is heard is real, whatever was drawn)
    loop = FrameLoop(model.model, request, hear)
    drawn = []
    for at in range(first, first + count):
        frame = loop.draw(may_stop=False)
        assert frame is not None
        drawn.append(frame)
        codes, latents = frames.codes[:, :, at : at + 1], frames.latents[:, at : at + 1]
        loop.advance(Drawn(codes=codes.expand(rows, -1, -1), latents=latents.expand(rows, -1, -1), active=frame.active))
    all_codes = [frame.codes for frame in drawn if frame.codes is not None]
    all_latents = [frame.latents for frame in drawn if frame.latents is not None]
    return DrawnFrames(
        codes=torch.cat(all_codes, dim=2) if all_codes else None,
        latents=torch.cat(all_latents, dim=1) if all_latents else None,
    )


@torch.inference_mode()
def forced_continuations(
    model: AudioModel, frames: AudioFrames, span: Span, seeds: Sequence[int], controls: Controls
) -> dict[str, Continuation]:
    """The codec's and the teacher-forced continuation of real frames."""
    drawn = teacher_forced(model, frames, span.prompt, seeds, controls)
    codes = drawn.codes
    if codes is not None and drawn.latents is not None and codes.shape[1] < model.tokenizer.num_codebooks:
        codes = model.tokenizer.quantize(drawn.latents)  # as generation does
    forced = _decode(model, frames, span, codes=codes, latents=drawn.latents)
    real = {"codes": frames.codes[:, :, span.prompt :], "latents": frames.latents[:, span.prompt :]}
    return {CODEC: _decode(model, frames, span, **real), TEACHER: forced}


def free_running(
    model: AudioModel, prompt: Float[Tensor, "1 S"], span: Span, seeds: Sequence[int], controls: Controls
) -> Continuation:
    """What the model makes of the prompt by itself.

    Args:
        seeds: Numbers that follow each other, one a row.

    Raises:
        UserError: a model that can't generate.
    """
    seconds = span.after * span.window / model.tokenizer.frame_rate_hz
    made = model.generate(audio=prompt, duration=seconds, num_samples=len(seeds), seed=seeds[0], controls=controls)
    waveform = made.waveform[:, 0, span.prompt * model.tokenizer.hop_length :]
    return _continuation(model, waveform, made.frames.codes[:, :, span.prompt :], made.frames.latents[:, span.prompt :])


def measure(
    model: AudioModel, waveform: Float[Tensor, "1 S"], frames: AudioFrames, span: Span, made: Mapping[str, Continuation]
) -> tuple[Values, WindowStatistics]:
    """Figures of all continuations and of the real one, and the prompt's statistics.

    Args:
        waveform: The recording: prompt and continuation.
        frames: The recording's.
        made: Continuations of its prompt.
    """
    start = span.prompt * model.tokenizer.hop_length
    before = {"codes": frames.codes[:, :, : span.prompt], "latents": frames.latents[:, : span.prompt]}
    after = {"codes": frames.codes[:, :, span.prompt :], "latents": frames.latents[:, span.prompt :]}
    prompt = _statistics(model, span, _continuation(model, waveform[:, :start], **before))
    reference = average(prompt[0])
    real = _continuation(model, waveform[:, start:], **after)
    values: Values = {}
    for kind, continuation in {REAL: real, **made}.items():
        rows = _statistics(model, span, continuation)
        found = [[changes(window, reference) for window in row] for row in rows]
        values[kind] = {
            name: torch.tensor([[window[name] for window in row] for row in found], dtype=torch.float64)
            for name in found[0][0]
        }
        values[kind][MEL_DISTANCE] = _mel_distances(model, span, real.waveform[0], continuation.waveform)
    return values, reference


def _decode(
    model: AudioModel, frames: AudioFrames, span: Span, *, codes: Tensor | None, latents: Tensor | None
) -> Continuation:
    """The sound of frames that follow the real prompt: the decoder has heard it."""
    if model.source == "latents":
        assert latents is not None
        past = frames.latents[:, : span.prompt].expand(len(latents), -1, -1)
        sound = model.tokenizer.decode_latents(torch.cat([past, latents], dim=1))
    else:
        assert codes is not None
        codes = codes[:, : model.model.config.output_codebooks]
        past = frames.codes[:, : codes.shape[1], : span.prompt].expand(len(codes), -1, -1)
        sound = model.tokenizer.decode_codes(torch.cat([past, codes], dim=2))
    return _continuation(model, sound[:, 0, span.prompt * model.tokenizer.hop_length :], codes, latents)


def _continuation(model: AudioModel, waveform: Tensor, codes: Tensor | None, latents: Tensor | None) -> Continuation:
    """With what the model predicts of the frames, and no more."""
    config = model.model.config
    return Continuation(
        waveform=waveform.float().cpu(),
        codes=codes[:, : config.output_codebooks].cpu() if config.uses_codes and codes is not None else None,
        latents=latents.cpu() if config.predicts_latents and latents is not None else None,
    )


def _statistics(model: AudioModel, span: Span, continuation: Continuation) -> list[list[WindowStatistics]]:
    """Of every row's windows."""
    hop, rows = model.tokenizer.hop_length, len(continuation.waveform)
    found = []
    for row in range(rows):
        windows = continuation.waveform[row].split(span.window * hop)
        found.append(
            [
                window_statistics(
                    window,
                    model.sample_rate_hz,
                    latents=_part(continuation.latents, row, number, span, dim=0),
                    codes=_part(continuation.codes, row, number, span, dim=1),
                )
                for number, window in enumerate(windows)
            ]
        )
    return found


def _part(frames: Tensor | None, row: int, number: int, span: Span, dim: int) -> Tensor | None:
    return None if frames is None else frames[row].narrow(dim, number * span.window, span.window)


def _mel_distances(model: AudioModel, span: Span, real: Tensor, found: Tensor) -> Float[Tensor, "B W"]:
    size = span.window * model.tokenizer.hop_length
    wanted = real.split(size)
    return torch.tensor(
        [
            [mel_distance(one, other, model.sample_rate_hz) for one, other in zip(wanted, row.split(size), strict=True)]
            for row in found
        ],
        dtype=torch.float64,
    )
