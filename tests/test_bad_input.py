"""Whatever a user hands in: sound recordings of any shape work, the rest ends in one line and status 2."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.support.command import Command, Result, assert_refused, runner
from tests.support.saved_model import save_tiny_model

RATE = 24000


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def continue_recording(command: Command, model: Path, prompt: Path, output: Path) -> Result:
    return command("generate", "--model", model, "--audio", prompt, "--duration", 0.2, "--output", output)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (noise(1), RATE),
        (noise(4800, 8), RATE),
        (noise(1600), 8000),
        (noise(38400), 192000),
        (noise(4411), 44101),
        (np.zeros(4800, dtype=np.float32), RATE),
    ],
    ids=["one sample", "eight channels", "8 kHz", "192 kHz", "odd rate", "silence"],
)
def test_sound_recordings_of_any_shape_work(
    command: Command, model: Path, tmp_path: Path, samples: np.ndarray, rate: int
) -> None:
    prompt = write(tmp_path / "prompt.wav", samples, rate)
    result = continue_recording(command, model, prompt, tmp_path / "out.wav")
    assert result.status == 0, result
    assert soundfile.info(tmp_path / "out.wav").duration >= 0.2
    again = command("reconstruct", prompt, tmp_path / "again.wav", "--tokenizer", model)
    assert again.status == 0, again
    info = soundfile.info(tmp_path / "again.wav")
    assert info.samplerate == RATE
    assert info.frames == -(-len(samples) * RATE // rate)


def test_a_long_recording_is_continued_from_its_end(command: Command, model: Path, tmp_path: Path) -> None:
    longest = 250 / 25  # the tiny model's max_frames, in seconds
    prompt = write(tmp_path / "long.wav", noise(int(3 * longest * RATE)))
    result = continue_recording(command, model, prompt, tmp_path / "out.flac")
    assert result.status == 0, result
    assert soundfile.info(tmp_path / "out.flac").duration == pytest.approx(3 * longest + 0.2)


@pytest.fixture(params=["missing", "text", "empty file", "no samples", "nan", "infinite", "folder"])
def unsound(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A path that no audio comes from, and what the message says of it."""
    path = tmp_path / "bad.wav"
    kind = request.param
    if kind == "missing":
        return path, "no such file"
    if kind == "text":
        path.write_text("This is a letter.")
        return path, "not audio"
    if kind == "empty file":
        path.write_bytes(b"")
        return path, "the file is empty"
    if kind == "no samples":
        return write(path, noise(0)), "no samples"
    if kind == "folder":
        path.mkdir()
        return path, "folder"
    samples = noise(RATE)
    samples[12000] = np.nan if kind == "nan" else np.inf
    return write(path, samples), "NaN or infinite at 0.500 s"


def test_what_is_no_audio_is_refused(command: Command, model: Path, tmp_path: Path, unsound: tuple[Path, str]) -> None:
    path, message = unsound
    output = tmp_path / "out.wav"
    assert_refused(command("reconstruct", path, output, "--tokenizer", model), str(path), message)
    assert_refused(command("generate", "--model", model, "--audio", path, "--output", output), str(path), message)
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--text", ""], ["text is empty"]),
        (["--text", "  "], ["text is empty"]),
        (["--text", "caf\udce9"], ["--text", "not UTF-8"]),
        (["--text", "hm", "--text-file", "none.txt"], ["text_file=", "one of them"]),
        (["--text-file", "none.txt"], ["none.txt", "No such file"]),
        (["--tag", "musik"], ["unknown tag 'musik'", "music"]),
        (["--duration", "0"], ["duration=0"]),
        (["--duration", "-1"], ["duration=-1"]),
        (["--duration", "nan"], ["duration=nan"]),
        (["--duration", "1e9"], ["duration=1000000000", "86400"]),
        (["--text", "hm", "--duration", "nan"], ["duration=nan"]),
        (["--num-samples", "0"], ["num_samples=0"]),
        (["--temperature", "-1"], ["temperature=-1"]),
        (["--temperature", "nan"], ["temperature=nan"]),
        (["--top-k", "0"], ["top_k=0"]),
        (["--top-p", "1.5"], ["top_p=1.5"]),
        (["--top-p", "0"], ["top_p=0"]),
        (["--top-p", "nan"], ["top_p=nan"]),
        (["--cfg", "-2"], ["cfg=-2"]),
        (["--min-p", "2"], ["min_p=2"]),
        (["--repetition-penalty", "0"], ["repetition_penalty=0"]),
        (["--repetition-window", "0"], ["repetition_window=0"]),
        (["--stop-threshold", "0"], ["stop_threshold=0"]),
        (["--min-duration", "1"], ["min_duration=1", "needs a text"]),
        (["--loudness", "3"], ["loudness=3"]),
        (["--reference", "none.wav"], ["none.wav", "no such file"]),
        (["--text", "hm", "--reference-text", "hm"], ["reference_text", "leave it out"]),
        (["--save-plan", "plan.json"], ["plan.json", ".safetensors"]),
        (["--save-plan", "plan.safetensors", "--stream"], ["save_plan", "leave out stream"]),
        (["--save-plan", "plan.safetensors", "--duration", "11"], ["plan", "give max_drift=inf"]),
        (["--stream", "--loudness", "-16"], ["loudness=-16", "a stream has not"]),
        (["--max-drift", "0"], ["max_drift=0"]),
        (["--max-drift", "nan"], ["max_drift=nan"]),
        (["--pause", "-1"], ["pause_seconds=-1"]),
        (["--format", "pcm"], ["format='pcm'", "--output -"]),
        (["--output", "-", "--format", "mp3"], ["format='mp3'", "wav, pcm"]),
        (["--output", "-", "--num-samples", "2"], ["num_samples=2", "standard output"]),
        (["--device", "gpu"], ["device='gpu'"]),
        (["--output", "take.mp3"], ["take.mp3", ".wav or .flac"]),
        (["--output", "take"], ["take", ".wav or .flac"]),
    ],
    ids=lambda value: "" if isinstance(value[0], str) and " " in value[0] else " ".join(value)[:30],
)
def test_requests_that_make_no_sense_are_refused(
    command: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(command("generate", "--model", model, *words), *parts)
    assert list(tmp_path.iterdir()) == []


def test_emoji_and_other_scripts_are_spoken(command: Command, model: Path, tmp_path: Path) -> None:
    text = "Hi 👋🏽 — Grüße, 你好!"
    words = ("generate", "--model", model, "--duration", 0.2, "--output", tmp_path / "out.wav")
    result = command(*words, "--text", text)
    assert result.status == 0, result


def test_cuda_where_there_is_none(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_refused(command("generate", "--model", model, "--device", "cuda"), "device='cuda'", "use cpu")


@pytest.mark.parametrize("output", ["file/out.wav", "", "/proc/none/out.wav"], ids=["in a file", "folder", "proc"])
def test_an_output_that_cannot_be_written(command: Command, model: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / output
    assert_refused(command("generate", "--model", model, "--output", path, "--duration", 0.2), str(path))
    prompt = write(tmp_path / "prompt.wav", noise(2400))
    assert_refused(command("reconstruct", prompt, path, "--tokenizer", model), str(path))


def run_on_a_full_disk(*words: object, room: int) -> subprocess.CompletedProcess[str]:
    """Run the command where no file may grow beyond `room` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    code = "import sys; sys.dont_write_bytecode = True\nfrom hybridlm.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)


def test_a_disk_that_fills_leaves_the_old_recording(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.wav"
    output.write_bytes(b"the old one")
    words = ("generate", "--model", model, "--tag", "music", "--duration", 2, "--output", output)
    result = run_on_a_full_disk(*words, room=20_000)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("hybridlm: error: ")
    assert "Traceback" not in result.stderr
    assert output.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


@pytest.mark.parametrize("damage", ["cut short", "another version", "no weights", "no folder"])
def test_a_damaged_model(command: Command, tmp_path: Path, damage: str) -> None:
    folder = save_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    expected = damage
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "another version":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "format_version": 7}))
        expected = "format_version=7"
    elif damage == "no weights":
        weights.unlink()
        expected = "lacks model.safetensors"
    else:
        folder = tmp_path / "nowhere"
        expected = "no such model folder"
    output = tmp_path / "out.wav"
    assert_refused(command("generate", "--model", folder, "--output", output), str(folder), expected)
    assert not output.exists()


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_manifest_with_faults_is_read_as_far_as_it_goes(command: Command, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(RATE // 2))
    (tmp_path / "letter.wav").write_text("This is a letter.")
    faults = ("{broken", {"path": "gone.wav"}, {"file": "good.wav"}, {"path": "letter.wav"}, ["good.wav"])
    figures = tmp_path / "figures.json"
    source = manifest(tmp_path, {"path": "good.wav", "text": "good"}, *faults)
    result = command("evaluate", "--model", model, "--data", source, "--json", figures)
    assert result.status == 0, result
    assert f"{len(faults)} " in result.out + result.err
    assert json.loads(figures.read_text())["report"]["num_clips"] == 1
    prepared = command("prepare", source, "--output", tmp_path / "tokens", "--tokenizer", model, "--workers", 1)
    assert prepared.status == 0, prepared
    assert f"{len(faults)} " in prepared.out + prepared.err


def test_a_folder_of_all_sorts_is_read_as_far_as_it_goes(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "8k-stereo.wav", noise(4000, 2), 8000)
    write(folder / "44k-six.wav", noise(22050, 6), 44100)
    soundfile.write(folder / "mp3.mp3", noise(RATE), RATE)
    (folder / "mp3.mp3").rename(folder / "mp3.wav")
    (folder / "letter.wav").write_text("This is a letter.")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    secret = write(folder / "secret.wav", noise(4000))
    allowed = os.access  # the tests may run as root, who may read everything
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != secret and allowed(place, mode))
    write(folder / "latin1.wav", noise(4000))
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    prepared = command("prepare", folder, "--output", tmp_path / "tokens", "--tokenizer", model, "--workers", 1)
    assert prepared.status == 0 and "3 clips, 3 of them new" in prepared.err, prepared
    problems = (tmp_path / "tokens" / "problems.txt").read_text().splitlines()
    for name, reason in {
        "latin1": "not UTF-8",
        "letter": "not audio",
        "empty": "is empty",
        "gone": "No such file",
        "secret": "Permission denied",
    }.items():
        assert sum(f"{name}.wav" in line and reason in line for line in problems) == 1, problems
    assert len(problems) == 5 and "5 clips skipped" in prepared.err


def test_a_manifest_with_nothing_left_is_refused(command: Command, model: Path, tmp_path: Path) -> None:
    source = manifest(tmp_path, "{broken", {"path": "gone.wav"})
    assert_refused(command("evaluate", "--model", model, "--data", source), str(source), "no usable clip", "2 problems")
    words = ("prepare", source, "--output", tmp_path / "tokens", "--tokenizer", model)
    assert_refused(command(*words), str(source), "no usable clip")
    words = ("finetune", "--model", model, "--data", tmp_path / "nowhere", "--output", tmp_path / "new")
    assert_refused(command(*words), "nowhere", "no such file or folder")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_one_sentence_cannot_hold_any_back(command: Command, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(RATE // 2))
    tokens = tmp_path / "tokens"
    source = manifest(tmp_path, {"path": "good.wav", "text": "good"})
    assert command("prepare", source, "--output", tokens, "--tokenizer", model).status == 0
    config = tmp_path / "run.yaml"
    language = f"language: {{tokenizer: {model}, data: {{caches: [{tokens}], validation_fraction: 0.1}}}}"
    config.write_text(f"task: language\noutput: {tmp_path / 'run'}\nmax_steps: 1\n{language}\n")
    assert_refused(command("train", config), "validation_fraction=0.1", "holds back all 1 clips", "set it to 0")


def test_training_settings_that_make_no_sense(command: Command, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    language = f"language: {{tokenizer: {model}, data: {{caches: [{tmp_path / 'none'}]}}}}"
    config.write_text(f"task: language\noutput: {tmp_path / 'run'}\nmax_steps: 1\n{language}\n")
    assert_refused(command("train", tmp_path / "none.yaml"), "none.yaml", "No such file")
    assert_refused(command("train", config, "max_step=2"), "unknown key 'max_step'", "'max_steps'")
    assert_refused(command("train", config, "optimizer.learning_rat=2"), "'learning_rat'", "'learning_rate'")
    assert_refused(command("train", config, "max_steps"), "override 'max_steps'")
    assert_refused(command("train", config, "language.data.batch_frame=9"), "'batch_frame'", "'batch_frames'")
    assert_refused(command("train", config), str(tmp_path / "none"))
    config.write_text("task: [")
    assert_refused(command("train", config), str(config), "not YAML")
    assert not (tmp_path / "run").exists()
