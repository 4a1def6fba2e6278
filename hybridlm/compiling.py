"""The step of one frame, compiled: each layer before and after its attention, and the depth decoder's network.

On CUDA these become graphs, so that a layer is a few launches instead of some thirty. Attention itself stays as it is:
it is one kernel, and its cache grows. Shapes are fixed: a step of other rows than it was compiled for runs uncompiled.
What can't be compiled, computes something else or is not faster is dropped, and said.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hybridlm.decoder import DecoderLayer
from hybridlm.model import HybridLM

TOLERANCE = 1e-2
"""Relative to the largest state: rounded weights bear less than exact ones."""
TIMED_STEPS = 20


@torch.no_grad()
def compile_step(model: HybridLM, rows: int, *, backend: str = "inductor") -> str:
    """Compile the model's step, in place.

    Args:
        model: In evaluation mode, packed or not, where it is to stay; without oneDNN's blocks (`precision.pack`).
        rows: Of the step, those without a condition included.
        backend: Of `torch.compile`.

    Returns:
        One line that says what is on, how long the warm-up took, and what fell back, with the reason.
    """
    plain, plain_s = _trial(model, rows)
    began = time.perf_counter()
    try:
        _set(model, rows, backend)
        found, _ = _trial(model, rows)
        warm_up_s = time.perf_counter() - began
        found, compiled_s = _trial(model, rows)
    except Exception as error:  # whatever compilers raise, the remedy is the same
        drop(model)
        told = (str(error).strip().splitlines() or [""])[0]
        return f"compile: off, for this machine can't: {type(error).__name__}: {told[:200]}"
    told = f"a step takes {compiled_s * 1000:.2f} ms, uncompiled {plain_s * 1000:.2f} ms; warm-up {warm_up_s:.1f} s"
    error_share = float((found - plain).abs().max() / plain.abs().max())
    if not error_share < TOLERANCE:
        drop(model)
        return f"compile: off, for states differ by {error_share:.1%} from uncompiled ones"
    if compiled_s >= plain_s:
        drop(model)
        return f"compile: off, for it is not faster here: {told}"
    return f"compile: on for {rows} rows: {told}"


def drop(model: HybridLM) -> None:
    """Go back to the uncompiled step."""
    for layer in _layers(model):
        layer.compiled = None
    if model.code_head is not None:
        model.code_head.compiled = None


def _layers(model: HybridLM) -> list[DecoderLayer]:
    return [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)]


def _set(model: HybridLM, rows: int, backend: str) -> None:
    settings: dict[str, Any] = {"backend": backend, "dynamic": False}
    if backend == "inductor" and next(model.parameters()).is_cuda:
        settings["mode"] = "reduce-overhead"  # CUDA graphs
    for layer in _layers(model):
        layer.compiled = (rows, torch.compile(layer.before, **settings), torch.compile(layer.after, **settings))
    if model.code_head is not None:
        model.code_head.compiled = (rows, torch.compile(model.code_head.network, **settings))


@torch.inference_mode()
def _trial(model: HybridLM, rows: int) -> tuple[Tensor, float]:
    """The states and codes' network after some steps of made-up frames, and the seconds of the quickest step."""
    config, device = model.config, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prefix = torch.zeros(rows, 2, dtype=torch.int64, device=device)
    h, cache = model.start(prefix, torch.ones_like(prefix, dtype=torch.bool))
    codes = torch.zeros(rows, config.num_codebooks, 1, dtype=torch.int64, device=device)
    results, seconds = [], []
    for _ in range(TIMED_STEPS):
        latents = torch.randn(rows, 1, config.latent_dim, generator=generator).to(device)
        features = torch.randn(rows, 1, config.feature_dim, generator=generator).to(device)
        began = time.perf_counter()
        h, cache = model.step(codes, latents, features, cache)
        results.append(h)
        if model.code_head is not None:
            network = model.code_head.step_network(rows)
            for _ in range(config.output_codebooks):
                results.append(network(model.code_head.state(h)).clone())  # the next call may write over it
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return torch.cat([one.flatten().float() for one in results]), min(seconds)
