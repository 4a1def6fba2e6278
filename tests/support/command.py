"""Run the command line in this process, as a shell would see it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from hybridlm import cli


class Result(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that takes a command's words and returns its status, stdout and stderr."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hybridlm", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run


def assert_refused(result: Result, *parts: str) -> None:
    """Status 2 and one line on stderr that holds every part."""
    assert result.status == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("hybridlm: error: ")]
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err
    for part in parts:
        assert part in lines[0], lines[0]
