"""`hybridlm demo`: what the model in the box can do, in less than a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampling.assemble import GeneratedAudio
from sampling.files import check_writable, write_rows
from sampling.pipeline import AudioModel, load

SPEECH = (
    "Good morning. This is a small model, speaking from your own machine.",
    "The train leaves at seven, and nobody knows where it goes.",
)
MUSIC_SECONDS, SOUND_SECONDS, CONTINUED_SECONDS = 6.0, 4.0, 4.0


def run(output_dir: str | Path = "demo-output", *, model: str | Path = "box") -> list[Path]:
    """Make two sentences of speech, music, a sound, and a continuation of the music; print a table.

    Args:
        output_dir: Where the recordings and their spectrograms go; made where missing.
        model: "box", a model's folder or a hub id. Tags that it does not know are left out.

    Returns:
        The recordings.

    Raises:
        UserError: when the folder can't be written or there is no such model.
    """
    folder = Path(output_dir)
    check_writable(folder / "speech-1.wav")
    began = time.perf_counter()
    audio_model = load(model)
    print(f"loaded {model} in {time.perf_counter() - began:.1f} s")
    print(f"{'file':32s} {'length':>8s} {'speed':>16s}   what")
    paths: list[Path] = []

    def make(name: str, what: str, **request: Any) -> GeneratedAudio:
        began = time.perf_counter()
        audio = audio_model.generate(**request)
        speed = audio.seconds_made / (time.perf_counter() - began)
        path = folder / f"{name}.wav"
        write_rows(audio, [path])
        paths.append(path)
        length = int(audio.lengths[0]) / audio.sample_rate_hz
        print(f"{path!s:32s} {length:6.2f} s {speed:6.1f}x real time   {what}")
        for warning in audio.warnings:
            print(f"  warning: {warning}")
        return audio

    for index, sentence in enumerate(SPEECH, start=1):
        make(f"speech-{index}", sentence, text=sentence, seed=index)
    music = make("music", "tag music", **_tagged(audio_model, "music"), duration=MUSIC_SECONDS, seed=4)
    make("sound", "tag sound", **_tagged(audio_model, "sound"), duration=SOUND_SECONDS, seed=3)
    make(
        "continuation",
        "music.wav, continued",
        **_tagged(audio_model, "music"),
        audio=music.row(0),
        duration=CONTINUED_SECONDS,
        seed=0,
    )
    print(f"{len(paths)} recordings with spectrograms in {folder}, {time.perf_counter() - began:.1f} s in all")
    return paths


def _tagged(model: AudioModel, tag: str) -> Mapping[str, Any]:
    return {"tags": (tag,)} if tag in model.tags else {}
