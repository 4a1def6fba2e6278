"""Audio while it is made: drawn frames go through the tokenizer's streaming decoder in small pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sampling.generate import Drawn
from sampling.long_run import LongRun
from sampling.monitor import DriftMonitor
from tokenizer.frames import Source, StreamingDecoder, Tokenizer

T = TypeVar("T")


class AudioStream(Iterator[Float[Tensor, "1 1 S"]]):
    """One recording, piece by piece, and what is known of it so far.

    Args:
        pieces: Its samples.
        num_frames: Of the whole recording, a prompt's included, where that is known beforehand.
        monitor: Hears every piece.
        run: What draws a long recording.
        warnings: What is known before the first piece.
    """

    def __init__(
        self,
        pieces: Iterator[Float[Tensor, "1 1 S"]],
        num_frames: int | None,
        monitor: DriftMonitor | None,
        run: LongRun | None,
        warnings: tuple[str, ...],
    ) -> None:
        self._pieces, self._run, self._warnings = pieces, run, warnings
        self.num_frames, self.monitor = num_frames, monitor
        self.num_samples = 0
        """Handed out so far."""

    def __next__(self) -> Float[Tensor, "1 1 S"]:
        piece = next(self._pieces)
        self.num_samples += piece.shape[-1]
        if self.monitor is not None:
            self.monitor.hear(piece)
        return piece

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a listener should know."""
        return (*self._warnings, *(self._run.warnings if self._run else ()))

    @property
    def share_done(self) -> float | None:
        """Of the whole, about; None where that is not known."""
        return None if self._run is None else self._run.share_done

    def report(self) -> dict[str, Any]:
        """Figures for JSON: drift, where it is measured, and where the model was re-anchored."""
        drift = None if self.monitor is None else self.monitor.report()
        return {"drift": drift, "re_anchorings": list(self._run.re_anchorings) if self._run else []}


def watched(frames: Iterable[Drawn | None], see: Callable[[Drawn], None]) -> Iterator[Drawn | None]:
    """The same frames, each shown before it is passed on."""
    for frame in frames:
        if frame is not None:
            see(frame)
        yield frame


def until_interrupted(items: Iterable[T], *, keep: bool) -> tuple[list[T], bool]:
    """All items; with `keep`, on Ctrl-C those that there are, if any, and that it was interrupted."""
    found: list[T] = []
    try:
        found.extend(items)
    except KeyboardInterrupt:
        if not (keep and found):
            raise
        return found, True
    return found, False


def stream_audio(
    tokenizer: Tokenizer,
    source: Source,
    prompt: Tensor | None,
    drawn: Iterable[Drawn | None],
    chunk_frames: int,
) -> Iterator[Float[Tensor, "1 1 S"]]:
    """Decode a prompt and the frames that follow it through one decoder, so that no joint is heard.

    Args:
        tokenizer: Decodes.
        source: Which stream of the frames it decodes.
        prompt: That stream of one row of frames, which becomes the first piece; None for none.
        drawn: One row of frames; at None, what waits is decoded.
        chunk_frames: Frames in a piece; the first drawn frame is a piece of its own, for sound as soon as possible.

    Yields:
        Samples on the CPU; pieces are never empty.
    """
    decoder = tokenizer.streaming_decoder(1, source)
    time = 2 if source == "codes" else 1
    if prompt is not None:
        yield from _decoded(decoder, prompt)
    waiting: list[Tensor] = []
    wanted = 1
    for frame in drawn:
        if frame is not None:
            new = frame.codes if source == "codes" else frame.latents
            assert new is not None
            waiting.append(new)
        if waiting and (frame is None or len(waiting) == wanted):
            yield from _decoded(decoder, torch.cat(waiting, dim=time))
            waiting, wanted = [], chunk_frames
    if waiting:
        yield from _decoded(decoder, torch.cat(waiting, dim=time))
    yield from _decoded(decoder, None)


@torch.no_grad()
def _decoded(decoder: StreamingDecoder, frames: Tensor | None) -> list[Float[Tensor, "1 1 S"]]:
    """The samples of these frames, or (None) what the decoder still holds; no piece where there are none."""
    waveform = decoder.flush() if frames is None else decoder.push(frames)
    return [waveform.float().cpu()] if waveform.shape[-1] else []
