"""What tokenizers' frames tell of recordings: every tokenizer on every task by every method, beside a log-mel floor.

    python -m benchmarks.probes --data MANIFEST [--config benchmarks/probes.yaml] [key=value ...] [--tasks emotion ...]
        [--markdown FILE] [--json FILE]

The protocol is that of `hybridlm probe`, which gives any single row again. Within a task all rows are of the same clips
and the same trainings, so differences from the floor are paired. Tasks that the manifest has no clips for are named and
left out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.probe_tables import check_tasks
from hybridlm.checkpoint import load_codec
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.settings import from_mapping
from training.classifiers import METHODS, Method
from training.config import apply_overrides, read_yaml
from training.embeddings import FrameSource, TokenizerFrames, default_input
from training.machine import machine
from training.manifest import read_manifest
from training.partitions import ProbeTask
from training.probe import COLUMNS, ProbeReport, cells, conditions, probe, write_json

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerChoice:
    """A tokenizer and the views of it that are probed."""

    tokenizer: str
    """"box", "encodec", or a tokenizer's or model's folder."""
    inputs: tuple[str, ...] = ()
    """Of features, latents, codes; none: features where it has them, else latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is run; see benchmarks/probes.yaml."""

    tokenizers: dict[str, TokenizerChoice]
    """By the name that the tables give them."""
    tasks: dict[str, ProbeTask]
    methods: tuple[Method, ...] = METHODS
    seed: int = 42
    device: str = "cpu"
    about: dict[str, str] = field(default_factory=dict)
    """A remark on a task, for the report."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.about)


def sources_of(study: Study) -> list[FrameSource]:
    """The tokenizers, loaded."""
    sources: list[FrameSource] = []
    for name, choice in study.tokenizers.items():
        codec = load_codec(choice.tokenizer, study.device)
        sources.append(TokenizerFrames(codec, choice.inputs or (default_input(codec),), name))
    return sources


def run_tasks(study: Study, data: Path, names: Sequence[str]) -> tuple[dict[str, ProbeReport], dict[str, str]]:
    """Reports by task, and why the others have none."""
    manifest, sources = read_manifest(data), sources_of(study)
    reports, refused = {}, {}
    for name in names:
        print(f"task {name}", file=sys.stderr, flush=True)
        try:
            reports[name] = probe(
                manifest.clips,
                study.tasks[name],
                sources,
                methods=study.methods,
                device=study.device,
                seed=study.seed,
                when_scored=lambda row: print(" | ".join(cells(row)), file=sys.stderr, flush=True),
            )
        except UserError as error:
            refused[name] = str(error)
    return reports, refused


def markdown(reports: Mapping[str, ProbeReport], refused: Mapping[str, str], study: Study, head: Sequence[str]) -> str:
    """All tables, each under what its figures rest on."""
    lines = ["# Probes", "", *head]
    for name, report in reports.items():
        lines += ["", f"## {name}", ""]
        lines += [study.about[name], ""] if name in study.about else []
        lines += [f"- {line}" for line in conditions(report)]
        lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in report.rows]
    if refused:
        lines += ["", "## Left out", "", *(f"- {name}: {reason}" for name, reason in refused.items())]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    parser.add_argument("--data", type=Path, required=True, help="manifest.jsonl or a folder of audio")
    parser.add_argument("--config", type=Path, default=HERE / "probes.yaml")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write all figures here, with every clip's prediction")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        mapping: dict[str, Any] = apply_overrides(read_yaml(options.config), options.overrides)
        study = from_mapping(Study, mapping, where=str(options.config))
        names = options.tasks or list(study.tasks)
        for name in names:
            if name not in study.tasks:
                raise UserError(f"--tasks {name}: tasks are {', '.join(study.tasks)}")
        reports, refused = run_tasks(study, options.data, names)
        command = shlex.join(["python", "-m", "benchmarks.probes", *(sys.argv[1:] if arguments is None else arguments)])
        tokenizers = {name: load_codec(c.tokenizer).fingerprint() for name, c in study.tokenizers.items()}
        where = machine("fp32")
        of = "; ".join(f"{name} {mark}" for name, mark in tokenizers.items())
        text = markdown(reports, refused, study, [f"`{command}`", "", f"{where}; tokenizers: {of}."])
        print(text)
        if options.markdown:
            with replacing(options.markdown) as path:
                path.write_text(text, encoding="utf-8")
        if options.json:
            content = {
                "command": command,
                "machine": where,
                "tokenizers": tokenizers,
                "study": asdict(study),
                "tasks": {name: asdict(report) for name, report in reports.items()},
                "refused": refused,
            }
            write_json(options.json, content)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if reports else 2


if __name__ == "__main__":
    sys.exit(main())
