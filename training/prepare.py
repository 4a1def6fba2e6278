"""Turning sources into caches: decode, resample and encode every clip once, go on after a kill, skip what is bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from tokenizer.text import TextTokenizer
from training.background import in_order
from training.layouts import CacheLayout, Stream
from training.letters import Letters, letters_of
from training.manifest import Clip, Manifest, read_manifest
from training.processes import Processes
from training.progress import ClipMeter
from training.shards import ShardWriter
from training.silent_ends import SilentEnds

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
    num_trimmed: int = 0
    """Clips written now that lost silence at their ends."""
    trimmed_s: float = 0.0
    """Seconds of it."""
    letters: Letters | None = None
    """How well text pieces know the texts, where some were given."""


def prepare_audio(
    source: Path | Manifest,
    output: Path,
    *,
    sample_rate_hz: int = 24_000,
    workers: int = 2,
    split: str | None = None,
    trim_silence_s: float | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
) -> PrepareReport:
    """Decode and resample every clip of `source` into a cache of 16-bit mono audio, for training tokenizers.

    Args:
        source: A manifest, or whatever `read_manifest` takes.
        output: The cache's folder. Clips that it holds already are not decoded again; afterwards it lists exactly the
            clips of `source`.
        sample_rate_hz: Rate to resample to.
        workers: Threads that decode.
        split: Keep only this split.
        trim_silence_s: Seconds of silence (below -50 dB) that stay at a clip's ends; None: all of it. Clips that are
            silent throughout are skipped.
        console: Where progress and problems go; standard error by default.
        processes: That share the work, all with the same arguments, on a folder that all see; one by default.

    Raises:
        UserError: no usable clip, or a folder that cannot be written or holds something else.
    """

    trim = None if trim_silence_s is None else SilentEnds(trim_silence_s)

    def decode(clip: Clip) -> Arrays:
        clip = clip if trim is None else trim(clip)
        blocks = audio_blocks(clip.audio, sample_rate_hz, clip.start, clip.read_duration, _PIECE_S)
        pieces = [(block[0].clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).numpy() for block in blocks]
        return {"audio": np.concatenate(pieces)[:, None]}

    def open_writer(rank: int) -> ShardWriter:
        streams = {"audio": Stream(dtype="int16", width=1)}
        about = {"sample_rate_hz": sample_rate_hz, "trim_silence_s": trim_silence_s}
        return ShardWriter(Path(output), kind="audio", streams=streams, about=about, rank=rank)

    return _fill(open_writer, source, decode, float(sample_rate_hz), workers, split, console, processes, trim)


def prepare(
    source: Path | Manifest,
    output: Path,
    tokenizer: Tokenizer | str | Path = "box",
    *,
    workers: int = 2,
    split: str | None = None,
    trim_silence_s: float | None = None,
    latent_dtype: Literal["float16", "float32"] = "float16",
    features: bool = True,
    text: TextTokenizer | None = None,
    layout: CacheLayout = "rows",
    console: Console | None = None,
    processes: Processes | None = None,
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
        trim_silence_s: Seconds of silence (below -50 dB) that stay at a clip's ends; None: all of it. Clips that are
            silent throughout are skipped.
        latent_dtype: How latents and features are stored.
        features: Whether features are stored, where the tokenizer has any.
        text: Pieces against which the letters of the texts are checked.
        layout: `rows` to read from in any order, or `tar`: tar files in WebDataset's layout, which training reads from
            front to back.
        console: Where progress and problems go; standard error by default.
        processes: That share the work, all with the same arguments, on a folder that all see; one by default.

    Raises:
        UserError: no usable clip, a folder that cannot be written, or one made by another tokenizer (both are named).
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = open_tokenizer(tokenizer)
    encoder: Tokenizer = tokenizer
    streams = token_streams(encoder, latent_dtype, features=features)

    trim = None if trim_silence_s is None else SilentEnds(trim_silence_s)

    def encode(clip: Clip) -> Arrays:
        return encode_clip(clip if trim is None else trim(clip), encoder, streams)

    about = {
        "tokenizer": f"{encoder.name} {encoder.fingerprint()}",
        "frame_rate_hz": encoder.frame_rate_hz,
        "codebook_size": encoder.codebook_size,
        "trim_silence_s": trim_silence_s,
    }

    def open_writer(rank: int) -> ShardWriter:
        return ShardWriter(Path(output), kind="tokens", streams=streams, about=about, layout=layout, rank=rank)

    return _fill(open_writer, source, encode, encoder.frame_rate_hz, workers, split, console, processes, trim, text)


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
    open_writer: Callable[[int], ShardWriter],
    source: Path | Manifest,
    work: Callable[[Clip], Arrays],
    rows_per_second: float,
    workers: int,
    split: str | None,
    console: Console | None,
    processes: Processes | None,
    trim: SilentEnds | None = None,
    text: TextTokenizer | None = None,
) -> PrepareReport:
    """Write what is missing, in the order of the source, whatever the number of workers; then write the index.

    Each process takes its share of the clips by their number; the first writes the index of all.
    """
    processes = processes or Processes()
    with ExitStack() as stack:
        with processes.agreed():
            if workers < 1:
                raise UserError(f"workers={workers} must be at least 1")
            manifest = source if isinstance(source, Manifest) else read_manifest(Path(source), split)
            if 0 < (count := len({clip.key for clip in manifest.clips})) < processes.count:
                raise UserError(
                    f"{manifest.source}: {count} clips are too few for {processes.count} processes; start at most "
                    f"{count}"
                )
            writer = stack.enter_context(open_writer(0)) if processes.rank == 0 else None
        with processes.agreed():
            writer = writer or stack.enter_context(open_writer(processes.rank))
        if console is None or processes.rank:
            console = Console(stderr=True, quiet=processes.rank > 0)
        stamps, problems = _stamps(manifest)
        writer.take_over(stamps)
        shares = _once(manifest.clips, stamps)[processes.rank :: processes.count]
        missing = [clip for clip in shares if writer.places.get(clip.key, ("", None))[0] != stamps[clip.key]]
        with processes.agreed():
            share = _write(writer, missing, stamps, work, rows_per_second, workers, console)
            if trim is not None:
                share.num_trimmed, share.trimmed_s = trim.num_cut, trim.seconds
        everybody = processes.gather(share)
        problems += [problem for each in everybody for problem in each.problems.values()]
        gone = {key for each in everybody for key in each.problems}
        left = [clip for clip in manifest.clips if clip.key in stamps and clip.key not in gone]
        with processes.agreed():
            if processes.rank == 0:
                writer.take_over(stamps)
                writer.finish((clip.key, _record(clip)) for clip in left)
                with replacing(writer.folder / "problems.txt") as temporary:
                    temporary.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
            report = PrepareReport(
                num_clips=len(left),
                num_written=sum(each.num_written for each in everybody),
                seconds=sum(each.seconds for each in everybody),
                problems=problems,
                num_trimmed=sum(each.num_trimmed for each in everybody),
                trimmed_s=sum(each.trimmed_s for each in everybody),
                letters=None if text is None else letters_of((clip.text for clip in left), text),
            )
            _report(console, writer.folder, report)
            if not left:
                why = f"{len(problems)} problems, the first: {problems[0]}"
                raise UserError(f"{manifest.source} has no usable clip ({why})")
    return report


@dataclass(kw_only=True, slots=True)
class _Share:
    """What one process did."""

    num_written: int = 0
    seconds: float = 0.0
    num_trimmed: int = 0
    trimmed_s: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)
    """By the key of the clip."""


def _stamps(manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    """What tells versions of each clip apart, by key, and what is wrong with the manifest and with files not there."""
    problems = list(manifest.problems)
    stamps: dict[str, str] = {}
    found: dict[Path, str] = {}
    for clip in manifest.clips:
        if clip.path not in found:
            try:
                status = clip.path.stat()
            except OSError as error:
                problems.append(f"{clip.path}: {error.strerror}")
                continue
            found[clip.path] = f"{status.st_size}-{status.st_mtime_ns}"
        stamps[clip.key] = found[clip.path]
    return stamps, problems


def _once(clips: Sequence[Clip], stamps: dict[str, str]) -> list[Clip]:
    """Clips that are there, the first of each key."""
    return list({clip.key: clip for clip in reversed(clips) if clip.key in stamps}.values())[::-1]


def _write(
    writer: ShardWriter,
    clips: Sequence[Clip],
    stamps: dict[str, str],
    work: Callable[[Clip], Arrays],
    rows_per_second: float,
    workers: int,
    console: Console,
) -> _Share:
    share = _Share()
    with ClipMeter(console, clips, doing="preparing", done="prepared") as meter:
        for clip, result in in_order(clips, work, workers):
            if isinstance(result, UserError):
                share.problems[clip.key] = str(result)
                meter.advance(clip, 0.0)
                continue
            writer.append(clip.key, stamps[clip.key], result, _record(clip))
            duration = len(next(iter(result.values()))) / rows_per_second
            share.num_written, share.seconds = share.num_written + 1, share.seconds + duration
            meter.advance(clip, duration)
    return share


def _report(console: Console, folder: Path, report: PrepareReport) -> None:
    lines = [f"skipped: {problem}" for problem in report.problems[:_PROBLEMS_SHOWN]]
    if report.problems:
        lines.append(f"{len(report.problems)} clips skipped, all listed in {folder / 'problems.txt'}")
    if report.letters is not None and (line := report.letters.line()):
        lines.append(line)
    if report.num_trimmed:
        lines.append(f"{report.trimmed_s / 60:.1f} min of silence cut off the ends of {report.num_trimmed} clips")
    lines.append(f"{folder}: {report.num_clips} clips, {report.num_written} of them new")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _record(clip: Clip) -> dict[str, Any]:
    return {"split": clip.split, "text": clip.text, "tags": list(clip.tags), "labels": clip.labels}
