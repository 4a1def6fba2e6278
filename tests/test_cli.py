"""The command line is a contract: its names and options, what it prints, and how it fails."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import typer

import hybridlm
from hybridlm import cli
from tests.support.command import Command, assert_refused, runner
from tests.support.saved_model import save_tiny_enhancer, save_tiny_model
from tests.support.tiny_audio_model import TAGS
from tokenizer.errors import UserError

CONTRACT = {
    "demo": {"--output-dir"},
    "generate": {
        *(
            "--model",
            "--adapter",
            "--text",
            "--tag",
            "--audio",
            "--duration",
            "--num-samples",
            "--seed",
            "--temperature",
        ),
        *("--reference", "--reference-text"),
        *("--latent-temperature", "--latent-steps"),
        *("--top-k", "--top-p", "--min-p", "--repetition-penalty", "--repetition-window", "--cfg"),
        *("--stop-threshold", "--min-duration", "--loudness", "--device", "--output", "--save-plan"),
        *("--precision", "--compile"),
        *("--text-file", "--stream", "--format", "--max-drift", "--pause", "--json"),
    },
    "render": {
        *("plan", "--model", "--seed", "--latent-temperature", "--latent-steps", "--edit", "--device", "--output"),
        "--precision",
    },
    "bench": {"--model", "--precision", "--compile", "--duration", "--repeats", "--device", "--json"},
    "reconstruct": {"input", "output", "--tokenizer", "--from", "--num-codebooks", "--json"},
    "enhance": {"input", "output", "--model", "--phase", "--device", "--json"},
    "prepare": {
        *("source", "--output", "--tokenizer", "--workers", "--audio", "--sample-rate", "--split", "--format"),
        "--trim-silence",
    },
    "train": {"config", "overrides", "--resume"},
    "finetune": {"--model", "--data", "--output", "--lora", "--rank", "--old-data", "overrides"},
    "plan": {"config", "overrides", "--gpus", "--hours-of-audio", "--backend", "--memory", "--tflops", "--json"},
    "merge": {"--model", "--adapter", "--output"},
    "doctor": {"--data", "--model", "--adapter", "--clips", "--device", "--json"},
    "evaluate": {"--model", "--adapter", "--data", "--split", "--batch-size", "--device", "--json", "--picture"},
    "compare": {"recipe", "overrides", "--seeds", "--output", "--report", "--jobs", "--one"},
    "probe": {
        *("--data", "--label", "--tokenizer", "--input", "--method", "--where", "--folds", "--leave-out", "--split"),
        *("--device", "--seed", "--json"),
    },
    "info": {"name_or_dir", "--adapter"},
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_commands_and_options_are_the_contract() -> None:
    found = {}
    for name, one in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        found[name] = {word for param in one.params for word in param.opts if word != "--help"}
    assert found == CONTRACT


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\nfrom hybridlm.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"generate" in done.stdout


def test_version_and_the_bare_command(command: Command) -> None:
    assert command("--version").out.strip() == hybridlm.__version__
    shown = command()
    assert shown.status == 0
    assert all(name in shown.out for name in CONTRACT)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sing"], "sing"),
        (["generate", "--pitch", "3"], "--pitch"),
        (["generate", "--seed", "x"], "--seed"),
        (["reconstruct"], "IN"),
        (["reconstruct", "a.wav", "b.wav", "--from", "air"], "--from"),
        (["finetune", "--output", "x"], "--data"),
    ],
)
def test_bad_usage_is_one_line(command: Command, words: list[str], part: str) -> None:
    assert_refused(command(*words), part)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("tempo=9 must be\nat most 8"), "hybridlm: error: tempo=9 must be at most 8"),
        (OSError(errno.ENOSPC, "No space left on device", "out.wav"), "'out.wav': No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "'/etc/x': Permission denied"),
    ],
)
def test_expected_failures_are_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("hybridlm.checkpoint.describe", fail)
    assert_refused(command("info", "box"), line)


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("hybridlm.checkpoint.describe", fail)
    monkeypatch.setattr(sys, "argv", ["hybridlm", "info", "box"])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()


def test_ctrl_c_ends_with_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridlm.checkpoint.describe", interrupt)
    assert command("info", "box").status == 130


def test_generate_says_where_how_long_how_fast_and_which_seed(command: Command, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "take.wav"
    result = command("generate", "--model", model, "--tag", "music", "--duration", 0.4, "--seed", 7, "--output", output)
    assert result.status == 0, result.err
    assert str(output) in result.out
    assert "0.40 s" in result.out
    assert "real time" in result.out
    assert "seed 7" in result.out
    assert soundfile.info(output).duration == pytest.approx(0.4)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_option_of_generate_reaches_the_model(command: Command, model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.wav"
    soundfile.write(prompt, [0.1, -0.1] * 2400, 24000)
    base = ("generate", "--model", model, "--duration", 0.4, "--device", "cpu", "--seed", 1)

    def audio(*words: object) -> bytes:
        output = tmp_path / "out.flac"
        result = command(*base, "--output", output, *words)
        assert result.status == 0, result.err
        return output.read_bytes()

    plain = audio()
    assert audio() == plain
    for words in (
        ("--seed", 2),
        ("--temperature", 0.2),
        ("--top-k", 1),
        ("--top-p", 0.05),
        ("--min-p", 0.9),
        ("--repetition-penalty", 3),
        ("--repetition-penalty", 3, "--repetition-window", 1),
        ("--loudness", -16),
        ("--tag", "music", "--cfg", 3),
        ("--tag", "music"),
        ("--tag", "speech", "--tag", "speaker:kathleen"),
        ("--text", "Good morning."),
        ("--audio", prompt),
        ("--reference", prompt),
        ("--reference", prompt, "--text", "Good morning.", "--reference-text", "hm"),
    ):
        assert audio(*words) != plain, words
    text = ("--text", "hm", "--stop-threshold", 0.001)
    assert audio(*text) not in (audio(*text[:2]), audio(*text, "--min-duration", 0.3))


def test_several_samples_get_several_files(command: Command, model: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", model, "--duration", 0.2, "--seed", 5)
    result = command(*words, "--num-samples", 3, "--output", tmp_path / "take.wav")
    assert result.status == 0, result.err
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["take-1.wav", "take-2.wav", "take-3.wav"]
    alone = command("generate", "--model", model, "--duration", 0.2, "--seed", 6, "--output", tmp_path / "b.wav")
    assert alone.status == 0, alone.err
    second, single = (soundfile.read(tmp_path / name, dtype="int16")[0].astype(int) for name in ("take-2.wav", "b.wav"))
    assert len(second) == len(single) == 4800
    assert abs(second - single).max() <= 2


def test_reconstruct_writes_audio_and_figures(command: Command, model: Path, tmp_path: Path) -> None:
    source, output, figures = tmp_path / "in.wav", tmp_path / "out.wav", tmp_path / "figures.json"
    soundfile.write(source, [0.1, -0.1] * 12000, 24000)
    words = ("reconstruct", source, output, "--tokenizer", model, "--json", figures)
    result = command(*words, "--from", "codes", "--num-codebooks", 2)
    assert result.status == 0, result.err
    assert soundfile.info(output).frames == 24000
    assert '"num_codebooks": 2' in figures.read_text()


def test_enhance_needs_an_enhancer_and_writes_audio_and_figures(command: Command, model: Path, tmp_path: Path) -> None:
    source, output, figures = tmp_path / "in.wav", tmp_path / "out.wav", tmp_path / "figures.json"
    soundfile.write(source, [[0.1, 0.2], [-0.1, -0.2]] * 8000, 16000)
    remedy = ("there is no enhancer in the box", "configs/enhancement-small.yaml", "--model")
    assert_refused(command("enhance", source, output), *remedy)
    assert_refused(command("enhance", source, output, "--model", model), str(model), "not an enhancer's folder")
    folder = save_tiny_enhancer(tmp_path / "enhancer")
    assert_refused(command("enhance", tmp_path / "none.wav", output, "--model", folder), "none.wav", "no such file")
    assert_refused(command("enhance", source, output, "--model", folder, "--device", "gpu"), "device='gpu'")
    assert not output.exists()
    result = command("enhance", source, output, "--model", folder, "--device", "cpu", "--json", figures)
    assert result.status == 0, result.err
    assert (soundfile.info(output).frames, soundfile.info(output).samplerate) == (24000, 24000)
    assert json.loads(figures.read_text())["seconds"] == 1.0
    assert "speed" in result.out
    shown = command("info", folder)
    assert shown.status == 0 and "enhancer" in shown.out and '"view": "latents"' in shown.out


def test_info_shows_parameters_tags_and_the_card(command: Command, model: Path) -> None:
    result = command("info", model)
    assert result.status == 0, result.err
    assert "num_parameters" in result.out
    assert all(tag in result.out for tag in TAGS)
    assert "Random weights, for tests." in result.out
    assert '"type": "f3"' in result.out


def test_python_reaches_the_same_names() -> None:
    assert set(hybridlm.__all__) <= set(dir(hybridlm))
    for name in hybridlm.__all__:
        assert getattr(hybridlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'louder'"):
        hybridlm.louder  # noqa: B018
