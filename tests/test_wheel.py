"""The wheel, installed into an empty environment, generates from outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel; the dependencies are lent by the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    run(*pip, cwd=folder)
    # Added after the install, and a path line's own .pth files are not read: the editable install stays out.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_top_level_names_are_the_four_packages(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "hybridlm",
        "tokenizer",
        "training",
        "sampling",
    }


def test_configs_and_the_box_travel_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"hybridlm/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped
    assert shipped <= names
    box = {"config.json", "model.safetensors", "text.model", "README.md", "tokenizer/config.json"}
    assert {f"hybridlm/box/{name}" for name in box} <= names


def test_it_imports_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    code = "import hybridlm, tokenizer, sampling, training; print(hybridlm.__file__, hybridlm.__version__)"
    file, version = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(environment)
    assert version in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_it_generates_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    command = (environment / "bin" / "hybridlm", "generate", "--text", "Good morning.", "--duration", "1")
    printed = run(*command, "--seed", "3", "--output", "morning.wav", cwd=tmp_path)
    assert "seed 3" in printed
    assert 0 < soundfile.info(tmp_path / "morning.wav").duration <= 1
    assert (tmp_path / "morning.png").stat().st_size > 0
