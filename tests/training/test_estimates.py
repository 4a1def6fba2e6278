"""The bootstrap over seeds and clips, against a plain loop."""

from __future__ import annotations

import pytest
import torch

from training import estimates
from training.estimates import bounds, drawn_ratios, estimate_mean


def test_the_bootstrap_draws_seeds_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 50)
    values, sizes = torch.rand(3, 7, dtype=torch.float64), torch.arange(1.0, 8.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(3, (50, 3), generator=generator)
    units = torch.randint(7, (50, 7), generator=generator)
    expected = [
        sum(float(values[s, u]) for s in some for u in drawn) / 3 / float(sizes[drawn].sum())
        for some, drawn in zip(seeds, units, strict=True)
    ]
    assert drawn_ratios(values, sizes).tolist() == pytest.approx(expected)


def test_a_mean_leaves_out_clips_without_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 50)
    nan = float("nan")
    values = torch.tensor([[1.0, nan, 3.0, 7.0], [2.0, 5.0, 4.0, nan]], dtype=torch.float64)
    found = estimate_mean(values)
    assert found is not None and found["clips"] == 2
    assert found["value"] == 2.5 and found["per_seed"] == [2.0, 3.0]
    assert found["interval"] == bounds(drawn_ratios(values[:, [0, 2]], torch.ones(2, dtype=torch.float64)))
    assert estimate_mean(values[:, [1, 3]]) is None
