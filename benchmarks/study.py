"""Studies of several training runs: a process of one thread each, finished ones kept, interrupted ones gone on with.

`run_study` is the whole program: it makes the runs that are missing, some at a time, and reports when all are done, or
after each. For `--jobs` it calls itself with `--one NAME`, which makes a single run and writes its result into the
run's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.settings import from_mapping
from training.config import SECTIONS, OptimizerConfig, apply_overrides, changed_keys, read_yaml
from training.probe import write_json
from training.state import checkpoints

RESULT = "result.json"
INTERRUPTED = 130
"""Exit code of a run that was told to stop."""
RESULTS = Path(__file__).resolve().parent / "results"
RESAMPLES = 2000
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a study."""

    name: str
    """As `--one` takes it."""
    folder: Path
    """Of its `output.txt` and its result."""
    needs: tuple[str, ...] = ()
    """Names of the runs that must be finished before it begins."""


def run_missing(
    runs: Sequence[Run],
    make: Callable[[Run], bool],
    *,
    module: str,
    arguments: Sequence[str],
    processes: int,
    is_done: Callable[[Run], bool],
    when_done: Callable[[Run], None] = lambda run: None,
) -> None:
    """Make the runs that are missing, `processes` at a time; a single process is this one.

    Args:
        runs: In the order in which they are to begin, as far as `needs` lets them.
        make: Makes one here; False when it was interrupted.
        module: Whose `--one NAME` makes one in a process of its own.
        arguments: Of that process, besides `--one`.
        processes: How many at a time.
        is_done: Whether a run's result is there.
        when_done: Called for each run that was made.

    Raises:
        UserError: a run failed; those under way are finished first.
        KeyboardInterrupt: after all runs under way have saved their state.
    """
    missing = [run for run in runs if not is_done(run)]
    waiting, open_names = list(missing), {run.name for run in missing}

    def next_run() -> Run | None:
        return next((run for run in waiting if not open_names.intersection(run.needs)), None)

    if processes == 1:
        while (run := next_run()) is not None:
            if not make(run):
                raise KeyboardInterrupt
            waiting.remove(run)
            open_names.remove(run.name)
            when_done(run)
        return
    found = os.pathsep.join([str(RESULTS.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": found}
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[Run] = []
    try:
        while running or (waiting and not failed):
            while not failed and len(running) < processes and (run := next_run()) is not None:
                waiting.remove(run)
                log = run.folder / "output.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", module, *arguments, "--one", run.name]
                with log.open("ab") as output:
                    running[run] = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
                print(f"{run.name} started ({len(waiting)} waiting), log {log}", file=sys.stderr, flush=True)
            time.sleep(0.2)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                if code == INTERRUPTED:
                    raise KeyboardInterrupt
                failed += [run] if code else []
                print(f"{run.name} {'failed' if code else 'done'}", file=sys.stderr, flush=True)
                if not code:
                    open_names.remove(run.name)
                    when_done(run)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
    if failed:
        log = failed[0].folder / "output.txt"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{failed[0].name} failed: {' '.join(last) or 'no message'}; see {log}")


def read_result(folder: Path, settings: Mapping[str, Any], name: str = RESULT) -> dict[str, Any] | None:
    """A result that is there already.

    Args:
        folder: Where it would be.
        settings: Parts of it that say how it was made.
        name: Of its file.

    Raises:
        UserError: it was made with other settings.
    """
    path = folder / name
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part, now in settings.items():
        if changed := changed_keys({part: result.get(part)}, {part: plain(now)}):
            names = ", ".join(name.removeprefix(f"{part}.") for name in changed)
            raise UserError(f"{path} was made with other settings ({names}); choose another output")
    return result


def training_settings(
    *,
    task: str,
    section: dict[str, Any],
    folder: Path,
    seed: int,
    steps: int,
    optimizer: OptimizerConfig,
    precision: str,
    ema_decay: float,
    validate_every: int,
) -> dict[str, Any]:
    """Settings of a training run of one thread on the CPU; `section` is the task's own part."""
    return {
        "task": task,
        "output": str(folder),
        "seed": seed,
        "max_steps": steps,
        "device": "cpu",
        "precision": precision,
        "threads": 1,
        "ema_decay": ema_decay,
        "optimizer": plain(asdict(optimizer)),
        "validate_every": validate_every,
        "checkpoint_every": 200,
        "keep_checkpoints": 1,
        "tensorboard": False,
        SECTIONS[task]: plain(section),
    }


def progress_of(folder: Path) -> dict[str, Any]:
    """What a run's last checkpoint says of steps and time."""
    state = json.loads((checkpoints(folder)[-1] / "state.json").read_text(encoding="utf-8"))
    progress: dict[str, Any] = state["progress"]
    return progress


def plain(value: Any) -> Any:
    """Only what JSON knows."""
    return json.loads(json.dumps(value))


def drawn_ratios(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Bootstrap of sum(values) / sum(sizes) with seeds and units drawn; always the same draws.

    Args:
        values: (seeds, units), summed over a unit, such as a clip.
        sizes: (units,).
    """
    generator = torch.Generator().manual_seed(0)
    num_seeds, num_units = values.shape
    seeds = torch.randint(num_seeds, (RESAMPLES, num_seeds), generator=generator)
    units = torch.randint(num_units, (RESAMPLES, num_units), generator=generator)
    shares = torch.zeros(RESAMPLES, num_seeds, dtype=values.dtype)
    shares.scatter_add_(1, seeds, torch.full(seeds.shape, 1 / num_seeds, dtype=values.dtype))
    return (shares @ values).gather(1, units).sum(dim=1) / sizes[units].sum(dim=1)


def bounds(draws: torch.Tensor) -> list[float]:
    """The 95 % interval of bootstrap draws."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return [low, high]


def estimate(values: torch.Tensor, sizes: torch.Tensor) -> dict[str, Any]:
    """sum(values) / sum(sizes): the seeds' mean, its interval with seeds and units drawn, and each seed's own.

    Args:
        values: (seeds, units), summed over a unit.
        sizes: (units,).
    """
    each = values.sum(dim=1) / sizes.sum()
    return {"value": each.mean().item(), "interval": bounds(drawn_ratios(values, sizes)), "per_seed": each.tolist()}


def estimate_mean(values: torch.Tensor) -> dict[str, Any] | None:
    """`estimate` of the mean over clips, and their number.

    Args:
        values: (seeds, clips); a clip for which any seed's is not finite is left out.

    Returns:
        None where no clip is left.
    """
    kept = values[:, values.isfinite().all(dim=0)]
    clips = kept.shape[1]
    return {**estimate(kept, torch.ones(clips, dtype=kept.dtype)), "clips": clips} if clips else None


def run_study(
    arguments: Sequence[str] | None,
    *,
    module: str,
    description: str | None,
    config: Path,
    settings: type[S],
    runs_of: Callable[[S], Sequence[Run]],
    make: Callable[[S, Run], bool],
    is_done: Callable[[S, Run], bool],
    report: Callable[[S, str], tuple[str, dict[str, Any]]],
    check: Callable[[S], None] = lambda study: None,
    tell: Callable[[S, Run], None] = lambda study, run: None,
    report_each: bool = False,
) -> int:
    """The whole program of a study: command line, runs, report.

    Args:
        arguments: None: those of this process.
        module: As `python -m` names the program.
        description: Its help.
        config: Its settings unless `--config` names others; the report is called after it.
        settings: Dataclass of the settings.
        runs_of: The runs that they ask for.
        make: Makes one; False when it was interrupted.
        is_done: Whether a run's result is there.
        report: Markdown and figures, of the settings and the command; called when all runs are done, and then printed.
        check: What must hold before any run begins.
        tell: Says something of a run that another process has made.
        report_each: Also report after every run that was made, on standard error; `report` must bear missing runs.

    Returns:
        The program's exit code.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seeds=1 steps=50")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--one", metavar="NAME", help="only this run, and no report")
    parser.add_argument("--markdown", type=Path, default=RESULTS / f"{config.stem}.md")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{config.stem}.json")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs} must be at least 1")
    # A termination ends the program as Ctrl-C does, so that runs save their state.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        mapping = apply_overrides(read_yaml(options.config), options.overrides)
        study = from_mapping(settings, mapping, where=str(options.config))
        runs = runs_of(study)
        if options.one:
            named = {run.name: run for run in runs}
            if options.one not in named:
                raise UserError(f"--one {options.one} is none of {', '.join(named)}")
            run = named[options.one]
            return 0 if is_done(study, run) or make(study, run) else INTERRUPTED

        def write_report(stream: TextIO) -> None:
            text, figures = report(study, shlex.join(["python", "-m", module, *given]))
            with replacing(options.markdown) as temporary:
                temporary.write_text(text, encoding="utf-8")
            write_json(options.json, figures)
            print(text, file=stream, flush=True)

        def when_done(run: Run) -> None:
            if options.jobs > 1:
                tell(study, run)
            if report_each:
                write_report(sys.stderr)

        check(study)
        run_missing(
            runs,
            lambda run: make(study, run),
            module=module,
            arguments=["--config", str(options.config), *options.overrides],
            processes=options.jobs,
            is_done=lambda run: is_done(study, run),
            when_done=when_done,
        )
        write_report(sys.stdout)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0
