"""Log-mel spectrograms: a causal one to feed models, and a multi-resolution one to compare waveforms.

Shapes: B batch, T frames, M mel bands, S samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks


def mel_filterbank(sample_rate_hz: int, n_fft: int, num_mels: int) -> Float[Tensor, "N M"]:
    """Triangular filters on Slaney's mel scale, from 0 Hz to the Nyquist frequency.

    Each filter sums to one, so a band is a weighted mean of spectral magnitudes and white noise is flat over the bands.

    Args:
        sample_rate_hz: Sampling rate in Hz.
        n_fft: Length of the Fourier transform in samples; N = n_fft // 2 + 1.
        num_mels: Number of bands M.

    Raises:
        ValueError: when a band is narrower than the bins of the transform and would be empty.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchaudio's own warning on empty bands; ours is an error
        bank = melscale_fbanks(
            n_fft // 2 + 1, 0.0, sample_rate_hz / 2, num_mels, sample_rate_hz, norm=None, mel_scale="slaney"
        )
    weight = bank.sum(dim=0)
    if bool((weight == 0).any()):
        raise ValueError(
            f"num_mels={num_mels} leaves bands empty at n_fft={n_fft}, sample_rate_hz={sample_rate_hz}; "
            "use fewer bands or a larger n_fft"
        )
    return bank / weight


class CausalLogMel(nn.Module):
    """Log-mel frames that see no sample after their own end.

    Frame t's window ends at sample (t + 1) * hop_length and reaches n_fft samples back, over zeros before the start.
    The input is padded with silence to whole frames: T = ceil(S / hop_length).

    Args:
        sample_rate_hz: Sampling rate in Hz.
        n_fft: Window length in samples.
        hop_length: Samples per frame.
        num_mels: Number of bands M.
        floor: Smallest magnitude; a full-scale sine reaches about 0.5 and log(floor) is the value of silence.
    """

    def __init__(self, sample_rate_hz: int, n_fft: int, hop_length: int, num_mels: int, floor: float = 1e-5) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.num_mels = num_mels
        self.floor = floor
        window = torch.hann_window(n_fft)
        self.window: Tensor
        self.filterbank: Tensor
        self.register_buffer("window", window / window.sum(), persistent=False)
        self.register_buffer("filterbank", mel_filterbank(sample_rate_hz, n_fft, num_mels), persistent=False)

    @property
    def context_samples(self) -> int:
        """Samples before a frame's own that its window covers; a streaming caller keeps as many."""
        return max(self.n_fft - self.hop_length, 0)

    def forward(
        self, waveform: Float[Tensor, "B 1 S"], context: Float[Tensor, "B 1 P"] | None = None
    ) -> Float[Tensor, "B T M"]:
        """Compute natural-log mel magnitudes.

        Args:
            waveform: Samples, usually in [-1, 1].
            context: The P = `context_samples` samples before `waveform`; silence by default.
        """
        num_frames = -(-waveform.shape[-1] // self.hop_length)
        right = num_frames * self.hop_length - waveform.shape[-1]
        if context is None:
            samples = F.pad(waveform, (self.n_fft - self.hop_length, right))  # a negative pad crops: n_fft < hop_length
        else:
            samples = F.pad(torch.cat([context, waveform], dim=-1), (min(self.n_fft - self.hop_length, 0), right))
        if num_frames == 0:
            return waveform.new_zeros(waveform.shape[0], 0, self.num_mels)
        spectrum = torch.stft(
            samples.squeeze(1), self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
        )  # (B, N, T)
        mel = spectrum.abs().transpose(1, 2) @ self.filterbank  # (B, T, M)
        return mel.clamp(min=self.floor).log()


class LogMelStream:
    """`CausalLogMel` of whole frames that arrive in pieces; what it gives waits until it is taken.

    Args:
        mel: Decides what is computed, and where.
        batch_size: Recordings of one length.
    """

    def __init__(self, mel: CausalLogMel, batch_size: int) -> None:
        self.mel = mel
        self._context = torch.zeros(batch_size, 1, mel.context_samples, device=mel.window.device)
        self._waiting = torch.zeros(batch_size, 0, mel.num_mels, device=mel.window.device)

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> None:
        """Samples of whole frames."""
        self._waiting = torch.cat([self._waiting, self.mel(waveform, self._context)], dim=1)
        samples = torch.cat([self._context, waveform], dim=-1)
        self._context = samples[..., samples.shape[-1] - self._context.shape[-1] :]

    def take(self, count: int) -> Float[Tensor, "B count M"]:
        """The oldest frames that wait."""
        taken, self._waiting = self._waiting[:, :count], self._waiting[:, count:]
        return taken


class MultiResolutionMelLoss(nn.Module):
    """Mean distance of two waveforms' mel spectrograms over several window lengths.

    Per resolution: the L1 distance of natural-log magnitudes plus `magnitude_weight` times the L1 distance of the
    magnitudes themselves, which keeps loud partials exact; hop_length = n_fft // 4, centred Hann windows. Spectra are
    scaled so that white noise of standard deviation 1 has unit power at every resolution.

    Source: the multi-scale mel loss of Kumar et al. 2023 (DAC, arXiv 2306.06546), with fewer bands at short windows.

    Args:
        sample_rate_hz: Sampling rate in Hz.
        n_ffts: Window lengths in samples.
        num_mels: Bands, one number per window length.
        magnitude_weight: Weight of the magnitude term against the log term.
        floor: Smallest magnitude under the logarithm; 1e-4 is white noise at -80 dB of full scale.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        n_ffts: Sequence[int] = (256, 512, 1024, 2048),
        num_mels: Sequence[int] = (40, 64, 80, 128),
        magnitude_weight: float = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        if len(n_ffts) != len(num_mels) or not n_ffts:
            raise ValueError(f"n_ffts={tuple(n_ffts)} and num_mels={tuple(num_mels)} must be of one length, at least 1")
        self.n_ffts = tuple(n_ffts)
        self.magnitude_weight = magnitude_weight
        self.floor = floor
        for n_fft, bands in zip(n_ffts, num_mels, strict=True):
            window = torch.hann_window(n_fft)
            self.register_buffer(f"window_{n_fft}", window / window.square().sum().sqrt(), persistent=False)
            self.register_buffer(f"filterbank_{n_fft}", mel_filterbank(sample_rate_hz, n_fft, bands), persistent=False)

    def mel(self, waveform: Float[Tensor, "B 1 S"], n_fft: int) -> Float[Tensor, "B T M"]:
        """Mel magnitudes at one of the resolutions."""
        window, bank = self.get_buffer(f"window_{n_fft}"), self.get_buffer(f"filterbank_{n_fft}")
        spectrum = torch.stft(
            waveform.squeeze(1).to(window.dtype),
            n_fft,
            n_fft // 4,
            window=window,
            pad_mode="constant",  # reflection would need more samples than half a window
            return_complex=True,
        )
        return spectrum.abs().transpose(1, 2) @ bank

    def forward(self, predicted: Float[Tensor, "B 1 S"], target: Float[Tensor, "B 1 S"]) -> Float[Tensor, ""]:
        """Distance of `predicted` to `target`; only `predicted` receives a gradient."""
        total = predicted.new_zeros((), dtype=torch.float32)
        for n_fft in self.n_ffts:
            with torch.no_grad():
                wanted = self.mel(target, n_fft)
            found = self.mel(predicted, n_fft)
            logs = F.l1_loss(found.clamp(min=self.floor).log(), wanted.clamp(min=self.floor).log())
            total = total + logs + self.magnitude_weight * F.l1_loss(found, wanted)
        return total / len(self.n_ffts)
