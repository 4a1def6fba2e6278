"""Tables of probes: paired differences, groups as units, and refusal of what was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.probe_tables import MEAN, ProbeClips, ProbeConfig, compare, read_tasks, tables
from tests.support.recorded_parts import write_parts
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training import estimates

KIND = {"label": "kind", "where": ["set=parts", "split=test"], "folds": "fold"}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 200)


@pytest.fixture
def config(tmp_path: Path) -> ProbeConfig:
    settings = {
        "data": str(write_parts(tmp_path / "data")),
        "tasks": {"kind": KIND},
        "methods": ["knn"],
        "about": {"kind": "Two kinds."},
    }
    return from_mapping(ProbeConfig, settings)


def test_results_are_kept_task_by_task(config: ProbeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = ProbeClips(config)
    assert len(clips.clips) == 12
    told = torch.tensor([[1.0, 0.0] if clip.labels["kind"] == "music" else [0.0, 1.0] for clip in clips.clips])
    clips.score(tmp_path / "seed1", "oracle", told, seed=1)
    assert "oracle seed 1 kind: knn 1.000" in capsys.readouterr().out
    clips.score(tmp_path / "seed1", "oracle", torch.zeros_like(told), seed=1)
    assert capsys.readouterr().out == ""
    found = read_tasks(config, tmp_path / "seed1", 1)
    assert found is not None and found["kind"]["labels"] == found["kind"]["methods"]["knn"]["predictions"]
    assert read_tasks(config, tmp_path / "seed0", 0) is None
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        read_tasks(config, tmp_path / "seed1", 2)


def test_what_was_trained_on_is_not_probed(config: ProbeConfig) -> None:
    clips = ProbeClips(config)
    clips.check_unheard(["kathleen-1.opus", "saxophone.opus"], ["a song"])
    with pytest.raises(UserError, match=r"1 probed clips are trained on, such as tabla.opus#0-0.3; leave"):
        clips.check_unheard(["kathleen-1.opus", "tabla.opus#0-0.3"])
    with pytest.raises(UserError, match="a caption names what probes ask for: music"):
        clips.check_unheard([], ["music", "song"])


def result(right: list[bool], over: str = "clips") -> dict[str, Any]:
    """A task's result of clips 0, 1, ... in parts of two."""
    count = len(right)
    return {
        "clips": [str(i) for i in range(count)],
        "parts": [f"speaker {i // 2}" for i in range(count)],
        "labels": ["a"] * count,
        "interval_over": over,
        "chance": 0.5,
        "majority": 0.5,
        "conditions": ["a task"],
        "methods": {"knn": {"accuracy": sum(right) / count, "predictions": ["a" if r else "b" for r in right]}},
    }


def test_differences_are_paired_and_tasks_averaged() -> None:
    """The better of two is so on one clip of each part, whatever is drawn: by groups its lead is exact."""
    base, better = [True, False, False, False] * 5, [True, True, False, True] * 5
    one = {"base": [{"t": result(base, "groups"), "u": result(base)}] * 2}
    one["better"] = [{"t": result(better, "groups"), "u": result(base)}] * 2
    figures = compare(one, ["base"], ["knn"])["knn"]
    assert figures["accuracy"]["better"]["t"]["value"] == 0.75
    difference = figures["differences"]["base"]["better"]
    assert [difference["t"]["value"], *difference["t"]["interval"]] == pytest.approx([0.5] * 3)
    assert [difference["u"]["value"], *difference["u"]["interval"]] == pytest.approx([0.0] * 3)
    assert [difference[MEAN]["value"], *difference[MEAN]["interval"]] == pytest.approx([0.25] * 3)
    by_clips = compare(
        {name: [{"t": result(r)}] for name, r in (("base", base), ("better", better))}, ["base"], ["knn"]
    )
    low, high = by_clips["knn"]["differences"]["base"]["better"]["t"]["interval"]
    assert low < 0.4 and high > 0.6
    config = from_mapping(ProbeConfig, {"data": "d", "tasks": {"t": {"label": "a"}, "u": {"label": "b"}}})
    text = "\n".join(tables({"knn": figures}, config, one["base"][0]))
    assert "| t | +50.0 [+50.0, +50.0] |" in text and f"| {MEAN} | +25.0 [+25.0, +25.0] |" in text


def test_seeds_that_differ_widen_the_interval() -> None:
    right, wrong = [True] * 8, [False] * 8
    seeds = {"base": [{"t": result(wrong)}] * 2, "other": [{"t": result(right)}, {"t": result(wrong)}]}
    found = compare(seeds, ["base"], ["knn"])["knn"]["differences"]["base"]["other"]["t"]
    assert found["per_seed"] == [1.0, 0.0] and found["interval"] == pytest.approx([0.0, 1.0])


def test_other_clips_do_not_compare() -> None:
    other = {**result([True] * 8), "clips": [str(i) for i in range(1, 9)]}
    with pytest.raises(UserError, match="different clips"):
        compare({"base": [{"t": result([True] * 8)}], "other": [{"t": other}]}, ["base"], ["knn"])
