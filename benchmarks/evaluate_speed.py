"""Speed and peak memory of `hybridlm evaluate`, on a corpus and on the same corpus twice over: memory must not grow.

    python -m benchmarks.evaluate_speed --data FOLDER_OR_MANIFEST [--split test] [--model DIR] [--batch-size 8]
        [--repeats 3] [--threads N] [--json FILE]

Each run has a process of its own. Its time counts from loading the model to the last figure, reading and encoding the
audio included, and Python's start and imports not; the real-time factor is seconds of audio in a second of it. Memory
is the peak resident set, and what it is above a process that has only imported all of it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.tokenizer_memory import peak_bytes
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.evaluate import run
from training.manifest import Clip, read_manifest


def write_manifest(path: Path, clips: list[Clip], times: int) -> None:
    """The clips so many times over, as a manifest that can lie anywhere."""
    lines = []
    for clip in clips:
        about = {"path": str(clip.path.resolve()), "text": clip.text, "tags": list(clip.tags), "split": clip.split}
        about |= {"start": clip.start, "end": clip.end, "duration": clip.duration, **clip.labels}
        lines.append(json.dumps({key: value for key, value in about.items() if value is not None}) + "\n")
    path.write_text("".join(lines * times), encoding="utf-8")


def measure(model: str, manifest: Path, batch_size: int, threads: int | None) -> dict[str, float]:
    """One evaluation in this process, which should have done nothing else before.

    Returns:
        Seconds of `audio` and of `computing`; bytes: `imported`, the peak before, and `peak`, that after.
    """
    if threads:
        torch.set_num_threads(threads)
    imported, began = peak_bytes(), time.perf_counter()
    result = run(model, manifest, None, device="cpu", batch_size=batch_size, console=Console(file=io.StringIO()))
    computing = time.perf_counter() - began
    return {"audio": result.report.seconds, "computing": computing, "imported": imported, "peak": peak_bytes()}


def alone(*arguments: Any) -> dict[str, float]:
    """`measure` in a process of its own."""
    # Not forked: a fork of a process whose torch has threads can hang.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", help="only clips of this split")
    parser.add_argument("--model", default="box")
    parser.add_argument("--batch-size", type=int, default=8, help="windows scored at once, at most")
    parser.add_argument("--repeats", type=int, default=3, help="runs on each corpus; the median time counts")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    report: dict[str, Any] = {"model": options.model, "batch_size": options.batch_size, "threads": options.threads}
    try:
        clips = read_manifest(options.data, options.split).clips
        with tempfile.TemporaryDirectory() as folder:
            for name, times in (("once", 1), ("twice", 2)):
                manifest = Path(folder) / f"{name}.jsonl"
                write_manifest(manifest, clips, times)
                runs = [
                    alone(options.model, manifest, options.batch_size, options.threads) for _ in range(options.repeats)
                ]
                seconds = [found["computing"] for found in runs]
                report[name] = {
                    "audio_s": runs[0]["audio"],
                    "real_time_factor": runs[0]["audio"] / statistics.median(seconds),
                    "seconds": seconds,
                    "peak_bytes": max(found["peak"] for found in runs),
                    "above_imports_bytes": max(found["peak"] - found["imported"] for found in runs),
                }
                row = report[name]
                print(
                    f"{name:6s} {row['audio_s']:8.1f} s of audio   {row['real_time_factor']:6.1f} x real time "
                    f"({min(seconds):.2f} to {max(seconds):.2f} s)   peak {row['peak_bytes'] / 2**30:.3f} GiB, "
                    f"{row['above_imports_bytes'] / 2**30:.3f} above imports",
                    flush=True,
                )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    growth = report["twice"]["peak_bytes"] - report["once"]["peak_bytes"]
    print(f"twice the corpus: {growth / 2**20:+.1f} MiB")
    if options.json:
        with replacing(options.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
