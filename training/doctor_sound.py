"""How the recordings themselves are: rate, true bandwidth, clipping, silence, offset, loudness.

Files are read as they are, at their own rate: resampling would hide what is looked for.

Shapes: S samples, T frames, F bins.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torchaudio.functional import resample

from tokenizer.audio import audio_blocks, audio_info
from tokenizer.mel import mel_filterbank
from tokenizer.metrics import level_db, silence_ratio
from training.manifest import Clip
from training.silent_ends import sound_span
from training.verdict import Verdict, judge

LONGEST_S = 30.0
"""Seconds that are read of a clip."""
BIN_HZ = 24.0
"""Resolution of the spectrum in which the end of the band is looked for."""
LOWEST_EDGE_HZ = 2000.0
CLIFF_DB = 20.0
"""Level that a spectrum loses at the end of a filtered band, within a quarter of an octave, and never regains."""
NARROW = 0.75
"""A band that ends below this share of what the file and the model can hold is told."""
CLIPPED_SHARE = 2e-4
SILENT_PEAK = 1e-3
EDGE_SILENCE_S = 1.0
PRINT_HZ, PRINT_BANDS, PRINT_RATE = 8000, 32, 40
"""Of the fingerprint that near copies are found by: sampling rate, mel bands, frames a second."""
ALIKE = 0.8
"""Correlation of two fingerprints from which they count as one recording; different sentences of one voice reach 0.4,
the same word or note by the same voice or instrument 0.79."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """Facts of one clip."""

    clip: Clip
    sample_rate_hz: int
    duration_s: float
    """Of the whole clip."""
    bandwidth_hz: float
    """Where the spectrum ends; half the sampling rate when it does not end before."""
    clipped: float
    """Share of samples in runs that are cut off flat."""
    silence: float
    """Share of 20 ms frames below -50 dB."""
    edge_silence_s: float
    """The longer of the silences at its ends."""
    offset: float
    """Mean of the samples."""
    level_db: float
    peak: float
    print: npt.NDArray[np.float32]
    """(T, bands) fingerprint."""


def listen(clip: Clip) -> Sound:
    """Read a clip and take its facts.

    Raises:
        UserError: it can't be read.
    """
    info = audio_info(clip.audio)
    rate = info.sample_rate_hz
    whole = clip.read_duration if clip.read_duration is not None else info.duration_s - (clip.start or 0.0)
    blocks = audio_blocks(clip.audio, rate, clip.start, min(clip.read_duration or LONGEST_S, LONGEST_S))
    x = torch.cat([block[0] for block in blocks])
    return Sound(
        clip=clip,
        sample_rate_hz=rate,
        duration_s=min(whole, info.duration_s),
        bandwidth_hz=bandwidth_hz(x, rate),
        clipped=clipped_share(x.numpy()),
        silence=silence_ratio(x, rate),
        edge_silence_s=_edge_silence(x, rate),
        offset=float(x.double().mean()),
        level_db=level_db(x),
        peak=float(x.abs().max()),
        print=_print(x, rate),
    )


def bandwidth_hz(x: Float[Tensor, " S"], sample_rate_hz: int) -> float:
    """Where a recording's band ends: what lies above was never there, whatever its sampling rate says.

    The end is a cliff: the spectrum (the 95th percentile over time, in dB) loses `CLIFF_DB` within a quarter of an
    octave and stays down. Falling off as voices do is no cliff.
    """
    nyquist = sample_rate_hz / 2
    n_fft = max(round(sample_rate_hz / BIN_HZ), 64)
    if len(x) < 2 * n_fft or not bool(x.any()):
        return nyquist
    spectrum = torch.stft(x.double(), n_fft, n_fft // 2, window=torch.hann_window(n_fft).double(), return_complex=True)
    level = 20 * spectrum.abs().quantile(0.95, dim=1).clamp(min=1e-9).log10()  # (F,)
    width = sample_rate_hz / n_fft

    def band(low: float, high: float) -> Tensor:
        return level[round(low / width) : max(round(high / width), round(low / width) + 1)]

    edge = LOWEST_EDGE_HZ
    while 1.1 * edge <= nyquist:
        below, above = band(0.85 * edge, 0.95 * edge).median(), band(1.05 * edge, 1.2 * edge).median()
        # Not the maximum: images of what is loud and low, which cheap resampling leaves, lie at the very top.
        rest = band(1.05 * edge, nyquist).quantile(0.8)
        if float(below - above) >= CLIFF_DB and float(below - rest) >= 0.6 * CLIFF_DB:
            # The cliff is found when all of it has been passed; its middle is where the band ends.
            slope = level[round(0.8 * edge / width) : round(1.2 * edge / width)]
            return float(0.8 * edge + width * int((slope > (below + above) / 2).nonzero().max()))
        edge *= 1.02
    return nyquist


def clipped_share(x: npt.NDArray[np.float32]) -> float:
    """Share of samples in runs of three or more at the peak that the signal enters with a corner, as no crest does."""
    size = np.abs(x)
    peak = float(size.max(initial=0.0))
    if peak < 0.05:
        return 0.0
    flat = size >= 0.999 * peak
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    before = np.where(starts > 0, size[np.maximum(starts - 1, 0)], peak)
    cut = (ends - starts >= 3) & (size[starts] - before >= 0.01 * peak)
    return float((ends - starts)[cut].sum()) / len(x)


def _edge_silence(x: Float[Tensor, " S"], rate: int) -> float:
    begin, end = sound_span([x], rate) or (len(x) / rate, 0.0)
    return max(begin, len(x) / rate - end)


def _print(x: Tensor, rate: int) -> npt.NDArray[np.float32]:
    """How the log-mel spectrum changes over time and bands (Haitsma & Kalker 2002): what is alike in all speech, or in
    all notes of an instrument, is gone."""
    y = resample(x[: 10 * rate], rate, PRINT_HZ) if rate != PRINT_HZ else x[: 10 * rate]
    hop = PRINT_HZ // PRINT_RATE
    if len(y) < 2 * hop:
        return np.zeros((0, PRINT_BANDS - 1), dtype=np.float32)
    spectrum = torch.stft(y, 512, hop, window=torch.hann_window(512), pad_mode="constant", return_complex=True)
    mel = spectrum.abs().T @ mel_filterbank(PRINT_HZ, 512, PRINT_BANDS)
    mel = mel.clamp(min=max(1e-2 * float(mel.max()), 1e-6)).log()  # whatever the loudness
    return mel.diff(dim=0).diff(dim=1).numpy().astype(np.float32)


def sound_verdicts(sounds: Sequence[Sound], of_clips: int, model_rate_hz: int) -> list[Verdict]:
    """Judge the clips that were listened to.

    Args:
        sounds: Their facts.
        of_clips: How many the corpus has.
        model_rate_hz: Sampling rate of the model's tokenizer.
    """
    count = len(sounds)
    on = f"of {count} clips" + ("" if count == of_clips else f" sampled from {of_clips}")
    rates = Counter(sound.sample_rate_hz for sound in sounds)
    low = [s for s in sounds if s.sample_rate_hz < NARROW * model_rate_hz]
    narrow = [s for s in sounds if s.bandwidth_hz < NARROW * min(s.sample_rate_hz, model_rate_hz) / 2]
    clipped = [s for s in sounds if s.clipped > CLIPPED_SHARE]
    silent = [s for s in sounds if s.peak < SILENT_PEAK]
    edges = [s for s in sounds if s.edge_silence_s > EDGE_SILENCE_S and s not in silent]
    offset = [s for s in sounds if abs(s.offset) > 0.01]
    levels = sorted(s.level_db for s in sounds if s.peak >= SILENT_PEAK) or [-120.0]
    spread = levels[int(0.95 * (len(levels) - 1))] - levels[int(0.05 * (len(levels) - 1))]
    quiet = statistics.median(s.silence for s in sounds if not math.isnan(s.silence)) if count else 0.0
    return [
        judge(
            "sample rate",
            f"{', '.join(f'{n} at {rate / 1000:g} kHz' for rate, n in rates.most_common(4))}, {on}; "
            f"the model hears {model_rate_hz / 1000:g} kHz",
            look=bool(low),
            remedy="files below the model's rate teach it to sound dull: find better ones or keep them apart by a tag",
            figures={"rates_hz": dict(rates), "below_the_model": len(low)},
            examples=[s.clip.key for s in low],
        ),
        judge(
            "bandwidth",
            f"{len(narrow)} {on} hold less than their sample rate says",
            look=bool(narrow),
            remedy="they were made of narrower recordings: find the originals or leave them out",
            figures={"narrow": len(narrow), "clips": count},
            examples=[f"{s.clip.key} up to {s.bandwidth_hz / 1000:.1f} kHz" for s in narrow],
        ),
        judge(
            "clipping",
            f"{len(clipped)} {on} are cut off at their peaks",
            look=bool(clipped),
            remedy="record them lower, or leave them out",
            figures={"clipped": len(clipped), "clips": count},
            examples=[f"{s.clip.key} ({s.clipped:.2%} of samples)" for s in clipped],
        ),
        judge(
            "silence",
            f"{len(silent)} {on} are silent, {len(edges)} begin or end with more than {EDGE_SILENCE_S:g} s of it; "
            f"half have less than {quiet:.0%}",
            look=bool(silent) or 10 * len(edges) > count or quiet > 0.5,
            broken=2 * len(silent) > count,
            remedy="trim the ends (`hybridlm prepare --trim-silence 0.3`, which leaves silent clips out): a model "
            "learns to be silent",
            figures={"silent": len(silent), "long_ends": len(edges), "median_share": quiet},
            examples=[s.clip.key for s in [*silent, *edges]],
        ),
        judge(
            "offset",
            f"{len(offset)} {on} have a constant offset above 0.01",
            look=bool(offset),
            remedy="take it out with a high-pass filter",
            figures={"offset": len(offset)},
            examples=[f"{s.clip.key} ({s.offset:+.3f})" for s in offset],
        ),
        judge(
            "loudness",
            f"{levels[len(levels) // 2]:.0f} dB in the median, nine in ten within {spread:.0f} dB, {on}",
            look=spread > 20 or levels[len(levels) // 2] < -42,
            remedy="level them: the model would learn loudness as if it meant something",
            figures={"median_db": levels[len(levels) // 2], "spread_db": spread},
        ),
    ]


def near_copies(sounds: Sequence[Sound], alike: float = ALIKE) -> list[tuple[Sound, Sound, float]]:
    """Pairs that agree at some shift, whatever their file, loudness or sampling rate; clips below 1 s are left out.

    Args:
        sounds: Clips.
        alike: Correlation over time and bands from which two clips count as one recording.
    """
    usable = [s for s in sounds if len(s.print) >= PRINT_RATE and s.peak >= SILENT_PEAK]
    if len(usable) < 2:
        return []
    length = 2 * max(len(s.print) for s in usable)
    prints = torch.zeros(len(usable), PRINT_BANDS - 1, length)
    for row, sound in enumerate(usable):
        prints[row, :, : len(sound.print)] = torch.from_numpy(sound.print).T
    prints = prints / prints.square().sum(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    spectra = torch.fft.rfft(prints)
    found = []
    for row in range(len(usable) - 1):
        products = (spectra[row + 1 :] * spectra[row].conj()).sum(dim=1)
        best = torch.fft.irfft(products, n=length).amax(dim=1)
        found += [
            (usable[row], usable[row + 1 + at], float(best[at])) for at in (best >= alike).nonzero()[:, 0].tolist()
        ]
    return found


def copies_verdict(sounds: Sequence[Sound], of_clips: int) -> Verdict:
    """Whether some of the clips are the same recording in another form."""
    pairs = near_copies(sounds)
    across = [(a, b, c) for a, b, c in pairs if a.clip.split and b.clip.split and a.clip.split != b.clip.split]
    on = f"{len(sounds)} clips" + ("" if len(sounds) == of_clips else f" sampled from {of_clips}")
    return judge(
        "near copies",
        f"{len(pairs)} pairs among {on} sound the same, {len(across)} of them in two splits",
        look=bool(pairs),
        broken=bool(across),
        remedy="keep one of each pair",
        figures={"pairs": len(pairs), "in_two_splits": len(across), "clips": len(sounds)},
        examples=[f"{a.clip.key} ~ {b.clip.key}" for a, b, _ in [*across, *pairs]],
    )
