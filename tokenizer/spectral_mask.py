"""A noisy recording Y turned down wherever enhancement turned it down: enhanced magnitudes, the noisy phases.

A codec's decoder makes up phases, so that what an enhancer decodes, E, sounds alike but is another waveform, with the
codec's own flaws. What it says of the magnitudes is enough for a mask, as in masking-based enhancement (Wang & Chen,
arXiv 1708.07524, section III, spectral magnitude mask). Ours is held against D, what the same codec decodes of the
recording as it is, whose flaws are those of E; so what the enhancer leaves alone passes unchanged:

    gain(f, t) = min(1, max(floor, sqrt(|E|^2 / |D|^2)))     powers averaged over 3 x 3 bins and windows
    out        = istft(gain * Y)

Shapes: B batch, S samples, W windows, F bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nn_functional
from jaxtyping import Float
from torch import Tensor

WINDOW_S = 1024 / 24000
WINDOWS_PER_SAMPLE = 4
FLOOR = 0.05
"""-26 dB: what is left of a bin that holds noise alone, so that pauses don't fall into digital silence."""


class SpectralMask:
    """Takes three recordings in pieces of any size; the outputs, joined, are as long as the shortest of them.

    Any pieces give the same result. It comes less than a window and a hop (53 ms) late.

    Args:
        batch_size: Rows B.
        sample_rate_hz: Of all.
        device: Of all.
    """

    def __init__(self, batch_size: int, sample_rate_hz: int, device: torch.device | str = "cpu") -> None:
        self.hop = max(1, round(WINDOW_S * sample_rate_hz / WINDOWS_PER_SAMPLE))
        self.size = self.hop * WINDOWS_PER_SAMPLE
        self.window = torch.hann_window(self.size, device=device)
        overlap = self.size - self.hop
        # Every sample lies in as many windows as any other: the first window ends with the first hop.
        self._waiting = [torch.zeros(batch_size, overlap, device=device) for _ in range(3)]
        self._spectra = torch.zeros(3, batch_size, 1, self.size // 2 + 1, dtype=torch.complex64, device=device)
        self._sum = torch.zeros(batch_size, overlap, device=device)
        self._early = overlap  # samples before the recording, still to be dropped
        self._count = [0, 0, 0]
        self._given = 0

    @torch.inference_mode()
    def push(
        self, noisy: Float[Tensor, "B 1 S"], decoded: Float[Tensor, "B 1 S2"], enhanced: Float[Tensor, "B 1 S3"]
    ) -> Float[Tensor, "B 1 S4"]:
        """The samples that became final; any input may run ahead of the others.

        Args:
            noisy: Y, which is masked.
            decoded: D, what the codec makes of it.
            enhanced: E, what it makes of the enhanced embeddings.
        """
        new = (noisy, decoded, enhanced)
        self._waiting = [torch.cat([old, x[:, 0]], dim=1) for old, x in zip(self._waiting, new, strict=True)]
        self._count = [count + x.shape[-1] for count, x in zip(self._count, new, strict=True)]
        ready = min(x.shape[1] for x in self._waiting)
        windows = max(0, (ready - self.size) // self.hop + 1)
        if windows == 0:
            return noisy.new_zeros(noisy.shape[0], 1, 0)
        used = (windows - 1) * self.hop + self.size
        all_of_them = torch.stack([x[:, :used] for x in self._waiting]).float()
        self._waiting = [x[:, windows * self.hop :] for x in self._waiting]
        return self._mask(torch.fft.rfft(all_of_them.unfold(-1, self.size, self.hop) * self.window))

    @torch.inference_mode()
    def flush(self) -> Float[Tensor, "B 1 S"]:
        """What remains."""
        length, batch = min(self._count), self._sum.shape[0]
        self._waiting = [
            x[:, : x.shape[1] - (count - length)] for x, count in zip(self._waiting, self._count, strict=True)
        ]
        silence = self.window.new_zeros(batch, 1, self.size - self.hop + -length % self.hop)
        self._count = [length] * 3
        last = self.push(silence, silence, silence)
        nothing = self._spectra.new_zeros(3, batch, 1, self._spectra.shape[-1])
        rest = torch.cat([last, self._mask(nothing)], dim=-1)
        return rest[..., : rest.shape[-1] - (self._given - length)]

    def _mask(self, spectra: Tensor) -> Float[Tensor, "B 1 S"]:
        """Mask all windows (3, B, W, F) but the last, whose neighbour is not known yet."""
        spectra = torch.cat([self._spectra, spectra], dim=2)
        self._spectra = spectra[:, :, -2:]
        if spectra.shape[2] < 3:
            return self._sum.new_zeros(spectra.shape[1], 1, 0)
        power = nn_functional.avg_pool2d(spectra.abs().square(), 3, stride=1, padding=(0, 1))  # (3, B, W, F)
        gain = (power[2] / power[1].clamp(min=1e-12)).sqrt().clamp(FLOOR, 1.0)
        pieces = torch.fft.irfft(gain * spectra[0, :, 1:-1], n=self.size) * self.window
        pieces = pieces / (3 / 8 * WINDOWS_PER_SAMPLE)  # the sum of squared Hann windows at any sample
        batch, windows, _ = pieces.shape
        total = (windows - 1) * self.hop + self.size
        summed = nn_functional.fold(
            pieces.transpose(1, 2), output_size=(1, total), kernel_size=(1, self.size), stride=(1, self.hop)
        ).reshape(batch, total)
        summed[:, : self._sum.shape[1]] += self._sum
        final, self._sum = summed[:, : windows * self.hop], summed[:, windows * self.hop :]
        dropped = min(self._early, final.shape[1])
        self._early -= dropped
        self._given += final.shape[1] - dropped
        return final[:, None, dropped:]


def mask_noise(
    noisy: Float[Tensor, "B 1 S"],
    decoded: Float[Tensor, "B 1 S"],
    enhanced: Float[Tensor, "B 1 S"],
    sample_rate_hz: int,
) -> Float[Tensor, "B 1 S"]:
    """Whole recordings of one length."""
    mask = SpectralMask(noisy.shape[0], sample_rate_hz, noisy.device)
    return torch.cat([mask.push(noisy, decoded, enhanced), mask.flush()], dim=-1)
