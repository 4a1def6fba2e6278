"""Generation near the machine's limit: a step of the backbone beside `transformers`, and whole recordings of a model.

    python -m benchmarks.generation [--model DIR] [--sizes 23M 300M] [--repeats 7] [--threads N] [--duration 4]
        [--lengths 10 60 300 1800] [--window 12] [--json FILE]

Steps at batch 1 of a Llama of random weights: ours at fp32, bf16 and int8, and that of `transformers` with the same
weights, whose states agree (asserted); of its eager ways (dynamic and static cache) the faster. All take turns. The
share of the bandwidth is what reading the weights once would take, as fast as a sum over 256 MiB reads, of the step's
time: the rest is not memory's. Then whole generation with its decoding at each precision, eight at once against eight
alone, and, for a model with a flow head, one step of it against sixteen; time and memory a frame as a recording grows
beyond the window that it holds (`sink_frames`, `window_frames`; that of long music if not given by --window), with the
ratio to the shortest; and a process of its own from its start to the first sound, beyond
importing torch.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridlm.cache import KeyValueCache
from hybridlm.config import ModelConfig
from hybridlm.decoder import Decoder
from hybridlm.model import HybridLM
from hybridlm.precision import pack
from sampling.bench import (
    HEADING,
    Row,
    Timing,
    generation_rows,
    in_turns,
    possible,
    read_bandwidth,
    speed_row,
    time_row,
    weight_bytes,
    write_rows,
)
from sampling.controls import Controls
from sampling.generate import FrameLoop, Limits, Request
from sampling.longform import LongForm
from sampling.pipeline import AudioModel, load
from tokenizer.errors import UserError

SIZES: dict[str, dict[str, int]] = {
    "23M": {"hidden_dim": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 1408},
    "300M": {"hidden_dim": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 8, "ffn_dim": 2816},
    "tiny": {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128},
}
PREFIX = 64
"""Positions before the steps."""
STEPS = 8
"""Steps that are timed at once."""
BATCH = 8
SINKS = 0
"""First frames that are never forgotten, beside the prefix; as long music has it."""
CPU = torch.device("cpu")


Step = Callable[[], torch.Tensor]


def our_step(decoder: Decoder, inputs: torch.Tensor, prefix: torch.Tensor) -> Step:
    """States (1, STEPS, C) of the next steps after a prefix, further with every call."""
    cache = KeyValueCache.empty()
    decoder(prefix, torch.arange(PREFIX)[None], cache=cache)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        first = cache.length
        positions = torch.arange(first, first + STEPS)[None].split(1, dim=1)
        steps = zip(inputs.split(1, dim=1), positions, strict=True)
        return torch.cat([decoder(x, position, cache=cache).states for x, position in steps], dim=1)

    return run


def their_step(llama: Any, inputs: torch.Tensor, prefix: torch.Tensor, cache: Any) -> Step:
    """The same by `transformers`."""
    llama(inputs_embeds=prefix, past_key_values=cache, use_cache=True)
    first = PREFIX

    @torch.inference_mode()
    def run() -> torch.Tensor:
        nonlocal first
        positions = torch.arange(first, first + STEPS)[None].split(1, dim=1)
        first += STEPS
        steps = zip(inputs.split(1, dim=1), positions, strict=True)
        found = [
            llama(inputs_embeds=x, past_key_values=cache, position_ids=position, use_cache=True).last_hidden_state
            for x, position in steps
        ]
        return torch.cat(found, dim=1)

    return run


def step_rows(size: str, repeats: int, bandwidth: float) -> list[Row]:
    """Steps of the backbone at batch 1."""
    from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache

    torch.manual_seed(0)
    sizes = SIZES[size]
    llama_config = LlamaConfig(
        hidden_size=sizes["hidden_dim"],
        intermediate_size=sizes["ffn_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        rms_norm_eps=1e-5,
        vocab_size=8,
    )
    llama = LlamaModel(llama_config).eval()
    config = ModelConfig(vocab_size=8, num_codebooks=1, codebook_size=8, alignment_heads=0, **sizes)  # type: ignore[arg-type]
    plain = HybridLM(config).eval()
    plain.decoder.load_llama(llama.state_dict())
    inputs, prefix = torch.randn(1, STEPS, sizes["hidden_dim"]), torch.randn(1, PREFIX, sizes["hidden_dim"])
    static = StaticCache(llama_config, max_cache_len=PREFIX + STEPS * (repeats + 2))
    cases: dict[str, Step] = {}
    read = {}
    with torch.inference_mode():
        for name, cache in (("dynamic", DynamicCache()), ("static", static)):
            cases[f"transformers, {name} cache"] = their_step(llama, inputs, prefix, cache)
        for precision in possible(CPU):
            model = copy.deepcopy(plain)
            pack(model, precision)
            cases[precision], read[precision] = our_step(model.decoder, inputs, prefix), weight_bytes(model.decoder)
    found = {name: case() for name, case in cases.items()}
    expected = next(iter(found.values()))
    for name, states in found.items():
        error = float((states - expected).abs().max() / expected.abs().max())
        if error > (0.1 if name in ("bf16", "int8") else 1e-4):
            raise UserError(f"{size}: states of {name} differ by {error:.2%} from those of transformers")
    timings = in_turns(cases, repeats)
    peer = min((name for name in cases if name not in read), key=lambda name: timings[name].median)
    rows = []
    for name in (peer, *read):
        limit = read.get(name, read["fp32"]) / bandwidth
        share = f"{limit * STEPS / timings[name].median:.0%} of the bandwidth"
        beside = share if name == peer else f"{timings[peer].median / timings[name].median:.2f}x transformers; {share}"
        rows.append(time_row(f"{size}, {STEPS} steps: {name}", timings[name], beside))
    return rows


def batch_row(model: AudioModel, duration: float, repeats: int) -> Row:
    """So many at once against as many alone."""
    asked: dict[str, Any] = {"tags": ("music",) if "music" in model.tags else (), "duration": duration}
    timings = in_turns(
        {
            "alone": lambda: [model.generate(**asked, seed=seed) for seed in range(BATCH)],
            "at once": lambda: model.generate(**asked, seed=0, num_samples=BATCH),
        },
        repeats,
    )
    gain = timings["alone"].median / timings["at once"].median
    return speed_row(
        f"{BATCH} at once", timings["at once"], duration * BATCH, "x real time", f"{gain:.2f}x {BATCH} alone"
    )


def flow_rows(model: AudioModel, repeats: int) -> list[Row]:
    """A latent by one step of the flow head against sixteen; nothing for a model without one."""
    head, config = model.model.flow_head, model.model.config
    if head is None:
        return []
    h = torch.randn(1, config.hidden_dim, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(1, config.output_codebooks, dtype=torch.int64) if config.uses_codes else None

    def draw(steps: int) -> Callable[[], object]:
        generators = [torch.Generator().manual_seed(0)]
        return torch.inference_mode()(
            lambda: [head.sample(h, codes, generators, num_steps=steps) for _ in range(STEPS)]
        )

    timings = in_turns({"1": draw(1), "16": draw(16)}, repeats)
    ratio = timings["16"].median / timings["1"].median
    return [
        time_row(f"{STEPS} latents by 16 steps of the flow head", timings["16"]),
        time_row(f"{STEPS} latents by 1 step", timings["1"], f"{ratio:.1f}x 16 steps"),
    ]


def length_rows(model: AudioModel, lengths: list[float], window_seconds: float, repeats: int) -> list[Row]:
    """The time of a frame, and memory, once a recording is so long: all lengths take turns, so that what the machine
    does meanwhile tells for none."""
    rate, lengths = model.tokenizer.frame_rate_hz, sorted(lengths)
    window = max(SINKS + 1, min(round(window_seconds * rate), model.model.config.max_frames))
    frames = max(1, window // 4)  # of which the ring forgets an eighth at once: what that takes is counted
    ids = model.text.encode("", ["music"] if "music" in model.tags else [])
    request = Request(
        prefix=ids,
        unconditional=ids,
        prompt=None,
        context_frames=1,
        limits=Limits(minimum=10**9, maximum=10**9),
        seeds=(0,),
        controls=Controls(cfg=1.0),
        sink_frames=SINKS,
        window_frames=window,
    )
    loop, made = FrameLoop(model.model, request), 0
    cases: dict[str, Callable[[], None]] = {}
    held: dict[str, int] = {}
    for length in lengths:
        _go_on(loop, max(0, round(length * rate) - made))
        made = max(made, round(length * rate))
        name, attention = f"a frame after {length:g} s", loop.cache.attention
        cases[name] = partial(_go_on, _copied(loop), frames, copied=True)
        held[name] = sum(x.numel() * x.element_size() for x in (*attention.keys, *attention.values))
    timings, rows = in_turns(cases, repeats), []
    first = next(iter(timings.values()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for name, timing in timings.items():
        a_frame = Timing(seconds=tuple(seconds / frames for seconds in timing.seconds))
        beside = (
            f"{timing.median / first.median:.2f}x that after {lengths[0]:g} s; window {window / rate:g} s, cache "
            f"{held[name] / 2**20:.1f} MiB, process at most {peak:.0f} MiB"
        )
        rows.append(time_row(name, a_frame, beside))
    return rows


def _copied(loop: FrameLoop) -> FrameLoop:
    """One to go on by without the other."""
    again = copy.copy(loop)
    again.cache = loop.cache.select(torch.arange(len(loop.h)))
    return again


def _go_on(loop: FrameLoop, frames: int, *, copied: bool = False) -> None:
    """Draw so many more; `copied` leaves the loop where it is."""
    loop = _copied(loop) if copied else loop
    for _ in range(frames):
        frame = loop.draw(may_stop=False)
        assert frame is not None
        loop.advance(frame)


def cold_rows(model: str, repeats: int) -> list[Row]:
    """From the start of a process to its first samples, beyond importing torch."""
    load_it = f"import hybridlm; next(hybridlm.load({model!r}).stream(duration=1.0, seed=0))"

    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    timings = in_turns({"torch": process("import torch"), "sound": process(load_it)}, repeats)
    beyond = (timings["sound"].median - timings["torch"].median) * 1e3
    return [time_row("cold process to first sound", timings["sound"], f"{beyond:.0f} ms beyond importing torch")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="box")
    parser.add_argument("--sizes", nargs="*", default=["23M", "300M"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--duration", type=float, default=4.0, help="seconds of audio a run")
    parser.add_argument("--lengths", type=float, nargs="*", default=[10.0, 60.0, 300.0, 1800.0], help="seconds")
    parser.add_argument("--window", type=float, default=LongForm().window_seconds, help="seconds that are held of them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        print(HEADING)
        bandwidth, rows = read_bandwidth(), []

        def tell(new: list[Row]) -> None:
            rows.extend(new)
            for row in new:
                print(row, flush=True)

        for size in args.sizes:
            tell(step_rows(size, args.repeats, bandwidth))
        models = {precision: load(args.model, precision=precision) for precision in possible(CPU)}
        tell(generation_rows(models, args.duration, args.repeats))
        tell([batch_row(models["fp32"], args.duration, args.repeats)])
        tell(flow_rows(models["fp32"], args.repeats))
        tell(length_rows(models["fp32"], args.lengths, args.window, args.repeats))
        tell(cold_rows(args.model, args.repeats))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        settings = {"model": args.model, "threads": torch.get_num_threads(), "bytes_per_s": bandwidth}
        write_rows(args.json, settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
