"""A loaded model as its user sees it: text, tags or a recording in, audio out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.adapter import Base, adapter_names, load_adapter, use_adapter
from hybridlm.checkpoint import load_model, resolve
from hybridlm.compiling import compile_step, drop
from hybridlm.config import ModelConfig
from hybridlm.folder import fingerprint
from hybridlm.model import HybridLM
from hybridlm.precision import AUTO, Precision, check, choose, pack, plain_state, unpack
from sampling.assemble import GeneratedAudio, assemble, at_loudness
from sampling.controls import Controls, changed
from sampling.generate import Drawn, Hear, Request, generate_frames
from sampling.heard import HeardFeatures, can_be_heard
from sampling.limits import frame_limits
from sampling.plan import Origin, Plan
from sampling.scheduler import Scheduler
from sampling.stream import stream_audio
from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, Tokenizer
from tokenizer.text import TextTokenizer

PROMPT_SECONDS = 60.0
"""A longer recording is continued from its last minute: no model here looks further back."""
LARGEST_SEED = 2**63 - 1
"""What a torch.Generator takes."""
VOICE_TAGS = ("speech", "speaker:kathleen")
"""What text is spoken with when no tag is given; those of them that the model knows."""


class Past(NamedTuple):
    """A recording that comes before what is made."""

    frames: AudioFrames
    """At most the last minute."""
    reference: bool
    """Whether it is looked at only."""
    text: str | None
    """What is known to be said in a reference."""
    cut_from: float | None
    """Seconds of a recording that was longer."""


class AudioModel:
    """A language model, the tokenizer of its frames and the pieces of its text.

    Args:
        model: In evaluation mode.
        tokenizer: The one whose frames the model was trained on.
        text: The text pieces and tags of its prefix.
        base: Which weights the model has, so that adapters can be told to be of this model.
        name: What it was loaded by.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        text: TextTokenizer,
        base: Base | None = None,
        name: str = "unnamed",
    ) -> None:
        self.model, self.tokenizer, self.text, self.base, self.name = model, tokenizer, text, base, name
        self.sample_rate_hz = tokenizer.sample_rate_hz
        self.told: tuple[str, ...] = ()
        """What a user should know of how the model was loaded, a line each."""
        self._fingerprint: str | None = None
        """Of the weights, before they were rounded."""

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return adapter_names(self.model)

    def add_adapter(self, folder: str | Path, name: str) -> None:
        """Load an adapter beside those that are loaded, and use it.

        Args:
            folder: Made by `hybridlm finetune --lora`, or a hub id.
            name: For `use_adapter`.

        Raises:
            UserError: a name that is taken, or an adapter that is damaged or of another model.
        """
        if self.base is None:
            raise ValueError("this model was not read from a folder, so no adapter can be told to be of it")
        packed = self.model.packed is not None
        unpack(self.model)
        self._fingerprint = None
        load_adapter(self.model, resolve(folder), self.base, name=name)
        if packed:
            self.pack("fp32")

    def use_adapter(self, name: str | None) -> None:
        """Switch to an adapter; None: to none, which gives exactly the model's own output.

        Raises:
            UserError: no adapter of that name is loaded.
        """
        use_adapter(self.model, name)

    @property
    def tags(self) -> list[str]:
        """The tags that the model knows."""
        return self.text.tags

    @property
    def source(self) -> Source:
        """What the audio is decoded from: latents, unless the model makes codes only."""
        return "latents" if self.model.config.predicts_latents else "codes"

    def pack(self, precision: str, compile_rows: int = 0) -> None:
        """Lay the weights out for drawing (`hybridlm.precision`), after which they can't be trained.

        Args:
            precision: "fp32", "bf16", "int8", or "auto" for what a short measurement finds fastest here.
            compile_rows: Also compile a frame's step for so many rows (`hybridlm.compiling`), a guided recording being
                two; 0: do not.

        Raises:
            UserError: another precision, or one that the device can't do; a model whose weights are rounded already.
        """
        check(precision, next(self.model.parameters()).device)
        drop(self.model)
        unpack(self.model)
        self.told = ()
        if precision == AUTO:
            chosen = choose(self.model)
            precision, self.told = chosen.precision, (chosen.reason,)
        self._fingerprint = self._weights() if precision != "fp32" else None
        unfit = pack(self.model, cast(Precision, precision), blocks=not compile_rows)
        self.told += () if unfit is None else (f"precision {precision}: {unfit}",)
        if compile_rows:
            self.told += (compile_step(self.model, compile_rows),)

    def _weights(self) -> str:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_state(self.model).items()}
        return fingerprint(weights)

    @property
    def origin(self) -> Origin:
        """Names and fingerprints, the weights' taken anew unless they are rounded: they may have changed."""
        return Origin(
            name=self.name,
            model=self._fingerprint or self._weights(),
            tokenizer=self.tokenizer.fingerprint(),
            precision=self.model.packed or "fp32",
        )

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
    ) -> GeneratedAudio:
        """Make audio.

        Args:
            text: What to say. Without it, the model makes what the tags say, or goes on with `audio`, or anything.
            tags: Names of tags, such as "music"; see `tags`.
            audio: A recording to continue: a file, or samples at `sample_rate_hz`. The result begins with it, or with
                its last minute if it is longer.
            duration: Seconds of new audio; exactly so many without text, at most so many with text.
            num_samples: How many to make at once.
            seed: Row i is drawn with `seed + i`, and is the same alone, in a batch or streamed.
            temperature, top_k, top_p, cfg: Override those of `controls`.
            controls: See `Controls`; its defaults where None.
            reference: A recording, or its last minute, that the model looks at as if it came before, so that the new
                audio may take after it; the result has none of it. Its text is unknown to the model but for
                `reference_text`, and `text` begins after it.
            reference_text: What is said in the reference, if `text` goes on in the same voice.
            keep_plan: Give what the same audio can be made from again, and with other latents (`sampling.render`).

        Raises:
            UserError: for a value that makes no sense, an unknown tag, text that is empty or too long, a recording that
                can't be read, or a model that can't generate.
        """
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} must be at least 1")
        controls = changed(controls or Controls(), temperature=temperature, top_k=top_k, top_p=top_p, cfg=cfg)
        past = self._past(text, audio, reference, reference_text)
        request = self._request(text, tags, past, duration, seed, num_samples, controls)
        if keep_plan and not self.model.config.uses_codes:
            raise UserError("a continuous model draws no codes, so it has no plan to save; leave it out")
        steps = list(generate_frames(self.model, request, self.hear(request)))
        made = self._finished(request, steps, past, controls, speech_ends=text is not None and duration is None)
        return replace(made, plan=self._plan(request, steps, text, tags)) if keep_plan else made

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
            past = self._past(text, settings.pop("audio"), settings.pop("reference"), settings.pop("reference_text"))
            request = self._request(past=past, num_samples=1, controls=controls, **settings)
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
        if past is not None and past.cut_from is not None:
            used = "looked at" if past.reference else "continued"
            cut = f"the recording is {past.cut_from:.0f} s long; its last {PROMPT_SECONDS:g} s are {used}"
            made = replace(made, warnings=(*made.warnings, cut))
        return made

    def stream(
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
    ) -> Iterator[Float[Tensor, "1 1 S"]]:
        """Make one recording and hand it out while it is made; the pieces, joined, equal `generate` to 1e-5.

        Args: as `generate`, and
            chunk_frames: Frames in a piece; the first piece comes after one frame. A prompt is the first piece.

        Raises:
            UserError: as `generate`, at the call, before the first piece.
        """
        if chunk_frames < 1:
            raise UserError(f"chunk_frames={chunk_frames} must be at least 1")
        controls = changed(controls or Controls(), temperature=temperature, top_k=top_k, top_p=top_p, cfg=cfg)
        past = self._past(text, audio, reference, reference_text)
        if controls.loudness is not None:
            raise UserError(
                f"loudness={controls.loudness} LUFS needs the whole recording, which a stream has not; leave it out"
            )
        request = self._request(text, tags, past, duration, seed, 1, controls)
        prompt = None
        if request.prompt is not None and not request.reference:
            kept = request.prompt.codes[:, : self.model.config.output_codebooks]
            prompt = kept if self.source == "codes" else request.prompt.latents
        steps = generate_frames(self.model, request, self.hear(request))
        return stream_audio(self.tokenizer, self.source, prompt, steps, chunk_frames)

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

    def _plan(self, request: Request, drawn: Sequence[Drawn], text: str | None, tags: Sequence[str]) -> Plan:
        active = torch.stack([step.active for step in drawn], dim=1)  # (B, T)
        codes = torch.cat([step.codes for step in drawn if step.codes is not None], dim=2)
        return Plan(
            codes=(codes * active[:, None]).cpu(),
            lengths=active.sum(dim=1).cpu(),
            request=request,
            origin=self.origin,
            frame_rate_hz=self.tokenizer.frame_rate_hz,
            text=text,
            tags=_names(tags),
        )

    def _kept(self, prompt: AudioFrames | None) -> AudioFrames | None:
        """The prompt's frames with the codebooks that the model predicts."""
        if prompt is None or not self.model.config.uses_codes:
            return prompt
        return replace(prompt, codes=prompt.codes[:, : self.model.config.output_codebooks])

    def _request(
        self,
        text: str | None,
        tags: Sequence[str],
        past: Past | None,
        duration: float | None,
        seed: int,
        num_samples: int,
        controls: Controls,
    ) -> Request:
        """Check what was asked for, and say it in frames."""
        config = self.model.config
        unpredicted = _unpredicted(config, self.tokenizer)
        if unpredicted:
            raise UserError(
                f"this model reads {unpredicted}, which it does not predict: it can be evaluated, but not generate; "
                "use a model that predicts all it reads"
            )
        check_latent_steps(controls, self.model)
        if not 0 <= seed <= LARGEST_SEED - num_samples:
            raise UserError(f"seed={seed} must be at least 0 and below 2**63 - num_samples")
        limits = frame_limits(text, duration, controls, self.tokenizer.frame_rate_hz, config.max_frames)
        tags = _names(tags)
        if text is not None:
            voice = VOICE_TAGS[:1] if past is not None and past.reference else VOICE_TAGS
            tags = tags or tuple(tag for tag in voice if tag in self.text.tags)
        context = max(1, config.max_frames - limits.maximum)
        pieces, place = self.text.encode(text), None
        if past is not None and past.reference and text is not None:
            spoken = self.text.encode(past.text)[:-1]
            pieces, place = spoken + pieces, len(spoken)
            rate, frames = self.tokenizer.frame_rate_hz, past.frames.latents.shape[1]
            if spoken and frames > context:
                raise UserError(
                    f"reference of {frames / rate:.1f} s is too long: with reference_text, this model looks at most at "
                    f"{context / rate:.1f} s; cut both"
                )
        return Request(
            prefix=self.text.encode(None, list(tags))[:-1] + pieces,
            # With a text it is the text alone that guidance strengthens, not the voice.
            unconditional=self.text.encode("", list(tags) if text is not None else []),
            prompt=None if past is None else past.frames,
            # What lies further back than the model's longest sequence is kept in the result, but not looked at.
            context_frames=context,
            limits=limits,
            seeds=tuple(seed + row for row in range(num_samples)),
            controls=replace(controls, cfg=controls.guidance(with_text=text is not None and config.uses_codes)),
            reference=past is not None and past.reference,
            place=place,
        )

    def _past(
        self,
        text: str | None,
        audio: str | Path | Tensor | None,
        reference: str | Path | Tensor | None,
        reference_text: str | None,
    ) -> Past | None:
        """What the model shall believe to come before."""
        if audio is not None and reference is not None:
            raise UserError("audio is continued and a reference is not heard; give only one of them")
        if reference_text is not None and (reference is None or text is None):
            raise UserError("reference_text is what a reference says before text; give both, or leave it out")
        if reference_text is not None and not reference_text.strip():
            raise UserError("reference_text is empty; say what the reference says, or leave it out")
        if reference is not None and text is not None and reference_text is None and self.model.reader is None:
            raise UserError(
                "this model has no reader to tell it that text begins after the reference; give reference_text"
            )
        given = audio if reference is None else reference
        if given is None:
            return None
        seconds = self._seconds(given)
        return Past(
            frames=self._encode(given),
            reference=reference is not None,
            text=reference_text,
            cut_from=seconds if seconds > PROMPT_SECONDS else None,
        )

    def _seconds(self, audio: str | Path | Tensor) -> float:
        return (
            audio.shape[-1] / self.sample_rate_hz if isinstance(audio, Tensor) else audio_info(Path(audio)).duration_s
        )

    def _encode(self, audio: str | Path | Tensor) -> AudioFrames:
        """The whole frames of a recording; a last, partial one would be padded with silence and break the joint."""
        if isinstance(audio, Tensor):
            waveform = audio[..., -round(PROMPT_SECONDS * self.sample_rate_hz) :]
        else:
            past = self._seconds(audio) - PROMPT_SECONDS
            waveform = read_audio(Path(audio), self.sample_rate_hz, start=past if past > 0 else None)
        if waveform.numel() == 0:
            raise UserError("audio is empty; give a recording of at least one sample")
        hop = self.tokenizer.hop_length
        if waveform.shape[-1] > hop:
            waveform = waveform[..., : waveform.shape[-1] // hop * hop]
        device = next(self.model.parameters()).device
        return self.tokenizer.encode(waveform.reshape(1, 1, -1).float().to(device))


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


def check_latent_steps(controls: Controls, model: HybridLM) -> None:
    """Raises:
    UserError: steps of a flow head that the model lacks.
    """
    if controls.latent_steps is not None and model.flow_head is None:
        raise UserError(
            f"latent_steps={controls.latent_steps} needs a model with a flow head, which this lacks; leave it out"
        )


def _names(tags: Sequence[str]) -> tuple[str, ...]:
    return (tags,) if isinstance(tags, str) else tuple(tags)


def _unpredicted(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """The part of the history that generation cannot provide."""
    if config.continuous == "latents" and not config.predicts_latents:
        return "latents"
    if config.continuous == "features" and not can_be_heard(tokenizer):
        ahead = tokenizer.lookahead_frames
        return f"features that look {ahead} frames ahead" if tokenizer.feature_dim else "features"
    if config.input_codebooks > config.output_codebooks:
        return f"codebooks {config.output_codebooks + 1} to {config.input_codebooks}"
    return None
