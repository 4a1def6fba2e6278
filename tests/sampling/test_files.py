import os
import re
from pathlib import Path

import pytest
import soundfile
import torch

import sampling.demo
from hybridlm.checkpoint import save_model
from sampling.files import AudioWriter, check_writable, output_paths, run
from sampling.pipeline import load
from tests.support.tiny_audio_model import tiny_model
from tokenizer.errors import UserError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model(stop_bias=-2.0)
    save_model(folder, model.model, model.tokenizer, model.text)
    return folder


def test_several_outputs_are_numbered() -> None:
    assert output_paths(Path("a/b.flac"), 1) == [Path("a/b.flac")]
    assert output_paths(Path("a/b.flac"), 3) == [Path("a/b-1.flac"), Path("a/b-2.flac"), Path("a/b-3.flac")]


def test_run_writes_what_generate_makes_and_says_so(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "speech.wav"
    paths = run(model=model_folder, text="good morning", num_samples=2, seed=5, output=output)
    assert paths == [tmp_path / "new" / "speech-1.wav", tmp_path / "new" / "speech-2.wav"]
    expected = load(model_folder).generate(text="good morning", num_samples=2, seed=5)
    lines = capsys.readouterr().out.splitlines()
    for row, path in enumerate(paths):
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == 24000
        torch.testing.assert_close(torch.from_numpy(samples), expected.row(row)[0], atol=1 / 32768, rtol=0)
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        length = int(expected.lengths[row]) / 24000
        assert re.fullmatch(rf"{re.escape(str(path))}  {length:.2f} s  [\d.]+x real time  seed {5 + row}", lines[row])
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "speech-1.png",
        "speech-1.wav",
        "speech-2.png",
        "speech-2.wav",
    ]


def test_a_seed_that_was_drawn_makes_the_same_again(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model=model_folder, tags=["music"], duration=0.2, output=tmp_path / "a.flac")
    seed = int(capsys.readouterr().out.splitlines()[0].rsplit(" ", 1)[1])
    run(model=model_folder, tags=["music"], duration=0.2, output=tmp_path / "b.flac", seed=seed)
    assert (tmp_path / "a.flac").read_bytes() == (tmp_path / "b.flac").read_bytes()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("speech.mp3", "must end in .wav or .flac"),
        ("speech", "must end in .wav or .flac"),
        ("file.txt/speech.wav", "can't be written"),
        ("folder.wav", "is a folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_told_before_the_model_is_loaded(
    tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "file.txt").write_text("a file, not a folder")
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match=message):
        run(model=tmp_path / "no-such-model", output=tmp_path / output)


def test_num_samples_zero_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_samples=0 must be at least 1"):
        run(model="box", num_samples=0, output=tmp_path / "a.wav")


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "a.wav")
    assert os.listdir(tmp_path / "deep") == []


def test_the_writer_joins_pieces_and_names_the_file_only_when_done(tmp_path: Path) -> None:
    samples = torch.linspace(-1.5, 1.5, 1000)
    path = tmp_path / "a.wav"
    with AudioWriter(path, 8000) as writer:
        writer.write(samples[:300].reshape(1, 1, -1))
        assert not path.exists()
        writer.write(samples[300:].reshape(1, 1, -1))
    found, rate = soundfile.read(path, dtype="float32")
    assert rate == 8000
    torch.testing.assert_close(torch.from_numpy(found), samples.clamp(-1, 1), atol=1 / 32000, rtol=0)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_writer_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with AudioWriter(path, 8000) as writer:
            writer.write(torch.zeros(1, 1, 100))
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.flac"]


def test_the_demo_makes_five_recordings(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MUSIC_SECONDS", "SOUND_SECONDS", "CONTINUED_SECONDS"):
        monkeypatch.setattr(sampling.demo, name, 0.4)
    monkeypatch.setattr(sampling.demo, "SPEECH", ("good morning", "how are you"))
    paths = sampling.demo.run(tmp_path / "demo", model=model_folder)
    names = ["speech-1", "speech-2", "music", "sound", "continuation"]
    assert [path.name for path in paths] == [f"{name}.wav" for name in names]
    assert all(path.is_file() and path.with_suffix(".png").is_file() for path in paths)
    music, _ = soundfile.read(paths[2], dtype="float32")
    continued, _ = soundfile.read(paths[4], dtype="float32")
    assert len(continued) == 2 * len(music)
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in paths)
