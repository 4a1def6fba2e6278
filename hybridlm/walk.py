"""The way of a model with a reader through audio that is given: its place before each state, found frame by frame.

The layers up to the first that reads know nothing of the place, so they run over all frames at once; only the layers
above are walked, all rows of a batch side by side.

Shapes: B batch, N positions, L states, C hidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridlm.cache import KeyValueCache
from hybridlm.decoder import Decoder
from hybridlm.reader import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """Where the states of a sequence found the place, and what they became there."""

    states: Float[Tensor, "B L C"]
    """After the decoder's final norm."""
    before: Float[Tensor, "B L"]
    """The place that each state found, where the state before had arrived."""
    places: list[Float[Tensor, "B L"]]
    """Where each layer that moves moved; the last is where the states arrived."""


@torch.no_grad()
def walk(
    decoder: Decoder,
    reading: Reading,
    x: Float[Tensor, "B N C"],
    positions: Int[Tensor, "B N"],
    key_mask: Bool[Tensor, "B N"] | None,
) -> Walk:
    """Run the decoder over a whole sequence, every state from where the one before it arrived.

    Args:
        decoder: Its layers.
        reading: The reader, the text and the first state's column; what it knows of places is not used.
        x: Embeddings of the prefix and the frames.
        positions: Of each in its row.
        key_mask: False for what nobody may attend to; None if there is none.
    """
    first, page = reading.reader.first_layer, dataclasses.replace(reading.page)
    rotation, mask = decoder.rotation(x, positions), decoder.visible(x, key_mask, None)
    x, _ = decoder.run(range(first + 1), x, rotation, mask)
    upper, cache = range(first + 1, len(decoder.layers)), KeyValueCache.empty(first + 1)
    page.place = torch.zeros(x.shape[0], device=x.device)
    states, before, places = [], [], []
    start = 0
    for stop in range(reading.first_column + 1, x.shape[1] + 1):
        step = Reading(reading.reader, page, stop - 1 - start)  # the prefix comes with the first state
        y, _ = decoder.run(
            upper,
            step(first, x[:, start:stop]),
            (rotation[0][:, :, start:stop], rotation[1][:, :, start:stop]),
            None if mask is None else mask[:, :, start:stop, :stop],
            cache=cache,
            after_layer=step,
        )
        states.append(y[:, -1])
        before.append(page.place)
        places.append(step.places)
        page.place, start = step.arrived[:, -1], stop
    return Walk(
        states=decoder.norm(torch.stack(states, dim=1)),
        before=torch.stack(before, dim=1),
        places=[torch.cat(moved, dim=1) for moved in zip(*places, strict=True)],
    )
