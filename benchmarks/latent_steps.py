"""What steps of the flow head are worth: latents drawn in one step, in several and by the mixture, beside real ones.

    python -m benchmarks.latent_steps MODEL --data MANIFEST [--where LABEL=VALUE ...] [--split test] [--steps 1 2 4 16]
        [--prompt 3] [--continue 7] [--clips 32] [--seeds 2] [--json FILE] [--markdown FILE]

MODEL is a folder of a model with a flow head (configs/lm-box-flow.yaml trains one). Of each clip, every frame after the
prompt is drawn given the real frames before it, and also by the model by itself; in both, rows that differ in steps
alone draw with the same random numbers, and teacher-forced they have the very same codes. Temperature is 1 and nothing
is cut off, for a whole distribution is compared with the real one.

Fréchet distance (Heusel et al., arXiv 1706.08500): between normal distributions fitted to the embeddings of drawn and
of real frames, all clips together. There are two embeddings: the latents, in widths of the real ones by dimension,
and the log-mel frames of the decoded sound (80 bands, `tokenizer.metrics.log_mel`, nats), whose real ones are decoded
from real latents, so that the codec's own error does not count. Neither is learned by hearing, so they tell how well
distributions agree, not how it sounds. Mel statistics: how far mean and standard deviation over time of each band are
from the real ones, the mean over bands. Times are of the head alone, by turns in one process.

Intervals are 95 % bootstraps of the ratio to the most steps over clips.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.codec_quality import finite
from benchmarks.drift import choose
from benchmarks.drift_measure import Continuation, Span, forced_continuations, free_running, span_of
from sampling.bench import in_turns
from sampling.controls import Controls
from sampling.files import check_writable
from sampling.pipeline import AudioModel, load
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.metrics import log_mel
from training.examples import clip_seed
from training.machine import machine
from training.probe import write_json

MIXTURE = "mixture"
TEACHER, FREE = "teacher-forced", "free-running"
RESAMPLES = 200
TIMED = 64
"""Latents in a row whose time is taken."""
MEASURES = ("latent_frechet", "mel_frechet", "mel_mean", "mel_std")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of embeddings: sums that add up over clips."""

    count: float
    total: Float[Tensor, " D"]
    products: Float[Tensor, "D D"]

    @classmethod
    def of(cls, embeddings: Float[Tensor, "T D"]) -> Moments:
        """Of one clip."""
        x = embeddings.double()
        return cls(count=len(x), total=x.sum(dim=0), products=x.mT @ x)

    @classmethod
    def sum(cls, parts: Sequence[Moments]) -> Moments:
        """Of several clips together."""
        return cls(
            count=sum(part.count for part in parts),
            total=torch.stack([part.total for part in parts]).sum(dim=0),
            products=torch.stack([part.products for part in parts]).sum(dim=0),
        )

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Of every dimension."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Without Bessel's correction."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), arXiv 1706.08500."""
    root = torch.linalg.eigvals(one.covariance @ other.covariance).real.clamp(min=0).sqrt().sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * root
    return ((one.mean - other.mean).square().sum() + spread).item()


def measures(drawn: dict[str, Moments], real: dict[str, Moments]) -> dict[str, float]:
    """All figures of drawn frames beside real ones."""
    deviation = [side["mel"].covariance.diagonal().clamp(min=0).sqrt() for side in (drawn, real)]
    return {
        "latent_frechet": frechet_distance(drawn["latents"], real["latents"]),
        "mel_frechet": frechet_distance(drawn["mel"], real["mel"]),
        "mel_mean": (drawn["mel"].mean - real["mel"].mean).abs().mean().item(),
        "mel_std": (deviation[0] - deviation[1]).abs().mean().item(),
    }


def together(clips: Sequence[dict[str, Moments]], chosen: Sequence[int]) -> dict[str, Moments]:
    """Moments of some of the clips; one may occur more than once."""
    return {name: Moments.sum([clips[index][name] for index in chosen]) for name in clips[0]}


def moments(continuation: Continuation, model: AudioModel) -> dict[str, Moments]:
    """Of the frames of all rows."""
    statistics = model.model.statistics
    assert continuation.latents is not None
    latents = (continuation.latents - statistics.latent_mean.cpu()) / statistics.latent_std.cpu()
    mel = torch.cat([log_mel(row, model.sample_rate_hz) for row in continuation.waveform])
    return {"latents": Moments.of(latents.flatten(0, 1)), "mel": Moments.of(mel)}


def controls_of(steps: int | str) -> Controls:
    """Everything as the model has it."""
    return Controls(temperature=1.0, top_p=1.0, cfg=1.0, latent_steps=None if steps == MIXTURE else int(steps))


def draw(
    model: AudioModel, clips: dict[str, Tensor], span: Span, steps: Sequence[int | str], seeds: int
) -> tuple[list[dict[str, Moments]], dict[str, dict[int | str, list[dict[str, Moments]]]]]:
    """Moments by clip: of real frames, and by kind and steps of drawn ones."""
    real: list[dict[str, Moments]] = []
    found: dict[str, dict[int | str, list[dict[str, Moments]]]] = {
        kind: {number: [] for number in steps} for kind in (TEACHER, FREE)
    }
    hop = model.tokenizer.hop_length
    for number, (key, whole) in enumerate(clips.items(), start=1):
        print(f"{number}/{len(clips)} {key}", file=sys.stderr, flush=True)
        first = clip_seed(f"0/{key}") % 2**32
        rows, waveform = range(first, first + seeds), whole[:, : span.total * hop]
        with torch.inference_mode():
            frames = model.tokenizer.encode(waveform[None])
        for place, choice in enumerate(steps):
            controls = controls_of(choice)
            forced = forced_continuations(model, frames, span, rows, controls)
            if place == 0:
                real.append(moments(forced["codec"], model))
            found[TEACHER][choice].append(moments(forced[TEACHER], model))
            free = free_running(model, waveform[:, : span.prompt * hop], span, rows, controls)
            found[FREE][choice].append(moments(free, model))
    return real, found


def ratios(
    real: Sequence[dict[str, Moments]], drawn: Sequence[dict[str, Moments]], most: Sequence[dict[str, Moments]]
) -> dict[str, list[float]]:
    """Of every measure to that of the most steps: the ratio, and a 95 % interval over clips."""
    count, generator = len(real), torch.Generator().manual_seed(0)

    def ratio(chosen: Sequence[int]) -> dict[str, float]:
        truth = together(real, chosen)
        one, other = (measures(together(side, chosen), truth) for side in (drawn, most))
        return {name: one[name] / other[name] for name in MEASURES}

    sampled = [ratio(torch.randint(count, (count,), generator=generator).tolist()) for _ in range(RESAMPLES)]
    whole = ratio(range(count))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    values = {name: torch.tensor([one[name] for one in sampled], dtype=torch.float64) for name in MEASURES}
    return {name: [whole[name], *values[name].quantile(bounds).tolist()] for name in MEASURES}


def head_times(model: AudioModel, steps: Sequence[int | str], repeats: int = 15) -> dict[str, float]:
    """Milliseconds a latent."""
    head, config = model.model.flow_head, model.model.config
    assert head is not None
    h = torch.randn(1, config.hidden_dim, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(1, config.output_codebooks, dtype=torch.int64) if config.uses_codes else None

    def case(number: int) -> Callable[[], object]:
        generators = [torch.Generator().manual_seed(0)]
        run = torch.inference_mode()(lambda: head.sample(h, codes, generators, num_steps=number))
        return lambda: [run() for _ in range(TIMED)]

    cases = {str(number): case(int(number)) for number in steps if number != MIXTURE}
    return {name: timing.median / TIMED * 1e3 for name, timing in in_turns(cases, repeats).items()}


def figures(
    real: Sequence[dict[str, Moments]],
    found: dict[str, dict[int | str, list[dict[str, Moments]]]],
    times: dict[str, float],
    steps: Sequence[int | str],
) -> dict[str, Any]:
    """All of them, by kind and steps."""
    every, most = range(len(real)), max(number for number in steps if number != MIXTURE)
    truth = together(real, every)
    result: dict[str, Any] = {"most": most, "times_ms": times}
    for kind, drawn in found.items():
        result[kind] = {
            str(number): {
                **measures(together(drawn[number], every), truth),
                "to_most": ratios(real, drawn[number], drawn[most]),
            }
            for number in steps
        }
    return result


def table(result: dict[str, Any]) -> list[str]:
    """Markdown, a table a kind."""
    lines, most, times = [], str(result["most"]), result["times_ms"]
    for kind in (TEACHER, FREE):
        titles = ["Fréchet, latents", "Fréchet, log-mel", "mel mean", "mel std", "ms a latent"]
        lines += ["", f"## {kind}", "", f"| steps | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for name, values in result[kind].items():
            cells = []
            for measure in MEASURES:
                ratio, low, high = values["to_most"][measure]
                beside = "" if name == most else f" ({ratio:.2f}x [{low:.2f}, {high:.2f}])"
                cells.append(f"{values[measure]:.3g}{beside}")
            time = f"{times[name]:.3f} ({times[name] / times[most]:.3f}x)" if name in times else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {time} |")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a flow head")
    parser.add_argument("--data", type=Path, required=True, metavar="MANIFEST", help="or a folder of audio")
    parser.add_argument("--where", nargs="+", default=[], metavar="LABEL=VALUE", help="only clips with these labels")
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--prompt", type=int, default=3, metavar="S", help="seconds that are continued")
    parser.add_argument("--continue", type=int, default=7, metavar="S", dest="after", help="by so many seconds")
    parser.add_argument("--clips", type=int, default=32, help="at most so many, evenly spread")
    parser.add_argument("--seeds", type=int, default=2, help="samples of each clip")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    options = parser.parse_args(arguments)
    for name in ("clips", "seeds", "prompt", "after"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    if min(options.steps) < 1 or len(set(options.steps)) < 2:
        parser.error("--steps must be two different numbers or more, of at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        for path in filter(None, (options.json, options.markdown)):
            check_writable(path)
        model = load(options.model, device="cpu")
        if model.model.flow_head is None:
            raise UserError(f"{options.model} has no flow head; train one with configs/lm-box-flow.yaml")
        span = span_of(model, options.model, 1.0, options.prompt, options.after)
        seconds = float(options.prompt + options.after)
        clips, problems = choose(
            options.data, options.split, options.where, seconds, options.clips, model.sample_rate_hz
        )
        steps: list[int | str] = [MIXTURE, *sorted(set(options.steps))]
        real, found = draw(model, clips, span, steps, options.seeds)
        result = figures(real, found, head_times(model, steps), steps)
        words = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.latent_steps", *words])
        lines = [
            "# Steps of the flow head",
            "",
            f"`{command}`",
            "",
            f"{len(clips)} clips of split {options.split}, {options.seeds} samples of each: {options.prompt} s "
            f"continued by {options.after} s, at temperature 1. Distances from real frames; in parentheses the ratio "
            f"to {result['most']} steps, with 95 % intervals over clips. {machine('fp32')}.",
            *table(result),
        ]
        text = "\n".join(lines) + "\n"
        print(text)
        if problems:
            print(f"{len(problems)} clips left out, the first: {problems[0]}")
        if options.markdown:
            with replacing(options.markdown) as path:
                path.write_text(text, encoding="utf-8")
        if options.json:
            about = {"command": command, "machine": machine("fp32"), "clips": list(clips), "problems": problems}
            write_json(options.json, finite({**about, **result}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
