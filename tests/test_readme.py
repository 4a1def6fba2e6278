"""What the README shows is true: commands and options exist, links lead somewhere, marked blocks run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hybridlm import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNABLE = re.findall(r"<!-- runnable -->\n+```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"(?:`|^|\n)[ $]*hybridlm ([a-z]+)([^`\n]*)", README)
LINKS = [
    (page.parent / link)
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "hybridlm" / "box" / "README.md")
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    if "://" not in link
]


def test_there_is_something_to_check() -> None:
    assert {language for language, _ in RUNNABLE} == {"bash", "python"}
    assert len(COMMANDS) >= 8
    assert LINKS


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_shown_commands_and_options_exist(name: str, words: str) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert name in commands
    known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
    assert set(re.findall(r"--[a-z-]+", words)) <= known


@pytest.mark.parametrize("link", LINKS, ids=lambda link: str(link.relative_to(ROOT)))
def test_links_lead_somewhere(link: Path) -> None:
    assert link.exists()


@pytest.mark.parametrize(("language", "code"), RUNNABLE)
def test_marked_blocks_run_as_they_stand(language: str, code: str, tmp_path: Path) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    environment = {**os.environ, "PATH": programs}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
