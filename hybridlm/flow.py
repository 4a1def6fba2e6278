"""Flow matching and flow maps: equations of the second latent head (`hybridlm.flow_head`), for any velocity.

Noise x_0 ~ N(0, I) and data x_1 are joined by straight lines x_t = (1 - t) x_0 + t x_1. The flow map X_{s,t} carries a
point of time s to time t along the lines' mean flow; it is written with a mean velocity between the two times,

    X_{s,t}(x) = x + (t - s) v_{s,t}(x),

whose limit v_{t,t} is the velocity of flow matching (Lipman et al., arXiv 2210.02747). So one network is both: the
diagonal s = t learns the flow, and the rest is distilled from the diagonal, after which a single evaluation goes all
the way (Boffi, Albergo and Vanden-Eijnden, arXiv 2505.18825; for audio latents CALM, arXiv 2509.06926).

Shapes: N rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""v(x (N, D), s (N,), t (N,)) -> (N, D)."""


def between(x0: Float[Tensor, "N D"], x1: Float[Tensor, "N D"], t: Float[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """The point of time t on the line from noise to data."""
    return torch.lerp(x0, x1, t[:, None])


def flow_map(
    velocity: Velocity, x: Float[Tensor, "N D"], s: Float[Tensor, " N"], t: Float[Tensor, " N"]
) -> Float[Tensor, "N D"]:
    """X_{s,t}(x)."""
    return x + (t - s)[:, None] * velocity(x, s, t)


def matching_loss(
    velocity: Velocity, x0: Float[Tensor, "N D"], x1: Float[Tensor, "N D"], t: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Mean over D of |v_{t,t}(x_t) - (x_1 - x_0)|^2 (arXiv 2210.02747, equation 14, without its smallest sigma)."""
    return (velocity(between(x0, x1, t), t, t) - (x1 - x0)).square().mean(dim=-1)


def lagrangian_loss(
    velocity: Velocity,
    x0: Float[Tensor, "N D"],
    x1: Float[Tensor, "N D"],
    s: Float[Tensor, " N"],
    t: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Mean over D of |d/dt X_{s,t}(x_s) - v_{t,t}(X_{s,t}(x_s))|^2: Lagrangian self-distillation (arXiv 2505.18825).

    A point that moves along the map must move as the flow does where it is. The flow's side is a fixed target, so that
    the map learns from the diagonal and not the diagonal from the map.
    """
    x = between(x0, x1, s)
    moved, speed, *_ = torch.func.jvp(lambda time: flow_map(velocity, x, s, time), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        target = velocity(moved, t, t)
    return (speed - target).square().mean(dim=-1)


def integrate(
    velocity: Velocity, x0: Float[Tensor, "N D"], *, num_steps: int, solver: str = "map"
) -> Float[Tensor, "N D"]:
    """Carry noise to data in equal steps.

    Args:
        velocity: See `Velocity`.
        x0: Noise.
        num_steps: At least 1.
        solver: `map`: one evaluation a step, of the learned map; `euler`: one, of the flow alone; `midpoint`: two.

    Raises:
        ValueError: another solver.
    """
    x, size = x0, 1.0 / num_steps
    for step in range(num_steps):
        s = torch.full((len(x),), step * size, dtype=x.dtype, device=x.device)
        if solver == "map":
            x = flow_map(velocity, x, s, s + size)
        elif solver == "euler":
            x = x + size * velocity(x, s, s)
        elif solver == "midpoint":
            half = s + size / 2
            x = x + size * velocity(x + size / 2 * velocity(x, s, s), half, half)
        else:
            raise ValueError(f"solver={solver} must be map, euler or midpoint")
    return x
