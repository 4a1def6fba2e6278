"""From a frame to one input vector: code embeddings, the continuous part, their fusion, and the clean short path.

WHISPER-GPT (arXiv 2412.11449): mel slices pass light causal blocks, and are concatenated with the codes' embeddings.

Shapes: B batch, T frames, K codebooks, V codebook size, D latent, F feature, E code embedding, C hidden.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.config import ModelConfig
from hybridlm.decoder import INIT_STD
from tokenizer.transformer import CausalTransformer, TransformerState


class CodeEmbedding(nn.Module):
    """One table for the codebooks in use; codes of a frame are residuals of each other, so their embeddings add up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.num_codebooks = max(config.input_codebooks, config.output_codebooks)
        self.table = nn.Embedding(self.num_codebooks * config.codebook_size, config.code_embedding_dim)
        nn.init.normal_(self.table.weight, std=1.0 / math.sqrt(self.num_codebooks))
        offsets = torch.arange(self.num_codebooks) * config.codebook_size
        self.offsets: Tensor
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, codes: Int[Tensor, "*N k"]) -> Float[Tensor, "*N k E"]:
        """Embeddings of the first k <= K codebooks, one each."""
        return self.table(codes + self.offsets[: codes.shape[-1]])

    def one(self, codebook: int, codes: Int[Tensor, "*N"]) -> Float[Tensor, "*N E"]:
        """Embeddings of codes of one codebook."""
        return self.table(codes + codebook * self.codebook_size)


class FrameStatistics(nn.Module):
    """Mean and standard deviation of latents and features, so that any tokenizer's frames come in at unit scale.

    They are buffers, set once from data (`set`) and saved with the weights; the default is 0 and 1,
    which is right for a tokenizer whose latents are normalized already.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        self.register_buffer("feature_mean", torch.zeros(config.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.feature_dim))

    @torch.no_grad()
    def set(self, **values: Float[Tensor, " C"]) -> None:
        """Take over `latent_mean`, `latent_std`, `feature_mean` or `feature_std`.

        Raises:
            ValueError: a standard deviation that is not positive throughout.
        """
        for name, value in values.items():
            if name.endswith("std") and not bool((value > 0).all()):
                raise ValueError(f"{name} has the value {value.min().item():.3g}, but must be positive throughout")
            getattr(self, name).copy_(value)

    def latents(self, latents: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        return (latents - self.latent_mean) / self.latent_std

    def features(self, features: Float[Tensor, "*N F"]) -> Float[Tensor, "*N F"]:
        return (features - self.feature_mean) / self.feature_std


class SliceEncoder(nn.Module):
    """The continuous part through light causal layers: W_2 transformer(W_1 x)."""

    def __init__(self, width: int, output_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.input = nn.Linear(width, config.slice_dim)
        self.transformer = CausalTransformer(
            config.slice_dim,
            num_layers=config.slice_layers,
            num_heads=config.slice_heads,
            ffn_dim=config.slice_ffn_dim,
            window=config.slice_window_frames,
        )
        self.output = nn.Linear(config.slice_dim, output_dim)
        nn.init.normal_(self.output.weight, std=INIT_STD)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, x: Float[Tensor, "B T X"], past: TransformerState | None, lengths: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B T Y"], TransformerState]:
        """Outputs of the slices after `past`, and the state after them; see `CausalTransformer.forward`."""
        y, state = self.transformer(self.input(x), past, lengths)
        return self.output(y), state


class FrameFusion(nn.Module):
    """fuse(sum_k E_k(code_k), W continuous): `sum` adds two projections, `concat` gives each half of the width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.concat = config.fusion == "concat"
        self.num_codebooks = config.input_codebooks
        width = {"latents": config.latent_dim, "features": config.feature_dim, "none": 0}[config.continuous]
        both = self.num_codebooks > 0 and width > 0
        half = config.hidden_dim // 2
        code_dim = half if self.concat and both else config.hidden_dim
        continuous_dim = config.hidden_dim - half if self.concat and both else config.hidden_dim
        self.codes = nn.Linear(config.code_embedding_dim, code_dim) if self.num_codebooks else None
        self.slices = SliceEncoder(width, continuous_dim, config) if width and config.slice_layers else None
        self.continuous = nn.Linear(width, continuous_dim) if width and self.slices is None else None
        for linear in (self.codes, self.continuous):
            if linear is not None:
                nn.init.normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        code_sum: Float[Tensor, "B T E"] | None,
        continuous: Float[Tensor, "B T X"] | None,
        past: TransformerState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], TransformerState | None]:
        """Fuse the sum of the code embeddings with the continuous part; None for a part that the model does not see.

        Args:
            code_sum: Of the frames.
            continuous: Of the same frames.
            past: What the slices' layers remember of earlier ones.
            lengths: Real frames of each row, where rows differ and are to be gone on from.

        Returns:
            Input vectors, and what the slices' layers remember; None without such layers.
        """
        parts, state = [], None
        if self.codes is not None:
            parts.append(self.codes(code_sum))
        if self.continuous is not None:
            parts.append(self.continuous(continuous))
        if self.slices is not None:
            assert continuous is not None
            encoded, state = self.slices(continuous, past, lengths)
            parts.append(encoded)
        if len(parts) == 1:
            return parts[0], state
        return (torch.cat(parts, dim=-1) if self.concat else parts[0] + parts[1]), state


class ShortContext(nn.Module):
    """The clean path: the last w latents, exact, through one hidden layer, added to the state that the heads read.

    CALM (arXiv 2509.06926) gives the long history noise and keeps the last 10 frames clean by a small transformer; the
    window here is short and fixed, so a two-layer perceptron over it does the same with two matrix products.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_frames = config.short_context_frames
        self.hidden = nn.Linear(config.short_context_frames * config.latent_dim, config.short_context_dim)
        self.out = nn.Linear(config.short_context_dim, config.hidden_dim, bias=False)
        nn.init.normal_(self.hidden.weight, std=1.0 / math.sqrt(self.hidden.in_features))
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.out.weight, std=INIT_STD)

    def forward(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B L C"]:
        """Contributions to states 0 .. T (L = T + 1); state t sees latents t-w .. t-1 (zeros before 0)."""
        padded = F.pad(latents, (0, 0, self.num_frames, 0))
        windows = padded.unfold(1, self.num_frames, 1).transpose(-1, -2)  # (B, T + 1, w, D)
        return self._project(windows.flatten(2))

    def step(self, recent: Float[Tensor, "B w D"]) -> Float[Tensor, "B C"]:
        """The contribution of exactly these w latents."""
        return self._project(recent.flatten(1))

    def _project(self, windows: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(windows)))


def history_noise(
    x: Float[Tensor, "B T X"], largest: float, generator: torch.Generator | None = None
) -> Float[Tensor, "B T X"]:
    """sqrt(k) * eps + sqrt(1 - k) * x with k ~ U(0, largest) per frame (CALM, arXiv 2509.06926; there largest = 1).

    The noise is drawn on the generator's device, so that a seed means the same everywhere.
    """
    where = generator.device if generator is not None else x.device
    k = torch.rand(*x.shape[:2], 1, generator=generator, device=where).to(x.device) * largest
    noise = torch.randn(x.shape, generator=generator, device=where).to(x.device)
    return k.sqrt() * noise + (1.0 - k).sqrt() * x
