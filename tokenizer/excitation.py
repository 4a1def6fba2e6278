"""What a decoder filters: pulses at the pitch, and noise, as spectra of overlapping windows.

A decoder that draws every window's phases anew cannot keep a voice periodic from window to window; with 25 frames a
second nothing in its input tells where the last pulse was. Here the phase runs on in the excitation, as in neural
source-filter models (arXiv 1810.11946) and DDSP (arXiv 2001.04643), and the decoder says how the pulses are coloured.

Shapes: B batch, H hops, W window, F = W // 2 + 1 bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

NOISE_PERIOD_HOPS = 200
"""The noise is the same in every call and repeats after so many hops (two seconds)."""


class ExcitationState(NamedTuple):
    """Where the next hop begins."""

    phase: Float[Tensor, " B"]
    """Of the pulses, in radians, float64."""
    hop: int
    """Hops so far, modulo the noise's period."""


class Excitation(nn.Module):
    """Pulses and noise under the square root of a Hann window.

    Args:
        sample_rate_hz: Sampling rate in Hz.
        hop: Samples between windows.
        window: Samples of a window.
    """

    window: Tensor
    noise: Tensor

    def __init__(self, sample_rate_hz: int, hop: int, window: int) -> None:
        super().__init__()
        self.sample_rate_hz, self.hop = sample_rate_hz, hop
        self.register_buffer("window", torch.hann_window(window).sqrt(), persistent=False)
        noise = torch.randn(NOISE_PERIOD_HOPS * hop + window, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)

    @torch.no_grad()
    def forward(
        self, pitch_hz: Float[Tensor, "B H"], state: ExcitationState | None = None
    ) -> tuple[Complex[Tensor, "B H F"], Complex[Tensor, "H F"], ExcitationState]:
        """Spectra of pulses at the pitch of each hop, and of the noise there.

        A window's pulses keep its own hop's pitch up to the window's end; the next window starts with the phase that
        this pitch has reached one hop on.
        """
        batch, hops = pitch_hz.shape
        with torch.autocast(pitch_hz.device.type, enabled=False):
            if state is None:
                state = ExcitationState(torch.zeros(batch, dtype=torch.float64, device=pitch_hz.device), 0)
            radians = 2 * math.pi / self.sample_rate_hz * pitch_hz.double()  # a sample
            reached = state.phase[:, None] + F.pad((radians * self.hop).cumsum(dim=1), (1, 0))
            samples = torch.arange(len(self.window), dtype=torch.float64, device=pitch_hz.device)
            phase = reached[:, :-1, None] + radians[..., None] * samples
            pulses = torch.fft.rfft(_pulse_train(phase, pitch_hz, self.sample_rate_hz) * self.window)
            first = (torch.arange(hops, device=pitch_hz.device) + state.hop) % NOISE_PERIOD_HOPS * self.hop
            noise = self.noise.unfold(0, len(self.window), 1)[first]
            state = ExcitationState(reached[:, -1].remainder(2 * math.pi), (state.hop + hops) % NOISE_PERIOD_HOPS)
        return pulses, torch.fft.rfft(noise * self.window), state


def _pulse_train(
    phase: Float[Tensor, "B H W"], pitch_hz: Float[Tensor, "B H"], sample_rate_hz: int
) -> Float[Tensor, "B H W"]:
    """The sum of all cosines at multiples of the phase below half the sample rate, with unit power."""
    count = (0.5 * sample_rate_hz / pitch_hz).floor()[..., None]
    half = torch.sin(phase / 2)
    at_pulse = half.abs() < 1e-3
    # Dirichlet's kernel; at a pulse its limit. In float64: a phase of some hundred radians times some hundred.
    kernel = torch.sin((count.double() + 0.5) * phase) / (2 * torch.where(at_pulse, torch.ones_like(half), half)) - 0.5
    return torch.where(at_pulse, count.double(), kernel).float() * (2 / count).sqrt()
