"""The noise-regularized bottleneck of F3-Tokenizer (arXiv 2606.06357): no KL term, a scale fixed by normalization."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def normalize_channels(z: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Normalize each time step over its channels: z_n = (z - mean) / (std + 1e-5), in float32 (F3-Tokenizer).

    The result lies on a sphere of radius sqrt(D) in the plane of zero mean, whatever the input's scale.
    """
    z = z.float()
    centred = z - z.mean(dim=-1, keepdim=True)
    # The square root needs a floor inside, or its gradient is infinite where all the channels agree.
    std = (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
    return centred / (std + 1e-5)


def add_noise(
    z: Float[Tensor, "B T D"], gamma: float, generator: torch.Generator | None = None
) -> Float[Tensor, "B T D"]:
    """Return z + alpha * eps with alpha ~ U(0, gamma) per row and eps ~ N(0, I) (F3-Tokenizer, training only)."""
    alpha = torch.rand(z.shape[0], 1, 1, generator=generator, dtype=z.dtype, device=z.device) * gamma
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return z + alpha * eps


def coding_rate(z: Float[Tensor, "B T D"], noise_std: float) -> Float[Tensor, ""]:
    """Nats a channel that Gaussian latents of z's covariance C carry through noise: log det(I + C / noise_std^2) / 2D.

    The coding rate of MCR^2 (arXiv 2006.08558). Under noise an encoder first finds a handful of robust directions and
    then stays there, since the others carry too little to have a gradient; maximizing this rate early in training
    spreads the latents over all channels.
    """
    with torch.autocast(z.device.type, enabled=False):
        flat = z.float().flatten(0, 1)
        flat = flat - flat.mean(dim=0)
        covariance = flat.T @ flat / flat.shape[0]
        identity = torch.eye(z.shape[-1], device=z.device)
        factor = torch.linalg.cholesky(identity + covariance / noise_std**2)
        return factor.diagonal().log().sum() / z.shape[-1]
