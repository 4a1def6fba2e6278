"""Studies of several training runs: a process of one thread each, finished ones kept, interrupted ones gone on with.

`carry_out` makes the runs that are missing, some at a time, and reports when all are done, or after each. With more
than one at a time every run is a process of its own: the same program with `--one NAME`, which makes a single run and
writes its result into the run's folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError
from training.config import SECTIONS, OptimizerConfig, changed_keys
from training.state import checkpoints

RESULT = "result.json"
INTERRUPTED = 130
"""Exit code of a run that was told to stop."""
_ROOT = Path(__file__).resolve().parent.parent


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
    command: Sequence[str],
    processes: int,
    is_done: Callable[[Run], bool],
    when_done: Callable[[Run], None] = lambda run: None,
) -> None:
    """Make the runs that are missing, `processes` at a time; a single process is this one.

    Args:
        runs: In the order in which they are to begin, as far as `needs` lets them.
        make: Makes one here; False when it was interrupted.
        command: Module and arguments that, with `--one NAME` behind them, make one in a process of its own.
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
    found = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": found}
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[Run] = []
    try:
        while running or (waiting and not failed):
            while not failed and len(running) < processes and (run := next_run()) is not None:
                waiting.remove(run)
                log = run.folder / "output.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                program = [sys.executable, "-m", *command, "--one", run.name]
                with log.open("ab") as output:
                    running[run] = subprocess.Popen(program, stdout=output, stderr=output, env=environment)
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
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """Settings of a training run, by default of one thread on the CPU; `section` is the task's own part."""
    return {
        "task": task,
        "output": str(folder),
        "seed": seed,
        "max_steps": steps,
        "device": device,
        "precision": precision,
        "threads": threads,
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


def carry_out(
    runs: Sequence[Run],
    make: Callable[[Run], bool],
    *,
    is_done: Callable[[Run], bool],
    one: str | None,
    jobs: int,
    command: Sequence[str],
    check: Callable[[], None],
    when_done: Callable[[Run], None],
    when_all_done: Callable[[], None],
) -> int:
    """Make what is missing of a study, or one run of it, and report.

    Args:
        runs: All of the study.
        make: Makes one; False when it was interrupted.
        is_done: Whether a run's result is there.
        one: Name of the only run to make, without a report.
        jobs: Runs at a time.
        command: See `run_missing`.
        check: What must hold, or be there, before any run begins.
        when_done: Called for each run that was made.
        when_all_done: Reports.

    Returns:
        The program's exit code.

    Raises:
        UserError: no such run, or a run failed.
    """
    # A termination ends the program as Ctrl-C does, so that runs save their state.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if one is not None:
            named = {run.name: run for run in runs}
            if one not in named:
                raise UserError(f"--one {one} is none of {', '.join(named)}")
            return 0 if is_done(named[one]) or make(named[one]) else INTERRUPTED
        check()
        run_missing(runs, make, command=command, processes=jobs, is_done=is_done, when_done=when_done)
        when_all_done()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0
