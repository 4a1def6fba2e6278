"""Folders of weights: written so that a full disk leaves the one that was there as it was, and told apart."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from tokenizer.errors import UserError


@contextmanager
def written_whole(folder: Path, *, last: str, what: str) -> Iterator[Path]:
    """Give a folder beside `folder` to write to; its files are moved there when the block ends without an error.

    Args:
        folder: Where the files end up; made where missing.
        last: The file that is moved last: a folder cut off in between is told from a whole one by it.
        what: Names the folder in messages.

    Raises:
        UserError: when the folder can't be written or the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield staging
            _move_into_place(staging, folder, last)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"can't write the {what} folder {str(folder)!r} ({reason}); make room or choose another folder; "
            "what was there before is unchanged"
        ) from error


def _move_into_place(staging: Path, folder: Path, last: str) -> None:
    for file in staging.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors lets no one but the owner read
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())
    with suppress(OSError):  # a name that is free takes the whole folder in one step
        staging.chmod(0o755)
        staging.rename(folder)
        return
    files = sorted((file for file in staging.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    for file in files:
        target = folder / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits of names and values, as they are on disk."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
