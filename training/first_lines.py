"""What a run says before its first step: what is trained, and which of the means to train faster are really on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from hybridlm.decoder import Attention
from training.background import BATCHES_AHEAD
from training.config import RunConfig
from training.distributed import Optimizers, Replicas
from training.state import Found
from training.task import Task


def notes_on_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """How many weights are trained, counted while modules are whole."""
    counts = {True: 0, False: 0}
    for module in modules.values():
        for parameter in module.parameters():
            counts[parameter.requires_grad] += parameter.numel()
    frozen = f", {counts[False] / 1e6:.2f} M frozen" if counts[False] else ""
    return [f"{counts[True] / 1e6:.2f} M trained weights{frozen}"]


def note_on_resume(found: Found, config: RunConfig, processes: int) -> str:
    """From where a run goes on, and what is not as it was there.

    Args:
        found: The checkpoint.
        config: Settings now.
        processes: How many now.
    """
    parts = [f"resumed from {found.folder}"]
    if found.changed:
        parts.append(f"changed: {', '.join(found.changed)}")
    before = found.progress.processes
    if before is not None and before != processes:
        parts.append(f"{processes} processes, before {before}")
        batches, once = config.accumulate * processes, (found.accumulate or 0) * before
        if once and batches != once:
            parts.append(f"a step takes {batches} batches, before {once}; set accumulate to keep them")
    return "; ".join(parts)


def notes_on_data(task: Task, backend: Replicas) -> list[str]:
    """What is mixed and how it is packed, where a task mixes caches or packs windows; and what a new model lacks."""
    from training.language_task import LanguageTask  # imported here: other tasks need none of it

    if not isinstance(task, LanguageTask):
        return []
    data, model = task.config.data, task.model
    lines = task.train_data.mixture(min(data.max_frames, model.config.max_frames)) if data.weights else []
    codes_dim, latent_dim = model.config.code_embedding_dim, model.config.latent_dim
    if task.untrained and model.config.uses_codes and codes_dim < latent_dim:
        lines.append(
            f"warning: code embeddings start at random, not as the codec's codebooks, which take a model some hundred "
            f"steps less: code_embedding_dim={codes_dim} is below the tokenizer's latent_dim={latent_dim}"
        )
    if data.pack_frames is not None:
        attention = model.decoder.layers[0].attention
        kernel = attention.packed_kernel(backend.device.type, backend.dtype or torch.float32)
        rows = data.batch_frames // data.pack_frames
        lines.append(f"packing: {rows} rows of {data.pack_frames} frames a batch, attention by {kernel}")
    return lines


def notes_on_backend(
    backend: Replicas, modules: Mapping[str, nn.Module], optimizers: Optimizers, config: RunConfig
) -> list[str]:
    """How it is trained, with a warning for all that was asked for or could be had, and is not on."""
    inside = [part for module in modules.values() for part in module.modules()]
    micro_batches = config.accumulate * backend.num_processes
    on = {
        "processes": f"{backend.num_processes} x {backend.device.type}",
        "precision": "fp32 weights, bf16 autocast" if backend.dtype else "fp32",
        "batches a step": f"{micro_batches} ({config.accumulate} a process)",
        "compile": "on" if any(part._compiled_call_impl is not None for part in inside) else "off",
        "gradient checkpointing": "on" if any(getattr(part, "gradient_checkpointing", 0) for part in inside) else "off",
        "optimizer": ", ".join(sorted({_optimizer(optimizer) for optimizer in optimizers.values()})),
        "data": f"1 thread, {BATCHES_AHEAD} batches ahead",
    }
    warnings = list(backend.warnings)
    attention = next((part for part in inside if isinstance(part, Attention)), None)
    if attention is not None:
        on["attention"], reason = _attention(backend, attention)
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


def sdpa_kernels(attention: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """What PyTorch's SDPA takes for such an attention in training, without padding and with it."""
    q = torch.zeros(2, attention.num_heads, 16, attention.head_dim, device=device, dtype=dtype, requires_grad=True)
    padded = torch.ones(2, 1, 16, 16, dtype=torch.bool, device=device)
    plain, masked = (
        SDPBackend(torch._fused_sdp_choice(q, q, q, attn_mask=mask, is_causal=mask is None)) for mask in (None, padded)
    )
    names = [kernel.name.removesuffix("_ATTENTION").lower() for kernel in (plain, masked)]
    return names[0] if names[0] == names[1] else f"{names[0]}, {names[1]} where a batch has padding"


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return f"{'fused ' if fused else ''}{type(optimizer).__name__}"


def _attention(backend: Replicas, attention: Attention) -> tuple[str, str | None]:
    """The kernel in force and, where it is not the fastest one, why."""
    dtype = backend.dtype or torch.float32
    if backend.device.type == "cpu" and backend.dtype is not None and attention.written_out_in_half:
        return "written out, which a CPU does faster in bf16 than SDPA", None
    sdpa = f"SDPA ({sdpa_kernels(attention, backend.device, dtype)})"
    if backend.device.type != "cuda":
        return sdpa, None
    if attention.backend != "flash-attn":
        return sdpa, "attention runs on PyTorch's SDPA, since flash-attn is not installed; install hybridlm[flash]"
    if backend.dtype is None:
        return sdpa, "attention runs on PyTorch's SDPA, since flash-attn knows no fp32; set precision=bf16"
    return f"flash-attn ({sdpa} where a batch has padding)", None
