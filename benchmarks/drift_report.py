"""Figures, tables and picture of `benchmarks.drift`.

Shapes: M models that differ in their training's seed alone, B samples of each, R rows of figures, N clips, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.drift_measure import CODEC, FREE, MEL_DISTANCE, REAL, TEACHER
from benchmarks.probe_tables import header, row
from tokenizer.files import replacing
from training.estimates import bounds, drawn_ratios, estimate

SLOPE_SECONDS = 10.0
LEAST_NORM_CHANGE = 0.01
"""Real latents of a tokenizer that normalizes them have all one length; a hundredth of it is then the unit."""
MEASURES = {
    MEL_DISTANCE: ("Log-mel distance to the real continuation", "nats", ".2f"),
    "log_mel_mean": ("Mean of the log-mel", "nats", ".2f"),
    "log_mel_std": ("Standard deviation of the log-mel", "nats", ".2f"),
    "loudness_db": ("Loudness", "dB", ".2f"),
    "centroid_hz": ("Spectral centroid", "Hz", ".0f"),
    "tilt_db_per_octave": ("Spectral tilt", "dB an octave", ".2f"),
    "latent_norm": ("Norm of the latents", "", ".3f"),
    "code_entropy_bits": ("Entropy of the codes", "bits a code", ".2f"),
}
"""Title, unit and digits of what is measured."""
SIGNED = ("loudness_db", "centroid_hz", "tilt_db_per_octave", "latent_norm", "code_entropy_bits")
OF_FRAMES = ("latent_norm", "code_entropy_bits")
LINES = {FREE: "-", TEACHER: "--", CODEC: ":", REAL: "-."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model, or several that differ in their training's seed alone, measured."""

    name: str
    about: dict[str, Any]
    """Facts for the report."""
    values: dict[str, dict[str, Float[Tensor, "M B N W"]]]
    """By kind of continuation and measure; with its sign where a measure has one."""
    prompt_norms: Float[Tensor, " N"] | None
    """Mean norm of the prompts' latents; None for a model that predicts none."""
    cannot_run: str | None = None
    """Why it has no free-running continuation."""

    def units(self, measure: str) -> Float[Tensor, " N"]:
        """Of each clip, what a distance is divided by: how far the real continuation is from its prompt."""
        real = self.values[REAL][measure]
        if measure == MEL_DISTANCE:
            return torch.ones(real.shape[2], dtype=torch.float64)
        units = real.abs().mean(dim=(0, 1, 3))
        if measure == "latent_norm" and self.prompt_norms is not None:
            units = units.maximum(LEAST_NORM_CHANGE * self.prompt_norms)
        return units


def rows_of(values: Float[Tensor, "M B N W"]) -> Float[Tensor, "R N W"]:
    """The samples of a single model, or else the models, over whose samples the mean is taken."""
    return values[0] if len(values) == 1 else values.mean(dim=1)


def slopes(values: Float[Tensor, "*R W"], window_s: float) -> Float[Tensor, "*R"]:
    """Least-squares slope over time, per ten seconds; NaN for a single window."""
    time = window_s * torch.arange(values.shape[-1], dtype=values.dtype)
    time = time - time.mean()
    return SLOPE_SECONDS * (values @ time) / time.square().sum()


def figures(variants: Sequence[Variant], window_s: float) -> dict[str, Any]:
    """All figures: by variant, kind and measure; and differences, paired by clip.

    Args:
        variants: Of the same clips in the same order; the first is what the others are held against.
        window_s: Length of a window.
    """
    found: dict[str, Any] = {"models": {}, "differences": []}
    for variant in variants:
        kinds: dict[str, Any] = {}
        for kind, measures in variant.values.items():
            kinds[kind] = {name: _figure(variant, kind, name, window_s) for name in MEASURES if name in measures}
        units = {name: variant.units(name).mean().item() for name in kinds[REAL] if name != MEL_DISTANCE}
        found["models"][variant.name] = {**variant.about, "cannot_run": variant.cannot_run, "units": units, **kinds}
    base = variants[0]
    for variant in variants:
        if FREE in variant.values:
            found["differences"] += _differences((variant, FREE), (variant, TEACHER), window_s)
    for variant in variants[1:]:
        for kind in (FREE, TEACHER):
            if kind in variant.values and kind in base.values:
                found["differences"] += _differences((variant, kind), (base, kind), window_s)
    return found


def _figure(variant: Variant, kind: str, name: str, window_s: float) -> dict[str, Any]:
    units = variant.units(name)
    values, sizes = (rows_of(x) for x in (variant.values[kind][name], variant.values[kind][name].abs()))
    found = {
        "windows": [estimate(window, units) for window in sizes.unbind(dim=2)],
        "mean": estimate(sizes.mean(dim=2), units),
        "slope": estimate(slopes(sizes, window_s), units),
    }
    if name in SIGNED:
        ones = torch.ones_like(units)
        found["signed_mean"] = estimate(values.mean(dim=2), ones)
        found["signed_slope"] = estimate(slopes(values, window_s), ones)
    return found


def _differences(of: tuple[Variant, str], minus: tuple[Variant, str], window_s: float) -> list[dict[str, Any]]:
    """One minus the other, for each measure that both have, with the same seeds and clips drawn for both."""
    found = []
    for name in MEASURES:
        if any(name not in variant.values[kind] for variant, kind in (of, minus)):
            continue
        sizes = [rows_of(variant.values[kind][name].abs()) for variant, kind in (of, minus)]
        units = [variant.units(name) for variant, _ in (of, minus)]
        found.append(
            {
                "measure": name,
                "of": _title(*of),
                "minus": _title(*minus),
                "mean": _difference([x.mean(dim=2) for x in sizes], units),
                "slope": _difference([slopes(x, window_s) for x in sizes], units),
            }
        )
    return found


def _difference(values: Sequence[Float[Tensor, "R N"]], units: Sequence[Float[Tensor, " N"]]) -> dict[str, Any]:
    """`estimate` of the first minus that of the second; the draws of both are the same."""
    each = values[0].sum(dim=1) / units[0].sum() - values[1].sum(dim=1) / units[1].sum()
    draws = drawn_ratios(values[0], units[0]) - drawn_ratios(values[1], units[1])
    return {"value": each.mean().item(), "interval": bounds(draws), "per_seed": each.tolist()}


def _title(variant: Variant, kind: str) -> str:
    return f"{variant.name}, {kind}"


def lines_of(found: Mapping[str, Any], name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and figures by row of a measure's table; what is the same for all models, as real audio is, comes once."""
    models = {model: kinds for model, kinds in found["models"].items() if name in kinds[REAL]}
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in (FREE, TEACHER, CODEC, REAL):
        if (kind == REAL and name == MEL_DISTANCE) or (kind == CODEC and name in OF_FRAMES):
            continue  # real audio has no distance to itself, and the codec decodes real frames
        own = {model: kinds[kind][name] for model, kinds in models.items() if kind in kinds}
        figures = list(own.values())
        if kind in (CODEC, REAL) and figures and all(figure["windows"] == figures[0]["windows"] for figure in figures):
            rows[kind] = (kind, figures[0])
        else:
            rows |= {f"{model}, {kind}": (kind, figure) for model, figure in own.items()}
    return rows


def table(found: Mapping[str, Any], window_s: float) -> list[str]:
    """The figures in Markdown."""
    lines: list[str] = []
    for name, (title, unit, _) in MEASURES.items():
        rows = lines_of(found, name)
        if not rows:
            continue
        units = {kinds["units"][name] for kinds in found["models"].values() if name in kinds["units"]}
        said = " or ".join(f"{value:.3g}{f' {unit}' if unit else ''}" for value in sorted(units))
        about = f"in units of {said}" if units else f"in {unit}"
        windows = len(next(iter(rows.values()))[1]["windows"])
        times = [f"{number * window_s:g}-{(number + 1) * window_s:g} s" for number in range(windows)]
        lines += ["", f"## {title}, {about}", ""]
        lines += header(["", *times, "mean", f"slope per {SLOPE_SECONDS:g} s"])
        for label, (_, figure) in rows.items():
            cells = [cell(window, ".2f") for window in (*figure["windows"], figure["mean"])]
            lines.append(row([label, *cells, cell(figure["slope"], "+.2f")]))
    if any(FREE in kinds for kinds in found["models"].values()):
        lines += _signed_table(found)
    if found["differences"]:
        lines += ["", "## Differences, paired by clip", ""]
        lines += header(["", "measure", "mean", f"slope per {SLOPE_SECONDS:g} s"])
        for line in found["differences"]:
            title = MEASURES[line["measure"]][0]
            figures = [cell(line[name], "+.2f") for name in ("mean", "slope")]
            lines.append(row([f"{line['of']} - {line['minus']}", title, *figures]))
    return lines


def _signed_table(found: Mapping[str, Any]) -> list[str]:
    """Of free-running continuations: more or less than the prompt, in the measures' own units."""
    lines = ["", "## Free-running: more or less than the prompt has", ""]
    lines += header(["", "measure", "mean", f"slope per {SLOPE_SECONDS:g} s"])
    for name in SIGNED:
        title, unit, digits = MEASURES[name]
        for label, (kind, figure) in lines_of(found, name).items():
            if kind in (FREE, REAL):
                figures = [cell(figure[of], f"+{digits}") for of in ("signed_mean", "signed_slope")]
                lines.append(row([label, f"{title}{f', {unit}' if unit else ''}", *figures]))
    return lines


def cell(figure: Mapping[str, Any], form: str) -> str:
    """A figure and its interval; a dash where there is none, as a slope of a single window or a unit of 0."""
    numbers = (figure["value"], *figure["interval"])
    if not all(map(math.isfinite, numbers)):
        return "-"
    value, low, high = (format(number, form) for number in numbers)
    return f"{value} [{low}, {high}]"


def write_picture(path: Path, found: Mapping[str, Any], window_s: float) -> None:
    """Draw every measure over time as a PNG: a colour a model, a kind of line a kind of continuation, 95 % bands.

    Raises:
        UserError: a place that can't be written.
    """
    from matplotlib.figure import Figure  # imported here: it takes half a second

    names = [name for name in MEASURES if lines_of(found, name)]
    columns = min(4, len(names))
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-len(names) // columns) + 1.0), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flatten()
    colours = {model: f"C{number}" for number, model in enumerate(found["models"])}
    handles: dict[str, Any] = {}
    for name, panel in zip(names, panels, strict=False):
        for label, (kind, curve) in lines_of(found, name).items():
            colour = "black" if label == kind else colours[label.removesuffix(f", {kind}")]
            time = [(number + 0.5) * window_s for number in range(len(curve["windows"]))]
            values = [window["value"] for window in curve["windows"]]
            low, high = zip(*(window["interval"] for window in curve["windows"]), strict=True)
            (handles[label],) = panel.plot(time, values, LINES[kind], color=colour, marker=".", markersize=4)
            panel.fill_between(time, low, high, color=colour, alpha=0.12, linewidth=0)
        title, unit, _ = MEASURES[name]
        panel.set_title(title, fontsize="medium")
        panel.set_ylabel(unit if name == MEL_DISTANCE else "as real audio = 1")
        panel.set_xlabel("seconds after the prompt")
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
