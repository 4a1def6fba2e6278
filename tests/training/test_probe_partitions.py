"""Who learns from whom: no clip is scored by a probe that learned from it or from its group, and bad data is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tokenizer.errors import UserError
from training.manifest import Clip
from training.partitions import Plan, ProbeTask, make_plan, select


def clips(rows: Sequence[dict[str, Any]]) -> list[Clip]:
    made = []
    for number, row in enumerate(rows):
        labels = {name: str(value) for name, value in row.items() if name != "split"}
        made.append(Clip(path=Path(f"{number}.wav"), key=f"{number}.wav", split=row.get("split"), labels=labels))
    return made


def grid() -> list[Clip]:
    """Four speakers, three words, two takes; takes are folds, the last speaker is split test."""
    return clips(
        [
            {"word": word, "speaker": speaker, "take": take, "split": "test" if speaker == "d" else "train"}
            for speaker in "abcd"
            for word in ("yes", "no", "stop")
            for take in (1, 2)
        ]
    )


def planned(rows: Sequence[Clip], **task: Any) -> Plan:
    wanted = ProbeTask(**task)
    return make_plan(select(rows, wanted)[0], wanted)


def assert_apart(plan: Plan, label: str | None = None) -> None:
    """Every clip scored once, none learned from in the same part; nor any of the same label."""
    scored = [i for part in plan.parts for i in part.test]
    assert sorted(scored) == sorted(set(scored))
    for part in plan.parts:
        assert part.train and part.test and not set(part.train) & set(part.test)
        if label is not None:
            values = [{plan.clips[i].labels[label] for i in side} for side in (part.train, part.test)]
            assert not values[0] & values[1]


def test_splits_folds_and_groups_left_out() -> None:
    plan = planned(grid(), label="word")
    assert [part.name for part in plan.parts] == ["test"]
    assert_apart(plan, "speaker")
    assert (len(plan.parts[0].train), len(plan.parts[0].test)) == (18, 6)
    assert plan.classes == ("no", "stop", "yes")
    assert plan.counts()["no"] == {"train": 6, "test": 2}

    plan = planned(grid(), label="word", folds="take")
    assert [part.name for part in plan.parts] == ["take 1", "take 2"]
    assert_apart(plan, "take")

    plan = planned(grid(), label="word", leave_out="speaker")
    assert [part.name for part in plan.parts] == [f"speaker {name}" for name in "abcd"]
    assert_apart(plan, "speaker")
    assert sum(len(part.test) for part in plan.parts) == 24

    plan = planned(grid(), label="word", leave_out="speaker", split="train")
    assert len(plan.parts) == 3 and len(plan.clips) == 18


def test_random_folds_are_even_by_class_and_seeded() -> None:
    rows = clips([{"word": "yes" if number % 5 else "no"} for number in range(50)])
    plan = planned(rows, label="word", folds="5")
    assert_apart(plan)
    for part in plan.parts:
        assert sorted(plan.targets[i] for i in part.test) == [0, 0] + [1] * 8
    task = ProbeTask(label="word", folds="5")
    assert make_plan(rows, task, seed=42) == plan != make_plan(rows, task, seed=1)


def test_chance_and_majority() -> None:
    rows = clips(
        [{"word": "yes", "split": "train"}] * 6
        + [{"word": "no", "split": "train"}] * 4
        + [{"word": "yes", "split": "test"}] * 1
        + [{"word": "no", "split": "test"}] * 3
    )
    plan = planned(rows, label="word")
    assert plan.chance == 0.5
    assert plan.majority == 0.25


def test_conditions() -> None:
    task = ProbeTask(label="word", where=("speaker=a", "speaker=b", "word=[!n]*", "split=train"))
    chosen, notes = select(grid(), task)
    assert {(clip.labels["speaker"], clip.labels["word"]) for clip in chosen} == {
        (speaker, word) for speaker in "ab" for word in ("yes", "stop")
    }
    assert notes == []


def test_clips_that_lack_something_are_left_out_and_counted() -> None:
    rows = [*grid(), *clips([{"speaker": "e"}, {"word": "yes", "split": "train"}])]
    chosen, notes = select(rows, ProbeTask(label="word", leave_out="speaker"))
    assert len(chosen) == 24
    assert notes == ["1 clips left out: without the label 'word'", "1 clips left out: without the label 'speaker'"]
    undivided = [*grid(), *clips([{"word": "yes"}])]
    assert select(undivided, ProbeTask(label="word"))[1] == ["1 clips left out: without split 'train' or 'test'"]


def test_classes_seen_only_in_test_are_named() -> None:
    rows = [*grid(), *clips([{"word": "go", "speaker": "d", "split": "test"}] * 2)]
    assert planned(rows, label="word").unseen == {"go": 2}
    assert planned(grid(), label="word").unseen == {}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"label": "wrod"}, "label: no clip has the label 'wrod'; did you mean 'word'? It has speaker, take, word"),
        ({"label": "word", "where": ("speakr=a",)}, "where: no clip has the label 'speakr'; did you mean 'speaker'"),
        ({"label": "word", "where": ("speaker=x",)}, "no clip meets speaker=x"),
        ({"label": "word", "folds": "tak"}, "folds: no clip has the label 'tak'; did you mean 'take'"),
        ({"label": "word", "leave_out": "spaker"}, "leave_out: no clip has the label 'spaker'; did you mean 'speaker'"),
        ({"label": "word", "folds": "25"}, "folds=25 must be at most the number of clips, 24"),
        ({"label": "word", "leave_out": "speaker", "split": "dev"}, "none of the 24 clips has split 'dev'"),
        ({"label": "word", "where": ("speaker=a",), "leave_out": "take"}, "6 clips have the label 'word', but a probe"),
        ({"label": "word", "where": ("word=yes", "split=train"), "folds": "2"}, "6 clips"),
        ({"label": "word", "where": ("split=train",)}, "is of split 'test'; cross-validate"),
        ({"label": "speaker"}, "no class of the test clips, such as 'd', occurs in training"),
        ({"label": "speaker", "leave_out": "speaker"}, "no class of the test clips"),
    ],
)
def test_what_does_not_suit_the_clips_is_told(task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        planned(grid(), **task)
    assert message in str(error.value)


def test_one_class_is_told() -> None:
    rows = clips([{"word": "yes", "speaker": "ab"[n % 2], "split": "train"} for n in range(12)])
    with pytest.raises(UserError, match="is 'yes' for all 12 clips, but a probe needs at least 2 classes"):
        planned(rows, label="word", leave_out="speaker")
    rows = clips([{"word": word, "speaker": word} for word in ("yes", "no") for _ in range(6)])
    with pytest.raises(UserError, match="speaker no: its training clips are all 'yes'"):
        planned(rows, label="word", leave_out="speaker")
    with pytest.raises(UserError, match="label 'set' is 'x' for all clips, so there is nothing to learn from"):
        planned(clips([{"word": "ab"[n % 2], "set": "x"} for n in range(12)]), label="word", folds="set")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"folds": "take", "leave_out": "speaker"}, "exclude each other"),
        ({"split": "train"}, "split=train needs folds or leave_out"),
        ({"where": ("speaker",)}, "where='speaker' must be label=value"),
        ({"where": ("=a",)}, "must be label=value"),
        ({"folds": "1"}, "folds=1 must be at least 2"),
    ],
)
def test_contradictory_tasks_are_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeTask(label="word", **task)
