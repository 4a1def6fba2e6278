"""The table of enhancement: deterministic pairs, paired differences, and the rows that tell what a codec costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import enhancement
from tests.support.saved_model import save_tiny_enhancer
from tokenizer.audio import write_audio
from tokenizer.metrics import si_sdr
from training.manifest import Clip

RATE = 24_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_enhancer(tmp_path_factory.mktemp("enhancer") / "model")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, lines = tmp_path_factory.mktemp("corpus"), []
    time = torch.arange(RATE) / RATE
    for number in range(8):
        split = "test" if number < 6 else "train"
        generator = torch.Generator().manual_seed(number)
        talk = 0.3 * torch.sin(2 * math.pi * (120 + 20 * number) * time) * torch.sin(2 * math.pi * 3 * time).abs()
        hiss = 0.1 * torch.randn(RATE // 2, generator=generator)
        for kind, waveform in (("talk", talk), ("hiss", hiss)):
            write_audio(folder / f"{kind}{number}.wav", waveform[None], RATE)
            lines.append(json.dumps({"path": f"{kind}{number}.wav", "set": kind, "split": split}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def measure(model: Path, manifest: Path, output: Path, *words: object) -> dict[str, Any]:
    each = output.with_suffix(".jsonl")
    arguments = ["--manifest", manifest, "--sets", "talk", "--noise-set", "hiss", "--json", output, "--clips", each]
    arguments += ["--markdown", output.with_suffix(".md"), "--enhancers", model]
    assert enhancement.main([str(word) for word in [*arguments, *words]]) == 0
    return {**json.loads(output.read_text()), "clips": [json.loads(line) for line in each.read_text().splitlines()]}


def test_the_table(model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(model, manifest, tmp_path / "a.json", "--snr", 0, 20, "--limit", 3)
    rows = {(row["snr_db"], row["row"]): row for row in report["rows"]}
    names = ["noisy", "spectral gate", "codec of noisy", "codec of clean", "enhanced", "masked"]
    assert list(rows) == [(snr, name) for snr in (0.0, 20.0) for name in names]
    for snr in (0.0, 20.0):
        assert rows[snr, "noisy"]["si_sdr_db"]["mean"] == pytest.approx(snr, abs=0.3)
        assert rows[snr, "noisy"]["si_sdr_db_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "count": 3}
        assert rows[snr, "codec of noisy"] != rows[snr, "enhanced"]
        assert rows[snr, "masked"]["si_sdr_db"]["mean"] > rows[snr, "enhanced"]["si_sdr_db"]["mean"] + 5
    clean = [clip for clip in report["clips"] if clip["row"] == "codec of clean"]
    assert clean[0]["si_sdr_db"] == pytest.approx(clean[1]["si_sdr_db"], abs=0.2), "noise reaches the clean row"
    changes = [
        clip["si_sdr_db"] - noisy["si_sdr_db"]
        for clip, noisy in zip(of(report, "enhanced", 0), of(report, "noisy", 0), strict=True)
    ]
    assert rows[0.0, "enhanced"]["si_sdr_db_change"]["mean"] == pytest.approx(sum(changes) / 3)
    text, said = (tmp_path / "a.md").read_text(), capsys.readouterr().out
    assert "| talk | 20 | codec of clean | 3 |" in text and "| talk | 20 | masked | 3 |" in text and text in said
    assert "`python -m benchmarks.enhancement --manifest" in text and report["tokenizer"] in text
    assert {clip["clip"] for clip in report["clips"]} == {"talk0.wav", "talk2.wav", "talk4.wav"}
    assert {clip["noise"] for clip in report["clips"]} <= {f"hiss{number}.wav" for number in range(6)}


def of(report: dict[str, Any], row: str, snr: float) -> list[dict[str, Any]]:
    return [clip for clip in report["clips"] if (clip["row"], clip["snr_db"]) == (row, snr)]


def test_pairs_follow_from_the_seed(model: Path, manifest: Path, tmp_path: Path) -> None:
    one = measure(model, manifest, tmp_path / "a.json", "--snr", 5)
    few = measure(model, manifest, tmp_path / "b.json", "--snr", 5, "--limit", 2, "--against", "codec of noisy")
    assert [row["row"] for row in few["rows"] if not row["si_sdr_db_change"]["mean"]] == ["codec of noisy"]
    other = measure(model, manifest, tmp_path / "c.json", "--snr", 5, "--seed", 1)
    known = {clip["clip"]: clip for clip in of(one, "noisy", 5)}
    assert all(clip == known[clip["clip"]] for clip in of(few, "noisy", 5)), "a limit changes no clip"
    assert [clip["noise"] for clip in of(other, "noisy", 5)] != [clip["noise"] for clip in known.values()]


def test_several_enhancers_have_a_mean(model: Path, manifest: Path, tmp_path: Path) -> None:
    again = save_tiny_enhancer(tmp_path / "again")
    weights = again / "model.safetensors"
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()
    report = measure(model, manifest, tmp_path / "a.json", again, "--limit", 1, "--snr", 0)
    rows = {row["row"]: row for row in report["rows"]}
    kinds, names = ("enhanced", "masked"), (model, again, "mean")
    assert set(list(rows)[-6:]) == {f"{kind}, {name}" for kind in kinds for name in names}
    for kind in kinds:
        assert rows[f"{kind}, mean"]["stoi"]["mean"] == pytest.approx(rows[f"{kind}, {again}"]["stoi"]["mean"])
    assert rows["enhanced, mean"]["stoi"] != rows["masked, mean"]["stoi"]
    text = (tmp_path / "a.md").read_text()
    assert "| masked, mean |" in text and f"| masked, {again} |" not in text and f"| enhanced, {model} |" not in text


def test_noise_is_repeated_from_where_it_begins(manifest: Path) -> None:
    noises = [Clip(path=manifest.parent / "hiss0.wav", key="hiss0.wav")]
    clip = Clip(path=manifest.parent / "talk0.wav", key="talk0.wav")
    key, noise = enhancement.draw_noise(clip, noises, 0, 3 * RATE, RATE)
    assert key == "hiss0.wav" and noise.shape == (1, 3 * RATE)
    assert torch.equal(noise[:, : RATE // 2], noise[:, RATE // 2 : RATE]) and noise.std() > 0.05
    assert not torch.equal(noise, enhancement.draw_noise(clip, noises, 1, 3 * RATE, RATE)[1])


def test_the_gate_takes_steady_noise_away() -> None:
    time = torch.arange(2 * RATE) / RATE
    talk = 0.3 * torch.sin(2 * math.pi * 300 * time) * (torch.sin(2 * math.pi * 2 * time) > 0)
    noisy = talk + 0.05 * torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    made = enhancement.spectral_gate(noisy[None])[0]
    assert made.shape == noisy.shape
    assert si_sdr(talk, made) > si_sdr(talk, noisy) + 5


def test_validation_is_of_the_training_split(manifest: Path) -> None:
    held = enhancement.noise_clips(manifest, "validation", "hiss")
    assert held and {clip.key for clip in held} <= {"hiss6.wav", "hiss7.wav"}


def test_bad_requests(model: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--manifest", str(manifest), "--sets", "talk", "--noise-set", "hiss", "--enhancers"]
    assert enhancement.main([*base, str(tmp_path)]) == 2
    assert "not an enhancer's folder" in capsys.readouterr().err
    assert enhancement.main([*base[:4], "--noise-set", "rain", "--enhancers", str(model)]) == 2
    assert "--noise-set rain" in capsys.readouterr().err
    assert enhancement.main([*base[:2], "--sets", "song", "--noise-set", "hiss", "--enhancers", str(model)]) == 2
    assert "--sets song" in capsys.readouterr().err
