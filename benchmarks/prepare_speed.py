"""Speed of `hybridlm prepare`: seconds of audio encoded in a second, with one worker and with more.

    python -m benchmarks.prepare_speed --data FOLDER_OR_MANIFEST [--split test] [--tokenizer box] [--workers 1 2]
        [--rounds 3] [--threads N] [--json FILE]

The numbers of workers take turns, each into a new folder, so that a busy machine slows all alike. Time counts from
reading the manifest to the finished cache; the tokenizer is loaded each time, as the command does.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.tokenizer_speed import spread
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.prepare import prepare


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of workers."""
    found: dict[int, list[float]] = {workers: [] for workers in options.workers}
    audio_s, clips = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            # Each round the other way about; in the first, files come from the disk, later from main memory.
            for workers in options.workers if number % 2 == 0 else reversed(options.workers):
                output, begin = Path(folder) / f"{number}-{workers}", time.perf_counter()
                report = prepare(
                    options.data,
                    output,
                    options.tokenizer,
                    workers=workers,
                    split=options.split,
                    console=Console(file=io.StringIO()),
                )
                found[workers].append(report.seconds / (time.perf_counter() - begin))
                audio_s, clips = report.seconds, report.num_clips
            print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
    return [
        {"workers": workers, "clips": clips, "audio_s": audio_s, "times_real_time": spread(factors)}
        for workers, factors in found.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table."""
    lines = ["| workers | clips | minutes of audio | times real time (slowest-fastest) |", "|---|---|---|---|"]
    for row in rows:
        t = row["times_real_time"]
        lines.append(
            f"| {row['workers']} | {row['clips']} | {row['audio_s'] / 60:.1f} | {t['median']:.1f} "
            f"({t['min']:.1f}-{t['max']:.1f}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", help="only clips of this split")
    parser.add_argument("--tokenizer", default="box")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; medians count")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or min(options.workers) < 1:
        parser.error("--rounds must be at least 2, --workers at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        rows = measure(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(rows))
    if options.json:
        report = {"tokenizer": options.tokenizer, "threads": torch.get_num_threads(), "rows": rows}
        with replacing(options.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
