"""The comparison of bottlenecks: from recordings to the tables in one command, and figures that are what they say."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from benchmarks import bottlenecks
from benchmarks.bottleneck_scores import (
    Part,
    judged_parts,
    noise_distances,
    noise_floor,
    spread_of,
    training_parts,
    write_frames,
)
from benchmarks.bottlenecks_report import compare, markdown
from tests.support.toy_corpus import TINY_MODEL
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config
from tokenizer.settings import from_mapping
from training import estimates
from training.config import read_yaml
from training.corpus import PcmCache, TokenCache, prepare_audio
from training.tokenizer_task import TokenizerTaskConfig

DATA = Path(__file__).parent.parent / "data"
TINY_CODEC = {
    **{"encoder_dim": 8, "encoder_blocks": 1, "decoder_dim": 8, "decoder_blocks": 1, "frame_dim": 8},
    **{"encoder_frame_blocks": 1, "decoder_frame_blocks": 1, "latent_dim": 6, "num_codebooks": 1, "codebook_size": 4},
    **{"num_mels": 16, "num_phase_bins": 8, "excitation": "none"},
}


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    prepare_audio(DATA / "manifest.jsonl", folder, workers=1, console=Console(file=io.StringIO()))
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 50)


def study(audio: Path, output: Path) -> dict[str, Any]:
    model = {name: value for name, value in TINY_MODEL.items() if name != "max_frames"}
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 0}
    quiet = {"noise_gamma": 0, "quantized_share": 0, "adversarial_weight": 0, "feature_matching_weight": 0}
    return {
        "output": str(output),
        "caches": [str(audio)],
        "score": "test",
        "variants": {
            "plain": {"tokenizer": {"normalization": "none"}, "about": "nothing"},
            "noisy": {"losses": {"noise_gamma": 0.5}},
        },
        "first": "noisy",
        "speech_sets": ["kathleen", "kerstin"],
        "seeds": 1,
        "sigmas": [0.3],
        "sigma": 0.3,
        "test_clips": 12,
        "test_seconds": 1.5,
        "steps": 2,
        "batch_size": 2,
        "segment_frames": 5,
        "tokenizer": TINY_CODEC,
        "losses": {**quiet, "loudness_weight": 0, "rate_weight": 0},
        "optimizer": optimizer,
        "ema_decay": 0.99,
        "model_steps": 2,
        "model_optimizer": optimizer,
        "model_ema_decay": 0.99,
        "model_seconds": 4.0,
        "batch_frames": 40,
        "max_frames": 20,
        "model": {**model, "short_context_frames": 0, "history_noise": 0},
    }


def run(mapping: dict[str, Any], folder: Path, *arguments: str) -> int:
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(mapping, sort_keys=False))
    reports = ["--markdown", str(folder / "report.md"), "--json", str(folder / "report.json")]
    return bottlenecks.main(["--config", str(config), *reports, *arguments])


def test_from_recordings_to_tables(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = study(audio, tmp_path / "runs")
    assert run(mapping, tmp_path, "--one", "noisy/0") == 0
    assert not (tmp_path / "report.md").exists()
    reports: list[tuple[str, dict[str, Any]]] = []
    report = bottlenecks.report
    monkeypatch.setattr(bottlenecks, "report", lambda *given: reports.append(report(*given)) or reports[-1])
    assert run(mapping, tmp_path) == 0
    printed = capsys.readouterr()
    assert len(reports) == 2 and printed.err.count("# Bottlenecks") == 1  # one after each run, and the last
    text = (tmp_path / "report.md").read_text()
    assert "runs are done" not in text and printed.out.strip() == text.strip()
    assert "- plain: nothing" in text and "| noisy - plain | 0.3 |" in text
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["clips"] == 3
    for variant, row in figures["variants"].items():
        saved = json.loads((tmp_path / "runs" / variant / "seed0" / "test.json").read_text())
        clips, distances = saved["clips"], saved["distances"]
        assert {clip["key"] for clip in clips} == {"kathleen-2.opus", "kerstin.opus", "tabla.opus"}
        # 1.5 s are 38 frames; the spread is that of the training frames, and no test clip is among these.
        assert all(clip["nll"]["num_frames"] == 38 and clip["labels"]["goes_on"] == "true" for clip in clips)
        frames = TokenCache(tmp_path / "runs" / variant / "seed0" / "train")
        assert spread_of(frames) == saved["spread"]
        assert not {frames.index.clip(i).key.split("@")[0] for i in range(len(frames))} & {c["key"] for c in clips}
        assert saved["model_settings"]["language"]["model"]["sigma"] == pytest.approx(0.3 * saved["spread"])
        nats = sum(clip["nll"]["latents"] for clip in clips) / (3 * 38)
        above = nats - 3 * math.log(2 * math.pi * math.e * (0.3 * saved["spread"]) ** 2)
        assert row["rate"]["bits_per_second"]["value"] == pytest.approx(25 * above / math.log(2))
        speech = [r for r in distances if r["sigma"] == 0.3 and r["set"] != "sonicpi"]
        assert len(speech) == 2 and all(r["stoi"] is not None for r in speech)
        mean = sum(r["multi_mel_distance"] for r in speech) / 2
        assert row["distances"][1]["mel_speech"]["value"] == pytest.approx(mean)
        music = next(r for r in distances if r["set"] == "sonicpi")
        assert music["stoi"] is None and row["distances"][0]["mel_other"]["value"] == music["multi_mel_distance"]
    scales = {name: row["latent_scale"][0] for name, row in figures["variants"].items()}
    assert scales["noisy"] is None and scales["plain"] > 0
    # Latents without normalization come to the language model at unit scale.
    assert figures["variants"]["plain"]["spread"][0] == pytest.approx(1.0, abs=0.3)

    # Another split needs no other training.
    model = tmp_path / "runs" / "plain" / "seed0" / "model" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    assert run(mapping, tmp_path, "score=validation") == 0
    assert model.stat().st_mtime_ns == before
    validation = json.loads((tmp_path / "runs" / "plain" / "seed0" / "validation.json").read_text())
    held_back = {clip["key"] for clip in validation["clips"]}
    assert held_back and not held_back & {"kathleen-2.opus", "kerstin.opus", "tabla.opus"}

    monkeypatch.setattr(bottlenecks, "make", lambda *_: pytest.fail("what is there is not made again"))
    assert run(mapping, tmp_path) == 0 and run(mapping, tmp_path, "--one", "noisy/0") == 0
    assert json.loads((tmp_path / "report.json").read_text())["variants"] == figures["variants"]
    capsys.readouterr()
    assert run({**mapping, "model_steps": 3}, tmp_path) == 2
    assert "made with other settings (max_steps, validate_every)" in capsys.readouterr().err


def test_a_study_names_its_first_variant_and_its_noise(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = study(audio, tmp_path / "runs")
    assert run({**mapping, "first": "other"}, tmp_path) == 2
    assert "first=other is none of the variants plain, noisy" in capsys.readouterr().err
    assert run({**mapping, "sigma": 0.2}, tmp_path) == 2
    assert "sigma=0.2 must be one of sigmas=[0.3]" in capsys.readouterr().err


def test_the_shipped_study_is_valid() -> None:
    found = from_mapping(bottlenecks.Study, read_yaml(bottlenecks.HERE / "bottlenecks.yaml"))
    runs = bottlenecks.runs_of(found)
    assert len(runs) == found.seeds * len(found.variants)
    for run in runs[: len(found.variants)]:
        settings = bottlenecks.codec_settings(found, run)
        config = from_mapping(TokenizerTaskConfig, settings["tokenizer_task"])
        assert config.losses.quantized_share == config.losses.rate_weight == 0


def test_parts_for_the_model(audio: Path) -> None:
    cache = PcmCache(audio, split="train")
    parts = training_parts(cache, 40.0, 2.0)
    assert parts == training_parts(cache, 40.0, 2.0) and len({part.key for part in parts}) == len(parts)
    assert sum(part.samples for part in parts) >= 40 * 24000 > sum(part.samples for part in parts[:-1])
    rows = {clip: int(cache.index.rows[clip]) for clip in range(len(cache))}
    assert all(part.samples == min(48000, rows[part.clip]) for part in parts)
    assert all(0 <= part.start <= rows[part.clip] - part.samples for part in parts)
    assert len({part.start for part in parts}) > 3


def test_parts_for_the_test_spread_over_each_set(audio: Path) -> None:
    cache = PcmCache(audio)
    keys = [part.key for part in judged_parts(cache, 2.0, 1)]
    assert keys == ["kathleen-1.opus", "kerstin.opus", "saxophone.opus", "breakbeat.opus"]
    everything = judged_parts(cache, 2.0, 9)
    assert len(everything) == 6 and {part.start for part in everything} == {0}


def test_noise_is_relative_to_the_spread_and_alike_for_all(audio: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cache = PcmCache(audio)
    parts = [Part("a", 0, 0, 24000), Part("b", 2, 4800, 24000)]
    decoded: list[torch.Tensor] = []
    keep = []
    for scale in (1.0, 10.0):
        codec = F3Tokenizer(F3Config(**TINY_CODEC, normalization="none")).eval()  # type: ignore[arg-type]
        codec = codec.standardized(torch.zeros(6), 1.0 / scale)
        plain = codec.decode_latents
        codec.decode_latents = lambda z, plain=plain: (decoded.append(z), plain(z))[1]  # type: ignore[method-assign]
        frames = write_frames(cache, parts, codec, tmp_path / str(scale))
        spread = spread_of(frames)
        list(noise_distances(codec, cache, parts, spread=spread, sigmas=(0.0, 0.5), speech_sets=()))
        clean = [frames[0].latents, frames[1].latents]
        assert torch.equal(decoded[0][0], clean[0]) and torch.equal(decoded[2][0], clean[1])
        keep.append([(decoded[1][0] - clean[0]) / spread, (decoded[3][0] - clean[1]) / spread])
        assert torch.cat(keep[-1]).std() == pytest.approx(0.5, rel=0.15)
        decoded.clear()
    torch.testing.assert_close(keep[0], keep[1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(keep[0][0], keep[0][1])


def test_frames_go_on_where_they_stopped(audio: Path, tmp_path: Path) -> None:
    codec = F3Tokenizer(F3Config(**TINY_CODEC)).eval()  # type: ignore[arg-type]
    cache = PcmCache(audio)
    parts = [Part("a", 0, 4800, 9600), Part("b", 1, 0, 9600)]
    write_frames(cache, parts[:1], codec, tmp_path)
    encode = codec.encode
    seen: list[int] = []
    codec.encode = lambda x: (seen.append(1), encode(x))[1]  # type: ignore[method-assign]
    found = write_frames(cache, parts, codec, tmp_path)
    assert len(found) == 2 and len(seen) == 1
    expected = encode(cache.read(0, 4800, 9600)[None]).latents[0]
    torch.testing.assert_close(found[0].latents, expected, atol=1e-5, rtol=1e-4)


def results(nats: float, *, scale: float = 1.0, mel: float = 1.0, seeds: int = 2) -> dict[int, dict[str, Any]]:
    """Clips of unequal difficulty and length, seeds 0.1 apart; latents of this scale."""
    found = {}
    for seed in range(seeds):
        clips, distances = [], []
        for number in range(8):
            frames = 10 + number
            latents = (number + nats + 0.1 * seed + 64 * math.log(scale)) * frames
            nll = {"num_frames": frames, "codes": [], "latents": latents, "stop": 5.0, "correct": []}
            clips.append({"key": str(number), "labels": {}, "nll": nll})
            for sigma in (0.0, 0.3):
                row = {"key": str(number), "set": "ab"[number % 2], "sigma": sigma, "stoi": None, "pesq_wb": None}
                distance = mel + number + sigma + 0.1 * seed
                distances.append({**row, "multi_mel_distance": distance, "si_sdr_db": None if number == 3 else 1.0})
        found[seed] = {
            **{"clips": clips, "distances": distances, "test": {"speech_sets": ["a"]}, "sigma": 0.3, "latent_dim": 64},
            **{"noise_floor": noise_floor(64, 0.3 * scale), "spread": scale, "latent_scale": None, "machine": "one"},
            **{"frame_rate_hz": 25.0, "parameters": 1000},
            **{part: {"steps": 5, "skipped_steps": 0, "seconds": 60.0} for part in ("codec", "model")},
        }
    return found


def test_the_rate_does_not_depend_on_the_latents_scale() -> None:
    figures = compare({"ours": results(40.0), "theirs": results(40.25, scale=7.0)}, "ours")
    rates = {name: row["rate"]["bits_per_second"]["value"] for name, row in figures["variants"].items()}
    # 0.25 nats at 25 Hz are 9.0 bits a second.
    assert rates["theirs"] - rates["ours"] == pytest.approx(0.25 * 25 / math.log(2))
    difference = figures["differences"][0]["rate"]["bits_per_second"]
    assert [difference["value"], *difference["interval"]] == pytest.approx([-0.25 * 25 / math.log(2)] * 3)
    assert "-9* [-9, -9] |" in markdown(figures, {}, [])


def test_noise_floor_is_the_entropy_of_the_noise() -> None:
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(64), torch.full((64,), 0.3)), 1)
    assert noise_floor(64, 0.3) == pytest.approx(normal.entropy().item(), rel=1e-5)


def test_differences_are_paired_by_clip_and_of_common_seeds() -> None:
    figures = compare({"theirs": results(40.0, mel=1.5, seeds=2), "ours": results(40.0, seeds=1)}, "ours")
    assert figures["variants"]["theirs"]["seeds"] == [0, 1] and figures["differences"][0]["seeds"] == [0]
    for row in figures["differences"][0]["distances"]:
        for name in ("mel_speech", "mel_other"):
            assert [row[name]["value"], *row[name]["interval"]] == pytest.approx([-0.5] * 3)
            assert row[name]["clips"] == 4
        assert row["stoi"] is None and row["si_sdr_db"]["clips"] == 7
    absolute = figures["variants"]["theirs"]["distances"][1]["mel_speech"]
    assert absolute["value"] == pytest.approx(1.5 + 3 + 0.3 + 0.05)
    assert absolute["interval"][1] - absolute["interval"][0] > 1.0


def test_nothing_yet_is_a_report_too() -> None:
    assert compare({"ours": {}}, "ours")["variants"] == {}
    assert markdown(compare({"ours": {}}, "ours"), {}, ["none"]).endswith("none\n")


@pytest.mark.parametrize("part", ["parameters", "codec", "clips"])
def test_runs_that_differ_do_not_compare(part: str) -> None:
    made = {"ours": results(1.0), "theirs": results(1.0)}
    other = made["theirs"][1]
    other[part] = {"parameters": 999, "codec": {**other["codec"], "steps": 6}, "clips": other["clips"][1:]}[part]
    with pytest.raises(UserError, match="differ"):
        compare(made, "ours")
