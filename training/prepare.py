"""Turning sources into caches: decode, resample and encode every clip once, go on after a kill, skip what is bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import nn

from hybridlm.checkpoint import open_tokenizer
from tokenizer.audio import audio_blocks
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import AudioFrames, Tokenizer
from training.background import in_order
from training.manifest import Clip, Manifest, read_manifest
from training.progress import ClipMeter
from training.shards import ShardWriter, Stream

Arrays = dict[str, npt.NDArray[Any]]
_PIECE_S = 20.0
"""Longer clips are decoded and encoded piece by piece."""
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    """What `prepare` did."""

    num_clips: int
    """Clips in the cache now."""
    num_written: int
    """Clips that were not there before."""
    seconds: float
    """Audio written now."""
    problems: list[str]
    """One line for each skipped clip; also in the cache's `problems.txt`."""


def prepare_audio(
    source: Path | Manifest,
    output: Path,
    *,
    sample_rate_hz: int = 24_000,
    workers: int = 2,
    split: str | None = None,
    console: Console | None = None,
) -> PrepareReport:
    """Decode and resample every clip of `source` into a cache of 16-bit mono audio, for training tokenizers.

    Args:
        source: A manifest, or whatever `read_manifest` takes.
        output: The cache's folder. Clips that it holds already are not decoded again; afterwards it lists exactly the
            clips of `source`.
        sample_rate_hz: Rate to resample to.
        workers: Threads that decode.
        split: Keep only this split.
        console: Where progress and problems go; standard error by default.

    Raises:
        UserError: no usable clip, or a folder that cannot be written or holds something else.
    """

    def decode(clip: Clip) -> Arrays:
        blocks = audio_blocks(clip.audio, sample_rate_hz, clip.start, clip.read_duration, _PIECE_S)
        pieces = [(block[0].clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).numpy() for block in blocks]
        return {"audio": np.concatenate(pieces)[:, None]}

    writer = ShardWriter(
        Path(output),
        kind="audio",
        streams={"audio": Stream(dtype="int16", width=1)},
        about={"sample_rate_hz": sample_rate_hz},
    )
    with writer:
        return _fill(writer, source, decode, float(sample_rate_hz), workers, split, console)


def prepare(
    source: Path | Manifest,
    output: Path,
    tokenizer: Tokenizer | str | Path = "box",
    *,
    workers: int = 2,
    split: str | None = None,
    latent_dtype: Literal["float16", "float32"] = "float16",
    features: bool = True,
    console: Console | None = None,
) -> PrepareReport:
    """Encode every clip of `source` into a cache of codes, latents and features, for training language models.

    Long clips pass through the streaming encoder piece by piece, so memory stays bounded.

    Args:
        source: A manifest, or whatever `read_manifest` takes.
        output: The cache's folder. Clips that it holds already are not encoded again; afterwards it lists exactly the
            clips of `source`.
        tokenizer: A tokenizer, or the name or folder of one (or of a model that has one).
        workers: Threads that decode and encode.
        split: Keep only this split.
        latent_dtype: How latents and features are stored.
        features: Whether features are stored, where the tokenizer has any.
        console: Where progress and problems go; standard error by default.

    Raises:
        UserError: no usable clip, a folder that cannot be written, or one made by another tokenizer (both are named).
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = open_tokenizer(tokenizer)
    encoder: Tokenizer = tokenizer
    streams = token_streams(encoder, latent_dtype, features=features)

    def encode(clip: Clip) -> Arrays:
        return encode_clip(clip, encoder, streams)

    writer = ShardWriter(
        Path(output),
        kind="tokens",
        streams=streams,
        about={
            "tokenizer": f"{encoder.name} {encoder.fingerprint()}",
            "frame_rate_hz": encoder.frame_rate_hz,
            "codebook_size": encoder.codebook_size,
        },
    )
    with writer:
        return _fill(writer, source, encode, encoder.frame_rate_hz, workers, split, console)


def token_streams(
    tokenizer: Tokenizer, latent_dtype: Literal["float16", "float32"], *, features: bool = True
) -> dict[str, Stream]:
    """The arrays of a clip: `codes`, `latents`, and `features` where the tokenizer has any and they are wanted."""
    if tokenizer.codebook_size > 1 << 16:
        raise ValueError(f"codebook_size={tokenizer.codebook_size} must be at most 65536 to be stored in 16 bits")
    streams = {
        "codes": Stream(dtype="uint16", width=tokenizer.num_codebooks),
        "latents": Stream(dtype=latent_dtype, width=tokenizer.latent_dim),
    }
    if features and tokenizer.feature_dim:
        streams["features"] = Stream(dtype=latent_dtype, width=tokenizer.feature_dim)
    return streams


def encode_clip(clip: Clip, tokenizer: Tokenizer, streams: dict[str, Stream]) -> Arrays:
    """Read, resample and encode a clip; a long one passes through the streaming encoder piece by piece.

    Raises:
        UserError: what is not audio, damaged or empty, or frames that do not fit the streams' types.
    """
    device = torch.device("cpu")
    if isinstance(tokenizer, nn.Module):
        device = next((p.device for p in tokenizer.parameters()), device)
    blocks = audio_blocks(clip.audio, tokenizer.sample_rate_hz, clip.start, clip.read_duration, _PIECE_S)
    with torch.inference_mode():
        first, second = next(blocks), next(blocks, None)
        parts: list[AudioFrames] = []
        if second is None:
            parts.append(tokenizer.encode(first[None].to(device)))
        else:
            stream = tokenizer.streaming_encoder()
            parts += [stream.push(first[None].to(device)), stream.push(second[None].to(device))]
            parts += [stream.push(block[None].to(device)) for block in blocks]
            parts.append(stream.flush())
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in streams}
        for part in parts:
            rows["codes"].append(part.codes[0].T)  # (T, K)
            rows["latents"].append(part.latents[0])
            if "features" in rows:
                assert part.features is not None, "a tokenizer with feature_dim > 0 gives features"
                rows["features"].append(part.features[0])
        arrays = {name: torch.cat(pieces).cpu().numpy() for name, pieces in rows.items()}
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(streams[name].dtype)
        if name != "codes" and not np.isfinite(arrays[name]).all():
            raise UserError(f"{clip.audio}: its {name} do not fit {streams[name].dtype}; leave it out or use float32")
    return arrays


def _fill(
    writer: ShardWriter,
    source: Path | Manifest,
    work: Callable[[Clip], Arrays],
    rows_per_second: float,
    workers: int,
    split: str | None,
    console: Console | None,
) -> PrepareReport:
    """Write what is missing, in the order of the source, whatever the number of workers; then write the index."""
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    console = console or Console(stderr=True)
    manifest = source if isinstance(source, Manifest) else read_manifest(Path(source), split)
    problems = list(manifest.problems)
    missing: list[tuple[Clip, str]] = []
    gone: set[str] = set()
    planned: set[str] = set()
    for clip in manifest.clips:
        try:
            status = clip.path.stat()
        except OSError as error:
            problems.append(f"{clip.path}: {error.strerror}")
            gone.add(clip.key)
            continue
        stamp = f"{status.st_size}-{status.st_mtime_ns}"
        if clip.key not in planned and writer.places.get(clip.key, ("", None))[0] != stamp:
            missing.append((clip, stamp))
        planned.add(clip.key)
    written, seconds = 0, 0.0
    with ClipMeter(console, [clip for clip, _ in missing], doing="preparing", done="prepared") as meter:
        for (clip, stamp), result in in_order(missing, lambda job: work(job[0]), workers):
            if isinstance(result, UserError):
                problems.append(str(result))
                gone.add(clip.key)
                meter.advance(clip, 0.0)
                continue
            writer.append(clip.key, stamp, result)
            duration = len(next(iter(result.values()))) / rows_per_second
            written, seconds = written + 1, seconds + duration
            meter.advance(clip, duration)
    count = writer.finish((clip.key, _record(clip)) for clip in manifest.clips if clip.key not in gone)
    with replacing(writer.folder / "problems.txt") as temporary:
        temporary.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    _report(console, writer.folder, count, written, problems)
    if count == 0:
        raise UserError(f"{manifest.source} has no usable clip ({len(problems)} problems, the first: {problems[0]})")
    return PrepareReport(num_clips=count, num_written=written, seconds=seconds, problems=problems)


def _report(console: Console, folder: Path, count: int, written: int, problems: Sequence[str]) -> None:
    for problem in problems[:_PROBLEMS_SHOWN]:
        console.print(f"skipped: {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        text = f"{len(problems)} clips skipped, all listed in {folder / 'problems.txt'}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    text = f"{folder}: {count} clips, {written} of them new"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _record(clip: Clip) -> dict[str, Any]:
    return {"split": clip.split, "text": clip.text, "tags": list(clip.tags), "labels": clip.labels}
