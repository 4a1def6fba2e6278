"""Figures and tables of `benchmarks.representations`: likelihoods by model, and differences paired by clip."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hybridlm.likelihood import ClipNLL, bits_per_second, bootstrap_ratio
from tokenizer.errors import UserError
from training.estimates import RESAMPLES, bounds, drawn_ratios
from training.loop import autocast_dtype


class Scores:
    """One variant's test clips under all seeds."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self.results = results
        self.clips = [[_clip_nll(clip["nll"]) for clip in result["clips"]] for result in results]
        self.names = [(clip["key"], clip["nll"]["num_frames"]) for clip in results[0]["clips"]]
        self.sets = [clip["labels"].get("set", "all") for clip in results[0]["clips"]]

    def nats(self, of: Callable[[ClipNLL], float]) -> torch.Tensor:
        """(seeds, clips), summed over a clip's frames."""
        return torch.tensor([[of(clip) for clip in clips] for clips in self.clips], dtype=torch.float64)


STREAMS: dict[str, Callable[[ClipNLL], float]] = {
    "codes": lambda clip: sum(clip.codes),
    "latents": lambda clip: clip.latents,
    "stop": lambda clip: clip.stop,
    "total": lambda clip: clip.total,
}


def _codebook(k: int) -> Callable[[ClipNLL], float]:
    return lambda clip: clip.codes[k]


def estimate(nats: torch.Tensor, frames: torch.Tensor) -> dict[str, Any]:
    """Nats a frame of (seeds, clips) sums, with both intervals and each seed's own."""
    over_clips = bootstrap_ratio(nats.mean(dim=0).tolist(), frames.tolist(), num_resamples=RESAMPLES)
    return {
        **asdict(over_clips),
        "excludes_zero": over_clips.excludes_zero(),
        "seeds_too": bounds(drawn_ratios(nats, frames)),
        "per_seed": (nats.sum(dim=1) / frames.sum()).tolist(),
    }


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One domain's figures: absolute by variant, and paired differences.

    Raises:
        UserError: when the runs are not of the same steps, batches, tokenizer and test frames.
    """
    scores = {variant: Scores(found) for variant, found in results.items()}
    first = next(iter(scores.values()))
    for score in scores.values():
        for one, other in zip(score.results, first.results, strict=True):
            names = [(clip["key"], clip["nll"]["num_frames"]) for clip in one["clips"]]
            same = all(one[key] == other[key] for key in ("steps", "frames_trained", "tokenizer", "sigma"))
            if names != first.names or not same:
                raise UserError("the runs differ in steps, batches, tokenizer or test clips; remove them and run again")
    frames = torch.tensor([count for _, count in first.names], dtype=torch.float64)
    groups = {"all": torch.arange(len(frames))}
    if len(set(first.sets)) > 1:
        groups |= {s: torch.tensor([i for i, x in enumerate(first.sets) if x == s]) for s in sorted(set(first.sets))}
    figures: dict[str, Any] = {"variants": {}, "differences": []}
    for variant, score in scores.items():
        kind = score.results[0]["representation"]
        streams = {name: of for name, of in STREAMS.items() if (name, kind) not in ABSENT}
        books = range(len(score.clips[0][0].codes))
        figures["variants"][variant] = {
            "representation": kind,
            "parameters": score.results[0]["parameters"],
            "training_seconds": [result["training_seconds"] for result in score.results],
            "streams": {name: estimate(score.nats(of), frames) for name, of in streams.items()},
            "codebooks": [estimate(score.nats(_codebook(k)), frames) for k in books],
        }
    for stream, variant, base in pairs({name: score.results[0]["representation"] for name, score in scores.items()}):
        todo = [(group, stream, STREAMS[stream], chosen) for group, chosen in groups.items()]
        if stream == "codes":
            books = range(len(scores[base].clips[0][0].codes))
            todo += [("all", f"codebook {k}", _codebook(k), groups["all"]) for k in books]
        for group, name, of, chosen in todo:
            difference = (scores[variant].nats(of) - scores[base].nats(of))[:, chosen]
            about = {"first": variant, "second": base, "stream": name, "set": group, "clips": len(chosen)}
            figures["differences"].append({**about, **estimate(difference, frames[chosen])})
    one = first.results[0]
    figures |= {"clips": len(frames), "test_frames": int(frames.sum()), "frame_rate_hz": one["frame_rate_hz"]}
    figures |= {name: one[name] for name in ("sigma", "scale_floor", "steps", "machine", "tokenizer")}
    return {**figures, "frames_trained": [result["frames_trained"] for result in first.results]}


ABSENT = {("codes", "continuous"), ("latents", "discrete")}
"""Streams that a representation does not predict."""


def pairs(kinds: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(stream, variant, the variant it is held against); `discrete` and `continuous` are those of these names."""
    for variant, kind in kinds.items():
        if kind != "continuous" and variant != "discrete" and "discrete" in kinds:
            yield "codes", variant, "discrete"
        if kind == "hybrid" and "continuous" in kinds:
            yield "total", variant, "continuous"


def markdown(figures: Mapping[str, dict[str, Any]], about: Mapping[str, str], conditions: Sequence[str]) -> str:
    """The report.

    Args:
        figures: What `compare` says, by domain.
        about: What a domain's recordings are.
        conditions: Paragraphs to stand first.
    """
    some = next(iter(figures.values()))
    paragraphs = [
        "# Discrete, continuous and hybrid at the same size",
        *conditions,
        f"Scored are latents with noise of sigma {some['sigma']:g} and the codes of these same latents; scale floor "
        f"{some['scale_floor']:g}. Intervals: 95 % over clips (seeds averaged), then with the seeds drawn too. A total "
        "counts codes, latents and stop; a discrete model scores no latents, so its total compares with no other.",
        f"{some['machine']}; tokenizer {some['tokenizer']}.",
    ]
    lines = "\n\n".join(paragraphs).split("\n")
    for domain, found in figures.items():
        rate = found["frame_rate_hz"]
        trained = " / ".join(f"{frames:,}" for frames in found["frames_trained"])
        lines += [
            "",
            f"## {domain}" + (f" ({about[domain]})" if about.get(domain) else ""),
            "",
            f"Training frames by seed: {trained}; test: {found['test_frames']:,} frames of {found['clips']} clips.",
            "",
            "| model | parameters | codes, nats a frame | codes, bits/s | latents, nats a frame | stop | total, bits/s "
            "| training, min a run |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for variant, row in found["variants"].items():
            nats = {name: _cell(stream, 3) for name, stream in row["streams"].items()}
            bits = {name: _cell(stream, 1, rate) for name, stream in row["streams"].items()}
            minutes = sum(row["training_seconds"]) / len(row["training_seconds"]) / 60
            cells = [variant, f"{row['parameters']:,}", nats.get("codes", "-"), bits.get("codes", "-")]
            cells += [nats.get("latents", "-"), nats["stop"], bits["total"], f"{minutes:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        count = max(len(row["codebooks"]) for row in found["variants"].values())
        lines += ["", f"| codebook, nats a frame | {' | '.join(map(str, range(count)))} |", "|---" * (count + 1) + "|"]
        for variant, row in found["variants"].items():
            if row["codebooks"]:
                cells = [variant, *(f"{book['value']:.3f}" for book in row["codebooks"])]
                lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            "| difference | of | clips | nats a frame | seeds drawn too | each seed | bits/s | 0 excluded |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["differences"]:
            low, high = row["seeds_too"]
            where = "" if row["set"] == "all" else f", {row['set']}"
            each = ", ".join(f"{value:+.3f}" for value in row["per_seed"])
            cells = [f"{row['first']} - {row['second']}", row["stream"] + where, str(row["clips"]), _cell(row, 3)]
            cells += [f"[{low:.3f}, {high:.3f}]", each, _cell(row, 1, rate), "yes" if row["excludes_zero"] else "no"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine(precision: str) -> str:
    """Processor, precision and PyTorch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    used = "bf16 autocast" if autocast_dtype(precision, torch.device("cpu")) else "fp32"
    processor = model or platform.processor() or platform.machine()
    return f"{processor}, one thread a run, {used}, torch {torch.__version__}"


def _cell(figure: dict[str, Any], digits: int, frame_rate_hz: float | None = None) -> str:
    values = [figure[name] for name in ("value", "low", "high")]
    if frame_rate_hz is not None:
        values = [bits_per_second(value, frame_rate_hz) for value in values]
    value, low, high = (f"{number:.{digits}f}" for number in values)
    return f"{value} [{low}, {high}]"


def _clip_nll(saved: dict[str, Any]) -> ClipNLL:
    return ClipNLL(**{**saved, "codes": tuple(saved["codes"]), "correct": tuple(saved["correct"])})
