"""Which clips a probe learns from and which it is scored on: by labels, splits, folds, or groups left out."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from tokenizer.errors import UserError
from training.manifest import Clip, TagRule

MIN_CLIPS = 10
TRAIN, TEST = "train", "test"
_KEYS = ("split", "path", "tag")
"""What a condition may name beside labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """What is asked of which clips.

    With neither `folds` nor `leave_out`, split `train` is learned from and split `test` scored.
    """

    label: str
    """What to tell of a clip; each of its values is a class."""
    where: tuple[str, ...] = ()
    """Conditions `label=value`, `*` and `?` as in file names; several of one label are alternatives."""
    split: str | None = None
    """Only clips of this split, with `folds` or `leave_out`."""
    folds: str | None = None
    """Cross-validation: a label whose values are the folds, or a number of random folds (each class dealt evenly)."""
    leave_out: str | None = None
    """A label whose values, such as speakers, are left out one at a time; intervals are over them."""

    def __post_init__(self) -> None:
        if self.folds is not None and self.leave_out is not None:
            raise ValueError(f"folds={self.folds} and leave_out={self.leave_out} exclude each other; give one")
        if self.split is not None and self.folds is None and self.leave_out is None:
            raise ValueError(
                f"split={self.split} needs folds or leave_out; without them split '{TRAIN}' is learned from and "
                f"split '{TEST}' scored"
            )
        for condition in self.where:
            if not all(condition.partition("=")):
                raise ValueError(f"where={condition!r} must be label=value, such as set=emodb")
        if self.folds is not None and self.folds.isdigit() and int(self.folds) < 2:
            raise ValueError(f"folds={self.folds} must be at least 2, or a label")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One training and its test; the clips by number."""

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All trainings of a task; no clip is scored twice, none by a probe that learned from it or its group."""

    task: ProbeTask
    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    targets: tuple[int, ...]
    """Class of each clip."""
    parts: tuple[Part, ...]
    unseen: dict[str, int]
    """Test clips by class that their part's training clips lack: no probe can name it, they count as wrong."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing among all classes alike."""
        return 1.0 / len(self.classes)

    @property
    def majority(self) -> float:
        """Accuracy of always naming the class that is most frequent in training."""
        right, asked = 0, 0
        for part in self.parts:
            common = Counter(self.targets[i] for i in part.train).most_common(1)[0][0]
            right += sum(self.targets[i] == common for i in part.test)
            asked += len(part.test)
        return right / asked

    def counts(self) -> dict[str, dict[str, int]]:
        """By class, clips that are learned from (in any part) and clips that are scored."""
        train = Counter(self.targets[i] for i in {i for part in self.parts for i in part.train})
        test = Counter(self.targets[i] for part in self.parts for i in part.test)
        return {name: {"train": train[c], "test": test[c]} for c, name in enumerate(self.classes)}


def select(clips: Sequence[Clip], task: ProbeTask) -> tuple[list[Clip], list[str]]:
    """The clips that a task is about, and one line for each kind of clip that it leaves out.

    Raises:
        UserError: a label that no clip has, or conditions that none meets.
    """
    conditions: dict[str, list[TagRule]] = {}
    for condition in task.where:
        name, _, value = condition.partition("=")
        if name not in _KEYS:
            _check_label(clips, name, "where")
        conditions.setdefault(name, []).append(TagRule(where={name: value}))
    _check_label(clips, task.label, "label")
    chosen = [clip for clip in clips if all(any(r.matches(clip) for r in rules) for rules in conditions.values())]
    if not chosen:
        raise UserError(f"no clip meets {' and '.join(task.where)}; widen the conditions")
    notes: list[str] = []

    def keep(have: Callable[[Clip], bool], what: str, remedy: str) -> None:
        nonlocal chosen
        kept = [clip for clip in chosen if have(clip)]
        if not kept:
            raise UserError(f"none of the {len(chosen)} clips has {what}; {remedy}")
        if len(kept) < len(chosen):
            notes.append(f"{len(chosen) - len(kept)} clips left out: without {what}")
        chosen = kept

    keep(lambda clip: task.label in clip.labels, f"the label '{task.label}'", "choose others with where")
    group = task.leave_out or (task.folds if task.folds and not task.folds.isdigit() else None)
    if group is not None:
        _check_label(clips, group, "leave_out" if task.leave_out else "folds")
        keep(lambda clip: group in clip.labels, f"the label '{group}'", "choose others with where")
    if task.split is not None:
        keep(lambda clip: clip.split == task.split, f"split '{task.split}'", "name a split of the manifest")
    if task.folds is None and task.leave_out is None:
        keep(
            lambda clip: clip.split in (TRAIN, TEST),
            f"split '{TRAIN}' or '{TEST}'",
            "cross-validate with folds or leave_out",
        )
    return chosen, notes


def make_plan(clips: Sequence[Clip], task: ProbeTask, *, seed: int = 42) -> Plan:
    """Divide clips that `select` chose.

    Args:
        clips: All with the label.
        task: How to divide them.
        seed: Of random folds.

    Raises:
        UserError: too few clips, a single class, or parts that have no training or test clips in common classes.
    """
    if len(clips) < MIN_CLIPS:
        raise UserError(
            f"{len(clips)} clips have the label '{task.label}', but a probe needs at least {MIN_CLIPS}; add recordings"
        )
    names = [clip.labels[task.label] for clip in clips]
    classes = tuple(sorted(set(names)))
    if len(classes) == 1:
        raise UserError(
            f"label '{task.label}' is '{classes[0]}' for all {len(clips)} clips, but a probe needs at least 2 classes; "
            "widen the conditions or choose another label"
        )
    targets = tuple(classes.index(name) for name in names)
    parts = _divide(clips, targets, task, seed)
    unseen: Counter[str] = Counter()
    for part in parts:
        seen = {targets[i] for i in part.train}
        if len(seen) == 1:
            raise UserError(
                f"{part.name}: its training clips are all '{classes[seen.pop()]}', but a probe needs at least 2 "
                f"classes of '{task.label}'; choose other folds or clips"
            )
        unseen.update(classes[targets[i]] for i in part.test if targets[i] not in seen)
    if sum(unseen.values()) == sum(len(part.test) for part in parts):
        example = next(iter(unseen))
        raise UserError(
            f"label '{task.label}': no class of the test clips, such as '{example}', occurs in training; "
            "divide them otherwise, for example into random folds"
        )
    return Plan(
        task=task,
        clips=tuple(clips),
        classes=classes,
        targets=targets,
        parts=tuple(parts),
        unseen=dict(sorted(unseen.items())),
    )


def _divide(clips: Sequence[Clip], targets: Sequence[int], task: ProbeTask, seed: int) -> list[Part]:
    numbers = range(len(clips))
    if task.leave_out is None and task.folds is None:
        found = {name: tuple(i for i in numbers if clips[i].split == name) for name in (TRAIN, TEST)}
        for name, part in found.items():
            if not part:
                raise UserError(
                    f"no clip with the label '{task.label}' is of split '{name}'; "
                    "cross-validate with folds or leave_out"
                )
        return [Part(name=TEST, train=found[TRAIN], test=found[TEST])]
    if task.folds is not None and task.folds.isdigit():
        what, groups = "fold", _random_folds(targets, int(task.folds), seed)
    else:
        what = task.leave_out or task.folds or ""
        groups = [clip.labels[what] for clip in clips]
    if len(set(groups)) < 2:
        raise UserError(
            f"label '{what}' is '{groups[0]}' for all clips, so there is nothing to learn from; choose another"
        )
    return [
        Part(
            name=f"{what} {group}",
            train=tuple(i for i in numbers if groups[i] != group),
            test=tuple(i for i in numbers if groups[i] == group),
        )
        for group in sorted(set(groups))
    ]


def _random_folds(targets: Sequence[int], num_folds: int, seed: int) -> list[str]:
    """A fold for each clip: the clips of a class, shuffled, are dealt one after the other, class after class."""
    if num_folds > len(targets):
        raise UserError(f"folds={num_folds} must be at most the number of clips, {len(targets)}")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = [""] * len(targets)
    for place, i in enumerate(sorted(order, key=lambda i: targets[i])):  # sorted keeps the order within a class
        folds[i] = str(place % num_folds + 1)
    return folds


def _check_label(clips: Iterable[Clip], name: str, where: str) -> None:
    known = {label for clip in clips for label in clip.labels}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean '{near[0]}'? It has {', '.join(sorted(known))}" if near else "its clips have no labels"
        raise UserError(f"{where}: no clip has the label '{name}'; {hint}")
