"""The benchmark of what codecs keep runs from its command line and reports what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import codec_quality
from tokenizer.audio import write_audio
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"encoder_dim": 16, "decoder_dim": 16, "frame_dim": 16, "encoder_blocks": 1, "decoder_blocks": 1}
    F3Tokenizer(F3Config(**sizes, num_codebooks=4, codebook_size=16)).save(tmp_path / "codec")
    return tmp_path / "codec"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = []
    for index, name in enumerate(["talk", "talk", "talk", "noise"]):
        waveform = 0.1 * torch.randn(1, 12000 + 100 * index, generator=torch.Generator().manual_seed(index))
        write_audio(tmp_path / f"{index}.wav", waveform, 24000)
        lines.append({"path": f"{index}.wav", "set": name, "split": "test"})
    (tmp_path / "2.wav").write_bytes(b"no audio")
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "manifest.jsonl"


def test_quality(codec: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", str(codec), "--manifest", str(manifest), "--speech-sets", "talk"]
    assert codec_quality.main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["set"], row["source"]): row for row in report["rows"]}
    # 4 codebooks: the default's 8 is left out
    assert list(rows) == [(name, f) for name in ("talk", "noise") for f in ("latents", "codes 1", "codes 2", "codes 4")]
    assert rows["talk", "codes 2"]["bits_per_second"] == 2 * 4 * 25
    assert rows["talk", "latents"]["clips"] == rows["talk", "latents"]["pesq_wb"]["count"] == 2
    assert rows["noise", "latents"]["pesq_wb"]["count"] == 0
    assert rows["noise", "latents"]["mel_distance"]["mean"] > 0
    assert "| noise | latents | 25.60 | 1 | - | - |" in out
    assert "1 of 4 clips left out, the first: 2.wav" in out
    one = [clip["mel_distance"] for clip in report["clips"] if clip["set"] == "talk" and clip["source"] == "codes 1"]
    assert rows["talk", "codes 1"]["mel_distance"]["mean"] == pytest.approx(sum(one) / 2)


def test_quality_names_the_sets_there_are(codec: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codec_quality.main(["--tokenizer", str(codec), "--manifest", str(manifest), "--sets", "song"]) == 2
    assert "it has talk, noise" in capsys.readouterr().err


def test_limit_spreads_over_a_set(manifest: Path) -> None:
    chosen = codec_quality.choose(manifest, "test", ["talk"], 2)
    assert [clip.path.name for _, clip in chosen] == ["0.wav", "1.wav"]
