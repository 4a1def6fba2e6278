"""Centred mel spectrograms in torchaudio's default scale, the front ends of Dasheng and DashengTokenizer.

Their windows look half a window ahead, so they suit tokenizers that state a look-ahead; `tokenizer.mel.CausalLogMel`
is the one that looks back alone. Shapes: B batch, M mel bands, H hops, S samples.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks


class CentredMel(nn.Module):
    """Mel magnitudes (power 1) or energies (power 2), Hann windows, triangular filters of height 1 on HTK's scale.

    The caller pads: hop h's window begins at sample h * hop_length of what is given, and its centre lies `margin`
    samples later. Equal to `torchaudio.transforms.MelSpectrogram(center=True)` where the padding is a reflection.

    Args:
        sample_rate_hz: Sampling rate in Hz.
        n_fft: Window length in samples, even.
        hop_length: Samples a hop.
        num_mels: Number of bands M, from 0 Hz to the Nyquist frequency. The published settings leave the lowest ones
            narrower than a bin, hence empty: they stay as they are.
        power: Exponent of the magnitude.
    """

    window: Tensor
    filterbank: Tensor

    def __init__(self, *, sample_rate_hz: int, n_fft: int, hop_length: int, num_mels: int, power: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.power = n_fft, hop_length, power
        self.margin = n_fft // 2
        with warnings.catch_warnings(), torch.device("cpu"):  # also where the weights are only described, on `meta`
            warnings.simplefilter("ignore", UserWarning)  # on empty bands
            bank = melscale_fbanks(
                n_fft // 2 + 1, 0.0, sample_rate_hz / 2, num_mels, sample_rate_hz, norm=None, mel_scale="htk"
            )
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filterbank", bank, persistent=False)

    def span(self, num_hops: int) -> int:
        """Samples that the windows of so many hops cover."""
        return (num_hops - 1) * self.hop_length + self.n_fft

    def forward(self, samples: Float[Tensor, "B S"]) -> Float[Tensor, "B M H"]:
        """H = (S - n_fft) // hop_length + 1; in float32 also under autocast."""
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(
                samples.float(), self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
            )
            return self.filterbank.T @ spectrum.abs().pow(self.power)


def reflect(waveform: Float[Tensor, "B S"], left: int, right: int) -> Float[Tensor, "B L"]:
    """Mirror so many samples at each end, without repeating the first or the last one."""
    return F.pad(waveform.unsqueeze(1), (left, right), mode="reflect").squeeze(1)
