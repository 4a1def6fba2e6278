"""What tokenizers of a study keep of test recordings: distances clip by clip, for paired comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.codec_quality import choose
from tokenizer.audio import read_audio
from tokenizer.dasheng import DashengTokenizer
from tokenizer.frames import AudioFrames, Tokenizer
from tokenizer.metrics import compare_audio
from training.probe import write_json
from training.runs import RESULT, plain, read_result

FIGURES = {"stoi": 3, "pesq_wb": 2, "mel_distance": 3, "si_sdr_db": 1}
"""Fields of `AudioDistance` that are reported, with digits."""
TITLES = {"stoi": "STOI", "pesq_wb": "PESQ-WB", "mel_distance": "mel distance", "si_sdr_db": "SI-SDR, dB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """Which clips of split test are decoded."""

    speech: tuple[str, ...]
    """Sets that STOI and PESQ are for."""
    clips: int
    """Of each set, evenly spread."""
    seconds: float
    """Of a clip its beginning, at most this much."""
    other: tuple[str, ...] = ()


def decodings(tokenizer: Tokenizer, frames: AudioFrames) -> dict[str, torch.Tensor]:
    """Audio by what it is decoded from; first what the tokenizer is made for: features, where they can be decoded."""
    found = {}
    if isinstance(tokenizer, DashengTokenizer) and frames.features is not None:
        found["features"] = tokenizer.decode_features(frames.features)
    return found | {
        "latents": tokenizer.decode_latents(frames.latents),
        "codes": tokenizer.decode_codes(frames.codes),
    }


def settings_of(config: ReconstructionConfig, data: str) -> dict[str, Any]:
    """What a result says of how it was made."""
    return {"clips_of": {**asdict(config), "data": data}}


def read_reconstruction(config: ReconstructionConfig, data: str, folder: Path) -> dict[str, Any] | None:
    """The result of `reconstruct` in a run's folder, if it is there.

    Raises:
        UserError: it is of other clips.
    """
    return read_result(folder / "reconstruction", settings_of(config, data))


@torch.inference_mode()
def reconstruct(config: ReconstructionConfig, data: str, folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """Code, decode and compare the clips, unless that is done, and print the means as they come, set by set."""
    if read_reconstruction(config, data, folder) is not None:
        return
    rows: list[dict[str, Any]] = []
    rate = tokenizer.sample_rate_hz
    for set_name in (*config.speech, *config.other):
        speech = set_name in config.speech
        for _, clip in choose(Path(data), "test", [set_name], config.clips):
            seconds = min(config.seconds, clip.read_duration or config.seconds)
            waveform = read_audio(clip.audio, rate, clip.start, seconds)
            audio = decodings(tokenizer, tokenizer.encode(waveform[None]))
            for source, made in audio.items():
                distance = compare_audio(waveform[0], made[0, 0, : waveform.shape[-1]], rate, speech=speech)
                found = {field: _finite(getattr(distance, field)) for field in FIGURES}
                rows.append({"set": set_name, "key": clip.key, "from": source, "speech": speech, **found})
        print(_line(name, set_name, [r for r in rows if r["set"] == set_name and r["from"] == rows[0]["from"]]))
    write_json(folder / "reconstruction" / RESULT, {**plain(settings_of(config, data)), "rows": rows})


def _line(name: str, set_name: str, rows: list[dict[str, Any]]) -> str:
    said = []
    for field, digits in FIGURES.items():
        values = [row[field] for row in rows if row[field] is not None]
        said += [f"{TITLES[field]} {sum(values) / len(values):.{digits}f}"] if values else []
    return f"{name} reconstruction of {set_name}: {', '.join(said)}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


Heard = Mapping[str, list[dict[str, Any]]]
"""By variant, a result of `reconstruct` a seed."""


def values_of(heard: Heard, variant: str, source: str, field: str, speech: bool) -> torch.Tensor:
    """(seeds, clips) of one figure; NaN where it is not defined."""
    rows = [
        [
            float("nan") if row[field] is None else row[field]
            for row in result["rows"]
            if row["from"] == source and row["speech"] == speech
        ]
        for result in heard[variant]
    ]
    return torch.tensor(rows, dtype=torch.float64)
