"""The benchmark of probes: every tokenizer on every task, floor first; shipped tasks are valid; what fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import probes
from tests.support.recordings import write_corpus
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.settings import from_mapping
from training.classifiers import METHODS
from training.config import read_yaml


def test_the_shipped_tasks_are_valid() -> None:
    study = from_mapping(probes.Study, read_yaml(probes.HERE / "probes.yaml"), where="probes.yaml")
    labels = {task.label for task in study.tasks.values()}
    assert labels == {"digit", "speaker", "emotion", "sound", "instrument", "note", "language"}
    assert study.seed == 42 and study.methods == METHODS == ("linear", "knn", "logistic")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    rows = [
        {"path": f"{i}.wav", "duration": 0.1 + 0.01 * i, "pitch": "ab"[i % 2], "fold": i // 4, "set": "tones"}
        for i in range(12)
    ]
    tiny_tokenizer().save(tmp_path / "tiny")
    study = {
        "tokenizers": {"tiny": {"tokenizer": str(tmp_path / "tiny"), "inputs": ["latents", "codes"]}},
        "tasks": {"pitch": {"label": "pitch", "folds": "fold"}, "voice": {"label": "voice"}},
        "about": {"pitch": "Sines."},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    return ["--data", str(write_corpus(tmp_path, rows)), "--config", str(tmp_path / "study.yaml")]


def test_one_command_writes_both_tables(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--markdown", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]
    assert probes.main([*words, *files, "seed=3"]) == 0
    text = (tmp_path / "t.md").read_text()
    printed, told = capsys.readouterr()
    assert printed.strip() == text.strip()
    # Rows are told as they come, task by task.
    each = [line.strip("| ") for line in text.splitlines() if line.startswith(("| log-mel", "| tiny"))]
    at = [told.index(line) for line in ["task pitch", *each, "task voice"]]
    assert len(each) == 9 and at == sorted(at)
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][1:]
    names = ["log-mel (floor)", "tiny latents", "tiny codes"]
    assert rows == [[f"| {name}", method] for name in names for method in METHODS]
    for part in ("`python -m benchmarks.probes --data", "torch", "seed 3", "Sines.", "3 folds by fold"):
        assert part in text
    assert "voice: label: no clip has the label 'voice'" in text
    figures = json.loads((tmp_path / "t.json").read_text())
    assert set(figures) == {"command", "machine", "tokenizers", "study", "tasks", "refused"}
    assert figures["tokenizers"] == {"tiny": tiny_tokenizer().fingerprint()}
    assert len(figures["tasks"]["pitch"]["rows"]) == 9 and list(figures["refused"]) == ["voice"]


def test_bad_settings_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probes.main([*words, "--tasks", "sound"]) == 2
    assert capsys.readouterr().err == "--tasks sound: tasks are pitch, voice\n"
    assert probes.main([*words, "--tasks", "voice"]) == 2
    assert probes.main([*words, "sed=1"]) == 2
    assert "sed" in capsys.readouterr().err
