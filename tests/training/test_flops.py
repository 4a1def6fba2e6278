"""The FLOP of a training step are those that one counts by hand, on any device and kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hybridlm.config import ModelConfig
from hybridlm.decoder import Decoder
from tests.support.toy_corpus import TINY_MODEL, write_cache
from tests.support.toy_task import ToyTask
from tokenizer.settings import from_mapping
from training.flops import step_flop
from training.language_task import LanguageTask, LanguageTaskConfig
from training.task import Batch

B, L, C, H, G, FFN, LAYERS, OUT = 3, 10, 32, 4, 2, 48, 2, 5


class DecoderTask(ToyTask):
    """A decoder of which only the loss and the module are asked for."""

    def __init__(self) -> None:
        sizes = {"hidden_dim": C, "num_heads": H, "num_kv_heads": G, "ffn_dim": FFN, "num_layers": LAYERS}
        config = ModelConfig(vocab_size=8, alignment_layer=0, **sizes)  # type: ignore[arg-type]
        self.decoder, self.output = Decoder(config), nn.Linear(C, OUT)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"model": nn.ModuleList([self.decoder, self.output])}

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        positions = torch.arange(batch["x"].shape[1]).expand(len(batch["x"]), -1)
        return self.output(self.decoder(batch["x"], positions, key_mask=batch.get("mask")).states).square().mean(), {}


def by_hand() -> int:
    """Two FLOP a multiplication; backward costs each product twice, once for either factor."""
    head = C // H
    qkv = C * (H + 2 * G) * head
    layer = qkv + C * C + 3 * C * FFN
    linear = 2 * B * L * (LAYERS * layer + C * OUT)
    attention = LAYERS * 2 * 2 * B * H * L * L * head
    return 3 * (linear + attention)


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_costs_what_its_matrices_and_its_attention_do(masked: bool) -> None:
    batch: Batch = {"x": torch.randn(B, L, C)}
    if masked:
        batch["mask"] = torch.ones(B, L, dtype=torch.bool)
    assert step_flop(DecoderTask(), batch) == by_hand()


def test_nothing_need_be_computed_to_be_counted() -> None:
    with FakeTensorMode():
        task = DecoderTask()
        assert step_flop(task, {"x": torch.randn(B, L, C)}) == by_hand()


def test_counting_leaves_a_language_task_as_it_was(tmp_path: Path) -> None:
    folders = write_cache(tmp_path)
    settings: dict[str, Any] = {
        "tokenizer": folders["tokenizer"],
        "data": {"caches": [folders["cache"]], "validation_fraction": 0.2, "batch_frames": 120},
        "text": {"vocab_size": 320},
        "model": TINY_MODEL,
    }
    task = LanguageTask(from_mapping(LanguageTaskConfig, settings), output=tmp_path)
    task.model.eval()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    batch = next(task.batches(seed=0, rank=0, world_size=1, skip=0))
    flop = step_flop(task, batch)
    assert flop == step_flop(task, batch)
    tokens = batch["prefix"].numel() + batch["latents"].shape[0] * batch["latents"].shape[1]
    decoder = sum(p.numel() for p in task.model.decoder.parameters() if p.ndim == 2)
    assert 6 * tokens * decoder < flop < 30 * tokens * decoder
    assert not task.model.training and all(p.grad is None for p in task.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
