"""`hybridlm generate --stream`, as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hybridlm import cli
from sampling.growing import GrowingFile
from tests.support.command import Command, runner
from tests.support.saved_model import save_tiny_model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", stop_bias=-2.0)


def samples_of(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


def test_a_stream_is_what_is_made_at_once(command: Command, model: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", model, "--duration", 0.4)
    figures = tmp_path / "figures.json"
    more = ("--stream", "--num-samples", 2, "--seed", 5, "--json", figures)
    streamed = command(*words, *more, "--output", tmp_path / "stream.wav")
    assert streamed.status == 0, streamed.err
    for row in (1, 2):
        result = command(*words, "--seed", 4 + row, "--output", tmp_path / f"once-{row}.wav")
        assert result.status == 0, result.err
        once, stream = (samples_of(tmp_path / f"{name}-{row}.wav") for name in ("once", "stream"))
        assert len(once) == len(stream) == 9600 and abs(once - stream).max() <= 1
        assert (tmp_path / f"stream-{row}.png").exists()
    assert f"{tmp_path / 'stream-2.wav'}  0.40 s" in streamed.out and "seed 6" in streamed.out
    found = json.loads(figures.read_text())["recordings"]
    assert [one["seed"] for one in found] == [5, 6] and found[0]["seconds"] == 0.4
    assert found[0]["drift"]["windows"] == [] and found[0]["re_anchorings"] == []


def test_standard_output_has_the_recording_and_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def made(*words: object) -> tuple[bytes, bytes]:
        base = ["hybridlm", "generate", "--model", str(model), "--duration", "0.4", "--seed", "5", "--output"]
        monkeypatch.setattr(sys, "argv", [*base, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        found = capsysbinary.readouterr()
        return found.out, found.err

    made(tmp_path / "once.wav")
    (out, err), once = made("-"), samples_of(tmp_path / "once.wav")
    assert out[:4] == b"RIFF" and len(out) == 44 + 2 * 9600
    assert b"seed 5" in err and b"0.40 s" in err
    (tmp_path / "piped.wav").write_bytes(out)
    assert abs(samples_of(tmp_path / "piped.wav") - once).max() <= 1
    assert made("-", "--format", "pcm")[0] == out[44:]


def test_a_reader_that_leaves_ends_it_quietly(model: Path) -> None:
    code = "import sys; sys.dont_write_bytecode = True\nfrom hybridlm.cli import main; main()"
    words = ["generate", "--model", str(model), "--duration", "8", "--seed", "5", "--output", "-", "--format", "pcm"]
    # A pipe holds 64 KiB: the writer can't have finished when its reader leaves.
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(1920)) == 1920
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141 and told == b""


@pytest.mark.parametrize("stream", [True, False])
def test_ctrl_c_keeps_what_was_made(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    import sampling.generate

    words = ("generate", "--model", model, "--duration", 1, "--seed", 5)
    advance, steps = sampling.generate.FrameLoop.advance, []

    def interrupted(self: sampling.generate.FrameLoop, frame: sampling.generate.Drawn) -> None:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        advance(self, frame)

    assert command(*words, "--output", tmp_path / "whole.wav").status == 0
    monkeypatch.setattr(sampling.generate.FrameLoop, "advance", interrupted)
    more = ["--stream", "--num-samples", 2] if stream else []
    result = command(*words, "--output", tmp_path / "cut.wav", *more)
    assert result.status == 130 and "interrupted: " in result.out
    name = "cut-1.wav" if stream else "cut.wav"
    found = samples_of(tmp_path / name)
    assert len(found) == 960 * (11 if stream else 12)  # a stream hands out 1, 5, 5, ... frames
    whole = samples_of(tmp_path / "whole.wav")
    assert abs(found - whole[: len(found)]).max() <= 1
    assert sorted(path.name for path in tmp_path.glob("*cut*")) == [name.replace("wav", "png"), name]


def test_ctrl_c_before_the_first_sound_writes_nothing(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GrowingFile, "write", interrupted)
    output = tmp_path / "out.wav"
    output.write_bytes(b"old")
    result = command("generate", "--model", model, "--duration", 0.2, "--stream", "--output", output)
    assert result.status == 130 and output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_long_text_of_a_file_and_long_music_are_written_in_segments(command: Command, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", stop_bias=30.0, max_frames=100)
    text, output = tmp_path / "text.txt", tmp_path / "out.wav"
    text.write_text("\ufeffGood morning to you. The fox is quick!\n\n„Wie geht es dir?“ fragte sie.")
    result = command("generate", "--model", model, "--text-file", text, "--output", output)
    assert result.status == 0, result.err
    # Three sentences, which this model ends as soon as it may, at 0.03 s a byte; and two pauses.
    assert soundfile.info(output).frames == 960 * (15 + 6 + 12 + 6 + 25)
    result = command("generate", "--model", model, "--text-file", text, "--output", output, "--pause", "0")
    assert result.status == 0, result.err
    assert soundfile.info(output).frames == 960 * (15 + 12 + 25)
    result = command("generate", "--model", model, "--duration", 5, "--output", output, "--json", tmp_path / "a.json")
    assert result.status == 0, result.err
    assert soundfile.info(output).duration == 5.0
    assert json.loads((tmp_path / "a.json").read_text())["recordings"][0]["drift"]["windows"] == []
