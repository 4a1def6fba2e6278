"""Residual vector quantization with codebooks kept by exponential moving averages (SoundStream, arXiv 2107.03312)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ResidualQuantizer(nn.Module):
    """K codebooks of V vectors: codebook k quantizes what the first k left over, so any prefix of codes decodes.

    The codebooks are buffers, moved by `update` towards the mean of the vectors that chose them; no gradient reaches
    them. A code that is hardly ever chosen is put onto a vector of the present batch.
    """

    codebooks: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, *, num_codebooks: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size, self.dim = num_codebooks, codebook_size, dim
        generator = torch.Generator().manual_seed(0)
        # Later codebooks see smaller residuals, so they start smaller.
        scales = 0.8 ** torch.arange(num_codebooks, dtype=torch.float32)
        vectors = torch.randn(num_codebooks, codebook_size, dim, generator=generator) * scales[:, None, None]
        self.register_buffer("codebooks", vectors)
        self.register_buffer("counts", torch.ones(num_codebooks, codebook_size), persistent=False)
        self.register_buffer("sums", vectors.clone(), persistent=False)

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B T D"]) -> Int[Tensor, "B K T"]:
        """Nearest code of each residual in turn, in float32."""
        residual = z.float().reshape(-1, self.dim)
        codes = []
        for codebook in self.codebooks.float():
            index = _nearest(residual, codebook)
            residual = residual - codebook[index]
            codes.append(index)
        return (
            torch.stack(codes, dim=-1).reshape(z.shape[0], z.shape[1], self.num_codebooks).transpose(1, 2).contiguous()
        )

    def decode(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B T D"]:
        """Sum of the chosen vectors of the first k codebooks."""
        total = self.codebooks.new_zeros(codes.shape[0], codes.shape[2], self.dim, dtype=torch.float32)
        for k in range(codes.shape[1]):
            total = total + self.codebooks[k].float()[codes[:, k]]
        return total

    @torch.no_grad()
    def update(
        self, z: Float[Tensor, "B T D"], *, decay: float, revive_below: float, generator: torch.Generator
    ) -> list[float]:
        """Move the codebooks towards the batch; returns the share of codes in use, per codebook.

        Args:
            z: Latents of the batch.
            decay: Of the moving averages, in (0, 1).
            revive_below: A code whose average count per batch is below this restarts at a vector of the batch.
            generator: Chooses the vectors for restarts.
        """
        residual = z.float().reshape(-1, self.dim)
        use = []
        for k in range(self.num_codebooks):
            index = _nearest(residual, self.codebooks[k])
            count = torch.bincount(index, minlength=self.codebook_size).float()
            self.counts[k].mul_(decay).add_(count, alpha=1 - decay)
            self.sums[k].mul_(decay).index_add_(0, index, residual, alpha=1 - decay)
            dead = (self.counts[k] < revive_below).nonzero()[:, 0]
            if len(dead):
                chosen = torch.randint(len(residual), (len(dead),), generator=generator, device=generator.device)
                self.counts[k][dead] = 2 * revive_below
                self.sums[k][dead] = residual[chosen] * (2 * revive_below)
            self.codebooks[k] = self.sums[k] / self.counts[k][:, None]
            residual = residual - self.codebooks[k][index]
            use.append(float((self.counts[k] > revive_below).float().mean()))
        return use


def _nearest(x: Float[Tensor, "N D"], codebook: Float[Tensor, "V D"]) -> Int[Tensor, " N"]:
    # |x - c|^2 without the |x|^2 that every code shares.
    return torch.addmm(codebook.square().sum(dim=-1), x, codebook.T, alpha=-2).argmin(dim=-1)
