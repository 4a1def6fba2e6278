"""Training of a semantic encoder as Dasheng is trained (arXiv 2406.06992): a masked autoencoder of spectrograms.

Three quarters of a segment's frames are hidden; the encoder sees the others, a small transformer gets its outputs among
mask tokens and predicts the hidden patches of the decibel spectrogram, each normalized to zero mean and unit variance:

    loss = mean over hidden frames of |prediction - (patch - mean) / std|^2

Shapes: B batch, T frames, N visible frames, P values of a patch (mel bands x hops), C hidden, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.centred_mel import reflect
from tokenizer.dasheng_encoder import Block, DashengEncoder, DashengEncoderConfig
from tokenizer.dasheng_weights import save_semantic_encoder
from training.task import Batch, Sample
from training.tokenizer_data import TokenizerDataConfig, open_segments, training_batches, validation_segments


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedSpectrogramConfig:
    """Settings of `task: masked_spectrogram`, under `masked_spectrogram:`."""

    data: TokenizerDataConfig
    encoder: DashengEncoderConfig = field(default_factory=DashengEncoderConfig)
    decoder_dim: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    mask_share: float = 0.75
    """Share of a segment's frames that is hidden."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share={self.mask_share} must lie between 0 and 1")
        if self.decoder_layers < 1 or self.decoder_dim < 1:
            raise ValueError(
                f"decoder_layers={self.decoder_layers} and decoder_dim={self.decoder_dim} must be positive"
            )
        if self.decoder_heads < 1 or self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads={self.decoder_heads} must divide decoder_dim={self.decoder_dim}")
        frames, window = self.data.segment_frames, self.encoder.window_frames
        if not 2 <= frames <= window:
            raise ValueError(
                f"data.segment_frames={frames} must be at least 2 and at most encoder.window_frames={window}"
            )
        if not 0 < self.num_visible < frames:
            raise ValueError(
                f"mask_share={self.mask_share} leaves {self.num_visible} of {frames} frames; "
                "some must be visible and some hidden"
            )

    @property
    def num_visible(self) -> int:
        """Frames of a segment that the encoder sees."""
        return round(self.data.segment_frames * (1 - self.mask_share))


class MaskedAutoencoder(nn.Module):
    """The encoder, and the decoder that only training needs."""

    def __init__(self, config: MaskedSpectrogramConfig) -> None:
        super().__init__()
        encoder, dim = config.encoder, config.decoder_dim
        self.num_visible = config.num_visible
        self.encoder = DashengEncoder(encoder)
        self.input = nn.Linear(encoder.hidden_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.positions = nn.Parameter(0.02 * torch.randn(encoder.window_frames, dim))
        self.blocks = nn.ModuleList(Block(dim, config.decoder_heads, mlp_ratio=4) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, encoder.num_mels * encoder.patch_hops)

    def forward(self, waveform: Float[Tensor, "B S"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Loss of segments of whole frames, one window each; `generator` chooses what is hidden."""
        margin = self.encoder.mel.margin
        decibels = self.encoder.decibels(reflect(waveform, margin, margin))
        tokens = self.encoder.embed(decibels)
        noise = torch.rand(tokens.shape[:2], generator=generator, device=tokens.device)
        order = noise.argsort(dim=1)
        predicted = self.predict(tokens, order[:, : self.num_visible])
        wanted = normalize_patches(to_patches(decibels, self.encoder.config.patch_hops))
        error = (predicted.float() - wanted).square().mean(dim=-1)  # (B, T)
        return error.gather(1, order[:, self.num_visible :]).mean()

    def predict(self, tokens: Float[Tensor, "B T C"], visible: Int[Tensor, "B N"]) -> Float[Tensor, "B T P"]:
        """All patches, from the embedded frames at these places alone."""
        seen = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        seen = self.input(self.encoder.transform(seen))
        x = self.mask_token.to(seen.dtype).expand(tokens.shape[0], tokens.shape[1], -1)
        x = x.scatter(1, visible.unsqueeze(-1).expand(-1, -1, seen.shape[-1]), seen)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def to_patches(spectrogram: Float[Tensor, "B M H"], patch_hops: int) -> Float[Tensor, "B T P"]:
    """The values of each frame's patch, band after band."""
    batch, num_mels, _ = spectrogram.shape
    return spectrogram.reshape(batch, num_mels, -1, patch_hops).transpose(1, 2).flatten(2)


def normalize_patches(patches: Float[Tensor, "B T P"]) -> Float[Tensor, "B T P"]:
    """Zero mean and unit variance of every patch (He et al., arXiv 2111.06377, section 4.1)."""
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class MaskedSpectrogramTask:
    """See `training.task.Task`.

    Raises:
        UserError: caches or sources that cannot be read, or of another sample rate.
    """

    def __init__(self, config: MaskedSpectrogramConfig) -> None:
        self.config = config
        self.model = MaskedAutoencoder(config)
        rate, self.num_samples = (
            config.encoder.sample_rate_hz,
            config.data.segment_frames * config.encoder.frame_samples,
        )
        self.train_data = open_segments(config.data, "train", rate)
        self.validation = validation_segments(config.data, rate, self.num_samples)

    def modules(self) -> Mapping[str, nn.Module]:
        """Encoder and decoder as one."""
        return {"model": self.model}

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The masked autoencoder's."""
        return self.model(batch["waveform"][:, 0], generator), {}

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Random segments at random loudness."""
        place = {"seed": seed, "rank": rank, "world_size": world_size, "skip": skip}
        return training_batches(self.train_data, self.config.data.batch_size, self.num_samples, **place)

    def size(self, batch: Batch) -> int:
        """Frames in the batch."""
        return batch["waveform"].shape[0] * self.config.data.segment_frames

    def validate(self) -> Mapping[str, float]:
        """The loss with the same frames hidden every time; 1 is what the mean of every patch scores."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        return {"loss": float(self.model(self.validation[:, 0].to(device), generator))}

    def export(self, folder: Path) -> None:
        """The encoder's folder, for `tokenizer.dasheng_weights.load_semantic_encoder`."""
        save_semantic_encoder(self.model.encoder, folder)

    def samples(self) -> Sequence[Sample]:
        """None: the model makes no sound."""
        return ()
