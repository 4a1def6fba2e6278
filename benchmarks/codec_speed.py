"""Codec speed against the `encodec` package, on the same audio, in the same process, taking turns.

    python benchmarks/codec_speed.py --tokenizer DIR [--audio FILE] [--seconds 10] [--repeats 15] [--threads N]
        [--json FILE]

The package's model runs at 6 kbit/s. Its weights are random: their values change nothing in what is computed. Encoding
is waveform to codes, decoding is codes to waveform (and, for ours, latents to waveform too).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encodec import EncodecModel

from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import Tokenizer
from tokenizer.loading import load_tokenizer


def package_model() -> EncodecModel:
    """The package's 24 kHz model with random weights and codebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch on the package's weight_norm
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    model.set_target_bandwidth(6.0)
    return model


def actions(tokenizer: Tokenizer, model: EncodecModel, waveform: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each pair `ours ...` and `encodec ...` does the same job."""
    frames = tokenizer.encode(waveform)
    encoded = model.encode(waveform)
    return {
        "ours encode": lambda: tokenizer.encode(waveform),
        "encodec encode": lambda: model.encode(waveform),
        "ours decode codes": lambda: tokenizer.decode_codes(frames.codes),
        "encodec decode codes": lambda: model.decode(encoded),
        "ours decode latents": lambda: tokenizer.decode_latents(frames.latents),
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


def compare(seconds: dict[str, list[float]], duration_s: float) -> dict[str, Any]:
    """Seconds of each job, and per direction the ratio of medians with the spread of the rounds' own ratios."""
    report: dict[str, Any] = {"audio_s": duration_s, "seconds": {}, "times_faster": {}}
    for name, values in seconds.items():
        report["seconds"][name] = spread(values)
    for ours, theirs in (
        ("encode", "encode"),
        ("decode codes", "decode codes"),
        ("decode latents", "decode codes"),
    ):
        mine, peer = seconds[f"ours {ours}"], seconds[f"encodec {theirs}"]
        ratios = [b / a for a, b in zip(mine, peer, strict=True)]
        report["times_faster"][ours] = {
            "ratio_of_medians": statistics.median(peer) / statistics.median(mine),
            "per_round": spread(ratios),
        }
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", required=True, help="folder of our tokenizer, or a name such as encodec")
    parser.add_argument("--audio", type=Path, help="file whose beginning is coded, repeated if short; noise by default")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.repeats < 3:
        parser.error(f"--repeats={options.repeats} must be at least 3, for a spread")
    if options.seconds <= 0:
        parser.error(f"--seconds={options.seconds} must be positive")
    return options


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        samples = int(options.seconds * tokenizer.sample_rate_hz)
        if options.audio:
            waveform = read_audio(options.audio, tokenizer.sample_rate_hz, duration=options.seconds)
            waveform = waveform.repeat(1, -(-samples // waveform.shape[-1]))[None, :, :samples]
        else:
            waveform = 0.1 * torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(0))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    report = compare(measure(actions(tokenizer, package_model(), waveform), options.repeats), options.seconds)
    report |= {"tokenizer": str(options.tokenizer), "threads": torch.get_num_threads(), "repeats": options.repeats}
    report["encodec_weights"] = "random"
    print(f"{options.seconds:g} s of audio, {report['threads']} threads, {options.repeats} rounds; seconds, median:")
    for name, figures in report["seconds"].items():
        print(f"  {name:22s} {figures['median']:7.3f}   (min {figures['min']:.3f}, max {figures['max']:.3f})")
    print("times faster than the encodec package (random weights there, 6 kbit/s):")
    for name, figures in report["times_faster"].items():
        rounds = figures["per_round"]
        print(
            f"  {name:22s} {figures['ratio_of_medians']:7.2f}   "
            f"(rounds: quartiles {rounds['lower_quartile']:.2f} to {rounds['upper_quartile']:.2f}, "
            f"min {rounds['min']:.2f}, max {rounds['max']:.2f})"
        )
    if options.json:
        with replacing(options.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
