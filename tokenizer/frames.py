"""The frame record and the tokenizer protocol on which everything else rests.

Shapes: B batch, T frames, K codebooks, V codebook size, D latent, F feature, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Source = Literal["codes", "latents"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioFrames:
    """Audio as frames at one rate; what lies past `lengths` in a row is padding and means nothing."""

    codes: Int[Tensor, "B K T"]
    """Residual codebook indices, each in [0, codebook_size)."""
    latents: Float[Tensor, "B T D"]
    """The compact continuous generation target."""
    lengths: Int[Tensor, " B"]
    """Valid frames per row."""
    features: Float[Tensor, "B T F"] | None = None
    """Input and understanding only; optional."""

    def to(self, device: torch.device | str) -> AudioFrames:
        """The same on a device."""
        return AudioFrames(
            codes=self.codes.to(device),
            latents=self.latents.to(device),
            lengths=self.lengths.to(device),
            features=None if self.features is None else self.features.to(device),
        )


@runtime_checkable
class StreamingEncoder(Protocol):
    """Takes audio in pieces of any size; its outputs, joined, equal `encode` of the joined pieces.

    A flush ends the recording, and the next push starts another.
    """

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Return the frames that became complete (possibly none: T = 0)."""
        ...

    def flush(self) -> AudioFrames:
        """Return what remains, the last frame padded with silence."""
        ...


@runtime_checkable
class StreamingDecoder(Protocol):
    """Takes codes (B, K, T) or latents (B, T, D) in pieces; its outputs, joined, equal the offline decoding.

    A flush ends the recording, and the next push starts another.
    """

    def push(self, frames: Tensor) -> Float[Tensor, "B 1 S"]:
        """Return the samples that became final."""
        ...

    def flush(self) -> Float[Tensor, "B 1 S"]:
        """Return what the codec still held back (nothing, for a decoder without look-ahead)."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Turns audio into frames and frames into audio. Decoding is causal; streaming equals offline to 1e-5."""

    name: str
    sample_rate_hz: int
    frame_rate_hz: float
    hop_length: int
    """Samples per frame."""
    num_codebooks: int
    codebook_size: int
    latent_dim: int
    feature_dim: int
    """Width of `AudioFrames.features`, 0 when there are none."""
    lookahead_frames: int
    """Frames after t whose samples frame t may depend on; 0 for a causal encoder."""

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode; `lengths` in samples. T = ceil(S / hop_length); the last frame is padded with silence."""
        ...

    def quantize(self, latents: Float[Tensor, "B T D"]) -> Int[Tensor, "B K T"]:
        """Codes of latents: the same function that `encode` applies to its own latents."""
        ...

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B T D"]:
        """Latents of the first k <= K codebooks."""
        ...

    def decode_codes(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B 1 S"]:
        """Audio of the first k <= K codebooks; S = T * hop_length."""
        ...

    def decode_latents(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of latents; S = T * hop_length."""
        ...

    def streaming_encoder(self, batch_size: int = 1) -> StreamingEncoder: ...

    def streaming_decoder(self, batch_size: int = 1, source: Source = "latents") -> StreamingDecoder: ...

    def fingerprint(self) -> str:
        """Sixteen hex digits of configuration and weights: equal if and only if frames are interchangeable."""
        ...

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        ...


def join_frames(pieces: Sequence[AudioFrames]) -> AudioFrames:
    """Pieces of the same recordings, one after the other; none of them padded."""
    features = [piece.features for piece in pieces if piece.features is not None]
    return AudioFrames(
        codes=torch.cat([piece.codes for piece in pieces], dim=2),
        latents=torch.cat([piece.latents for piece in pieces], dim=1),
        features=torch.cat(features, dim=1) if features else None,
        lengths=torch.stack([piece.lengths for piece in pieces]).sum(dim=0),
    )


class WholeFrames:
    """Samples that wait until they make up whole frames.

    Args:
        hop_length: Samples per frame.
        batch_size: Recordings of one length.
        device: Where they wait.
    """

    def __init__(self, hop_length: int, batch_size: int, device: torch.device) -> None:
        self.hop_length = hop_length
        self._waiting = torch.zeros(batch_size, 1, 0, device=device)

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B 1 whole"]:
        """All samples of the frames that are complete now."""
        samples = torch.cat([self._waiting, waveform.to(self._waiting)], dim=-1)
        whole = samples.shape[-1] // self.hop_length * self.hop_length
        self._waiting = samples[..., whole:]
        return samples[..., :whole]

    def flush(self) -> Float[Tensor, "B 1 rest"]:
        """The last frame, filled up with silence, if samples of it have come."""
        rest, self._waiting = self._waiting, self._waiting[..., :0]
        return F.pad(rest, (0, -rest.shape[-1] % self.hop_length))
