"""Fundamental frequency: measured on a waveform, and as a distribution over a logarithmic grid.

Shapes: B batch, S samples, H hops, Q grid points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOWEST_HZ, HIGHEST_HZ, GRID_POINTS = 60.0, 800.0, 96
NEIGHBOURS = 3
"""Grid points on either side of the most likely one whose mean is the frequency."""
STEPS_PER_E = 512.0
"""Of frequencies that a decoder uses, 3.4 cents apart."""
VOICED_FROM = 0.5
"""Periodicity from which a hop counts in `pitch_loss`, the more the higher."""
FFT_SIZE = 2048


@torch.no_grad()
def track_pitch(
    waveform: Float[Tensor, "B S"], sample_rate_hz: int, hop: int, window: int = 1024
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
    """Pitch in Hz and periodicity in 0..1 around the middle of every whole hop.

    The highest peaks of the normalized autocorrelation (McLeod and Wyvill 2005, "A smarter way to find pitch"): of
    those that come within a tenth of the highest, the one at the shortest lag, refined by a parabola.
    """
    longest, shortest = int(sample_rate_hz / LOWEST_HZ), int(sample_rate_hz / HIGHEST_HZ)
    total = window + longest + 2
    hops = waveform.shape[1] // hop
    pieces = F.pad(waveform.float(), (total // 2 - hop // 2, total)).unfold(1, total, hop)[:, :hops]
    product = torch.fft.rfft(pieces[..., :window], FFT_SIZE).conj() * torch.fft.rfft(pieces, FFT_SIZE)
    correlation = torch.fft.irfft(product, FFT_SIZE)[..., : longest + 2]
    energy = F.pad(pieces.square().cumsum(dim=-1), (1, 0))
    energy = energy[..., window : window + longest + 2] - energy[..., : longest + 2]  # of the window at each lag
    similarity = correlation / (0.5 * (energy[..., :1] + energy) + 1e-6)
    inner = similarity[..., shortest : longest + 1]
    is_peak = (inner > similarity[..., shortest - 1 : longest]) & (inner >= similarity[..., shortest + 1 :])
    peaks = torch.where(is_peak, inner, torch.full_like(inner, -1.0))
    lag = (peaks >= 0.9 * peaks.amax(dim=-1, keepdim=True)).float().argmax(dim=-1) + shortest
    before, at, after = (similarity.gather(-1, (lag + d)[..., None]).squeeze(-1) for d in (-1, 0, 1))
    shift = ((before - after) / (2 * (before - 2 * at + after)).clamp(max=-1e-6)).clamp(-0.5, 0.5)
    return sample_rate_hz / (lag + shift), at.clamp(0.0, 1.0)


def pitch_grid() -> Float[Tensor, " Q"]:
    """The natural logarithms of the grid's frequencies."""
    return torch.linspace(math.log(LOWEST_HZ), math.log(HIGHEST_HZ), GRID_POINTS)


def pitch_of(logits: Float[Tensor, "B H Q"], grid: Float[Tensor, " Q"]) -> Float[Tensor, "B H"]:
    """Frequency in Hz: the geometric mean around the most likely grid point, as in CREPE (arXiv 1802.06182).

    Rounded to a fifth of a per cent, so that a matrix product's last bits, which batch size and chunking change, do not
    add up in a phase (but for once in some ten thousand hops, when they lie across a rounding border).
    """
    logits = logits.float()
    distance = (torch.arange(GRID_POINTS, device=logits.device) - logits.argmax(dim=-1, keepdim=True)).abs()
    near = logits.masked_fill(distance > NEIGHBOURS, -1e9).softmax(dim=-1)
    return ((near * grid).sum(dim=-1) * STEPS_PER_E).round().div(STEPS_PER_E).exp()


def pitch_loss(
    logits: Float[Tensor, "B H Q"], pitch_hz: Float[Tensor, "B H"], periodicity: Float[Tensor, "B H"]
) -> Float[Tensor, ""]:
    """Cross-entropy against the measured pitch, spread over its two grid points; unvoiced hops don't count."""
    place = (pitch_hz.clamp(LOWEST_HZ, HIGHEST_HZ) / LOWEST_HZ).log() * (GRID_POINTS - 1)
    place = place / math.log(HIGHEST_HZ / LOWEST_HZ)
    below = place.floor().clamp(max=GRID_POINTS - 2)
    log_prob = logits.float().log_softmax(dim=-1)
    at_below = log_prob.gather(-1, below.long()[..., None]).squeeze(-1)
    at_above = log_prob.gather(-1, below.long()[..., None] + 1).squeeze(-1)
    log_likelihood = at_below + (place - below) * (at_above - at_below)
    weight = (periodicity - VOICED_FROM).clamp(min=0)
    return -(log_likelihood * weight).sum() / weight.sum().clamp(min=1)
