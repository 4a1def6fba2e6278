"""The latent-side representation encoder of F3-Tokenizer (arXiv 2606.06357, section on representation learning).

A causal transformer reads the autoencoder's normalized latents and gives `features` for understanding and as a model's
input. The autoencoder is frozen: latents and codes are the same with and without it. Once trained, every dimension is
brought to zero mean and unit variance over frames of the training data: a probe or a model then sees what differs from
frame to frame, not the large constant vector that all outputs of such a network share. (The paper does not tell of it.)

Shapes: B batch, T frames, D latent, F feature.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.transformer import CausalTransformer, TransformerState, check_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class RepresentationConfig:
    """Shape of the encoder."""

    feature_dim: int = 256
    """Width of the transformer and of the features."""
    num_layers: int = 6
    num_heads: int = 4
    ffn_dim: int = 704
    window_frames: int = 125
    """Frames that a frame sees, itself among them, in each layer: 5 s at 25 Hz."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_heads(self.feature_dim, self.num_heads, "feature_dim")


class RepresentationEncoder(nn.Module):
    """Latents to features, frame by frame, from the present and the past alone."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, latent_dim: int, config: RepresentationConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(latent_dim, config.feature_dim)
        self.transformer = CausalTransformer(
            config.feature_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            window=config.window_frames,
        )
        self.register_buffer("feature_mean", torch.zeros(config.feature_dim))
        self.register_buffer("feature_scale", torch.ones(config.feature_dim))

    def forward(
        self, latents: Float[Tensor, "B T D"], state: TransformerState | None = None
    ) -> tuple[Float[Tensor, "B T F"], TransformerState]:
        """Features of the frames after `state`, and the state after them; right-padded frames harm no others."""
        features, state = self.transformer(self.embed(latents), state)
        return (features - self.feature_mean) * self.feature_scale, state

    def standardized(self, recordings: Iterable[Float[Tensor, "_ D"]]) -> RepresentationEncoder:
        """A copy whose features have zero mean and unit variance a dimension over these recordings' frames.

        Args:
            recordings: Latents of one recording each; at least one frame in all.
        """
        count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for latents in recordings:
            features = self.features(latents[None].to(self.feature_mean.device))[0].cpu().double()
            count += len(features)
            total, squares = total + features.sum(dim=0), squares + features.square().sum(dim=0)
        mean, scale = total / count, self.feature_scale.cpu().double()
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        found = copy.deepcopy(self)
        found.feature_mean = self.feature_mean + (mean / scale).to(self.feature_mean)
        # A dimension that never moves stays as it is, rather than to be blown up.
        found.feature_scale = (scale / deviation.where(deviation > 1e-5, 1.0)).to(self.feature_scale)
        return found

    @torch.inference_mode()
    def features(self, latents: Float[Tensor, "B T D"], block: int = 1500) -> Float[Tensor, "B T F"]:
        """Features of whole recordings, block by block, so that memory does not grow with their square."""
        state, parts = None, []
        for start in range(0, latents.shape[1], block):
            part, state = self(latents[:, start : start + block], state)
            parts.append(part)
        empty = latents.new_zeros(latents.shape[0], 0, self.config.feature_dim)
        return torch.cat(parts, dim=1) if parts else empty
