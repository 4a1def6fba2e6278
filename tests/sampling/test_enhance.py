"""A file through an enhancer: the same in pieces as whole, and nothing left behind where it fails."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import soundfile
import torch

import sampling.enhance
from sampling.enhance import run
from tests.support.saved_model import save_tiny_enhancer
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.audio import read_audio
from tokenizer.enhancer import load_enhancer
from tokenizer.errors import UserError
from tokenizer.spectral_mask import mask_noise

RATE = 24000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_enhancer(tmp_path_factory.mktemp("enhancer") / "model")


def noise(samples: int) -> torch.Tensor:
    return 0.2 * torch.randn(samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("phase", ["noisy", "decoded"])
def test_pieces_join_into_the_whole(phase: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.enhance, "PIECE_SECONDS", 0.3)
    soundfile.write(tmp_path / "in.wav", torch.stack([noise(53_111), noise(53_111).flip(0)], dim=1).numpy(), 44100)
    where = {"model": folder, "phase": phase, "json_file": tmp_path / "figures.json"}
    figures = run(tmp_path / "in.wav", tmp_path / "out.flac", **where)
    waveform = read_audio(tmp_path / "in.wav", RATE)
    enhancer = load_enhancer(folder)
    enhanced, decoded = enhancer.enhance(waveform[None]), enhancer.decoded(waveform[None])
    masked = mask_noise(waveform[None], decoded, enhanced, RATE)
    assert (masked - waveform).abs().max() > 0.01
    expected = (enhanced if phase == "decoded" else masked)[0, 0]
    found = torch.from_numpy(soundfile.read(tmp_path / "out.flac", dtype="float32")[0])
    assert found.shape == expected.shape == waveform[0].shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert figures["seconds"] == len(found) / RATE and figures["speed"] > 0
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


@pytest.mark.parametrize("samples", [1, 959, 960, 961])
def test_the_output_is_as_long_as_the_input(samples: int, folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", noise(samples).numpy(), RATE)
    run(tmp_path / "in.wav", tmp_path / "out.wav", model=folder)
    assert soundfile.info(tmp_path / "out.wav").frames == samples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "no enhancer in the box; train one with configs/enhancement-small.yaml"),
        ({"model": "box"}, "no enhancer in the box"),
        ({"phase": "none"}, "phase='none' must be one of noisy, decoded"),
        ({"model": "nowhere"}, "no such enhancer folder: 'nowhere'"),
        ({"input": "none.wav"}, "no such file"),
        ({"input": "letter.wav"}, "is not audio"),
        ({"input": "nan.wav"}, "NaN or infinite at 0.500 s"),
        ({"output": "out.mp3"}, "must end in .wav or .flac"),
    ],
)
def test_bad_requests_are_told_and_leave_nothing_behind(
    settings: dict[str, str | None], message: str, folder: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "in.wav", noise(4800).numpy(), RATE)
    broken = noise(RATE)
    broken[RATE // 2] = math.nan
    soundfile.write(tmp_path / "nan.wav", broken.numpy(), RATE, subtype="FLOAT")
    (tmp_path / "letter.wav").write_text("This is a letter.")
    before = sorted(os.listdir(tmp_path))
    request = {"input": "in.wav", "output": "out.wav", "model": folder} | settings
    paths = [tmp_path / str(request.pop(name)) for name in ("input", "output")]
    with pytest.raises(UserError, match=message):
        run(*paths, **request)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == before


def test_a_tokenizers_folder_is_no_enhancer(folder: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "codec")
    with pytest.raises(UserError, match="not an enhancer's folder"):
        run(folder, tmp_path / "out.wav", model=tmp_path / "codec")
