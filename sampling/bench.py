"""`hybridlm bench`: how fast a model generates on this machine, what is on, and what fell back.

What is compared takes turns, so that a machine that is slow for a while is slow for all; figures are medians with the
quartiles beside them. `benchmarks/generation.py` measures with the same parts against a peer.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from hybridlm.decoder import attention_backend
from hybridlm.model import HybridLM
from hybridlm.precision import AUTO, Precision, check
from sampling.pipeline import AudioModel, load
from tokenizer.errors import UserError
from tokenizer.files import replacing

READ_BYTES = 2**28
"""The bandwidth of memory is measured on so much, which no cache holds."""
BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of several runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one; of fewer than four runs, the smallest and the largest."""
        if len(self.seconds) < 4:
            return min(self.seconds), max(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the report."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    beside: str = ""
    """What it is compared with, in words."""

    def __str__(self) -> str:
        spread = f"{self.low:.3g} - {self.high:.3g}"
        return f"| {self.name} | {self.value:.3g} {self.unit} | {spread} | {self.beside} |"


HEADING = "| what | median | quartiles | beside |\n|---|---|---|---|"


def in_turns(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each case so many times, all of them one after the other in every round; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(seconds=tuple(runs)) for name, runs in seconds.items()}


def speed_row(name: str, timing: Timing, work: float, unit: str, beside: str = "") -> Row:
    """Work a second."""
    low, high = timing.quartiles
    return Row(name=name, value=work / timing.median, low=work / high, high=work / low, unit=unit, beside=beside)


def time_row(name: str, timing: Timing, beside: str = "") -> Row:
    """In milliseconds."""
    low, high = timing.quartiles
    return Row(name=name, value=timing.median * 1e3, low=low * 1e3, high=high * 1e3, unit="ms", beside=beside)


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes a second that a sum over a large tensor reads: the most that a step can read its weights by."""
    numbers = torch.ones(READ_BYTES // 4, device=device)

    def read() -> float:
        return float(numbers.sum())

    return READ_BYTES / min(in_turns({"read": read}, 5)["read"].seconds)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights that a step reads, packed or not, without tables of embeddings."""
    total = 0
    for one in module.modules():
        if isinstance(one, nn.Embedding):
            continue
        own = [*one.parameters(recurse=False), *(getattr(one, name, None) for name in ("packed", "scales"))]
        total += sum(x.numel() * x.element_size() for x in own if isinstance(x, torch.Tensor))
    return total


def frame_bytes(model: HybridLM) -> int:
    """Bytes of the weights that a frame of one recording reads at least."""
    parts = (model.decoder, model.reader, model.code_head, model.latent_head, model.short_context, model.fusion)
    return sum(weight_bytes(part) for part in parts if part is not None)


def possible(device: torch.device) -> list[Precision]:
    """The precisions that the device can do."""
    found: list[Precision] = []
    for precision in get_args(Precision):
        try:
            check(precision, device)
        except UserError:
            continue
        found.append(precision)
    return found


def first_sound(model: AudioModel, settings: Mapping[str, Any]) -> None:
    """Wait for the first piece of a stream."""
    next(model.stream(**settings))


def generation_rows(models: Mapping[str, AudioModel], duration: float, repeats: int) -> list[Row]:
    """Real-time factors with decoding, and times to the first sound, of models that take turns."""
    bandwidth = read_bandwidth(next(next(iter(models.values())).model.parameters()).device)
    cases: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        asked: dict[str, Any] = {"tags": ("music",) if "music" in model.tags else (), "duration": duration, "seed": 1}

        def make(model: AudioModel = model, asked: dict[str, Any] = asked, **more: Any) -> Callable[[], object]:
            return lambda: model.generate(**asked, **more)

        cases[f"{name}: one recording"] = make()
        cases[f"{name}: one, guided (cfg 2)"] = make(cfg=2.0)
        cases[f"{name}: {BATCH} at once"] = make(num_samples=BATCH)
        cases[f"{name}: first sound"] = lambda model=model, asked=asked: first_sound(model, asked)  # type: ignore[misc]
    timings = in_turns(cases, repeats)
    rows = []
    plain = next(iter(models))
    for case, timing in timings.items():
        name, _, what = case.partition(": ")
        ratio = timings[f"{plain}: {what}"].median / timing.median
        beside = "" if name == plain else f"{ratio:.2f}x {plain}"
        if what == "first sound":
            rows.append(time_row(case, timing, beside))
            continue
        if what == "one recording":
            rate = models[name].tokenizer.frame_rate_hz
            least = frame_bytes(models[name].model) / bandwidth * duration * rate
            share = f"{least / timing.median:.0%} of its time would read the weights once a frame"
            beside = f"{beside}; {share}" if beside else share
        rows.append(speed_row(case, timing, duration * (BATCH if "at once" in what else 1), "x real time", beside))
    return rows


def write_rows(path: Path, settings: Mapping[str, object], rows: Sequence[Row]) -> None:
    """The settings and the rows, as JSON."""
    with replacing(path) as temporary:
        figures = {**settings, "rows": [asdict(row) for row in rows]}
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def run(
    *,
    model: str | Path = "box",
    device: str = "cpu",
    precision: str | None = None,
    duration: float = 4.0,
    repeats: int = 3,
    compile: bool = False,
    json_file: Path | None = None,
) -> list[Row]:
    """`hybridlm bench`: print what is on and a row a figure.

    Args:
        model: "box", a model's folder or a hub id.
        device: "cpu", "cuda", ...
        precision: Only this one, or "auto"; None: all that the device can do.
        duration: Seconds of audio a run.
        repeats: Runs of each row.
        compile: Also compile the step of one row.
        json_file: Where the figures go too.

    Raises:
        UserError: a value that makes no sense, or what loading a model raises.
    """
    if repeats < 1:
        raise UserError(f"repeats={repeats} must be at least 1")
    if not duration > 0:
        raise UserError(f"duration={duration} s must be above 0")
    where = torch.device(device)
    wanted: Sequence[str] = possible(where) if precision is None else [precision]
    models: dict[str, AudioModel] = {}
    told: list[str] = []
    for one in wanted:
        loaded = load(model, device=device, precision=one, compile_rows=int(compile))
        models[loaded.model.packed or "fp32"] = loaded
        told += [line if line.startswith("precision") else f"{one}: {line}" for line in loaded.told]
    if precision is None:
        told += load(model, device=device, precision=AUTO).told
    missing = [one for one in get_args(Precision) if one not in possible(where)]
    told += [f"not on this machine: {', '.join(missing)}"] if missing else []
    told.append(f"attention: {attention_backend()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}")
    rows = generation_rows(models, duration, repeats)
    print("\n".join([*told, "", HEADING, *map(str, rows)]))
    if json_file is not None:
        settings = {"model": str(model), "device": device, "duration_s": duration, "repeats": repeats, "told": told}
        write_rows(json_file, settings, rows)
    return rows
