"""Copies of recordings, a little faster or slower and off the frame grid, so that a small corpus lasts longer.

    python -m training.perturb SOURCE OUTPUT [--where set=kathleen] [--speeds 0.92 0.96 1 1 1 1.04 1.08] [--seed N]

A copy at speed s is the recording resampled, which moves pitch and tempo together (Ko et al. 2015), after a random
silence of less than a frame: even at speed 1 its frames hold other parts of the sound, and so other codes, than the
original's. OUTPUT gets FLAC files and a `manifest.jsonl` with the originals' labels and texts, and the label `speed`.
Clips with texts that a cache holds back for validation are held back in their copies too, for that depends on the text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchaudio.functional import resample

from tokenizer.audio import read_audio, write_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.manifest import Clip, TagRule, apply_rules, read_manifest

SAMPLE_RATE_HZ = 24000
LARGEST_DELAY_S = 0.04
"""A frame of the box codec."""
SPEEDS = (0.92, 0.96, 1.0, 1.0, 1.0, 1.04, 1.08)
SLOWEST, FASTEST = 0.5, 2.0


def perturb(
    source: Path, output: Path, *, speeds: Sequence[float] = SPEEDS, where: dict[str, str] | None = None, seed: int = 0
) -> tuple[int, list[str]]:
    """Write a copy of every clip of split `train`, or without a split, at every one of `speeds`.

    Args:
        source: As `training.manifest.read_manifest` takes it.
        output: Folder for `N-NNNNN.flac`, N the place in `speeds`, and `manifest.jsonl`.
        speeds: Two decimals each; a speed may come several times, each time with other delays.
        where: Labels of the clips to be copied, as in a `TagRule`.
        seed: Of the delays.

    Returns:
        The number of copies, and a line for each clip that could not be read.

    Raises:
        UserError: no clip matches, or a speed is out of range.
    """
    for speed in speeds:
        if not SLOWEST <= speed <= FASTEST or abs(speed * 100 - round(speed * 100)) > 1e-6:
            raise UserError(f"speed {speed} must be from {SLOWEST} to {FASTEST}, in steps of 0.01")
    clips = read_manifest(source, "train").clips
    clips = list(apply_rules(clips, [TagRule(where=where or {}, keep_tags=True)]))
    if not clips:
        raise UserError(f"{source} has no clip with {where}; check --where")
    output.mkdir(parents=True, exist_ok=True)
    delays = random.Random(seed)
    rows: list[dict[str, object]] = []
    problems: list[str] = []
    for number, clip in enumerate(clips):
        drawn = [delays.uniform(0.0, LARGEST_DELAY_S) for _ in speeds]
        try:
            waveform = read_audio(clip.audio, SAMPLE_RATE_HZ, clip.start, clip.read_duration)
        except UserError as error:
            problems.append(str(error))
            continue
        for place, (speed, delay) in enumerate(zip(speeds, drawn, strict=True)):
            # Played at 24 kHz, what was resampled from 100 s to 100 is s times as fast.
            copy = resample(waveform, round(100 * speed), 100) if speed != 1.0 else waveform
            copy = torch.cat([torch.zeros(1, round(delay * SAMPLE_RATE_HZ)), copy], dim=1)
            name = f"{place}-{number:05d}.flac"
            write_audio(output / name, copy, SAMPLE_RATE_HZ)
            rows.append(_row(name, copy.shape[1] / SAMPLE_RATE_HZ, speed, clip))
        if (number + 1) % 500 == 0:
            print(f"{number + 1}/{len(clips)} clips", file=sys.stderr, flush=True)
    with replacing(output / "manifest.jsonl") as path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows), problems


def _row(name: str, duration: float, speed: float, clip: Clip) -> dict[str, object]:
    row: dict[str, object] = {**clip.labels, "path": name, "duration": round(duration, 3), "split": "train"}
    row |= {"speed": f"{speed:g}", "source": clip.key}
    if clip.text:
        row["text"] = clip.text
    if clip.tags:
        row["tags"] = list(clip.tags)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Copy recordings a little faster and slower.")
    parser.add_argument("source", type=Path, help="a folder or a manifest")
    parser.add_argument("output", type=Path)
    parser.add_argument("--where", nargs="*", default=[], metavar="label=value", help="which clips; none: all")
    parser.add_argument("--speeds", nargs="+", type=float, default=list(SPEEDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unclear := [pair for pair in arguments.where if "=" not in pair]:
        parser.error(f"--where {unclear[0]} must be label=value")
    where = dict(pair.split("=", 1) for pair in arguments.where)
    try:
        count, problems = perturb(
            arguments.source, arguments.output, speeds=arguments.speeds, where=where, seed=arguments.seed
        )
    except UserError as error:
        print(f"perturb: error: {error}", file=sys.stderr)
        sys.exit(2)
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    print(f"{count} copies in {arguments.output}, {len(problems)} clips skipped")


if __name__ == "__main__":
    main()
