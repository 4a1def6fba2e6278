"""The report of a comparison: figures, tables and the picture of `training.compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybridlm.likelihood import ClipNLL, bits_per_second
from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.config import OptimizerConfig
from training.estimates import estimate
from training.recipe import Recipe

Results = Sequence[Mapping[str, Any]]
"""Of one variant, by seed."""

STREAMS: dict[str, Callable[[ClipNLL], float]] = {
    "codes": lambda clip: sum(clip.codes),
    "latents": lambda clip: clip.latents,
    "stop": lambda clip: clip.stop,
    "total": lambda clip: clip.total,
}
ABSENT = {("codes", "continuous"), ("latents", "discrete")}
"""Streams that a representation does not predict."""


class Scores:
    """One variant's test clips under all seeds."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.first = results[0]
        self.clips = [[clip_nll(clip["nll"]) for clip in result["clips"]] for result in results]
        self.names = [(clip["key"], clip["nll"]["num_frames"]) for clip in self.first["clips"]]
        self.frames = torch.tensor([count for _, count in self.names], dtype=torch.float64)
        self.sets = [clip["labels"].get("set", "all") for clip in self.first["clips"]]

    def nats(self, of: Callable[[ClipNLL], float]) -> torch.Tensor:
        """(seeds, clips), summed over a clip's frames."""
        return torch.tensor([[of(clip) for clip in clips] for clips in self.clips], dtype=torch.float64)

    def streams(self) -> dict[str, Callable[[ClipNLL], float]]:
        """What the variant predicts."""
        return {name: of for name, of in STREAMS.items() if (name, self.first["representation"]) not in ABSENT}


def clip_nll(saved: Mapping[str, Any]) -> ClipNLL:
    """As a result has it."""
    return ClipNLL(**{**saved, "codes": tuple(saved["codes"]), "correct": tuple(saved["correct"])})


def report_of(recipe: Recipe, found: Mapping[str, Results]) -> dict[str, Any]:
    """One domain's figures: `variants`, `differences` (paired by clip), and an empty `fidelity`.

    Raises:
        UserError: a variant's seeds are of different test clips.
    """
    scores = {variant: Scores(results) for variant, results in found.items()}
    figures: dict[str, Any] = {"variants": {}, "differences": [], "fidelity": {}}
    for variant, score in scores.items():
        if any([(c["key"], c["nll"]["num_frames"]) for c in one["clips"]] != score.names for one in score.results):
            raise UserError(f"the runs of {variant} are of different test clips; remove them and run again")
        figures["variants"][variant] = _figures(score)
        for other in recipe.against(variant):
            figures["differences"] += _differences(variant, score, other, scores[other])
    return figures


def _figures(score: Scores) -> dict[str, Any]:
    one, results = score.first, score.results
    books = range(one["output_codebooks"])
    seconds = [result["training_seconds"] for result in results]
    return {
        **{name: one[name] for name in ("representation", "parameters", "steps", "flop", "tokenizer", "machine")},
        **{name: one[name] for name in ("frame_rate_hz", "codebook_size", "sigma", "scale_floor", "output_codebooks")},
        "clips": len(score.names),
        "test_frames": int(score.frames.sum()),
        "scored_steps": [result["scored_step"] for result in results],
        "training_seconds": seconds,
        "frames_trained": [result["frames_trained"] for result in results],
        "frames_per_second": [result["frames_trained"] / max(result["training_seconds"], 1e-9) for result in results],
        "streams": {name: estimate(score.nats(of), score.frames) for name, of in score.streams().items()},
        "codebooks": [estimate(score.nats(_codebook(k)), score.frames) for k in books],
        "accuracy": [estimate(score.nats(_correct(k)), score.frames) for k in books],
        "calibration": {
            stream: {part: _mean([result["calibration"][stream][part] for result in results]) for part in parts}
            for stream, parts in one["calibration"].items()
        },
        "cell_mass": [_mean(shares) for shares in zip(*(result["cell_mass"] for result in results), strict=True)],
        "curves": [result["curve"] for result in results],
    }


def _differences(variant: str, score: Scores, other: str, base: Scores) -> Iterator[dict[str, Any]]:
    """Of all streams in which the two score the same; seeds that one lacks are left out."""
    one, two = score.first, base.first
    alike = score.names == base.names and one["sigma"] == two["sigma"]
    comparable = {
        "codes": alike and one["targets"]["codes"] == two["targets"]["codes"] and one["output_codebooks"] > 0,
        "total": alike
        and one["targets"]["latents"] == two["targets"]["latents"]
        and one["scale_floor"] == two["scale_floor"]
        and "discrete" not in (one["representation"], two["representation"]),
    }
    seeds = min(len(score.results), len(base.results))
    for stream in [name for name, same in comparable.items() if same]:
        difference = score.nats(STREAMS[stream])[:seeds] - base.nats(STREAMS[stream])[:seeds]
        groups = {"all": list(range(len(score.names)))}
        if len(set(score.sets)) > 1:
            groups |= {s: [i for i, x in enumerate(score.sets) if x == s] for s in sorted(set(score.sets))}
        for name, chosen in groups.items():
            about = {"first": variant, "second": other, "stream": stream, "set": name, "clips": len(chosen)}
            yield {**about, **estimate(difference[:, chosen], score.frames[chosen])}


def _codebook(k: int) -> Callable[[ClipNLL], float]:
    return lambda clip: clip.codes[k]


def _correct(k: int) -> Callable[[ClipNLL], float]:
    return lambda clip: float(clip.correct[k])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Markdown


def markdown(recipe: Recipe, domains: Mapping[str, Any], command: str, picture: str) -> str:
    """The report.

    Args:
        recipe: What was compared.
        domains: What `report_of` says, by domain.
        command: What made it.
        picture: Name of the picture beside it.
    """
    some = next(iter(next(iter(domains.values()))["variants"].values()))
    weights = "" if recipe.checkpoint == "last" else ", by the weights of each run's best validation"
    much = f"{recipe.steps} steps" if recipe.compute is None else f"{recipe.compute:g} FLOP of training"
    lines = [
        f"# {recipe.title}",
        "",
        f"`{command}`",
        "",
        f"{recipe.seeds} seeds, {much} of at most {recipe.batch_frames} frames, windows of at most {recipe.max_frames} "
        f"frames, peak learning rate {_rate(recipe.optimizer)}, where the rest does not say otherwise. Of "
        f"each clip of split {recipe.score} the first {recipe.test_seconds:g} s are scored{weights}. Brackets: 95 % "
        "intervals with seeds and clips drawn; differences are paired by clip, and below 0 the first model is the "
        "better one. Codes and totals are compared only where the very same codes or latents are scored.",
        "",
        *(line for note in recipe.notes for line in (note, "")),
        f"{some['machine']}. Times are the fastest seed's, for the others may have waited.",
        "",
        f"![Bits a second against training compute]({picture})",
    ]
    for domain, figures in domains.items():
        lines += ["", *_domain(recipe, domain, figures)]
    told = []
    for name, variant in recipe.variants.items():
        rate = f"peak learning rate {_rate(recipe.optimizer_of(name))}" if variant.optimizer else ""
        if variant.about or rate:
            told.append(f"- {name}: {'; '.join(filter(None, (variant.about, rate)))}")
    return "\n".join([*lines, *(["", *told] if told else [])]) + "\n"


def _rate(optimizer: OptimizerConfig) -> str:
    base = optimizer.base_width
    slower = "" if base is None else f" (the decoder's matrices at {base} / hidden_dim of it)"
    return f"{optimizer.learning_rate:g}{slower}"


def _domain(recipe: Recipe, domain: str, figures: Mapping[str, Any]) -> Iterator[str]:
    about = recipe.domains[domain].about
    variants = figures["variants"]
    one = next(iter(variants.values()))
    yield from (f"## {domain}" + (f" ({about})" if about else ""), "")
    yield from (f"{one['clips']} test clips, {one['test_frames']:,} frames at {one['frame_rate_hz']:g} a second.", "")
    yield from _table(
        ["model", "parameters", "seeds", "steps", "scored at", "training FLOP", "training, min", "frames a second"],
        [
            [
                *(name, f"{row['parameters']:,}", str(len(row["training_seconds"])), str(row["steps"])),
                ", ".join(str(step) for step in row["scored_steps"]),
                *(f"{row['flop']:.2e}", f"{min(row['training_seconds']) / 60:.1f}"),
                f"{max(row['frames_per_second']):,.0f}",
            ]
            for name, row in variants.items()
        ],
    )
    names = ["model", "codes, nats a frame", "accuracy, %", "perplexity a code", "codes, bits/s"]
    names += ["latents, nats a frame", "latents, bits/s", "stop, bits/s", "total, bits/s"]
    yield from ("", *_table(names, [_likelihood(name, row) for name, row in variants.items()]))
    books = max(len(row["codebooks"]) for row in variants.values())
    if books > 1:
        rows = [
            [name, *(f"{book['value']:.3f}" for book in row["codebooks"]), *["-"] * (books - len(row["codebooks"]))]
            for name, row in variants.items()
            if row["codebooks"]
        ]
        yield from ("", *_table(["codebook, nats a code", *map(str, range(books))], rows))
    if figures["differences"]:
        names = ["difference", "of", "clips", "nats a frame", "bits/s", "each seed", "0 excluded"]
        rates = {name: row["frame_rate_hz"] for name, row in variants.items()}
        rows = [_difference(row, rates[row["first"]]) for row in figures["differences"]]
        yield from ("", *_table(names, rows))
    rows = [_calibration(name, row) for name, row in variants.items() if row["calibration"]]
    if rows:
        names = ["drawn from the model, nats a frame", "codes: expected", "true", "true - expected"]
        names += ["latents: expected", "true", "true - expected", "draws in the codes' cell, 1 .. all codebooks"]
        yield from ("", *_table(names, rows))
    rows = [
        [tokenizer, source, *("-" if value is None else f"{value:.3f}" for value in found.values())]
        for tokenizer, sources in figures["fidelity"].items()
        for source, found in sources.items()
    ]
    if rows:
        yield from ("", *_table(["tokenizer", "decoded from", "mel distance", "STOI", "PESQ-WB"], rows))


def _likelihood(name: str, row: Mapping[str, Any]) -> list[str]:
    rate, streams = row["frame_rate_hz"], row["streams"]
    nats = {stream: _cell(found, 3) for stream, found in streams.items()}
    bits = {stream: _cell(found, 1, scale=bits_per_second(1.0, rate)) for stream, found in streams.items()}
    accuracy = perplexity = "-"
    if row["codebooks"]:
        accuracy = f"{100 * _mean([book['value'] for book in row['accuracy']]):.1f}"
        if len(row["codebooks"]) == 1:
            accuracy = _cell(row["accuracy"][0], 1, scale=100)
        perplexity = f"{math.exp(_mean([book['value'] for book in row['codebooks']])):.1f}"
    return [
        *(name, nats.get("codes", "-"), accuracy, perplexity, bits.get("codes", "-")),
        *(nats.get("latents", "-"), bits.get("latents", "-"), bits["stop"], bits["total"]),
    ]


def _difference(row: Mapping[str, Any], rate: float) -> list[str]:
    low, high = row["interval"]
    where = "" if row["set"] == "all" else f", {row['set']}"
    return [
        *(f"{row['first']} - {row['second']}", row["stream"] + where, str(row["clips"]), _cell(row, 3, "+")),
        *(_cell(row, 1, "+", bits_per_second(1.0, rate)), ", ".join(f"{value:+.3f}" for value in row["per_seed"])),
        "yes" if low > 0 or high < 0 else "no",
    ]


def _calibration(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = [name]
    for stream in ("codes", "latents"):
        found = row["calibration"].get(stream)
        if found is None:
            cells += ["-"] * 3
            continue
        expected, true = found["expected"], found["empirical"]
        cells += [f"{expected:.3f}", f"{true:.3f}", f"{true - expected:+.3f}"]
    return [*cells, ", ".join(f"{share:.2f}" for share in row["cell_mass"]) or "-"]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def _cell(figure: Mapping[str, Any], digits: int, sign: str = "", scale: float = 1.0) -> str:
    value, low, high = (f"{scale * x:{sign}.{digits}f}" for x in (figure["value"], *figure["interval"]))
    return f"{value} [{low}, {high}]"


# The picture


def write_picture(path: Path, domains: Mapping[str, Any]) -> None:
    """Bits a second of held-back clips against training compute, a line a variant, a band over its seeds; and of the
    test clips, as a point with a bar over its seeds.

    Models that predict latents share no scale with those that do not, so the two kinds have columns of their own.
    """
    from matplotlib.figure import Figure  # imported here: it takes half a second

    columns = {"codes": "codes, bits/s", "latents": "codes + latents, bits/s"}
    shown = [
        stream
        for stream in columns
        if any(stream in row["streams"] for d in domains.values() for row in d["variants"].values())
    ]
    figure = Figure(figsize=(7 * len(shown), 4.5 * len(domains)), layout="constrained")
    grid = figure.subplots(len(domains), len(shown), squeeze=False)
    for axes, (domain, figures) in zip(grid, domains.items(), strict=True):
        for axis, stream in zip(axes, shown, strict=True):
            for number, (name, row) in enumerate(figures["variants"].items()):
                if stream in row["streams"]:
                    _draw(axis, name, row, stream, _look(number))
            axis.set_title(domain)
            axis.set_xscale("log")
            axis.set_xlabel("training compute, FLOP")
            axis.set_ylabel(columns[stream])
            axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: no line lies under it
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _look(number: int) -> tuple[str, str, str]:
    """Colour, line and marker of a variant: there are ten colours, so the next ten have other lines and markers."""
    again, color = divmod(number, 10)
    styles = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
    return f"C{color}", *styles[again % len(styles)]


def _draw(axis: Any, name: str, row: Mapping[str, Any], stream: str, look: tuple[str, str, str]) -> None:
    """One line; of a hybrid in the column of latents, codes and latents together."""
    color, line, marker = look
    scale = bits_per_second(1.0, row["frame_rate_hz"])
    parts = [part for part in ("codes", "latents") if part in row["streams"]] if stream == "latents" else ["codes"]
    steps = [point["step"] for point in min(row["curves"], key=len)]
    flop = [step * row["flop"] / row["steps"] for step in steps]
    each = [[scale * sum(point[part] for part in parts) for point in curve[: len(steps)]] for curve in row["curves"]]
    at_step = list(zip(*each, strict=True))
    axis.plot(flop, [_mean(values) for values in at_step], line, color=color, label=name)
    axis.fill_between(flop, [min(v) for v in at_step], [max(v) for v in at_step], color=color, alpha=0.2)
    values = [sum(row["streams"][part]["per_seed"][seed] for part in parts) for seed in range(len(each))]
    middle = scale * _mean(values)
    axis.errorbar(
        [row["flop"]],
        [middle],
        yerr=[[middle - scale * min(values)], [scale * max(values) - middle]],
        color=color,
        marker=marker,
        markersize=4,
        capsize=3,
    )
