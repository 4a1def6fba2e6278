"""From cached clips to what a model is trained and measured on: prefixes of text and tags, noised latents, their codes.

Shapes: B batch, P prefix, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenizer.frames import AudioFrames, Tokenizer
from tokenizer.text import TextTokenizer

MAX_PIECES = 400
"""Longest prefix; a clip with a longer text is taken without it."""


GOES_ON = "goes_on"
"""Label of a clip whose recording goes on after the clip's end: there the model must not learn to stop."""


class Prefix(NamedTuple):
    """Left-padded text and tags of a batch, each row ending in `<audio>`."""

    ids: Int[Tensor, "B P"]
    mask: Bool[Tensor, "B P"]
    """False for padding."""
    text_mask: Bool[Tensor, "B P"]
    """True for pieces of text."""


def make_prefix(
    text: TextTokenizer, rows: Sequence[tuple[str | None, Sequence[str]]], max_pieces: int | None = None
) -> Prefix:
    """Encode the (text, tags) of each row.

    Args:
        text: Pieces and tags.
        rows: Text (None: none) and tags of each row.
        max_pieces: A row whose prefix would be longer keeps its tags and loses its text.

    Raises:
        UserError: an unknown tag.
    """
    encoded = []
    for words, tags in rows:
        ids = text.encode(words, tags)
        if max_pieces is not None and len(ids) > max_pieces:
            ids = text.encode(None, tags)
        encoded.append((ids, len(tags)))
    columns = max(len(ids) for ids, _ in encoded)
    prefix = torch.full((len(encoded), columns), text.pad_id, dtype=torch.int64)
    mask = torch.zeros(len(encoded), columns, dtype=torch.bool)
    text_mask = torch.zeros_like(mask)
    for row, (ids, num_tags) in enumerate(encoded):
        first = columns - len(ids)
        prefix[row, first:] = torch.tensor(ids)
        mask[row, first:] = True
        text_mask[row, first + num_tags : -1] = True
    return Prefix(prefix, mask, text_mask)


def drop_conditions(
    prefix_mask: Bool[Tensor, "B P"], probability: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B P"]:
    """Hide text and tags of each row with this probability: only the last column, `<audio>`, stays visible."""
    where = generator.device if generator is not None else prefix_mask.device
    dropped = torch.rand(prefix_mask.shape[0], 1, generator=generator, device=where).to(prefix_mask.device)
    audio = torch.zeros_like(prefix_mask)
    audio[:, -1] = True
    return torch.where(dropped < probability, audio, prefix_mask)


def places_in_text(
    text: TextTokenizer, words: str, frames: npt.NDArray[np.float32], length: int
) -> Float[Tensor, " L"]:
    """Where in the pieces of a text the voice is at states 0 .. `length`: 1 in the middle of the first, N of the last.

    Args:
        text: Makes the pieces.
        words: The text.
        frames: Where each character of its normalized form is spoken (`training.align`).
        length: Frames.
    """
    spans = text.spans(words)
    last = len(frames) - 1
    middles = [frames[min(begin, last) : min(max(end, begin + 1), last + 1)].mean() for begin, end in spans]
    # The text begins two frames before its first piece, and is over two after its last.
    times = np.maximum.accumulate([middles[0] - 2.0, *middles, middles[-1] + 2.0])
    times = times + 1e-3 * np.arange(len(times))  # several pieces in one place, one after the other
    # State t predicts frame t, which lasts from t to t + 1.
    states = np.arange(length + 1) + 0.5
    return torch.from_numpy(np.interp(states, times, np.arange(len(times)))).float()


def clip_seed(key: str) -> int:
    """Seed of a clip's noise, from its key alone: the same in any batch, order or process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def with_latents(tokenizer: Tokenizer, frames: AudioFrames, latents: Float[Tensor, "B T D"]) -> AudioFrames:
    """The frames that are scored: noised latents, and the codes of these very latents.

    Codes of cleaner latents would tell a hybrid model what the scored latents do not hold, and its likelihood would
    bound nothing. Always in fp32: a nearest code found in less precision is another code.

    Args:
        tokenizer: What made the frames.
        frames: Clean frames.
        latents: Noised ones; if they are the clean ones, the frames stay as they are.
    """
    if latents is frames.latents:
        return frames
    with torch.autocast(latents.device.type, enabled=False):
        codes = tokenizer.quantize(latents)
    return AudioFrames(codes=codes, latents=latents, lengths=frames.lengths, features=frames.features)


def device_of(tokenizer: Tokenizer) -> torch.device:
    """Where a tokenizer's weights are."""
    if isinstance(tokenizer, nn.Module):
        for tensor in (*tokenizer.parameters(), *tokenizer.buffers()):
            return tensor.device
    return torch.device("cpu")
