"""The study of long recordings, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from benchmarks import longform
from tests.support.saved_model import save_tiny_model
from tokenizer.audio import write_audio


def test_recordings_figures_and_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model", stop_bias=30.0, max_frames=100)
    text = tmp_path / "text.txt"
    text.write_text("Good morning to you. The fox is quick! How do you do? She sells sea shells. " * 2)
    output, figures = tmp_path / "made", tmp_path / "figures.json"
    words = [str(text), "--model", str(model), "--minutes", "0.04", "--window", "0.4", "--anchor", "1"]
    words += [
        "--segment",
        "0.4",
        "--carry",
        "0.4",
        "--max-drift",
        "0.5",
        "--output",
        str(output),
        "--json",
        str(figures),
    ]
    files = ["--markdown", str(tmp_path / "a.md"), "--picture", str(tmp_path / "a.png")]
    monkeypatch.setattr(longform, "REAL_START_SECONDS", 0.2)
    monkeypatch.setattr(longform, "REAL_SECONDS", 3.0)
    write_audio(tmp_path / "real" / "hum.wav", 0.1 * torch.randn(1, 80000), 24000)
    assert longform.main([*words, *files, "--real", str(tmp_path / "real")]) == 0
    found = json.loads(figures.read_text())
    names = ["music-without-0", "text-without-0", "music-with-0", "text-with-0"]
    assert list(found["runs"]) == names
    for name in names:
        assert soundfile.info(output / f"{name}.wav").duration == found["runs"][name]["seconds"]
    assert found["runs"]["music-with-0"]["seconds"] == 2.4
    assert found["summary"]["music-without-0"]["re_anchorings"] == 0 < found["summary"]["music-with-0"]["re_anchorings"]
    assert found["summary"]["music-with-0"]["share_silent"] == 0.0
    assert found["summary"]["real"]["windows"] == len(found["real"][0]["windows"]) > 3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "a.md").read_text()
    assert written in capsys.readouterr().out and "| music-with-0 | 2 | " in written

    (output / "text-with-0.json").unlink()  # as if it had been interrupted there

    def only_one(*args: object, **kwargs: object) -> object:
        made.append(args)
        return stream(*args, **kwargs)

    made: list[object] = []
    stream = longform.AudioModel.generate_stream
    monkeypatch.setattr(longform.AudioModel, "generate_stream", only_one)
    assert longform.main(words) == 0
    del found["summary"]["real"]
    assert len(made) == 1 and json.loads(figures.read_text())["summary"] == found["summary"]


def test_drift_by_minute() -> None:
    windows = [{"at_s": 60.0, "a": -1.0, "b": 0.5}, {"at_s": 61.0, "a": 2.0, "b": -4.0}]
    windows += [{"at_s": 62.0, "a": 1.0, "b": 0.0}, {"at_s": 200.0, "a": 0.0, "b": 1.0}]
    assert longform.by_minute(windows, "a") == [1.0, 1.5, None, 0.0]
    assert longform.by_minute(windows, None) == [1.0, 2.5, None, 1.0]


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longform.main([str(tmp_path / "none.txt"), "--output", str(tmp_path / "o")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert longform.main([str(tmp_path / "none.txt"), "--output", str(tmp_path / "o"), "--anchor", "3"]) == 2
    assert "anchor_seconds=3" in capsys.readouterr().err


def test_silent_seconds(tmp_path: Path) -> None:
    seconds = torch.cat([0.1 * torch.randn(1, 24000), torch.zeros(1, 24000), 0.1 * torch.randn(1, 36000)], dim=1)
    write_audio(tmp_path / "a.wav", seconds, 24000)
    assert longform.silent_share(tmp_path / "a.wav") == pytest.approx(1 / 3)
