"""DDP, ZeRO and FSDP2 on two ranks train as one process does, and read one another's checkpoints."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.training_ranks import MadeUpTask
from hybridlm.checkpoint import load_model
from hybridlm.model import HybridLM
from tests.support import rank_memory
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.toy_corpus import write_cache
from tests.support.two_ranks import ENVIRONMENTS, ZERO3, SharedTask, packed, settings, start
from training.dry_run import Answers, dry_run
from training.loop import fit
from training.plan import PlannedTask, made_up_batch, memory
from training.run import train_mapping
from training.state import checkpoints

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = [
    pytest.param(name, marks=pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed"))
    for name in ("zero1", "zero2", "zero3")
]
EVERY = ["ddp", "fsdp2", *ZERO]
FILES = ("model", "optimizer_model", "ema")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: `one` of a single process, one of every backend, and one of each that took over half-way."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "zero3.json").write_text(ZERO3)
    write_cache(folder)
    write_cache(folder / "few", 1)
    fit(SharedTask(0), settings(folder / "one", 4), {})
    fit(SharedTask(0, same_graph=False), settings(folder / "one-seldom", 4), {})
    train_mapping(packed(folder, "one-packed", 2), "test")
    backends = [name for name in ENVIRONMENTS if DEEPSPEED or not name.startswith("zero")]
    for backend in backends:
        copy_half(folder / "one", folder / f"{backend}-resumed")
    copy_half(folder / "one-packed", folder / "ddp-packed-resumed")
    start("tests.support.two_ranks", str(folder), *backends)
    return folder


def copy_half(run: Path, to: Path) -> None:
    half = Path("checkpoints") / checkpoints(run)[0].name
    shutil.copytree(run / half, to / half)
    if (text := run / "text.model").exists():
        shutil.copy(text, to)


def curve(run: Path) -> dict[str, torch.Tensor]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    names = ("step", "model_loss", "absolute", "model_grad_norm", "code", "latent", "stop", "alignment")
    figures = {name: [r.get(name, -1.0) for r in train] for name in names}
    figures["validation"] = [r["loss"] for r in records if r["kind"] == "validate"]
    figures["skipped"] = [r["step"] for r in records if r["kind"] == "skipped"]
    return {name: torch.tensor(values) for name, values in figures.items()}


def assert_same_checkpoint(run: Path, other: Path) -> None:
    for stem in FILES:
        found, expected = (load_file(checkpoints(each)[-1] / f"{stem}.safetensors") for each in (run, other))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=f"{stem}: {name}")


def assert_same_state(run: Path, other: Path) -> None:
    assert_same_checkpoint(run, other)
    found, expected = (load_file(each / "model/model.safetensors") for each in (run, other))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", EVERY)
def test_curves_and_states_equal_those_of_one_process(runs: Path, backend: str) -> None:
    found, expected = curve(runs / backend), curve(runs / "one")
    assert expected["skipped"].tolist() == [6, 16]  # not finite; a spike
    assert len(expected["step"]) == 20
    assert float(expected["model_grad_norm"].max()) > 0.5  # clipped
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)
    assert_same_state(runs / backend, runs / "one")


@pytest.mark.parametrize("backend", EVERY)
def test_a_run_of_one_process_goes_on_under_it(runs: Path, backend: str) -> None:
    assert_same_state(runs / f"{backend}-resumed", runs / "one")


@pytest.mark.parametrize("backend", EVERY)
def test_its_run_goes_on_in_one_process(runs: Path, backend: str, tmp_path: Path) -> None:
    copy_half(runs / backend, tmp_path)
    fit(SharedTask(1), settings(tmp_path, 4), {}, resume=True)
    assert_same_state(tmp_path, runs / "one")


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_batch_may_leave_weights_out(runs: Path, backend: str) -> None:
    assert_same_state(runs / f"{backend}-seldom", runs / "one-seldom")


@pytest.mark.parametrize("backend", ["fsdp2", *ZERO])
def test_a_language_model_learns_as_under_ddp_and_its_folder_loads(runs: Path, backend: str) -> None:
    found, expected = curve(runs / f"{backend}-language"), curve(runs / "ddp-language")
    for name in ("model_loss", "model_grad_norm", "validation"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)
    model, reference = (load_model(runs / f"{name}-language" / "model").model for name in (backend, "ddp"))
    for (name, weight), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("backend", ["ddp", *ZERO[1:]])
def test_packed_rows_are_learned_as_by_one_process(runs: Path, backend: str) -> None:
    found, expected = curve(runs / f"{backend}-packed"), curve(runs / "one-packed")
    assert len(expected["step"]) == 4 and float(expected["alignment"].max()) > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)
    assert_same_checkpoint(runs / f"{backend}-packed", runs / "one-packed")


def test_a_packed_run_goes_on_with_another_number_of_processes(runs: Path, tmp_path: Path) -> None:
    assert_same_checkpoint(runs / "ddp-packed-resumed", runs / "one-packed")
    copy_half(runs / "ddp-packed", tmp_path)
    train_mapping({**packed(runs, "", 2), "output": str(tmp_path)}, "test", resume=True)
    assert_same_checkpoint(tmp_path, runs / "one-packed")


def test_compiled_layers_learn_the_same(runs: Path) -> None:
    assert all(int((runs / "ddp-compiled" / f"graphs-{rank}").read_text()) > 1 for rank in range(2))
    found, expected = curve(runs / "ddp-compiled"), curve(runs / "one-packed")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
def test_a_step_takes_the_memory_that_the_plan_says(runs: Path) -> None:
    added = json.loads((runs / "zero2-memory" / "added.json").read_text())
    task = MadeUpTask(rank_memory.CONFIG, rank_memory.SHAPE)
    shape = rank_memory.SHAPE
    found = dry_run(
        lambda: (PlannedTask(task.config, HybridLM(rank_memory.CONFIG)), made_up_batch(rank_memory.CONFIG, shape)),
        Answers(scored=1.0, columns=shape.columns - 1),
        autocast=None,
        fused=False,
    )
    planned = memory(task.model, tiny_tokenizer(), found, gpus=2, backend="zero2", averaged=False)
    before = ("weights", "optimizer", "DeepSpeed's copy", "tokenizer")
    # By when the exchange comes, a share of the gradients lies there or not, which is a fifth of these few bytes.
    assert sum(size for name, size in planned.items() if name not in before) == pytest.approx(added, rel=0.25)


@pytest.mark.parametrize("backend", ["fsdp2", *ZERO])
def test_a_task_with_two_optimizers_is_refused(runs: Path, backend: str) -> None:
    line, other = said(runs / f"{backend}-two")
    assert "trains one module with one optimizer, but this task has 2: model, discriminator; use" in line
    assert other == "0"


def said(folder: Path) -> tuple[str, str]:
    """How the first rank ended, and the second."""
    return (folder / "said-0").read_text(), (folder / "said-1").read_text()


def test_what_one_rank_cannot_do_ends_both_in_one_line(runs: Path) -> None:
    line, other = said(runs / "bad-key")
    assert "unknown key 'max_step'; did you mean 'max_steps'" in line and other == "0"
    assert not (runs / "never" / "checkpoints").exists()


def test_more_ranks_than_there_is_to_learn_from_are_refused(runs: Path) -> None:
    line, other = said(runs / "few")
    assert "few/cache: 1 clips to learn from, in 1 windows of at most 25 frames, are too few for 2 processes;" in line
    assert other == "0"
    assert not (runs / "few/run/checkpoints").exists()
