"""Files that are valid recordings after every piece, and what goes to standard output."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import soundfile
import torch

from sampling.growing import GrowingFile, StandardOutput, as_integers
from tokenizer.audio import write_audio
from tokenizer.errors import UserError

RATE = 8000


def ramp(count: int) -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, count).reshape(1, 1, -1)


def test_a_wav_file_is_whole_after_every_piece_and_named_when_done(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.wav", ramp(1000)
    write_audio(tmp_path / "expected.wav", samples[0], RATE)
    with GrowingFile(path, RATE) as file:
        assert soundfile.info(file.partial).frames == 0
        for end in (1, 300, 1000):
            file.write(samples[..., file.num_samples : end])
            found, rate = soundfile.read(file.partial, dtype="int16")
            assert rate == RATE and found.tolist() == as_integers(samples[..., :end]).tolist()
            assert file.partial.stat().st_size == 44 + 2 * end
        assert not path.exists()
    assert path.read_bytes() == (tmp_path / "expected.wav").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "expected.wav"]


def test_a_flac_file_grows_and_is_what_is_written_at_once(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.flac", ramp(30_000)
    with GrowingFile(path, RATE) as file:
        sizes = []
        for piece in samples.split(10_000, dim=-1):
            file.write(piece)
            sizes.append(file.partial.stat().st_size)
        assert sizes == sorted(sizes) and sizes[-1] > sizes[0] > 100
    found, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE and found.tolist() == as_integers(samples).tolist()


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_ctrl_c_keeps_what_was_written_and_a_failure_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"

    def stopped_by(error: BaseException, count: int) -> None:
        with GrowingFile(path, RATE) as file:
            if count:
                file.write(ramp(count))
            if file._wav is not None:
                file._wav.write(b"xyz")  # a piece that was not finished
            raise error

    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        stopped_by(RuntimeError("halfway"), 100)
    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt(), 0)
    assert path.read_bytes() == b"old"
    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt(), 5000)
    assert soundfile.read(path, dtype="int16")[0].tolist() == as_integers(ramp(5000)).tolist()
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".wav":
        assert path.stat().st_size == 44 + 2 * 5000


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_a_full_disk() -> None:
        with GrowingFile(tmp_path / "a.wav", RATE) as file:
            assert file._wav is not None
            os.dup2(os.open("/dev/full", os.O_WRONLY), file._wav.fileno())
            file.write(ramp(100))

    with pytest.raises(UserError, match=r"a\.wav.*No space left.*is the disk full"):
        write_to_a_full_disk()
    assert os.listdir(tmp_path) == []


def test_standard_output_is_a_recording_without_an_end_or_bare_samples(tmp_path: Path) -> None:
    samples = ramp(1000)
    written = {}
    for header in (True, False):
        stream = io.BytesIO()
        with StandardOutput(stream, RATE, header=header) as place:
            for piece in samples.split(300, dim=-1):
                place.write(piece)
        written[header] = stream.getvalue()
    assert written[False] == as_integers(samples).tobytes()
    assert written[True][44:] == written[False]
    (tmp_path / "piped.wav").write_bytes(written[True])
    found, rate = soundfile.read(tmp_path / "piped.wav", dtype="int16")
    assert rate == RATE and found.tolist() == as_integers(samples).tolist()
