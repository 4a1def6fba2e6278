"""Several documents in one row of the decoder: short clips fill the row that a long one would have alone.

A document is a batch row of the model: its visible prefix and its frames. Only the decoder packs them; what lies before
it (fusion, noise on the history, slices) and behind it (the clean short path, heads, stop, reader) sees documents, each
in a row of its own, and needs to know nothing of packing. Nobody attends across a border, and positions count from each
document's start, so states are those of the document alone.

Shapes: B documents, L columns of a document, R rows, N columns of a row, M real positions, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

PackedKernel = Literal["flash-attn varlen", "FlexAttention", "SDPA with a block mask"]
_FLEX_BLOCK = 128
"""FlexAttention skips whole blocks of so many positions; rows that are a multiple of it are not compiled anew."""
_FLEX_NARROWEST_HEAD = 16


def packed_kernel(device_type: str, *, half: bool, flash: bool, head_dim: int) -> PackedKernel:
    """What attends within documents.

    Args:
        device_type: `cuda`, `cpu`, ...
        half: Whether queries are in half precision, as flash-attn needs them.
        flash: Whether flash-attn is installed.
        head_dim: E.
    """
    if device_type != "cuda":
        return "SDPA with a block mask"
    if flash and half:
        return "flash-attn varlen"
    return "FlexAttention" if head_dim >= _FLEX_NARROWEST_HEAD else "SDPA with a block mask"


@dataclass(frozen=True, kw_only=True)  # no slots: see `decoder.DecoderOutput`
class Packing:
    """Where each position of the documents lies in the rows."""

    source: Int[Tensor, " M"]
    """Of each real position, its place in the flattened documents (B * L), in the order of the rows."""
    target: Int[Tensor, " M"]
    """Its place in the flattened rows (R * N)."""
    documents: Int[Tensor, "R N"]
    """Number of the document at each column, -1 where there is none."""
    positions: Int[Tensor, "R N"]
    """Of each column in its document."""
    ends: Int[Tensor, " B1"]
    """Real positions up to each document's beginning, in the order of the rows, and their number: B + 1 of them."""
    longest: int
    """Real positions of the longest document."""
    shape: tuple[int, int]
    """B and L."""
    kernel: PackedKernel
    """What attends."""

    @classmethod
    def of(cls, rows: Int[Tensor, " B"], real: Bool[Tensor, "B L"], kernel: PackedKernel) -> Packing:
        """Put documents behind each other.

        Args:
            rows: The row of each document; documents of a row keep their order.
            real: Columns that are part of a document; each has one at least.
            kernel: What attends; FlexAttention gets rows of whole blocks.
        """
        multiple = _FLEX_BLOCK if kernel == "FlexAttention" else 1
        order = rows.argsort(stable=True)
        lengths = real.sum(dim=1)  # (B,)
        ends = F.pad(lengths[order].cumsum(dim=0), (1, 0))  # (B + 1,)
        per_row = torch.zeros(int(rows.max()) + 1, dtype=torch.int64, device=rows.device)
        per_row = per_row.index_add(0, rows, lengths)
        columns = -(-int(per_row.max()) // multiple) * multiple
        before_row = F.pad(per_row.cumsum(dim=0), (1, 0))[:-1]  # real positions in earlier rows
        row_of = rows[order]
        start = row_of * columns + ends[:-1] - before_row[row_of]  # (B,), place of each document's first position
        document, column = real[order].nonzero(as_tuple=True)  # (M,) each
        inside = torch.arange(len(document), device=rows.device) - ends[document]
        target = start[document] + inside
        documents = torch.full((len(per_row) * columns,), -1, dtype=torch.int64, device=rows.device)
        positions = torch.zeros_like(documents)
        return cls(
            source=order[document] * real.shape[1] + column,
            target=target,
            documents=documents.index_copy(0, target, order[document]).view(-1, columns),
            positions=positions.index_copy(0, target, inside).view(-1, columns),
            ends=ends,
            longest=int(lengths.max()),
            shape=(real.shape[0], real.shape[1]),
            kernel=kernel,
        )

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (R, N, ...), zero where no document is."""
        return self._moved(x, self.source, self.target, (self.documents.shape[0], self.documents.shape[1]))

    def unpack(self, x: Tensor) -> Tensor:
        """(R, N, ...) to (B, L, ...), zero where the document has no position."""
        return self._moved(x, self.target, self.source, self.shape)

    @staticmethod
    def _moved(x: Tensor, source: Tensor, target: Tensor, shape: tuple[int, int]) -> Tensor:
        flat = x.flatten(0, 1)
        moved = flat.new_zeros(shape[0] * shape[1], *flat.shape[1:]).index_copy(0, target, flat[source])
        return moved.view(*shape, *flat.shape[1:])

    def within(self, after_layer: Callable[[int, Tensor], Tensor] | None) -> Callable[[int, Tensor], Tensor] | None:
        """What is done to documents after each layer, done to rows."""
        if after_layer is None:
            return None

        def packed(layer: int, x: Tensor) -> Tensor:
            documents = self.unpack(x)
            changed = after_layer(layer, documents)
            return x if changed is documents else self.pack(changed)

        return packed

    def mask(self) -> Bool[Tensor, "R 1 N N"] | PackedAttention:
        """What layers take as their mask, made once for all of them."""
        if self.kernel == "flash-attn varlen":
            return Varlen(self)
        return Flex(self) if self.kernel == "FlexAttention" else self.dense_mask()

    def dense_mask(self) -> Bool[Tensor, "R 1 N N"]:
        """True where a column may look; columns without a document see each other, for a softmax needs something."""
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return same.tril()[:, None]


@runtime_checkable
class PackedAttention(Protocol):
    """Attends within documents."""

    def __call__(
        self, q: Float[Tensor, "R H N E"], k: Float[Tensor, "R G N E"], v: Float[Tensor, "R G N E"]
    ) -> Float[Tensor, "R N _"]:
        """Causal attention of queries to grouped keys and values, heads joined."""
        ...


class Varlen:
    """By flash-attn, which takes documents one after another, without rows or padding."""

    def __init__(self, packing: Packing) -> None:
        self._target, self._shape = packing.target, tuple(packing.documents.shape)
        self._ends, self._longest = packing.ends.to(torch.int32), packing.longest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PackedAttention`."""
        from flash_attn import flash_attn_varlen_func

        flat = [x.transpose(1, 2).flatten(0, 1)[self._target] for x in (q, k, v)]  # (M, H, E)
        limits = (self._ends, self._ends, self._longest, self._longest)
        y = flash_attn_varlen_func(*flat, *limits, causal=True).flatten(1)  # (M, H * E)
        rows, columns = self._shape
        return y.new_zeros(rows * columns, y.shape[1]).index_copy(0, self._target, y).view(rows, columns, -1)


class Flex:
    """By FlexAttention, which leaves out blocks in which nobody sees anybody."""

    def __init__(self, packing: Packing) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        documents = packing.documents
        rows, columns = documents.shape
        self._blocks = create_block_mask(
            lambda row, _, query, key: (documents[row, query] == documents[row, key]) & (query >= key),
            *(rows, None, columns, columns),
            device=str(documents.device),
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PackedAttention`."""
        grouped = q.shape[1] != k.shape[1]
        return _flex(q.is_cuda)(q, k, v, block_mask=self._blocks, enable_gqa=grouped).transpose(1, 2).flatten(2)


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Any:
    """FlexAttention, which is fast only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
