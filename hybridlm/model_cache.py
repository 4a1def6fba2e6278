"""All that a model remembers of its rows from frame to frame, so that rows join, leave and forget as one.

Shapes: B rows, D latent, w latents of the short path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hybridlm.cache import KeyValueCache, Rotation
from hybridlm.reader import Page
from tokenizer.transformer import TransformerState


@dataclass(kw_only=True, slots=True)
class ModelCache:
    """What generation remembers of its past; `HybridLM.step` extends it in place."""

    attention: KeyValueCache
    positions: Int[Tensor, "B 1"]
    """Of the next frame."""
    recent: Float[Tensor, "B w D"] | None
    """The last latents (normalized), for the short path."""
    page: Page | None = None
    """The text and the place in it, of a model with a reader."""
    slices: TransformerState | None = None
    """What the layers over the continuous input remember, of a model that has such."""

    def select(self, rows: Int[Tensor, " R"]) -> ModelCache:
        """A new cache with these rows, in this order, repeats allowed."""
        return ModelCache(
            attention=self.attention.select(rows),
            positions=self.positions[rows],
            recent=None if self.recent is None else self.recent[rows],
            page=None if self.page is None else self.page.select(rows),
            slices=None if self.slices is None else self.slices.select(rows),
        )

    @classmethod
    def join(cls, caches: Sequence[ModelCache]) -> ModelCache:
        """The rows of all in one cache, in order, whatever they have seen so far."""
        first = caches[0]
        return cls(
            attention=KeyValueCache.join([cache.attention for cache in caches]),
            positions=torch.cat([cache.positions for cache in caches]),
            recent=None if first.recent is None else torch.cat([c.recent for c in caches if c.recent is not None]),
            page=None if first.page is None else Page.join([c.page for c in caches if c.page is not None]),
            slices=None
            if first.slices is None
            else TransformerState.join([c.slices for c in caches if c.slices is not None]),
        )

    def compact(self) -> ModelCache:
        """The same, without the columns that only rows which have left had use for."""
        return replace(self, attention=self.attention.compact())

    def forget(self, sinks: Int[Tensor, " B"], dropped: Int[Tensor, " B"], rotation: Rotation) -> ModelCache:
        """A new cache that has never seen the `dropped` positions after the first `sinks` of each row."""
        return replace(
            self,
            attention=self.attention.forget(sinks, dropped, rotation),
            positions=self.positions - dropped[:, None],
        )
