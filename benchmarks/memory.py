"""Peak memory of `generate` and `evaluate` on a CPU, above a process that only imports torch.

    python benchmarks/memory.py --data FOLDER_OR_MANIFEST [--split test] [--model DIR] [--duration 10] [--json FILE]

Each runs in a process of its own through the command line; the kernel's peak resident set is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


def peak_bytes(command: list[str], log: Path) -> int:
    """Run to the end and return the peak resident set of the process.

    Raises:
        SystemExit: when the command fails; its output is shown.
    """
    with log.open("wb") as output:
        process = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8', errors='replace')}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="box")
    parser.add_argument("--data", help="a folder or manifest for `evaluate`; left out, only `generate` is measured")
    parser.add_argument("--split")
    parser.add_argument("--duration", type=float, default=10.0)
    parser.add_argument("--text", default="It is a truth universally acknowledged that the train was late.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / "log.txt", str(Path(folder) / "output.wav")
        program = [sys.executable, "-m", "hybridlm.cli"]
        generate = [*program, "generate", "--model", args.model, "--output", output, "--duration", str(args.duration)]
        commands = {
            "generate, no text": generate,
            "generate, text": [*generate, "--text", args.text],
            "generate, 4 guided": [*generate, "--num-samples", "4", "--cfg", "2"],
        }
        if args.data:
            split = ["--split", args.split] if args.split else []
            commands["evaluate"] = [*program, "evaluate", "--model", args.model, "--data", args.data, *split]
        base = peak_bytes([sys.executable, "-c", "import torch"], log)
        report = {"import torch": base}
        print(f"{'import torch':20s} {base / 2**30:6.2f} GiB")
        for name, command in commands.items():
            report[name] = peak_bytes(command, log)
            above = (report[name] - base) / 2**30
            print(f"{name:20s} {report[name] / 2**30:6.2f} GiB   {above:+.2f} above")
    if args.json:
        args.json.write_text(json.dumps({"peak_bytes": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
