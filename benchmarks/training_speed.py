"""Speed of the training step beside a Hugging Face Llama, of the loader, and of two processes beside one.

    python -m benchmarks.training_speed [--parts step loader ranks] [--device cpu|cuda] [--size 30M|300M] [--rows 8]
        [--frames 250] [--precision auto|bf16|fp32] [--compile] [--checkpointing] [--rounds 7] [--steps 3]
        [--peak-tflops T] [--config CONFIG.yaml key=value ...] [--backends ddp zero1 zero2 zero3] [--threads N]
        [--json FILE]

step: one update (forward, backward, clipping, fused AdamW) of a discrete `HybridLM` with one codebook, by the trainer's
own parts, and one of `transformers`' LlamaForCausalLM with the same layers, vocabulary, rows and positions, both with
SDPA and both compiled or neither. They take turns in one process; a ratio above 1 says that ours is faster. MFU counts
the operations of either step, attention whole, without those that checkpointing repeats.

loader (needs --config, a language task's settings whose caches are there): seconds a batch from disk to a batch in main
memory, and their share of a step on the same batches, were they not made in a thread beside it.

ranks: one process against two on this machine's CPUs, the same global batch, under each of configs/accelerate's
backends: frames a second, the peak memory of a process above what it had imported, and the tensors that it holds
before a step: weights, their optimizer's state, and whatever a backend keeps besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_ranks
from benchmarks.tokenizer_speed import measure, spread
from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.settings import from_mapping
from training.config import OptimizerConfig, apply_overrides, read_yaml, resolve
from training.distributed import Replicas, open_backend
from training.language_task import LanguageTask, LanguageTaskConfig
from training.layers import compile_layers, keep_inputs_alone
from training.loop import autocast_dtype
from training.optimizer import gradient_norm, make_optimizer
from training.plan import PlannedTask, Shape, made_up_batch

SIZES = {
    "tiny": {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 64},
    "30M": {"hidden_dim": 512, "num_layers": 9, "num_heads": 8, "num_kv_heads": 8, "ffn_dim": 1408},
    "300M": {"hidden_dim": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 16, "ffn_dim": 2816},
}
VOCABULARY = 1024
COLUMNS = 4
"""Of the prefix: two tags, a piece of text, `<audio>`."""
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bf16, from the makers' data sheets, by what a GPU's name contains."""


def model_config(size: str, frames: int) -> ModelConfig:
    """A discrete model of one codebook, whose heads are as small as they can be: a Llama over codes."""
    return ModelConfig(
        **SIZES[size],
        representation="discrete",
        vocab_size=8,
        first_text_id=5,
        num_codebooks=1,
        codebook_size=VOCABULARY,
        code_embedding_dim=SIZES[size]["hidden_dim"],
        depth_dim=SIZES[size]["hidden_dim"],
        depth_layers=0,
        latent_dim=1,
        alignment_heads=0,
        max_frames=frames,
    )


def our_step(options: argparse.Namespace, backend: Replicas) -> tuple[nn.Module, Callable[[], Tensor], list[str]]:
    """The model, the loss of a made-up batch, and what was asked for and is not on."""
    config = model_config(options.size, options.frames)
    about = {"tokenizer": "none", "data": {"caches": ["none"]}, "losses": {"alignment_weight": 0.0}}
    model = HybridLM(config).to(backend.device)
    task = PlannedTask(from_mapping(LanguageTaskConfig, about), model)
    shape = Shape(rows=options.rows, frames=options.frames, columns=COLUMNS)
    batch = {name: value.to(backend.device) for name, value in made_up_batch(config, shape).items()}
    generator = torch.Generator(backend.device).manual_seed(0)
    warnings = keep_inputs_alone({"model": model}) if options.checkpointing else []
    warnings += compile_layers({"model": model}, backend) if options.compile else []
    model.train()
    return model, lambda: task.loss("model", batch, step=0, generator=generator)[0], warnings


def llama_step(options: argparse.Namespace, backend: Replicas) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same of `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES[options.size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden_dim"],
        intermediate_size=sizes["ffn_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=COLUMNS + options.frames,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(backend.device)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        model.compile()
    model.train()
    ids = torch.randint(VOCABULARY, (options.rows, COLUMNS + options.frames), device=backend.device)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def update(model: nn.Module, loss_of: Callable[[], Tensor], backend: Replicas, steps: int) -> Callable[[], float]:
    """So many updates, in the same way for both."""
    optimizer = make_optimizer(model, OptimizerConfig())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> float:
        for _ in range(steps):
            with torch.autocast(backend.device.type, backend.dtype, enabled=backend.dtype is not None):
                loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            gradient_norm([p for p in parameters if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    return run


def flop_of(loss_of: Callable[[], Tensor]) -> int:
    """Of one forward and backward pass, of a model that is neither compiled nor checkpointed."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss_of().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Both models' steps, in turns."""
    backend = open_backend(options.device, lambda device: autocast_dtype(options.precision, device))
    plain = argparse.Namespace(**{**vars(options), "compile": False, "checkpointing": False})
    torch.manual_seed(0)
    flop = {
        "hybridlm": flop_of(our_step(plain, backend)[1]),
        "transformers": flop_of(llama_step(plain, backend)[1]),
    }
    ours, our_loss, warnings = our_step(options, backend)
    theirs, their_loss = llama_step(options, backend)
    found = measure(
        {
            "hybridlm": update(ours, our_loss, backend, options.steps),
            "transformers": update(theirs, their_loss, backend, options.steps),
        },
        options.rounds,
    )
    peak = peak_tflops(options.peak_tflops, backend.device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if backend.device.type == "cuda" else platform.processor() or "cpu",
        "precision": "bf16" if backend.dtype else "fp32",
        "warnings": warnings,
        "ratio": spread([b / a for a, b in zip(found["hybridlm"], found["transformers"], strict=True)]),
    }
    for name, model in (("hybridlm", ours), ("transformers", theirs)):
        seconds = [value / options.steps for value in found[name]]
        tflops = flop[name] / statistics.median(seconds) / 1e12
        report[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flop": flop[name],
            "seconds": spread(seconds),
            "positions_per_s": options.rows * (COLUMNS + options.frames) / statistics.median(seconds),
            "tflops": tflops,
            "mfu": None if peak is None else tflops / peak,
        }
    return report


def peak_tflops(given: float | None, device: torch.device) -> float | None:
    """Of the device in bf16, if it is known."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def measure_loader(options: argparse.Namespace) -> dict[str, Any]:
    """Batches from disk, and a step on the same batches.

    Raises:
        UserError: settings of another task, or caches that are not there.
    """
    mapping = apply_overrides(read_yaml(options.config), options.overrides)
    if mapping.get("task") != "language":
        raise UserError(
            f"{options.config}: task={mapping.get('task')}, but the loader's settings are a language task's"
        )
    run, task_config, _ = resolve(mapping, LanguageTaskConfig, where=str(options.config))
    backend = open_backend(options.device, lambda device: autocast_dtype(options.precision, device))
    with tempfile.TemporaryDirectory() as folder:
        task = LanguageTask(task_config, output=Path(folder))
    task.model.to(backend.device).train()
    stream = task.batches(seed=run.seed, rank=0, world_size=1, skip=0)
    loading, batches = [], []
    for _ in range(options.rounds * options.steps):
        begin = time.perf_counter()
        batches.append(next(stream))
        loading.append(time.perf_counter() - begin)
    optimizer, generator = make_optimizer(task.model, run.optimizer), torch.Generator(backend.device).manual_seed(0)
    stepping = []
    for batch in itertools.chain(batches[:1], batches):  # the first one warms up
        begin = time.perf_counter()
        moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(backend.device.type, backend.dtype, enabled=backend.dtype is not None):
            loss, _ = task.loss("model", moved, step=0, generator=generator)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_norm([p for p in task.model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        stepping.append(time.perf_counter() - begin)
    frames = statistics.mean(task.size(batch) for batch in batches)
    return {
        "batches": len(batches),
        "frames_per_batch": frames,
        "codes_per_frame": task.model.config.output_codebooks,
        "seconds_per_batch": spread(loading),
        "seconds_per_step": spread(stepping[1:]),
        "frames_per_s": frames / statistics.median(loading),
        "share_of_step": statistics.median(loading) / statistics.median(stepping[1:]),
    }


def markdown(report: dict[str, Any]) -> str:
    """Tables of what was measured."""
    lines = []
    if (step := report.get("step")) is not None:
        lines += [
            f"Step: {step['device']}, {step['precision']}, {report['rows']} rows of {COLUMNS + report['frames']} "
            f"positions, compile {'on' if report['compile'] else 'off'}",
            "",
            "| | M weights | ms a step (quartiles) | positions/s | TFLOP/s | MFU |",
            "|---|---|---|---|---|---|",
        ]
        for name in ("hybridlm", "transformers"):
            row, t = step[name], step[name]["seconds"]
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            lines.append(
                f"| {name} | {row['parameters'] / 1e6:.1f} | {1e3 * t['median']:.1f} ({1e3 * t['lower_quartile']:.1f}-"
                f"{1e3 * t['upper_quartile']:.1f}) | {row['positions_per_s']:,.0f} | {row['tflops']:.2f} | {mfu} |"
            )
        r = step["ratio"]
        lines += ["", f"hybridlm is {r['median']:.2f}x as fast (rounds: {r['min']:.2f} to {r['max']:.2f})"]
        lines += [f"warning: {text}" for text in step["warnings"]]
    if (loader := report.get("loader")) is not None:
        codes = loader["frames_per_s"] * loader["codes_per_frame"]
        lines += [
            "",
            "| loader: frames a batch | frames/s | codes/s | ms a batch | ms a step | share of the step |",
            "|---|---|---|---|---|---|",
            f"| {loader['frames_per_batch']:.0f} | {loader['frames_per_s']:,.0f} | {codes:,.0f} | "
            f"{1e3 * loader['seconds_per_batch']['median']:.1f} | {1e3 * loader['seconds_per_step']['median']:.1f} | "
            f"{loader['share_of_step']:.1%} |",
        ]
    if (ranks := report.get("ranks")) is not None:
        lines += ["", training_ranks.markdown(ranks)]
    return "\n".join(lines).strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("step", "loader", "ranks"), default=["step"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size", choices=tuple(SIZES), help="30M on a CPU, 300M on a GPU if not given")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--frames", type=int, default=250)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--compile", action="store_true", help="both models; else neither")
    parser.add_argument("--checkpointing", action="store_true", help="both models; else neither")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each; medians count")
    parser.add_argument("--steps", type=int, default=3, help="updates a turn")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bf16, for MFU")
    parser.add_argument("--config", type=Path, help="a language task's settings, for the loader")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over --config")
    parser.add_argument("--backends", nargs="+", choices=training_ranks.BACKENDS, default=list(training_ranks.BACKENDS))
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_intermixed_args(arguments)
    if min(options.rounds, options.steps, options.rows, options.frames) < 1 or options.rounds < 2:
        parser.error("--rounds must be at least 2, --steps, --rows and --frames at least 1")
    if "loader" in options.parts and options.config is None:
        parser.error("the part loader needs --config")
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    options.size = options.size or ("300M" if cuda else "30M")
    if options.threads:
        torch.set_num_threads(options.threads)
    kept = ("size", "rows", "frames", "compile", "checkpointing", "rounds", "steps", "threads")
    report: dict[str, Any] = {name: getattr(options, name) for name in kept}
    try:
        if "step" in options.parts:
            report["step"] = measure_step(options)
        if "loader" in options.parts:
            report["loader"] = measure_loader(options)
        if "ranks" in options.parts:
            config = model_config(options.size, options.frames)
            report["ranks"] = training_ranks.measure_ranks(
                config, rows=options.rows, frames=options.frames, backends=options.backends, steps=options.steps
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(report))
    if options.json:
        with replacing(options.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
