import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.audio import audio_blocks, audio_info, read_audio, write_audio, write_spectrogram
from tokenizer.errors import UserError

RATE = 24_000


def sine(hz: float, seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000, 44_101])
def test_any_rate_becomes_the_same_sine(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", sine(440.0, 0.5, rate), rate)
    found = read_audio(path)
    assert found.dtype == torch.float32
    assert found.shape[0] == 1
    assert abs(found.shape[1] - RATE // 2) <= 1
    expected = torch.from_numpy(sine(440.0, 0.5, RATE))
    middle = slice(1000, 11_000)  # the filter needs neighbours
    assert (found[0, middle] - expected[middle]).abs().max() < 5e-3


def test_frequencies_above_nyquist_are_filtered_not_folded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(15_000.0, 0.5, 48_000), 48_000)
    assert read_audio(path)[0, 1000:11_000].abs().max() < 0.01


@pytest.mark.parametrize(("rate", "block_s"), [(44_100, 0.05), (8_000, 0.033), (192_000, 0.02), (24_000, 0.01)])
def test_blocks_join_without_a_seam(tmp_path: Path, rate: int, block_s: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(0.37 * rate)).astype(np.float32)
    path = write(tmp_path / "a.wav", noise, rate)
    blocks = list(audio_blocks(path, RATE, block_s=block_s))
    assert len(blocks) > 5
    torch.testing.assert_close(torch.cat(blocks, dim=1), read_audio(path), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8_000, 16_000, 22_050, 44_100, 48_000]),
    num_samples=st.integers(1, 3000),
    block_s=st.floats(0.001, 0.2),
)
def test_length_is_the_duration_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, rate: int, num_samples: int, block_s: float
) -> None:
    path = write(tmp_path_factory.mktemp("audio") / "a.wav", np.ones(num_samples, np.float32), rate)
    length = sum(block.shape[1] for block in audio_blocks(path, RATE, block_s=block_s))
    assert length == math.ceil(num_samples * RATE / rate)


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels = np.stack(
        [np.full(100, value, np.float32) for value in (0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4)], axis=1
    )
    found = read_audio(write(tmp_path / "a.wav", channels, RATE))
    assert found.shape == (1, 100)
    torch.testing.assert_close(found, torch.full((1, 100), 0.05))


def test_one_sample_is_enough(tmp_path: Path) -> None:
    assert read_audio(write(tmp_path / "a.wav", np.ones(1, np.float32), RATE)).tolist() == [[1.0]]
    assert read_audio(write(tmp_path / "b.wav", np.ones(1, np.float32), 8_000)).shape == (1, 3)
    assert read_audio(write(tmp_path / "c.wav", np.ones(1, np.float32), 192_000)).shape == (1, 1)


def test_part_of_a_file(tmp_path: Path) -> None:
    ramp = np.arange(2400, dtype=np.float32) / 2400
    path = write(tmp_path / "a.wav", ramp, RATE)
    assert read_audio(path, start=0.05, duration=0.01)[0].tolist() == ramp[1200:1440].tolist()
    assert read_audio(path, start=0.09, duration=5.0).shape == (1, 240), "the file ends before"
    assert read_audio(path, duration=1e-6).shape == (1, 1)


def test_long_audio_fills_one_array(tmp_path: Path) -> None:
    """Longer than a block, with another rate: lengths and content still fit."""
    path = write(tmp_path / "a.flac", sine(100.0, 45.0, 8_000), 8_000, "PCM_16")
    found = read_audio(path)
    assert found.shape == (1, 45 * RATE)
    spans = [found[0, i * RATE : (i + 1) * RATE] for i in (1, 19, 20, 40, 43)]
    for span in spans:
        assert span.square().mean().item() == pytest.approx(0.125, rel=0.01)


@pytest.mark.parametrize("suffix", [".ogg", ".opus", ".mp3", ".flac"])
def test_compressed_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    kinds = {".opus": {"format": "OGG", "subtype": "OPUS"}, ".mp3": {"format": "MP3"}}
    soundfile.write(path, sine(440.0, 0.5, RATE), RATE, **kinds.get(suffix, {}))
    found = read_audio(path)
    assert abs(found.shape[1] - RATE // 2) < 2500  # coders pad
    assert found[0, 4000:8000].square().mean().item() == pytest.approx(0.125, rel=0.1)


def test_info(tmp_path: Path) -> None:
    info = audio_info(write(tmp_path / "a.wav", np.zeros((4800, 2), np.float32), 48_000))
    assert (info.duration_s, info.sample_rate_hz, info.channels) == (0.1, 48_000, 2)


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "bytes.raw").write_bytes(b"\x00" * 100)
    write(tmp_path / "zero.wav", np.zeros(0, np.float32), RATE)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        samples = np.zeros(1000, np.float32)
        samples[480] = value
        write(tmp_path / f"{name}.wav", samples, RATE)
    wanted = {
        "missing.wav": "no such file",
        "": "is a folder, but must be an audio file",
        "text.wav": "is not audio that can be read",
        "empty.wav": "is not audio: the file is empty",
        "bytes.raw": "is not audio that can be read",
        "zero.wav": "holds no samples",
        "nan.wav": "NaN or infinite at 0.020 s",
        "inf.wav": "NaN or infinite at 0.020 s",
    }
    for name, message in wanted.items():
        with pytest.raises(UserError, match=message) as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def test_damaged_flac_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 96_000), RATE, "PCM_16")
    content = bytearray(path.read_bytes())
    content[2000:] = b"\x55" * (len(content) - 2000)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"a\.flac (is damaged|holds no samples that can be decoded)"):
        read_audio(path)


@pytest.mark.parametrize(
    ("start", "duration", "message"),
    [
        (-1.0, None, "start=-1.0 must be a number of seconds at least 0"),
        (math.nan, None, "start=nan"),
        (None, 0.0, "duration=0.0 must be a number of seconds above 0"),
        (None, math.inf, "duration=inf"),
        (7.0, None, "start=7.0 lies past its end at 0.100 s"),
    ],
)
def test_bad_ranges(tmp_path: Path, start: float | None, duration: float | None, message: str) -> None:
    path = write(tmp_path / "a.wav", np.zeros(2400, np.float32), RATE)
    with pytest.raises(UserError, match=message):
        read_audio(path, start=start, duration=duration)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
def test_written_audio_reads_back(tmp_path: Path, suffix: str) -> None:
    waveform = torch.linspace(-1.5, 1.5, 500)[None]
    path = tmp_path / "new" / f"a{suffix}"
    write_audio(path, waveform, RATE)
    torch.testing.assert_close(read_audio(path), waveform.clamp(-1, 1), atol=1e-4, rtol=0)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_writing_refuses_other_suffixes_and_nan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'\.mp4' must be \.wav or \.flac"):
        write_audio(tmp_path / "a.mp4", torch.zeros(1, 10), RATE)
    with pytest.raises(ValueError, match="NaN"):
        write_audio(tmp_path / "a.wav", torch.full((1, 10), math.nan), RATE)


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_audio(tmp_path / "file" / "a.wav", torch.zeros(1, 10), RATE)


def test_a_new_file_takes_the_place_of_the_old_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, torch.zeros(1, 10), RATE)
    before = path.read_bytes()
    with path.open("rb") as old:
        write_audio(path, torch.ones(1, 10), RATE)
        assert old.read() == before, "who has the old file open keeps it whole"
    assert path.read_bytes() != before


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, torch.zeros(1, 10), RATE)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_audio(path, torch.ones(1, 10), RATE)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("num_samples", [1, 700, 48_000])
def test_spectrogram_is_a_picture_of_the_sound(tmp_path: Path, num_samples: int) -> None:
    from matplotlib.image import imread

    path = tmp_path / "a.png"
    write_spectrogram(path, torch.from_numpy(sine(9000.0, 2.0, RATE))[None, :num_samples], RATE)
    picture = imread(path)
    assert picture.shape[:2] == (400, 1000)
    if num_samples == 48_000:
        column = picture[:, 400, :3].sum(axis=1)  # a bright line three quarters up, on dark ground
        inner = column[40:330]
        assert inner.argmax() == pytest.approx(len(inner) / 4, abs=25)
