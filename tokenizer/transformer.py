"""A causal transformer with a sliding window, whose streaming state is an argument, and the parts it is made of.

The parts (rotary positions, SwiGLU) are those of Llama; `hybridlm.decoder` is made of them too.

Shapes: B batch, T frames, L positions of a call, P past positions kept, H heads, E width of a head, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def rotary(
    positions: Int[Tensor, "B L"],
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    stretch: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B 1 L E"], Float[Tensor, "B 1 L E"]]:
    """Cosines and sines of the rotary angles (Su et al. 2021), the halves laid out as in Llama.

    `stretch` changes the frequencies (E / 2,), in radians a position.
    """
    frequencies = theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / -head_dim)
    if stretch is not None:
        frequencies = stretch(frequencies)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Float[Tensor, "B H L E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H L E"]:
    """Turn each pair (x_i, x_{i + E/2}) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), gate and up in one matrix."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Past(NamedTuple):
    """What one layer remembers: keys, already turned, and values of the last positions, at most window - 1."""

    keys: Float[Tensor, "B H P E"]
    values: Float[Tensor, "B H P E"]


class TransformerState(NamedTuple):
    """What the stack remembers."""

    layers: list[Past]
    position: int | Int[Tensor, " B"]
    """Of the next frame; one a row where rows differ."""
    known: Bool[Tensor, "B P"] | None = None
    """Which of the remembered positions are real; None: all."""

    def select(self, rows: Int[Tensor, " R"]) -> TransformerState:
        """A new state with these rows, in this order, repeats allowed."""
        return TransformerState(
            [Past(past.keys[rows], past.values[rows]) for past in self.layers],
            self.position[rows] if isinstance(self.position, Tensor) else self.position,
            None if self.known is None else self.known[rows],
        )

    @classmethod
    def join(cls, states: Sequence[TransformerState]) -> TransformerState:
        """The rows of all, in order; who remembers less is padded on the left, where nobody looks."""
        longest = max(state.layers[0].keys.shape[2] for state in states)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])

        layers = [
            Past(joined([past.keys for past in pasts]), joined([past.values for past in pasts]))
            for pasts in zip(*(state.layers for state in states), strict=True)
        ]
        positions, known = [], []
        for state in states:
            rows, _, length, _ = state.layers[0].keys.shape
            device = state.layers[0].keys.device
            position = state.position
            positions.append(position if isinstance(position, Tensor) else torch.full((rows,), position, device=device))
            real = torch.ones(rows, length, dtype=torch.bool, device=device) if state.known is None else state.known
            known.append(F.pad(real, (longest - length, 0)))
        return cls(layers, torch.cat(positions), torch.cat(known))

    def ended(self, lengths: Int[Tensor, " B"], new: int, window: int) -> TransformerState:
        """Each row's state after its first `lengths` of the `new` positions that came last.

        Args:
            lengths: At most `new`.
            new: Positions of the last call; those of before are `position - new` or fewer.
            window: Of the stack; the state is cut to it.
        """
        old = self.layers[0].keys.shape[2] - new
        ends = old + lengths  # (B,), in columns of the remembered positions
        columns = ends[:, None] + torch.arange(1 - window, 0, device=lengths.device)  # (B, window - 1)
        real = columns >= 0
        columns = columns.clamp(min=0)
        if self.known is not None:
            real = real & self.known.gather(1, columns)

        def kept(x: Tensor) -> Tensor:
            return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        layers = [Past(kept(past.keys), kept(past.values)) for past in self.layers]
        return TransformerState(layers, self.position - new + lengths, real)


class WindowAttention(nn.Module):
    """Each position attends to itself and the `window - 1` before it."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window = num_heads, dim // num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "L N"] | Bool[Tensor, "B 1 L N"],
        past: Past | None,
        keep_all: bool = False,
    ) -> tuple[Float[Tensor, "B L C"], Past]:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past is not None:
            k, v = torch.cat([past.keys.to(k.dtype), k], dim=2), torch.cat([past.values.to(v.dtype), v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        keep = 0 if keep_all else max(0, k.shape[2] - (self.window - 1))
        return self.out(y.transpose(1, 2).reshape(batch, length, -1)), Past(k[:, :, keep:], v[:, :, keep:])


class TransformerLayer(nn.Module):
    """Pre-norm attention and SwiGLU on a residual stream."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, window: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = WindowAttention(dim, num_heads, window)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = SwiGLU(dim, ffn_dim)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        past: Past | None,
        keep_all: bool = False,
    ) -> tuple[Float[Tensor, "B L C"], Past]:
        y, present = self.attention(self.attention_norm(x), rotation, mask, past, keep_all)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), present


class CausalTransformer(nn.Module):
    """The stack, with a final norm. Its memory of the past is bounded by the window, whatever the recording's length.

    Args:
        dim: Width C.
        num_layers: Layers.
        num_heads: Heads; must divide `dim` into even widths.
        ffn_dim: Width of the SwiGLU.
        window: Positions that a position sees, itself among them.
    """

    def __init__(self, dim: int, *, num_layers: int, num_heads: int, ffn_dim: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = dim // num_heads, window
        layers = [TransformerLayer(dim, num_heads, ffn_dim, window) for _ in range(num_layers)]
        for layer in layers:
            # Each layer adds two branches to the residual stream; this keeps the stream's variance (GPT-2).
            for linear in (layer.attention.out, layer.mlp.down):
                nn.init.normal_(linear.weight, std=(2 * num_layers * linear.in_features) ** -0.5)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: TransformerState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], TransformerState]:
        """Normalized outputs of the positions after `state`, and the state after them.

        Args:
            x: Inputs, right-padded.
            state: Of the positions before; None at the beginning.
            lengths: Real inputs of each row, where the state is to be gone on from and rows differ; None: all.
        """
        length = x.shape[1]
        start = state.position if state else 0
        old = state.layers[0].keys.shape[2] if state else 0
        query = torch.arange(length, device=x.device)[:, None]
        key = torch.arange(-old, length, device=x.device)[None]
        mask = (key <= query) & (key > query - self.window)  # (L, N)
        if state is not None and state.known is not None:
            mask = mask & F.pad(state.known, (0, length), value=True)[:, None, None]  # (B, 1, L, N)
        first = start[:, None] if isinstance(start, Tensor) else start
        positions = first + torch.arange(length, device=x.device)[None]
        rotation = rotary(positions, self.head_dim, 10_000.0, x.dtype)
        pasts: list[Past | None] = list(state.layers) if state else [None] * len(self.layers)
        present = []
        for layer, past in zip(self.layers, pasts, strict=True):
            x, kept = layer(x, rotation, mask, past, lengths is not None)
            present.append(kept)
        known = None
        if state is not None and state.known is not None:
            known = F.pad(state.known, (0, length), value=True)
            known = known if lengths is not None else known[:, known.shape[1] - present[0].keys.shape[2] :]
        after = TransformerState(present, start + length, known)
        return self.norm(x), after if lengths is None else after.ended(lengths, length, self.window)


def check_heads(dim: int, num_heads: int, name: str, heads_name: str = "num_heads") -> None:
    """Raises ValueError unless `num_heads` divides `dim`, called `name`, into even widths."""
    if dim % num_heads or (dim // num_heads) % 2:
        good = [h for h in range(1, dim + 1) if dim % h == 0 and (dim // h) % 2 == 0]
        near = min(good, key=lambda h: abs(math.log(h / num_heads)))
        raise ValueError(f"{heads_name}={num_heads} must divide {name}={dim} into even widths; use {near}")
