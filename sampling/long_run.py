"""Drawing what a model cannot make at once (`sampling.longform`).

Music, sound and continuations run on in one frame loop, which holds the latest seconds and forgets what came before
(`sampling.generate`): no part is read again, so that there is no joint. A recording that is taken after is never
forgotten.

A text is read sentence by sentence, each by a loop of its own after the last frames of the one before, as if it had
drawn them, in the same voice. A model with a reader is told that the text begins after these frames; one without is
shown the whole sentence before, with its text, or nothing of it where both do not fit. Between two sentences, silence
is put where the voice leaves too little (`sampling.pauses`).

Random numbers go on through it all, and one streaming decoder, so that there is nothing to hear of it but what the
frames themselves say.

Re-anchoring: when the window that `sampling.monitor` heard last has left its band, a new loop follows the first
seconds' frames instead of the last ones. What was handed out stays: drawing it again with another seed would hold every
segment back until it is judged, and take unbounded time with a model that always drifts; this costs nothing, and cannot
fail to end the feedback of the drifted frames. A melody, though, breaks off there.

Shapes: K codebooks, T frames, D latent, F feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sampling.generate import Drawn, FrameLoop, Hear, Limits, Request
from sampling.limits import frame_limits
from sampling.longform import Asked, LongForm
from sampling.monitor import DriftMonitor
from sampling.pauses import CONTEXT_SECONDS, Pauses
from sampling.request import Past, RequestBuilder
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer, join_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What a new loop follows."""

    frames: AudioFrames
    text: str | None = None
    """What they say, where the model has to be told."""


class LongRun:
    """Draws a long recording.

    Args:
        requests: Of the model.
        hear: Gives the features of drawn frames for a request, for a model that reads such (`AudioModel.hear`).
        asked: See `Asked`.
        long_form: See `LongForm`.
        monitor: Hears what is made; without one, nothing is re-anchored.

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
        self._limit = None if monitor is None else long_form.limit(reads=asked.sentences is not None)
        """Widths of the bands beyond which it goes back."""
        if asked.sentences is not None and asked.past is not None and not asked.past.reference:
            raise UserError("a text of several sentences can't go on with audio; give the recording as the reference")
        if asked.sentences is not None and asked.controls.min_duration is not None:
            raise UserError(
                f"min_duration={asked.controls.min_duration} s is for a text that is said at once; leave it out"
            )
        self.requests, self.asked, self.long_form, self.monitor = requests, asked, long_form, monitor
        self.tokenizer: Tokenizer = requests.tokenizer
        rate, most = self.tokenizer.frame_rate_hz, requests.model.config.max_frames
        self._most = most
        """Frames of the model's longest sequence."""
        self.window = max(1, min(round(long_form.window_seconds * rate), most))
        self.segment = max(1, min(round(long_form.segment_seconds * rate), most - 1))
        self.carry = min(round(long_form.carry_seconds * rate), self.window)
        self.speech_carry = min(round(long_form.speech_carry_seconds * rate), most // 2)
        reads = asked.sentences is not None
        self._tags = requests.tags_for("" if reads else None, asked.tags, asked.past)
        self._follows_blindly = requests.model.reader is not None or not reads
        """Whether the model need not be told what the carried frames say."""
        self.first = self._request(None)
        """What the first loop draws for."""
        self._loop: FrameLoop | None = None
        self._hear = hear(self.first)
        self._features: list[Tensor] = []
        self._tail: Carried | None = None
        """The end of the sentence before."""
        self._ending: Sequence[Drawn] = ()
        """The same, as it was drawn."""
        self._pauses = self._pauses_between() if reads and long_form.pause_seconds else None
        self._anchor = self._end_of_prompt()
        """What is followed again."""
        self._before = 0 if self._anchor is None or asked.past is None else asked.past.frames.latents.shape[1]
        """Frames of a recording that is continued."""
        self._anchored_at = 0
        self._segment_number = 0
        self.drawn = 0
        """Frames so far."""
        self.warnings: list[str] = [] if reads else list(long_form.unused(in_segments=True))
        self.re_anchorings: list[dict[str, Any]] = []

    @property
    def share_done(self) -> float:
        """Of the whole, about: of the frames, or of the text where that ends first."""
        of_frames = 0.0 if self.asked.frames is None else self.drawn / self.asked.frames
        sizes = [len(one) for one in self.asked.sentences or ()]
        return max(of_frames, sum(sizes[: self._segment_number]) / sum(sizes) if sizes else 0.0)

    @property
    def went_back(self) -> tuple[str, ...]:
        """What a listener should know of the times that it was re-anchored."""
        if not self.re_anchorings:
            return ()
        more = "" if len(self.re_anchorings) == 1 else f" and {len(self.re_anchorings) - 1} more times"
        at_s = self.re_anchorings[0]["at_s"]
        return (
            f"seed {self.asked.seed}: went back to its first seconds at {at_s:.0f} s{more}, for it had left them by "
            f"more than max_drift={self._limit:g} band widths",
        )

    def frames(self) -> Iterator[Drawn | None]:
        """Draw all segments; once.

        Yields:
            Frames, and None after each segment: what waits to be decoded shall be heard before the next begins, so that
            what the monitor knows then does not depend on the size of the pieces.
        """
        while not self._is_over():
            segment = self._stretch() if self.asked.sentences is None else self._sentence()
            for frame in segment:
                self.drawn += 1
                yield frame
                if self.asked.sentences is not None and self.drawn == self.asked.frames:
                    break
            self._segment_number += 1
            yield None

    def _stretch(self) -> Iterator[Drawn]:
        """The next frames of what is not read; the loop goes on unless it has drifted."""
        whole, has_drifted = self.asked.frames, self._has_drifted()
        assert whole is not None
        if self._loop is None or has_drifted:
            self._loop = self._enter(self._request(self._anchor) if has_drifted else self.first)
        made: list[Drawn] = []
        self._features.clear()
        for _ in range(min(self.segment, whole - self.drawn)):
            frame = self._loop.draw(may_stop=False)
            assert frame is not None, "who may not stop goes on"
            made.append(frame)
            yield frame
            if self.drawn < whole:
                self._loop.advance(frame)
        opening = None if self._anchor is None else self._anchor.frames
        may_go_back = self._limit is not None and self.drawn < whole
        if may_go_back and (opening is None or opening.latents.shape[1] < self.carry):
            new = _frames_of(self.tokenizer, made, self._features)
            joined = new if opening is None else join_frames([opening, new])
            self._anchor = Carried(frames=_part(joined, slice(0, self.carry)))

    def _sentence(self) -> Iterator[Drawn]:
        """The next sentence, after a pause."""
        if self._has_drifted():
            self._tail = self._anchor
        request = self.first if self._segment_number == 0 else self._request(self._tail)
        self._loop = self._enter(request)
        made: list[Drawn] = []
        self._features.clear()
        frames = self._read(self._loop, request.limits, made)
        if self._pauses is not None and self._ending:
            frames = self._pauses.lengthened(self._ending, frames)
        yield from frames
        self._keep(made)
        self._tell_unended(request, len(made))

    def _read(self, loop: FrameLoop, limits: Limits, made: list[Drawn]) -> Iterator[Drawn]:
        """Frames until the sentence ends; they are put into `made`, too."""
        for index in range(limits.maximum):
            frame = loop.draw(may_stop=index >= max(1, limits.minimum))
            if frame is None:
                return
            made.append(frame)
            yield frame
            if index + 1 < limits.maximum:
                loop.advance(frame)
            elif self._hear is not None:
                self._heard(frame)

    def _enter(self, request: Request) -> FrameLoop:
        """A loop that goes on with the random numbers of the one before."""
        loop = FrameLoop(self.requests.model, request, None if self._hear is None else self._heard)
        loop.generators = loop.generators if self._loop is None else self._loop.generators
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
        """What the next loop draws for."""
        asked, rate = self.asked, self.tokenizer.frame_rate_hz
        left = None if asked.frames is None else asked.frames - (self.drawn if carried is not None else 0)
        if asked.sentences is None:
            assert left is not None
            seconds = min(self.segment, left) / rate
            past = self._past(carried, 0)
            return self._on_and_on(
                self.requests.request(None, self._tags, past, seconds, asked.seed, 1, asked.controls), carried, left
            )
        text, most = asked.sentences[self._segment_number if carried is not None else 0], self._most
        room = most - frame_limits(text, None, asked.controls, rate, most).maximum
        past = self._past(carried, room)
        request = self.requests.request(text, self._tags, past, None, asked.seed, 1, asked.controls)
        if left is not None:
            limits = Limits(
                minimum=min(request.limits.minimum, left), maximum=max(1, min(request.limits.maximum, left))
            )
            request = replace(request, limits=limits)
        return request

    def _on_and_on(self, request: Request, carried: Carried | None, left: int) -> Request:
        """The same for all that is left: what falls out of the window is forgotten, but for a reference."""
        given, followed = self.asked.past, 0 if carried is None else carried.frames.latents.shape[1]
        room = self._most - min(self.window, self._most // 2)
        kept = min(given.frames.latents.shape[1], room) if given is not None and given.reference else 0
        window = min(kept + self.window, self._most)
        return replace(
            request,
            limits=Limits(minimum=left, maximum=left),
            context_frames=min(kept + followed, window) if kept else window,
            sink_frames=kept,
            window_frames=window,
        )

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

    def _has_drifted(self) -> bool:
        """Whether the next loop is to follow the first seconds again."""
        limit, monitor = self._limit, self.monitor
        reading = None if limit is None or monitor is None else monitor.latest(self._anchored_at)
        if reading is None or self._anchor is None or limit is None or reading.largest <= limit:
            return False
        self._anchored_at = self._before + self.drawn
        at_s = self._anchored_at / self.tokenizer.frame_rate_hz
        self.re_anchorings.append({"at_s": at_s, "measure": reading.worst, "drift": reading.drift[reading.worst]})
        return True

    def _keep(self, made: Sequence[Drawn]) -> None:
        """Remember the end of a sentence, and that of the first one for good."""
        new = _frames_of(self.tokenizer, made, self._features)
        self._ending = made[-max(1, round(CONTEXT_SECONDS * self.tokenizer.frame_rate_hz)) :]
        if self._follows_blindly:
            self._anchor = self._anchor or Carried(frames=_last(new, max(self.carry, self.speech_carry)))
            self._tail = Carried(frames=_last(new, self.speech_carry))
            return
        assert self.asked.sentences is not None
        self._tail = Carried(frames=new, text=self.asked.sentences[self._segment_number])
        self._anchor = self._anchor or self._tail

    def _pauses_between(self) -> Pauses:
        config = self.requests.model.config
        return Pauses(
            self.tokenizer,
            "latents" if config.predicts_latents else "codes",
            self.long_form.pause_seconds,
            config.output_codebooks if config.uses_codes else None,
            with_latents=config.predicts_latents,
        )

    def _end_of_prompt(self) -> Carried | None:
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
