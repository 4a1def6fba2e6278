"""A loaded model as its user sees it: text, tags or a recording in, audio out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hybridlm.adapter import Base, adapter_names, load_adapter, use_adapter
from hybridlm.checkpoint import load_model, resolve
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from sampling.controls import Controls, changed
from sampling.generate import Drawn, Hear, Request, generate_frames
from sampling.heard import HeardFeatures, can_be_heard
from sampling.limits import frame_limits
from sampling.loudness import TRUE_PEAK_LIMIT_DB, gain_to
from sampling.stream import stream_audio
from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, Tokenizer
from tokenizer.text import TextTokenizer

PROMPT_SECONDS = 60.0
"""A longer recording is continued from its last minute: no model here looks further back."""
SILENT_PEAK = 1e-3
"""Below -60 dB of full scale, what is new in a recording is called silent."""
LARGEST_SEED = 2**63 - 1
"""What a torch.Generator takes."""
VOICE_TAGS = ("speech", "speaker:kathleen")
"""What text is spoken with when no tag is given; those of them that the model knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAudio:
    """What was made; row i equals the single generation with seed + i."""

    waveform: Float[Tensor, "B 1 S"]
    """float32 in [-1, 1]; after a row's length it is silent. A continuation begins with its prompt."""
    sample_rate_hz: int
    lengths: Int[Tensor, " B"]
    """Samples per row."""
    frames: AudioFrames
    """The same audio as codes and latents, the prompt's frames included."""
    seed: int
    seconds_made: float
    """Of new audio in all rows together, without the prompt."""
    warnings: tuple[str, ...] = ()
    """What a listener should know, such as a sentence that did not end by itself."""

    def row(self, index: int) -> Float[Tensor, "1 S"]:
        """One recording, cut to its length."""
        return self.waveform[index, :, : int(self.lengths[index])]


class AudioModel:
    """A language model, the tokenizer of its frames and the pieces of its text.

    Args:
        model: In evaluation mode.
        tokenizer: The one whose frames the model was trained on.
        text: The text pieces and tags of its prefix.
        base: Which weights the model has, so that adapters can be told to be of this model.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer, base: Base | None = None) -> None:
        self.model, self.tokenizer, self.text, self.base = model, tokenizer, text, base
        self.sample_rate_hz = tokenizer.sample_rate_hz

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
        load_adapter(self.model, resolve(folder), self.base, name=name)

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

        Raises:
            UserError: for a value that makes no sense, an unknown tag, text that is empty or too long, a recording that
                can't be read, or a model that can't generate.
        """
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} must be at least 1")
        controls = changed(controls or Controls(), temperature=temperature, top_k=top_k, top_p=top_p, cfg=cfg)
        request = self._request(text, tags, audio, duration, seed, num_samples, controls)
        steps = list(generate_frames(self.model, request, self._hear(request)))
        active = torch.stack([step.active for step in steps], dim=1)  # (B, T)
        made = active.sum(dim=1).cpu()
        frames = self._join(request, steps, made)
        waveform, lengths = self._decode(frames)
        limit = request.limits.maximum
        warnings = [
            f"seed {seed + row}: stopped at the limit of {limit / self.tokenizer.frame_rate_hz:.1f} s before its end"
            for row in range(num_samples)
            if text is not None and made[row] == limit and duration is None
        ]
        warnings += [
            f"seed {seed + row}: silent; use another seed"
            for row, peak in enumerate(self._peaks(waveform, lengths, made))
            if peak < SILENT_PEAK
        ]
        if controls.loudness is not None:
            warnings += self._level(waveform, lengths, controls.loudness, seed)
        if audio is not None and self._seconds(audio) > PROMPT_SECONDS:
            warnings.append(
                f"the recording is {self._seconds(audio):.0f} s long; its last {PROMPT_SECONDS:g} s are continued"
            )
        return GeneratedAudio(
            waveform=waveform,
            sample_rate_hz=self.sample_rate_hz,
            lengths=lengths,
            frames=frames,
            seed=seed,
            seconds_made=int(made.sum()) / self.tokenizer.frame_rate_hz,
            warnings=tuple(warnings),
        )

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
        if controls.loudness is not None:
            raise UserError(
                f"loudness={controls.loudness} LUFS needs the whole recording, which a stream has not; leave it out"
            )
        request = self._request(text, tags, audio, duration, seed, 1, controls)
        prompt = None
        if request.prompt is not None:
            kept = request.prompt.codes[:, : self.model.config.output_codebooks]
            prompt = kept if self.source == "codes" else request.prompt.latents
        steps = generate_frames(self.model, request, self._hear(request))
        return stream_audio(self.tokenizer, self.source, prompt, steps, chunk_frames)

    def _hear(self, request: Request) -> Hear | None:
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

    def _request(
        self,
        text: str | None,
        tags: Sequence[str],
        audio: str | Path | Tensor | None,
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
        if controls.latent_steps is not None and self.model.flow_head is None:
            raise UserError(
                f"latent_steps={controls.latent_steps} needs a model with a flow head, which this lacks; leave it out"
            )
        if not 0 <= seed <= LARGEST_SEED - num_samples:
            raise UserError(f"seed={seed} must be at least 0 and below 2**63 - num_samples")
        limits = frame_limits(text, duration, controls, self.tokenizer.frame_rate_hz, config.max_frames)
        if isinstance(tags, str):
            tags = (tags,)
        if text is not None:
            tags = tuple(tags) or tuple(tag for tag in VOICE_TAGS if tag in self.text.tags)
        return Request(
            prefix=self.text.encode(text or "", list(tags)),
            # With a text it is the text alone that guidance strengthens, not the voice.
            unconditional=self.text.encode("", list(tags) if text is not None else []),
            prompt=None if audio is None else self._encode(audio),
            # What lies further back than the model's longest sequence is kept in the result, but not looked at.
            context_frames=max(1, config.max_frames - limits.maximum),
            limits=limits,
            seeds=tuple(seed + row for row in range(num_samples)),
            controls=replace(controls, cfg=controls.guidance(with_text=text is not None and config.uses_codes)),
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

    def _join(self, request: Request, drawn: Sequence[Drawn], made: Int[Tensor, " B"]) -> AudioFrames:
        """The prompt's frames and the drawn ones; a stream that is not drawn in full follows from the other."""
        prompt, rows = request.prompt, len(request.seeds)
        before = 0 if prompt is None else prompt.latents.shape[1]
        codes = (
            torch.cat([frame.codes for frame in drawn if frame.codes is not None], dim=2)
            if drawn[0].codes is not None
            else None
        )
        if drawn[0].latents is not None:
            latents = torch.cat([frame.latents for frame in drawn if frame.latents is not None], dim=1)
            if codes is None or codes.shape[1] < self.tokenizer.num_codebooks:
                codes = self.tokenizer.quantize(latents)
        else:
            assert codes is not None
            latents = self.tokenizer.dequantize(codes)
        if prompt is not None:
            kept = prompt.codes[:, : codes.shape[1]]
            past = prompt.latents if self.source == "latents" else self.tokenizer.dequantize(kept)
            codes = torch.cat([kept.expand(rows, -1, -1), codes], dim=2)
            latents = torch.cat([past.expand(rows, -1, -1), latents], dim=1)
        return AudioFrames(codes=codes, latents=latents, lengths=made + before)

    def _peaks(self, waveform: Tensor, lengths: Tensor, made: Tensor) -> list[float]:
        """Loudest sample of what is new in each row."""
        new = (made * self.tokenizer.hop_length).tolist()
        return [
            float(row[0, max(0, length - count) : length].abs().max())
            for row, length, count in zip(waveform, lengths.tolist(), new, strict=True)
        ]

    def _level(self, waveform: Float[Tensor, "B 1 S"], lengths: Tensor, lufs: float, seed: int) -> list[str]:
        """Bring every row of one's own waveform to a loudness; returns warnings."""
        warnings = []
        for row, length in enumerate(lengths.tolist()):
            gain = gain_to(lufs, waveform[row, :, :length], self.sample_rate_hz)
            if gain is None:
                warnings.append(f"seed {seed + row}: too short or too quiet to have a loudness; left as it is")
                continue
            waveform[row] *= gain.factor
            if gain.lufs < lufs - 0.05:
                warnings.append(
                    f"seed {seed + row}: {gain.lufs:.1f} LUFS instead of {lufs:g}, for its true peak is at "
                    f"{TRUE_PEAK_LIMIT_DB:g} dB"
                )
        return warnings

    @torch.no_grad()  # and no inference mode: its tensors would be of no use to a caller who trains on the audio
    def _decode(self, frames: AudioFrames) -> tuple[Float[Tensor, "B 1 S"], Int[Tensor, " B"]]:
        """Audio of every row on its own: what follows a row's end in the batch can't reach its last samples."""
        lengths = frames.lengths * self.tokenizer.hop_length
        waveform = torch.zeros(len(lengths), 1, int(lengths.max()))
        for row, count in enumerate(frames.lengths.tolist()):
            if self.source == "latents":
                samples = self.tokenizer.decode_latents(frames.latents[row : row + 1, :count])
            else:
                samples = self.tokenizer.decode_codes(frames.codes[row : row + 1, :, :count])
            waveform[row, :, : samples.shape[-1]] = samples[0].float().cpu()
        return waveform, lengths


def load(
    name_or_dir: str | Path = "box",
    device: str = "cpu",
    adapter: str | Path | Mapping[str, str | Path] | None = None,
) -> AudioModel:
    """Load a model that generates.

    Args:
        name_or_dir: "box", the model inside the package; a model's folder; an adapter's, which is read onto the base
            that it names; or a Hugging Face hub id.
        device: "cpu", "cuda", ...
        adapter: An adapter's folder or hub id; or several, by name, of which the first is in use
            (`AudioModel.use_adapter`).

    Raises:
        UserError: when there is no such model or device, a folder is damaged, or an adapter is of another model.
    """
    several = dict(adapter) if isinstance(adapter, Mapping) else {}
    found = load_model(name_or_dir, device=device, adapter=None if isinstance(adapter, Mapping) else adapter)
    model = AudioModel(found.model, found.tokenizer, found.text, found.base)
    for name, folder in several.items():
        model.add_adapter(folder, name)
    if several:
        model.use_adapter(next(iter(several)))
    return model


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
