"""What a dry run says of a step's memory is what a real step takes, as the allocator counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig
from training.dry_run import BACKWARD, COPIES, Answers, DryRun, dry_run
from training.language_task import LanguageTaskConfig
from training.optimizer import AveragedWeights, gradient_norm, make_optimizer
from training.plan import PlannedTask, Shape, made_up_batch, memory

SHAPE = Shape(rows=4, frames=60, columns=24)
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "continuous": {"representation": "continuous"},
    "reader": {"alignment_heads": 0, "reader_layer": 0, "text_in_prefix": False},
    "as Qwen3": {"qk_norm": True, "attention_head_dim": 24, "num_layers": 3},
}


def config(**changes: Any) -> ModelConfig:
    sizes = {
        **{"vocab_size": 64, "first_text_id": 5, "num_codebooks": 3, "codebook_size": 128, "latent_dim": 8},
        **{"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128},
        **{"code_embedding_dim": 32, "depth_dim": 48, "depth_ffn_dim": 64, "latent_head_dim": 32},
        **{"latent_head_ffn_dim": 64, "alignment_layer": 1, "short_context_dim": 32, "condition_dropout": 0.5},
    }
    return ModelConfig(**{**sizes, **changes})


def settings(head_fraction: float = 1.0) -> LanguageTaskConfig:
    given = {"tokenizer": "x", "data": {"caches": ["x"]}, "losses": {"head_fraction": head_fraction}}
    return from_mapping(LanguageTaskConfig, given)


def measured_step(task: PlannedTask, dtype: torch.dtype | None, tries: int = 2) -> tuple[int, int]:
    """Bytes that lie there before a step that has its optimizer's state, and the most that the step adds."""
    optimizer = make_optimizer(task.model, OptimizerConfig())
    averages = AveragedWeights(task.model, 0.9)
    task.model.train()
    for _ in range(tries):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            batch = made_up_batch(task.model.config, SHAPE)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss, _ = task.loss("model", batch, step=0, generator=torch.Generator().manual_seed(0))
            loss.backward()
            gradient_norm(list(task.model.parameters()), 1.0)
            optimizer.step()
            averages.update()
            optimizer.zero_grad()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    there = (*task.model.parameters(), *states, *averages.state().values())
    return sum(tensor.numel() * tensor.element_size() for tensor in there), most


def found_for(
    sizes: ModelConfig, head_fraction: float = 1.0, *, gradient_checkpointing: bool = False, **values: Any
) -> DryRun:
    def make() -> tuple[PlannedTask, dict[str, Any]]:
        model = HybridLM(sizes)
        model.decoder.gradient_checkpointing = gradient_checkpointing
        return PlannedTask(settings(head_fraction), model), made_up_batch(sizes, SHAPE)

    given: dict[str, Any] = {"autocast": None, "fused": False, **values}
    return dry_run(make, Answers(scored=head_fraction, columns=3), **given)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("hybrid", None),
        ("hybrid", torch.bfloat16),
        ("continuous", None),
        ("reader", torch.bfloat16),
        ("as Qwen3", None),
    ],
)
def test_memory_is_what_a_real_step_takes(name: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    sizes = config(**MODELS[name])
    found = found_for(sizes, autocast=dtype)
    model = HybridLM(sizes)
    before, added = measured_step(PlannedTask(settings(), model), dtype)
    assert found.peak == pytest.approx(added, rel=0.02)
    planned = memory(model, tiny_tokenizer(), found, gpus=1, backend="ddp", averaged=True)
    assert sum(planned.values()) - planned["tokenizer"] == pytest.approx(before + added, rel=0.05)


def test_heads_hold_what_they_score() -> None:
    whole, half = found_for(config()), found_for(config(), head_fraction=0.5)
    for head in ("code_head", "latent_head"):
        assert half.activations.get(head, 0) < 0.7 * whole.activations[head]
    assert half.activations["decoder"] == whole.activations["decoder"]
    assert half.flop < whole.flop


def test_attention_keeps_its_probabilities_only_where_it_is_written_out() -> None:
    sizes = config()
    plain, fused = (found_for(sizes, autocast=torch.bfloat16, fused=fused) for fused in (False, True))
    length = SHAPE.columns + SHAPE.frames
    probabilities = 2 * sizes.num_layers * SHAPE.rows * sizes.num_heads * length * length
    saved = plain.activations["decoder"] - fused.activations["decoder"]
    assert 0.4 * probabilities < saved < 2 * probabilities  # fused kernels keep repeated keys and a mask instead
    assert COPIES in plain.activations and COPIES not in found_for(sizes).activations


def test_gradients_of_earlier_micro_batches_stay() -> None:
    sizes = config()
    whole = 4 * HybridLM(sizes).num_parameters()
    first, later = found_for(sizes), found_for(sizes, keep_gradients=True)
    assert later.gradients == whole
    assert later.peak - later.gradients == pytest.approx(first.peak - first.gradients, rel=0.05)
    assert BACKWARD in later.activations
