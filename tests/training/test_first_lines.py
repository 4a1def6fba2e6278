"""A run's first lines tell what is really on, and why something is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridlm.decoder import Attention
from tests.support.tiny_frames import tiny_config
from tests.support.toy_task import ToyTask
from training import first_lines
from training.config import RunConfig
from training.distributed import Replicas
from training.first_lines import note_on_resume, notes_on_backend
from training.journal import pooled_means
from training.loop import fit
from training.state import Found, Progress

CONFIG = RunConfig(task="language", output="runs/x", max_steps=1, accumulate=3)


def backend(device: str, dtype: torch.dtype | None, *warnings: str) -> Replicas:
    made = Replicas.__new__(Replicas)
    made.device, made.dtype, made.num_processes, made.warnings = torch.device(device), dtype, 4, list(warnings)
    return made


def test_one_process_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(
        task="tokenizer", output=str(tmp_path), max_steps=1, precision="fp32", device="cpu", tensorboard=False
    )
    fit(ToyTask(), config, {})
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.endswith(" M trained weights")
    assert second == (
        "one process: processes 1 x cpu, precision fp32, batches a step 1 (1 a process), compile off, gradient "
        f"checkpointing off, optimizer fused AdamW, data 1 thread, 4 batches ahead, output {tmp_path}"
    )


def test_what_is_on_is_found_on_the_modules_themselves() -> None:
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled[0]._compiled_call_impl = object()
    compiled[0].gradient_checkpointing = True
    slow = torch.optim.AdamW(compiled.parameters())
    (line,) = notes_on_backend(backend("cpu", None), {"model": compiled}, {"model": slow}, CONFIG)
    assert line.startswith("DDP: processes 4 x cpu, precision fp32, batches a step 12 (3 a process), compile on, ")
    assert "gradient checkpointing on" in line and "optimizer AdamW," in line


def test_the_kernel_of_attention_is_asked_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"model": nn.Sequential(Attention(tiny_config(), 0))}
    (line,) = notes_on_backend(backend("cpu", None), modules, {}, CONFIG)
    assert "attention SDPA (flash), output" in line
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (line,) = notes_on_backend(backend("cpu", None), modules, {}, CONFIG)
    assert "attention SDPA (math), output" in line
    (line,) = notes_on_backend(backend("cpu", torch.bfloat16), modules, {}, CONFIG)
    assert "attention written out" in line


def test_fallbacks_are_warnings_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_lines, "sdpa_kernels", lambda *about: "flash, efficient where a batch has padding")
    attention = Attention(tiny_config(), 0)
    modules = {"model": nn.Sequential(attention)}
    lines = notes_on_backend(backend("cuda", torch.bfloat16, "compile is off"), modules, {}, CONFIG)
    assert "attention SDPA (flash, efficient where a batch has padding), output" in lines[0]
    assert lines[1] == "warning: compile is off"
    assert lines[2].startswith("warning: attention runs on PyTorch's SDPA, since flash-attn is not installed")
    attention.backend = "flash-attn"
    lines = notes_on_backend(backend("cuda", torch.bfloat16), modules, {}, CONFIG)
    assert "attention flash-attn" in lines[0]
    lines = notes_on_backend(backend("cuda", None), modules, {}, CONFIG)
    assert "flash-attn knows no fp32" in lines[1]
    monkeypatch.setattr(first_lines, "native_bf16", lambda device: False)
    asked = replace(CONFIG, precision="bf16")
    lines = notes_on_backend(backend("cpu", torch.bfloat16), modules, {}, asked)
    assert lines[1].startswith("warning: precision=bf16, but this cpu only emulates it")


def test_figures_are_means_over_all_processes() -> None:
    totals = [{"loss": (6.0, 3)}, {"loss": (4.0, 1), "alignment": (2.0, 4)}]
    assert pooled_means(totals) == {"loss": 2.5, "alignment": 0.5}


def test_another_number_of_processes_goes_on_where_all_had_come_to() -> None:
    progress = Progress(batches=10, processes=4)
    progress.shared_by(1)
    assert (progress.batches, progress.processes) == (40, 1)
    progress.shared_by(8)
    assert progress.batches == 5
    unknown = Progress(batches=7)
    unknown.shared_by(2)
    assert (unknown.batches, unknown.processes) == (7, 2)


def test_what_is_not_as_it_was_at_the_checkpoint_is_said() -> None:
    found = Found(
        folder=Path("run/step_7"), progress=Progress(processes=2), ema_updates=0, accumulate=2, changed=["accumulate"]
    )
    line = note_on_resume(found, replace(CONFIG, accumulate=4), 1)
    assert line == "resumed from run/step_7; changed: accumulate; 1 processes, before 2"
    line = note_on_resume(found, replace(CONFIG, accumulate=2), 3)
    assert line.endswith("; 3 processes, before 2; a step takes 6 batches, before 4; set accumulate to keep them")
    assert note_on_resume(replace(found, changed=[], accumulate=None), CONFIG, 2) == "resumed from run/step_7"
