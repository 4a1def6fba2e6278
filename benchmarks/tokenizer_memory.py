"""Peak memory of a tokenizer that codes and decodes an endless recording piece by piece: it must not grow."""

from __future__ import annotations

import gc
import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizer_layouts import open_tokenizer
from tokenizer.errors import UserError

PIECE_SECONDS = 1.0


def measure(name: str, minutes: float, threads: int | None = None) -> dict[str, Any]:
    """`stream_peaks` in a process of its own, in which nothing else was ever loaded."""
    # Not forked: a fork of a process whose torch has threads can hang.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(stream_peaks, (name, minutes, threads))


@torch.inference_mode()
def stream_peaks(name: str, minutes: float, threads: int | None = None) -> dict[str, Any]:
    """Peak resident memory of this process above what it holds once the tokenizer is loaded.

    Args:
        name: See `open_tokenizer`.
        minutes: Of audio, which arrives in pieces of `PIECE_SECONDS` and leaves decoded from all codes.
        threads: Of torch.

    Returns:
        Bytes: `loaded`, and above it `after_first_minute` (or all of a shorter recording) and `after_all`.
    """
    if threads:
        torch.set_num_threads(threads)
    tokenizer = open_tokenizer(name)
    encoder, decoder = tokenizer.streaming_encoder(), tokenizer.streaming_decoder(source="codes")
    generator = torch.Generator().manual_seed(0)
    samples = int(PIECE_SECONDS * tokenizer.sample_rate_hz)
    gc.collect()
    _forget_peak()
    loaded, marks = peak_bytes(), {}
    pieces = max(1, round(60 * minutes / PIECE_SECONDS))
    first = min(pieces, round(60 / PIECE_SECONDS))
    for number in range(1, pieces + 1):
        decoder.push(encoder.push(0.1 * torch.randn(1, 1, samples, generator=generator)).codes)
        if number == first:
            marks["after_first_minute"] = peak_bytes() - loaded
    marks["after_all"] = peak_bytes() - loaded
    return {"tokenizer": name, "minutes": pieces * PIECE_SECONDS / 60, "loaded": loaded, **marks}


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"--hours: peak memory cannot be reset here ({error}); run it on Linux") from error


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))
