"""The committed recordings as a corpus for studies: whole ones to train on, parts of the others to probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data"


def write_parts(folder: Path) -> Path:
    """A manifest: three recordings of split train, and of split test one whole one and 12 parts, labelled by `kind`.

    Parts of `speech` are of set `parts`, as are those of `music`; each has a `fold` of three.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"path": "kathleen-1.opus", "split": "train", "set": "read", "text": "Author of the danger trail."},
        {"path": "breakbeat.opus", "split": "train", "set": "loops", "tags": ["music"]},
        {"path": "saxophone.opus", "split": "train", "set": "parts", "kind": "music", "fold": 0},
        {"path": "kathleen-2.opus", "split": "test", "set": "read", "kind": "speech", "text": "In the superlative."},
    ]
    for number in range(12):
        name, kind = (("kerstin", "speech"), ("tabla", "music"))[number % 2]
        start = 0.3 * (number // 2)
        part = {"path": f"{name}.opus", "start": start, "end": start + 0.3}
        lines.append({**part, "split": "test", "set": "parts", "kind": kind, "fold": number // 4})
    for line in lines:
        link = folder / line["path"]
        if not link.exists():
            link.symlink_to(DATA / line["path"])
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest
