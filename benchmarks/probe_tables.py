"""Probes of many variants and seeds on the same clips, each task's result saved as it comes, and tables of the figures.

The protocol is that of `training.probe`. Folds are the same for all seeds; the linear probe's own seed goes with the
variant's.

Shapes: N clips, E width of a vector.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.errors import UserError
from training.classifiers import METHODS, Method
from training.embeddings import FrameSource, embed
from training.estimates import bounds, drawn_ratios
from training.manifest import read_manifest
from training.partitions import ProbeTask, make_plan, select
from training.probe import conditions, score, write_json
from training.runs import RESULT, Run, plain, read_result

FLOOR = "log-mel"
MEAN = "mean of tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """What is probed."""

    data: str
    """Manifest of the recordings, test split and all."""
    tasks: dict[str, ProbeTask]
    methods: tuple[Method, ...] = METHODS
    seed: int = 42
    """Of random folds; the linear probe of a variant's seed s has seed + s."""
    about: dict[str, str] = field(default_factory=dict)
    """A remark on a task, for the report."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.about)


def check_tasks(tasks: Mapping[str, ProbeTask], about: Mapping[str, str]) -> None:
    """Tasks, and remarks on some of them.

    Raises:
        ValueError: no task, or a remark on one that there is not.
    """
    if not tasks:
        raise ValueError("tasks must name at least one")
    for name in about:
        if name not in tasks:
            raise ValueError(f"about.{name} is of no task; tasks are {', '.join(tasks)}")


class ProbeClips:
    """The clips of all tasks, each embedded once.

    Raises:
        UserError: a manifest that cannot be read, or a task that it has no clips for.
    """

    def __init__(self, config: ProbeConfig) -> None:
        self.config = config
        every = read_manifest(Path(config.data)).clips
        self._of_task = {name: select(every, task) for name, task in config.tasks.items()}
        used = {clip.key for clips, _ in self._of_task.values() for clip in clips}
        self.clips = [clip for clip in every if clip.key in used]
        self._row = {clip.key: row for row, clip in enumerate(self.clips)}

    def embed(self, source: FrameSource) -> Float[Tensor, "N E"]:
        """Every clip's vector.

        Raises:
            UserError: one that could not be made: a table must rest on the same clips for all.
        """
        found = embed(self.clips, source)
        if found.problems:
            raise UserError(found.problems[0])
        return found.vectors[source.names[0]]

    def classes(self) -> set[str]:
        """Every class of every task."""
        return {
            clip.labels[self.config.tasks[name].label] for name, (clips, _) in self._of_task.items() for clip in clips
        }

    def check_unheard(self, trained: Iterable[str], captions: Iterable[str] = ()) -> None:
        """See to it that no probed clip was trained on, and that no caption of training names a class.

        Args:
            trained: Keys of the clips that representations learn from.
            captions: Their tags.

        Raises:
            UserError: one was, or does.
        """
        if heard := sorted(set(trained) & set(self._row)):
            raise UserError(
                f"{len(heard)} probed clips are trained on, such as {heard[0]}; leave their sets out of data.rules, or "
                "let the task's where name split=test"
            )
        if named := sorted(set(captions) & self.classes()):
            raise UserError(f"a caption names what probes ask for: {', '.join(named)}; change the tags in data.rules")

    def score(self, folder: Path, name: str, vectors: Float[Tensor, "N E"], seed: int) -> None:
        """Probe one representation on every task that has no result in `folder` yet, and print each row as it comes."""
        for task, (clips, notes) in self._of_task.items():
            place, about = folder / task, settings_of(self.config, task, seed)
            if read_result(place, about) is not None:
                continue
            plan = make_plan(clips, self.config.tasks[task], seed=self.config.seed)
            table = vectors[[self._row[clip.key] for clip in clips]]
            report = score(plan, {name: table}, methods=self.config.methods, seed=self.config.seed + seed, notes=notes)
            parts = {i: part.name for part in plan.parts for i in part.test}
            scored = [i for part in plan.parts for i in part.test]
            result = {
                **plain(about),
                "representation": name,
                "conditions": conditions(report),
                "interval_over": report.interval_over,
                "chance": report.chance,
                "majority": report.majority,
                "clips": [plan.clips[i].key for i in scored],
                "parts": [parts[i] for i in scored],
                "labels": [report.labels[plan.clips[i].key] for i in scored],
                "methods": {
                    row.method: {
                        "accuracy": row.accuracy.value,
                        "balanced_accuracy": row.balanced_accuracy,
                        "predictions": [row.predictions[plan.clips[i].key] for i in scored],
                    }
                    for row in report.rows
                },
            }
            write_json(place / RESULT, result)
            print(row_line(name, seed, task, result), flush=True)


def settings_of(config: ProbeConfig, task: str, seed: int) -> dict[str, Any]:
    """What a task's result says of how it was made."""
    return {
        "task": asdict(config.tasks[task]),
        "data": config.data,
        "methods_asked": list(config.methods),
        "folds_seed": config.seed,
        "seed": seed,
    }


def row_line(name: str, seed: int, task: str, result: Mapping[str, Any]) -> str:
    """A task's result in one line."""
    figures = ", ".join(f"{method} {found['accuracy']:.3f}" for method, found in result["methods"].items())
    return f"{name} seed {seed} {task}: {figures}"


def read_tasks(config: ProbeConfig, folder: Path, seed: int) -> dict[str, dict[str, Any]] | None:
    """The results of all tasks, or None where one is missing.

    Raises:
        UserError: one was made with other settings.
    """
    found = {task: read_result(folder / task, settings_of(config, task, seed)) for task in config.tasks}
    complete = {task: result for task, result in found.items() if result is not None}
    return complete if len(complete) == len(found) else None


class Probed(NamedTuple):
    """One variant under one seed."""

    variant: str
    seed: int
    folder: Path
    """Of its tasks' results."""


def probed_by(run: Run, seeds: int) -> list[Probed]:
    """What a run probes: `VARIANT/SEED` itself; any other, which is not trained, all seeds, those of its probes."""
    variant, slash, seed = run.name.rpartition("/")
    if slash:
        return [Probed(variant, int(seed), run.folder)]
    return [Probed(run.name, seed, run.folder / f"seed{seed}") for seed in range(seeds)]


def tell(config: ProbeConfig, run: Run, seeds: int) -> None:
    """Print a finished run's rows."""
    for variant, seed, folder in probed_by(run, seeds):
        for task, result in (read_tasks(config, folder, seed) or {}).items():
            print(row_line(variant, seed, task, result), file=sys.stderr, flush=True)


class Rights:
    """How often each unit (clip, or group left out) of a task was told right, under all seeds.

    Raises:
        UserError: results of different clips.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]], method: Method) -> None:
        first = results[0]
        for other in results[1:]:
            if any(other[key] != first[key] for key in ("clips", "parts", "labels")):
                raise UserError("results rest on different clips; remove them and run again")
        self.key = (first["clips"], first["parts"])
        right = torch.tensor(
            [
                [a == b for a, b in zip(result["methods"][method]["predictions"], result["labels"], strict=True)]
                for result in results
            ],
            dtype=torch.float64,
        )  # (seeds, clips)
        names = first["parts"] if first["interval_over"] == "groups" else first["clips"]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        place = torch.tensor([numbers[name] for name in names])
        self.values = torch.zeros(len(results), len(numbers), dtype=torch.float64).index_add(1, place, right)
        self.sizes = torch.bincount(place, minlength=len(numbers)).double()

    def minus(self, other: Rights) -> Float[Tensor, "seeds units"]:
        """Paired by unit.

        Raises:
            UserError: of other clips.
        """
        if self.key != other.key:
            raise UserError("results rest on different clips; remove them and run again")
        return self.values - other.values


Results = Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]
"""By variant, one mapping of tasks' results a seed."""


def compare(results: Results, bases: Sequence[str], methods: Sequence[Method]) -> dict[str, Any]:
    """By method and task (and their mean): accuracy by variant, and differences from each base, paired.

    Intervals: 95 %, seeds and clips (or groups) drawn.
    """
    tasks = list(next(iter(results.values()))[0])
    figures: dict[str, Any] = {}
    for method in methods:
        rights = {
            variant: {task: Rights([seed[task] for seed in seeds], method) for task in tasks}
            for variant, seeds in results.items()
        }
        found: dict[str, Any] = {"accuracy": {}, "differences": {base: {} for base in bases}}
        for variant, scores in rights.items():
            found["accuracy"][variant] = _estimates({t: (one.values, one.sizes) for t, one in scores.items()})
            for base in bases:
                if variant != base:
                    pairs = {t: (one.minus(rights[base][t]), one.sizes) for t, one in scores.items()}
                    found["differences"][base][variant] = _estimates(pairs)
        figures[method] = found
    return figures


def _estimates(tasks: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    found, all_draws, all_values = {}, [], []
    for task, (values, sizes) in tasks.items():
        draws, each = drawn_ratios(values, sizes), values.sum(dim=1) / sizes.sum()
        found[task] = {"value": each.mean().item(), "interval": bounds(draws), "per_seed": each.tolist()}
        all_draws.append(draws)
        all_values.append(each)
    mean = torch.stack(all_values).mean(dim=0)
    interval = bounds(torch.stack(all_draws).mean(dim=0))
    return {**found, MEAN: {"value": mean.mean().item(), "interval": interval, "per_seed": mean.tolist()}}


def tables(figures: Mapping[str, Any], config: ProbeConfig, some: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: a table of accuracies and one of differences a base, for each method; then the tasks.

    Args:
        figures: What `compare` says.
        config: What was probed.
        some: Any variant's results by task, for the conditions.
    """
    for method, found in figures.items():
        variants = list(found["accuracy"])
        yield from ("", f"## {method} probe: accuracy, %", "", *header(["task", "chance", *variants]))
        for task in [*some, MEAN]:
            chance = f"{100 * some[task]['chance']:.1f}" if task in some else ""
            yield row([task, chance, *(_cell(found["accuracy"][v][task]) for v in variants)])
        for base, differences in found["differences"].items():
            others = [variant for variant in variants if variant in differences]
            yield from ("", f"{method} probe: points above {base}", "", *header(["task", *others]))
            for task in [*some, MEAN]:
                yield row([task, *(_cell(differences[v][task], "+") for v in others)])
    yield from ("", "## Tasks", "")
    for task, result in some.items():
        remark = f" {config.about[task]}" if task in config.about else ""
        said = "; ".join([*result["conditions"][:1], *result["conditions"][3:]])
        majority = f"majority {100 * result['majority']:.1f} %, intervals over {result['interval_over']}"
        yield f"- {task}:{remark} {said}; {majority}"


def header(names: Sequence[str]) -> list[str]:
    """A table's first two lines."""
    return [row(names), "|---" * len(names) + "|"]


def row(cells: Iterable[str]) -> str:
    """A table's line."""
    return f"| {' | '.join(cells)} |"


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    low, high = figure["interval"]
    value, low, high = (f"{100 * number:{sign}.1f}" for number in (figure["value"], low, high))
    return f"{value} [{low}, {high}]"
