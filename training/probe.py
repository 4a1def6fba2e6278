"""`hybridlm probe`: what a frozen representation knows of recordings, in the protocol of X-ARES.

Every table begins with a floor, the mean and standard deviation of a log-mel under the same protocol: what does not
beat it has not understood anything. So each figure also comes as its difference from the floor, paired by clip.

Shapes: N clips.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hybridlm.checkpoint import load_codec
from hybridlm.likelihood import Interval, bootstrap_ratio
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.loading import resolve_device
from tokenizer.settings import from_mapping
from training.classifiers import METHODS, Method, classify
from training.embeddings import FrameSource, Input, LogMel, TokenizerFrames, default_input, embed
from training.manifest import Clip, read_manifest
from training.partitions import Plan, ProbeTask, make_plan, select

_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRow:
    """One representation by one method."""

    representation: str
    dim: int
    """Width of a clip's vector."""
    method: Method
    accuracy: Interval
    """Share of the scored clips in [0, 1]."""
    over_floor: Interval | None
    """Accuracy minus the floor's by the same method, paired; None for the floor itself."""
    balanced_accuracy: float
    """Mean of the classes' own accuracies."""
    class_accuracy: dict[str, float]
    """By class, of those that are scored."""
    part_accuracy: dict[str, float]
    """By part: fold or group left out."""
    predictions: dict[str, str]
    """By the clip's key, in the order of the parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """All representations and methods on one task."""

    task: ProbeTask
    seed: int
    num_clips: int
    num_scored: int
    num_parts: int
    interval_over: str
    """`clips`, or `groups` where whole groups are left out: the clips of a speaker are not independent."""
    classes: dict[str, dict[str, int]]
    """By class, clips to learn from (`train`) and clips scored (`test`)."""
    chance: float
    majority: float
    """Accuracy of always naming the most frequent class of training."""
    unseen: dict[str, int]
    """Test clips by class that training lacks; they count as wrong."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    problems: tuple[str, ...]
    """One line for each file that could not be read."""
    labels: dict[str, str]
    """The true class by the clip's key, of those that are scored."""
    rows: tuple[ProbeRow, ...]
    """The floor's first."""


def run(
    tokenizer: str | Path,
    data: Path,
    task: Mapping[str, Any],
    *,
    input: Input | None = None,
    method: Method | None = None,
    device: str | None = None,
    seed: int = 42,
    json_file: Path | None = None,
    console: Console | None = None,
) -> ProbeReport:
    """Probe a tokenizer and print a table.

    Args:
        tokenizer: "box", "encodec", or a tokenizer's or model's folder.
        data: A manifest, or whatever `read_manifest` takes.
        task: Fields of `ProbeTask`.
        input: The view of it; None: features where it has them, else latents.
        method: None: both.
        device: Where frames are computed; None: CUDA where there is one.
        seed: Of the linear probe and of random folds.
        json_file: Where the figures go, with every clip's prediction.
        console: Where the table goes; standard output by default.

    Raises:
        UserError: a tokenizer or data that can't be read, a view that the tokenizer lacks, or what `probe` says.
    """
    wanted = from_mapping(ProbeTask, {name: value for name, value in task.items() if value}, where="probe")
    place = resolve_device(device)
    codec = load_codec(tokenizer, place)
    source = TokenizerFrames(codec, (input or default_input(codec),), str(tokenizer))
    manifest = read_manifest(data)
    report = probe(
        manifest.clips,
        wanted,
        [source],
        methods=METHODS if method is None else (method,),
        device=place,
        seed=seed,
        problems=manifest.problems,
    )
    show(report, str(data), console or Console())
    if json_file is not None:
        about = {"data": str(data), "tokenizer": str(tokenizer), "fingerprint": codec.fingerprint()}
        write_json(json_file, {**about, **dataclasses.asdict(report)})
    return report


def probe(
    clips: Sequence[Clip],
    task: ProbeTask,
    sources: Sequence[FrameSource],
    *,
    methods: Sequence[Method] = METHODS,
    device: str | torch.device = "cpu",
    seed: int = 42,
    problems: Sequence[str] = (),
    console: Console | None = None,
    when_scored: Callable[[ProbeRow], None] = lambda row: None,
) -> ProbeReport:
    """Embed the clips of a task with the floor and every source, and score all of them on the same clips.

    Args:
        clips: Of a manifest.
        task: What to tell, and how to divide the clips.
        sources: Representations to compare with the floor.
        methods: Probes to train.
        device: Where the floor is computed; the sources know where they are.
        seed: Of the linear probe and of random folds.
        problems: What was wrong with the manifest, for the report.
        console: Where progress and problems go; standard error by default.
        when_scored: Called with each row as it comes.

    Raises:
        UserError: the task does not suit the clips (see `select` and `make_plan`), or no file could be read.
    """
    chosen, notes = select(clips, task)
    make_plan(chosen, task, seed=seed)  # what is wrong with it is told before hours of encoding
    console = console or Console(stderr=True)
    everything: tuple[FrameSource, ...] = (LogMel(device), *sources)
    found = [embed(chosen, source, console=console) for source in everything]
    problems = list(dict.fromkeys([*problems, *(problem for one in found for problem in one.problems)]))
    _tell(console, problems, notes)
    kept = sorted(set.intersection(*(set(one.kept) for one in found)))
    if not kept:
        raise UserError(f"none of the {len(chosen)} files could be read, the first: {problems[0]}")
    plan = make_plan([chosen[i] for i in kept], task, seed=seed)
    vectors: dict[str, Tensor] = {}
    for one in found:
        rows = torch.tensor([one.kept.index(i) for i in kept], dtype=torch.long)
        vectors.update({name: table[rows] for name, table in one.vectors.items()})
    return score(plan, vectors, methods=methods, seed=seed, notes=notes, problems=problems, when_scored=when_scored)


def score(
    plan: Plan,
    vectors: Mapping[str, Float[Tensor, "N _"]],
    *,
    methods: Sequence[Method] = METHODS,
    seed: int = 42,
    notes: Sequence[str] = (),
    problems: Sequence[str] = (),
    when_scored: Callable[[ProbeRow], None] = lambda row: None,
) -> ProbeReport:
    """Train and score every representation by every method.

    Args:
        plan: Who learns from whom.
        vectors: By representation, one a clip of the plan; the first is the floor.
        methods: Probes to train.
        seed: Of the linear probe.
        notes: What was left out, for the report.
        problems: Files that could not be read, for the report.
        when_scored: Called with each row as it comes.
    """
    targets = torch.tensor(plan.targets)
    scored = torch.tensor([i for part in plan.parts for i in part.test])
    grouped = plan.task.leave_out is not None
    sizes = [len(part.test) for part in plan.parts]
    floor = next(iter(vectors))
    rights: dict[tuple[str, Method], Tensor] = {}
    rows = []
    for name, table in vectors.items():
        for method in methods:
            predicted = torch.cat(
                [
                    classify(
                        method, table[list(part.train)], targets[list(part.train)], table[list(part.test)], seed=seed
                    )
                    for part in plan.parts
                ]
            )
            right = (predicted == targets[scored]).double()
            rights[name, method] = right

            def interval(values: Tensor) -> Interval:
                if grouped:
                    return bootstrap_ratio([part.sum().item() for part in values.split(sizes)], sizes)
                return bootstrap_ratio(values.tolist(), [1.0] * len(values))

            by_class = {
                label: right[targets[scored] == number].mean().item()
                for number, label in enumerate(plan.classes)
                if bool((targets[scored] == number).any())
            }
            rows.append(
                ProbeRow(
                    representation=name,
                    dim=table.shape[1],
                    method=method,
                    accuracy=interval(right),
                    over_floor=None if name == floor else interval(right - rights[floor, method]),
                    balanced_accuracy=sum(by_class.values()) / len(by_class),
                    class_accuracy=by_class,
                    part_accuracy={
                        part.name: values.mean().item()
                        for part, values in zip(plan.parts, right.split(sizes), strict=True)
                    },
                    predictions={
                        plan.clips[i].key: plan.classes[c]
                        for i, c in zip(scored.tolist(), predicted.tolist(), strict=True)
                    },
                )
            )
            when_scored(rows[-1])
    return ProbeReport(
        task=plan.task,
        seed=seed,
        num_clips=len(plan.clips),
        num_scored=len(scored),
        num_parts=len(plan.parts),
        interval_over="groups" if grouped else "clips",
        classes=plan.counts(),
        chance=plan.chance,
        majority=plan.majority,
        unseen=plan.unseen,
        notes=tuple(notes),
        problems=tuple(problems),
        labels={plan.clips[i].key: plan.classes[plan.targets[i]] for i in scored.tolist()},
        rows=tuple(rows),
    )


def conditions(report: ProbeReport) -> list[str]:
    """What a report's figures rest on, a line each."""
    task = report.task
    of = f" ({', '.join(task.where)})" if task.where else ""
    if task.leave_out:
        how = f"one {task.leave_out} left out at a time ({report.num_parts})"
    elif task.folds:
        how = f"{report.num_parts} {'random folds' if task.folds.isdigit() else f'folds by {task.folds}'}"
    else:
        how = "split train learned from, split test scored"
    counts = ", ".join(f"{name} {n['train']}/{n['test']}" for name, n in report.classes.items())
    lines = [
        f"{task.label}{of}: {report.num_clips} clips, {report.num_scored} scored; {how}"
        + (f"; split {task.split} alone" if task.split else ""),
        f"chance {report.chance:.3f}, always the most frequent class {report.majority:.3f}; "
        f"[95 % interval over {report.interval_over}]; seed {report.seed}",
        f"{len(report.classes)} classes, clips to learn from/scored: {counts}",
    ]
    if report.unseen:
        lines.append(
            f"{sum(report.unseen.values())} test clips are of classes that their training lacks and count as wrong: "
            + ", ".join(report.unseen)
        )
    if report.problems:
        lines.append(f"{len(report.problems)} files could not be read and were skipped")
    return [*lines, *report.notes]


def cells(row: ProbeRow) -> list[str]:
    """A row of a table, in the order of `COLUMNS`."""
    over = "the floor" if row.over_floor is None else _interval(row.over_floor, sign="+")
    return [row.representation, row.method, _interval(row.accuracy), over, f"{row.balanced_accuracy:.3f}"]


COLUMNS = ("representation", "method", "accuracy", "above the floor", "balanced")


def show(report: ProbeReport, data: str, console: Console) -> None:
    """Print conditions and table."""
    for line in (f"probe of {data}", *conditions(report)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in COLUMNS:
        wide = name == "representation"  # a path, perhaps
        table.add_column(
            name,
            justify="left" if wide or name == "method" else "right",
            no_wrap=not wide,
            overflow="fold",
            min_width=15 if wide else None,
        )
    for row in report.rows:
        table.add_row(*cells(row))
    console.print(table, markup=False, highlight=False)


def write_json(path: Path, content: Any) -> None:
    """Write figures; the file appears whole or not at all.

    Raises:
        UserError: a place that can't be written.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _tell(console: Console, problems: Sequence[str], notes: Sequence[str]) -> None:
    lines = [f"skipped: {problem}" for problem in problems[:_PROBLEMS_SHOWN]]
    lines += [f"{len(problems)} files skipped"] if problems else []
    for line in (*lines, *notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _interval(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
