"""What fine-tuning changed: likelihood of held-out and of old recordings, before and after, and the output itself.

An adapter that does nothing, or a model that forgot what it knew, has to show here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridlm.checkpoint import Checkpoint
from hybridlm.likelihood import ClipNLL, Interval, paired_difference
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.corpus import TokenCache, prepare
from training.evaluate import WINDOW_SECONDS
from training.listening import Sampler
from training.manifest import Manifest, read_manifest
from training.scoring import score_clips

FILE_NAME = "finetune.json"
SCORED_CLIPS = 60
"""Most clips, evenly spread, on which the model before and the model after are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Nats a frame of the same clips by the model before and the model after."""

    before: dict[str, float]
    """By stream: `codes`, `latents`, `stop`, and `total`."""
    after: dict[str, float]
    difference: Interval
    """After minus before, of the total, paired by clip; below 0 is better."""
    num_clips: int
    of_clips: int
    """How many there are; some, evenly spread, are scored."""

    def line(self) -> str:
        """For a person."""
        d = self.difference
        which = f"{self.num_clips} clips" + (f" of {self.of_clips}" if self.of_clips > self.num_clips else "")
        return (
            f"{self.before['total']:.3f} -> {self.after['total']:.3f} nats a frame, "
            f"change {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] on {which}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputChange:
    """What two models make of one request at one seed."""

    name: str
    identical: bool
    """To the last bit."""
    first_difference_s: float | None
    difference_db: float | None
    """Level of the difference against the first model's output."""

    def line(self) -> str:
        """For a person."""
        if self.identical:
            return f"{self.name} at a fixed seed: the same to the last bit"
        where = f"{self.first_difference_s:.2f} s"
        return f"{self.name} at a fixed seed: differs from {where} on, by {self.difference_db:+.1f} dB"


def compare(before: Checkpoint, after: Checkpoint, cache: TokenCache, *, most: int = SCORED_CLIPS) -> Change:
    """Score clips of a cache by two models that share tokenizer and text."""
    count = min(len(cache), most)
    indices = [number * len(cache) // count for number in range(count)]
    clips = {}
    for name, found in (("before", before), ("after", after)):
        config = found.model.config
        window = min(config.max_frames, max(2, round(WINDOW_SECONDS * config.frame_rate_hz)))
        clips[name] = [clip.nll for clip in score_clips(found, cache, window_frames=window, indices=indices)]
    return Change(
        before=_means(clips["before"]),
        after=_means(clips["after"]),
        difference=paired_difference(clips["after"], clips["before"], lambda clip: clip.total),
        num_clips=count,
        of_clips=len(cache),
    )


def compare_output(before: Checkpoint, after: Checkpoint, sampler: Sampler) -> list[OutputChange]:
    """What both models make of the sampler's requests, which have fixed seeds."""
    ours, theirs = ({s.name: s for s in sampler(c.model, c.tokenizer, c.text)} for c in (before, after))
    changes = []
    for name in ours.keys() & theirs.keys():
        first, second, rate = ours[name].waveform, theirs[name].waveform, ours[name].sample_rate_hz
        length = max(len(first), len(second))
        first, second = (torch.nn.functional.pad(x, (0, length - len(x))) for x in (first, second))
        places = (first != second).nonzero()
        same = len(ours[name].waveform) == len(theirs[name].waveform) and len(places) == 0
        power = [max(float(x.double().square().mean()), 1e-12) for x in (second - first, first)]
        changes.append(
            OutputChange(
                name=name,
                identical=same,
                first_difference_s=None if same else (int(places[0]) / rate if len(places) else length / rate),
                difference_db=None if same else 10 * math.log10(power[0] / power[1]),
            )
        )
    return sorted(changes, key=lambda change: change.name)


def old_recordings(data: Path, output: Path, found: Checkpoint) -> tuple[TokenCache, int]:
    """A cache of recordings that the model should not forget, and how many there are.

    Of a source that is no cache, as many clips as are compared, evenly spread, are encoded into `output`.

    Raises:
        UserError: nothing usable.
    """
    if (data / "meta.json").is_file():
        cache = TokenCache(data, tokenizer=found.tokenizer)
        return cache, len(cache)
    manifest = read_manifest(data)
    count = min(len(manifest.clips), SCORED_CLIPS)
    clips = [manifest.clips[number * len(manifest.clips) // count] for number in range(count)]
    chosen = Manifest(source=manifest.source, clips=clips, problems=manifest.problems)
    prepare(chosen, output, found.tokenizer, workers=1)
    return TokenCache(output, tokenizer=found.tokenizer), len(manifest.clips)


def changes_nothing(held_out: Change, outputs: Sequence[OutputChange]) -> bool:
    """Whether the model after is the model before, as far as anyone can tell."""
    return held_out.before == held_out.after and all(change.identical for change in outputs)


def write_report(output: Path, report: Mapping[str, Any]) -> None:
    """Write the figures into the output folder, as JSON.

    Raises:
        UserError: the folder can't be written.
    """
    with replacing(output / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _means(clips: Sequence[ClipNLL]) -> dict[str, float]:
    frames = sum(clip.num_frames for clip in clips)
    if frames == 0:
        raise UserError("there is no frame to score; give longer recordings")
    return {
        "codes": sum(sum(clip.codes) for clip in clips) / frames,
        "latents": sum(clip.latents for clip in clips) / frames,
        "stop": sum(clip.stop for clip in clips) / frames,
        "total": sum(clip.total for clip in clips) / frames,
    }
