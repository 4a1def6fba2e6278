"""The benchmark of tokenizers runs from its command line and reports what it says; times themselves prove nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tokenizer_speed, tokenizer_training
from benchmarks.tokenizer_layouts import PUBLISHED, layout_names, open_tokenizer, small_dasheng
from benchmarks.tokenizer_memory import stream_peaks
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.errors import UserError


@pytest.fixture
def codec(tmp_path: Path) -> str:
    tiny_tokenizer().save(tmp_path / "codec")
    return str(tmp_path / "codec")


def test_speed_and_memory(codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "speed.json"
    arguments = ["--tokenizer", codec, "--seconds", "0.2", "--repeats", "3", "--batch", "1", "2", "--hours", "0.018"]
    assert tokenizer_speed.main([*arguments, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    rows = {(row["batch"], row["job"]): row for row in report["speed"]}
    assert list(rows) == [(batch, job) for batch in (1, 2) for job in ("encode", "decode codes", "decode latents")]
    for row in rows.values():
        ours, theirs = (row[name]["median"] for name in ("real_time_factor", "encodec_real_time_factor"))
        assert row["times_faster"]["ratio_of_medians"] == pytest.approx(theirs / ours)
        assert row["bits_per_second"] == 3 * 5 * 25
    (memory,) = report["memory_bytes"]
    assert memory["minutes"] == pytest.approx(65 / 60)
    assert memory["loaded"] > 2**20
    assert 0 <= memory["after_first_minute"] <= memory["after_all"]
    printed = capsys.readouterr().out
    assert "batch  2  decode latents" in printed
    assert "(1.08333 min)" in printed


def test_a_report_is_filled_in_parts() -> None:
    old = {"torch": "1", "speed": [{"tokenizer": "a", "batch": 1, "job": "encode", "x": n} for n in (1,)]}
    old["speed"].append({"tokenizer": "b", "batch": 1, "job": "encode", "x": 2})
    new = {"torch": "2", "speed": [{"tokenizer": "a", "batch": 1, "job": "encode", "x": 3}], "training": []}
    found = tokenizer_speed.joined(old, new)
    assert found["torch"] == "2"
    assert [(row["tokenizer"], row["x"]) for row in found["speed"]] == [("b", 2), ("a", 3)]
    new = {"memory_bytes": [{"tokenizer": "a"}]}
    assert tokenizer_speed.joined(found, new)["speed"] == found["speed"]


def test_ratios() -> None:
    seconds = {job: [1.0, 2.0, 4.0] for job in ("encode", "decode codes", "decode latents")}
    peer = {f"encodec {job}": [3.0, 8.0, 8.0] for job in ("encode", "decode")}
    row = tokenizer_speed.compare(seconds | peer, audio_s=20.0)[0]
    assert row["job"] == "encode"
    assert row["real_time_factor"]["median"] == 2.0 / 20.0
    assert row["encodec_real_time_factor"]["median"] == 8.0 / 20.0
    assert row["times_faster"]["ratio_of_medians"] == 4.0
    rounds = row["times_faster"]["per_round"]
    assert (rounds["min"], rounds["median"], rounds["max"]) == (2.0, 3.0, 4.0)


def test_a_shorter_stream_is_its_first_minute(codec: str) -> None:
    row = stream_peaks(codec, minutes=0.05)
    assert row["minutes"] == pytest.approx(0.05)
    assert row["after_first_minute"] == row["after_all"]


SMALL = {
    "codec-box-whole": ("tokenizer_task", {"encoder_dim": 16, "decoder_dim": 16, "frame_dim": 16}),
    "dasheng-small": ("dasheng", {"decoder_dim": 16, "decoder_hidden_dim": 16, "decoder_blocks": 1}),
}


@pytest.mark.parametrize("recipe", SMALL)
def test_training(recipe: str) -> None:
    section, sizes = SMALL[recipe]
    small = [f"tokenizer.{name}={size}" for name, size in sizes.items()]
    small += ["data.batch_size=2", "data.segment_frames=4", "data.validation_segments=1"]
    row = tokenizer_training.measure(recipe, 1, [f"{section}.{setting}" for setting in small])
    assert (row["batch_size"], row["segment_s"]) == (2, 4 / 25)
    assert row["audio_s_per_s"] > 0


def test_training_prints_its_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measure(recipe: str, steps: int) -> dict[str, object]:
        asked.append((recipe, steps))
        return {"recipe": recipe, "batch_size": 16, "segment_s": 1.0, "audio_s_per_s": 12.0}

    monkeypatch.setattr(tokenizer_training, "measure", measure)
    assert tokenizer_speed.main(["--no-speed", "--training", "3"]) == 0
    assert asked == [("codec-box-whole", 3), ("dasheng-small", 3)]
    assert "dasheng-small" in capsys.readouterr().out


def test_layouts() -> None:
    names = layout_names()
    assert names == ["random:encodec", *(f"random:{name}" for name in PUBLISHED), "random:dasheng-small"]
    assert layout_names(large=True) == [*names, "random:dasheng-published"]
    tokenizer = open_tokenizer("random:dasheng-small")
    assert tokenizer.feature_dim == 256 and tokenizer.lookahead_frames == 25
    assert small_dasheng().decoder_blocks == 8
    with pytest.raises(
        UserError, match=r"random:mimi: no such layout; the layouts are encodec, facebook/encodec_24khz"
    ):
        open_tokenizer("random:mimi")


def test_an_unknown_tokenizer_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer_speed.main(["--tokenizer", str(tmp_path / "absent"), "--seconds", "0.1"]) == 2
    assert "is not a folder" in capsys.readouterr().err
