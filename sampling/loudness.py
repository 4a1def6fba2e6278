"""One gain that gives a recording a loudness, by ITU-R BS.1770-4, without letting its peaks overload.

Loudness is gated and K-weighted (torchaudio); the true peak is that of the signal at four times its rate, as in annex 2
of the recommendation. Nothing is compressed: where the peak leaves no room, the result stays quieter than asked.

Shapes: S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torchaudio.functional import loudness as bs1770_loudness
from torchaudio.functional import resample

TRUE_PEAK_LIMIT_DB = -1.0
"""dB of full scale, as in EBU R 128."""
BLOCK_SECONDS = 0.4
"""What is shorter has no loudness."""
OVERSAMPLING = 4


def true_peak_db(waveform: Float[Tensor, "1 S"]) -> float:
    """Highest level between samples, in dB of full scale; -inf for silence."""
    peak = float(resample(waveform.float(), 1, OVERSAMPLING).abs().amax())
    return 20.0 * math.log10(peak) if peak > 0 else -math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What a recording is multiplied by, and how loud that makes it."""

    factor: float
    lufs: float
    """Below what was asked for where the true peak leaves no more room."""


def loudness_lufs(waveform: Float[Tensor, "1 S"], sample_rate_hz: int) -> float | None:
    """Gated loudness; None where there is none: shorter than 0.4 s, or silent by the recommendation's gates."""
    if waveform.shape[-1] < round(BLOCK_SECONDS * sample_rate_hz):
        return None
    # torchaudio's filters clip at full scale, which K-weighting of loud treble goes beyond.
    halvings = 1 if bool((waveform.abs() > 0.5).any()) else 0
    found = float(bs1770_loudness(waveform.double() / 2**halvings, sample_rate_hz))
    return found + halvings * 20.0 * math.log10(2.0) if math.isfinite(found) else None


def gain_to(lufs: float, waveform: Float[Tensor, "1 S"], sample_rate_hz: int) -> Gain | None:
    """The gain that makes a recording `lufs` loud, or as loud as its true peak allows.

    Returns:
        None for a recording that has no loudness.
    """
    found = loudness_lufs(waveform, sample_rate_hz)
    if found is None:
        return None
    change = min(lufs - found, TRUE_PEAK_LIMIT_DB - true_peak_db(waveform))
    return Gain(factor=10.0 ** (change / 20.0), lufs=found + change)
