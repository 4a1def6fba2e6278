"""Whether a model is as sure as it is right: the NLL that it expects of its own draws, beside that of the true frames.

At states that have seen the true past, frames are drawn from the model and scored by it: their mean NLL is the entropy
of what it predicts, so what it expects to pay. A model that knows what it does not know pays as much for the true
frames; one that pays more was too sure.

Shapes: N frames, K codebooks, D latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.checkpoint import Checkpoint
from training.corpus import CachedClip
from training.examples import clip_seed
from training.scoring import states_of

DRAWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """One stream, nats a frame; the first is the smaller one where a model is too sure."""

    expected: float
    """Mean NLL of frames drawn from the model, at the same states."""
    empirical: float
    """Mean NLL of the true frames."""


@torch.inference_mode()
def calibrate(
    found: Checkpoint, clips: Sequence[CachedClip], *, frames_a_clip: int, max_frames: int, with_text: bool = True
) -> dict[str, Calibration]:
    """By stream, `codes` and `latents`, as far as the model predicts them; latents given the drawn codes, or the true.

    Args:
        found: Model, tokenizer and text.
        clips: The true frames, noised as they are scored; all in one batch.
        frames_a_clip: At most so many frames of each, evenly spread.
        max_frames: Of each clip its beginning, at most this much.
        with_text: Whether the model is told text and tags.
    """
    model, device = found.model, next(found.model.parameters()).device
    sums: dict[str, Tensor] = {}
    count = 0
    clips = [clip.cut(0, max_frames) for clip in clips]
    for clip, states in zip(clips, states_of(found, clips, with_text=with_text), strict=True):
        length = len(clip.latents)
        chosen = torch.linspace(0, length - 1, min(frames_a_clip, length)).round().long().repeat(DRAWS)
        h = states[chosen.to(device)]
        generators = [torch.Generator().manual_seed(clip_seed(clip.key))] * len(chosen)
        drawn = true = None
        if model.code_head is not None:
            drawn = model.code_head.sample(h, generators)
            true = clip.codes[: model.config.output_codebooks, chosen].T.to(device)  # (N, K)
            scores = [-model.code_head.log_prob(h, codes).double().sum() for codes in (drawn, true)]
            sums["codes"] = sums.get("codes", torch.zeros(2, dtype=torch.float64)) + torch.stack(scores).cpu()
        if model.latent_head is not None:
            density = model.latent_distribution(h, drawn)
            scores = [-density.log_prob(density.sample(generators)).double().sum()]
            scores.append(-model.latent_distribution(h, true).log_prob(clip.latents[chosen].to(device)).double().sum())
            sums["latents"] = sums.get("latents", torch.zeros(2, dtype=torch.float64)) + torch.stack(scores).cpu()
        count += len(chosen)
    return {
        name: Calibration(expected=float(total[0]) / count, empirical=float(total[1]) / count)
        for name, total in sums.items()
    }
