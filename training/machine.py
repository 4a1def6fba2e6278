"""What a figure was measured on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from training.loop import autocast_dtype


def machine(precision: str, threads: int = 1, device: str = "cpu") -> str:
    """Processor, threads, precision and PyTorch.

    Args:
        precision: As a run's settings have it.
        threads: Of a run.
        device: As a run's settings have it.
    """
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    used = "bf16 autocast" if autocast_dtype(precision, where) else "fp32"
    if where.type == "cuda":
        return f"{torch.cuda.get_device_name(where)}, {used}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    processor = model or platform.processor() or platform.machine()
    number = "one thread" if threads == 1 else f"{threads} threads"
    return f"{processor}, {number} a run, {used}, torch {torch.__version__}"
