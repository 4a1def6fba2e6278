"""A loaded model as its user sees it: text, tags or a recording in, audio out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.checkpoint import load_model
from sampling.assemble import GeneratedAudio, as_interrupted, assemble, at_loudness, stack
from sampling.controls import Controls, changed
from sampling.generate import Drawn, Hear, Request, generate_frames
from sampling.heard import HeardFeatures
from sampling.loaded import LoadedModel
from sampling.long_run import LongRun
from sampling.longform import Asked, LongForm, asked_in_segments
from sampling.monitor import DriftMonitor
from sampling.plan import Plan
from sampling.request import Past, RequestBuilder, names_of, told_of
from sampling.scheduler import Scheduler
from sampling.stream import AudioStream, stream_audio, until_interrupted, watched
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source

WHOLE_CHUNK_FRAMES = 50
"""Frames that are decoded together where nobody waits for the first."""


class AudioModel(LoadedModel):
    """Makes audio with a loaded model; see `LoadedModel` for its arguments."""

    @property
    def requests(self) -> RequestBuilder:
        """What says in frames what is asked for."""
        return RequestBuilder(self.model, self.tokenizer, self.text)

    @property
    def tags(self) -> list[str]:
        """The tags that the model knows."""
        return self.text.tags

    @property
    def source(self) -> Source:
        """What the audio is decoded from: latents, unless the model makes codes only."""
        return "latents" if self.model.config.predicts_latents else "codes"

    def generate(
        self,
        text: str | None = None,
        tags: Sequence[str] = (),
        audio: str | Path | Float[Tensor, "1 S"] | None = None,
        duration: float | None = None,
        num_samples: int = 1,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg: float | None = None,
        controls: Controls | None = None,
        reference: str | Path | Float[Tensor, "1 S"] | None = None,
        reference_text: str | None = None,
        keep_plan: bool = False,
        long_form: LongForm | None = None,
        keep_interrupted: bool = False,
    ) -> GeneratedAudio:
        """Make audio.

        Args:
            text: What to say, of any length. Without it, the model makes what the tags say, or goes on with `audio`, or
                anything.
            tags: Names of tags, such as "music"; see `tags`.
            audio: A recording to continue: a file, or samples at `sample_rate_hz`. The result begins with it, or with
                its last minute if it is longer.
            duration: Seconds of new audio; exactly so many without text, at most so many with text.
            num_samples: How many to make; at once, but for what is read sentence by sentence or re-anchored.
            seed: Row i is drawn with `seed + i`, and is the same alone, in a batch or streamed.
            temperature, top_k, top_p, cfg: Override those of `controls`.
            controls: See `Controls`; its defaults where None.
            reference: A recording, or its last minute, that the model looks at as if it came before, so that the new
                audio may take after it; the result has none of it. Its text is unknown to the model but for
                `reference_text`, and `text` begins after it.
            reference_text: What is said in the reference, if `text` goes on in the same voice.
            keep_plan: Give what the same audio can be made from again, and with other latents (`sampling.render`); not
                of what is read sentence by sentence or may be re-anchored.
            long_form: How what is too long to be made at once is made; see `LongForm`, its defaults where None.
            keep_interrupted: On Ctrl-C, return what was made so far, which then says so.

        Raises:
            UserError: for a value that makes no sense, an unknown tag, text that is empty, a recording that can't be
                read, or a model that can't generate.
        """
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} must be at least 1")
        controls = changed(controls or Controls(), temperature=temperature, top_k=top_k, top_p=top_p, cfg=cfg)
        past = self.requests.past(text, audio, reference, reference_text)
        if keep_plan and not self.model.config.uses_codes:
            raise UserError("a continuous model draws no codes, so it has no plan to save; leave it out")
        long_form = long_form or LongForm()
        asked = asked_in_segments(self.requests, text, tags, past, duration, seed, controls, long_form)
        if asked is not None and (asked.sentences is not None or long_form.limit(reads=False) is not None):
            if keep_plan:
                remedy = "ask for less text" if asked.sentences is not None else "give max_drift=inf"
                raise UserError(
                    f"what is read sentence by sentence or re-anchored has no plan to save; leave it out, or {remedy}"
                )
            return self._in_segments(asked, num_samples, long_form, keep_interrupted)
        if asked is not None:
            one = LongRun(self.requests, self.hear, asked, long_form).first
            request = replace(one, seeds=tuple(seed + row for row in range(num_samples)))
        else:
            request = self.requests.request(text, tags, past, duration, seed, num_samples, controls)
        frames = generate_frames(self.model, request, self.hear(request))
        steps, interrupted = until_interrupted(frames, keep=keep_interrupted)
        made = self._finished(request, steps, past, controls, speech_ends=text is not None and duration is None)
        made = replace(made, warnings=(*made.warnings, *long_form.unused(in_segments=asked is not None)))
        made = as_interrupted(made) if interrupted else made
        if not keep_plan:
            return made
        rate = self.tokenizer.frame_rate_hz
        return replace(made, plan=Plan.of(request, steps, self.origin, rate, text, names_of(tags)))

    def generate_many(self, asked: Sequence[Mapping[str, Any]], *, max_rows: int = 8) -> list[GeneratedAudio]:
        """Make different recordings side by side; each is what `generate` makes of it alone.

        Args:
            asked: For each, keyword arguments of `generate`, without `num_samples` and `keep_plan`.
            max_rows: Most that are made at once (`sampling.scheduler`).

        Raises:
            UserError: as `generate`, before anything is made.
        """
        entries = []
        for one in asked:
            settings: dict[str, Any] = {"text": None, "tags": (), "audio": None, "duration": None, "seed": 0}
            settings |= {"reference": None, "reference_text": None, "controls": None, **one}
            drawn_by = {name: settings.pop(name, None) for name in ("temperature", "top_k", "top_p", "cfg")}
            controls = changed(settings.pop("controls") or Controls(), **drawn_by)
            text, duration = settings["text"], settings["duration"]
            past = self.requests.past(
                text, settings.pop("audio"), settings.pop("reference"), settings.pop("reference_text")
            )
            request = self.requests.request(past=past, num_samples=1, controls=controls, **settings)
            entries.append((request, past, controls, text is not None and duration is None))
        scheduler = Scheduler(self.model, max_rows=max_rows)
        numbers = {scheduler.submit(entry[0], self.hear(entry[0])): number for number, entry in enumerate(entries)}
        steps: list[list[Drawn]] = [[] for _ in entries]
        for event in scheduler.run():
            steps[numbers[event.ticket]] += [event.frame] if event.frame is not None else []
        return [
            self._finished(request, drawn, past, controls, speech_ends=ends)
            for (request, past, controls, ends), drawn in zip(entries, steps, strict=True)
        ]

    def _finished(
        self,
        request: Request,
        steps: Sequence[Drawn],
        past: Past | None,
        controls: Controls,
        *,
        speech_ends: bool,
    ) -> GeneratedAudio:
        """The audio of drawn frames, and what a listener should know of it; of speech also if it did not end."""
        made = assemble(self.tokenizer, self.source, request, steps)
        limit, active = request.limits.maximum, torch.stack([step.active for step in steps], dim=1)  # (B, T)
        limit_s = limit / self.tokenizer.frame_rate_hz
        unended = [
            f"seed {request.seeds[row]}: stopped at the limit of {limit_s:.1f} s before its end"
            for row, count in enumerate(active.sum(dim=1).tolist())
            if speech_ends and count == limit
        ]
        made = at_loudness(replace(made, warnings=(*unended, *made.warnings)), controls.loudness)
        made = replace(made, warnings=(*made.warnings, *told_of(past)))
        return made

    def generate_stream(
        self,
        text: str | None = None,
        tags: Sequence[str] = (),
        audio: str | Path | Float[Tensor, "1 S"] | None = None,
        duration: float | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg: float | None = None,
        controls: Controls | None = None,
        chunk_frames: int = 5,
        reference: str | Path | Float[Tensor, "1 S"] | None = None,
        reference_text: str | None = None,
        long_form: LongForm | None = None,
        measure_drift: bool = False,
    ) -> AudioStream:
        """Make one recording and hand it out while it is made; the pieces, joined, equal `generate` to 1e-5.

        Memory stays that of a window or a sentence, however long the recording.

        Args: as `generate`, and
            chunk_frames: Frames in a piece; the first piece comes after one frame. A prompt is the first piece.
            measure_drift: Compare what is made with its first seconds (`sampling.monitor`); see `AudioStream.report`.

        Raises:
            UserError: as `generate`, at the call, before the first piece.
        """
        if chunk_frames < 1:
            raise UserError(f"chunk_frames={chunk_frames} must be at least 1")
        controls = changed(controls or Controls(), temperature=temperature, top_k=top_k, top_p=top_p, cfg=cfg)
        past = self.requests.past(text, audio, reference, reference_text)
        if controls.loudness is not None:
            raise UserError(
                f"loudness={controls.loudness} LUFS needs the whole recording, which a stream has not; leave it out"
            )
        long_form = long_form or LongForm()
        asked = asked_in_segments(self.requests, text, tags, past, duration, seed, controls, long_form)
        held = asked is not None and long_form.limit(reads=asked.sentences is not None) is not None
        monitor = DriftMonitor(self.tokenizer, long_form.watch) if measure_drift or held else None
        if asked is not None:
            run = LongRun(self.requests, self.hear, asked, long_form, monitor)
            return self._streamed(
                run.frames(), past, asked.frames if text is None else None, chunk_frames, monitor, run
            )
        request = self.requests.request(text, tags, past, duration, seed, 1, controls)
        frames = generate_frames(self.model, request, self.hear(request))
        whole = request.limits.maximum if text is None else None
        return self._streamed(frames, past, whole, chunk_frames, monitor, None, long_form.unused())

    stream = generate_stream
    """The same, for short."""

    def _in_segments(
        self, asked: Asked, num_samples: int, long_form: LongForm, keep_interrupted: bool
    ) -> GeneratedAudio:
        """Rows one after the other."""
        rows: list[GeneratedAudio] = []
        for row in range(num_samples):
            held = long_form.limit(reads=asked.sentences is not None) is not None
            monitor = DriftMonitor(self.tokenizer, long_form.watch) if held else None
            run = LongRun(self.requests, self.hear, replace(asked, seed=asked.seed + row), long_form, monitor)
            drawn: list[Drawn] = []
            frames = watched(run.frames(), drawn.append)
            pieces, interrupted = until_interrupted(
                self._streamed(frames, asked.past, None, WHOLE_CHUNK_FRAMES, monitor, run),
                keep=keep_interrupted and bool(rows or drawn),
            )
            if interrupted and not drawn:
                return as_interrupted(stack(rows))
            waveform = None if interrupted else torch.cat(pieces, dim=-1)  # of what was decoded, some frames lack
            made = assemble(self.tokenizer, self.source, run.first, drawn, waveform, held=held)
            made = at_loudness(
                replace(made, warnings=(*run.warnings, *run.went_back, *made.warnings)), asked.controls.loudness
            )
            rows.append(made)
            if interrupted:
                return as_interrupted(stack(rows))
        whole = stack(rows)
        return replace(whole, warnings=(*whole.warnings, *told_of(asked.past)))

    def _streamed(
        self,
        frames: Iterable[Drawn | None],
        past: Past | None,
        num_frames: int | None,
        chunk_frames: int,
        monitor: DriftMonitor | None,
        run: LongRun | None = None,
        warnings: tuple[str, ...] = (),
    ) -> AudioStream:
        """The audio of these frames, after that of a recording that is continued."""
        prompt, config = None, self.model.config
        if monitor is not None:
            frames = watched(frames, monitor.see)
        if past is not None and not past.reference:
            kept = self._kept(past.frames)
            assert kept is not None
            prompt = kept.codes if self.source == "codes" else kept.latents
            num_frames = None if num_frames is None else num_frames + kept.latents.shape[1]
            if monitor is not None:
                monitor.see_prompt(kept, codes=config.uses_codes, latents=config.predicts_latents)
        pieces = stream_audio(self.tokenizer, self.source, prompt, frames, chunk_frames)
        return AudioStream(pieces, num_frames, monitor, run, (*warnings, *told_of(past)))

    def hear(self, request: Request) -> Hear | None:
        """For a model that reads features: what computes them of the frames as they are drawn."""
        if self.model.config.continuous != "features":
            return None
        heard = HeardFeatures(self.tokenizer, self.source, len(request.seeds), self._kept(request.prompt))

        def hear(frame: Drawn) -> Tensor:
            drawn = frame.codes if self.source == "codes" else frame.latents
            assert drawn is not None
            return heard.push(drawn)

        return hear

    def _kept(self, prompt: AudioFrames | None) -> AudioFrames | None:
        """The prompt's frames with the codebooks that the model predicts."""
        if prompt is None or not self.model.config.uses_codes:
            return prompt
        return replace(prompt, codes=prompt.codes[:, : self.model.config.output_codebooks])


def load(
    name_or_dir: str | Path = "box",
    device: str = "cpu",
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    precision: str = "fp32",
    compile_rows: int = 0,
) -> AudioModel:
    """Load a model that generates.

    Args:
        name_or_dir: "box", the model inside the package; a model's folder; an adapter's, which is read onto the base
            that it names; or a Hugging Face hub id.
        device: "cpu", "cuda", ...
        adapter: An adapter's folder or hub id; or several, by name, of which the first is in use
            (`AudioModel.use_adapter`).
        precision: Of the backbone's and the depth decoder's weights, "fp32", "bf16", "int8" or "auto"
            (`AudioModel.pack`). The packed weights are for drawing; `hybridlm.checkpoint.load_model` gives those that
            can be trained.
        compile_rows: Rows of the step to compile it for (`AudioModel.pack`); 0: it is not compiled.

    Raises:
        UserError: when there is no such model or device, a folder is damaged, an adapter is of another model, or the
            device can't do the precision.
    """
    several = dict(adapter) if isinstance(adapter, Mapping) else {}
    found = load_model(name_or_dir, device=device, adapter=None if isinstance(adapter, Mapping) else adapter)
    model = AudioModel(found.model, found.tokenizer, found.text, found.base, str(name_or_dir))
    for name, folder in several.items():
        model.add_adapter(folder, name)
    if several:
        model.use_adapter(next(iter(several)))
    model.pack(precision, compile_rows)
    return model
