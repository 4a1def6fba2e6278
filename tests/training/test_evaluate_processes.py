"""`hybridlm evaluate` on two processes over gloo: the figures of one, and an end in one line when one cannot go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.saved_model import save_tiny_model
from tests.support.toy_corpus import write_clips
from training.evaluate import run

ROOT = Path(__file__).parents[2]


def two(*commands: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run `hybridlm evaluate` with each rank's options."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank, options in enumerate(commands):
        about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        about |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "hybridlm", "evaluate", *options]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **about}, cwd=ROOT, **pipes))
    try:
        done = [(process, *process.communicate(timeout=900)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8, "first_text_id": 10}
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **settings)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-9)
    else:
        assert one == other


def test_two_processes_give_the_figures_of_one(model: Path, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "clips", 5)
    (tmp_path / "clips" / "2.wav").write_text("This is a letter.")
    options = ["--data", str(manifest), "--model", str(model), "--split", "train", "--batch-size", "1"]
    target, picture = tmp_path / "two.json", tmp_path / "two.png"
    first, second = two(*[[*options, "--json", str(target), "--picture", str(picture)]] * 2)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "3 clips" in first.stdout and "1 clips skipped" in first.stderr
    assert second.stdout == "" and "skipped" not in second.stderr
    run(model, manifest, "train", tmp_path / "one.json", batch_size=1)
    one = json.loads((tmp_path / "one.json").read_text())
    assert [clip["key"] for clip in one["clips"]] == ["0.wav", "1.wav", "4.wav"]
    assert_equal(one, json.loads(target.read_text()))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_one_process_cannot_read_ends_both_in_one_line(model: Path, tmp_path: Path) -> None:
    options = ["--data", str(write_clips(tmp_path / "clips", 2)), "--split", "train", "--model"]
    first, second = two([*options, str(model)], [*options, str(tmp_path / "nowhere")])
    told = [line for line in first.stderr.splitlines() if line.startswith("hybridlm: error: ")]
    assert len(told) == 1 and str(tmp_path / "nowhere") in told[0]
    assert first.returncode == 2 and second.returncode == 0
    assert "Traceback" not in first.stderr + second.stderr and "error" not in second.stderr
    assert first.stdout == second.stdout == ""
