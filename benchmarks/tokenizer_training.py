"""How much audio a second of training takes in: the real loop on the shipped recipes, on noise."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizer_layouts import CONFIGS, small_semantics
from tokenizer.audio import write_audio
from tokenizer.dasheng_encoder import DashengEncoder
from tokenizer.dasheng_weights import save_semantic_encoder
from training.config import apply_overrides, read_yaml, resolve
from training.prepare import prepare_audio
from training.run import task_parts, train_mapping

RECIPES = {"codec-box-whole": ("tokenizer_task", 24_000), "dasheng-small": ("dasheng", 16_000)}
"""By name in configs/: the section of the task, and the rate of its caches."""
NOISE_SECONDS = 20.0


def measure(recipe: str, steps: int, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train the recipe on noise for `steps` to warm up and as many that count.

    The adversary takes part from the first step, where the recipe has one: it does so for most of a run.

    Args:
        recipe: One of `RECIPES`.
        steps: Steps that are timed.
        overrides: Further settings, `key.sub=value`.
    """
    section, rate = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = read_yaml(CONFIGS / f"{recipe}.yaml")
        for key in ("init_from", "init_partial"):
            settings.pop(key, None)
        settings[section]["data"] |= {"caches": [str(_noise(folder, rate))], "rules": [], "validation_fraction": 0.0}
        settings[section].setdefault("losses", {})["adversarial_from_step"] = 0
        if section == "dasheng":
            torch.manual_seed(0)
            save_semantic_encoder(DashengEncoder(small_semantics()), folder / "semantic")
            settings[section]["semantic"] = str(folder / "semantic")
        settings |= {"output": str(folder / "run"), "max_steps": 2 * steps, "log_every": steps, "tensorboard": False}
        settings = apply_overrides(settings, overrides or [])
        train_mapping(settings, recipe)
        lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
        frames_per_s = [line["frames_per_s"] for line in lines if line["kind"] == "train"][-1]
        _, task, _ = resolve(settings, task_parts(settings["task"])[0], where=recipe)
        frame_rate_hz = rate / _hop_length(task)
        return {
            "recipe": recipe,
            "steps": steps,
            "batch_size": task.data.batch_size,
            "segment_s": task.data.segment_frames / frame_rate_hz,
            "audio_s_per_s": frames_per_s / frame_rate_hz,
        }


def _hop_length(task: Any) -> int:
    config = task.tokenizer
    return config.hop_length if hasattr(config, "hop_length") else small_semantics().frame_samples


def _noise(folder: Path, rate: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        noise = 0.1 * torch.randn(1, int(NOISE_SECONDS * rate), generator=generator)
        (folder / "noise").mkdir(exist_ok=True)
        write_audio(folder / "noise" / f"{index}.wav", noise, rate)
    prepare_audio(folder / "noise", folder / "cache", sample_rate_hz=rate)
    return folder / "cache"
