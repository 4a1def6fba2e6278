"""The reader: where in the text the voice is, and what the text says there.

A decoder that sees its text as a prefix must first discover that speech runs through it from left to right, which takes
more speech than a small corpus has. The reader knows: it keeps a place in the text. Every state of the later layers
reads the pieces around the place that the state before has reached, compares them with what it has heard, and moves the
place on: by a bit, by a piece or two, or back where it had gone too far. Such a place is that of Graves (arXiv
1308.0850, section 5.1) and of location-relative attention (Battenberg et al., arXiv 1910.10288); reading is attention
with a bias towards the place, so that a head may also look for a piece by what it says.

The place depends on the past alone, so likelihoods stay exact, but on the state before, so it has to be found frame by
frame. In training it is given (`Guide`): the true place of the state before, from `training.align`, with some error
that the state learns to set right; then all frames are computed at once.

Pieces count from 1; at place 0 nothing has been read, at N + 1 all of N pieces.

Shapes: B batch, P prefix, L states, J heads, E width of a head, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybridlm.config import ModelConfig
from hybridlm.decoder import INIT_STD

MIDDLE_MOVE, WIDEST_MOVE = 1.0, 3.0
"""A state moves the place by the first, give or take the second."""
OFF_TEXT = -1e4
"""Score of what is no text; finite, so that rows without text stay free of NaN."""


@dataclass(kw_only=True, slots=True)
class Page:
    """The text of every row as the reader sees it, and the place that has been reached."""

    keys: Float[Tensor, "B J P E"]
    values: Float[Tensor, "B J P E"]
    numbers: Float[Tensor, "B P"]
    """Of the pieces, from 1 at the first piece of the text."""
    mask: Bool[Tensor, "B P"]
    """True for pieces of text that may be seen."""
    place: Float[Tensor, " B"]
    """Reached by the state before."""
    blank: bool = False
    """Whether no row has any text: there is nothing to read, and no place to be at."""

    def select(self, rows: Int[Tensor, " R"]) -> Page:
        """A new page with these rows, in this order, repeats allowed."""
        return Page(
            keys=self.keys[rows],
            values=self.values[rows],
            numbers=self.numbers[rows],
            mask=self.mask[rows],
            place=self.place[rows],
            blank=self.blank,
        )

    @classmethod
    def join(cls, pages: Sequence[Page]) -> Page:
        """The rows of all, in order; shorter texts are padded with what may not be seen."""
        longest = max(page.mask.shape[1] for page in pages)

        def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
            after = (0, 0) * (parts[0].dim() - 1 - dim)
            return torch.cat([F.pad(part, (*after, 0, longest - part.shape[dim])) for part in parts])

        return cls(
            keys=joined([page.keys for page in pages], 2),
            values=joined([page.values for page in pages], 2),
            numbers=joined([page.numbers for page in pages], 1),
            mask=joined([page.mask for page in pages], 1),
            place=torch.cat([page.place for page in pages]),
            blank=all(page.blank for page in pages),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Places that are known without walking there."""

    before: Float[Tensor, "B L"]
    """Where each state finds the place that the state before it has reached."""
    places: Float[Tensor, "B L"] | None = None
    """Where each state should move it, in training."""
    known: Bool[Tensor, " B"] | None = None
    """Rows whose `before` and `places` count; the others are shown an even pace."""
    reach: Float[Tensor, "B L"] | None = None
    """Pieces, from the first on, that each state may see; None: all of them."""


class Glance(nn.Module):
    """One layer's look at the page: attention to pieces, each head with a favourite distance from the place.

    Args:
        config: Sizes.
        moves: Whether the layer moves the place before it reads.
    """

    def __init__(self, config: ModelConfig, *, moves: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = config.reader_heads, config.reader_head_dim
        inner = self.heads * self.head_dim
        self.norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_epsilon)
        self.shift = nn.Linear(config.hidden_dim, 1) if moves else None
        self.pace = config.reader_pace
        self.query = nn.Linear(config.hidden_dim, inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_dim, bias=False)
        self.centre = nn.Parameter(torch.linspace(-1.0, 3.0, self.heads))
        self.log_width = nn.Parameter(torch.linspace(-0.3, 1.0, self.heads))
        self.nothing = nn.Parameter(torch.full((self.heads,), -3.0))
        """Score of reading nothing, which wins before the first and after the last piece."""
        for linear in (self.query, self.out):
            nn.init.normal_(linear.weight, std=INIT_STD)
        if self.shift is not None:
            nn.init.normal_(self.shift.weight, std=0.3)
            nn.init.constant_(self.shift.bias, math.atanh((self.pace - MIDDLE_MOVE) / WIDEST_MOVE))

    def move(self, states: Float[Tensor, "B L C"], places: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """Where these states move the place."""
        if self.shift is None:
            return places
        with torch.autocast(states.device.type, enabled=False):
            moved = self.shift(_calm(self.norm(states.float()))).squeeze(-1)
            return (places + MIDDLE_MOVE + WIDEST_MOVE * torch.tanh(moved)).clamp(min=0)

    def forward(
        self,
        states: Float[Tensor, "B L C"],
        page: Page,
        places: Float[Tensor, "B L"],
        reach: Float[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        batch, length, _ = states.shape
        query = self.query(self.norm(states)).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        scores = (query @ page.keys.to(query.dtype).transpose(-1, -2)).float() * self.head_dim**-0.5  # (B, J, L, P)
        distance = page.numbers[:, None, None] - places[:, None, :, None] - self.centre[:, None, None]
        scores = scores - 0.5 * (distance * (-self.log_width).exp()[:, None, None]).square()
        scores = scores.masked_fill(~page.mask[:, None, None], OFF_TEXT)
        if reach is not None:
            scores = scores.masked_fill(page.numbers[:, None, None] > reach[:, None, :, None], OFF_TEXT)
        nothing = self.nothing[:, None, None].expand(batch, -1, length, 1)
        weights = torch.cat([scores, nothing], dim=-1).softmax(dim=-1)[..., :-1]
        read = weights.to(query.dtype) @ page.values.to(query.dtype)  # (B, J, L, E)
        return self.out(read.transpose(1, 2).reshape(batch, length, -1))


class TextReader(nn.Module):
    """Pieces with their neighbours on both sides, and a `Glance` for every layer that reads; all but the first move."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.reader_layer is not None, "a reader needs a layer"
        self.first_layer, self.first_text_id = config.reader_layer, config.first_text_id
        self.heads, self.head_dim = config.reader_heads, config.reader_head_dim
        inner = self.heads * self.head_dim
        self.embed = nn.Linear(config.hidden_dim, inner)
        # Two convolutions over five pieces: how a letter sounds depends on the letters around it.
        self.around = nn.ModuleList(nn.Conv1d(inner, inner, 5, padding=2) for _ in range(2))
        self.norm = nn.LayerNorm(inner)
        self.keys_values = nn.Linear(inner, 2 * inner, bias=False)
        layers = range(config.num_layers - self.first_layer)
        self.glances = nn.ModuleList(Glance(config, moves=layer > 0) for layer in layers)

    def open(
        self, embeddings: Float[Tensor, "B P C"], prefix: Int[Tensor, "B P"], prefix_mask: Bool[Tensor, "B P"]
    ) -> Page:
        """Prepare the text of each row.

        Args:
            embeddings: Of the prefix.
            prefix: Its ids.
            prefix_mask: False for what is not to be seen.
        """
        mask = prefix_mask & (prefix >= self.first_text_id)
        x = self.embed(embeddings) * mask[..., None]
        for convolution in self.around:
            y = convolution(F.gelu(x, approximate="tanh").transpose(1, 2)).transpose(1, 2)
            x = (x + y) * mask[..., None]  # tags and padding sound like the text's edge
        keys, values = self.keys_values(self.norm(x)).chunk(2, dim=-1)
        shape = (*mask.shape, self.heads, self.head_dim)
        return Page(  # contiguous: a product with what is not would copy it at every frame
            keys=keys.view(shape).transpose(1, 2).contiguous(),
            values=values.view(shape).transpose(1, 2).contiguous(),
            numbers=mask.cumsum(dim=1).float(),
            mask=mask,
            place=torch.zeros(mask.shape[0], device=mask.device),
        )

    @staticmethod
    def even_guide(page: Page, lengths: Int[Tensor, " B"], states: int, guide: Guide | None) -> Guide:
        """A guide for all rows: the given one where it knows, elsewhere an even pace through the text."""
        time = torch.arange(states, device=lengths.device)
        even = page.mask.sum(dim=1, keepdim=True) * (time / lengths[:, None].clamp(min=1)).clamp(max=1.0)
        if guide is None:
            return Guide(before=even)
        if guide.known is None:
            return guide
        before = torch.where(guide.known[:, None], guide.before, even)
        return Guide(before=before, places=guide.places, known=guide.known)

    @staticmethod
    def spoken_guide(place: Float[Tensor, " B"], lengths: Int[Tensor, " B"], states: int) -> Guide:
        """A guide for frames that speak the pieces up to `place`: at an even pace, and seeing none of those after it.

        The state after a row's last frame stands at `place` and sees all.
        """
        time = torch.arange(states, device=lengths.device)
        share = (time / lengths[:, None].clamp(min=1)).clamp(max=1.0)
        place = place[:, None]
        return Guide(before=place * share, reach=torch.where(time < lengths[:, None], place, math.inf))


def _calm(x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
    """To unit length: one number made of many channels, all of which an optimizer moves at once, would jump."""
    return x * x.shape[-1] ** -0.5


class Reading:
    """The reader at work in one call of the decoder, which hands it every layer's output.

    Args:
        reader: Reads.
        page: What.
        first_column: The columns from here on are states; what is before them is prefix.
        guide: Places of all states but one's own; without it there may be one state, which starts at the page's place.
    """

    def __init__(self, reader: TextReader, page: Page, first_column: int, guide: Guide | None = None) -> None:
        self.reader, self.page, self.first_column, self.guide = reader, page, first_column, guide
        self.places: list[Float[Tensor, "B L"]] = []
        """Where the layers that move moved; the last is where the states arrived."""

    def __call__(self, layer: int, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Add what the states from `first_column` on read to them."""
        if layer < self.reader.first_layer or (self.page.blank and self.guide is None):
            return x
        states, glance = x[:, self.first_column :], self.reader.glances[layer - self.reader.first_layer]
        before = self.guide.before if self.guide else self.page.place[:, None].expand(states.shape[:2])
        places = glance.move(states, before)
        if glance.shift is not None:
            self.places.append(places)
        reach = self.guide.reach if self.guide else None
        states = states + glance(states, self.page, places, reach)
        return torch.cat([x[:, : self.first_column], states], dim=1) if self.first_column else states

    @property
    def arrived(self) -> Float[Tensor, "B L"]:
        """The place after each state."""
        return self.places[-1] if self.places else self.page.place[:, None]


def place_loss(places: list[Float[Tensor, "B L"]], guide: Guide, lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A training aid: Huber's loss, in pieces, of where the layers moved; the mean over states and layers.

    Rows whose places are not known give 0.
    """
    assert guide.places is not None and guide.known is not None
    time = torch.arange(guide.places.shape[1], device=lengths.device)
    valid = (time <= lengths[:, None]) & guide.known[:, None]
    errors = torch.stack([F.smooth_l1_loss(found, guide.places, reduction="none") for found in places]).mean(dim=0)
    return (errors * valid).sum(dim=1) / (lengths + 1)
