"""The program of a benchmark that is a study of several training runs (`training.runs`): its command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.settings import from_mapping
from training.config import apply_overrides, read_yaml
from training.probe import write_json
from training.runs import Run, carry_out

RESULTS = Path(__file__).resolve().parent / "results"
S = TypeVar("S")


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
    try:
        mapping = apply_overrides(read_yaml(options.config), options.overrides)
        study = from_mapping(settings, mapping, where=str(options.config))

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

        return carry_out(
            runs_of(study),
            lambda run: make(study, run),
            is_done=lambda run: is_done(study, run),
            one=options.one,
            jobs=options.jobs,
            command=[module, "--config", str(options.config), *options.overrides],
            check=lambda: check(study),
            when_done=when_done,
            when_all_done=lambda: write_report(sys.stdout),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
