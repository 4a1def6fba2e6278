"""A loss that weighs errors as an ear does: the disturbance of perceived loudness, band by band, as in PESQ.

What a recording's loudness is in a band of a Bark's fraction follows Zwicker's law over the threshold of hearing; where
a decoder's loudness differs by more than a dead zone, it disturbs, and sound that was not there disturbs more than
sound that is missing. The parts are those of ITU-T P.862, sections 10.2.5 to 10.2.8, as a training loss like that of
Martín-Doñas et al. 2018 (PMSQE); time alignment, level alignment of the decoded signal and the norm over whole files
are left out. A codec trained with it is flattered by PESQ; judge it by other measures too.

Shapes: B batch, S samples, T spectrogram frames, N bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SPEECH_LEVEL_DB = 79.0
"""Sound pressure level at which a signal of the reference's power is listened to."""
EXPONENT = 0.23
"""Of Zwicker's law."""
DEAD_ZONE = 0.25
"""Share of the smaller loudness by which the two may differ unheard."""
AUDIBLE_POWER = 5e-6
"""Of a band against the reference's power; keeps ratios of what nobody hears near one."""


class LoudnessLoss(nn.Module):
    """Mean disturbance over frames, in sones: symmetric plus `asymmetric_weight` times asymmetric.

    Args:
        sample_rate_hz: Sampling rate in Hz.
        band_width_bark: Width of a band.
        asymmetric_weight: By default both parts of a decoded recording weigh about alike, as in PESQ.
    """

    window: Tensor
    bands: Tensor
    threshold: Tensor

    def __init__(self, sample_rate_hz: int, band_width_bark: float = 0.4, asymmetric_weight: float = 0.12) -> None:
        super().__init__()
        self.n_fft = 2 * (round(0.032 * sample_rate_hz) // 2)
        self.band_width_bark, self.asymmetric_weight = band_width_bark, asymmetric_weight
        window = torch.hann_window(self.n_fft)
        # The power of all bins together is then the signal's mean square.
        self.register_buffer("window", window * (2.0 / (self.n_fft * window.square().sum())).sqrt(), persistent=False)
        frequencies = torch.arange(1, self.n_fft // 2) * (sample_rate_hz / self.n_fft)
        position = bark(frequencies) / band_width_bark
        centres = torch.arange(2, int(position[-1]))
        bands = (1 - (position[:, None] - centres).abs()).clamp(min=0)  # every bin belongs to its two neighbours
        self.register_buffer("bands", bands, persistent=False)
        kilohertz = 0.6 * torch.sinh(centres * band_width_bark / 6)
        # Terhardt 1979.
        decibels = (
            3.64 * kilohertz**-0.8 - 6.5 * torch.exp(-0.6 * (kilohertz - 3.3).square()) + 1e-3 * kilohertz**4
        ).clamp(max=70.0)
        self.register_buffer("threshold", 10 ** ((decibels - SPEECH_LEVEL_DB) / 10), persistent=False)

    def powers(self, waveform: Float[Tensor, "B S"]) -> Float[Tensor, "B T N"]:
        """Power in each band."""
        spectrum = torch.stft(
            waveform, self.n_fft, self.n_fft // 2, window=self.window, pad_mode="constant", return_complex=True
        )
        return torch.view_as_real(spectrum[:, 1:-1]).square().sum(dim=-1).transpose(1, 2) @ self.bands

    def loudness(self, powers: Float[Tensor, "B T N"]) -> Float[Tensor, "B T N"]:
        """Zwicker's law, sones a Bark."""
        at_threshold = (self.threshold * 10 ** (SPEECH_LEVEL_DB / 10) / 0.5) ** EXPONENT
        return 0.187 * at_threshold * ((0.5 + 0.5 * powers / self.threshold) ** EXPONENT - 1).clamp(min=0)

    def forward(self, predicted: Float[Tensor, "B 1 S"], target: Float[Tensor, "B 1 S"]) -> Float[Tensor, ""]:
        """Disturbance of `predicted` against `target`; only `predicted` receives a gradient."""
        with torch.autocast(predicted.device.type, enabled=False):
            wanted = target.squeeze(1).float()
            # Below -60 dB of full scale a segment is as quiet as it sounds.
            gain = wanted.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-3).reciprocal()
            with torch.no_grad():
                wanted_power = self.powers(wanted * gain)
                wanted_loudness = self.loudness(wanted_power)
            found_power = self.powers(predicted.squeeze(1).float() * gain)
            found_loudness = self.loudness(found_power)
            difference = found_loudness - wanted_loudness
            dead = DEAD_ZONE * torch.minimum(found_loudness, wanted_loudness).detach()
            disturbance = difference.sign() * F.relu(difference.abs() - dead) * self.band_width_bark
            ratio = ((found_power.detach() + AUDIBLE_POWER) / (wanted_power + AUDIBLE_POWER)) ** 1.2
            added = torch.where(ratio < 3.0, torch.zeros_like(ratio), ratio.clamp(max=12.0))
            symmetric = (disturbance.square().sum(dim=-1) + 1e-6).sqrt()
            asymmetric = (disturbance * added).abs().sum(dim=-1)
            return (symmetric + self.asymmetric_weight * asymmetric).mean()


def bark(hertz: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
    """Critical-band rate (Schroeder et al. 1979)."""
    return 6.0 * torch.asinh(hertz / 600.0)
