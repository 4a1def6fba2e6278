"""The benchmark of generation runs, its peer has the same weights, and what is worse is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sampling.bench
from benchmarks import generation
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_model


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.bench, "READ_BYTES", 2**20)
    monkeypatch.setattr("hybridlm.precision._has_bf16", lambda device: False)
    monkeypatch.setattr(generation, "BATCH", 2)
    monkeypatch.setattr(generation, "cold_rows", lambda model, repeats: [])  # processes take seconds
    model = save_tiny_model(tmp_path / "model")
    options = ["--model", str(model), "--sizes", "tiny", "--repeats", "1", "--duration", "0.1", "--lengths", "0.2", "2"]
    options += ["--window", "0.8"]
    assert generation.main([*options, "--json", str(tmp_path / "bench.json")]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    peer = next(name for name in rows if "transformers, " in name)
    assert peer.startswith("tiny, 8 steps: ") and rows["tiny, 8 steps: int8"]["value"] > 0
    assert "x transformers; " in rows["tiny, 8 steps: fp32"]["beside"]
    assert "x 2 alone" in rows["2 at once"]["beside"]
    short, long = rows["a frame after 0.2 s"], rows["a frame after 2 s"]
    assert short["beside"].startswith("1.00x that after 0.2 s; window 0.8 s, cache ") and "cache " in long["beside"]
    assert long["beside"].startswith(f"{long['value'] / short['value']:.2f}x that after 0.2 s; ")


def test_a_long_recording_is_measured_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length takes its turns from its own place, with the window full but for the shortest."""
    seen: list[tuple[int, int | None]] = []
    go_on = generation._go_on

    def spy(loop: Any, frames: int, *, copied: bool = False) -> None:
        if copied:
            seen.append((loop.held, loop.window))
        go_on(loop, frames, copied=copied)

    monkeypatch.setattr(generation, "_go_on", spy)
    rows = generation.length_rows(tiny_model(stop_bias=-30.0), [0.4, 4.0], 0.8, 2)
    assert [row.name for row in rows] == ["a frame after 0.4 s", "a frame after 4 s"]
    assert seen[::2] == [(10, 20)] * 3 and seen[1::2] == [seen[1]] * 3 and 18 <= seen[1][0] <= 20


def test_steps_that_differ_from_their_peer_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = generation.our_step
    monkeypatch.setattr(generation, "our_step", lambda *given: lambda: step(*given)() * 1.01)
    monkeypatch.setattr(sampling.bench, "READ_BYTES", 2**20)
    assert generation.main(["--sizes", "tiny", "--repeats", "1"]) == 2
    assert "error: tiny: states of fp32 differ by " in capsys.readouterr().err


def test_a_flow_head_is_measured() -> None:
    slow, fast = generation.flow_rows(tiny_model(flow_layers=1, flow_dim=16), 1)
    assert "16 steps" in slow.name and "x 16 steps" in fast.beside
    assert generation.flow_rows(tiny_model(), 1) == []


@torch.inference_mode()
def test_steps_go_on_where_they_were() -> None:
    """Ours and theirs agree in every call, not in the first alone."""
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaModel(LlamaConfig(**shape, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=8)).eval()
    config = generation.ModelConfig(
        vocab_size=8, hidden_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, alignment_heads=0
    )
    model = generation.HybridLM(config).eval()
    model.decoder.load_llama(llama.state_dict())
    inputs, prefix = torch.randn(1, generation.STEPS, 64), torch.randn(1, generation.PREFIX, 64)
    ours = generation.our_step(model.decoder, inputs, prefix)
    theirs = generation.their_step(llama, inputs, prefix, DynamicCache())
    first = theirs()
    torch.testing.assert_close(ours(), first, atol=1e-4, rtol=1e-4)
    second = theirs()
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(ours(), second, atol=1e-4, rtol=1e-4)
