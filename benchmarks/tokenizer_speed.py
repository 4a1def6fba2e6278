"""Speed, memory and training throughput of tokenizers, beside the `encodec` package in the same process, in turns.

    python -m benchmarks.tokenizer_speed [--tokenizer NAME_OR_DIR ...] [--large] [--batch 1 8] [--seconds 10]
        [--repeats 7] [--audio FILE] [--hours H] [--training STEPS] [--no-speed] [--threads N] [--json FILE]

Without --tokenizer: the box and published layouts with random weights, `random:NAME` (weights change nothing in what is
computed); --large adds DashengTokenizer's published layout, `random:dasheng-published`.

Speed: encoding is waveform to codes, decoding codes or latents to waveform. A real-time factor is seconds of computing
a second of audio, all rows of the batch counted. The package's 24 kHz model runs at 6 kbit/s with random weights on as
many rows of as many seconds; its turns come between the tokenizer's, so that a busy machine slows both. Memory
(--hours): peak resident memory above the loaded tokenizer while a recording of H hours streams through, in a process of
its own. Training (--training): the loop on recipes of configs/, on noise.

All layouts take more than an hour: a JSON file keeps what was measured before of other tokenizers, batches and recipes,
so that it can be filled in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encodec import EncodecModel

from benchmarks import tokenizer_memory, tokenizer_training
from benchmarks.tokenizer_layouts import layout_names, open_tokenizer
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import Tokenizer

PEER_RATE_HZ = 24_000
PEERS = {"encode": "encode", "decode codes": "decode", "decode latents": "decode"}
"""What of the package does the job of each of ours."""
KEYS = {"speed": ("tokenizer", "batch", "job"), "memory_bytes": ("tokenizer",), "training": ("recipe",)}
"""What tells the rows of each part of a report apart."""


def package_model() -> EncodecModel:
    """The package's 24 kHz model with random weights and codebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch on the package's weight_norm
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    model.set_target_bandwidth(6.0)
    return model


def waveform_of(audio: Path | None, sample_rate_hz: int, seconds: float, batch: int) -> torch.Tensor:
    """(B, 1, S): the beginning of a file, repeated if short, or noise."""
    samples = int(seconds * sample_rate_hz)
    if audio is None:
        return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(0))
    waveform = read_audio(audio, sample_rate_hz, duration=seconds)
    return waveform.repeat(1, -(-samples // waveform.shape[-1]))[None, :, :samples].repeat(batch, 1, 1)


def actions(
    tokenizer: Tokenizer, waveform: torch.Tensor, model: EncodecModel, theirs: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    frames = tokenizer.encode(waveform)
    encoded = model.encode(theirs)
    return {
        "encode": lambda: tokenizer.encode(waveform),
        "encodec encode": lambda: model.encode(theirs),
        "decode codes": lambda: tokenizer.decode_codes(frames.codes),
        "encodec decode": lambda: model.decode(encoded),
        "decode latents": lambda: tokenizer.decode_latents(frames.latents),
    }


def measure(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds per repeat of each job; every round runs all of them, in an order that turns round each time."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(repeats):
        names = list(jobs) if round_number % 2 == 0 else list(reversed(jobs))
        for name in names:
            begin = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - begin)
        print(f"round {round_number + 1}/{repeats}", file=sys.stderr)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "min": min(values), "max": max(values)}


def compare(seconds: dict[str, list[float]], audio_s: float) -> list[dict[str, Any]]:
    """Per job its real-time factor, the package's, and the ratio of medians with the spread of the rounds' ratios."""
    rows = []
    for job, peer in PEERS.items():
        ours, theirs = seconds[job], seconds[f"encodec {peer}"]
        times_faster = {
            "ratio_of_medians": statistics.median(theirs) / statistics.median(ours),
            "per_round": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
        }
        factor, peer_factor = (spread([value / audio_s for value in values]) for values in (ours, theirs))
        rows.append(
            {"job": job, "real_time_factor": factor, "encodec_real_time_factor": peer_factor}
            | {"times_faster": times_faster}
        )
    return rows


@torch.inference_mode()
def speeds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per tokenizer, batch size and job; each is printed when it is known."""
    print(
        f"{options.seconds:g} s of audio a row, {torch.get_num_threads()} threads, {options.repeats} rounds; "
        "real-time factor: median (min, max); times faster than the encodec package: ratio of medians (rounds: "
        "quartiles; min, max)"
    )
    model, rows = package_model(), []
    for name in options.tokenizer:
        tokenizer = open_tokenizer(name)
        bits = tokenizer.num_codebooks * math.log2(tokenizer.codebook_size) * tokenizer.frame_rate_hz
        for batch in options.batch:
            ours = waveform_of(options.audio, tokenizer.sample_rate_hz, options.seconds, batch)
            theirs = waveform_of(options.audio, PEER_RATE_HZ, options.seconds, batch)
            found = measure(actions(tokenizer, ours, model, theirs), options.repeats)
            for row in compare(found, options.seconds * batch):
                how = {"audio_s": options.seconds, "rounds": options.repeats, "threads": torch.get_num_threads()}
                rows.append({"tokenizer": name, "bits_per_second": bits, "batch": batch, **how, **row})
                factor, faster = row["real_time_factor"], row["times_faster"]
                rounds = faster["per_round"]
                print(
                    f"  {name:30s} {bits / 1000:5.1f} kbit/s  batch {batch:2d}  {row['job']:14s} "
                    f"{factor['median']:8.4f} ({factor['min']:.4f}, {factor['max']:.4f})   "
                    f"{faster['ratio_of_medians']:6.2f}x ({rounds['lower_quartile']:.2f} to "
                    f"{rounds['upper_quartile']:.2f}; {rounds['min']:.2f}, {rounds['max']:.2f})",
                    flush=True,
                )
    return rows


def memories(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per tokenizer."""
    print("peak resident memory of streaming, in MiB: loaded; above it after the first minute / after all of it")
    rows = []
    for name in options.tokenizer:
        row = tokenizer_memory.measure(name, 60 * options.hours, options.threads)
        rows.append(row)
        loaded, first, last = (row[key] / 2**20 for key in ("loaded", "after_first_minute", "after_all"))
        print(f"  {name:30s} {loaded:7.1f}   {first:+7.1f} / {last:+7.1f} ({row['minutes']:g} min)", flush=True)
    return rows


def trainings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per recipe."""
    rows = [tokenizer_training.measure(recipe, options.training) for recipe in tokenizer_training.RECIPES]
    print(f"training, mean of {options.training} steps: seconds of audio a second")
    for row in rows:
        print(f"  {row['recipe']:30s} {row['audio_s_per_s']:6.1f}   ({row['batch_size']} x {row['segment_s']:g} s)")
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", nargs="+", help="folders, box, encodec, hf:ID, or random:LAYOUT")
    parser.add_argument("--large", action="store_true", help="with the layouts of more than half a billion weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows at once")
    parser.add_argument("--audio", type=Path, help="file whose beginning is coded, repeated if short; noise by default")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-speed", action="store_true", help="memory or training alone")
    parser.add_argument("--hours", type=float, help="also stream so many hours and tell the peak memory")
    parser.add_argument("--training", type=int, metavar="STEPS", help="also time so many steps of training")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.repeats < 3:
        parser.error(f"--repeats={options.repeats} must be at least 3, for a spread")
    for name in ("seconds", "hours", "training", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}={value} must be positive")
    if min(options.batch) < 1:
        parser.error(f"--batch={min(options.batch)} must be at least 1")
    options.tokenizer = options.tokenizer or ["box", *layout_names(large=options.large)]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "encodec_weights": "random"}
    try:
        if not options.no_speed:
            report["speed"] = speeds(options)
        if options.hours:
            report["memory_bytes"] = memories(options)
        if options.training:
            report["training"] = trainings(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.is_file() else {}
        with replacing(options.json) as path:
            path.write_text(json.dumps(joined(before, report), indent=2) + "\n")
    return 0


def joined(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """A report with the rows of an earlier one that it has nothing in place of."""
    whole = {**before, **report}
    for part, keys in KEYS.items():
        new = report.get(part, [])
        known = {tuple(row[key] for key in keys) for row in new}
        old = [row for row in before.get(part, []) if tuple(row[key] for key in keys) not in known]
        if old or new:
            whole[part] = old + new
    return whole


if __name__ == "__main__":
    sys.exit(main())
