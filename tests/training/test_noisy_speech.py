"""Mixtures: their ratio is what was asked for, silence breaks nothing, and batches are a function of their place."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizer.audio import write_audio
from tokenizer.errors import UserError
from training.manifest import TagRule
from training.noisy_speech import NoiseConfig, NoisySpeech, active_power, mix_at_snr
from training.task import Batch
from training.tokenizer_data import TokenizerDataConfig

RATE = 8000


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def tone(samples: int, level: float = 0.1) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * 200 * torch.arange(samples) / RATE).reshape(1, 1, -1)


def ratio_db(speech: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return 10 * (speech.double().square().mean(dim=(1, 2)) / added.double().square().mean(dim=(1, 2))).log10()


def test_the_ratio_is_exact() -> None:
    wanted = torch.tensor([-5.0, 0.0, 7.5, 40.0])
    speech = noise(4, RATE, seed=1) * torch.tensor([1.0, 0.1, 3.0, 0.5]).reshape(-1, 1, 1)
    mixture = mix_at_snr(speech, noise(4, RATE), wanted, RATE)
    assert torch.equal(mixture.clean, speech)
    torch.testing.assert_close(ratio_db(speech, mixture.noisy - speech).float(), wanted, atol=1e-3, rtol=0)


def test_pauses_count_neither_in_speech_nor_in_noise() -> None:
    part = RATE // 5  # whole frames of 20 ms
    speech, bark = torch.zeros(1, 1, 4 * part), torch.zeros(1, 1, 4 * part)
    speech[..., : 2 * part] = tone(2 * part)
    bark[..., part : 2 * part] = noise(1, part)
    mixture = mix_at_snr(speech, bark, torch.tensor([3.0]), RATE)
    added = mixture.noisy - mixture.clean
    assert ratio_db(speech[..., : 2 * part], added[..., part : 2 * part]).item() == pytest.approx(3.0, abs=1e-3)
    assert ratio_db(speech, added).item() == pytest.approx(3.0 + 10 * math.log10(2), abs=1e-3)


def test_active_power_by_hand() -> None:
    frame = RATE // 50
    levels = torch.tensor([0.5, 0.1, 0.01, 0.0])  # the third is 34 dB below the first, the last is silence
    waveform = levels.repeat_interleave(frame).reshape(1, 1, -1)
    assert active_power(waveform, RATE).item() == pytest.approx((0.25 + 0.01) / 2)
    assert active_power(waveform[..., frame:], RATE).item() == pytest.approx((0.01 + 0.0001) / 2)
    assert active_power(torch.full((1, 1, 3), 0.5), RATE).item() == 0.25
    assert active_power(torch.zeros(2, 1, 0), RATE).tolist() == [0, 0]
    assert active_power(torch.full((1, 1, RATE), 1e-5), RATE).item() == 0


def test_silence_and_no_noise_at_all() -> None:
    speech = torch.cat([torch.zeros(1, 1, RATE), tone(RATE), tone(RATE), torch.zeros(1, 1, RATE)])
    added = noise(4, RATE)
    added[1] = 0
    mixture = mix_at_snr(speech, added, torch.tensor([0.0, 0.0, math.inf, math.inf]), RATE)
    assert torch.equal(mixture.noisy[0], added[0]), "to silent speech, noise comes as it is"
    assert torch.equal(mixture.noisy[1], speech[1]), "silent noise changes nothing"
    assert torch.equal(mixture.noisy[2:], speech[2:]), "infinity is no noise"
    assert torch.equal(mixture.clean, speech)


def test_what_is_too_loud_is_turned_down_with_its_speech() -> None:
    speech, added = tone(RATE, level=0.9), noise(1, RATE)
    mixture = mix_at_snr(speech, added, torch.tensor([-5.0]), RATE)
    assert mixture.noisy.abs().max().item() == pytest.approx(1.0)
    assert mixture.clean.abs().max() < 0.6
    measured = ratio_db(mixture.clean, mixture.noisy - mixture.clean).item()
    assert measured == pytest.approx(-5.0, abs=1e-3)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech is a tone, noise a constant: a batch tells which was drawn, and how loud."""
    folder, lines = tmp_path_factory.mktemp("corpus"), []
    for number in range(20):
        speech, split = number % 2 == 0, "test" if number % 5 == 4 else "train"
        level = -0.9 if split == "test" else 0.05 + 0.001 * number
        waveform = tone(2 * RATE)[0] if speech else torch.full((1, 2 * RATE), level)
        write_audio(folder / f"{number}.wav", waveform, RATE)
        lines.append(json.dumps({"path": f"{number}.wav", "set": "tones" if speech else "hum", "split": split}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def source(manifest: Path, **noise_settings: Any) -> NoisySpeech:
    data = TokenizerDataConfig(
        sources=(str(manifest),),
        rules=(TagRule(where={"set": "tones"}),),
        batch_size=6,
        validation_fraction=0.2,
        validation_segments=5,
    )
    rules = (TagRule(where={"set": "hum"}),)
    noise_config = NoiseConfig(sources=(str(manifest),), rules=rules, validation_fraction=0.2, **noise_settings)
    return NoisySpeech(data, noise_config, RATE, RATE // 4)


def take(mixtures: NoisySpeech, count: int, **place: int) -> list[Batch]:
    return list(islice(mixtures.batches(**{"seed": 0, "rank": 0, "world_size": 1, "skip": 0, **place}), count))


def test_batches_hold_training_noise_within_the_range(manifest: Path) -> None:
    snr = torch.cat([ratio_of(batch) for batch in take(source(manifest, snr_db=(2.0, 9.0)), 20)])
    finite = snr[snr.isfinite()]
    assert len(snr) == 120 and 4 <= (~snr.isfinite()).sum() <= 22
    assert 2.0 - 0.05 <= finite.min() < 3 and 8 < finite.max() <= 9.0 + 0.05


def ratio_of(batch: Batch) -> torch.Tensor:
    added = batch["noisy"] - batch["clean"]
    assert added.min() > -1e-4, "noise of the test split is negative"
    return ratio_db(batch["clean"], added.where(added.abs() > 1e-6, torch.zeros(())))


def test_batches_depend_on_their_place_alone(manifest: Path) -> None:
    mixtures = source(manifest)
    first, again = take(mixtures, 3), take(mixtures, 1, skip=2)
    assert all(torch.equal(first[2][name], again[0][name]) for name in ("noisy", "clean"))
    for other in ({"seed": 1}, {"rank": 1, "world_size": 2}, {"skip": 1}):
        assert not torch.equal(take(mixtures, 1, **other)[0]["noisy"], first[0]["noisy"]), other
    levels = [(batch["noisy"] - batch["clean"]).mean(dim=(1, 2)) for batch in first]
    assert len({round(float(level), 6) for batch in levels for level in batch}) > 6, "rows of one step differ"


def test_validation_is_held_back_and_spans_the_range(manifest: Path) -> None:
    one, two = (source(manifest, snr_db=(0.0, 8.0)).validation for _ in range(2))
    assert torch.equal(one.noisy, two.noisy)
    snr = ratio_db(one.clean, one.noisy - one.clean)
    torch.testing.assert_close(snr, torch.linspace(0, 8, 5).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ("a",), "caches": ("b",)}, "either caches or sources of noise"),
        ({}, "either caches or sources of noise"),
        ({"sources": ("a",), "snr_db": (5.0, 0.0)}, r"snr_db=\[5.0, 0.0\] must be two numbers, the lower one first"),
        ({"sources": ("a",), "snr_db": (5.0,)}, "must be two numbers"),
        ({"sources": ("a",), "snr_db": (0.0, math.inf)}, "must be two numbers"),
        ({"sources": ("a",), "clean_share": 1.0}, "clean_share=1.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**settings)


def test_a_set_that_is_not_there_is_told(manifest: Path) -> None:
    data = TokenizerDataConfig(sources=(str(manifest),))
    wrong = NoiseConfig(sources=(str(manifest),), rules=(TagRule(where={"sett": "hum"}),))
    with pytest.raises(UserError, match="no clip has the label 'sett'; did you mean 'set'"):
        NoisySpeech(data, wrong, RATE, RATE)
