"""RQ-MTP: random-quantized multi-token prediction, the self-supervised half of F3-Tokenizer's representation learning.

Targets are found by a fixed random projection and the nearest vector of a fixed random codebook (BEST-RQ, Chiu et al.,
arXiv 2202.01855); a causal encoder predicts those of the next K frames at once (NEST-RQ, arXiv 2409.08680).

Shapes: B batch, T frames, D target, E projection, V codes, K offsets, F feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class RandomProjectionQuantizer(nn.Module):
    """Codes of frames: argmin_v || l2(W z) - l2(c_v) || with W and c drawn once from a seed (BEST-RQ, equation 1).

    W is Xavier-uniform, the codebook standard normal, as there; z are the targets with zero mean and unit variance a
    dimension, without which a few codes take everything (there too).
    """

    projection: Tensor
    codebook: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, target_dim: int, *, projection_dim: int = 16, codebook_size: int = 1024, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        projection = torch.empty(target_dim, projection_dim)
        nn.init.xavier_uniform_(projection, generator=generator)
        codebook = torch.randn(codebook_size, projection_dim, generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))
        self.register_buffer("target_mean", torch.zeros(target_dim))
        self.register_buffer("target_scale", torch.ones(target_dim))

    def standardize(self, targets: Float[Tensor, "N D"]) -> RandomProjectionQuantizer:
        """Let these frames have zero mean and unit variance; returns itself. A constant dimension is only centred."""
        deviation = targets.std(dim=0, correction=0)
        self.target_mean = targets.mean(dim=0)
        self.target_scale = 1 / deviation.where(deviation > 1e-5, 1.0)
        return self

    @torch.no_grad()
    def forward(self, targets: Float[Tensor, "B T D"]) -> Int[Tensor, "B T"]:
        """Nearest codes; between unit vectors the nearest is the one of the largest product."""
        with torch.autocast(targets.device.type, enabled=False):
            standard = (targets.float() - self.target_mean) * self.target_scale
            return ((standard @ self.projection) @ self.codebook.T).argmax(dim=-1)


class MultiTokenHeads(nn.Module):
    """One linear head an offset, from features to codes of the frames 1 .. K later."""

    def __init__(self, feature_dim: int, codebook_size: int, num_offsets: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(feature_dim, codebook_size) for _ in range(num_offsets))

    def forward(
        self, features: Float[Tensor, "B T F"], codes: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """-log p(q_{t + k} | features_t), averaged over frames (NEST-RQ), for each offset k, and accuracies.

        Args:
            features: What may be known at each frame.
            codes: Targets.
            mask: True for real frames; a pair of frames counts when both are.
        """
        losses, hits = [], []
        for offset, head in enumerate(self.heads, start=1):
            pairs = (mask[:, :-offset] & mask[:, offset:]).flatten().nonzero().squeeze(1)
            logits = head(features[:, :-offset].flatten(0, 1)[pairs]).float()
            wanted = codes[:, offset:].flatten()[pairs]
            total = F.cross_entropy(logits, wanted, reduction="sum")
            losses.append(total / max(1, len(pairs)))
            hits.append((logits.detach().argmax(dim=-1) == wanted).float().sum() / max(1, len(pairs)))
        return torch.stack(losses), torch.stack(hits)


def codebook_use(codes: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], codebook_size: int) -> tuple[float, float]:
    """Share of the codebook that a batch uses, and its perplexity exp(entropy): near 1 when the targets collapse."""
    counts = torch.bincount(codes[mask], minlength=codebook_size).float()
    share = counts / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-9).log()).sum()
    return float((counts > 0).float().mean()), float(entropy.exp())
