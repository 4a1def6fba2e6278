import json
import math
import os
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import sampling.reconstruct
from sampling.reconstruct import Judge, run
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.metrics import (
    mel_distance,
    multi_resolution_mel_distance,
    multi_resolution_stft_distance,
    pesq_wb,
    si_sdr,
    stoi,
)

RATE = 24000


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "f3"
    tiny_tokenizer().save(folder)
    return folder


def noisy_tone(seconds: float, rate: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(round(seconds * rate)) / rate
    tone = 0.3 * torch.sin(2 * math.pi * 220 * time) * (1 + torch.sin(2 * math.pi * 3 * time)) / 2
    return tone + 0.01 * torch.randn(len(time), generator=generator)


@pytest.mark.parametrize(
    ("source", "num_codebooks"), [("latents", None), ("codes", None), ("codes", 1)], ids=["latents", "codes", "coarse"]
)
def test_pieces_join_into_the_offline_reconstruction(
    source: str, num_codebooks: int | None, codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.reconstruct, "PIECE_SECONDS", 0.5)
    soundfile.write(tmp_path / "in.wav", noisy_tone(2.2345, 44100).numpy(), 44100)
    figures = run(
        tmp_path / "in.wav",
        tmp_path / "out.wav",
        tokenizer=codec_folder,
        source=source,
        num_codebooks=num_codebooks,
        json_file=tmp_path / "figures.json",
    )
    waveform = read_audio(tmp_path / "in.wav", RATE)
    codec = tiny_tokenizer()
    frames = codec.encode(waveform[None])
    if source == "codes":
        expected = codec.decode_codes(frames.codes[:, :num_codebooks])
    else:
        expected = codec.decode_latents(frames.latents)
    expected = expected[0, 0, : waveform.shape[-1]]
    found = torch.from_numpy(soundfile.read(tmp_path / "out.wav", dtype="float32")[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert figures["si_sdr_db"] == pytest.approx(si_sdr(waveform[0], expected), abs=1e-3)
    assert figures["seconds"] == waveform.shape[-1] / RATE
    for name in ("mel_distance", "multi_resolution_mel_distance", "multi_resolution_stft_distance"):
        assert figures[name] > 0.1
    assert figures["encode_real_time_factor"] > 0
    assert figures["decode_real_time_factor"] > 0
    assert figures["frame_rate_hz"] == 25
    if source == "codes":
        assert figures["tokens_per_second"] == 25 * (num_codebooks or 3)
        assert figures["bits_per_second"] == 25 * 5 * (num_codebooks or 3)
    else:
        assert figures["tokens_per_second"] == 25
        assert figures["bits_per_second"] == 25 * 8 * 16
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


def test_real_time_factors_are_seconds_of_computing_a_second_of_audio(
    codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))  # every look at the clock takes a second, so a call takes one
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    soundfile.write(tmp_path / "in.wav", noisy_tone(0.5, RATE).numpy(), RATE)
    figures = run(tmp_path / "in.wav", tmp_path / "out.wav", tokenizer=codec_folder)
    assert figures["encode_real_time_factor"] == 2 / 0.5  # a push and the flush
    assert figures["decode_real_time_factor"] == 3 / 0.5  # a push of either, and the flush


def test_the_judge_agrees_with_the_metrics_however_the_pieces_are_cut() -> None:
    reference = noisy_tone(3.0, RATE)
    estimate = 0.9 * reference + 0.02 * torch.randn(len(reference), generator=torch.Generator().manual_seed(1))
    judge = Judge(RATE)
    judge.expect(reference[:10].reshape(1, 1, -1))
    judge.expect(reference[10:].reshape(1, 1, -1))
    for piece in torch.cat([estimate, torch.ones(100)]).split(7001):  # a codec's last frame reaches past the end
        judge.compare(piece.reshape(1, 1, -1))
    figures = judge.figures()
    assert figures["si_sdr_db"] == pytest.approx(si_sdr(reference, estimate), abs=1e-4)
    assert figures["mel_distance"] == pytest.approx(mel_distance(reference, estimate, RATE), rel=1e-4)
    for measure in (stoi, pesq_wb, multi_resolution_mel_distance):
        assert figures[measure.__name__] == pytest.approx(measure(reference, estimate, RATE), rel=1e-4)
    stft_distance = multi_resolution_stft_distance(reference, estimate)
    assert figures["multi_resolution_stft_distance"] == pytest.approx(stft_distance, rel=1e-4)
    assert figures["judged_seconds"] == 3.0
    assert figures["undefined"] == {}


def test_stoi_and_pesq_judge_only_so_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.reconstruct, "PIECE_SECONDS", 1.0)
    monkeypatch.setattr(sampling.reconstruct, "MAX_JUDGED_PIECES", 2)
    judge = Judge(RATE)
    samples = noisy_tone(4.0, RATE).reshape(1, 1, -1)
    judge.expect(samples)
    judge.compare(samples)
    assert judge.figures()["judged_seconds"] == 2.0


def test_figures_that_are_undefined_are_none() -> None:
    judge = Judge(RATE)
    judge.expect(torch.zeros(1, 1, 2000))
    judge.compare(torch.zeros(1, 1, 2000))
    figures = judge.figures()
    assert figures["si_sdr_db"] is None
    assert figures["stoi"] is None
    assert figures["pesq_wb"] is None
    assert figures["undefined"] == {
        "si_sdr_db": "the recording is silent or constant",
        "stoi": "the reference is silent",
        "pesq_wb": "the reference is silent",
    }
    for name in ("mel_distance", "multi_resolution_mel_distance", "multi_resolution_stft_distance", "judged_seconds"):
        assert figures[name] == 0.0


def test_a_short_silent_or_wordless_recording_has_reasons_in_its_json(
    codec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    click = torch.zeros(RATE)
    click[9000:9100] = 0.5
    for samples, reason in (
        (noisy_tone(0.1, RATE), "0.10 s are too short, STOI needs 0.4 s"),
        (torch.zeros(RATE), "the reference is silent"),
        (click, "less than 0.4 s of the reference are not silent"),
    ):
        soundfile.write(tmp_path / "in.wav", samples.numpy(), RATE)
        run(tmp_path / "in.wav", tmp_path / "out.wav", tokenizer=codec_folder, json_file=tmp_path / "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["stoi"] is None and figures["undefined"]["stoi"] == reason
        assert f"undefined: {reason}" in capsys.readouterr().out


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pesq", None)
    judge = Judge(RATE)
    judge.expect(noisy_tone(1.0, RATE).reshape(1, 1, -1))
    judge.compare(noisy_tone(1.0, RATE).reshape(1, 1, -1))
    figures = judge.figures()
    assert figures["pesq_wb"] is None and figures["stoi"] == pytest.approx(1.0)
    assert "install it: pip install 'hybridlm[metrics]'" in figures["undefined"]["pesq_wb"]
    assert figures["undefined"]["si_sdr_db"] == "the two are the same"


def test_one_sample_of_eight_channels_works(codec_folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", torch.full((1, 8), 0.5).numpy(), 8000)
    figures = run(tmp_path / "in.wav", tmp_path / "out.flac", tokenizer=codec_folder)
    assert figures["seconds"] == 3 / RATE
    assert soundfile.info(tmp_path / "out.flac").frames == 3
    assert "NaN" not in json.dumps(figures)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "none.wav"}, "no such file"),
        ({"output": "out.mp3"}, "must end in .wav or .flac"),
        ({"source": "codes", "num_codebooks": 0}, "num_codebooks=0 must be from 1 to 3"),
        ({"source": "codes", "num_codebooks": 9}, "num_codebooks=9 must be from 1 to 3"),
        ({"source": "latents", "num_codebooks": 2}, "num_codebooks=2 means nothing to latents"),
    ],
)
def test_bad_requests_are_told_and_leave_nothing_behind(
    settings: dict, message: str, codec_folder: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "in.wav", noisy_tone(0.2, RATE).numpy(), RATE)
    settings = {"input": "in.wav", "output": "out.wav", "tokenizer": codec_folder} | settings
    settings["input"], settings["output"] = tmp_path / settings["input"], tmp_path / settings["output"]
    with pytest.raises(UserError, match=message):
        run(**settings)
    assert os.listdir(tmp_path) == ["in.wav"]


def test_a_recording_that_breaks_off_leaves_no_output(codec_folder: Path, tmp_path: Path) -> None:
    samples = noisy_tone(1.0, RATE)
    samples[-1] = math.nan
    soundfile.write(tmp_path / "in.wav", samples.numpy(), RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN"):
        run(tmp_path / "in.wav", tmp_path / "out.wav", tokenizer=codec_folder)
    assert os.listdir(tmp_path) == ["in.wav"]
