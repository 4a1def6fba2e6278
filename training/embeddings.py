"""Audio to one vector a clip: frozen frames, pooled over time.

Clips are read ahead in a thread, batched by length and pooled at once, so memory holds a few minutes of audio however
long the manifest is; clips longer than a piece pass through the streaming encoder.

Shapes: B batch, T frames, D width of a frame, E width of a vector, S samples, N clips.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from tokenizer.audio import audio_blocks
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Tokenizer
from tokenizer.mel import CausalLogMel
from training.background import in_order
from training.manifest import Clip
from training.progress import ClipMeter

Input = Literal["features", "latents", "codes"]
INPUTS: tuple[Input, ...] = ("features", "latents", "codes")
PIECE_S = 20.0
"""Longer clips are encoded piece by piece."""
BATCH_SECONDS = 60.0
_BATCHES_SORTED = 5
"""Clips of so many batches are sorted by length together."""
_READERS = 2


class Frames(NamedTuple):
    """One or more views of the same frames."""

    views: tuple[Float[Tensor, "B T D"], ...]
    lengths: Int[Tensor, " B"]
    """Valid frames per row."""


@runtime_checkable
class FrameSource(Protocol):
    """A frozen representation of audio."""

    names: tuple[str, ...]
    """One a view, as tables call it."""
    sample_rate_hz: int

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"]) -> Frames:
        """Frames of a padded batch; `lengths` in samples."""
        ...

    def stream(self, blocks: Iterator[Float[Tensor, "1 1 S"]]) -> Iterator[Frames]:
        """Frames of one recording that arrives in pieces of any size."""
        ...

    def vector(self, mean: Float[Tensor, " D"], deviation: Float[Tensor, " D"]) -> Float[Tensor, " E"]:
        """What stands for a clip whose frames have this mean and standard deviation over time."""
        ...


class LogMel:
    """The floor: mean and standard deviation of a log-mel, 128 bands, windows of 43 ms every 10 ms at 24 kHz.

    Constants bring both near zero mean and unit scale on speech and sound. A probe that begins with LayerNorm would
    otherwise see little but the gap between means and deviations, and the floor would be too easy to beat.
    """

    names: tuple[str, ...] = ("log-mel (floor)",)
    sample_rate_hz = 24_000

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._mel = CausalLogMel(self.sample_rate_hz, n_fft=1024, hop_length=240, num_mels=128).to(self._device)

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"]) -> Frames:
        """Frames of a padded batch; no window sees past its own end."""
        hop = self._mel.hop_length
        return Frames((self._mel(waveform.to(self._device)),), (lengths + hop - 1) // hop)

    def stream(self, blocks: Iterator[Float[Tensor, "1 1 S"]]) -> Iterator[Frames]:
        """Frames of one recording that arrives in pieces of any size."""
        hop, reach = self._mel.hop_length, self._mel.context_samples
        context, rest = torch.zeros(1, 1, reach), torch.zeros(1, 1, 0)
        for block in blocks:
            samples = torch.cat([rest, block], dim=-1)
            whole = samples.shape[-1] // hop * hop
            yield self._frames(samples[..., :whole], context)
            seen = torch.cat([context, samples[..., :whole]], dim=-1)
            context, rest = seen[..., seen.shape[-1] - reach :], samples[..., whole:]
        yield self._frames(rest, context)

    def vector(self, mean: Float[Tensor, " D"], deviation: Float[Tensor, " D"]) -> Float[Tensor, " E"]:
        """Both, scaled."""
        return torch.cat([(mean + 7.0) / 2.5, deviation - 1.5])

    def _frames(self, samples: Float[Tensor, "1 1 S"], context: Float[Tensor, "1 1 P"]) -> Frames:
        mel = self._mel(samples.to(self._device), context.to(self._device))
        return Frames((mel,), torch.tensor([mel.shape[1]]))


class TokenizerFrames:
    """A tokenizer's features, latents or codes; the mean over time stands for a clip.

    Codes stand for their embeddings, `dequantize(codes)`: all codebooks' entries summed, as wide as the latents and
    comparable with them. (Counts of codes would be `num_codebooks * codebook_size` wide and another probe.)

    Args:
        tokenizer: Where it computes is where its weights are.
        inputs: Views to give, of `INPUTS`.
        name: How tables call the tokenizer.

    Raises:
        UserError: `features` of a tokenizer that has none.
    """

    def __init__(self, tokenizer: Tokenizer, inputs: Sequence[str], name: str) -> None:
        for wanted in inputs:
            if wanted not in INPUTS:
                raise UserError(f"input={wanted!r} must be one of {', '.join(INPUTS)}")
        if "features" in inputs and not tokenizer.feature_dim:
            raise UserError(f"tokenizer '{name}' ({tokenizer.name}) has no features; probe its latents or codes")
        self.names = tuple(f"{name} {wanted}" for wanted in inputs)
        self.sample_rate_hz = tokenizer.sample_rate_hz
        self.dims = tuple(tokenizer.feature_dim if wanted == "features" else tokenizer.latent_dim for wanted in inputs)
        self._tokenizer, self._inputs = tokenizer, tuple(inputs)

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"]) -> Frames:
        """Frames of a padded batch; `lengths` in samples."""
        device = self._device()
        return self._views(self._tokenizer.encode(waveform.to(device), lengths.to(device)))

    def stream(self, blocks: Iterator[Float[Tensor, "B 1 S"]], batch_size: int = 1) -> Iterator[Frames]:
        """Frames of `batch_size` recordings of one length that arrive in pieces of any size."""
        encoder, device = self._tokenizer.streaming_encoder(batch_size), self._device()
        for block in blocks:
            yield self._views(encoder.push(block.to(device)))
        yield self._views(encoder.flush())

    def vector(self, mean: Float[Tensor, " D"], deviation: Float[Tensor, " D"]) -> Float[Tensor, " E"]:
        """The mean alone."""
        return mean

    def _device(self) -> torch.device:
        """Where the weights are now; `xares` moves them after this object is made."""
        weights = self._tokenizer.parameters() if isinstance(self._tokenizer, nn.Module) else iter(())
        return next((weight.device for weight in weights), torch.device("cpu"))

    def _views(self, frames: AudioFrames) -> Frames:
        views = []
        for wanted in self._inputs:
            if wanted == "codes":
                views.append(self._tokenizer.dequantize(frames.codes))
            elif wanted == "latents":
                views.append(frames.latents)
            else:
                assert frames.features is not None, "a tokenizer with feature_dim > 0 gives features"
                views.append(frames.features)
        return Frames(tuple(views), frames.lengths)


def default_input(tokenizer: Tokenizer) -> Input:
    """Features, which are made to be understood, where a tokenizer has them; else latents."""
    return "features" if tokenizer.feature_dim else "latents"


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """The vectors of the clips that could be read."""

    vectors: dict[str, Float[Tensor, "N _"]]
    """By the view's name; float32, on the CPU."""
    kept: tuple[int, ...]
    """Which of the given clips the rows are, in their order."""
    problems: tuple[str, ...]
    """One line for each clip left out."""


@torch.inference_mode()
def embed(
    clips: Sequence[Clip],
    source: FrameSource,
    *,
    batch_seconds: float = BATCH_SECONDS,
    console: Console | None = None,
) -> Embeddings:
    """Pool every clip's frames over time; what else is in a batch changes nothing.

    Args:
        clips: What to read.
        source: What is computed of it.
        batch_seconds: Audio a batch, padding counted; it bounds memory.
        console: Where progress goes; standard error by default.
    """
    rows: dict[int, list[Tensor]] = {}
    problems: list[str] = []
    pending: list[tuple[int, Tensor]] = []
    limit = batch_seconds * source.sample_rate_hz
    console = console or Console(stderr=True)

    def encode_pending() -> None:
        for batch in _batches(pending, limit):
            rows.update(zip((number for number, _ in batch), _pooled_batch([w for _, w in batch], source), strict=True))
        pending.clear()

    with ClipMeter(console, clips, doing=source.names[0], done=f"{source.names[0]}: read") as meter:
        for number, found in in_order(range(len(clips)), lambda i: _read(clips[i], source.sample_rate_hz), _READERS):
            seconds = 0.0
            try:
                if isinstance(found, UserError):
                    raise found
                if isinstance(found, Tensor):
                    pending.append((number, found))
                    seconds = found.shape[-1] / source.sample_rate_hz
                    if sum(waveform.shape[-1] for _, waveform in pending) >= _BATCHES_SORTED * limit:
                        encode_pending()
                else:
                    rows[number] = _pooled(source.stream(block[None] for block in found), source)
                    seconds = clips[number].duration or PIECE_S
            except UserError as error:
                problems.append(str(error))
            meter.advance(clips[number], seconds)
        encode_pending()
    for number in sorted(rows):
        if not all(bool(vector.isfinite().all()) for vector in rows[number]):
            problems.append(f"{clips[number].path}: {source.names[0]} of it are not finite numbers")
            del rows[number]
    kept = tuple(sorted(rows))
    vectors = {
        name: torch.stack([rows[number][view] for number in kept]) if kept else torch.zeros(0, 1)
        for view, name in enumerate(source.names)
    }
    return Embeddings(vectors=vectors, kept=kept, problems=tuple(problems))


def _read(clip: Clip, sample_rate_hz: int) -> Tensor | Iterator[Tensor]:
    """A clip's waveform (1, S), or its pieces where it is longer than one."""
    blocks = audio_blocks(clip.audio, sample_rate_hz, clip.start, clip.read_duration, PIECE_S)
    first, second = next(blocks), next(blocks, None)
    return first if second is None else itertools.chain((first, second), blocks)


def _batches(pending: Sequence[tuple[int, Tensor]], limit: float) -> Iterator[list[tuple[int, Tensor]]]:
    """Clips of like length, at most `limit` samples with padding (one clip may be longer)."""
    batch: list[tuple[int, Tensor]] = []
    for item in sorted(pending, key=lambda item: item[1].shape[-1]):
        if batch and item[1].shape[-1] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _pooled_batch(waveforms: Sequence[Float[Tensor, "1 _"]], source: FrameSource) -> list[list[Tensor]]:
    lengths = torch.tensor([waveform.shape[-1] for waveform in waveforms])
    padded = torch.zeros(len(waveforms), 1, int(lengths.max()))
    for row, waveform in enumerate(waveforms):
        padded[row, :, : waveform.shape[-1]] = waveform
    frames = source.encode(padded, lengths)
    return [
        _pooled(
            [Frames(tuple(view[row : row + 1, :length] for view in frames.views), frames.lengths[row : row + 1])],
            source,
        )
        for row, length in enumerate(frames.lengths.tolist())
    ]


def _pooled(pieces: Iterable[Frames], source: FrameSource) -> list[Float[Tensor, " _"]]:
    """A vector a view, of all pieces of a recording."""
    count, totals = 0, []  # type: int, list[Tensor]
    for piece in pieces:
        views = [view[0].cpu().double() for view in piece.views]  # (T, D)
        moments = [torch.stack([view.sum(0), view.square().sum(0)]) for view in views]
        totals = [a + b for a, b in zip(totals, moments, strict=True)] if totals else moments
        count += views[0].shape[0]
    vectors = []
    for mean, square in (total / count for total in totals):
        deviation = (square - mean.square()).clamp(min=0.0).sqrt()
        vectors.append(source.vector(mean, deviation).float())
    return vectors
