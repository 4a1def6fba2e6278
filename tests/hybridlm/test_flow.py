"""The equations of flow matching and flow maps, on a Gaussian whose flow is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridlm.flow import between, flow_map, integrate, lagrangian_loss, matching_loss

MEAN, STD = 0.7, 0.4


def width(t: Tensor) -> Tensor:
    """Standard deviation at time t of lines from N(0, 1) to N(MEAN, STD^2)."""
    return ((1 - t).square() + (t * STD).square()).sqrt()


def velocity(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Of that Gaussian's flow X_{s,t}(x) = t MEAN + (x - s MEAN) width(t) / width(s)."""
    s, t = s[:, None], t[:, None]
    gap = t - s
    moved = t * MEAN + (x - s * MEAN) * width(t) / width(s)
    rate = (t * STD**2 - (1 - t)) / width(t)  # of the width
    at_once = MEAN + (x - t * MEAN) * rate / width(t)
    return torch.where(gap.abs() > 1e-6, (moved - x) / gap.where(gap.abs() > 1e-6, torch.ones_like(gap)), at_once)


def draws(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    x1 = MEAN + STD * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    times = torch.rand(2, count, generator=generator, dtype=torch.float64).sort(dim=0).values
    return x0, x1, times[0], times[1]


def test_maps_compose() -> None:
    x0, _, s, t = draws()
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    there = flow_map(velocity, flow_map(velocity, x0, zero, s), s, t)
    torch.testing.assert_close(there, flow_map(velocity, x0, zero, t))
    torch.testing.assert_close(flow_map(velocity, x0, zero, one), MEAN + STD * x0)


def test_the_true_map_has_no_lagrangian_loss() -> None:
    x0, x1, s, t = draws()
    assert float(lagrangian_loss(velocity, x0, x1, s, t).max()) < 1e-12
    wrong = lagrangian_loss(lambda x, s, t: velocity(x, s, t) + (t - s)[:, None], x0, x1, s, t)
    # d/dt of (t - s)^2 is 2 (t - s), and the target moves with the point.
    assert float(wrong.mean()) > 0.05


def test_the_target_is_fixed() -> None:
    """The diagonal learns nothing from the map."""
    x0, x1, s, t = draws()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def moved(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        diagonal = (s == t).double()[:, None]
        return velocity(x, s, t) + (1 + shift) * diagonal

    lagrangian_loss(moved, x0, x1, s, t).mean().backward()
    assert shift.grad is None or float(shift.grad.abs()) < 1e-9


def test_the_velocity_of_the_flow_is_the_best_match() -> None:
    x0, x1, _, t = draws(20_000)
    best = matching_loss(velocity, x0, x1, t).mean()
    for change in (0.1, -0.1):
        worse = matching_loss(lambda x, s, t, change=change: velocity(x, s, t) + change, x0, x1, t).mean()
        assert float(worse - best) == pytest.approx(0.01, abs=0.005)
    assert torch.equal(between(x0, x1, torch.zeros_like(t)), x0)


@pytest.mark.parametrize(("solver", "steps", "error"), [("map", 1, 1e-9), ("euler", 64, 0.04), ("midpoint", 16, 2e-3)])
def test_solvers_reach_the_end(solver: str, steps: int, error: float) -> None:
    x0 = draws()[0]
    end = integrate(velocity, x0, num_steps=steps, solver=solver)
    assert float((end - (MEAN + STD * x0)).abs().max()) < error
    if solver != "map":
        coarser = integrate(velocity, x0, num_steps=steps // 4, solver=solver)
        assert float((coarser - (MEAN + STD * x0)).abs().max()) > error


def test_an_unknown_solver() -> None:
    with pytest.raises(ValueError, match="solver=heun must be map, euler or midpoint"):
        integrate(velocity, draws()[0], num_steps=1, solver="heun")
