"""The latent head: a mixture of diagonal Gaussians, whose likelihood is exact (GIVT, arXiv 2312.02116).

Shapes: N positions (of any batch), M components, D latent, C hidden, E code embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.code_head import draw
from hybridlm.config import ModelConfig
from hybridlm.decoder import ResidualSwiGLU
from hybridlm.fusion import CodeEmbedding, FrameStatistics

INITIAL_SPREAD = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianMixture:
    """One density per position, in the latent's own unit; all tensors float32."""

    log_weights: Float[Tensor, "N M"]
    """Normalized."""
    means: Float[Tensor, "N M D"]
    scales: Float[Tensor, "N M D"]
    """Standard deviations, at least the configured floor."""

    def log_prob(self, latents: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Exact log-density in nats."""
        z = (latents.float()[:, None] - self.means) / self.scales  # (N, M, D)
        constant = 0.5 * self.means.shape[-1] * math.log(2 * math.pi)
        components = -0.5 * z.square().sum(dim=-1) - self.scales.log().sum(dim=-1) - constant
        return (self.log_weights + components).logsumexp(dim=-1)

    def mean(self) -> Float[Tensor, "N D"]:
        """The expectation."""
        return (self.log_weights.exp()[..., None] * self.means).sum(dim=1)

    def sample(self, generators: Sequence[torch.Generator], temperature: float = 1.0) -> Float[Tensor, "N D"]:
        """Draw a component, then a Gaussian whose standard deviation is multiplied by sqrt(temperature) (CALM).

        Each row draws from its own generator, always equally much, so that rows are independent of the batch.
        """
        dim, device = self.means.shape[-1], self.means.device
        pairs = [(torch.rand(1, generator=g, device=g.device), torch.randn(dim, generator=g, device=g.device))
                 for g in generators]  # fmt: skip
        uniforms = torch.cat([u for u, _ in pairs]).to(device)
        noise = torch.stack([n for _, n in pairs]).to(device)
        chosen = draw(self.log_weights, uniforms)
        rows = torch.arange(len(chosen), device=device)
        return self.means[rows, chosen] + math.sqrt(temperature) * self.scales[rows, chosen] * noise


class LatentHead(nn.Module):
    """p(latent | codes, h), or p(latent | h) for a continuous model.

    With codes, every mean is an offset plus a linear read-out of the sum of the code embeddings: that read-out can be
    the dequantized latent from the first step on (`training.new_model.start_from_codebooks`).
    """

    def __init__(self, config: ModelConfig, embedding: CodeEmbedding | None, statistics: FrameStatistics) -> None:
        super().__init__()
        # Owned and registered by the model; see CodeHead.
        object.__setattr__(self, "embedding", embedding)
        object.__setattr__(self, "statistics", statistics)
        self.num_mixtures, self.latent_dim = config.num_mixtures, config.latent_dim
        self.scale_floor = config.scale_floor
        dim = config.latent_head_dim
        self.state = nn.Linear(config.hidden_dim, dim, bias=False)
        nn.init.normal_(self.state.weight, std=1.0 / math.sqrt(config.hidden_dim))
        self.layers = nn.Sequential(
            *(
                ResidualSwiGLU(dim, config.latent_head_ffn_dim, config.norm_epsilon)
                for _ in range(config.latent_head_layers)
            )
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_epsilon, bias=False)
        self.output = nn.Linear(dim, self.num_mixtures * (1 + 2 * self.latent_dim))
        self.codes: nn.Linear | None = None
        self.read_out: nn.Linear | None = None
        if embedding is not None:
            self.codes = nn.Linear(config.code_embedding_dim, dim, bias=False)
            self.read_out = nn.Linear(config.code_embedding_dim, self.latent_dim)
            nn.init.normal_(self.codes.weight, std=1.0 / math.sqrt(config.code_embedding_dim))
            nn.init.normal_(self.read_out.weight, std=0.1 / math.sqrt(config.code_embedding_dim))
            nn.init.zeros_(self.read_out.bias)
        self._initialize_density()

    @torch.no_grad()
    def _initialize_density(self) -> None:
        """Equal weights, means spread a little so that components can part, scales 1 in normalized units."""
        nn.init.normal_(self.output.weight, std=0.1 / math.sqrt(self.output.in_features))
        _, means, scales = self._parts(self.output.bias[None])
        self.output.bias.zero_()
        means.normal_(std=INITIAL_SPREAD)
        scales.fill_(math.log(math.expm1(1.0)))  # softplus of this is 1

    def _parts(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.num_mixtures * self.latent_dim
        weights, means, scales = raw.split([self.num_mixtures, size, size], dim=-1)
        shape = (-1, self.num_mixtures, self.latent_dim)
        return weights, means.view(shape), scales.view(shape)

    def distribution(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"] | None) -> GaussianMixture:
        """The density of the latent of each position; `codes` are the output codebooks' (None: continuous model)."""
        x = self.state(h)
        center = None
        if self.embedding is not None and self.codes is not None and self.read_out is not None:
            total = self.embedding(codes).sum(dim=1)  # (N, E)
            x = x + self.codes(total)
            center = self.read_out(total).float()[:, None]
        weights, means, scales = self._parts(self.output(self.norm(self.layers(x))).float())
        means = means if center is None else means + center
        std = self.statistics.latent_std
        return GaussianMixture(
            log_weights=weights.log_softmax(dim=-1),
            means=means * std + self.statistics.latent_mean,
            scales=F.softplus(scales) * std + self.scale_floor,
        )

    def log_prob(
        self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"] | None, latents: Float[Tensor, "N D"]
    ) -> Float[Tensor, " N"]:
        """log p(latent | codes, h) in nats, float32."""
        return self.distribution(h, codes).log_prob(latents)
