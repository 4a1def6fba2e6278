"""What a launcher asks for is done, or refused or warned of in one clear line."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from tokenizer.errors import UserError
from training.distributed import Replicas, on_any_process, open_backend
from training.zero import usable_stage


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def opened() -> Replicas:
    return open_backend("cpu", lambda device: None)


def test_settings_of_accelerate_that_are_not_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened().warnings == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    backend = opened()
    assert backend.accelerator.scaler is None
    assert backend.warnings == [
        "accelerate's mixed_precision=fp16 is not used; the run's own settings decide",
        "accelerate's dynamo_backend=inductor is not used; the run's own settings decide",
    ]


def test_fsdp_of_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version=1 is not supported; set it to 2"):
        opened()


def test_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match="Megatron-LM is not supported; launch with one of configs/accelerate/"):
        opened()


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'hybridlm\[deepspeed\]'"):
        opened()


def test_deepspeed_s_settings_are_taken_or_refused() -> None:
    assert usable_stage({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}) == 3
    for settings, words in (
        ({}, "zero_stage=0 shares nothing out; set 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme is not supported"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "fp16 would change the weights themselves"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, "section 'optimizer' is not supported; leave it out"),
    ):
        with pytest.raises(UserError, match=words):
            usable_stage(settings)


def test_alone_nobody_else_is_asked() -> None:
    assert on_any_process(True, torch.device("cpu"))
    assert not on_any_process(False, torch.device("cpu"))
