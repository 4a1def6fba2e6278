"""Whether what is made still sounds as it did at the beginning: a moving window against the first seconds.

Measured are the figures of `sampling.drift` and the timbre. Each has a band around its mean over the windows of the
first seconds: twice the root mean square of what these windows themselves differ from that mean by, but at least a
floor, since a few seconds may be more even than any voice or music stays. Drift is counted in widths of these bands.
Memory is that of a window, and of a few figures a second.

Shapes: S samples, K codebooks, D latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sampling.drift import WindowStatistics, average, changes, window_statistics
from sampling.generate import Drawn
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer

TIMBRE = "timbre"
"""One minus the cosine of a window's mean vector and the first seconds'."""
FLOORS: Mapping[str, float] = {
    "log_mel_mean": 0.3,
    "log_mel_std": 0.2,
    "loudness_db": 2.0,
    "centroid_hz": 200.0,
    "tilt_db_per_octave": 1.0,
    "latent_norm": 0.02,
    "code_entropy_bits": 0.2,
    TIMBRE: 0.02,
}
"""Least width of a band, in the figure's unit; of `latent_norm`, as a share of the first seconds'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """What is compared with what."""

    window_seconds: float = 3.0
    """Length of a window."""
    step_seconds: float = 1.0
    """From one window's start to the next's."""
    anchor_seconds: float = 10.0
    """The first seconds, with which the rest is compared; at least two windows lie in them."""

    def __post_init__(self) -> None:
        if not 0 < self.step_seconds <= self.window_seconds:
            raise UserError(
                f"step_seconds={self.step_seconds} must be above 0 and at most window_seconds={self.window_seconds}"
            )
        if self.anchor_seconds < self.window_seconds + self.step_seconds:
            raise UserError(
                f"anchor_seconds={self.anchor_seconds} must hold two windows; use "
                f"{self.window_seconds + self.step_seconds:g} or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A window after the first seconds, in widths of the bands."""

    start_frame: int
    at_s: float
    """Seconds at which the window ends."""
    drift: dict[str, float]
    """By measure; below 0 for less than at the beginning, where a figure has a sign."""

    @property
    def worst(self) -> str:
        """The measure that is farthest from the first seconds'."""
        return max(self.drift, key=lambda name: abs(self.drift[name]))

    @property
    def largest(self) -> float:
        """How far that is."""
        return abs(self.drift[self.worst])


class DriftMonitor:
    """Takes frames as they are drawn and audio as it is decoded, in pieces of any size.

    Args:
        tokenizer: Of the frames. Timbre is compared by its features where it has some, else by its latents.
        watch: See `Watch`.
    """

    def __init__(self, tokenizer: Tokenizer, watch: Watch | None = None) -> None:
        watch = watch or Watch()
        self.tokenizer, self.watch = tokenizer, watch
        rate = tokenizer.frame_rate_hz
        self.window = max(1, round(watch.window_seconds * rate))
        self.step = min(self.window, max(1, round(watch.step_seconds * rate)))
        self.anchor_frames = max(self.window + self.step, round(watch.anchor_seconds * rate))
        self.readings: list[Reading] = []
        self.widths: dict[str, float] = {}
        """Of the bands, once the first seconds are over."""
        self.anchor: WindowStatistics | None = None
        self._start = 0
        """Frame at which the next window begins."""
        self._codes: list[Tensor] = []  # of frames from there on, (K, 1) each
        self._latents: list[Tensor] = []  # (1, D) each
        self._waveform = torch.zeros(0)
        self._first: list[tuple[WindowStatistics, Tensor]] = []
        self._timbre = torch.zeros(0)

    def see(self, frame: Drawn) -> None:
        """Take in a frame of one row."""
        if frame.codes is not None:
            self._codes.append(frame.codes[0].cpu())
        if frame.latents is not None:
            self._latents.append(frame.latents[0].cpu())

    def see_prompt(self, prompt: AudioFrames, *, codes: bool, latents: bool) -> None:
        """Take in the frames that a continuation begins with, as far as frames that are drawn have the like."""
        if codes:
            self._codes += list(prompt.codes[0].cpu().split(1, dim=1))
        if latents:
            self._latents += list(prompt.latents[0].cpu().split(1, dim=0))

    def hear(self, waveform: Float[Tensor, "1 1 S"]) -> None:
        """Take in decoded audio; its frames have been seen before."""
        self._waveform = torch.cat([self._waveform, waveform.reshape(-1).cpu()])
        samples, step = self.window * self.tokenizer.hop_length, self.step * self.tokenizer.hop_length
        while len(self._waveform) >= samples:
            self._measure(self._waveform[:samples])
            self._waveform = self._waveform[step:]
            self._codes, self._latents = self._codes[self.step :], self._latents[self.step :]
            self._start += self.step

    def latest(self, since: int) -> Reading | None:
        """The last window, if it began at this frame or later."""
        return self.readings[-1] if self.readings and self.readings[-1].start_frame >= since else None

    def report(self) -> dict[str, Any]:
        """All figures, for JSON."""
        anchor = self.anchor
        return {
            "window_seconds": self.window / self.tokenizer.frame_rate_hz,
            "anchor_seconds": self.anchor_frames / self.tokenizer.frame_rate_hz,
            "bands": {
                name: {"anchor": value if isinstance(value := getattr(anchor, name, None), float) else None, "width": w}
                for name, w in self.widths.items()
            },
            "windows": [{"at_s": reading.at_s, **reading.drift} for reading in self.readings],
            "largest": max((reading.largest for reading in self.readings), default=None),
        }

    @torch.no_grad()
    def _measure(self, waveform: Tensor) -> None:
        codes = torch.cat(self._codes[: self.window], dim=1) if self._codes else None
        latents = torch.cat(self._latents[: self.window]) if self._latents else None
        found = window_statistics(waveform, self.tokenizer.sample_rate_hz, latents=latents, codes=codes)
        timbre = self._timbre_of(waveform, codes, latents)
        if self.anchor is None and self._start + self.window <= self.anchor_frames:
            self._first.append((found, timbre))
            return
        if self.anchor is None:
            self._set_bands()
        drift = {name: value / self.widths[name] for name, value in self._changes(found, timbre).items()}
        end = (self._start + self.window) / self.tokenizer.frame_rate_hz
        self.readings.append(Reading(start_frame=self._start, at_s=end, drift=drift))

    def _set_bands(self) -> None:
        self.anchor = average([found for found, _ in self._first])
        self._timbre = torch.stack([timbre for _, timbre in self._first]).mean(dim=0)
        own = [self._changes(*first) for first in self._first]
        for name in own[0]:
            spread = (sum(one[name] ** 2 for one in own) / len(own)) ** 0.5
            floor = FLOORS[name] * (self.anchor.latent_norm or 1.0 if name == "latent_norm" else 1.0)
            self.widths[name] = max(floor, 2.0 * spread)
        self._first.clear()

    def _changes(self, found: WindowStatistics, timbre: Tensor) -> dict[str, float]:
        assert self.anchor is not None
        likeness = float(F.cosine_similarity(timbre, self._timbre, dim=0))
        return {**changes(found, self.anchor), TIMBRE: 1.0 - likeness}

    def _timbre_of(self, waveform: Tensor, codes: Tensor | None, latents: Tensor | None) -> Tensor:
        """One vector of a window: mean features, or mean latents where the tokenizer has none."""
        tokenizer = self.tokenizer
        where = next(iter(tokenizer.parameters())).device if isinstance(tokenizer, torch.nn.Module) else "cpu"
        if tokenizer.feature_dim:
            features = tokenizer.encode(waveform.to(where)[None, None]).features
            assert features is not None
            return features[0].mean(dim=0).float().cpu()
        if latents is None:
            assert codes is not None
            latents = tokenizer.dequantize(codes[None].to(where))[0]
        return latents.mean(dim=0).float().cpu()
