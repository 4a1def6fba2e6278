"""How loose a hybrid model's bound is: what its density of latents, given the codes, puts outside the codes' cell.

The bound -log p(codes) - log p(latents | codes) on the latents' negative log-likelihood is tight when the codes follow
from the latents and p(latents | codes) is nothing where other codes would follow. So latents are drawn from it, and
counted is how often their first k codes are those given, for every k.

Shapes: N frames, K codebooks, D latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridlm.checkpoint import Checkpoint
from training.corpus import CachedClip
from training.examples import clip_seed
from training.scoring import states_of

DRAWS = 4


@torch.inference_mode()
def cell_mass(
    found: Checkpoint, clips: Sequence[CachedClip], *, frames_a_clip: int, max_frames: int, with_text: bool = True
) -> tuple[float, ...]:
    """Share of the drawn latents whose first 1 .. K codes are those given; it falls with k.

    Args:
        found: A hybrid model, its tokenizer and text.
        clips: What it is told: codes, of the latents beside them; all in one batch.
        frames_a_clip: At most so many frames of each, evenly spread.
        max_frames: Of each clip its beginning, at most this much.
        with_text: Whether the model is told text and tags.
    """
    model, device = found.model, next(found.model.parameters()).device
    depth = model.config.output_codebooks
    clips = [clip.cut(0, max_frames) for clip in clips]
    states = states_of(found, clips, with_text=with_text)
    hits, count = torch.zeros(depth, dtype=torch.float64), 0
    for clip, h in zip(clips, states, strict=True):
        length = len(clip.latents)
        chosen = torch.linspace(0, length - 1, min(frames_a_clip, length)).round().long().repeat(DRAWS)
        given = clip.codes[:depth, chosen].T.to(device)  # (N, K)
        generator = torch.Generator().manual_seed(clip_seed(clip.key))
        drawn = model.latent_distribution(h[chosen.to(device)], given).sample([generator] * len(chosen))
        codes = found.tokenizer.quantize(drawn[:, None])[:, :depth, 0]  # (N, K)
        hits += (codes == given).cummin(dim=1).values.double().sum(dim=0).cpu()
        count += len(chosen)
    return tuple((hits / count).tolist())
