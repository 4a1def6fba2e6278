"""The loop: what it updates, averages, skips, logs, and refuses."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridlm.model import HybridLM
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_task import ToyTask
from tests.support.two_ranks import SharedTask
from tokenizer.errors import UserError
from training.config import OptimizerConfig, RunConfig, apply_overrides, read_yaml, resolve
from training.loop import fit
from training.optimizer import AveragedWeights, learning_rate, make_optimizer, set_learning_rate


def settings(output: Path, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "task": "tokenizer",
        "output": str(output),
        "max_steps": 6,
        "precision": "fp32",
        "device": "cpu",
        "tensorboard": False,
        "log_every": 1,
        "optimizer": OptimizerConfig(learning_rate=0.01, warmup_steps=0),
    }
    return RunConfig(**(values | changes))  # type: ignore[arg-type]


def lines(output: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_it_learns_and_moves_every_weight(tmp_path: Path) -> None:
    task = ToyTask()
    before = {
        f"{m}.{n}": p.detach().clone() for m, module in task.modules().items() for n, p in module.named_parameters()
    }
    result = fit(task, settings(tmp_path, max_steps=200), {})
    for name, module in task.modules().items():
        for key, parameter in module.named_parameters():
            assert not torch.equal(before[f"{name}.{key}"], parameter), f"{name}.{key} did not move"
    losses = [record["absolute"] for record in lines(tmp_path, "train")]
    assert result.finished
    assert result.step == 200
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


def test_a_turn_updates_its_module_alone(tmp_path: Path) -> None:
    task = ToyTask()
    before = task.discriminator.weight.detach().clone()
    fit(task, settings(tmp_path, max_steps=1), {})  # step 0 is the model's alone, although its loss uses the critic
    assert torch.equal(before, task.discriminator.weight)
    assert task.discriminator.calls == 0
    assert task.discriminator.weight.grad is None  # nor may it reach the critic's own turn later


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    class Plain(ToyTask):
        def loss(self, turn, batch, *, step, generator):
            return (self.model[0](batch["x"])).pow(2).mean(), {}

        def turns(self, step):
            return ("model",)

    class Large(Plain):
        def batches(self, **where):
            stream = super().batches(**where)
            while True:
                yield {"x": torch.cat([next(stream)["x"], next(stream)["x"]])}

    small, large = Plain(), Large()
    small.model[3].requires_grad_(False), large.model[3].requires_grad_(False)
    fit(small, settings(tmp_path / "a", accumulate=2), {})
    fit(large, settings(tmp_path / "b"), {})
    torch.testing.assert_close(small.model[0].weight, large.model[0].weight)
    # AdamW hides the gradients' scale; their norm shows it.
    norms = [[record["model_grad_norm"] for record in lines(tmp_path / name, "train")] for name in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradients_are_clipped_and_their_norm_logged(tmp_path: Path) -> None:
    norms = []
    task = ToyTask()
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, max_grad_norm=0.01)
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        fit(task, settings(tmp_path, optimizer=optimizer, max_steps=3), {})
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)
    assert norms
    assert all(record["model_grad_norm"] > 0.1 for record in lines(tmp_path, "train"))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    good, bad = ToyTask(), ToyTask(bad_steps=[2])
    fit(good, settings(tmp_path / "good", max_steps=2), {})
    fit(bad, settings(tmp_path / "bad", max_steps=3, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=5)), {})
    fit(
        bad_twin := ToyTask(),
        settings(tmp_path / "twin", max_steps=2, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=5)),
        {},
    )
    assert torch.equal(bad.model[0].weight, bad_twin.model[0].weight)
    (skipped,) = lines(tmp_path / "bad", "skipped")
    assert skipped["step"] == skipped["first_batch"] == skipped["last_batch"] == 3
    assert skipped["clips"] == [f"clip 2.{row}" for row in range(8)]
    assert all(
        math.isfinite(record["model_loss"]) for record in lines(tmp_path / "bad", "train") if record["step"] != 3
    )
    assert json.loads((tmp_path / "bad/checkpoints/step_00000003/state.json").read_text())["progress"]["bad_steps"] == 1


def test_a_run_that_stays_bad_stops_with_one_line(tmp_path: Path) -> None:
    task = ToyTask(bad_steps=range(3, 99))
    with pytest.raises(
        UserError,
        match=r"^4 steps in a row were skipped, up to step 7 \(batch 7 of clip 6.0, .*, clip 6.4 and 3 more\): loss or "
        r"gradient is not finite; lower optimizer.learning_rate or set precision=fp32, then resume from the start$",
    ):
        fit(task, settings(tmp_path, max_steps=50, max_bad_steps=4), {})
    assert torch.isfinite(task.model[0].weight).all()


def test_averaged_weights_are_the_stated_mean() -> None:
    module = torch.nn.Linear(2, 2, bias=False)
    ema = AveragedWeights(module, 0.5)
    expected = module.weight.detach().clone()
    for count in range(6):
        with torch.no_grad():
            module.weight.add_(count + 1.0)
        ema.update()
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    raw = module.weight.detach().clone()
    with ema.swapped_in():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, raw)


def test_validation_and_export_see_averaged_weights_in_evaluation_mode(tmp_path: Path) -> None:
    task = ToyTask()
    fit(task, settings(tmp_path, max_steps=20, ema_decay=0.99), {})
    exported = load_file(tmp_path / "model/model.safetensors")
    ema = load_file(tmp_path / "checkpoints/step_00000020/ema.safetensors")
    raw = load_file(tmp_path / "checkpoints/step_00000020/model.safetensors")
    assert torch.equal(exported["0.weight"], ema["0.weight"])
    assert torch.equal(task.validated[-1], ema["0.weight"])
    assert not torch.equal(raw["0.weight"], ema["0.weight"])
    assert torch.equal(task.model[0].weight, raw["0.weight"])


def test_the_best_model_is_kept_apart_from_the_latest(tmp_path: Path) -> None:
    class Worsening(ToyTask):
        def validate(self):
            super().validate()
            return {"loss": float(len(self.validated))}

    task = Worsening()
    fit(task, settings(tmp_path, max_steps=4, validate_every=2, checkpoint_every=2, ema_decay=0), {})
    best = load_file(tmp_path / "best/model.safetensors")["0.weight"]
    assert torch.equal(best, task.validated[0])
    assert not torch.equal(best, load_file(tmp_path / "model/model.safetensors")["0.weight"])


def test_schedule_and_decay_groups() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == 0.1
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 4, 2))
    groups = make_optimizer(normed, OptimizerConfig(weight_decay=0.5)).param_groups
    decayed = {tuple(p.shape) for p in groups[0]["params"]}
    assert decayed == {(4, 3, 2)}
    assert groups[0]["weight_decay"] == 0.5
    assert groups[1]["weight_decay"] == 0


def widened(width: int) -> HybridLM:
    torch.manual_seed(width)
    return HybridLM(replace(tiny_model("hybrid").model.config, hidden_dim=width, num_heads=2))


def test_the_decoders_matrices_learn_more_slowly_the_wider_they_are() -> None:
    model = widened(64)
    optimizer = make_optimizer(model, OptimizerConfig(base_width=16, weight_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2
        assert rates.pop(id(parameter)) == pytest.approx(0.2 if name.startswith("decoder.") and matrix else 0.8), name
        assert decay[id(parameter)] == (0.5 if matrix else 0), name
    assert not rates


def test_at_the_base_width_nothing_changes() -> None:
    results = []
    for base in (None, 32):
        model = widened(32)
        optimizer = make_optimizer(model, OptimizerConfig(base_width=base, weight_decay=0.5))
        for step in range(3):
            for index, parameter in enumerate(model.parameters()):
                seed = torch.Generator().manual_seed(1000 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=seed)
            set_learning_rate(optimizer, 0.01)
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_step_moves_hidden_matrices_by_their_share(tmp_path: Path) -> None:
    task = SharedTask(0)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0, base_width=3)
    fit(task, settings(tmp_path, max_steps=1, optimizer=optimizer), {})
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad and name != "seldom":
            share = 3 / 7 if "linear.weight" in name else 1.0  # Adam's first step is the rate
            assert float((parameter.detach() - before[name]).abs().median()) == pytest.approx(0.01 * share, rel=1e-3), (
                name
            )


def test_slow_steps_say_how_long_the_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(ToyTask(), settings(tmp_path / "quick", log_every=6), {})
    assert "a step takes" not in capsys.readouterr().err
    monkeypatch.setattr("training.loop.SOON_S", 1e-9)
    fit(ToyTask(), settings(tmp_path / "slow", log_every=6), {})
    said = capsys.readouterr().err
    assert re.search(r"a step takes \d+\.\d s, \d:\d\d:\d\d left; figures every 6 steps\n.*step 6/6 ", said, re.DOTALL)


def test_a_module_without_a_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.base_width=8 is for language models, and Linear is none"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(base_width=8))
    with pytest.raises(ValueError, match=r"base_width=0 must be at least 1"):
        OptimizerConfig(base_width=0)


def test_tensorboard_holds_figures_audio_and_spectrograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(ToyTask(), settings(tmp_path, max_steps=2, tensorboard=True), {})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/model_loss", "train/frames_per_s", "validate/loss"} <= set(events.Tags()["scalars"])
    assert events.Tags()["audio"] == ["tone"]
    assert events.Tags()["images"] == ["tone/spectrogram"]
    assert {"step", "model_loss", "model_grad_norm", "learning_rate", "frames_per_s", "remaining_s"} <= set(
        lines(tmp_path, "train")[0]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rat=1"], r"unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        (["outputt=x"], r"unknown key 'outputt'; did you mean 'output'\?"),
        (["optimizer.learning_rate=-1"], "learning_rate=-1.0 must be above 0"),
        (["seed.sub=1"], r"override 'seed.sub=1': seed is 3, not a group of settings"),
        (["max_steps"], "override 'max_steps' must have the form key.sub=value"),
        (["precision=fp8"], "precision='fp8' must be one of auto, bf16, fp32"),
        (["checkpoint_every=0"], "checkpoint_every=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: language\noutput: x\nmax_steps: 5\nseed: 3\n")
    with pytest.raises(UserError, match=message) as error:
        resolve(apply_overrides(read_yaml(path), overrides), OptimizerConfig, where="c.yaml")
    assert "\n" not in str(error.value)


def test_overrides_are_yaml_values_and_leave_the_mapping_alone() -> None:
    mapping = {"task": "language", "output": "x", "max_steps": 5, "optimizer": {"weight_decay": 0.5}}
    changed = apply_overrides(mapping, ["optimizer.learning_rate=3e-4", "optimizer.betas=[0.8, 0.9]", "threads=2"])
    run, _, resolved = resolve(changed, OptimizerConfig, where="c")
    assert run.optimizer == OptimizerConfig(learning_rate=3e-4, betas=(0.8, 0.9), weight_decay=0.5)
    assert run.threads == 2
    assert mapping["optimizer"] == {"weight_decay": 0.5}
    assert resolved["seed"] == 0
    assert resolved["optimizer"]["betas"] == [0.8, 0.9]
    assert resolved == json.loads(json.dumps(resolved))


@pytest.mark.parametrize(("text", "message"), [("a: [1", "is not YAML"), ("- 1", "must be a mapping")])
def test_bad_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="cannot read the config"):
        read_yaml(tmp_path / "absent.yaml")


def test_an_error_in_the_data_thread_reaches_the_caller(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def batches(self, **where):
            yield from [next(super().batches(**where))]
            raise UserError("clip.flac cannot be read")

    with pytest.raises(UserError, match=r"clip.flac cannot be read"):
        fit(Broken(), settings(tmp_path), {})
