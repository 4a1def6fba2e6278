"""Tables of `benchmarks.injection`: understanding and reconstruction side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.probe_tables import FLOOR, MEAN, ProbeConfig, Results, compare, header, row, tables
from benchmarks.reconstruction import FIGURES, TITLES, Heard, ReconstructionConfig, values_of
from training.estimates import estimate_mean


def report_of(
    base: str,
    probes: ProbeConfig,
    reconstruction: ReconstructionConfig,
    results: Results,
    heard: Heard,
    abouts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[str], dict[str, Any]]:
    """Lines of Markdown, and all figures.

    Args:
        base: Variant that the others are held against.
        probes: What was probed.
        reconstruction: What was decoded.
        results: Of the probes.
        heard: Of the reconstruction.
        abouts: By variant, what its runs say of themselves.
    """
    figures = compare(results, [base, FLOOR], probes.methods)
    rows = reconstruction_rows(base, heard)
    lines = ["## Side by side", "", *side_by_side(base, figures, rows, abouts), ""]
    for speech, sets in ((True, reconstruction.speech), (False, reconstruction.other)):
        fields = [field for field in FIGURES if speech or field not in ("stoi", "pesq_wb")]
        chosen = [one for one in rows if one["speech"] == speech]
        if not chosen:
            continue
        lines += [f"## Reconstruction: {', '.join(sets)} ({chosen[0]['clips']} clips of split test)", ""]
        lines += header(["tokenizer", "from", *(TITLES[f] for f in fields), *(f"{TITLES[f]} - {base}" for f in fields)])
        for one in chosen:
            cells = [_cell(one["figures"][field], FIGURES[field]) for field in fields]
            above = [_cell(one["differences"].get(field), FIGURES[field], "+") for field in fields]
            lines.append(row([one["variant"], one["from"], *cells, *above]))
        lines.append("")
    lines += [f"Differences are from {base}, decoded from the first that it is decoded from.", ""]
    lines += tables(figures, probes, results[FLOOR][0])
    return lines, {"probes": figures, "reconstruction": rows, "runs": dict(abouts)}


def reconstruction_rows(base: str, heard: Heard) -> list[dict[str, Any]]:
    """A row a variant, source and kind of audio, with paired differences from the base's first source."""
    rows = []
    for speech in (True, False):
        for variant, seeds in heard.items():
            for source in dict.fromkeys(one["from"] for one in seeds[0]["rows"] if one["speech"] == speech):
                found: dict[str, Any] = {"figures": {}, "differences": {}}
                of_base = heard[base][0]["rows"][0]["from"]
                for field in FIGURES:
                    values = values_of(heard, variant, source, field, speech)
                    there = values_of(heard, base, of_base, field, speech)
                    found["figures"][field] = estimate_mean(values)
                    if variant != base:
                        found["differences"][field] = estimate_mean(values - there)
                rows.append({"variant": variant, "from": source, "speech": speech, "clips": values.shape[1], **found})
    return rows


def side_by_side(
    base: str,
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    abouts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Each tokenizer as it is made to be used: probes' means, and speech from the first that it is decoded from."""
    methods = list(figures)
    names = ["tokenizer", "M weights (frozen, decoder)", "training, min a run"]
    names += [f"{method}, mean of tasks, %" for method in methods]
    names += [f"{method}, points above {base}" for method in methods]
    lines = header([*names, "from", *TITLES.values()])
    for variant in figures[methods[0]]["accuracy"]:
        about = abouts[variant]
        weights, times = (
            about[0].get("weights"),
            [one["training_seconds"] for one in about if "training_seconds" in one],
        )
        cells = [variant, "-", "-"]
        if weights:
            cells[1] = f"{weights['all'] / 1e6:.2f} ({weights['frozen'] / 1e6:.2f}, {weights['decoder'] / 1e6:.2f})"
        if times:
            cells[2] = f"{sum(times) / len(times) / 60:.1f}"
        cells += [_cell(_percent(figures[m]["accuracy"][variant][MEAN]), 1) for m in methods]
        above = [figures[m]["differences"][base].get(variant, {}).get(MEAN) for m in methods]
        cells += [_cell(_percent(one) if one else None, 1, "+") for one in above]
        heard = next((one for one in rows if one["variant"] == variant and one["speech"]), None)
        cells += [heard["from"] if heard else "-"]
        cells += [_cell(heard["figures"][field] if heard else None, digits) for field, digits in FIGURES.items()]
        lines.append(row(cells))
    return lines


def _percent(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": 100 * figure["value"], "interval": [100 * number for number in figure["interval"]]}


def _cell(figure: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
    if figure is None:
        return "-"
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (figure["value"], *figure["interval"]))
    return f"{value} [{low}, {high}]"
