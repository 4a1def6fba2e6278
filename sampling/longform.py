"""What a model cannot make at once: text of any length, sentence by sentence; music of any length, in segments.

Each segment is drawn by a frame loop of its own, which first reads the last frames of what was made (the carry-over),
as if it had drawn them: a window that moves on, exact whatever the layers, with the memory of one segment. Random
numbers go on through all segments, so that segments which carry over everything make what one loop makes. One
streaming decoder goes through the joints, which are therefore none to the ear but what the frames themselves say.

A sentence is read after the last frames of the one before, in the same voice. A model with a reader is told that the
text begins after these frames; one without is shown the whole sentence before, with its text, or nothing of it where
both do not fit.

Re-anchoring: when the window that `sampling.monitor` heard last has left its band, the next segment follows the first
seconds' frames instead of the last ones. What was handed out stays: drawing it again with another seed would hold every
segment back until it is judged, and take unbounded time with a model that always drifts; this costs nothing, and cannot
fail to end the feedback of the drifted frames. A melody, though, breaks off there.

Shapes: K codebooks, T frames, D latent, F feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sampling.controls import Controls
from sampling.generate import Drawn, FrameLoop, Hear, Limits, Request
from sampling.limits import SECONDS_PER_BYTE, frame_limits
from sampling.monitor import DriftMonitor, Watch
from sampling.request import Past, RequestBuilder
from sampling.sentences import sentences
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer, join_frames

LONGEST_SECONDS = 24 * 3600.0
"""A WAV file of 16 bits at 24 kHz holds no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongForm:
    """How what is too long to be made at once is made."""

    segment_seconds: float = 6.0
    """Music, sound and continuations: drawn before the past is read anew."""
    carry_seconds: float = 6.0
    """Of the past that is read then."""
    speech_carry_seconds: float = 0.4
    """Of the sentence before, which the next one follows."""
    at_once_seconds: float = 12.0
    """A text of several sentences is read sentence by sentence where a reader takes longer than this for it."""
    sentence_seconds: float = 20.0
    """A longer sentence is cut."""
    max_drift: float | None = None
    """Widths of the bands (`sampling.monitor`) beyond which the next segment is re-anchored; everything is made in
    segments then. None: drift is at most measured."""
    watch: Watch = field(default_factory=Watch)
    """What is compared with what."""

    def __post_init__(self) -> None:
        for name in ("segment_seconds", "at_once_seconds", "sentence_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value} must be above 0; give seconds")
        for name in ("carry_seconds", "speech_carry_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}={value} must be at least 0; give seconds")
        if self.max_drift is not None and not (math.isfinite(self.max_drift) and self.max_drift > 0):
            raise UserError(f"max_drift={self.max_drift} must be above 0; use 2, or leave it out")

    @property
    def unused(self) -> tuple[str, ...]:
        """What is told of settings that what is made at once has no use for."""
        limit = self.max_drift
        return () if limit is None else (f"max_drift={limit:g} has no effect: this is made at once, not in segments",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a long recording is made from."""

    sentences: Sequence[str] | None
    """None for what is not read."""
    tags: Sequence[str]
    past: Past | None
    frames: int | None
    """So many exactly without a text, at most so many with one; None: until the text is read."""
    seed: int
    controls: Controls


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What the next segment follows."""

    frames: AudioFrames
    text: str | None = None
    """What they say, where the model has to be told."""


def segment_sentences(
    text: str | None, duration: float | None, long_form: LongForm, frame_rate_hz: float, max_frames: int
) -> Sequence[str] | None:
    """Whether what is asked for is made in segments, and the sentences of which: none without a text.

    Returns:
        None for what is made at once.

    Raises:
        UserError: a duration that is no number of seconds, or beyond LONGEST_SECONDS.
    """
    if duration is not None and not (math.isfinite(duration) and 0 < duration <= LONGEST_SECONDS):
        raise UserError(f"duration={duration} s must be above 0 and at most {LONGEST_SECONDS:g} s, which is a day")
    longest = max_frames / frame_rate_hz
    if text is None:
        beyond = longest if long_form.max_drift is None else long_form.segment_seconds
        return () if duration is not None and duration > beyond else None
    takes = len(text.strip().encode()) * SECONDS_PER_BYTE
    # A sentence needs room for the carry-over.
    most = min(long_form.sentence_seconds, max(longest / 2, longest - long_form.speech_carry_seconds))
    found = sentences(text, max(1, int(most / SECONDS_PER_BYTE)))
    at_once = min(long_form.at_once_seconds, longest)
    long = takes > longest or (duration or 0.0) > longest or (len(found) > 1 and takes > at_once)
    return found if found and (long or (len(found) > 1 and long_form.max_drift is not None)) else None


def asked_in_segments(
    requests: RequestBuilder,
    text: str | None,
    tags: Sequence[str],
    past: Past | None,
    duration: float | None,
    seed: int,
    controls: Controls,
    long_form: LongForm,
) -> Asked | None:
    """What a `LongRun` makes; None for what is made at once.

    Raises:
        UserError: as `segment_sentences`.
    """
    rate = requests.tokenizer.frame_rate_hz
    found = segment_sentences(text, duration, long_form, rate, requests.model.config.max_frames)
    if found is None:
        return None
    return Asked(
        sentences=found or None,
        tags=tags,
        past=past,
        frames=None if duration is None else max(1, round(duration * rate)),
        seed=seed,
        controls=controls,
    )


class LongRun:
    """Draws a long recording.

    Args:
        requests: Of the model.
        hear: Gives the features of drawn frames for a request, for a model that reads such (`AudioModel.hear`).
        asked: See `Asked`.
        long_form: See `LongForm`.
        monitor: Hears what is made; needed to re-anchor.

    Raises:
        UserError: for a request that makes no sense.
    """

    def __init__(
        self,
        requests: RequestBuilder,
        hear: Callable[[Request], Hear | None],
        asked: Asked,
        long_form: LongForm,
        monitor: DriftMonitor | None = None,
    ) -> None:
        if long_form.max_drift is not None and monitor is None:
            raise ValueError("max_drift needs a monitor")
        if asked.sentences is not None and asked.past is not None and not asked.past.reference:
            raise UserError("a text of several sentences can't go on with audio; give the recording as the reference")
        if asked.sentences is not None and asked.controls.min_duration is not None:
            raise UserError(
                f"min_duration={asked.controls.min_duration} s is for a text that is said at once; leave it out"
            )
        self.requests, self.asked, self.long_form, self.monitor = requests, asked, long_form, monitor
        self.tokenizer: Tokenizer = requests.tokenizer
        rate, most = self.tokenizer.frame_rate_hz, requests.model.config.max_frames
        self.segment = max(1, min(round(long_form.segment_seconds * rate), most - 1))
        self.carry = min(round(long_form.carry_seconds * rate), most - self.segment)
        self.speech_carry = min(round(long_form.speech_carry_seconds * rate), most // 2)
        reads = asked.sentences is not None
        self._tags = requests.tags_for("" if reads else None, asked.tags, asked.past)
        self._follows_blindly = requests.model.reader is not None or not reads
        """Whether the model need not be told what the carried frames say."""
        self.first = self._request(None)
        """What the first segment is drawn for."""
        self._generators: list[torch.Generator] | None = None
        self._hear = hear(self.first)
        self._features: list[Tensor] = []
        self._tail: Carried | None = self._prompt()
        self._before = 0 if self._tail is None or asked.past is None else asked.past.frames.latents.shape[1]
        """Frames of a recording that is continued."""
        self._anchor: Carried | None = None
        self._anchored_at = 0
        self._segment_number = 0
        self.drawn = 0
        """Frames so far."""
        self.warnings: list[str] = []
        self.re_anchorings: list[dict[str, Any]] = []

    @property
    def share_done(self) -> float:
        """Of the whole, about: of the frames, or of the text where that ends first."""
        of_frames = 0.0 if self.asked.frames is None else self.drawn / self.asked.frames
        sizes = [len(one) for one in self.asked.sentences or ()]
        return max(of_frames, sum(sizes[: self._segment_number]) / sum(sizes) if sizes else 0.0)

    def frames(self) -> Iterator[Drawn | None]:
        """Draw all segments; once.

        Yields:
            Frames, and None after each segment: what waits to be decoded shall be heard before the next begins, so that
            what the monitor knows then does not depend on the size of the pieces.
        """
        while not self._is_over():
            carried = self._next_past()
            request = self.first if self._segment_number == 0 else self._request(carried)
            loop = self._enter(request)
            made: list[Drawn] = []
            self._features.clear()
            for index in range(request.limits.maximum):
                frame = loop.draw(may_stop=index >= max(1, request.limits.minimum))
                if frame is None:
                    break
                made.append(frame)
                self.drawn += 1
                yield frame
                if index + 1 < request.limits.maximum:
                    loop.advance(frame)
                elif self._hear is not None:
                    self._heard(frame)
            self._generators = loop.generators
            self._keep(made, carried)
            self._tell_unended(request, len(made))
            self._segment_number += 1
            yield None

    def _enter(self, request: Request) -> FrameLoop:
        """The loop of the next segment. It reads the carried frames anew; keys and values that go on from segment to
        segment, without their oldest, would enter here instead (`hybridlm.cache`)."""
        loop = FrameLoop(self.requests.model, request, None if self._hear is None else self._heard)
        loop.generators = self._generators or loop.generators
        return loop

    def _heard(self, frame: Drawn) -> Tensor:
        """Features of a frame, remembered: those that are carried over were heard once."""
        assert self._hear is not None
        self._features.append(self._hear(frame))
        return self._features[-1]

    def _is_over(self) -> bool:
        if self.asked.frames is not None and self.drawn >= self.asked.frames:
            return True
        return self.asked.sentences is not None and self._segment_number >= len(self.asked.sentences)

    def _request(self, carried: Carried | None) -> Request:
        """What the next segment is drawn for."""
        asked, rate = self.asked, self.tokenizer.frame_rate_hz
        left = None if asked.frames is None else asked.frames - (self.drawn if carried is not None else 0)
        text, seconds, room = None, None, 0
        if asked.sentences is None:
            assert left is not None
            seconds = min(self.segment, left) / rate
        else:
            text = asked.sentences[self._segment_number if carried is not None else 0]
            most = self.requests.model.config.max_frames
            room = most - frame_limits(text, None, asked.controls, rate, most).maximum
        request = self.requests.request(
            text, self._tags, self._past(carried, room), seconds, asked.seed, 1, asked.controls
        )
        if text is not None and left is not None:
            limits = Limits(
                minimum=min(request.limits.minimum, left), maximum=max(1, min(request.limits.maximum, left))
            )
            request = replace(request, limits=limits)
        return request

    def _past(self, carried: Carried | None, room: int) -> Past | None:
        """What the model believes to come before: a reference and what is carried over, or the one that fits."""
        given = self.asked.past
        if carried is None:
            return given
        parts, texts = [carried.frames], [carried.text] if carried.text else []
        if given is not None and given.reference:
            parts.insert(0, self._as_drawn(given.frames))
            texts.insert(0, given.text or "")
        frames, text = join_frames(parts), " ".join(filter(None, texts)) or None
        if text is not None and frames.latents.shape[1] > room:
            return given
        if frames.latents.shape[1] == 0:
            return None
        return Past(frames=frames, reference=True, text=text, cut_from=None)

    def _next_past(self) -> Carried | None:
        """What the next segment follows: the last frames, or the first seconds' where the sound has drifted."""
        limit, monitor = self.long_form.max_drift, self.monitor
        reading = None if limit is None or monitor is None else monitor.latest(self._anchored_at)
        if reading is not None and self._anchor is not None and limit is not None and reading.largest > limit:
            self._tail, self._anchored_at = self._anchor, self._before + self.drawn
            at_s = self._anchored_at / self.tokenizer.frame_rate_hz
            self.re_anchorings.append({"at_s": at_s, "measure": reading.worst, "drift": reading.drift[reading.worst]})
        return self._tail

    def _keep(self, made: Sequence[Drawn], before: Carried | None) -> None:
        """Remember the end of what was made, and in the first seconds all of it."""
        new = _frames_of(self.tokenizer, made, self._features)
        if self.asked.sentences is None:
            joined = new if before is None else join_frames([before.frames, new])
            if self._anchor is None or self._anchor.frames.latents.shape[1] < self.carry:
                self._anchor = Carried(frames=_part(joined, slice(0, self.carry)))
            self._tail = Carried(frames=_last(joined, self.carry))
            return
        if self._follows_blindly:
            self._anchor = self._anchor or Carried(frames=_last(new, max(self.carry, self.speech_carry)))
            self._tail = Carried(frames=_last(new, self.speech_carry))
            return
        self._tail = Carried(frames=new, text=self.asked.sentences[self._segment_number])
        self._anchor = self._anchor or self._tail

    def _prompt(self) -> Carried | None:
        """The end of a recording that is continued."""
        given = self.asked.past
        if given is None or given.reference:
            return None
        return Carried(frames=_last(self._as_drawn(given.frames), self.carry))

    def _as_drawn(self, frames: AudioFrames) -> AudioFrames:
        """With the codebooks and features that drawn frames have."""
        config = self.requests.model.config
        codes = frames.codes[:, : config.output_codebooks] if config.uses_codes else frames.codes
        return replace(frames, codes=codes, features=None if self._hear is None else frames.features)

    def _tell_unended(self, request: Request, count: int) -> None:
        if self.asked.sentences is None or count < request.limits.maximum:
            return
        if self.asked.frames is not None and self.drawn >= self.asked.frames:
            return
        text = self.asked.sentences[self._segment_number]
        begin = text if len(text) <= 40 else f"{text[:37]}..."
        limit_s = count / self.tokenizer.frame_rate_hz
        self.warnings.append(f"sentence {self._segment_number + 1} ({begin}) stopped at its limit of {limit_s:.1f} s")


@torch.no_grad()
def _frames_of(tokenizer: Tokenizer, made: Sequence[Drawn], features: Sequence[Tensor]) -> AudioFrames:
    """Drawn frames of one row as a recording's; a stream that was not drawn follows from the other."""
    all_codes = [frame.codes for frame in made if frame.codes is not None]
    all_latents = [frame.latents for frame in made if frame.latents is not None]
    codes = torch.cat(all_codes, dim=2) if all_codes else None
    latents = torch.cat(all_latents, dim=1) if all_latents else None
    if latents is None:
        assert codes is not None
        latents = tokenizer.dequantize(codes)
    if codes is None:
        codes = tokenizer.quantize(latents)
    return AudioFrames(
        codes=codes,
        latents=latents,
        features=torch.cat(list(features), dim=1) if features else None,
        lengths=torch.tensor([latents.shape[1]], device=latents.device),
    )


def _last(frames: AudioFrames, count: int) -> AudioFrames:
    return _part(frames, slice(max(0, frames.latents.shape[1] - count), None))


def _part(frames: AudioFrames, part: slice) -> AudioFrames:
    latents = frames.latents[:, part]
    return AudioFrames(
        codes=frames.codes[:, :, part],
        latents=latents,
        features=None if frames.features is None else frames.features[:, part],
        lengths=torch.tensor([latents.shape[1]], device=latents.device),
    )
