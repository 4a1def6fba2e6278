"""From nats to figures one may publish: per frame, per codebook, bits per second of audio, intervals over clips.

Likelihoods of models of different representation compare when all score the same noised latents z + sigma * eps, take
codes from these same latents, and see the same past: a hybrid model's -log p(c) - log p(z | c) then bounds from above
its -log p(z), the quantity that a continuous model scores.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlm.config import ModelConfig
from hybridlm.frame_nll import FrameNLL

NOISE_BLOCK = 64


def noise_latents(latents: Float[Tensor, "B T D"], sigma: float, seeds: Sequence[int]) -> Float[Tensor, "B T D"]:
    """z + sigma * eps, the eps of a row drawn from its own seed.

    The noise of a frame depends on the seed and the frame's number alone, not on the batch, its padding or the device:
    it is drawn on the CPU in blocks of 64 frames (a longer draw is not a continuation of a shorter one).
    """
    if len(seeds) != latents.shape[0]:
        raise ValueError(f"{len(seeds)} seeds given for {latents.shape[0]} rows; give one a row")
    if sigma == 0.0:
        return latents
    _, length, dim = latents.shape
    noise = torch.empty(len(seeds), math.ceil(length / NOISE_BLOCK) * NOISE_BLOCK, dim)
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for block in noise[row].split(NOISE_BLOCK):
            block.normal_(generator=generator)
    return latents + sigma * noise[:, :length].to(latents)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipNLL:
    """The likelihood of one clip: sums in nats, over its frames."""

    num_frames: int
    codes: tuple[float, ...]
    """Per codebook; empty for a continuous model."""
    latents: float
    stop: float
    correct: tuple[int, ...]
    """Most likely code was the true one, frames per codebook."""

    @property
    def total(self) -> float:
        """-log p of the clip."""
        return sum(self.codes) + self.latents + self.stop

    def __add__(self, other: ClipNLL) -> ClipNLL:
        """The two as one clip; for audio that is scored in pieces."""
        return ClipNLL(
            num_frames=self.num_frames + other.num_frames,
            codes=tuple(a + b for a, b in zip(self.codes, other.codes, strict=True)),
            latents=self.latents + other.latents,
            stop=self.stop + other.stop,
            correct=tuple(a + b for a, b in zip(self.correct, other.correct, strict=True)),
        )


def clip_nlls(nll: FrameNLL) -> list[ClipNLL]:
    """Sum a batch's frames into clips, in float64."""
    frames = nll.mask.sum(dim=1).tolist()
    codes = nll.codes.double().sum(dim=2).tolist()
    latents = nll.latents.double().sum(dim=1).tolist()
    stop = nll.stop.double().sum(dim=1).tolist()
    correct = nll.correct.sum(dim=2).tolist()
    return [
        ClipNLL(num_frames=n, codes=tuple(c), latents=z, stop=s, correct=tuple(r))
        for n, c, z, s, r in zip(frames, codes, latents, stop, correct, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLikelihood:
    """One stream over all clips."""

    nats_per_frame: Interval
    bits_per_second: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodReport:
    """What `evaluate` prints; streams that the model does not predict are None."""

    num_clips: int
    num_frames: int
    seconds: float
    representation: str
    sigma: float
    """Noise of the scored latents; without it a continuous figure means nothing."""
    scale_floor: float
    """Floor of the density's standard deviations; likewise."""
    codes: StreamLikelihood | None
    latents: StreamLikelihood | None
    stop: StreamLikelihood
    total: StreamLikelihood
    codebook_nats: tuple[Interval, ...]
    """Per codebook, nats a frame."""
    codebook_accuracy: tuple[Interval, ...]
    """Per codebook, share of frames in [0, 1] whose code was the most likely one."""
    perplexity: tuple[float, ...]
    """Per codebook, exp of its nats a frame."""


def bits_per_second(nats_per_frame: float, frame_rate_hz: float) -> float:
    """Bits of information (negative for densities above 1) a second of audio."""
    return nats_per_frame * frame_rate_hz / math.log(2.0)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0, num_resamples: int = 2000
) -> Interval:
    """sum(numerators) / sum(denominators) over clips, with the percentile bootstrap's 95 % interval.

    Clips, not frames, are drawn with replacement: frames of a clip are not independent. The same seed draws the same
    clips, whatever the numerators, so that intervals of one set of clips belong together.

    Raises:
        ValueError: without clips, or for sequences of different length.
    """
    return bootstrap_ratios([numerators], denominators, seed=seed, num_resamples=num_resamples)[0]


def bootstrap_ratios(
    numerators: Sequence[Sequence[float]], denominators: Sequence[float], *, seed: int = 0, num_resamples: int = 2000
) -> list[Interval]:
    """`bootstrap_ratio` of each of several sequences of numerators, for the price of one drawing."""
    for row in numerators:
        if len(row) != len(denominators) or len(row) == 0:
            raise ValueError(
                f"{len(row)} numerators and {len(denominators)} denominators must be equally many, at least 1"
            )
    top = torch.tensor([list(row) for row in numerators], dtype=torch.float64)  # (figures, clips)
    bottom = torch.tensor(list(denominators), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.empty(len(top), num_resamples, dtype=torch.float64)
    for i in range(num_resamples):
        drawn = torch.randint(len(bottom), (len(bottom),), generator=generator)
        ratios[:, i] = top[:, drawn].sum(dim=1) / bottom[drawn].sum()
    values = (top.sum(dim=1) / bottom.sum()).tolist()
    bounds = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1).T.tolist()
    return [Interval(value=value, low=low, high=high) for value, (low, high) in zip(values, bounds, strict=True)]


def paired_difference(
    first: Sequence[ClipNLL],
    second: Sequence[ClipNLL],
    nats: Callable[[ClipNLL], float],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
) -> Interval:
    """Difference first - second in nats a frame, paired by clip: below 0 means that the first model is better.

    Args:
        first: One model's clips.
        second: The other's, of the same clips in the same order.
        nats: What to compare, such as `lambda clip: clip.total` or `lambda clip: sum(clip.codes)`.
        seed: Of the bootstrap.
        num_resamples: Of the bootstrap.

    Raises:
        ValueError: if the clips are not the same.
    """
    frames = [clip.num_frames for clip in first]
    if frames != [clip.num_frames for clip in second]:
        raise ValueError("the two models must have scored the same clips in the same order; their frame counts differ")
    differences = [nats(a) - nats(b) for a, b in zip(first, second, strict=True)]
    return bootstrap_ratio(differences, frames, seed=seed, num_resamples=num_resamples)


def summarize(
    clips: Sequence[ClipNLL], config: ModelConfig, *, seed: int = 0, num_resamples: int = 2000
) -> LikelihoodReport:
    """The report of one model on clips.

    Args:
        clips: At least one, with at least one frame.
        config: The model's, for its frame rate, its streams, sigma and the scale floor.
        seed: Of the bootstrap.
        num_resamples: Of the bootstrap.

    Raises:
        ValueError: without clips.
    """
    scored = [clip for clip in clips if clip.num_frames > 0]
    frames = [clip.num_frames for clip in scored]
    books = range(config.output_codebooks)
    figures: dict[str, list[float]] = {"stop": [clip.stop for clip in scored], "total": [clip.total for clip in scored]}
    if config.uses_codes:
        figures["codes"] = [sum(clip.codes) for clip in scored]
    if config.predicts_latents:
        figures["latents"] = [clip.latents for clip in scored]
    figures |= {f"nats {k}": [clip.codes[k] for clip in scored] for k in books}
    figures |= {f"accuracy {k}": [float(clip.correct[k]) for clip in scored] for k in books}
    intervals = bootstrap_ratios(list(figures.values()), frames, seed=seed, num_resamples=num_resamples)
    found = dict(zip(figures, intervals, strict=True))

    def stream(name: str) -> StreamLikelihood:
        nats, rate = found[name], config.frame_rate_hz
        bits = Interval(
            value=bits_per_second(nats.value, rate),
            low=bits_per_second(nats.low, rate),
            high=bits_per_second(nats.high, rate),
        )
        return StreamLikelihood(nats_per_frame=nats, bits_per_second=bits)

    codebook_nats = tuple(found[f"nats {k}"] for k in books)
    return LikelihoodReport(
        num_clips=len(scored),
        num_frames=sum(frames),
        seconds=sum(frames) / config.frame_rate_hz,
        representation=config.representation,
        sigma=config.sigma,
        scale_floor=config.scale_floor,
        codes=stream("codes") if "codes" in found else None,
        latents=stream("latents") if "latents" in found else None,
        stop=stream("stop"),
        total=stream("total"),
        codebook_nats=codebook_nats,
        codebook_accuracy=tuple(found[f"accuracy {k}"] for k in books),
        perplexity=tuple(torch.tensor(nats.value, dtype=torch.float64).exp().item() for nats in codebook_nats),
    )
