"""Figures of several seeds on the same clips, with bootstrap intervals over both."""

from __future__ import annotations

from typing import Any

import torch

RESAMPLES = 2000


def drawn_ratios(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Bootstrap of sum(values) / sum(sizes) with seeds and units drawn; always the same draws.

    Args:
        values: (seeds, units), summed over a unit, such as a clip.
        sizes: (units,).
    """
    generator = torch.Generator().manual_seed(0)
    num_seeds, num_units = values.shape
    seeds = torch.randint(num_seeds, (RESAMPLES, num_seeds), generator=generator)
    units = torch.randint(num_units, (RESAMPLES, num_units), generator=generator)
    shares = torch.zeros(RESAMPLES, num_seeds, dtype=values.dtype)
    shares.scatter_add_(1, seeds, torch.full(seeds.shape, 1 / num_seeds, dtype=values.dtype))
    return (shares @ values).gather(1, units).sum(dim=1) / sizes[units].sum(dim=1)


def bounds(draws: torch.Tensor) -> list[float]:
    """The 95 % interval of bootstrap draws."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return [low, high]


def estimate(values: torch.Tensor, sizes: torch.Tensor) -> dict[str, Any]:
    """sum(values) / sum(sizes): the seeds' mean, its interval with seeds and units drawn, and each seed's own.

    Args:
        values: (seeds, units), summed over a unit.
        sizes: (units,).
    """
    each = values.sum(dim=1) / sizes.sum()
    return {"value": each.mean().item(), "interval": bounds(drawn_ratios(values, sizes)), "per_seed": each.tolist()}


def estimate_mean(values: torch.Tensor) -> dict[str, Any] | None:
    """`estimate` of the mean over clips, and their number.

    Args:
        values: (seeds, clips); a clip for which any seed's is not finite is left out.

    Returns:
        None where no clip is left.
    """
    kept = values[:, values.isfinite().all(dim=0)]
    clips = kept.shape[1]
    return {**estimate(kept, torch.ones(clips, dtype=kept.dtype)), "clips": clips} if clips else None
