"""Runs of a study: in order of need, finished ones kept, failures told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenizer.errors import UserError
from training.runs import INTERRUPTED, Run, read_result, run_missing


def runs(folder: Path) -> list[Run]:
    return [
        Run(name="a", folder=folder / "a", needs=("teacher",)),
        Run(name="done", folder=folder / "done"),
        Run(name="teacher", folder=folder / "teacher"),
        Run(name="b", folder=folder / "b", needs=("done",)),
    ]


def test_what_others_need_is_made_first(tmp_path: Path) -> None:
    made: list[str] = []
    told: list[str] = []
    run_missing(
        runs(tmp_path),
        lambda run: made.append(run.name) is None,
        command=["no.such.module"],
        processes=1,
        is_done=lambda run: run.name == "done",
        when_done=lambda run: told.append(run.name),
    )
    assert made == told == ["teacher", "a", "b"]


def test_an_interrupted_run_stops_the_study(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_missing(runs(tmp_path), lambda run: False, command=[], processes=1, is_done=lambda run: False)


def test_processes_wait_for_what_they_need_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that succeeds for `teacher` alone; `a` needs it, fails, and `b` never begins."""
    (tmp_path / "makes_runs.py").write_text(
        "import pathlib, sys\n"
        "name = sys.argv[sys.argv.index('--one') + 1]\n"
        "teacher = pathlib.Path(sys.argv[1])\n"
        "if name == 'teacher': teacher.touch()\n"
        "else: sys.exit('no luck' if teacher.exists() else 'began too early')\n"
    )
    wanted = [run for run in runs(tmp_path) if run.name in ("a", "teacher")]
    wanted.append(Run(name="b", folder=tmp_path / "b", needs=("a",)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^a failed: no luck; see .*output.txt"):
        run_missing(
            wanted,
            lambda run: pytest.fail("must run in a process of its own"),
            command=["makes_runs", str(tmp_path / "flag")],
            processes=2,
            is_done=lambda run: False,
        )
    assert not (tmp_path / "b").exists()


def test_a_process_that_was_interrupted_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stops.py").write_text(f"import sys; sys.exit({INTERRUPTED})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = [Run(name="a", folder=tmp_path / "a")]
    with pytest.raises(KeyboardInterrupt):
        run_missing(wanted, lambda run: True, command=["stops"], processes=2, is_done=lambda run: False)


def test_a_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert read_result(tmp_path, {"made": {}}) is None
    (tmp_path / "result.json").write_text(json.dumps({"made": {"steps": 3, "data": {"rules": [1]}}, "figure": 0.5}))
    found = read_result(tmp_path, {"made": {"steps": 3, "data": {"rules": (1,)}}})
    assert found is not None and found["figure"] == 0.5
    with pytest.raises(UserError, match=r"made with other settings \(data.rules\); choose another output"):
        read_result(tmp_path, {"made": {"steps": 3, "data": {"rules": [2]}}})
    with pytest.raises(UserError, match=r"other settings \(task\)"):
        read_result(tmp_path, {"task": "digit"})
    assert read_result(tmp_path, {"task": "digit"}, "other.json") is None
