"""Audio while it is made: drawn frames go through the tokenizer's streaming decoder in small pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sampling.generate import Drawn
from tokenizer.frames import Source, StreamingDecoder, Tokenizer


def stream_audio(
    tokenizer: Tokenizer,
    source: Source,
    prompt: Tensor | None,
    drawn: Iterable[Drawn],
    chunk_frames: int,
) -> Iterator[Float[Tensor, "1 1 S"]]:
    """Decode a prompt and the frames that follow it through one decoder, so that no joint is heard.

    Args:
        tokenizer: Decodes.
        source: Which stream of the frames it decodes.
        prompt: That stream of one row of frames, which becomes the first piece; None for none.
        drawn: One row of frames.
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
        new = frame.codes if source == "codes" else frame.latents
        assert new is not None
        waiting.append(new)
        if len(waiting) == wanted:
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
