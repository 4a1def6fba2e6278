"""An interrupted run goes on as if nothing had happened; whatever moment it dies, what was saved can be loaded."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training.state
from tests.support.toy_task import ToyTask
from tokenizer.errors import UserError
from training.config import OptimizerConfig, RunConfig, changed_keys
from training.loop import fit
from training.state import checkpoints

ROOT = Path(__file__).parents[2]


def settings(output: Path, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "task": "tokenizer",
        "output": str(output),
        "max_steps": 12,
        "precision": "fp32",
        "device": "cpu",
        "tensorboard": False,
        "log_every": 1,
        "validate_every": 4,
        "checkpoint_every": 3,
        "accumulate": 2,
        "optimizer": OptimizerConfig(learning_rate=0.01, warmup_steps=3),
    }
    return RunConfig(**(values | changes))  # type: ignore[arg-type]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, buffers, optimizers, averages, exported models and logged losses, to the last bit."""
    last = checkpoints(one)[-1].name
    for file in sorted((one / "checkpoints" / last).glob("*.safetensors")):
        assert file.read_bytes() == (other / "checkpoints" / last / file.name).read_bytes(), file.name
    for model in ("model", "best"):
        assert (one / model / "model.safetensors").read_bytes() == (other / model / "model.safetensors").read_bytes()
    assert losses(one) == losses(other)


def losses(output: Path) -> list[tuple]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(r["kind"], r["step"], r.get("model_loss", r.get("loss"))) for r in records]


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_resumed_after_a_signal_equals_uninterrupted(tmp_path: Path, step: int) -> None:
    fit(ToyTask(), settings(tmp_path / "whole"), {"seed": 0})
    result = fit(ToyTask(signal_at=step), settings(tmp_path / "parts"), {"seed": 0})
    if step < 11:
        assert not result.finished
        assert result.step == step + 1
    fit(ToyTask(seed=9), settings(tmp_path / "parts"), {"seed": 0}, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_resumed_after_a_crash_goes_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    class Crashing(ToyTask):
        def loss(self, turn, batch, *, step, generator):
            if step == 8:
                raise MemoryError
            return super().loss(turn, batch, step=step, generator=generator)

    fit(ToyTask(), settings(tmp_path / "whole"), {"seed": 0})
    with pytest.raises(MemoryError):
        fit(Crashing(), settings(tmp_path / "parts"), {"seed": 0})
    assert checkpoints(tmp_path / "parts")[-1].name == "step_00000006"
    assert losses(tmp_path / "parts")[-1][1] == 8
    fit(ToyTask(seed=9), settings(tmp_path / "parts"), {"seed": 0}, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


SAVER = """
import os, signal, sys
from pathlib import Path
import torch
import training.state
from training.config import OptimizerConfig
from training.optimizer import AveragedWeights, make_optimizer, optimizer_state
from training.state import Progress, module_state, save_checkpoint

module = torch.nn.Linear(8, 8)
optimizer, ema = make_optimizer(module, OptimizerConfig()), AveragedWeights(module, 0.9)
for step in (1, 2):
    torch.nn.init.constant_(module.weight, step)
    if step == 2:  # die at the n-th call of the given function
        owner = {"save_file": training.state, "rename": Path}[sys.argv[2]]
        original, calls = getattr(owner, sys.argv[2]), []
        def deadly(*inputs, **settings):
            calls.append(1)
            if len(calls) == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*inputs, **settings)
        setattr(owner, sys.argv[2], deadly)
    states = {"model": module_state(module), "optimizer": optimizer_state(module, optimizer), "ema": ema.state()}
    save_checkpoint(Path(sys.argv[1]), Progress(step=step), states.items(), {}, 1)
"""


@pytest.mark.parametrize(("function", "call", "step"), [("save_file", 2, 1), ("rename", 1, 1), ("rename", 2, 2)])
def test_killed_while_saving_leaves_whole_checkpoints(tmp_path: Path, function: str, call: int, step: int) -> None:
    command = [sys.executable, "-c", SAVER, str(tmp_path), function, str(call)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    found = checkpoints(tmp_path)
    # A checkpoint appears by one rename; the next one takes the oldest away.
    assert [folder.name for folder in found] == [f"step_0000000{number}" for number in range(1, step + 1)]
    module = torch.nn.Linear(8, 8)
    assert training.state.load_checkpoint(found[-1], {"model": module}, {}).progress.step == step
    assert torch.all(module.weight == step)


def test_what_a_killed_process_left_is_put_in_order(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path), {"seed": 0})
    before = (tmp_path / "best/model.safetensors").read_bytes()
    (tmp_path / "best").rename(tmp_path / ".best.retired")  # killed between the two renames
    for half in (tmp_path / ".model.writing", tmp_path / "checkpoints/.step_00000015.writing"):
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    fit(ToyTask(), settings(tmp_path), {"seed": 0}, resume=True)
    assert (tmp_path / "best/model.safetensors").read_bytes() == before
    assert not list(tmp_path.rglob(".*"))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(ToyTask(), settings(tmp_path), {"seed": 0})
    kept = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")}

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.state, "save_file", full)
    with pytest.raises(UserError, match="No space left on device; free space or choose another output") as error:
        fit(ToyTask(), settings(tmp_path, max_steps=15, validate_every=99), {"seed": 0}, resume=True)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")} == kept
    assert not list(tmp_path.rglob(".*"))


def test_a_disk_that_is_full_for_a_while_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(ToyTask(), settings(tmp_path / "whole"), {"seed": 0})
    save, calls = training.state.save_file, []

    def full(tensors, path):
        calls.append(path.parent.name)
        if calls[-1] == ".step_00000006.writing":
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    class FullOnce(ToyTask):
        def export(self, folder):
            self.fail_export = len(self.validated) == 2 and folder.name == ".best.writing"
            super().export(folder)

    monkeypatch.setattr(training.state, "save_file", full)
    capsys.readouterr()
    assert fit(FullOnce(), settings(tmp_path / "full", max_steps=12), {"seed": 0}).finished
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 2
    assert said[0].startswith(f"warning: step 6: cannot write {tmp_path}/full/checkpoints/step_00000006: ")
    assert said[0].endswith("training goes on, the next checkpoint is due at step 9, the newest is step_00000003")
    assert said[1].startswith(f"warning: step 8: cannot write {tmp_path}/full/best: ")
    assert_same_end(tmp_path / "whole", tmp_path / "full")
    assert not list((tmp_path / "full").rglob(".*"))


def test_a_full_disk_while_exporting_keeps_the_old_model(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path), {"seed": 0})
    before = (tmp_path / "model/model.safetensors").read_bytes()
    task = ToyTask()
    task.fail_export = True
    with pytest.raises(UserError, match="No space left"):
        fit(task, settings(tmp_path, max_steps=13, validate_every=100), {"seed": 0}, resume=True)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert not (tmp_path / "model/half").exists()


def test_an_incompatible_change_is_named(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path), {"language": {"model": {"hidden_dim": 8}}, "max_steps": 12})
    with pytest.raises(UserError, match=r"cannot resume: 'language.model.hidden_dim' was 8 and is now 16; set it back"):
        fit(ToyTask(), settings(tmp_path), {"language": {"model": {"hidden_dim": 16}}, "max_steps": 12}, resume=True)
    several = {"language": {"model": {"hidden_dim": 16}, "data": "b"}, "max_steps": 14}
    message = r"is now 16, 'language.data' was None and is now 'b'; set them back, .*\(max_steps may change\)"
    with pytest.raises(UserError, match=message):
        fit(ToyTask(), settings(tmp_path), several, resume=True)
    changed = {"language": {"model": {"hidden_dim": 8}}, "max_steps": 14}
    assert fit(ToyTask(), settings(tmp_path, max_steps=14), changed, resume=True).step == 14


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "is cut short or damaged"),
        (lambda folder: (folder / "state.json").write_text('{"version": 1, "prog'), "is cut short or damaged"),
        (lambda folder: (folder / "optimizer_model.safetensors").unlink(), "is cut short or damaged"),
        (lambda folder: (folder / "state.json").write_text('{"version": 7}'), "has checkpoint version 7"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage, message: str) -> None:
    fit(ToyTask(), settings(tmp_path), {})
    damage(checkpoints(tmp_path)[-1])
    with pytest.raises(UserError, match=message) as error:
        fit(ToyTask(), settings(tmp_path), {}, resume=True)
    assert "\n" not in str(error.value)


def test_a_used_output_is_not_overwritten(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path), {})
    with pytest.raises(UserError, match="holds a run already; pass --resume"):
        fit(ToyTask(), settings(tmp_path), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        fit(ToyTask(), settings(tmp_path / "file"), {})


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    fit(ToyTask(), settings(tmp_path, keep_checkpoints=2), {})
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_00000009", "step_00000012"]


def test_weights_of_another_run_start_a_new_one(tmp_path: Path) -> None:
    first = ToyTask()
    fit(first, settings(tmp_path / "first"), {})
    folder = checkpoints(tmp_path / "first")[-1]
    second = ToyTask(seed=5)
    optimizer = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)
    fit(second, settings(tmp_path / "second", init_from=str(folder), max_steps=1, optimizer=optimizer), {})
    torch.testing.assert_close(second.model[0].weight, first.model[0].weight)
    torch.testing.assert_close(second.discriminator.weight, first.discriminator.weight)
    with pytest.raises(UserError, match="holds no model"):
        fit(ToyTask(), settings(tmp_path / "third", init_from=str(tmp_path)), {})


def test_what_fits_starts_a_run_of_another_shape_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = ToyTask()
    fit(first, settings(tmp_path / "first"), {})
    folder = checkpoints(tmp_path / "first")[-1]
    second = ToyTask(seed=5)
    second.model[3] = torch.nn.Linear(16, 3, bias=False)
    second.model[0] = torch.nn.Linear(3, 16)
    second.model.append(torch.nn.Linear(3, 3))
    still = torch.clone(second.model[4].weight.detach())
    optimizer = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)
    changes = {"init_from": str(folder), "max_steps": 1, "optimizer": optimizer}
    with pytest.raises(UserError, match="does not fit model"):
        fit(second, settings(tmp_path / "refused", **changes), {})
    fit(second, settings(tmp_path / "second", init_partial=True, **changes), {})
    torch.testing.assert_close(second.model[0].weight, first.model[0].weight)
    torch.testing.assert_close(second.model[3].weight, first.model[3].weight)
    torch.testing.assert_close(second.model[4].weight, still)
    assert "model (but for 2 of 7 tensors)" in capsys.readouterr().err


def test_a_setting_that_is_new_and_off_has_not_changed() -> None:
    old = {"seed": 0, "data": {"caches": ["a"]}}
    assert changed_keys(old, {"seed": 0, "data": {"caches": ["a"], "weights": [], "pack_frames": None}}) == []
    assert changed_keys(old, {"seed": 0, "data": {"caches": ["a"], "pack_frames": 9}}) == ["data.pack_frames"]
    assert changed_keys({**old, "new": [1]}, {**old, "new": []}) == ["new"]


def test_killed_at_any_moment_a_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.killed_runs", str(tmp_path), "50"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["while writing"] >= 5 and counts["elsewhere"] >= 5  # neither moment is left out
    assert counts["compared"] >= 10
