"""What a codec keeps of real recordings: from its latents, and from its first 1, 2, 4 and 8 codebooks.

    python benchmarks/codec_quality.py --tokenizer DIR --manifest M --split test --sets kathleen librispeech berklee \\
        [--limit 50] [--codebooks 1 2 4 8] [--workers 2] [--json FILE]

Every clip is coded whole, decoded, cut to its own length and compared with itself as read (mono, at the tokenizer's
rate). Figures are means over clips with 95 % bootstrap intervals. STOI and PESQ-WB are taken of the sets in
--speech-sets only. Bits of codes are nominal (K log2 V times the frame rate); bits of latents are those of 16-bit
numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.metrics import (
    LATENT_BITS,
    AudioDistance,
    Interval,
    bootstrap_interval,
    codes_bitrate,
    compare_audio,
)
from training.index import VALIDATION, split_clips
from training.manifest import Clip, read_manifest

VALIDATION_FRACTION = 0.02
"""As in the recipes of the box."""

SPEECH_SETS = ("kathleen", "kerstin", "librispeech", "emodb", "digits")
COLUMNS = {
    "stoi": ("STOI", "{:.3f}"),
    "pesq_wb": ("PESQ-WB", "{:.2f}"),
    "mel_distance": ("mel distance", "{:.3f}"),
    "mel_cepstral_distortion_db": ("MCD (dB)", "{:.2f}"),
    "si_sdr_db": ("SI-SDR (dB)", "{:.1f}"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReport:
    """One clip's distances by source (`latents`, `codes 1`, ...), its codes, or why there are none."""

    set_name: str
    key: str
    distances: dict[str, AudioDistance]
    codes: torch.Tensor | None
    problem: str | None = None


@functools.cache
def tokenizer_of_process(name_or_dir: str) -> Tokenizer:
    """Each worker loads the tokenizer once."""
    return load_tokenizer(name_or_dir)


@torch.inference_mode()
def judge(job: tuple[str, Clip, str, tuple[int, ...], bool]) -> ClipReport:
    """Code, decode and compare one clip."""
    name_or_dir, clip, set_name, codebooks, speech = job
    tokenizer = tokenizer_of_process(name_or_dir)
    try:
        waveform = read_audio(clip.audio, tokenizer.sample_rate_hz, clip.start, clip.read_duration)
    except UserError as error:
        return ClipReport(set_name=set_name, key=clip.key, distances={}, codes=None, problem=str(error))
    frames = tokenizer.encode(waveform[None])
    decoded = {"latents": tokenizer.decode_latents(frames.latents)}
    for count in codebooks:
        decoded[f"codes {count}"] = tokenizer.decode_codes(frames.codes[:, :count])
    distances = {
        source: compare_audio(waveform[0], audio[0, 0, : waveform.shape[-1]], tokenizer.sample_rate_hz, speech=speech)
        for source, audio in decoded.items()
    }
    return ClipReport(set_name=set_name, key=clip.key, distances=distances, codes=frames.codes[0].to(torch.int32))


def reports(jobs: Sequence[Any], workers: int) -> Iterator[ClipReport]:
    """Judge all clips, telling how far it is; in no fixed order when there are several workers."""
    if workers == 1:
        results: Iterator[ClipReport] = map(judge, jobs)
        yield from _told(results, len(jobs))
        return
    # Not forked: a fork of a process whose torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from _told(pool.imap_unordered(judge, jobs), len(jobs))


def _told(results: Iterator[ClipReport], total: int) -> Iterator[ClipReport]:
    for number, report in enumerate(results, start=1):
        first = next(iter(report.distances.values()), None)
        what = report.problem or (f"latents: STOI {first.stoi:.3f}, PESQ {first.pesq_wb:.2f}" if first else "")
        print(f"{number}/{total} {report.set_name} {report.key}: {what}", file=sys.stderr, flush=True)
        yield report


def choose(manifest: Path, split: str, sets: Sequence[str] | None, limit: int | None) -> list[tuple[str, Clip]]:
    """Clips of the asked-for sets (label `set`), evenly spread over a set where there is a limit."""
    clips: dict[str, list[Clip]] = {}
    # `validation` is what the recipes in configs/ hold back of the training split: for choosing, where test is not.
    held_out = VALIDATION_FRACTION if split == VALIDATION else 0.0
    for clip in split_clips(read_manifest(manifest).clips, split, held_out):
        clips.setdefault(clip.labels.get("set", "all"), []).append(clip)
    wanted = list(clips) if not sets else list(sets)
    for name in wanted:
        if name not in clips:
            raise UserError(
                f"--sets {name}: {manifest} has no clip of that set in '{split}'; it has {', '.join(clips)}"
            )
    chosen = []
    for name in wanted:
        found = clips[name]
        count = len(found) if limit is None else min(limit, len(found))
        chosen += [(name, found[index * len(found) // count]) for index in range(count)]
    return chosen


def summarize(found: Sequence[ClipReport], tokenizer: Tokenizer, codebooks: Sequence[int]) -> list[dict[str, Any]]:
    """One row per set and source, in the order of appearance of the sets' names."""
    rows = []
    for set_name in dict.fromkeys(report.set_name for report in found):
        clips = sorted((r for r in found if r.set_name == set_name and r.codes is not None), key=lambda r: r.key)
        if not clips:
            continue
        codes = [clip.codes.long() for clip in clips if clip.codes is not None]
        for source in ["latents", *(f"codes {count}" for count in codebooks)]:
            row: dict[str, Any] = {"set": set_name, "source": source, "clips": len(clips)}
            if source == "latents":
                row["bits_per_second"] = tokenizer.latent_dim * LATENT_BITS * tokenizer.frame_rate_hz
            else:
                count = int(source.split()[1])
                rate = codes_bitrate([c[:count] for c in codes], tokenizer.codebook_size, tokenizer.frame_rate_hz)
                row["bits_per_second"] = rate.nominal_bits_per_second
                row["entropy_bits_per_second"] = rate.entropy_bits_per_second
                row["codes_used"] = rate.codes_used
            for field in COLUMNS:
                values = [getattr(clip.distances[source], field) for clip in clips]
                finite = [value if math.isfinite(value) else float("nan") for value in values]
                row[field] = asdict(bootstrap_interval(finite))
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| set | from | kbit/s | clips | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [row["set"], row["source"], f"{row['bits_per_second'] / 1000:.2f}", str(row["clips"])]
        for field, (_, form) in COLUMNS.items():
            interval = Interval(**row[field])
            mean, low, high = (form.format(value) for value in (interval.mean, interval.low, interval.high))
            missing = f", n={interval.count}" if interval.count != row["clips"] else ""
            cells.append(f"{mean} [{low}, {high}{missing}]" if interval.count else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", required=True, help="folder, or a name such as encodec")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest.jsonl or a folder of audio")
    parser.add_argument(
        "--split", default="test", help="test, train, or validation: what the recipes hold back of train"
    )
    parser.add_argument("--sets", nargs="+", help="values of the label 'set'; all of them by default")
    parser.add_argument("--speech-sets", nargs="*", default=list(SPEECH_SETS), help="sets that STOI and PESQ are for")
    parser.add_argument("--limit", type=int, help="clips per set, evenly spread; all of them by default")
    parser.add_argument("--codebooks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures, clip by clip too, here")
    options = parser.parse_args(arguments)
    for name in ("limit", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        codebooks = tuple(count for count in options.codebooks if 1 <= count <= tokenizer.num_codebooks)
        chosen = choose(options.manifest, options.split, options.sets, options.limit)
        jobs = [(options.tokenizer, clip, name, codebooks, name in options.speech_sets) for name, clip in chosen]
        found = list(reports(jobs, options.workers))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    order = list(dict.fromkeys(name for name, _ in chosen))
    found.sort(key=lambda report: (order.index(report.set_name), report.key))
    rows = summarize(found, tokenizer, codebooks)
    problems = [f"{report.key}: {report.problem}" for report in found if report.problem]
    print(table(rows))
    if problems:
        print(f"\n{len(problems)} of {len(found)} clips left out, the first: {problems[0]}")
    if options.json:
        clips = [
            finite({"set": r.set_name, "clip": r.key, "source": source, **asdict(distance)})
            for r in found
            for source, distance in r.distances.items()
        ]
        report = {
            "tokenizer": str(options.tokenizer),
            "fingerprint": tokenizer.fingerprint(),
            "split": options.split,
            "rows": [finite(row) for row in rows],
            "clips": clips,
            "problems": problems,
        }
        with replacing(options.json) as path:
            path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0 if rows else 2


def finite(value: Any) -> Any:
    """With null for every number that JSON can't hold."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
