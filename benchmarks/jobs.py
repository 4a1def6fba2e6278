"""A benchmark's training runs, each in a process of one thread, several at a time; what is finished stays finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizer.errors import UserError
from tokenizer.files import replacing

ROOT = Path(__file__).resolve().parent.parent
Job = TypeVar("Job")


def run_jobs(
    waiting: Sequence[Job],
    *,
    processes: int,
    run_one: Callable[[Job], Any],
    module: str,
    arguments: Sequence[str],
    folder_of: Callable[[Job], Path],
    done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Make the runs that are missing, `processes` at a time.

    Args:
        waiting: Runs, in order; their `str` names them.
        processes: At a time; a single one runs in this process.
        run_one: Makes a run; None means that it was interrupted.
        module: What makes one run as `python -m MODULE ARGUMENTS --one RUN`.
        arguments: Of that command.
        folder_of: A run's folder, where its output is kept.
        done: Told of every finished run, as they finish.

    Raises:
        UserError: a run failed; those under way are finished first.
        KeyboardInterrupt: after all runs under way have saved their state.
    """
    if processes == 1:
        for job in waiting:
            if run_one(job) is None:
                raise KeyboardInterrupt
            done(job)
        return
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": found}
    left = list(waiting)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: list[Job] = []
    try:
        while running or (left and not failed):
            while left and not failed and len(running) < processes:
                job = left.pop(0)
                log = folder_of(job) / "output.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", module, *arguments, "--one", str(job)]
                with log.open("ab") as output:
                    running[job] = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
                print(f"{job} started ({len(left)} waiting), log {log}", file=sys.stderr, flush=True)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                failed += [job] if code else []
                print(f"{job} {'failed' if code else 'done'}", file=sys.stderr, flush=True)
                if not code:
                    done(job)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
    if failed:
        log = folder_of(failed[0]) / "output.txt"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{failed[0]} failed: {' '.join(last) or 'no message'}; see {log}")


def plain(value: Any) -> Any:
    """Only what JSON knows: tuples become lists."""
    return json.loads(json.dumps(value))


def write(path: Path, content: str) -> None:
    """A file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
