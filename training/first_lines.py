"""What a run says before its first step: what is trained, and which of the means to train faster are really on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hybridlm.decoder import Attention, AttentionBackend
from training.config import RunConfig
from training.distributed import Replicas
from training.task import Task


def notes_on_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """How many weights are trained, counted while modules are whole."""
    counts = {True: 0, False: 0}
    for module in modules.values():
        for parameter in module.parameters():
            counts[parameter.requires_grad] += parameter.numel()
    frozen = f", {counts[False] / 1e6:.2f} M frozen" if counts[False] else ""
    return [f"{counts[True] / 1e6:.2f} M trained weights{frozen}"]


def notes_on_data(task: Task, backend: Replicas) -> list[str]:
    """What is mixed and how it is packed, where a task mixes caches or packs windows."""
    from training.language_task import LanguageTask  # imported here: other tasks need none of it

    if not isinstance(task, LanguageTask):
        return []
    data, model = task.config.data, task.model
    lines = task.train_data.mixture(min(data.max_frames, model.config.max_frames)) if data.weights else []
    if data.pack_frames is not None:
        attention = model.decoder.layers[0].attention
        kernel = attention.packed_kernel(backend.device.type, backend.dtype or torch.float32)
        rows = data.batch_frames // data.pack_frames
        lines.append(f"packing: {rows} rows of {data.pack_frames} frames a batch, attention by {kernel}")
    return lines


def notes_on_backend(backend: Replicas, modules: Mapping[str, nn.Module], config: RunConfig) -> list[str]:
    """How it is trained, with a warning for all that was asked for or could be had, and is not on."""
    inside = [part for module in modules.values() for part in module.modules()]
    micro_batches = config.accumulate * backend.num_processes
    on = {
        "processes": f"{backend.num_processes} x {backend.device.type}",
        "precision": "fp32 weights, bf16 autocast" if backend.dtype else "fp32",
        "batches a step": f"{micro_batches} ({config.accumulate} a process)",
        "compile": "on" if any(part._compiled_call_impl is not None for part in inside) else "off",
        "activation checkpointing": "on"
        if any(getattr(part, "gradient_checkpointing", 0) for part in inside)
        else "off",
    }
    warnings = list(backend.warnings)
    kernels = {part.backend for part in inside if isinstance(part, Attention)}
    if kernels:
        on["attention"], reason = _attention(backend, kernels)
        warnings += [reason] if reason else []
    if backend.dtype and config.precision == "bf16" and not native_bf16(backend.device):
        warnings.append(f"precision=bf16, but this {backend.device.type} only emulates it; precision=auto takes fp32")
    lines = [f"{backend.name}: {', '.join(f'{name} {value}' for name, value in on.items())}, output {config.output}"]
    return lines + [f"warning: {text}" for text in warnings]


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _attention(backend: Replicas, kernels: set[AttentionBackend]) -> tuple[str, str | None]:
    """The kernel in force and, where it is not the fastest one, why."""
    if backend.device.type != "cuda":
        return "SDPA", None
    if "flash-attn" not in kernels:
        return "SDPA", "attention runs on PyTorch's SDPA, since flash-attn is not installed; install hybridlm[flash]"
    if backend.dtype is None:
        return "SDPA", "attention runs on PyTorch's SDPA, since flash-attn knows no fp32; set precision=bf16"
    return "flash-attn (SDPA where a batch has padding)", None
