"""Guided attention: a training aid that teaches one layer to read the text from left to right.

Shapes: B batch, P prefix, T frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def alignment_loss(
    alignment: Float[Tensor, "B heads T P"],
    text_mask: Bool[Tensor, "B P"],
    lengths: Int[Tensor, " B"],
    aligned: Bool[Tensor, " B"] | None = None,
    *,
    width: float = 0.2,
) -> Float[Tensor, " B"]:
    """Guided attention (Tachibana et al. 2017, arXiv 1710.08969, section 4.1), per row.

    Attention of frame t to piece n costs 1 - exp(-(n / N - t / T)^2 / (2 g^2)); the mean over frames and heads.

    Args:
        alignment: Probabilities over the text pieces.
        text_mask: Which prefix columns are pieces.
        lengths: Frames per row.
        aligned: Rows that count; the others, and those without text, give 0.
        width: g.
    """
    steps = torch.arange(alignment.shape[2], device=alignment.device)
    pieces = text_mask.sum(dim=1, keepdim=True)
    n = (text_mask.cumsum(dim=1) - 0.5) / pieces.clamp(min=1)  # (B, P), the middle of a piece
    t = (steps + 0.5) / lengths[:, None].clamp(min=1)  # (B, T)
    penalty = 1.0 - torch.exp(-(n[:, None] - t[:, :, None]).square() / (2 * width**2))  # (B, T, P)
    cost = (alignment * (penalty * text_mask[:, None])[:, None]).sum(dim=-1).mean(dim=1)  # (B, T)
    valid = (steps < lengths[:, None]) & (pieces > 0)
    if aligned is not None:
        valid = valid & aligned[:, None]
    return (cost * valid).sum(dim=1) / lengths.clamp(min=1)
