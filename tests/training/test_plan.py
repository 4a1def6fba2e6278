"""Plans: settings in, figures out, nothing allocated, and one line where something can't be planned."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tests.support.command import Command, assert_refused, runner
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.tiny_backbones import save_tiny_backbone
from tests.support.toy_corpus import TINY_MODEL
from training.dry_run import BACKWARD, COPIES, DryRun
from training.plan import Backend, Plan, memory, plan

GIB = 2**30


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tiny_tokenizer().save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def mapping(tokenizer: str, **model: Any) -> dict[str, Any]:
    return {
        "task": "language",
        "output": "nowhere",
        "max_steps": 10,
        "precision": "fp32",
        "language": {
            "tokenizer": tokenizer,
            "data": {"caches": ["not there"], "batch_frames": 200, "max_frames": 50},
            "model": {**TINY_MODEL, **model},
        },
    }


def planned(settings: dict[str, Any], **values: Any) -> Plan:
    return plan(settings, "test", **values)


def test_the_figures_of_a_run(tokenizer: str) -> None:
    made = planned(mapping(tokenizer), gpus=2)
    assert (made.shape.rows, made.shape.frames, made.shape.columns) == (4, 50, 2 + 16 + 1)
    assert made.frames_per_step == 400 and made.codes_per_step == 1200
    assert made.hours_of_audio == pytest.approx(10 * 400 / 25 / 3600)
    tokens = 2 * 4 * (50 + 19)
    assert 6 * tokens * made.parameters["decoder"] < made.flop_per_step
    assert made.flop == 10 * made.flop_per_step
    assert made.hours(2.0) == pytest.approx(made.flop / 4e12 / 3600)
    longer = planned(mapping(tokenizer), gpus=2, hours_of_audio=1.0)
    assert longer.steps == 225 and longer.flop_per_step == made.flop_per_step


def test_seven_billion_weights_need_no_memory() -> None:
    large = {"hidden_dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 14336}
    settings = mapping("box", **large)
    settings["language"]["data"] = {"caches": ["not there"], "batch_frames": 4000, "max_frames": 500}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = planned({**settings, "precision": "bf16"})
    assert 6.9e9 < sum(made.parameters.values()) < 7.1e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert made.memory["optimizer"] == 2 * made.memory["weights"] == 8 * sum(made.parameters.values())
    tokens = made.shape.rows * (made.shape.frames + made.shape.columns)
    assert made.flop_per_step == pytest.approx(6 * tokens * made.parameters["decoder"], rel=0.05)


def test_a_backbone_is_planned_without_its_weights(tokenizer: str, tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path / "published", "qwen3")
    (tmp_path / "published" / "model.safetensors").unlink()
    settings = mapping(tokenizer)
    decided = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
    settings["language"]["model"] = {k: v for k, v in TINY_MODEL.items() if k not in decided}
    made = planned(settings | {"language": {**settings["language"], "backbone": f"hf:{tmp_path / 'published'}"}})
    assert made.parameters["text_embedding"] == (2 + 291) * 32


@pytest.mark.parametrize("backend", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_what_each_backend_shares(backend: Backend) -> None:
    with torch.device("meta"):
        model = HybridLM(ModelConfig(vocab_size=64))
    whole = 4 * model.num_parameters()
    found = DryRun(activations={"decoder": 10 * whole, BACKWARD: 5, COPIES: whole // 2}, gradients=whole, flop=1)
    shared = memory(model, tiny_tokenizer(), found, gpus=4, backend=backend, averaged=True)
    quarter = -(-whole // 4)
    sharded = backend in ("zero3", "fsdp2")
    assert shared["weights"] == shared["averaged weights"] == (quarter if sharded else whole)
    assert shared["optimizer"] == 2 * (whole if backend == "ddp" else quarter)
    assert shared.get("DeepSpeed's copy", 0) == (quarter if backend.startswith("zero") else 0)
    assert (shared["gradients"] < whole) == (backend != "ddp")
    assert (COPIES in shared) == (not sharded) and ("gathered weights" in shared) == sharded
    assert shared.get("DeepSpeed's bucket", 0) == (whole if backend.startswith("zero") else 0)
    alone = memory(model, tiny_tokenizer(), found, gpus=1, backend=backend, averaged=False)
    assert alone["weights"] == whole and "averaged weights" not in alone


def test_gradients_are_exchanged_in_one_piece() -> None:
    with torch.device("meta"):
        model = HybridLM(ModelConfig(vocab_size=64))
    whole = 4 * model.num_parameters()
    found = DryRun(activations={"decoder": whole}, gradients=10, flop=1)
    assert memory(model, tiny_tokenizer(), found, gpus=2, backend="ddp", averaged=False)["gradients"] == 3 * whole
    assert memory(model, tiny_tokenizer(), found, gpus=1, backend="ddp", averaged=False)["gradients"] == 10


@pytest.mark.parametrize(("backend", "measured"), [("zero1", 4.50), ("zero2", 4.50), ("zero3", 6.57)])
def test_the_exchange_takes_what_deepspeed_was_seen_to_take(backend: Backend, measured: float) -> None:
    """Allocations of a real step on two ranks, in units of the weights (DeepSpeed 0.19, 3.9 M weights, no averages)."""
    with torch.device("meta"):
        model = HybridLM(ModelConfig(vocab_size=64))
    whole = 4 * model.num_parameters()
    found = DryRun(activations={"decoder": whole // 100}, gradients=whole, flop=1)
    planned = memory(model, tiny_tokenizer(), found, gpus=2, backend=backend, averaged=False)
    assert sum(planned.values()) / whole == pytest.approx(measured, rel=0.02)
    more = memory(model, tiny_tokenizer(), found, gpus=2, backend=backend, averaged=False, accumulated=True)
    assert sum(more.values()) / whole == pytest.approx(6.5 if backend == "zero3" else 5.0, rel=0.02)


def test_a_bucket_is_bounded_and_emptied_in_the_midst_of_the_pass() -> None:
    with torch.device("meta"):
        model = HybridLM(ModelConfig(vocab_size=64, hidden_dim=4096, num_layers=30, num_heads=32, ffn_dim=16384))
    whole = 4 * model.num_parameters()
    found = DryRun(activations={"decoder": whole}, gradients=whole, flop=1)
    large = memory(model, tiny_tokenizer(), found, gpus=8, backend="zero3", averaged=False)
    assert whole > 4e9 * 4 and large["DeepSpeed's bucket"] == 3 * 2e9 and large["gathered weights"] == 4e9
    assert large["decoder"] == whole


def test_the_command_says_what_to_change(command: Command, tokenizer: str, tmp_path: Path) -> None:
    config, figures = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text(yaml.safe_dump(mapping(tokenizer)))
    fits = command("plan", config, "--tflops", 100, "--memory", 1, "--json", figures)
    whole = json.loads(figures.read_text())["peak"] / GIB
    assert fits.status == 0 and "it fits" in fits.out and "given" in fits.out and "decoder" in fits.out
    tight = command("plan", config, "--tflops", 100, "--memory", 0.7 * whole, "--json", figures)
    assert "does not fit" in tight.out and "language.data.batch_frames=" in tight.out
    content = json.loads(figures.read_text())
    assert content["peak"] == sum(content["memory"].values()) == round(whole * GIB)
    assert any(entry["fits"] for entry in content["advice"]) and len(content["advice"]) >= 4
    assert all(entry["gib"] < content["peak"] / GIB for entry in content["advice"])
    shorter = next(entry for entry in content["advice"] if "accumulate=" in entry["change"])
    again = command("plan", config, *shorter["change"].split(), "--tflops", 100, "--json", figures)
    assert again.status == 0 and json.loads(figures.read_text())["peak"] / GIB == pytest.approx(shorter["gib"])


def test_the_speed_is_measured_where_none_is_given(command: Command, tokenizer: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(mapping(tokenizer)))
    assert "measured here, of a large matrix product" in command("plan", config).out


def test_what_cannot_be_planned_is_told_in_one_line(command: Command, tokenizer: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    assert_refused(command("plan", root / "configs/codec-box.yaml"), "task=tokenizer cannot be planned")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(mapping(tokenizer)))
    assert_refused(command("plan", config, "--gpus", 0), "--gpus=0 must be positive")
    assert_refused(command("plan", config, "--memory", -1), "--memory=-1.0 must be positive")
    assert_refused(command("plan", config, "language.model.num_heads=5"), "num_heads=5 must divide hidden_dim=32")
    assert_refused(command("plan", config, "language.tokenizer=nowhere"), "nowhere")
    assert_refused(command("plan", config, "--backend", "magic"), "magic")
