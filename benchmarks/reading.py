"""Whether a model reads its text: likelihood of recordings given their own text, another clip's, and none.

    python -m benchmarks.reading --caches DIR [DIR ...] [--model DIR] [--split validation] [--where set=kathleen]
        [--tag speech --tag speaker:kathleen] [--count N] [--json FILE]

The caches are `hybridlm prepare`'s. Each clip is scored as `hybridlm evaluate` does, three times, with the same noise.
What the right text is worth against another is the mean over frames of the difference, paired by clip, with a 95 %
interval by bootstrap over clips: near 0 for a model that only listens, whatever its speech sounds like.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hybridlm.checkpoint import load_model, resolve
from hybridlm.likelihood import ClipNLL, bootstrap_ratio, paired_difference
from training.corpus import CachedClip, TokenCache
from training.manifest import TagRule
from training.scoring import score_clips

STREAMS: dict[str, Callable[[ClipNLL], float]] = {
    "first code": lambda nll: nll.codes[0] if nll.codes else 0.0,
    "codes": lambda nll: sum(nll.codes),
    "latents": lambda nll: nll.latents,
    "total": lambda nll: nll.total,
}


class Retold(TokenCache):
    """The clips that have a text, each told its own (`right`), the next one's (`wrong`), or `none`."""

    telling = "right"
    count = 0

    def __len__(self) -> int:
        return min(self.count, super().__len__())

    def __getitem__(self, clip: int) -> CachedClip:
        found = super().__getitem__(clip)
        if self.telling == "right":
            return found
        other = self.index.clip((clip + 1) % len(self)).text if self.telling == "wrong" else None
        return replace(found, text=other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="box")
    parser.add_argument("--split", default="validation", help="test, or the part of train that training holds back")
    parser.add_argument("--validation-fraction", type=float, default=0.02)
    parser.add_argument("--where", default="set=kathleen", metavar="LABEL=VALUE")
    parser.add_argument("--tag", action="append", help="of all clips; none: speech and speaker:kathleen")
    parser.add_argument("--count", type=int, default=60, help="clips")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = load_model(resolve(args.model))
    label, _, value = args.where.partition("=")
    tags = tuple(args.tag or ("speech", "speaker:kathleen"))
    cache = Retold(
        args.caches,
        tokenizer=found.tokenizer,
        split=args.split,
        validation_fraction=args.validation_fraction,
        rules=(TagRule(where={label: value}, tags=tags),),
    )
    cache.count = args.count
    scores: dict[str, list[ClipNLL]] = {}
    for cache.telling in ("right", "wrong", "none"):
        with torch.inference_mode():
            scored = score_clips(found, cache, window_frames=found.model.config.max_frames)
            scores[cache.telling] = [clip.nll for clip in scored]
    frames = [nll.num_frames for nll in scores["right"]]
    report: dict[str, object] = {"clips": len(frames), "frames": sum(frames), "split": args.split, "where": args.where}
    print(f"{len(frames)} clips of {args.where}, split {args.split}; nats a frame [95 % interval]")
    print(f"{'':12}{'right text':>12}{'wrong - right':>26}{'none - right':>26}")
    for stream, nats in STREAMS.items():
        right = bootstrap_ratio([nats(nll) for nll in scores["right"]], frames)
        gains = {t: paired_difference(scores[t], scores["right"], nats) for t in ("wrong", "none")}
        shown = "".join(f"{f'{g.value:.3f} [{g.low:.3f}, {g.high:.3f}]':>26}" for g in gains.values())
        print(f"{stream:12}{right.value:12.3f}{shown}")
        report[stream] = {"right": asdict(right), **{f"{t} - right": asdict(g) for t, g in gains.items()}}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
