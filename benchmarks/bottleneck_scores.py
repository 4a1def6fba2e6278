"""What a codec's latents are worth: parts of recordings, their frames in a cache, and sounds from noised latents.

Shapes: T frames, D latent, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridlm.likelihood import noise_latents
from tokenizer.bottleneck import centre_and_scale
from tokenizer.frames import Tokenizer
from tokenizer.mel import MultiResolutionMelLoss
from tokenizer.metrics import compare_audio
from training.corpus import PcmCache, TokenCache
from training.examples import GOES_ON, clip_seed
from training.layouts import Stream
from training.shards import ShardWriter


class Part(NamedTuple):
    """Samples of a clip."""

    key: str
    """Also decides the noise on the part's latents."""
    clip: int
    start: int
    samples: int


def training_parts(cache: PcmCache, seconds: float, longest_s: float) -> list[Part]:
    """Parts drawn as segments are (by duration times weight), always the same, until they last `seconds` together."""
    rng = np.random.default_rng(0)
    share = cache.index.rows * cache.index.weight
    share = share / share.sum()
    longest, left = round(longest_s * cache.sample_rate_hz), round(seconds * cache.sample_rate_hz)
    parts: list[Part] = []
    while left > 0:
        clip = int(rng.choice(len(share), p=share))
        rows = int(cache.index.rows[clip])
        start = int(rng.integers(0, max(rows - longest, 0) + 1))
        parts.append(Part(f"{cache.index.clip(clip).key}@{len(parts)}", clip, start, min(rows, longest)))
        left -= parts[-1].samples
    return parts


def judged_parts(cache: PcmCache, longest_s: float, per_set: int) -> list[Part]:
    """Beginnings of clips, at most `per_set` of each set (label `set`), evenly spread over it."""
    sets: dict[str, list[int]] = {}
    for clip in range(len(cache)):
        sets.setdefault(set_of(cache, clip), []).append(clip)
    longest = round(longest_s * cache.sample_rate_hz)
    parts = []
    for clips in sets.values():
        count = min(per_set, len(clips))
        for clip in (clips[index * len(clips) // count] for index in range(count)):
            parts.append(Part(cache.index.clip(clip).key, clip, 0, min(int(cache.index.rows[clip]), longest)))
    return parts


def set_of(cache: PcmCache, clip: int) -> str:
    """A clip's label `set`."""
    return cache.index.clip(clip).labels.get("set", "all")


@torch.inference_mode()
def write_frames(cache: PcmCache, parts: Sequence[Part], tokenizer: Tokenizer, folder: Path) -> TokenCache:
    """Encode the parts into a cache without text and tags, going on where an earlier call stopped.

    Raises:
        UserError: the folder holds frames of another tokenizer.
    """
    streams = {
        "codes": Stream(dtype="uint16", width=tokenizer.num_codebooks),
        "latents": Stream(dtype="float32", width=tokenizer.latent_dim),
    }
    about = {
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint()}",
        "frame_rate_hz": tokenizer.frame_rate_hz,
        "codebook_size": tokenizer.codebook_size,
    }
    records: list[tuple[str, dict[str, Any]]] = []
    with ShardWriter(folder, kind="tokens", streams=streams, about=about) as writer:
        for part in parts:
            labels = {"set": set_of(cache, part.clip)}
            if part.start + part.samples < int(cache.index.rows[part.clip]):
                labels[GOES_ON] = "true"
            records.append((part.key, {"split": None, "text": None, "tags": [], "labels": labels}))
            stamp = f"{part.start}-{part.samples}"
            if writer.places.get(part.key, ("", None))[0] == stamp:
                continue
            frames = tokenizer.encode(cache.read(part.clip, part.start, part.samples)[None])
            writer.append(part.key, stamp, {"codes": frames.codes[0].T.numpy(), "latents": frames.latents[0].numpy()})
        writer.finish(records)
    return TokenCache(folder, tokenizer=tokenizer)


def spread_of(cache: TokenCache) -> float:
    """Root mean square of the latents about their channels' means: the unit of the noise on them."""
    latents = torch.cat([cache[clip].latents for clip in range(len(cache))])
    return float(centre_and_scale(latents[None])[1])


@torch.inference_mode()
def noise_distances(
    tokenizer: Tokenizer,
    cache: PcmCache,
    parts: Sequence[Part],
    *,
    spread: float,
    sigmas: Sequence[float],
    speech_sets: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Every part decoded from its latents with noise of each strength, against the recording.

    Args:
        tokenizer: The codec.
        cache: Recordings.
        parts: What is judged.
        spread: Unit of the noise.
        sigmas: Strengths in that unit; the noise of a part is the same for all strengths and codecs.
        speech_sets: Sets that STOI and PESQ are taken of.
    """
    mel = MultiResolutionMelLoss(tokenizer.sample_rate_hz)
    for part in parts:
        waveform = cache.read(part.clip, part.start, part.samples)  # (1, S)
        latents = tokenizer.encode(waveform[None]).latents
        name = set_of(cache, part.clip)
        for sigma in sigmas:
            noised = noise_latents(latents, sigma * spread, [clip_seed(part.key)])
            audio = tokenizer.decode_latents(noised)[0, :, : waveform.shape[-1]]
            found = asdict(
                compare_audio(waveform[0], audio[0], tokenizer.sample_rate_hz, speech=name in speech_sets)
            ) | {"multi_mel_distance": float(mel(audio[None], waveform[None]))}
            finite = {key: value if math.isfinite(value) else None for key, value in found.items()}
            yield {"key": part.key, "set": name, "sigma": sigma, **finite}


def noise_floor(latent_dim: int, sigma: float) -> float:
    """Entropy of the noise in a frame, in nats: D / 2 log(2 pi e sigma^2)."""
    return 0.5 * latent_dim * math.log(2.0 * math.pi * math.e * sigma**2)
