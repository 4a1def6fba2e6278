"""The flow head: p(latent | codes, h) by a small flow, for sound in few steps; it has no likelihood.

An MLP whose layers are scaled and shifted by the condition (AdaLN: MAR, arXiv 2406.11838; SLED, CALM). The condition is
the state, the sum of the codes' embeddings, and the two times of a flow map (hybridlm/flow.py).

Shapes: N positions, D latent, C hidden, E code embedding, F width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.config import ModelConfig
from hybridlm.flow import integrate, lagrangian_loss, matching_loss
from hybridlm.fusion import CodeEmbedding, FrameStatistics

NUM_FREQUENCIES = 32


class TimeEmbedding(nn.Module):
    """A time in [0, 1] as cosines and sines of growing frequency, through one hidden layer."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0.0, math.log(100.0), NUM_FREQUENCIES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Float[Tensor, " N"]) -> Float[Tensor, "N F"]:
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=-1))


class ModulatedLayer(nn.Module):
    """x + gate * MLP(shift + (1 + scale) * LayerNorm(x)), the three from the condition; the identity at first."""

    def __init__(self, dim: int, norm_epsilon: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_epsilon, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "N F"], condition: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(shift + (1 + scale) * self.norm(x))


class FlowHead(nn.Module):
    """See the module's text; latents are normalized by the model's statistics inside."""

    def __init__(self, config: ModelConfig, embedding: CodeEmbedding | None, statistics: FrameStatistics) -> None:
        super().__init__()
        # Owned and registered by the model; see CodeHead.
        object.__setattr__(self, "embedding", embedding)
        object.__setattr__(self, "statistics", statistics)
        dim, latent = config.flow_dim, config.latent_dim
        self.latent_dim, self.num_draws, self.distill = latent, config.flow_draws, config.flow_distill
        self.state = nn.Linear(config.hidden_dim, dim)
        self.codes = nn.Linear(config.code_embedding_dim, dim) if embedding is not None else None
        self.start_time, self.end_time = TimeEmbedding(dim), TimeEmbedding(dim)
        self.input = nn.Linear(latent, dim)
        self.layers = nn.ModuleList(ModulatedLayer(dim, config.norm_epsilon) for _ in range(config.flow_layers))
        self.norm = nn.LayerNorm(dim, eps=config.norm_epsilon, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, latent)
        for linear in (self.modulation, self.output):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def condition(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"] | None) -> Float[Tensor, "N F"]:
        """What every evaluation for a frame shares; `codes` are the output codebooks' (None: continuous model)."""
        condition = self.state(h)
        if self.codes is not None:
            condition = condition + self.codes(self.embedding(codes).sum(dim=1))
        return condition

    def velocity(
        self,
        x: Float[Tensor, "N D"],
        s: Float[Tensor, " N"],
        t: Float[Tensor, " N"],
        condition: Float[Tensor, "N F"],
    ) -> Float[Tensor, "N D"]:
        """Mean velocity v_{s,t} of normalized latents."""
        condition = F.silu(condition + self.start_time(s) + self.end_time(t))
        y = self.input(x)
        for layer in self.layers:
            y = layer(y, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.output(shift + (1 + scale) * self.norm(y))

    def loss(
        self,
        h: Float[Tensor, "N C"],
        codes: Int[Tensor, "N K"] | None,
        latents: Float[Tensor, "N D"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, " N"]:
        """Flow matching on `flow_draws` draws of noise and time a frame, and `flow_distill` times self-distillation on
        one.

        Computed in float32, for derivatives of the map by time do not bear less.

        Args:
            h: States.
            codes: The true codes, or None for a continuous model.
            latents: The true latents.
            generator: For noise and times.
        """
        where = generator.device if generator is not None else h.device
        rows = len(h)

        def uniform(count: int) -> Tensor:
            return torch.rand(count * rows, generator=generator, device=where).to(h.device)

        def noise(count: int) -> Tensor:
            shape = (count * rows, self.latent_dim)
            return torch.randn(shape, generator=generator, device=where).to(h.device)

        with torch.autocast(h.device.type, enabled=False):
            condition = self.condition(h.float(), codes)
            x1 = self.statistics.latents(latents.float())
            many = condition.repeat(self.num_draws, 1)
            matching = matching_loss(
                lambda x, s, t: self.velocity(x, s, t, many),
                noise(self.num_draws),
                x1.repeat(self.num_draws, 1),
                uniform(self.num_draws),
            )
            loss = matching.view(self.num_draws, rows).mean(dim=0)
            if self.distill > 0:
                s, t = torch.stack([uniform(1), uniform(1)]).sort(dim=0).values
                # The map is learned for the condition as it is: it shall not bend the states to its own ease.
                fixed = condition.detach()
                lagrangian = lagrangian_loss(lambda x, s, t: self.velocity(x, s, t, fixed), noise(1), x1, s, t)
                loss = loss + self.distill * lagrangian
        return loss

    def sample(
        self,
        h: Float[Tensor, "N C"],
        codes: Int[Tensor, "N K"] | None,
        generators: Sequence[torch.Generator],
        *,
        num_steps: int = 1,
        temperature: float = 1.0,
    ) -> Float[Tensor, "N D"]:
        """Draw latents: by the distilled map; without distillation, by midpoint steps, or a single step of Euler's.

        Args:
            h: States.
            codes: The drawn codes, or None for a continuous model.
            generators: One per row: rows are independent of the batch.
            num_steps: Steps from noise to latent, at least 1; a midpoint step costs two evaluations.
            temperature: Multiplies the variance of the noise (CALM: its standard deviation is sqrt(temperature)).
        """
        solver = "map" if self.distill > 0 else "midpoint" if num_steps > 1 else "euler"
        drawn = [torch.randn(self.latent_dim, generator=g, device=g.device) for g in generators]
        x0 = math.sqrt(temperature) * torch.stack(drawn).to(h.device)
        condition = self.condition(h, codes)
        x1 = integrate(lambda x, s, t: self.velocity(x, s, t, condition), x0, num_steps=num_steps, solver=solver)
        return x1.float() * self.statistics.latent_std + self.statistics.latent_mean
