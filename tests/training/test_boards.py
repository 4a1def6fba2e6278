"""What a run shows: samples as files and on boards, Weights & Biases if it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from hybridlm import cli_training
from tests.support.toy_corpus import write_cache
from tests.support.toy_task import ToyTask
from tests.training.test_layers import language
from tests.training.test_resume import settings
from tokenizer.errors import UserError
from training.corpus import TokenCache
from training.listening import prompts_of
from training.loop import fit
from training.run import train_mapping
from training.task import Sample


class FakeRun:
    def __init__(self, about: dict[str, Any]) -> None:
        self.about, self.logged, self.finished = about, list[dict[str, Any]](), False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metric = (name, step_metric)

    def log(self, figures: dict[str, Any]) -> None:
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The library's face as far as it is used (wandb 0.18 and newer)."""
    library, runs = ModuleType("wandb"), list[FakeRun]()

    class Error(Exception):
        pass

    def init(**about: Any) -> FakeRun:
        if about["project"] == "closed":
            raise Error("api_key not configured\n(no-tty)")
        runs.append(FakeRun(about))
        return runs[-1]

    def audio(samples: np.ndarray, sample_rate: int) -> tuple[str, int, int]:
        return ("audio", samples.ndim, sample_rate)

    def image(pixels: np.ndarray) -> tuple[str, int]:
        return ("image", pixels.ndim)

    for name, value in {"init": init, "Audio": audio, "Image": image, "Error": Error}.items():
        setattr(library, name, value)
    monkeypatch.setitem(sys.modules, "wandb", library)
    return runs


def test_weights_and_biases_are_told_what_the_log_is(tmp_path: Path, wandb: list[FakeRun]) -> None:
    fit(ToyTask(), settings(tmp_path / "r", max_steps=4, wandb="speech"), {"seed": 7})
    (run,) = wandb
    assert run.about["project"] == "speech" and run.about["name"] == "r" and run.about["config"] == {"seed": 7}
    assert run.metric == ("*", "step") and run.finished
    told = {name: entry["step"] for entry in run.logged for name in entry}
    assert told["train/model_loss"] == told["validate/loss"] == told["tone"] == 4
    assert run.logged[0]["step"] == 1 and isinstance(run.logged[0]["train/model_loss"], float)
    (sound,) = [entry for entry in run.logged if "tone" in entry]
    assert sound["tone"] == ("audio", 1, 24000) and sound["tone/spectrogram"] == ("image", 2)
    fit(ToyTask(), settings(tmp_path / "r", max_steps=5, wandb="speech"), {"seed": 7}, resume=True)
    assert wandb[1].about["id"] == run.about["id"] and wandb[1].about["resume"] == "allow"


def test_weights_and_biases_that_cannot_be_had_are_one_line(
    tmp_path: Path, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"wandb=closed: api_key not configured \(no-tty\); log in with"):
        fit(ToyTask(), settings(tmp_path / "a", wandb="closed"), {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb=speech needs the library wandb; pip install 'hybridlm\[wandb\]'"):
        fit(ToyTask(), settings(tmp_path / "b", wandb="speech"), {})
    fit(ToyTask(), settings(tmp_path / "c", max_steps=1), {})  # not imported unless asked for


def test_samples_are_files_at_their_own_pace(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path, max_steps=5, sample_every=2), {})
    folders = sorted(folder.name for folder in (tmp_path / "samples").iterdir())
    assert folders == ["step_00000002", "step_00000004", "step_00000005"]
    audio, rate = soundfile.read(tmp_path / "samples/step_00000002/tone.wav")
    assert rate == 24000 and np.abs(audio - np.sin(np.arange(4000) / 10)).max() < 1e-3
    assert (tmp_path / "samples/step_00000002/tone.png").read_bytes().startswith(b"\x89PNG")


def test_samples_come_with_validations_unless_told_otherwise(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path, max_steps=9), {})
    assert len(list((tmp_path / "samples").iterdir())) == 3  # steps 4, 8, and 9, the last


def test_a_model_is_given_held_out_texts_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_cache(tmp_path, 12)
    asked = []

    def sampler(model: Any, tokenizer: Any, text: Any, prompts: Any = ()) -> list[Sample]:
        asked.append((prompts, model.training))
        return cli_training._sound(model, tokenizer, text, prompts)

    made = language(tmp_path, "run", max_steps=2, sample_every=1)
    made["language"]["data"] = {**made["language"]["data"], "validation_fraction": 0.5}
    train_mapping(made, "test", sampler=sampler)
    assert len(asked) == 2 and not asked[0][1]
    prompts = asked[0][0]
    held_out = TokenCache(Path(folders["cache"]), split="validation", validation_fraction=0.5)
    clips = [held_out.index.clip(i) for i in range(len(held_out))]
    assert prompts == prompts_of(held_out) == asked[1][0]
    assert {(p.text, p.tags) for p in prompts} <= {(c.text, c.tags) for c in clips}
    assert {p.tags for p in prompts} == {("speech",), ("music",)}
    for step in (1, 2):
        files = sorted(file.name for file in (tmp_path / f"run/samples/step_{step:08d}").iterdir())
        assert files == [f"generated-{n}.{kind}" for n in range(len(prompts)) for kind in ("png", "wav")]
