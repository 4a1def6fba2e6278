"""How far one recording is from another, and how loud and how many bits it is. Every figure's unit ends its name.

All functions take waveforms of one length at one rate, already aligned in time; a codec's output is cut to its input.
STOI and PESQ need the extra `hybridlm[metrics]`. A figure that two clips do not have raises `Undefined`.

Shapes: S samples, K codebooks, T frames, V codebook size, N frequencies, M mel bands.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
import torchaudio.functional as AF
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.mel import MultiResolutionMelLoss, mel_filterbank

MEL_WINDOW, MEL_HOP, MEL_BANDS, MEL_FLOOR = 1024, 256, 80, 1e-5
PESQ_RATE_HZ = 16000
STOI_SHORTEST_S = 0.4
STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""Transform, hop and window in samples of `multi_resolution_stft_distance`."""
LATENT_BITS = 16
"""Bits of a latent's number where a rate of latents is told."""
NAN = float("nan")


class Undefined(Exception):
    """The clips do not have this figure; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioDistance:
    """An estimate against its reference. A figure that is not defined for a clip is NaN."""

    mel_distance: float
    """See `mel_distance`; nats."""
    mel_cepstral_distortion_db: float
    log_spectral_distance_db: float
    si_sdr_db: float
    stoi: float
    """Short-time objective intelligibility, 0 to 1; NaN unless asked for."""
    pesq_wb: float
    """Wide-band PESQ as MOS-LQO, about 1.0 to 4.6; NaN unless asked for."""
    loudness_change_db: float
    """Level of the estimate minus level of the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bitrate:
    """What codes cost."""

    nominal_bits_per_second: float
    """K log2(V) times the frame rate."""
    entropy_bits_per_second: float
    """With each codebook's empirical zeroth-order entropy in place of log2(V)."""
    codes_used: float
    """Fraction of codebook entries that occur at all, averaged over the codebooks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over clips and its 95 % bootstrap interval; all NaN when no clip has the figure."""

    mean: float
    low: float
    high: float
    count: int


def compare_audio(
    reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int, *, speech: bool
) -> AudioDistance:
    """All distances of one clip.

    Args:
        reference: The original.
        estimate: What is judged.
        sample_rate_hz: Rate of both.
        speech: Compute STOI and PESQ too, which mean something for speech only.

    Raises:
        UserError: `speech` and the libraries of STOI or PESQ are not installed.
    """
    return AudioDistance(
        mel_distance=mel_distance(reference, estimate, sample_rate_hz),
        mel_cepstral_distortion_db=mel_cepstral_distortion(reference, estimate, sample_rate_hz),
        log_spectral_distance_db=log_spectral_distance(reference, estimate),
        si_sdr_db=_or_nan(si_sdr, reference, estimate),
        stoi=_or_nan(stoi, reference, estimate, sample_rate_hz) if speech else NAN,
        pesq_wb=_or_nan(pesq_wb, reference, estimate, sample_rate_hz) if speech else NAN,
        loudness_change_db=level_db(estimate) - level_db(reference),
    )


def mel_distance(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int) -> float:
    """Mean absolute difference of two log-mel spectrograms, in nats (1 nat = 8.7 dB).

    Exactly: periodic Hann window of 1024 samples divided by its sum, hop 256, frames centred with zeros beyond the
    ends; magnitudes; 80 triangular bands on Slaney's scale from 0 Hz to the Nyquist frequency, each summing to one;
    natural logarithm of the value floored at 1e-5; L1 averaged over bands and frames.
    """
    return (log_mel(reference, sample_rate_hz) - log_mel(estimate, sample_rate_hz)).abs().mean().item()


def magnitudes(waveform: Float[Tensor, " S"]) -> Float[Tensor, "T N"]:
    """Spectral magnitudes as `mel_distance` takes them, of N frequencies from 0 Hz to the Nyquist frequency.

    A full-scale sine reaches about 0.5.
    """
    window = torch.hann_window(MEL_WINDOW, device=waveform.device)
    spectrum = torch.stft(
        waveform.float(), MEL_WINDOW, MEL_HOP, window=window / window.sum(), pad_mode="constant", return_complex=True
    )
    return spectrum.abs().T


def log_mel(waveform: Float[Tensor, " S"], sample_rate_hz: int) -> Float[Tensor, "T M"]:
    """The log-mel spectrogram of `mel_distance`: natural logarithms of M = 80 bands."""
    bank = mel_filterbank(sample_rate_hz, MEL_WINDOW, MEL_BANDS).to(waveform.device)
    return (magnitudes(waveform) @ bank).clamp(min=MEL_FLOOR).log()


def mel_cepstral_distortion(
    reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int, num_coefficients: int = 13
) -> float:
    """Mel-cepstral distortion in dB: (10 / ln 10) sqrt(2 sum of squared differences), averaged over frames.

    The coefficients 1 to `num_coefficients` of the orthonormal DCT-II of `mel_distance`'s log-mel; the zeroth, the
    level, is left out, and frames are compared one to one, without warping (Kubichek 1993).
    """
    basis = AF.create_dct(num_coefficients + 1, MEL_BANDS, "ortho")[:, 1:].to(reference.device)
    difference = (log_mel(reference, sample_rate_hz) - log_mel(estimate, sample_rate_hz)) @ basis
    # The formula's cepstrum c is that of log|X| = sum of c_m cos: (2 / bands) times the cosine sums, where the
    # orthonormal transform has sqrt(2 / bands).
    difference = difference * math.sqrt(2.0 / MEL_BANDS)
    return (10.0 / math.log(10.0) * (2.0 * difference.square().sum(dim=-1)).sqrt()).mean().item()


def log_spectral_distance(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"]) -> float:
    """Root mean square over frequencies of the difference of log-magnitudes in dB, averaged over frames.

    The transform of `mel_distance`, magnitudes floored at 1e-5 (-100 dB).
    """
    spectra = [magnitudes(x).clamp(min=MEL_FLOOR) for x in (reference, estimate)]
    difference = 20.0 * (spectra[0].log10() - spectra[1].log10())
    return difference.square().mean(dim=-1).sqrt().mean().item()


def multi_resolution_mel_distance(
    reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int
) -> float:
    """Mean absolute difference of log-mel spectrograms over windows of 256, 512, 1024 and 2048 samples, in nats.

    Source: the logarithmic term of `tokenizer.mel.MultiResolutionMelLoss`, which names its bands and its floor.
    """
    distance = _mel_distances(sample_rate_hz).to(reference.device)
    return distance(estimate.reshape(1, 1, -1), reference.reshape(1, 1, -1)).item()


def multi_resolution_stft_distance(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"]) -> float:
    """Spectral convergence plus mean absolute difference of log-magnitudes (nats), averaged over `STFT_RESOLUTIONS`.

    Spectral convergence is the Frobenius norm of the magnitudes' difference over that of the reference's; squared
    magnitudes are floored at 1e-8. Zeros continue the signals, where the source reflects them at their ends.

    Source: Yamamoto et al. 2020 (Parallel WaveGAN, arXiv 1910.11480), with the resolutions and the floor of
    `auraloss.freq.MultiResolutionSTFTLoss` (Steinmetz & Reiss 2020).
    """
    total = 0.0
    for n_fft, hop, width in STFT_RESOLUTIONS:
        wanted, found = (_stft_magnitudes(x, n_fft, hop, width) for x in (reference, estimate))
        convergence = (wanted - found).norm() / wanted.norm()
        total += (convergence + (wanted.log() - found.log()).abs().mean()).item()
    return total / len(STFT_RESOLUTIONS)


def si_sdr(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"]) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, of zero-mean signals; infinite for a copy.

    Source: Le Roux et al. 2019, "SDR - half-baked or well done?".

    Raises:
        Undefined: the reference is silent.
    """
    wanted, found = (x.double() - x.double().mean() for x in (reference, estimate))
    energy = wanted.square().sum()
    if energy == 0:
        raise Undefined("the reference is silent")
    target = (found @ wanted / energy) * wanted
    noise = (found - target).square().sum()
    return (10.0 * torch.log10(target.square().sum() / noise)).item()


def stoi(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), 0 to 1.

    Raises:
        Undefined: less than 0.4 s of the reference is not silent.
        UserError: `pystoi` is not installed.
    """
    module = _import("pystoi", "STOI")
    if not reference.any():
        raise Undefined("the reference is silent")
    seconds = len(reference) / sample_rate_hz
    if seconds < STOI_SHORTEST_S:
        raise Undefined(f"{seconds:.2f} s are too short, STOI needs {STOI_SHORTEST_S} s")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            value = float(module.stoi(_array(reference), _array(estimate), sample_rate_hz))
        except RuntimeWarning as error:
            raise Undefined(f"less than {STOI_SHORTEST_S} s of the reference are not silent") from error
    if not math.isfinite(value):
        raise Undefined("STOI gives no number for these signals")
    return value


def pesq_wb(reference: Float[Tensor, " S"], estimate: Float[Tensor, " S"], sample_rate_hz: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2) as MOS-LQO, after resampling to 16 kHz.

    Raises:
        Undefined: a signal is silent or too short, or holds no utterance.
        UserError: `pesq` is not installed.
    """
    module = _import("pesq", "PESQ")
    signals = []
    for name, waveform in (("reference", reference), ("estimate", estimate)):
        if not waveform.any():  # it normalizes by the level of both
            raise Undefined(f"the {name} is silent")
        signals.append(_array(AF.resample(waveform.float().cpu(), sample_rate_hz, PESQ_RATE_HZ)))
    try:
        value = float(module.pesq(PESQ_RATE_HZ, *signals, "wb"))
    except module.NoUtterancesError as error:
        raise Undefined("PESQ finds no utterance") from error
    except module.BufferTooShortError as error:
        raise Undefined(f"{len(signals[0]) / PESQ_RATE_HZ:.2f} s are too short for PESQ") from error
    if not math.isfinite(value):
        raise Undefined("PESQ gives no number for these signals")
    return value


def level_db(waveform: Float[Tensor, " S"]) -> float:
    """Root-mean-square level in dB of full scale (a full-scale square wave is 0), at least -120."""
    if waveform.numel() == 0:
        return -120.0
    return 20.0 * math.log10(max(waveform.double().square().mean().sqrt().item(), 1e-6))


def silence_ratio(waveform: Float[Tensor, " S"], sample_rate_hz: int, threshold_db: float = -50.0) -> float:
    """Fraction of 20 ms frames whose level is below `threshold_db` dB of full scale; NaN for less than one frame."""
    width = sample_rate_hz // 50
    if len(waveform) < width:
        return NAN
    frames = waveform.double().unfold(0, width, width)  # (T, width)
    return (frames.square().mean(dim=1) < 10.0 ** (threshold_db / 10.0)).double().mean().item()


def codes_bitrate(codes: Sequence[Int[Tensor, "K _"]], codebook_size: int, frame_rate_hz: float) -> Bitrate:
    """Bits per second of codes, nominal and as found.

    Args:
        codes: Clips of (K, T) codes, padding removed; together the sample whose entropy is measured.
        codebook_size: V.
        frame_rate_hz: Frames per second.

    Raises:
        ValueError: there is no frame at all.
    """
    together = torch.cat(list(codes), dim=1)  # (K, T)
    if together.shape[1] == 0:
        raise ValueError("the bitrate of codes needs at least one frame, but all clips are empty")
    bits, used = 0.0, 0.0
    for stream in together:
        counts = torch.bincount(stream, minlength=codebook_size).double()
        shares = counts[counts > 0] / counts.sum()
        bits -= (shares * shares.log2()).sum().item()
        used += len(shares) / codebook_size
    return Bitrate(
        nominal_bits_per_second=len(together) * math.log2(codebook_size) * frame_rate_hz,
        entropy_bits_per_second=bits * frame_rate_hz,
        codes_used=used / len(together),
    )


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, num_resamples: int = 2000) -> Interval:
    """Mean over clips with the percentile bootstrap's 95 % interval; clips whose value is NaN are left out.

    Args:
        values: One per clip.
        seed: Of the resampling.
        num_resamples: Bootstrap samples.
    """
    defined = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if len(defined) == 0:
        return Interval(mean=NAN, low=NAN, high=NAN, count=0)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(defined), (num_resamples, len(defined)), generator=generator)
    low, high = defined[chosen].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=defined.mean().item(), low=low, high=high, count=len(defined))


@lru_cache(maxsize=4)
def _mel_distances(sample_rate_hz: int) -> MultiResolutionMelLoss:
    return MultiResolutionMelLoss(sample_rate_hz, magnitude_weight=0.0)


def _stft_magnitudes(waveform: Tensor, n_fft: int, hop: int, width: int) -> Tensor:
    window = torch.hann_window(width, device=waveform.device)
    spectrum = torch.stft(waveform.float(), n_fft, hop, width, window=window, pad_mode="constant", return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-8).sqrt()


def _or_nan(measure: Callable[..., float], *arguments: Tensor | int) -> float:
    try:
        return measure(*arguments)
    except Undefined:
        return NAN


def _array(waveform: Tensor) -> np.ndarray:
    return waveform.detach().cpu().double().numpy()


def _import(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {name}; install it: pip install 'hybridlm[metrics]'") from error
