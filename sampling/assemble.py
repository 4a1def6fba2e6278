"""From drawn frames to audio: joining them to their prompt, decoding, and what a listener should know of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.generate import Drawn, Request
from sampling.longform import MUSIC_MAX_DRIFT
from sampling.loudness import TRUE_PEAK_LIMIT_DB, gain_to
from sampling.plan import Plan
from tokenizer.frames import AudioFrames, Source, Tokenizer

PIECE_FRAMES = 250
"""Decoded together; so memory does not grow with a recording by more than its samples."""
SILENT_PEAK = 1e-3
"""Below -60 dB of full scale, what is new in a recording is called silent."""
SILENT_END_SECONDS = 3.0
"""A longer silence at the end is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAudio:
    """What was made; row i equals the single generation with seed + i."""

    waveform: Float[Tensor, "B 1 S"]
    """float32 in [-1, 1]; after a row's length it is silent. A continuation begins with its prompt."""
    sample_rate_hz: int
    lengths: Int[Tensor, " B"]
    """Samples per row."""
    frames: AudioFrames
    """The same audio as codes and latents, the frames of a continued prompt included."""
    seed: int
    seconds_made: float
    """Of new audio in all rows together, without the prompt."""
    warnings: tuple[str, ...] = ()
    """What a listener should know, such as a sentence that did not end by itself."""
    plan: Plan | None = None
    """What `sampling.render` makes the audio from again, where it was asked for."""
    interrupted: bool = False
    """Whether Ctrl-C ended it early."""

    def row(self, index: int) -> Float[Tensor, "1 S"]:
        """One recording, cut to its length."""
        return self.waveform[index, :, : int(self.lengths[index])]


def assemble(
    tokenizer: Tokenizer,
    source: Source,
    request: Request,
    drawn: Sequence[Drawn],
    waveform: Float[Tensor, "1 1 S"] | None = None,
    *,
    held: bool = False,
) -> GeneratedAudio:
    """The audio of frames that were drawn one after the other.

    Args:
        tokenizer: Decodes.
        source: What the audio is decoded from.
        request: What was drawn for.
        drawn: At least one frame.
        waveform: Of a single row, where it is decoded already.
        held: It was made under a drift limit, which is no remedy for its silence then.
    """
    made = torch.stack([step.active for step in drawn], dim=1).sum(dim=1).cpu()
    frames = _join(tokenizer, source, request, drawn, made)
    lengths = frames.lengths * tokenizer.hop_length
    if waveform is None:
        waveform = _decode(tokenizer, source, frames)
    seed, told = request.seeds[0], []
    for number, (row, length, count) in enumerate(zip(waveform, lengths.tolist(), made.tolist(), strict=True)):
        start = max(0, length - count * tokenizer.hop_length)
        loud = (row[0, start:length].abs() >= SILENT_PEAK).nonzero()
        end_s = (start + int(loud[-1]) + 1 if len(loud) else start) / tokenizer.sample_rate_hz
        if not len(loud):
            told.append(f"seed {seed + number}: silent; use another seed")
        elif length / tokenizer.sample_rate_hz - end_s > SILENT_END_SECONDS:
            remedy = "" if held else f", or max_drift={MUSIC_MAX_DRIFT:g}, which goes back to the first seconds"
            told.append(f"seed {seed + number}: silent from {end_s:.1f} s on; use another seed{remedy}")
    return GeneratedAudio(
        waveform=waveform,
        sample_rate_hz=tokenizer.sample_rate_hz,
        lengths=lengths,
        frames=frames,
        seed=seed,
        seconds_made=int(made.sum()) / tokenizer.frame_rate_hz,
        warnings=tuple(told),
    )


def stack(rows: Sequence[GeneratedAudio]) -> GeneratedAudio:
    """Recordings of one row each as one record of all, the shorter ones padded."""
    samples, frames = (max(int(row.lengths[0]) for row in rows), max(int(row.frames.lengths[0]) for row in rows))
    waveform = torch.zeros(len(rows), 1, samples)
    first = rows[0].frames
    codes = first.codes.new_zeros(len(rows), first.codes.shape[1], frames)
    latents = first.latents.new_zeros(len(rows), frames, first.latents.shape[2])
    for number, row in enumerate(rows):
        waveform[number, :, : row.waveform.shape[-1]] = row.waveform[0]
        codes[number, :, : row.frames.codes.shape[2]] = row.frames.codes[0]
        latents[number, : row.frames.latents.shape[1]] = row.frames.latents[0]
    return replace(
        rows[0],
        waveform=waveform,
        lengths=torch.cat([row.lengths for row in rows]),
        frames=AudioFrames(codes=codes, latents=latents, lengths=torch.cat([row.frames.lengths for row in rows])),
        seconds_made=sum(row.seconds_made for row in rows),
        warnings=tuple(warning for row in rows for warning in row.warnings),
        interrupted=any(row.interrupted for row in rows),
    )


def as_interrupted(audio: GeneratedAudio) -> GeneratedAudio:
    """The same, which says that it was ended early."""
    told = f"interrupted: {audio.seconds_made:.2f} s were made"
    return replace(audio, interrupted=True, warnings=(*audio.warnings, told))


def at_loudness(audio: GeneratedAudio, lufs: float | None, like: GeneratedAudio | None = None) -> GeneratedAudio:
    """Every row brought to a loudness.

    Args:
        audio: As it was decoded.
        lufs: None changes nothing.
        like: The recording whose gain is taken; None: one's own.
    """
    if lufs is None:
        return audio
    waveform, warnings, measured = audio.waveform.clone(), list(audio.warnings), like or audio
    for row in range(len(waveform)):
        gain = gain_to(lufs, measured.row(row), audio.sample_rate_hz)
        if gain is None:
            warnings.append(f"seed {audio.seed + row}: too short or too quiet to have a loudness; left as it is")
            continue
        waveform[row] *= gain.factor
        if gain.lufs < lufs - 0.05:
            warnings.append(
                f"seed {audio.seed + row}: {gain.lufs:.1f} LUFS instead of {lufs:g}, for its true peak is at "
                f"{TRUE_PEAK_LIMIT_DB:g} dB"
            )
    return replace(audio, waveform=waveform.clamp(-1.0, 1.0), warnings=tuple(warnings))


def _join(
    tokenizer: Tokenizer, source: Source, request: Request, drawn: Sequence[Drawn], made: Int[Tensor, " B"]
) -> AudioFrames:
    """The prompt's frames and the drawn ones; a stream that is not drawn in full follows from the other."""
    prompt, rows = None if request.reference else request.prompt, len(request.seeds)
    before = 0 if prompt is None else prompt.latents.shape[1]
    codes = (
        torch.cat([frame.codes for frame in drawn if frame.codes is not None], dim=2)
        if drawn[0].codes is not None
        else None
    )
    if drawn[0].latents is not None:
        latents = torch.cat([frame.latents for frame in drawn if frame.latents is not None], dim=1)
        if codes is None or codes.shape[1] < tokenizer.num_codebooks:
            codes = tokenizer.quantize(latents)
    else:
        assert codes is not None
        latents = tokenizer.dequantize(codes)
    if prompt is not None:
        kept = prompt.codes[:, : codes.shape[1]]
        past = prompt.latents if source == "latents" else tokenizer.dequantize(kept)
        codes = torch.cat([kept.expand(rows, -1, -1), codes], dim=2)
        latents = torch.cat([past.expand(rows, -1, -1), latents], dim=1)
    return AudioFrames(codes=codes, latents=latents, lengths=made + before)


@torch.no_grad()  # and no inference mode: its tensors would be of no use to a caller who trains on the audio
def _decode(tokenizer: Tokenizer, source: Source, frames: AudioFrames) -> Float[Tensor, "B 1 S"]:
    """Audio of every row on its own: what follows a row's end in the batch can't reach its last samples."""
    lengths = frames.lengths * tokenizer.hop_length
    waveform = torch.zeros(len(lengths), 1, int(lengths.max()))
    for row, count in enumerate(frames.lengths.tolist()):
        if source == "latents":
            stream, time = frames.latents[row : row + 1, :count], 1
        else:
            stream, time = frames.codes[row : row + 1, :, :count], 2
        if count <= PIECE_FRAMES:
            pieces = [tokenizer.decode_latents(stream) if source == "latents" else tokenizer.decode_codes(stream)]
        else:
            decoder = tokenizer.streaming_decoder(1, source)
            pieces = [*map(decoder.push, stream.split(PIECE_FRAMES, dim=time)), decoder.flush()]
        samples = torch.cat(pieces, dim=-1)[0].float().cpu()
        waveform[row, :, : samples.shape[-1]] = samples
    return waveform
