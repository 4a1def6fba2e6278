"""What the decoder remembers of a sequence: keys and values, in buffers that grow, join, shrink and forget.

Columns are positions in the buffers; a row's real columns need not be the same as another's, so that rows of different
age and length share one batch. A key carries its position as a rotation, so columns may be moved freely, and where the
middle of a row is forgotten, what comes after is turned back by as many positions: the model never sees a distance that
it was not trained on (StreamingLLM, arXiv 2309.17453, which keeps the first positions as sinks of attention).

Shapes: B rows, G key-value heads, N columns, E width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenizer.transformer import rotate

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines for x at positions (B, N)."""
BLOCK = 256
"""Columns by which buffers grow."""


@dataclass(kw_only=True, slots=True)
class KeyValueCache:
    """Keys and values of every layer, in buffers that grow by blocks; `Decoder.forward` writes into it."""

    keys: list[Tensor]
    """Per layer (B, G, capacity, E); the first `length` columns are filled."""
    values: list[Tensor]
    length: int
    key_mask: Tensor | None
    """(B, capacity) bool, False for padding; None when no row has padding."""
    first_layer: int = 0
    """Number of the layer that `keys[0]` is of."""
    turns: tuple[Tensor, Tensor] | None = None
    """Cosines and sines (capacity, E) of the positions, from the first."""

    @classmethod
    def empty(cls, first_layer: int = 0) -> KeyValueCache:
        return cls(keys=[], values=[], length=0, key_mask=None, first_layer=first_layer)

    @classmethod
    def join(cls, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        """The rows of all, in order; the shorter ones are padded on the left, where nobody looks."""
        length = max(cache.length for cache in caches)
        shifts = [length - cache.length for cache in caches]

        def joined(parts: Sequence[Tensor]) -> Tensor:
            rows = sum(len(part) for part in parts)
            new = parts[0].new_zeros(rows, parts[0].shape[1], _capacity(length), parts[0].shape[3])
            at = 0
            for part, shift in zip(parts, shifts, strict=True):
                new[at : at + len(part), :, shift:length] = part[:, :, : length - shift]
                at += len(part)
            return new

        masks = [
            torch.cat([torch.zeros(len(known), shift, dtype=torch.bool, device=known.device), known], dim=1)
            for known, shift in zip([cache.real() for cache in caches], shifts, strict=True)
        ]
        return cls(
            keys=[joined([cache.keys[layer] for cache in caches]) for layer in range(len(caches[0].keys))],
            values=[joined([cache.values[layer] for cache in caches]) for layer in range(len(caches[0].keys))],
            length=length,
            key_mask=_with_room(torch.cat(masks)),
            first_layer=caches[0].first_layer,
        )

    def real(self) -> Bool[Tensor, "B N"]:
        """Which of the filled columns are no padding."""
        if self.key_mask is not None:
            return self.key_mask[:, : self.length]
        rows = self.keys[0]
        return torch.ones(rows.shape[0], self.length, dtype=torch.bool, device=rows.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, L, E) after the first `length` columns; return views of all keys and values so far."""
        end, layer = self.length + keys.shape[2], layer - self.first_layer
        if layer == len(self.keys):
            self.keys.append(_grow(keys, None, end))
            self.values.append(_grow(values, None, end))
        elif end > self.keys[layer].shape[2]:
            self.keys[layer] = _grow(keys, self.keys[layer], end)
            self.values[layer] = _grow(values, self.values[layer], end)
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def rotation(self, x: Tensor, positions: Int[Tensor, "B L"], rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What `rotation` gives for the next positions, looked up: no row has more of them than there are columns."""
        end = self.length + positions.shape[1]
        if self.turns is None or len(self.turns[0]) < end:
            every = torch.arange(_capacity(end), device=positions.device)[None]
            cosines, sines = rotation(x, every)
            self.turns = cosines[0, 0], sines[0, 0]
        return self.turns[0][positions][:, None], self.turns[1][positions][:, None]

    def extend_mask(self, key_mask: Bool[Tensor, "B L"] | None, length: int) -> Bool[Tensor, "B capacity"]:
        """Record the padding of `length` further columns, and return the mask of all columns.

        Args:
            key_mask: Of these; None: all are real.
            length: How many.
        """
        rows = self.keys[0] if self.keys else key_mask
        assert rows is not None, "a cache without keys has a mask to begin with"
        end = self.length + length
        if self.key_mask is None or self.key_mask.shape[1] < end:
            # Everything is visible until a call says otherwise.
            longer = torch.ones(rows.shape[0], end + BLOCK, dtype=torch.bool, device=rows.device)
            if self.key_mask is not None:
                longer[:, : self.length] = self.key_mask[:, : self.length]
            self.key_mask = longer
        if key_mask is not None:
            self.key_mask[:, self.length : end] = key_mask
        return self.key_mask

    def select(self, rows: Int[Tensor, " R"]) -> KeyValueCache:
        """A new cache with these rows, in this order, repeats allowed."""
        return KeyValueCache(
            keys=[k[rows] for k in self.keys],
            values=[v[rows] for v in self.values],
            length=self.length,
            key_mask=None if self.key_mask is None else self.key_mask[rows],
            first_layer=self.first_layer,
            turns=self.turns,
        )

    def compact(self) -> KeyValueCache:
        """Without the first columns, as far as they are padding in every row."""
        first = int(self.real().any(dim=0).to(torch.int8).argmax())
        if first == 0:
            return self
        return KeyValueCache(
            keys=[_grow(k, None, self.length - first, k[:, :, first : self.length]) for k in self.keys],
            values=[_grow(v, None, self.length - first, v[:, :, first : self.length]) for v in self.values],
            length=self.length - first,
            key_mask=_with_room(self.real()[:, first:]),
            first_layer=self.first_layer,
            turns=self.turns,
        )

    def forget(self, sinks: Int[Tensor, " B"], dropped: Int[Tensor, " B"], rotation: Rotation) -> KeyValueCache:
        """A new cache without the `dropped` positions of each row that come after its first `sinks`; and without
        columns that are padding in every row.

        Args:
            sinks: Positions that stay, at most as many as a row has.
            dropped: Of each row; 0 for a row that keeps all. The next position of the row is as much smaller.
            rotation: Of the decoder (`Decoder.rotation`).
        """
        real = self.real()
        number = real.long().cumsum(dim=1) - 1  # of a real column in its row
        later = number >= (sinks + dropped)[:, None]
        keep = real & ((number < sinks[:, None]) | later)
        length = int(keep.sum(dim=1).max())
        # A stable sort puts what goes before what stays, and leaves the order among the latter as it is.
        columns = keep.to(torch.int8).argsort(dim=1, stable=True)[:, self.length - length :]  # (B, length)
        turn = torch.where(later.gather(1, columns), -dropped[:, None], 0)
        turned = rotation(self.keys[0], turn)

        def kept(x: Tensor) -> Tensor:
            return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        return KeyValueCache(
            keys=[_grow(k, None, length, rotate(kept(k), *turned)) for k in self.keys],
            values=[_grow(v, None, length, kept(v)) for v in self.values],
            length=length,
            key_mask=_with_room(keep.gather(1, columns)),
            first_layer=self.first_layer,
            turns=self.turns,
        )


def _capacity(length: int) -> int:
    return math.ceil(length / BLOCK) * BLOCK


def _grow(like: Tensor, old: Tensor | None, length: int, filled: Tensor | None = None) -> Tensor:
    """A buffer for `length` columns, of the rows and heads of `like`; it begins with what is `old` or `filled`."""
    b, g, _, e = like.shape
    new = like.new_zeros(b, g, _capacity(length), e)
    for content in (old, filled):
        if content is not None:
            new[:, :, : content.shape[2]] = content
    return new


def _with_room(mask: Bool[Tensor, "B N"]) -> Bool[Tensor, "B capacity"] | None:
    """What comes after is visible until a call says otherwise; None where everything is."""
    if bool(mask.all()):
        return None
    room = torch.ones(mask.shape[0], BLOCK, dtype=torch.bool, device=mask.device)
    return torch.cat([mask, room], dim=1)
