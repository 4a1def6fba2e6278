"""From what a user asks for to what the frame loop draws: checked, in the model's own terms, and in frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from sampling.controls import Controls
from sampling.generate import Request
from sampling.heard import can_be_heard
from sampling.limits import frame_limits
from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer
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


def told_of(past: Past | None) -> tuple[str, ...]:
    """What a listener should know of the recording that came before."""
    if past is None or past.cut_from is None:
        return ()
    used = "looked at" if past.reference else "continued"
    return (f"the recording is {past.cut_from:.0f} s long; its last {PROMPT_SECONDS:g} s are {used}",)


class RequestBuilder:
    """Says in frames what is asked for.

    Args:
        model: In evaluation mode.
        tokenizer: The one whose frames the model was trained on.
        text: The text pieces and tags of its prefix.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer) -> None:
        self.model, self.tokenizer, self.text = model, tokenizer, text

    def request(
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
        tags = self.tags_for(text, tags, past)
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

    def tags_for(self, text: str | None, tags: Sequence[str], past: Past | None) -> tuple[str, ...]:
        """The tags as given; for a text without any, those of the voice that reads."""
        voice = () if text is None else VOICE_TAGS[:1] if past is not None and past.reference else VOICE_TAGS
        return names_of(tags) or tuple(tag for tag in voice if tag in self.text.tags)

    def past(
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
            frames=self.encode(given),
            reference=reference is not None,
            text=reference_text,
            cut_from=seconds if seconds > PROMPT_SECONDS else None,
        )

    def _seconds(self, audio: str | Path | Tensor) -> float:
        return (
            audio.shape[-1] / self.tokenizer.sample_rate_hz
            if isinstance(audio, Tensor)
            else audio_info(Path(audio)).duration_s
        )

    def encode(self, audio: str | Path | Tensor) -> AudioFrames:
        """The whole frames of a recording; a last, partial one would be padded with silence and break the joint."""
        if isinstance(audio, Tensor):
            waveform = audio[..., -round(PROMPT_SECONDS * self.tokenizer.sample_rate_hz) :]
        else:
            past = self._seconds(audio) - PROMPT_SECONDS
            waveform = read_audio(Path(audio), self.tokenizer.sample_rate_hz, start=past if past > 0 else None)
        if waveform.numel() == 0:
            raise UserError("audio is empty; give a recording of at least one sample")
        hop = self.tokenizer.hop_length
        if waveform.shape[-1] > hop:
            waveform = waveform[..., : waveform.shape[-1] // hop * hop]
        device = next(self.model.parameters()).device
        return self.tokenizer.encode(waveform.reshape(1, 1, -1).float().to(device))


def check_latent_steps(controls: Controls, model: HybridLM) -> None:
    """Raises:
    UserError: steps of a flow head that the model lacks.
    """
    if controls.latent_steps is not None and model.flow_head is None:
        raise UserError(
            f"latent_steps={controls.latent_steps} needs a model with a flow head, which this lacks; leave it out"
        )


def names_of(tags: Sequence[str]) -> tuple[str, ...]:
    """The names, of one tag or of several."""
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
