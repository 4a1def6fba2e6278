"""Seconds of audio made in a second of computing, decoding included; offline and streamed, and the time to first sound.

    python benchmarks/generation_speed.py [--model DIR] [--duration 10] [--repeats 5] [--threads 2] [--json FILE]

The first run is left out (it warms caches up); the median of the others is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import sampling.pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="box")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds of audio a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=4, help="rows of the batched run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = sampling.pipeline.load(args.model)
    tags = ("music",) if "music" in model.tags else ()
    cases: dict[str, dict[str, Any]] = {
        "one": {},
        "one, guided (cfg 2)": {"cfg": 2.0},
        f"{args.num_samples} at once": {"num_samples": args.num_samples},
    }
    report: dict[str, float] = {}
    for name, options in cases.items():
        speeds = []
        for run in range(args.repeats + 1):
            began = time.perf_counter()
            audio = model.generate(tags=tags, duration=args.duration, seed=run, **options)
            speeds.append(audio.seconds_made / (time.perf_counter() - began))
        report[name] = statistics.median(speeds[1:])
        print(f"{name:24s} {report[name]:6.2f} x real time")

    speeds, firsts = [], []
    for run in range(args.repeats + 1):
        began, samples, first = time.perf_counter(), 0, None
        for piece in model.stream(tags=tags, duration=args.duration, seed=run):
            first = time.perf_counter() - began if first is None else first
            samples += piece.shape[-1]
        speeds.append(samples / model.sample_rate_hz / (time.perf_counter() - began))
        firsts.append(first or 0.0)
    report["streamed"] = statistics.median(speeds[1:])
    report["seconds to the first sound"] = statistics.median(firsts[1:])
    print(f"{'streamed':24s} {report['streamed']:6.2f} x real time")
    print(f"{'to the first sound':24s} {report['seconds to the first sound'] * 1000:6.1f} ms")
    if args.json:
        settings = {"model": str(args.model), "duration_s": args.duration, "threads": args.threads}
        args.json.write_text(json.dumps({**settings, "speed": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
