"""A few seconds of tones and noise as files, manifest and token cache, and a tiny tokenizer's folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console

from tests.support.tiny_audio_model import SENTENCES, tiny_tokenizer
from tokenizer.audio import write_audio
from training.corpus import prepare

RATE = 24_000


def write_clips(folder: Path, count: int = 8, *, seconds: float = 0.6) -> Path:
    """Write `count` tones of growing length, two of three with text, and a manifest; every fourth is of split test."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        time = torch.arange(int(RATE * (seconds + 0.08 * number))) / RATE
        generator = torch.Generator().manual_seed(number)
        waveform = 0.3 * torch.sin(2 * torch.pi * (200 + 90 * (number % 4)) * time)
        waveform = waveform + 0.02 * torch.randn(time.shape, generator=generator)
        write_audio(folder / f"{number}.wav", waveform[None], RATE)
        line = {"path": f"{number}.wav", "split": "test" if number % 4 == 3 else "train", "set": "tones"}
        if number % 3:
            line |= {"text": SENTENCES[number % len(SENTENCES)], "tags": ["speech"]}
        else:
            line |= {"tags": ["music"]}
        lines.append(json.dumps(line))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def write_cache(folder: Path, count: int = 8, *, seconds: float = 0.6) -> dict[str, str]:
    """Prepare the clips; returns the folders of the `tokenizer`, the `cache` and the `clips`."""
    manifest = write_clips(folder / "clips", count, seconds=seconds)
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    prepare(manifest, folder / "cache", folder / "tokenizer", workers=1, console=Console(file=io.StringIO()))
    return {name: str(folder / name) for name in ("tokenizer", "cache", "clips")}


TINY_MODEL = {
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 64,
    "code_embedding_dim": 16,
    "depth_dim": 16,
    "depth_layers": 1,
    "depth_ffn_dim": 32,
    "num_mixtures": 2,
    "latent_head_dim": 16,
    "latent_head_layers": 1,
    "latent_head_ffn_dim": 32,
    "short_context_frames": 3,
    "short_context_dim": 16,
    "alignment_layer": 1,
    "max_frames": 250,
}
"""Fields of `ModelConfig` for a model that trains in milliseconds."""
