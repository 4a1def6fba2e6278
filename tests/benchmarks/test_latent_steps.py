"""Steps of the flow head: distances whose values are known, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import latent_steps
from benchmarks.latent_steps import Moments, frechet_distance, measures, ratios
from hybridlm.checkpoint import save_model
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_model
from tokenizer.audio import write_audio

RATE = 24_000


def test_frechet_distance_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    one = Moments.of(x)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, Moments.of(x + torch.tensor([1.0, 2.0, 0.0]))) == pytest.approx(5, rel=1e-6)
    assert frechet_distance(one, Moments.of(3 * x)) == pytest.approx(4 * 3, rel=0.02)  # (3 - 1)^2 in three dimensions
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    wide = x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert frechet_distance(Moments.of(wide @ turn), Moments.of(x @ turn)) == pytest.approx(1 + 4, rel=0.02)
    assert Moments.sum([Moments.of(x[:7]), Moments.of(x[7:])]).covariance == pytest.approx(one.covariance)


def test_mel_statistics_and_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(5, 4000, 2, generator=generator)

    def side(scale: float, shift: float) -> list[dict[str, Moments]]:
        return [{name: Moments.of(scale * clip + shift) for name in ("latents", "mel")} for clip in clips]

    real = side(1, 0)
    whole = [latent_steps.together(one, range(5)) for one in (side(2, 0.5), real)]
    found = measures(*whole)
    assert found["mel_mean"] == pytest.approx(0.5, abs=0.03)
    assert found["mel_std"] == pytest.approx(1, abs=0.03)
    found = ratios(real, side(1, 0.4), side(1, 0.2))
    for measure, wanted in {"latent_frechet": 4, "mel_mean": 2}.items():
        middle, low, high = found[measure]
        assert low - 1e-9 <= middle <= high + 1e-9 and middle == pytest.approx(wanted, rel=0.01)


def test_one_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny_model("hybrid", flow_layers=1, flow_dim=16, flow_distill=0.5)
    torch.nn.init.normal_(made.model.flow_head.output.weight, std=0.5)
    save_model(tmp_path / "flow", made.model, made.tokenizer, made.text, card="# Tiny\n")
    time = torch.arange(3 * RATE) / RATE
    for number in range(3):
        write_audio(tmp_path / f"{number}.wav", 0.3 * torch.sin(2 * math.pi * (200 + 90 * number) * time)[None], RATE)
    lines = [json.dumps({"path": f"{number}.wav", "split": "test"}) for number in range(3)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    common = ["--data", str(tmp_path / "manifest.jsonl"), "--prompt", "1", "--continue", "1", "--steps", "1", "4"]
    outputs = ["--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md")]
    assert latent_steps.main([str(tmp_path / "flow"), *common, *outputs, "--clips", "2", "--seeds", "2"]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["most"] == 4 and len(found["clips"]) == 2 and set(found["times_ms"]) == {"1", "4"}
    for kind in ("teacher-forced", "free-running"):
        rows = found[kind]
        assert set(rows) == {"mixture", "1", "4"}
        assert rows["4"]["to_most"]["mel_mean"] == [1, 1, 1]
        assert len({row["latent_frechet"] for row in rows.values()}) == 3  # each draws otherwise
    assert "(1.00x" not in (tmp_path / "f.md").read_text().split("\n| 4 |")[1].split("\n")[0]
    assert latent_steps.main([str(save_tiny_model(tmp_path / "none")), *common]) == 2
    assert "has no flow head" in capsys.readouterr().err
