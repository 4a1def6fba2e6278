"""Audio files: reading in one piece or in blocks, resampling, writing, and pictures of spectra.

Shapes: S samples. Everything here is mono: the channels of a file are averaged.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchaudio.functional import resample

from tokenizer.errors import UserError
from tokenizer.files import replacing

_BLOCK_S = 20.0
_FILTER_ZEROS = 6
"""Zero crossings of the resampling filter on each side: torchaudio's default."""
_WRITERS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16")}


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInfo:
    """What an audio file's header says."""

    duration_s: float
    sample_rate_hz: int
    channels: int


@runtime_checkable
class Member(Protocol):
    """A recording inside something else, such as a tar file or a table; its `str` names it in messages."""

    def open(self) -> io.BufferedIOBase:
        """Its bytes, as a file that can be sought in.

        Raises:
            UserError: they are not there.
        """
        ...


def _open(path: Path | Member) -> soundfile.SoundFile:
    if isinstance(path, Path):
        _check(path)
    try:
        return soundfile.SoundFile(str(path) if isinstance(path, Path) else path.open())
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        raise UserError(
            f"{path} is not audio that can be read ({_reason(error)}); "
            "use WAV, FLAC, Ogg, Opus, MP3 or AIFF, or convert it, for example with ffmpeg"
        ) from error


def _check(path: Path) -> None:
    """Whether a file is there to be read.

    Raises:
        UserError: it is not.
    """
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if not path.is_file():
        raise UserError(f"{path} is a folder, but must be an audio file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: Permission denied; change its permissions or leave it out")
    if size == 0:
        raise UserError(f"{path} is not audio: the file is empty; copy it again or leave it out")


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def audio_info(path: Path | Member) -> AudioInfo:
    """Read the header of an audio file.

    Raises:
        UserError: no such file, or not audio.
    """
    with _open(Path(path) if isinstance(path, str) else path) as file:
        return AudioInfo(
            duration_s=file.frames / file.samplerate, sample_rate_hz=file.samplerate, channels=file.channels
        )


def _ratio(source_hz: int, target_hz: int) -> Fraction:
    """Input samples per output sample, with terms small enough for a polyphase filter.

    The filter bank has as many entries as the product of both terms; rates without a common divisor (44,101 Hz) would
    need gigabytes. The nearest simple ratio is off by less than 1e-6.
    """
    ratio = Fraction(source_hz, target_hz)
    return ratio if ratio.numerator * ratio.denominator < 16_000_000 else ratio.limit_denominator(1000)


def audio_blocks(
    path: Path | Member,
    sample_rate_hz: int = 24_000,
    start: float | None = None,
    duration: float | None = None,
    block_s: float = _BLOCK_S,
) -> Iterator[Float[Tensor, "1 S"]]:
    """Read a file block by block, so that hours of audio need the memory of seconds.

    The blocks, joined, are what `read_audio` returns. Resampling runs over block borders without a seam: each block is
    resampled with its neighbours' margins, as wide as the filter.

    Args:
        path: An audio file of any rate and number of channels, or a member of something that holds such.
        sample_rate_hz: Rate to resample to.
        start: Where to begin, in seconds of the file.
        duration: How many seconds to read; less comes when the file ends before.
        block_s: Length of a block in seconds, about.

    Raises:
        UserError: no such file, not audio, damaged, no samples, NaN or infinite samples, or a range outside the file.
    """
    path = Path(path) if isinstance(path, str) else path
    for name, value, least in (("start", start, 0.0), ("duration", duration, 1e-9)):
        if value is not None and not (math.isfinite(value) and value >= least):
            bound = "above" if least else "at least"
            raise UserError(f"{path}: {name}={value} must be a number of seconds {bound} 0")
    with _open(path) as file:
        source_hz = file.samplerate
        if file.frames == 0:
            raise UserError(f"{path} holds no samples; it must hold at least one")
        first = round((start or 0.0) * source_hz)
        if first >= file.frames:
            raise UserError(
                f"{path}: start={start} lies past its end at {file.frames / source_hz:.3f} s; choose an earlier start"
            )
        wanted = file.frames - first
        if duration is not None:
            wanted = min(wanted, max(round(duration * source_hz), 1))
        ratio = _ratio(source_hz, sample_rate_hz)
        try:
            if first:
                file.seek(first)
            yield from _resampled(_mono_blocks(file, path, wanted, ratio, block_s), ratio)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path} is damaged ({_reason(error)}); repair it or leave it out") from error


def _mono_blocks(
    file: soundfile.SoundFile, path: Path | Member, wanted: int, ratio: Fraction, block_s: float
) -> Iterator[Float[Tensor, " S"]]:
    """Source-rate mono blocks, each but the last a whole number of the ratio's periods."""
    period = ratio.numerator
    size = max(round(block_s * file.samplerate / period), 1) * period
    position = 0
    while position < wanted:
        block = file.read(min(size, wanted - position), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float64).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(mono))
        if len(bad):
            at = (position + int(bad[0])) / file.samplerate
            raise UserError(f"{path} has a sample that is NaN or infinite at {at:.3f} s; repair it or leave it out")
        position += len(block)
        yield torch.from_numpy(mono)
    if position == 0:
        raise UserError(f"{path} holds no samples that can be decoded; it is empty or damaged")


def _resampled(blocks: Iterator[Float[Tensor, " S"]], ratio: Fraction) -> Iterator[Float[Tensor, "1 S"]]:
    """Resample blocks as one signal: `ratio` input samples become one output sample."""
    if ratio == 1:
        for block in blocks:
            yield block.unsqueeze(0)
        return
    period, out_period = ratio.numerator, ratio.denominator
    reach = math.ceil(_FILTER_ZEROS * period / (min(period, out_period) * 0.99))  # torchaudio's rolloff is 0.99
    margin = (math.ceil(reach / period) + 1) * period
    before = torch.zeros(0)
    current = next(blocks, None)
    while current is not None:
        after = next(blocks, None)
        parts = [before, current] if after is None else [before, current, after[:margin]]
        joined = torch.cat(parts).unsqueeze(0)
        out = resample(joined, period, out_period, lowpass_filter_width=_FILTER_ZEROS)
        skip = len(before) // period * out_period
        stop = out.shape[-1] if after is None else skip + len(current) // period * out_period
        yield out[:, skip:stop]
        before = torch.cat([before, current])[-margin:] if after is not None else before
        current = after


def read_audio(
    path: Path | Member, sample_rate_hz: int = 24_000, start: float | None = None, duration: float | None = None
) -> Float[Tensor, "1 S"]:
    """Read a file, or a part of it, as mono float32 at `sample_rate_hz`.

    Args:
        path: As `audio_blocks` takes it, at least one sample long.
        sample_rate_hz: Rate to resample to.
        start: Where to begin, in seconds of the file.
        duration: How many seconds to read; less comes when the file ends before.

    Raises:
        UserError: as `audio_blocks`.
    """
    blocks = audio_blocks(path, sample_rate_hz, start, duration)
    first = next(blocks)
    if first.shape[-1] < _BLOCK_S * sample_rate_hz * 0.9:
        return torch.cat([first, *blocks], dim=-1)
    # Filling one array needs half the memory of joining a list; the header tells its size, a little room is added.
    length = min(duration, audio_info(path).duration_s) if duration is not None else audio_info(path).duration_s
    whole = np.zeros((1, int((length + _BLOCK_S) * sample_rate_hz)), dtype=np.float32)
    position = 0
    for block in itertools.chain((first,), blocks):
        whole[:, position : position + block.shape[-1]] = block.numpy()
        position += block.shape[-1]
    return torch.from_numpy(whole[:, :position])


def write_audio(path: Path, waveform: Float[Tensor, "1 S"], sample_rate_hz: int) -> None:
    """Write 16-bit WAV or FLAC, chosen by the suffix; samples beyond [-1, 1] are clipped.

    The file appears whole or not at all.

    Raises:
        UserError: another suffix, or a place that cannot be written.
        ValueError: samples that are NaN or infinite.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"{path}: the suffix {path.suffix!r} must be .wav or .flac; rename the output")
    samples = waveform.detach().cpu().float().squeeze(0)
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{path}: the waveform has samples that are NaN or infinite")
    container, subtype = _WRITERS[path.suffix.lower()]
    encoded = io.BytesIO()  # in memory first: libsndfile does not tell of a full disk
    soundfile.write(encoded, samples.numpy(), sample_rate_hz, format=container, subtype=subtype)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def write_spectrogram(path: Path, waveform: Float[Tensor, "1 S"], sample_rate_hz: int) -> None:
    """Draw the spectrum over time as a PNG: 0 Hz to Nyquist, 90 dB below the loudest bin.

    Raises:
        UserError: a place that cannot be written.
    """
    from matplotlib.figure import Figure  # imported here: it takes half a second that most commands need not pay

    n_fft = 1024
    samples = waveform.detach().cpu().float()
    hop_length = max(n_fft // 4, samples.shape[-1] // 2000)  # no more columns than pixels, however long the audio
    samples = F.pad(samples, (n_fft // 2, n_fft // 2 + max(0, hop_length - samples.shape[-1])))
    spectrum = torch.stft(
        samples, n_fft, hop_length, window=torch.hann_window(n_fft), center=False, return_complex=True
    )[0]  # (N, T)
    decibels = 20.0 * spectrum.abs().clamp(min=1e-7).log10()
    loudest = float(decibels.max())
    seconds = waveform.shape[-1] / sample_rate_hz
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        decibels.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0.0, seconds, 0.0, sample_rate_hz / 2000),
        vmin=loudest - 90.0,
        vmax=loudest,
        cmap="magma",
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("kHz")
    figure.colorbar(image, label="dB")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
