"""From a request to files: several outputs, their names, WAV or FLAC with a spectrogram beside each."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float
from torch import Tensor

from sampling.assemble import GeneratedAudio
from sampling.controls import Controls, changed
from sampling.longform import PAUSE_SECONDS, LongForm, segment_sentences
from sampling.pipeline import load
from sampling.plan import check_name
from sampling.streamed import check_format, write_streams
from tokenizer.audio import write_audio, write_spectrogram
from tokenizer.errors import UserError
from tokenizer.files import read_text, replacing

SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16"}


def run(
    *,
    model: str | Path = "box",
    adapter: str | Path | None = None,
    text: str | None = None,
    text_file: str | Path | None = None,
    tags: Sequence[str] = (),
    audio: str | Path | None = None,
    reference: str | Path | None = None,
    reference_text: str | None = None,
    duration: float | None = None,
    num_samples: int = 1,
    seed: int | None = None,
    device: str = "cpu",
    output: str | Path = "output.wav",
    save_plan: str | Path | None = None,
    precision: str = "fp32",
    compile: bool = False,
    stream: bool = False,
    form: str | None = None,
    max_drift: float | None = None,
    pause: float | None = None,
    json_file: str | Path | None = None,
    **changes: float | int | None,
) -> list[Path]:
    """`hybridlm generate`: make `num_samples` recordings, write them and print one line for each.

    Args:
        model: "box", a model's folder or a hub id.
        adapter: An adapter of that model.
        text: What to say; None for music, sound or a continuation.
        text_file: A file of it instead.
        tags: Names of tags, such as "music".
        audio: A recording to continue.
        reference: A recording to sound like.
        reference_text: What is said in it.
        duration: Seconds to make; for text, a limit.
        num_samples: How many; the i-th equals a single one made with `seed + i`.
        seed: None draws a seed, which is printed.
        device: "cpu", "cuda", ...
        output: WAV or FLAC; several become NAME-1.wav, NAME-2.wav, ...; "-" for standard output.
        save_plan: Where what `hybridlm render` reads goes, all recordings in one file; None for nowhere.
        precision: Of the weights (`AudioModel.pack`).
        compile: Compile a frame's step first, which pays for long recordings only.
        stream: Write each recording while it is made.
        form: "wav" or "pcm", for output "-".
        max_drift: See `LongForm`.
        pause: Its `pause_seconds`; None for the default.
        json_file: Where figures go, with those of drift; None for nowhere.
        changes: Fields of `Controls`; None for the default.

    Returns:
        The audio files; each has a spectrogram of the same name ending in .png.

    Raises:
        UserError: for a request that makes no sense, or a place that can't be written; before anything is generated.
        KeyboardInterrupt: on Ctrl-C, after what was made is written.
    """
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples} must be at least 1")
    if text_file is not None:
        if text is not None:
            raise UserError(f"text and text_file={str(text_file)!r} are two texts; give one of them")
        text = read_text(Path(text_file))
    controls = changed(Controls(), **changes)
    long_form = LongForm(max_drift=max_drift, pause_seconds=PAUSE_SECONDS if pause is None else pause)
    to_stdout = check_format(output, form)
    if to_stdout and num_samples > 1:
        raise UserError(f"num_samples={num_samples} recordings can't share standard output; make one, or name a file")
    paths = [Path(output)] if to_stdout else output_paths(Path(output), num_samples)
    if not to_stdout:
        check_writable(paths[0])
    if json_file is not None:
        check_writable(Path(json_file))
    if (stream or to_stdout or json_file is not None) and save_plan is not None:
        raise UserError("save_plan needs the whole recording at once; leave out stream, json and standard output")
    if save_plan is not None:
        check_writable(check_name(Path(save_plan)))
    seed = secrets.randbelow(2**31) if seed is None else seed
    guided = controls.guidance(with_text=text is not None) != 1
    rows = num_samples * (2 if guided else 1) if compile else 0
    audio_model = load(model, device=device, adapter=adapter, precision=precision, compile_rows=rows)
    for line in audio_model.told:
        print(line, file=sys.stderr if to_stdout else sys.stdout)
    asked: dict[str, Any] = {
        "text": text,
        "tags": tags,
        "audio": audio,
        "reference": reference,
        "reference_text": reference_text,
        "duration": duration,
        "seed": seed,
        "controls": controls,
        "long_form": long_form,
    }
    whole = controls.loudness is not None or save_plan is not None
    rate, most = audio_model.tokenizer.frame_rate_hz, audio_model.model.config.max_frames
    in_segments = segment_sentences(text, duration, long_form, rate, most) is not None
    if stream or to_stdout or json_file is not None or (in_segments and not whole):
        figures = None if json_file is None else Path(json_file)
        write_streams(audio_model, {**asked, "measure_drift": figures is not None}, paths, form=form, json_file=figures)
        return paths
    began = time.perf_counter()
    made = audio_model.generate(
        **asked, num_samples=num_samples, keep_plan=save_plan is not None, keep_interrupted=True
    )
    took = time.perf_counter() - began
    write_rows(made, paths)
    if made.plan is not None and save_plan is not None:
        made.plan.save(save_plan)
    tell_rows(made, paths, took)
    if made.interrupted:
        raise KeyboardInterrupt
    return paths


def tell_rows(made: GeneratedAudio, paths: Sequence[Path], took_s: float) -> None:
    """Print a line for each recording, and the warnings."""
    for row, path in enumerate(paths[: len(made.lengths)]):
        length = int(made.lengths[row]) / made.sample_rate_hz
        print(f"{path}  {length:.2f} s  {made.seconds_made / took_s:.1f}x real time  seed {made.seed + row}")
    for warning in made.warnings:
        print(f"warning: {warning}")


def write_rows(audio: GeneratedAudio, paths: Sequence[Path]) -> None:
    """Write every row to its file, and its spectrogram beside it under the same name ending in .png."""
    for row, path in enumerate(paths[: len(audio.lengths)]):
        write_audio(path, audio.row(row), audio.sample_rate_hz)
        write_spectrogram(path.with_suffix(".png"), audio.row(row), audio.sample_rate_hz)


def output_paths(output: Path, count: int) -> list[Path]:
    """`output` itself for one file; NAME-1.wav, NAME-2.wav, ... for several.

    Raises:
        UserError: when the name ends in neither .wav nor .flac.
    """
    if output.suffix.lower() not in SUBTYPES:
        raise UserError(f"output={str(output)!r} must end in .wav or .flac")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(1, count + 1)]


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try it, so that an output that can't be written is told before the work is done.

    Raises:
        UserError: when the folder can't be made or written, or `path` is a folder.
    """
    if path.is_dir():
        raise UserError(f"output={str(path)!r} is a folder; add the name of a file, such as {path / 'audio.wav'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"output={str(path)!r} can't be written ({error.strerror}); choose a folder that you may write to"
        ) from error


def tell_figures(figures: Mapping[str, Any], json_file: str | Path | None) -> None:
    """Print figures, one a line, and write them as JSON where a file is named.

    What `figures["undefined"]` names is printed with the reason that stands there.
    """
    if json_file is not None:
        with replacing(Path(json_file)) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    reasons = figures.get("undefined", {})
    for name, value in figures.items():
        if name in reasons:
            value = f"undefined: {reasons[name]}"
        if name != "undefined":
            print(f"{name:30s} {value:.4g}" if isinstance(value, float) else f"{name:30s} {value}")


class AudioWriter:
    """A WAV or FLAC file written piece by piece under a temporary name, and given its own name only when complete."""

    def __init__(self, path: Path, sample_rate_hz: int) -> None:
        output_paths(path, 1)
        check_writable(path)
        self.path = path
        self.num_samples = 0
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        self._file = soundfile.SoundFile(
            self._partial, "w", samplerate=sample_rate_hz, channels=1, subtype=SUBTYPES[path.suffix.lower()]
        )

    def __enter__(self) -> AudioWriter:
        return self

    def write(self, waveform: Float[Tensor, "1 1 S"]) -> None:
        """Append samples, clipped to [-1, 1]."""
        samples = waveform.reshape(-1).clamp(-1.0, 1.0).cpu().numpy().astype(np.float32)
        try:
            self._file.write(samples)
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(f"output={str(self.path)!r} can't be written ({error}); is the disk full?") from error
        self.num_samples += len(samples)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)
