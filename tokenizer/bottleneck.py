"""The noise-regularized bottleneck of F3-Tokenizer (arXiv 2606.06357), and those it is held against.

F3: no KL term, a scale fixed by normalization. sigma-VAE (LatentLM, arXiv 2412.08635; VibeVoice, arXiv 2508.19205):
noise of a strength that is not learned, and a KL term that holds the scale.
"""

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


def add_sigma_vae_noise(
    mean: Float[Tensor, "B T D"], strength: float, generator: torch.Generator | None = None
) -> Float[Tensor, "B T D"]:
    """Return mean + sigma * eps with sigma ~ N(0, strength^2) per row and eps ~ N(0, I): the posterior of a sigma-VAE.

    LatentLM writes sigma ~ N(0, C_sigma); VibeVoice's code draws it once a row, with `strength` 0.5 / 0.8. The sign of
    sigma does not matter. Its unit is the encoder's own: an encoder that is free to grow outgrows the noise, unless
    `kl_to_standard_normal` holds it.
    """
    sigma = strength * torch.randn(mean.shape[0], 1, 1, generator=generator, dtype=mean.dtype, device=mean.device)
    eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + sigma * eps


def kl_to_standard_normal(mean: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
    """What of KL(N(mean, sigma^2) || N(0, 1)) depends on the mean, in nats a channel: mean^2 / 2 (sigma-VAE)."""
    return 0.5 * mean.float().square().mean()


def centre_and_scale(z: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
    """Mean of each channel, and one root mean square about these means over all channels: the latents' global scale.

    A constant tells a decoder nothing, so signal-to-noise ratios are of what lies about it.
    """
    flat = z.float().flatten(0, 1)
    mean = flat.mean(dim=0)
    return mean, (flat - mean).square().mean().sqrt()


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
