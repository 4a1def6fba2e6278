"""Caches made of caches: the controls and shares of a comparison, written once.

A control changes the features alone, so that what a model gains from them can be told from what it gains by having
them: in random order they tell of the clip but not of the moment; zeros tell nothing. A share keeps some of the clips
that are trained on, and all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tokenizer.errors import UserError
from training.corpus import TokenCache
from training.examples import clip_seed
from training.layouts import Stream
from training.manifest import TagRule
from training.shards import ShardWriter

Control = Literal["none", "shuffled", "zeroed"]


def write_derived(
    source: Path, target: Path, *, control: Control = "none", left_out: frozenset[str] = frozenset()
) -> None:
    """A cache of the same frames but for their features or for some clips, going on where an earlier call stopped.

    Args:
        source: A cache of tokens.
        target: The cache to write.
        control: What is done to the features of a clip.
        left_out: Keys of clips that are not taken over.

    Raises:
        UserError: a control of features on a cache without any.
    """
    cache = TokenCache(source)
    reader = cache.index.readers[0]
    if control != "none" and "features" not in reader.streams:
        raise UserError(f"{source} has no features; prepare it with a tokenizer that gives slices, such as log-mel:box")
    streams = {name: Stream(dtype=found.dtype, width=found.width) for name, found in reader.streams.items()}
    about = {name: reader.meta[name] for name in ("tokenizer", "frame_rate_hz", "codebook_size")}
    records: list[tuple[str, dict[str, Any]]] = []
    with ShardWriter(target, kind="tokens", streams=streams, about=about) as writer:
        for number in range(len(cache)):
            clip = cache[number]
            if clip.key in left_out:
                continue
            facts = {"split": clip.split, "text": clip.text, "tags": list(clip.tags), "labels": clip.labels}
            records.append((clip.key, facts))
            if clip.key in writer.places:
                continue
            rows = {"codes": clip.codes.T.numpy(), "latents": clip.latents.numpy()}
            if clip.features is not None:
                rows["features"] = _controlled(clip.features, clip.key, control).numpy()
            writer.append(clip.key, control, rows)
        writer.finish(records)


def _controlled(features: torch.Tensor, key: str, control: Control) -> torch.Tensor:
    if control == "zeroed":
        return torch.zeros_like(features)
    if control == "shuffled":
        return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(clip_seed(key)))]
    return features


def clips_beyond(
    caches: Sequence[Path], share: float, validation_fraction: float, rules: Sequence[TagRule]
) -> frozenset[str]:
    """Keys of the clips to leave out, so that about this share of the frames to be trained on is left.

    Clips are drawn in an order that does not depend on the share: a larger one holds all of a smaller one. Those held
    back for validation, and those of other splits, stay.

    Args:
        caches: All that is trained on.
        share: Above 0, at most 1.
        validation_fraction: As in training.
        rules: As in training.
    """
    cache = TokenCache(list(caches), split="train", validation_fraction=validation_fraction, rules=rules)
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).tolist()
    wanted, kept = share * float(cache.index.rows.sum()), 0.0
    out = []
    for clip in order:
        if kept >= wanted:
            out.append(cache.index.clip(clip).key)
        else:
            kept += cache.num_frames(clip)
    return frozenset(out)
