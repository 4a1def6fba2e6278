"""Writing files so that a crash, a kill or a full disk leaves the old file whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes `path`'s place when the block ends without an error.

    Missing parent folders are made. The temporary name keeps the suffix, which many writers take the format from.

    Raises:
        UserError: when the folder cannot be written or the disk is full; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written: {reason}; choose another place or make room there") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def read_text(path: Path) -> str:
    """A file of text, in UTF-8.

    Raises:
        UserError: no such file, or another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; give a file of text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it, for example with iconv") from error
