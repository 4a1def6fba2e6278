"""What `hybridlm plan` prints: the plan, the hours at a stated speed, and what to change where it doesn't fit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.config import apply_overrides, read_yaml
from training.plan import Backend, Plan, plan

GIB = 2**30


def run(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int = 1,
    backend: Backend = "ddp",
    hours_of_audio: float | None = None,
    tflops: float | None = None,
    memory_gib: float | None = None,
    json_file: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """Plan a run and print what it would take.

    Args:
        config: The run's settings, in YAML.
        overrides: `key.sub=value`.
        gpus: How many, each with a process.
        backend: How they share the model.
        hours_of_audio: That the run is to hear, instead of its `max_steps`.
        tflops: What a GPU really does, in TFLOP a second; None: what a matrix product does on this machine.
        memory_gib: What a GPU has.
        json_file: Where the figures go.
        console: Where the table goes; standard output by default.

    Raises:
        UserError: see `training.plan.plan`; or numbers that are not positive.
    """
    given = {"--gpus": gpus, "--hours-of-audio": hours_of_audio, "--tflops": tflops, "--memory": memory_gib}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be positive")
    console = console or Console()
    mapping = apply_overrides(read_yaml(config), overrides)
    made = plan(mapping, str(config), gpus=gpus, backend=backend, hours_of_audio=hours_of_audio)
    speed = tflops if tflops is not None else measured_tflops(made.precision)
    source = "given" if tflops is not None else "measured here, of a large matrix product; a real step reaches less"
    show(made, speed, source, console)
    advice = []
    if memory_gib is not None:
        fits = made.peak <= memory_gib * GIB
        say(console, f"{made.peak / GIB:.3f} of {memory_gib:g} GiB: it {'fits' if fits else 'does not fit'}")
        if not fits:
            advice = [
                {"change": change, "gib": other.peak / GIB, "fits": other.peak <= memory_gib * GIB}
                for change, other in changes(mapping, str(config), made, memory_gib)
            ]
            for entry in advice:
                say(console, f"  {entry['change']}: {entry['gib']:.3f} GiB{', fits' if entry['fits'] else ''}")
    if json_file is not None:
        derived = {"peak": made.peak, "flop": made.flop, "tflops": speed, "hours": made.hours(speed), "advice": advice}
        content = {"config": str(config), **dataclasses.asdict(made), **derived}
        with replacing(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return made


def changes(mapping: Mapping[str, Any], where: str, made: Plan, memory_gib: float) -> Iterator[tuple[str, Plan]]:
    """Settings that need less memory, each with its own plan."""
    shape, rows, other = made.shape, made.shape.rows, made
    while rows > 1 and other.peak > memory_gib * GIB:
        rows //= 2
        accumulate = int(mapping.get("accumulate", 1)) * -(-shape.rows // rows)
        overrides = [f"language.data.batch_frames={rows * shape.frames}", f"accumulate={accumulate}"]
        other = _again(mapping, where, made, overrides)
    if other is not made:
        yield " ".join(overrides), other
    shorter = shape.frames // 2
    if shorter:
        overrides = [f"language.data.max_frames={shorter}", f"language.data.batch_frames={shorter}"]
        yield " ".join(overrides), _again(mapping, where, made, overrides)
    share = float((mapping["language"].get("losses") or {}).get("head_fraction", 1.0))
    if share > 0.25:
        yield "language.losses.head_fraction=0.25", _again(mapping, where, made, ["language.losses.head_fraction=0.25"])
    if not mapping.get("gradient_checkpointing"):
        overrides = ["gradient_checkpointing=true"]
        yield " ".join(overrides), _again(mapping, where, made, overrides)
    if "averaged weights" in made.memory:
        yield "ema_decay=0", _again(mapping, where, made, ["ema_decay=0"])
    if made.backend != "fsdp2":
        gpus = max(made.gpus, 8)
        yield f"--backend fsdp2 --gpus {gpus}", plan(mapping, where, gpus=gpus, backend="fsdp2")


def _again(mapping: Mapping[str, Any], where: str, made: Plan, overrides: Sequence[str]) -> Plan:
    return plan(apply_overrides(mapping, overrides), where, gpus=made.gpus, backend=made.backend)


def measured_tflops(precision: str, seconds: float = 0.3) -> float:
    """What products of large square matrices do on this machine's accelerator, or else its CPU, in TFLOP a second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    count, started = -1, 0.0  # the first is a warm-up
    while count < 1 or time.perf_counter() - started < seconds:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
        started = time.perf_counter() if count == 0 else started
    return 2 * size**3 * count / (time.perf_counter() - started) / 1e12


def show(made: Plan, tflops: float, source: str, console: Console) -> None:
    """Print a plan."""
    table = Table(box=None)
    for name in ("part", "M weights", "GiB a GPU"):
        table.add_column(name, justify="left" if name == "part" else "right")
    states = [name for name in made.memory if name not in made.parameters]
    for name in (*made.parameters, *states):
        count, size = made.parameters.get(name), made.memory.get(name)
        cells = ("" if count is None else f"{count / 1e6:.3f}", "" if size is None else f"{size / GIB:.3f}")
        table.add_row(name, *cells)
    table.add_row("all", f"{sum(made.parameters.values()) / 1e6:.3f}", f"{made.peak / GIB:.3f}", style="bold")
    console.print(table)
    shape = made.shape
    say(console, "memory of a model's part is its activations when most is held; 'weights' are those of all parts")
    say(
        console,
        f"{made.gpus} x {made.backend}, {made.precision}; a micro-batch has {shape.rows} rows of {shape.frames} frames "
        f"after {shape.columns} tags and pieces of text; leave some 10 % of memory to the framework",
    )
    say(
        console,
        f"{made.steps:,} steps of {made.frames_per_step:,} frames ({made.codes_per_step:,} codes): "
        f"{made.steps * made.frames_per_step:,} frames, {made.hours_of_audio:,.1f} hours of audio",
    )
    say(console, f"{made.flop_per_step:.3g} FLOP a step, {made.flop:.3g} in all")
    say(console, f"{made.hours(tflops):,.1f} hours at {tflops:.3g} TFLOP/s a GPU ({source})")


def say(console: Console, text: str) -> None:
    """A line without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
