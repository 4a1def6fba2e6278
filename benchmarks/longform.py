"""Long recordings: how music and read text drift over minutes, with and without the drift monitor.

    python -m benchmarks.longform TEXT.txt [--model box] [--minutes 10] [--max-drift 8] [--seeds 1] [--tag music]
        [--real MUSIC [--where LABEL=VALUE ...] [--split train]] [--output runs/longform] [--markdown FILE]
        [--json FILE] [--picture PNG]

Of each seed four recordings are made, the first two of which differ from the others in nothing but re-anchoring
(`hybridlm generate --max-drift`): music by its tag, and the text read sentence by sentence, as far as it goes, each
without and with the monitor. Audio and figures of each lie in --output; a recording that is there is not made again,
so that the same command goes on where it was interrupted.

Measured is every window of --window seconds, a second apart, against those of the first --anchor seconds
(`sampling.monitor`), in widths of the bands that these have. Tables give the mean over the windows of each minute;
windows that lie in the first seconds are not counted. With --real, a minute of recordings of MUSIC is measured in
the same way, from 30 s on, for a model does not begin with an introduction either: a limit on drift that real music
passes all the time would break off what is as it should be.

Re-anchoring is by the same figures, so that what it gains in them is no proof that a listener gains: listen, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console

from benchmarks.drift import choose
from sampling.files import check_writable
from sampling.growing import GrowingFile
from sampling.longform import MUSIC_MAX_DRIFT, LongForm
from sampling.monitor import FLOORS, DriftMonitor, Watch
from sampling.pipeline import AudioModel, load
from sampling.progress import RecordingMeter
from tokenizer.errors import UserError
from tokenizer.files import read_text, replacing
from training.machine import machine
from training.probe import write_json

KINDS = ("music", "text")
REAL_START_SECONDS, REAL_SECONDS, REAL_CLIPS = 30.0, 60.0, 24
SILENT_DB = -60.0
"""Of full scale: mean power of a second that counts as silent."""
NEVER = 1e9
"""Bands: made like the others, and never re-anchored."""


def names(options: argparse.Namespace) -> Iterator[tuple[str, str, bool, int]]:
    """Name, kind, whether it is re-anchored, and seed of each recording."""
    for seed in range(options.seed, options.seed + options.seeds):
        for held in (False, True):
            for kind in KINDS:
                yield f"{kind}-{'with' if held else 'without'}-{seed}", kind, held, seed


def make(model: AudioModel, name: str, asked: Mapping[str, Any], long_form: LongForm, output: Path) -> dict[str, Any]:
    """Make a recording and its figures, unless they are there."""
    told = dict(asked)
    if "text" in told:
        told["text"] = hashlib.sha256(told["text"].encode()).hexdigest()
    facts = {"model": asdict(model.origin), "asked": told, "long_form": asdict(long_form)}
    path, figures = output / f"{name}.wav", output / f"{name}.json"
    if figures.is_file() and path.is_file():
        found = json.loads(figures.read_text(encoding="utf-8"))
        if found["facts"] == json.loads(json.dumps(facts)):
            print(f"{name}: there already", file=sys.stderr, flush=True)
            return found
    print(name, file=sys.stderr, flush=True)
    stream = model.generate_stream(**asked, long_form=long_form, measure_drift=True, chunk_frames=25)
    rate = model.sample_rate_hz
    with GrowingFile(path, rate) as file, RecordingMeter(Console(stderr=True), rate) as meter:
        for piece in stream:
            file.write(piece)
            meter.update(file.num_samples, stream.share_done)
    seconds = file.num_samples / rate
    made = {"facts": facts, "seconds": seconds, "warnings": list(stream.warnings), **stream.report()}
    write_json(figures, made)
    return made


def measure_real(model: AudioModel, options: argparse.Namespace, watch: Watch) -> list[dict[str, Any]]:
    """The windows of each of the recordings, a minute of everyone."""
    seconds, rate = REAL_START_SECONDS + REAL_SECONDS, model.sample_rate_hz
    recordings, problems = choose(options.real, options.split, options.where, seconds, REAL_CLIPS, rate)
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    found = []
    for key, whole in recordings.items():
        waveform = whole[:, round(REAL_START_SECONDS * rate) :]
        monitor, frames = DriftMonitor(model.tokenizer, watch), model.tokenizer.encode(waveform[None])
        monitor.see_prompt(frames, codes=model.model.config.uses_codes, latents=model.model.config.predicts_latents)
        monitor.hear(waveform[None])
        found.append({"clip": key, **monitor.report()})
    return found


def silent_share(path: Path) -> float:
    """Of the seconds of a recording, those below SILENT_DB."""
    samples, rate = soundfile.read(path, dtype="float32")
    seconds = samples[: len(samples) // rate * rate].reshape(-1, rate)
    return float((10 * np.log10((seconds**2).mean(axis=1) + 1e-12) < SILENT_DB).mean()) if len(seconds) else 0.0


def _largest(windows: Sequence[Mapping[str, float]]) -> list[float]:
    return [max(abs(value) for key, value in window.items() if key != "at_s") for window in windows]


def by_minute(windows: Sequence[Mapping[str, float]], measure: str | None) -> list[float | None]:
    """Mean size of a measure's drift in each minute, or (None) of the measure that is farthest off in each window."""
    minutes: list[list[float]] = []
    for window in windows:
        values = {name: abs(value) for name, value in window.items() if name != "at_s"}
        minute = int(max(0.0, window["at_s"] - 1e-6) // 60)
        minutes += [[] for _ in range(minute + 1 - len(minutes))]
        minutes[minute].append(max(values.values()) if measure is None else values[measure])
    return [sum(values) / len(values) if values else None for values in minutes]


def report(
    runs: Mapping[str, dict[str, Any]], real: Sequence[dict[str, Any]], options: argparse.Namespace, command: str
) -> tuple[str, dict[str, Any]]:
    """Markdown and figures."""
    lines = [
        "# Long recordings",
        "",
        f"`{command}`",
        "",
        f"Drift from the first {options.anchor:g} s in band widths, windows of {options.window:g} s; the mean over "
        f"each minute of the measure that is farthest off, re-anchored beyond {options.max_drift:g}; silent are "
        f"seconds below {SILENT_DB:g} dB.",
        "",
    ]
    summary: dict[str, Any] = {}
    for name, run in runs.items():
        windows = run["drift"]["windows"]
        largest = _largest(windows)
        measures = [name for name in FLOORS if windows and name in windows[0]]
        summary[name] = {
            "seconds": run["seconds"],
            "re_anchorings": len(run["re_anchorings"]),
            "share_outside": sum(value > options.max_drift for value in largest) / len(largest) if largest else None,
            "by_minute": by_minute(windows, None),
            "measures": {name: by_minute(windows, name) for name in measures},
            "unended": len(run["warnings"]),
            "share_silent": silent_share(options.output / f"{name}.wav"),
        }
    count = max((len(one["by_minute"]) for one in summary.values()), default=0)
    lines.append(
        _row(["recording", "seconds", "re-anchored", "outside", "silent", *(f"min {n + 1}" for n in range(count))])
    )
    lines.append(_row(["---"] * (5 + count)))
    for name, one in summary.items():
        cells = [_cell(value) for value in one["by_minute"]] + ["-"] * (count - len(one["by_minute"]))
        outside = "-" if one["share_outside"] is None else f"{100 * one['share_outside']:.0f} %"
        silent = f"{100 * one['share_silent']:.0f} %"
        lines.append(_row([name, f"{one['seconds']:.0f}", str(one["re_anchorings"]), outside, silent, *cells]))
    lines += ["", "By measure, in the first and the last minute that are measured:", ""]
    lines += [_row(["recording", *FLOORS]), _row(["---"] * (1 + len(FLOORS)))]
    for name, one in summary.items():
        known = {measure: [v for v in values if v is not None] for measure, values in one["measures"].items()}
        cells = [f"{known[m][0]:.1f} / {known[m][-1]:.1f}" if known.get(m) else "-" for m in FLOORS]
        lines.append(_row([name, *cells]))
    if real:
        pooled = sorted(value for one in real for value in _largest(one["windows"]))
        outside = sum(value > options.max_drift for value in pooled) / len(pooled)
        summary["real"] = {"recordings": len(real), "windows": len(pooled), "share_outside": outside}
        summary["real"] |= {f"quantile_{q}": pooled[len(pooled) * q // 100] for q in (50, 75, 90, 95)}
        told = ", ".join(f"{q} % {summary['real'][f'quantile_{q}']:.1f}" for q in (50, 75, 90, 95))
        lines += [
            "",
            f"Real recordings, {len(real)} of {REAL_SECONDS:g} s: {100 * outside:.0f} % of windows outside; quantiles "
            f"of the measure that is farthest off: {told}.",
        ]
    lines += ["", f"{machine('fp32')}."]
    return "\n".join(lines) + "\n", {"command": command, "runs": dict(runs), "real": list(real), "summary": summary}


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def write_picture(path: Path, runs: Mapping[str, dict[str, Any]], max_drift: float) -> None:
    """Drift over time, music and text apart; a mark where a recording was re-anchored."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, kind in zip(figure.subplots(len(KINDS), 1, sharex=True), KINDS, strict=True):
        for name, run in runs.items():
            if not name.startswith(f"{kind}-"):
                continue
            windows = run["drift"]["windows"]
            times = [window["at_s"] / 60 for window in windows]
            (line,) = axes.plot(times, _largest(windows), linewidth=0.8, label=name)
            for anchored in run["re_anchorings"]:
                axes.plot(anchored["at_s"] / 60, max_drift, "v", color=line.get_color(), markersize=4)
        axes.axhline(max_drift, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=kind, ylabel="band widths", yscale="log")
        axes.legend(fontsize="small")
    axes.set_xlabel("minutes")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="a file of text to read")
    parser.add_argument("--model", default="box")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of each recording; of the text, at most")
    parser.add_argument("--max-drift", type=float, default=MUSIC_MAX_DRIFT, help="band widths; as of `generate`")
    parser.add_argument("--tag", default="music", help="of the music")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--window", type=float, default=3.0, metavar="S", help="seconds of a window")
    parser.add_argument("--anchor", type=float, default=10.0, metavar="S", help="the first seconds")
    parser.add_argument(
        "--segment", type=float, default=LongForm().segment_seconds, metavar="S", help="of music between two checks"
    )
    parser.add_argument("--carry", type=float, default=LongForm().carry_seconds, metavar="S", help="re-read then")
    parser.add_argument("--real", type=Path, metavar="MUSIC", help="a folder or manifest of real recordings")
    parser.add_argument("--where", action="append", default=[], metavar="LABEL=VALUE", help="of the real ones")
    parser.add_argument("--split", default="train", help="of the real ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/longform"), metavar="DIR")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw drift over time here")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        for path in filter(None, (options.json, options.markdown, options.picture, options.output / "x.wav")):
            check_writable(path)
        watch = Watch(
            window_seconds=options.window, step_seconds=min(1.0, options.window / 2), anchor_seconds=options.anchor
        )
        text, model = read_text(options.text), load(options.model, device=options.device)
        runs = {}
        for name, kind, held, seed in names(options):
            long_form = LongForm(
                segment_seconds=options.segment,
                carry_seconds=options.carry,
                max_drift=options.max_drift if held else NEVER,
                watch=watch,
            )
            what = {"tags": [options.tag]} if kind == "music" else {"text": text}
            asked = {**what, "duration": 60.0 * options.minutes, "seed": seed}
            runs[name] = make(model, name, asked, long_form, options.output)
        real = [] if options.real is None else measure_real(model, options, watch)
        command = ["python", "-m", "benchmarks.longform", *(sys.argv[1:] if arguments is None else arguments)]
        written, figures = report(runs, real, options, shlex.join(command))
        print(written)
        if options.markdown:
            with replacing(options.markdown) as path:
                path.write_text(written, encoding="utf-8")
        if options.json:
            write_json(options.json, figures)
        if options.picture:
            write_picture(options.picture, runs, options.max_drift)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
