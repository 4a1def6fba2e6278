"""Fine-tuning a model on one voice: all weights against an adapter, by the likelihood of held-out test recordings.

    python -m benchmarks.finetune --data MANIFEST [--where set=kerstin] [--model box] [--kinds full lora] [--rank 16]
        [--output runs/finetune-benchmark] [key=value ...] [--threads N] [--markdown FILE] [--json FILE]

Clips of split `train` (and those of no split) are trained on, a tenth of which `hybridlm finetune` holds back to stop
by; clips of split `test` are scored before and after as `hybridlm evaluate` does. `key=value` are settings that
`hybridlm finetune` takes, such as max_steps=200. Interrupted, the same command goes on; what is finished is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.evaluate_speed import write_manifest
from hybridlm.likelihood import Interval, paired_difference
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training import evaluate
from training.finetune import run as finetune
from training.manifest import Clip, TagRule, read_manifest
from training.runs import INTERRUPTED, RESULT, read_result

KINDS = ("full", "lora")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What is trained on and what is scored, as manifests of their own."""

    train: Path
    test: Path
    minutes: float
    """Of the recordings to train on, as far as the manifest tells lengths."""
    num_train: int
    num_test: int


def split_corpus(data: Path, where: Sequence[str], output: Path) -> Corpus:
    """Write the manifests of the clips that meet the conditions.

    Raises:
        UserError: conditions of another form, or no clip to train on or to test on.
    """
    conditions = dict(condition.partition("=")[::2] for condition in where)
    if not all(conditions.values()):
        raise UserError(f"--where {' '.join(where)} must be label=value, such as set=kerstin")
    rule = TagRule(where=conditions)
    clips = [clip for clip in read_manifest(data).clips if rule.matches(clip)]
    parts: dict[str, list[Clip]] = {
        "train": [clip for clip in clips if clip.split in ("train", None)],
        "test": [clip for clip in clips if clip.split == "test"],
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        if not chosen:
            raise UserError(f"{data}: no clip of split {name} meets {' '.join(where) or 'no condition'}")
        write_manifest(output / f"{name}.jsonl", chosen, 1)
    minutes = sum(clip.duration or 0.0 for clip in parts["train"]) / 60
    return Corpus(
        train=output / "train.jsonl",
        test=output / "test.jsonl",
        minutes=minutes,
        num_train=len(parts["train"]),
        num_test=len(parts["test"]),
    )


def make(options: argparse.Namespace, corpus: Corpus, kind: str, before: evaluate.Evaluation) -> dict[str, Any] | None:
    """Fine-tune, or go on, and score; None when it was interrupted."""
    folder, settings = options.output / kind, settings_of(options, kind)
    if (done := read_result(folder, {"settings": settings})) is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    spent, begin = folder / "minutes.txt", time.perf_counter()
    model = folder / "model"
    finished = True
    if not (model / "finetune.json").is_file():
        rank = options.rank if kind == "lora" else None
        quiet = Console(file=io.StringIO())
        tuned = finetune(
            options.model, corpus.train, model, options.overrides, lora=kind == "lora", rank=rank, console=quiet
        )
        finished = tuned.finished
        earlier = float(spent.read_text(encoding="utf-8")) if spent.is_file() else 0.0
        spent.write_text(f"{earlier + (time.perf_counter() - begin) / 60}", encoding="utf-8")
    if not finished:
        return None
    after = score(options, corpus, model, kind)
    change = paired_difference(
        [clip.nll for clip in after.clips], [clip.nll for clip in before.clips], lambda clip: clip.total
    )
    about = json.loads((model / "finetune.json").read_text(encoding="utf-8"))
    result = {
        "settings": settings,
        "minutes": float(spent.read_text(encoding="utf-8")),
        "steps": about["steps"],
        "before": interval(before.report.total.nats_per_frame),
        "after": interval(after.report.total.nats_per_frame),
        "change": interval(change),
    }
    with replacing(folder / RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def score(options: argparse.Namespace, corpus: Corpus, model: Path | None, kind: str) -> evaluate.Evaluation:
    """The test clips' likelihood; None is the model before."""
    adapter = model if kind == "lora" else None
    found = options.model if model is None or adapter is not None else model
    return evaluate.run(found, corpus.test, None, adapter=adapter, batch_size=8, console=Console(file=io.StringIO()))


def settings_of(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "model": str(options.model),
        "data": str(options.data),
        "where": list(options.where),
        "overrides": list(options.overrides),
        "kind": kind,
        "rank": options.rank if kind == "lora" else None,
    }


def interval(found: Interval) -> list[float]:
    """Value, lower and upper end of 95 %."""
    return [found.value, found.low, found.high]


def markdown(report: dict[str, Any]) -> str:
    """A table."""
    lines = [
        f"{report['train_clips']} clips, {report['minutes_of_audio']:.0f} minutes to train on; {report['test_clips']} "
        "test clips; nats a frame with 95 % intervals, the change paired by clip",
        "",
        "| trained | minutes | steps | before | after | change |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in report["runs"].items():
        before, after, change = (
            "{:{sign}.2f} [{:{sign}.2f}, {:{sign}.2f}]".format(*row[name], sign="+" if name == "change" else "")
            for name in ("before", "after", "change")
        )
        what = "all weights" if kind == "full" else f"LoRA, rank {row['settings']['rank']}"
        lines.append(f"| {what} | {row['minutes']:.1f} | {row['steps']} | {before} | {after} | {change} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a manifest whose clips have splits")
    parser.add_argument("--where", nargs="*", default=["set=kerstin"], metavar="LABEL=VALUE")
    parser.add_argument("--model", default="box")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune-benchmark"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of `hybridlm finetune`")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_intermixed_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        corpus = split_corpus(options.data, options.where, options.output)
        before = score(options, corpus, None, "full")
        report: dict[str, Any] = {
            "train_clips": corpus.num_train,
            "test_clips": corpus.num_test,
            "minutes_of_audio": corpus.minutes,
            "runs": {},
        }
        for kind in options.kinds:
            made = make(options, corpus, kind, before)
            if made is None:
                print("interrupted; the same command goes on from here", file=sys.stderr)
                return INTERRUPTED
            report["runs"][kind] = made
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    for path, content in ((options.markdown, text), (options.json, json.dumps(report, indent=2))):
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
