"""A recording through a tokenizer and back, in pieces, so that three hours need no more memory than ten seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.checkpoint import load_codec
from sampling.files import AudioWriter, check_writable, tell_figures
from tokenizer.audio import audio_blocks
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, Tokenizer
from tokenizer.metrics import (
    LATENT_BITS,
    Undefined,
    mel_distance,
    multi_resolution_mel_distance,
    multi_resolution_stft_distance,
    pesq_wb,
    stoi,
)

PIECE_SECONDS = 10.0
MAX_JUDGED_PIECES = 30
"""STOI and PESQ take longer than the codec itself; they judge this many pieces, from the start."""
DISTANCES: dict[str, Callable[..., float]] = {
    "mel_distance": mel_distance,
    "multi_resolution_mel_distance": multi_resolution_mel_distance,
    "multi_resolution_stft_distance": lambda reference, estimate, _: multi_resolution_stft_distance(
        reference, estimate
    ),
}
SPEECH_FIGURES: dict[str, Callable[..., float]] = {"stoi": stoi, "pesq_wb": pesq_wb}


def run(
    input: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path = "box",
    source: Source = "codes",
    num_codebooks: int | None = None,
    json_file: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """`hybridlm reconstruct`: encode and decode a recording, write it, print and return how near it came.

    Args:
        input: Any audio file that soundfile reads.
        output: WAV or FLAC.
        tokenizer: A tokenizer's name or folder, or a model's.
        source: Decode from "codes" or from "latents".
        num_codebooks: Only the first so many codebooks (codes only); None for all.
        json_file: Where the figures go as JSON; None for nowhere.
        device: "cpu", "cuda", ...

    Returns:
        Figures: seconds; mel_distance, multi_resolution_mel_distance, multi_resolution_stft_distance, si_sdr_db, stoi,
        pesq_wb (see `tokenizer.metrics`; None where there is none, with the reason by name in `undefined`);
        judged_seconds (what STOI and PESQ rest on); frame_rate_hz; tokens_per_second (codes kept; of latents the
        vectors) and bits_per_second (of latents those of 16-bit numbers); encode_real_time_factor and
        decode_real_time_factor (seconds of computing a second of audio: below 1 is faster than real time).

    Raises:
        UserError: for input that is no audio, an output that can't be written, or settings that don't fit.
    """
    input, output = Path(input), Path(output)
    codec = load_codec(tokenizer, device=device)
    kept = _check_codebooks(codec, source, num_codebooks)
    if json_file is not None:
        check_writable(Path(json_file))
    judge = Judge(codec.sample_rate_hz)
    encoding, decoding = Stopwatch(), Stopwatch()
    encoder, decoder = codec.streaming_encoder(1), codec.streaming_decoder(1, source)

    def decode(frames: AudioFrames) -> Float[Tensor, "1 1 S"]:
        picked = frames.codes[:, :kept] if source == "codes" else frames.latents
        return decoding(lambda: decoder.push(picked))

    with torch.inference_mode(), AudioWriter(output, codec.sample_rate_hz) as writer:
        for block in audio_blocks(input, codec.sample_rate_hz, block_s=PIECE_SECONDS):
            piece = block.unsqueeze(0)
            judge.expect(piece)
            frames = encoding(partial(encoder.push, piece.to(device)))
            writer.write(judge.compare(decode(frames)))
        frames = encoding(encoder.flush)
        writer.write(judge.compare(decode(frames)))
        writer.write(judge.compare(decoding(decoder.flush)))
    seconds = writer.num_samples / codec.sample_rate_hz
    figures: dict[str, Any] = {
        "input": str(input),
        "output": str(output),
        "tokenizer": codec.name,
        "source": source,
        "sample_rate_hz": codec.sample_rate_hz,
        "seconds": seconds,
        **judge.figures(),
        **_rate(codec, source, kept),
        "encode_real_time_factor": encoding.seconds / seconds,
        "decode_real_time_factor": decoding.seconds / seconds,
    }
    tell_figures(figures, json_file)
    return figures


class Judge:
    """Compares a recording with its reconstruction, both of which arrive in pieces of any size.

    The SI-SDR (Le Roux et al., arXiv 1811.02508) is that of the whole recordings, from running sums; the other figures
    are means over pieces, weighted by length.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self.sample_rate_hz = sample_rate_hz
        self._expected = torch.zeros(1, 1, 0)
        self._found = torch.zeros(1, 1, 0)
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._means: dict[str, tuple[float, float]] = {}  # name -> (sum of value * seconds, seconds)
        self._reasons: dict[str, str] = {}

    def expect(self, piece: Float[Tensor, "1 1 S"]) -> None:
        """More of the original."""
        self._expected = torch.cat([self._expected, piece.cpu()], dim=-1)

    def compare(self, piece: Float[Tensor, "1 1 S"]) -> Float[Tensor, "1 1 kept"]:
        """More of the reconstruction; returns it without what lies past the original's end."""
        piece = piece.cpu()[..., : self._expected.shape[-1] - self._found.shape[-1]]
        self._found = torch.cat([self._found, piece], dim=-1)
        size = round(PIECE_SECONDS * self.sample_rate_hz)
        while self._found.shape[-1] >= size:
            self._judge(self._expected[..., :size], self._found[..., :size])
            self._expected, self._found = self._expected[..., size:], self._found[..., size:]
        return piece

    def figures(self) -> dict[str, Any]:
        """The figures of everything compared so far, and of those that are None the reason."""
        if self._found.shape[-1]:
            length = self._found.shape[-1]
            self._judge(self._expected[..., :length], self._found)
            self._expected, self._found = self._expected[..., length:], self._found[..., :0]
        means: dict[str, float | None] = {
            name: total / seconds for name, (total, seconds) in self._means.items() if seconds > 0
        }
        figures = {name: means.get(name) for name in DISTANCES}
        figures["si_sdr_db"] = self._si_sdr()
        figures |= {name: means.get(name) for name in SPEECH_FIGURES}
        undefined = {
            name: self._reasons.get(name, "there was nothing to compare")
            for name, value in figures.items()
            if value is None
        }
        return {**figures, "undefined": undefined, "judged_seconds": self._judged_seconds()}

    def _judge(self, expected: Float[Tensor, "1 1 S"], found: Float[Tensor, "1 1 S"]) -> None:
        s, f = expected.flatten().double(), found.flatten().double()
        seconds = len(s) / self.sample_rate_hz
        self._sums += torch.stack(
            [s.new_tensor(float(len(s))), s.sum(), f.sum(), s.square().sum(), f.square().sum(), (s * f).sum()]
        )
        values = {name: measure(s, f, self.sample_rate_hz) for name, measure in DISTANCES.items()}
        if self._judged_seconds() < MAX_JUDGED_PIECES * PIECE_SECONDS:
            for name, measure in SPEECH_FIGURES.items():
                try:
                    values[name] = measure(s, f, self.sample_rate_hz)
                except (Undefined, UserError) as error:  # UserError: its package is not installed
                    self._reasons.setdefault(name, str(error))
        for name, value in values.items():
            if not math.isfinite(value):
                self._reasons.setdefault(name, "the reconstruction is not finite")
                continue
            total, weight = self._means.get(name, (0.0, 0.0))
            self._means[name] = (total + value * seconds, weight + seconds)

    def _judged_seconds(self) -> float:
        return max(self._means.get(name, (0.0, 0.0))[1] for name in SPEECH_FIGURES)

    def _si_sdr(self) -> float | None:
        """SI-SDR in dB of the mean-free signals; None where either is constant or they agree to the last bit."""
        count, sum_s, sum_f, ss, ff, sf = self._sums.tolist()
        if count:
            ss, ff, sf = ss - sum_s**2 / count, ff - sum_f**2 / count, sf - sum_s * sum_f / count
        if ss <= 0 or ff <= 0:
            self._reasons["si_sdr_db"] = f"the {'recording' if ss <= 0 else 'reconstruction'} is silent or constant"
            return None
        signal = sf**2 / ss
        noise = ff - signal
        if signal <= 0 or noise <= 0:
            self._reasons["si_sdr_db"] = "the two have nothing in common" if signal <= 0 else "the two are the same"
            return None
        return 10 * math.log10(signal / noise)


class Stopwatch:
    """Seconds spent inside the calls it is given."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - began
        return result


def _check_codebooks(codec: Tokenizer, source: Source, num_codebooks: int | None) -> int:
    if num_codebooks is None:
        return codec.num_codebooks
    if source == "latents":
        raise UserError(f"num_codebooks={num_codebooks} means nothing to latents; add --from codes, or leave it out")
    if not 1 <= num_codebooks <= codec.num_codebooks:
        raise UserError(f"num_codebooks={num_codebooks} must be from 1 to {codec.num_codebooks}")
    return num_codebooks


def _rate(codec: Tokenizer, source: Source, num_codebooks: int) -> dict[str, float | int]:
    rate = codec.frame_rate_hz
    if source == "latents":
        bits = LATENT_BITS * codec.latent_dim
        return {"frame_rate_hz": rate, "tokens_per_second": rate, "bits_per_second": rate * bits}
    return {
        "frame_rate_hz": rate,
        "num_codebooks": num_codebooks,
        "tokens_per_second": rate * num_codebooks,
        "bits_per_second": rate * num_codebooks * math.log2(codec.codebook_size),
    }
