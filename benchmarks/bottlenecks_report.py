"""Figures and tables of `benchmarks.bottlenecks`: distances by noise, bits above the noise, differences by clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hybridlm.likelihood import bits_per_second
from tokenizer.errors import UserError
from training.estimates import estimate, estimate_mean

Figure = dict[str, Any]


class Column(NamedTuple):
    """A distance of some of the clips."""

    title: str
    field: str
    """Of a run's `distances`."""
    digits: int
    speech: bool | None
    """Of speech or of the rest alone; None: of all."""


COLUMNS = {
    "mel_speech": Column("mel distance, speech", "multi_mel_distance", 3, True),
    "mel_other": Column("mel distance, other", "multi_mel_distance", 3, False),
    "stoi": Column("STOI", "stoi", 3, True),
    "pesq_wb": Column("PESQ-WB", "pesq_wb", 2, True),
    "si_sdr_db": Column("SI-SDR (dB)", "si_sdr_db", 1, None),
}
RATE = "rate"
"""Bits a second above the noise."""
PARTS = ("codec", "model")
"""Trainings of a run."""


class Runs:
    """One variant's runs by seed."""

    def __init__(self, results: Mapping[int, dict[str, Any]]) -> None:
        self.results = dict(sorted(results.items()))
        self.first = next(iter(self.results.values()))
        self.speech = set(self.first["test"]["speech_sets"])

    def distances(self, column: Column, sigma: float, seeds: Sequence[int]) -> torch.Tensor:
        """(seeds, clips); NaN where a clip has no such figure."""
        rows = []
        for seed in seeds:
            chosen = [row for row in self.results[seed]["distances"] if row["sigma"] == sigma]
            wanted = [row for row in chosen if column.speech is None or (row["set"] in self.speech) == column.speech]
            rows.append([math.nan if row[column.field] is None else row[column.field] for row in wanted])
        return torch.tensor(rows, dtype=torch.float64)

    def nats(self, seeds: Sequence[int], *, above_noise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the latents' NLL (seeds, clips), with or without the noise's entropy, and frames (clips)."""
        frames = torch.tensor([clip["nll"]["num_frames"] for clip in self.first["clips"]], dtype=torch.float64)
        rows = []
        for seed in seeds:
            result = self.results[seed]
            nats = torch.tensor([clip["nll"]["latents"] for clip in result["clips"]], dtype=torch.float64)
            rows.append(nats - result["noise_floor"] * frames * above_noise)
        return torch.stack(rows), frames


def compare(results: Mapping[str, Mapping[int, dict[str, Any]]], first: str) -> dict[str, Any]:
    """Figures of the runs that are there: by variant, and of `first` minus each other one, over the seeds of both.

    Raises:
        UserError: when runs are not of the same steps and test clips.
    """
    runs = {name: Runs(found) for name, found in results.items() if found}
    _check(runs)
    variants, differences = {}, []
    for name, run in runs.items():
        seeds = list(run.results)
        nats, frames = run.nats(seeds, above_noise=False)
        rate, _ = run.nats(seeds, above_noise=True)
        minutes = [sum(result[part]["seconds"] for part in PARTS) / 60 for result in run.results.values()]
        variants[name] = {
            "seeds": seeds,
            "parameters": run.first["parameters"],
            "minutes": minutes,
            "spread": [result["spread"] for result in run.results.values()],
            "latent_scale": [result["latent_scale"] for result in run.results.values()],
            "skipped_steps": sum(result[part]["skipped_steps"] for result in run.results.values() for part in PARTS),
            "nll": _bits(estimate(nats, frames), run.first["frame_rate_hz"]),
            RATE: _bits(estimate(rate, frames), run.first["frame_rate_hz"]),
            "distances": _distances(run, seeds),
        }
    ours = runs.get(first)
    for name, run in runs.items() if ours is not None else ():
        seeds = sorted(ours.results.keys() & run.results.keys()) if name != first else []
        if not seeds:
            continue
        (mine, frames), (theirs, _) = (side.nats(seeds, above_noise=True) for side in (ours, run))
        differences.append(
            {
                "first": first,
                "second": name,
                "seeds": seeds,
                RATE: _bits(estimate(mine - theirs, frames), run.first["frame_rate_hz"]),
                "distances": _distances(ours, seeds, run),
            }
        )
    about = {}
    if runs:
        one = next(iter(runs.values())).first
        about = {name: one[name] for name in ("sigma", "latent_dim", "frame_rate_hz", "machine")}
        about |= {"clips": len(one["clips"]), "frames": sum(clip["nll"]["num_frames"] for clip in one["clips"])}
    return {**about, "variants": variants, "differences": differences}


def _check(runs: Mapping[str, Runs]) -> None:
    seen = [result for run in runs.values() for result in run.results.values()]
    for result in seen:
        for part in ("clips", "distances"):
            if [row["key"] for row in result[part]] != [row["key"] for row in seen[0][part]]:
                raise UserError(f"the runs differ in their test {part}; remove their results and run again")
        for part in PARTS:
            if result[part]["steps"] != seen[0][part]["steps"]:
                raise UserError(f"the runs differ in the steps of the {part}; remove them and run again")
        if result["parameters"] != seen[0]["parameters"]:
            raise UserError("the autoencoders differ in size; let only the bottleneck differ")


def _distances(run: Runs, seeds: Sequence[int], minus: Runs | None = None) -> list[Figure]:
    """By noise, then by column; clips that lack a figure under any seed are left out."""
    found = []
    for sigma in dict.fromkeys(row["sigma"] for row in run.first["distances"]):
        row: Figure = {"sigma": sigma}
        for name, column in COLUMNS.items():
            table = run.distances(column, sigma, seeds)
            if minus is not None:
                table = table - minus.distances(column, sigma, seeds)
            row[name] = estimate_mean(table)
        found.append(row)
    return found


def _bits(figure: Figure, frame_rate_hz: float) -> Figure:
    """Bits a second beside nats a frame."""
    bits: Figure = {"value": bits_per_second(figure["value"], frame_rate_hz)}
    bits |= {name: [bits_per_second(x, frame_rate_hz) for x in figure[name]] for name in ("interval", "per_seed")}
    return {"nats_per_frame": figure, "bits_per_second": bits}


def markdown(figures: Mapping[str, Any], about: Mapping[str, str], conditions: Sequence[str]) -> str:
    """The report.

    Args:
        figures: What `compare` says.
        about: What a variant is.
        conditions: Paragraphs to stand first.
    """
    lines = ["# Bottlenecks: reconstruction and robustness", "", "\n\n".join(conditions), ""]
    if not figures["variants"]:
        return "\n".join(lines)
    sigma, rate = figures["sigma"], figures["frame_rate_hz"]
    ceiling = 0.5 * figures["latent_dim"] * math.log2(1 + 1 / sigma**2) * rate
    sizes = {row["parameters"] for row in figures["variants"].values()}
    lines += [
        f"{figures['machine']}; {', '.join(f'{size:,}' for size in sizes)} parameters each; {figures['clips']} test "
        f"clips, {figures['frames']:,} frames. Intervals: 95 %, seeds and clips drawn. Noise is in units of a codec's "
        "own latents' root mean square about their channels' means (measured on training frames), so the "
        "signal-to-noise ratio is 1 / noise^2 for all. The mel distance is the one trained on.",
        "",
        *(f"- {name}: {text}" for name, text in about.items() if text),
        "",
        "## From clean and from noised latents",
        "",
        f"| bottleneck | noise | {' | '.join(column.title for column in COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, row in figures["variants"].items():
        lines += [f"| {name} | {_cells(found)} |" for found in row["distances"]]
    lines += [
        "",
        "## What the same language model makes of them",
        "",
        f"A continuous model of latents with noise {sigma:g}. Its NLL is of densities in the latents' own unit and "
        "does not compare between rows; the bits above the noise, NLL - D/2 log(2 pi e noise^2), do: an upper bound on "
        f"what the noised latents tell of the clean ones. White Gaussian latents would have {ceiling:.0f} bits/s. "
        "Cheap is good only where the distance at the same noise, beside it, is no larger.",
        "",
        f"| bottleneck | NLL, nats a frame | NLL, bits/s | above the noise, bits/s | mel distance at {sigma:g}, speech "
        "| other | spread | scale in training | min a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures["variants"].items():
        at = next(found for found in row["distances"] if found["sigma"] == sigma)
        scales = [value for value in row["latent_scale"] if value is not None]
        cells = [name, _cell(row["nll"]["nats_per_frame"], 2), _cell(row["nll"]["bits_per_second"], 0)]
        cells += [_cell(row[RATE]["bits_per_second"], 0)]
        cells += [_cell(at["mel_speech"], 3), _cell(at["mel_other"], 3)]
        cells += [", ".join(f"{value:.3f}" for value in row["spread"])]
        cells += [
            ", ".join(f"{value:.2f}" for value in scales) or "-",
            f"{sum(row['minutes']) / len(row['minutes']):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Differences",
        "",
        "Paired by clip and seed; * where 0 lies outside the interval.",
        "",
        f"| difference | noise | {' | '.join(column.title for column in COLUMNS.values())} | above the noise, bits/s |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for row in figures["differences"]:
        for found in row["distances"]:
            bits = _cell(row[RATE]["bits_per_second"], 0, True) if found["sigma"] == sigma else ""
            lines.append(f"| {row['first']} - {row['second']} | {_cells(found, True)} | {bits} |")
    skipped = {name: row["skipped_steps"] for name, row in figures["variants"].items() if row["skipped_steps"]}
    if skipped:
        lines += ["", f"Steps skipped for want of finite gradients: {skipped}."]
    return "\n".join(lines) + "\n"


def _cells(row: Figure, signed: bool = False) -> str:
    cells = [f"{row['sigma']:g}" if row["sigma"] else "none"]
    return " | ".join(cells + [_cell(row[name], column.digits, signed) for name, column in COLUMNS.items()])


def _cell(figure: Figure | None, digits: int, signed: bool = False) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    form = f"{'+' if signed else ''}.{digits}f"
    star = "*" if signed and (low > 0 or high < 0) else ""
    return f"{figure['value']:{form}}{star} [{low:{form}}, {high:{form}}]"
