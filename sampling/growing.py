"""Recordings that grow while they are made: files that are valid at any time, and standard output.

A WAV file's header is written anew after every piece, so that whoever opens the file finds a whole recording; FLAC is
flushed, and ends where the encoder's last block does. On standard output nothing can be written anew: the WAV header
there gives the largest length there is, which players and converters read as "until the end".

Shapes: S samples.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import soundfile
from jaxtyping import Float, Int16
from torch import Tensor

from tokenizer.errors import UserError

HEADER_BYTES = 44
LARGEST_SIZE = 2**32 - 1
"""What the size fields of a WAV file hold."""


@runtime_checkable
class Recording(Protocol):
    """A place for one recording of one channel, 16 bits a sample."""

    name: str
    """Where it is, for people."""
    num_samples: int
    """Written so far."""

    def write(self, waveform: Float[Tensor, "1 1 S"]) -> None:
        """Append samples, clipped to [-1, 1]."""
        ...

    def __enter__(self) -> Recording: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def wav_header(sample_rate_hz: int, num_samples: int | None) -> bytes:
    """The 44 bytes before the samples; None for a recording whose end nobody knows."""
    data = LARGEST_SIZE if num_samples is None else min(2 * num_samples, LARGEST_SIZE)
    whole = min(data + HEADER_BYTES - 8, LARGEST_SIZE)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate_hz, 2 * sample_rate_hz, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + form + struct.pack("<4sI", b"data", data)


def as_integers(waveform: Float[Tensor, "*B S"]) -> Int16[np.ndarray, " N"]:
    """Little-endian 16-bit samples, the same that libsndfile makes of these."""
    scaled = waveform.detach().reshape(-1).float().cpu().numpy() * 32768.0
    return np.floor(scaled).clip(-32768, 32767).astype("<i2")


class GrowingFile:
    """A WAV or FLAC file under a temporary name, which is valid after every piece and takes the name when complete.

    Ctrl-C completes it, if it has any samples; any other exception leaves an older file of the name as it is.

    Args:
        path: Ends in .wav or .flac; its folder exists.
        sample_rate_hz: Of the samples.
    """

    def __init__(self, path: Path, sample_rate_hz: int) -> None:
        self.path, self.name, self.sample_rate_hz = path, str(path), sample_rate_hz
        self.partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        self.num_samples = 0
        self._flac: soundfile.SoundFile | None = None
        self._wav: io.BufferedIOBase | None = None
        if path.suffix.lower() == ".flac":
            self._flac = soundfile.SoundFile(
                self.partial, "w", samplerate=sample_rate_hz, channels=1, format="FLAC", subtype="PCM_16"
            )
        else:
            self._wav = self.partial.open("wb")
            self._write_header()

    def write(self, waveform: Float[Tensor, "1 1 S"]) -> None:
        """Append samples, clipped to [-1, 1].

        Raises:
            UserError: a full disk.
        """
        samples = as_integers(waveform)
        try:
            if self._flac is not None:
                self._flac.write(samples)
                self._flac.flush()
            if self._wav is not None:
                self._wav.write(samples.tobytes())
                self._wav.flush()  # before the header counts them
            self.num_samples += len(samples)
            self._write_header()
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(f"output={self.name!r} can't be written ({error}); is the disk full?") from error

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = kind is None or (issubclass(kind, KeyboardInterrupt) and self.num_samples > 0)
        try:
            if kept:
                self._complete()
        finally:
            for file in (self._flac, self._wav):
                if file is not None:
                    with contextlib.suppress(OSError, soundfile.SoundFileError):  # of a full disk, told already
                        file.close()
            self.partial.unlink(missing_ok=True)

    def _complete(self) -> None:
        if self._flac is not None:
            self._flac.close()
        if self._wav is not None:
            self._write_header()
            self._wav.truncate()  # an interrupted write may have left a part of a piece behind
        with self.partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)

    def _write_header(self) -> None:
        """Of the samples so far; what is written next comes after them."""
        if self._wav is not None:
            self._wav.seek(0)
            self._wav.write(wav_header(self.sample_rate_hz, self.num_samples))
            self._wav.flush()
            self._wav.seek(HEADER_BYTES + 2 * self.num_samples)


class StandardOutput:
    """WAV or bare 16-bit little-endian samples, handed on with every piece.

    Args:
        stream: Of bytes.
        sample_rate_hz: Of the samples.
        header: Whether a WAV header comes first.
    """

    def __init__(self, stream: io.BufferedIOBase, sample_rate_hz: int, *, header: bool) -> None:
        self.name, self.num_samples, self._stream = "-", 0, stream
        self._waiting = wav_header(sample_rate_hz, None) if header else b""

    def write(self, waveform: Float[Tensor, "1 1 S"]) -> None:
        """Append samples, clipped to [-1, 1]."""
        samples = as_integers(waveform)
        self._stream.write(self._waiting + samples.tobytes())
        self._stream.flush()
        self._waiting = b""
        self.num_samples += len(samples)

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing: the stream is the process's."""
