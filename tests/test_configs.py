"""Every YAML file that ships is a valid run, and would be refused with one wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenizer.errors import UserError
from training.config import SECTIONS, apply_overrides, read_yaml, resolve
from training.run import task_parts

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_there_are_configs_of_all_tasks() -> None:
    assert {read_yaml(path)["task"] for path in CONFIGS} == set(SECTIONS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_resolves(path: Path) -> None:
    mapping = read_yaml(path)
    run, _, resolved = resolve(mapping, task_parts(mapping["task"])[0], where=str(path))
    assert run.task == mapping["task"]
    assert resolved["max_steps"] == mapping["max_steps"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_wrong_key_is_told_with_the_nearest_one(path: Path) -> None:
    mapping = apply_overrides(read_yaml(path), ["max_step=1"])
    with pytest.raises(UserError, match="unknown key 'max_step'; did you mean 'max_steps'"):
        resolve(mapping, task_parts(mapping["task"])[0], where=str(path))
