"""The depth decoder: p(c_1 | h) p(c_2 | c_1, h) ... over the residual codes of one frame.

Shapes: N positions (of any batch), K codebooks, V codebook size, C hidden, E code embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.config import ModelConfig
from hybridlm.decoder import INIT_STD, ResidualSwiGLU
from hybridlm.fusion import CodeEmbedding

FilterLogits = Callable[[Tensor, int], Tensor]


class CodeScores(NamedTuple):
    """How well codes were predicted, each given the true ones before it."""

    log_prob: Float[Tensor, "N K"]
    """In nats, float32."""
    correct: Bool[Tensor, "N K"]
    """Whether the code was the most likely one."""


def row_uniforms(generators: Sequence[torch.Generator], count: int, device: torch.device) -> Float[Tensor, "N count"]:
    """Uniform numbers in [0, 1), each row from its own generator: a row's draws do not depend on its neighbours."""
    return torch.stack([torch.rand(count, generator=g, device=g.device) for g in generators]).to(device)


def draw(logits: Float[Tensor, "N V"], uniforms: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Draw by the inverse of the cumulative distribution; logits of -inf are never drawn."""
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    # Kept below the total, so that rounding cannot run past the last possible code.
    threshold = uniforms.clamp(max=1.0 - 1e-6)[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=-1)


class CodeHead(nn.Module):
    """A small network shared by all codebooks, and one output matrix each.

    The input for codebook k is W h + W' sum_{j<k} E_j(c_j) + position_k: the codes of residual quantization add up, so
    the sum of their embeddings is what the codebooks so far have said, and no attention over depth is needed. With true
    codes given, all k are computed at once.
    """

    def __init__(self, config: ModelConfig, embedding: CodeEmbedding) -> None:
        super().__init__()
        # The model owns the table, which the input and the latent head share; registering it here again would
        # store it twice in a checkpoint.
        object.__setattr__(self, "embedding", embedding)
        self.num_codebooks = config.output_codebooks
        self.codebook_size = config.codebook_size
        self.state = nn.Linear(config.hidden_dim, config.depth_dim, bias=False)
        nn.init.normal_(self.state.weight, std=1.0 / math.sqrt(config.hidden_dim))
        self.codes = None
        if self.num_codebooks > 1:
            self.codes = nn.Linear(config.code_embedding_dim, config.depth_dim, bias=False)
            nn.init.normal_(self.codes.weight, std=1.0 / math.sqrt(config.code_embedding_dim))
        self.position = nn.Parameter(torch.randn(self.num_codebooks, config.depth_dim) * 0.1)
        self.layers = nn.Sequential(
            *(
                ResidualSwiGLU(config.depth_dim, config.depth_ffn_dim, config.norm_epsilon)
                for _ in range(config.depth_layers)
            )
        )
        self.norm = nn.LayerNorm(config.depth_dim, eps=config.norm_epsilon, bias=False)
        self.output = nn.Parameter(torch.empty(self.num_codebooks, config.codebook_size, config.depth_dim))
        self.read_outs: nn.ModuleList | None = None
        """The same matrices, each packed by itself (`hybridlm.precision`); then there is no `output`."""
        self.compiled: tuple[int, Callable[[Tensor], Tensor]] | None = None
        """`network`, compiled for so many rows (`hybridlm.compiling`)."""
        # Small outputs: the first prediction is nearly uniform.
        nn.init.normal_(self.output, std=INIT_STD)

    def network(self, x: Tensor) -> Tensor:
        """What the read-outs read, of the inputs."""
        return self.norm(self.layers(x))

    def step_network(self, rows: int) -> Callable[[Tensor], Tensor]:
        """`network`, compiled where it is for so many rows."""
        return self.compiled[1] if self.compiled is not None and self.compiled[0] == rows else self.network

    def logits(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"]) -> Float[Tensor, "K N V"]:
        """Logits of all codebooks, each given the codes before it; the codebook comes first."""
        x = self.position[:, None] + self.state(h)  # (K, N, depth)
        if self.codes is not None:
            before = F.pad(self.embedding(codes[:, :-1]).cumsum(dim=1), (0, 0, 1, 0))  # (N, K, E), zero for k = 0
            x = x + self.codes(before.transpose(0, 1))
        y = self.network(x)
        if self.read_outs is not None:
            return torch.stack([read_out(one) for read_out, one in zip(self.read_outs, y, strict=True)])
        # (K, N, depth) @ (K, depth, V): one batched product, each codebook with its own matrix
        return torch.bmm(y, self.output.transpose(1, 2))

    def score(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"]) -> CodeScores:
        """Log-probabilities and top-1 hits of given codes."""
        log_prob = self.logits(h, codes).log_softmax(dim=-1, dtype=torch.float32)
        chosen = log_prob.gather(-1, codes.T[..., None]).squeeze(-1)  # (K, N)
        with torch.no_grad():
            correct = chosen >= log_prob.amax(dim=-1)
        return CodeScores(log_prob=chosen.T, correct=correct.T)

    def log_prob(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """log p(c_k | c_<k, h) in nats, float32."""
        return self.score(h, codes).log_prob

    def sample(
        self,
        h: Float[Tensor, "N C"],
        generators: Sequence[torch.Generator],
        filter_logits: FilterLogits | None = None,
        *,
        unconditional: Float[Tensor, "N C"] | None = None,
        cfg: float = 1.0,
    ) -> Int[Tensor, "N K"]:
        """Draw the codes of a frame, codebook by codebook.

        Args:
            h: States.
            generators: One per row.
            filter_logits: Temperature, top-k, top-p: (N, V) float32 and the codebook to (N, V), -inf for what must not
                be drawn.
            unconditional: States of the same rows without their condition, for classifier-free guidance.
            cfg: Guidance: log-probabilities become u + cfg * (c - u).
        """
        rows = h.shape[0]
        uniforms = row_uniforms(generators, self.num_codebooks, h.device)
        guided = unconditional is not None and cfg != 1.0
        x = self.state(torch.cat([h, unconditional]) if guided and unconditional is not None else h)
        network = self.step_network(len(x))
        drawn: list[Tensor] = []
        for k in range(self.num_codebooks):
            y = network(x + self.position[k])
            logits = (F.linear(y, self.output[k]) if self.read_outs is None else self.read_outs[k](y)).float()
            if guided:
                conditional, free = logits.log_softmax(dim=-1).split(rows)
                logits = free + cfg * (conditional - free)
            code = draw(logits if filter_logits is None else filter_logits(logits, k), uniforms[:, k])
            drawn.append(code)
            if self.codes is not None and k + 1 < self.num_codebooks:
                said = self.codes(self.embedding.one(k, code))
                x = x + (torch.cat([said, said]) if guided else said)
        return torch.stack(drawn, dim=1)
