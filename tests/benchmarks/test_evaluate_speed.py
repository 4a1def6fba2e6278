"""The benchmark of `hybridlm evaluate` runs, and its corpora are the manifest's, once and twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evaluate_speed
from tests.support.saved_model import save_tiny_model
from tests.support.toy_corpus import write_clips
from training.manifest import read_manifest


def test_speed_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, model = write_clips(tmp_path / "clips", 5), save_tiny_model(tmp_path / "model")
    evaluate_speed.write_manifest(tmp_path / "again.jsonl", clips := read_manifest(manifest).clips, 2)
    again = read_manifest(tmp_path / "again.jsonl").clips
    assert [(clip.path, clip.text, clip.tags, clip.split, clip.labels) for clip in again] == 2 * [
        (clip.path.resolve(), clip.text, clip.tags, clip.split, clip.labels) for clip in clips
    ]
    # In this process: what only starts another takes seconds.
    monkeypatch.setattr(evaluate_speed, "alone", evaluate_speed.measure)
    options = ["--data", str(manifest), "--split", "train", "--model", str(model), "--repeats", "1"]
    assert evaluate_speed.main([*options, "--json", str(tmp_path / "speed.json")]) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["batch_size"] == 8
    once, twice = report["once"], report["twice"]
    assert twice["audio_s"] == pytest.approx(2 * once["audio_s"]) and once["audio_s"] > 2
    assert once["real_time_factor"] == pytest.approx(once["audio_s"] / once["seconds"][0])
    assert once["peak_bytes"] > 2**20 and once["above_imports_bytes"] >= 0
    assert "twice the corpus: " in capsys.readouterr().out
    assert evaluate_speed.main(["--data", str(tmp_path / "nowhere")]) == 2
