"""Tiny corpora: sines of known pitch with manifests, and a tokenizer whose frames say which samples they hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from torch import Tensor

from tokenizer.frames import AudioFrames, StreamingDecoder
from training.prepare import prepare

RATE = 8_000
SILENT = Console(file=io.StringIO())


def write_sine(path: Path, seconds: float, hz: float = 440.0, rate: int = RATE) -> Path:
    """A 16-bit sine; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate), rate)
    return path


def write_corpus(folder: Path, clips: list[dict[str, Any]]) -> Path:
    """A manifest.jsonl with a sine for each entry, `duration` seconds long, unless its file is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(clips):
        if not (folder / clip["path"]).exists():
            write_sine(folder / clip["path"], clip["duration"], hz=200.0 + 50.0 * number)
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return manifest


def sines(folder: Path, durations: list[float], **values: Any) -> Path:
    """Sines of these lengths."""
    return write_corpus(folder, [{"path": f"{i}.wav", "duration": d, **values} for i, d in enumerate(durations)])


class BlockTokenizer:
    """8 kHz, 80 samples a frame, 100 Hz: a frame's latents are its samples' means over D blocks; no look-ahead."""

    name = "block"
    sample_rate_hz = RATE
    frame_rate_hz = 100.0
    hop_length = 80
    num_codebooks = 2
    codebook_size = 300
    latent_dim = 4
    lookahead_frames = 0

    def __init__(self, version: str = "0123456789abcdef", feature_dim: int = 0) -> None:
        self.version = version
        self.feature_dim = feature_dim
        self.num_encoded = 0
        self.longest = 0
        """Samples of the longest piece seen, to prove that memory stays bounded."""

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> AudioFrames:
        self.num_encoded += 1
        self.longest = max(self.longest, waveform.shape[-1])
        padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[-1] % self.hop_length))
        blocks = padded.reshape(len(waveform), -1, self.latent_dim, self.hop_length // self.latent_dim)  # (B, T, D, -)
        latents = blocks.mean(-1)
        features = latents[..., :1].repeat(1, 1, self.feature_dim) if self.feature_dim else None
        return AudioFrames(
            codes=self.quantize(latents),
            latents=latents,
            features=features,
            lengths=torch.full((len(waveform),), latents.shape[1]),
        )

    def quantize(self, latents: Tensor) -> Tensor:
        coarse = ((latents[..., :2] + 1) / 2 * (self.codebook_size - 1)).round().long()
        return coarse.clamp(0, self.codebook_size - 1).transpose(1, 2)

    def dequantize(self, codes: Tensor) -> Tensor:
        return (codes.transpose(1, 2) / (self.codebook_size - 1) * 2 - 1).repeat(1, 1, 2)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.decode_latents(self.dequantize(codes))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(self.hop_length // self.latent_dim, dim=-1).reshape(len(latents), 1, -1)

    def streaming_encoder(self, batch_size: int = 1) -> BlockStream:
        return BlockStream(self, batch_size)

    def streaming_decoder(self, batch_size: int = 1, source: str = "latents") -> StreamingDecoder:
        raise AssertionError("no test decodes this stub in pieces")

    def fingerprint(self) -> str:
        return self.version

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


class BlockStream:
    """Streaming encoder of `BlockTokenizer`."""

    def __init__(self, tokenizer: BlockTokenizer, batch_size: int) -> None:
        self._tokenizer = tokenizer
        self._rest = torch.zeros(batch_size, 1, 0)

    def push(self, waveform: Tensor) -> AudioFrames:
        joined = torch.cat([self._rest, waveform], dim=-1)
        whole = joined.shape[-1] // self._tokenizer.hop_length * self._tokenizer.hop_length
        self._rest = joined[..., whole:]
        return self._tokenizer.encode(joined[..., :whole])

    def flush(self) -> AudioFrames:
        return self._tokenizer.encode(self._rest)


def tokens(source: Path, output: Path, tokenizer: BlockTokenizer | None = None, **values: Any) -> BlockTokenizer:
    """Fill a cache and return the tokenizer that did."""
    tokenizer = tokenizer or BlockTokenizer()
    prepare(source, output, tokenizer, console=SILENT, **values)
    return tokenizer
