"""The tiny model as a folder, the form in which every command takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridlm.checkpoint import save_model
from tests.support.tiny_audio_model import tiny_model


def save_tiny_model(folder: Path, representation: str = "hybrid", **settings: Any) -> Path:
    """Write the folder that `--model` takes; `settings` as of `tiny_model`. Returns the folder."""
    made = tiny_model(representation, **settings)
    save_model(folder, made.model, made.tokenizer, made.text, card="# Tiny\n\nRandom weights, for tests.\n")
    return folder
