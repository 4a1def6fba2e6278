"""Training of DashengTokenizer (arXiv 2602.23765) in one stage: acoustics are injected into a frozen encoder.

    loss = 45 mel(x', x) + 45 |acoustic - semantic|^2 + 1 feature matching + 1 adversarial
           + 1 |W' latents - features|^2

The last term, and that most rows are decoded from latents, are this project's: they train the way to compact latents.
The adversary is the multi-resolution one of `tokenizer.adversary`. With `published`, encoder and decoder stay as their
authors made them, and that way alone is trained.

Shapes: B batch, T frames, C features, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.dasheng import DashengConfig, DashengTokenizer, Injection
from tokenizer.dasheng_encoder import DashengEncoderConfig
from tokenizer.dasheng_weights import load_published_tokenizer, load_semantic_encoder
from tokenizer.errors import UserError
from tokenizer.mel import MultiResolutionMelLoss
from training.adversarial import Adversary
from training.task import Batch, Sample
from training.tokenizer_data import TokenizerDataConfig, open_segments, training_batches, validation_segments
from training.tokenizer_task import bottleneck


@dataclass(frozen=True, kw_only=True, slots=True)
class DashengLossConfig:
    """Weights and schedules of the losses."""

    mel_weight: float = 45.0
    preservation_weight: float = 45.0
    """Of the acoustic side's squared distance to the frozen semantics; where nothing is injected, there is no such."""
    feature_matching_weight: float = 1.0
    adversarial_weight: float = 1.0
    projection_weight: float = 1.0
    """Of the squared distance of what comes back from the latents to the features."""
    features_share: float = 0.25
    """Share of a batch that is decoded from features; the others are decoded from latents."""
    quantized_share: float = 0.33
    """Share of the latter whose latents are quantized; the others' bear noise."""
    full_depth_share: float = 0.5
    """Share of the quantized rows that use all codebooks; the rest use a uniformly drawn number (quantizer dropout)."""
    noise_gamma: float = 0.35
    """Largest standard deviation of the noise on the latents."""
    adversarial_from_step: int = 0
    """Before this step the discriminator rests."""
    codebook_decay: float = 0.99
    revive_below: float = 0.03
    """Codes chosen less often than this a batch (moving average) restart at a vector of the batch."""
    discriminator_n_ffts: tuple[int, ...] = (256, 512, 1024)
    discriminator_channels: int = 16

    def __post_init__(self) -> None:
        for name in ("features_share", "quantized_share", "full_depth_share", "codebook_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("noise_gamma", *(name for name in self.__slots__ if name.endswith("_weight"))):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class DashengTaskConfig:
    """Settings of `task: dasheng`, under `dasheng:`."""

    data: TokenizerDataConfig
    semantic: str | None = None
    """Hub id or folder of the semantic encoder to freeze (`tokenizer.dasheng_weights.load_semantic_encoder`)."""
    published: str | None = None
    """Instead: hub id or folder of a whole published tokenizer, of which only the way to latents and codes is trained.
    Of `tokenizer` then only `latent_dim`, `num_codebooks` and `codebook_size` may be set."""
    window_frames: int | None = None
    """Frames that are encoded together, fewer than the encoder has positions: less look-ahead."""
    tokenizer: DashengConfig = field(default_factory=DashengConfig)
    """`semantic` in it is the loaded encoder's: leave it out, or give just that."""
    losses: DashengLossConfig = field(default_factory=DashengLossConfig)

    def __post_init__(self) -> None:
        if (self.semantic is None) == (self.published is None):
            raise ValueError(
                "give either semantic, the encoder to freeze (train one with configs/dasheng-semantic-small.yaml), "
                "or published, a whole tokenizer such as mispeech/dashengtokenizer"
            )
        own = DashengConfig(
            latent_dim=self.tokenizer.latent_dim,
            num_codebooks=self.tokenizer.num_codebooks,
            codebook_size=self.tokenizer.codebook_size,
        )
        if self.published is not None and self.tokenizer != own:
            raise ValueError("with published, set only latent_dim, num_codebooks and codebook_size of tokenizer")


def preservation_loss(injection: Injection) -> Float[Tensor, ""]:
    """Mean squared distance of the acoustic side to the frozen semantics, which it so disturbs least.

    Source: the public code of LoSATok (arXiv 2605.27840), which trains this encoder on.
    """
    return (injection.acoustic.float() - injection.semantic.float()).square().mean()


class DashengTask:
    """See `training.task.Task`.

    Raises:
        UserError: weights that cannot be had, caches or sources that cannot be read, or of another sample rate.
    """

    def __init__(self, config: DashengTaskConfig) -> None:
        self.config = config
        self.tokenizer = _untrained(config)
        self.adversary = Adversary(config.losses)
        rate = self.tokenizer.sample_rate_hz
        self.mel = MultiResolutionMelLoss(rate)
        self.num_samples = config.data.segment_frames * self.tokenizer.hop_length
        self.train_data = open_segments(config.data, "train", rate)
        self.validation = validation_segments(config.data, rate, self.num_samples)

    def modules(self) -> Mapping[str, nn.Module]:
        """The tokenizer and, where it takes part at all, its adversary."""
        return {"model": self.tokenizer, **self.adversary.modules()}

    def turns(self, step: int) -> Sequence[str]:
        """The tokenizer alone at first; from `adversarial_from_step` on also its adversary."""
        return ("model", "discriminator") if self.adversary.plays(step) else ("model",)

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The tokenizer's weighted sum, or the discriminator's hinge loss on what the tokenizer just made."""
        waveform = batch["waveform"]
        if turn == "discriminator":
            return self.adversary.own_loss(batch), {}
        losses, tokenizer = self.config.losses, self.tokenizer
        injection = tokenizer.encoder(waveform[:, 0])
        latents = tokenizer.project(injection.features)
        use = tokenizer.quantizer.update(
            latents.detach(), decay=losses.codebook_decay, revive_below=losses.revive_below, generator=generator
        )
        fake = tokenizer.synthesize(self.decodable(injection.features, latents, generator))[0].unsqueeze(1)
        self.mel.to(fake.device)
        mel = self.mel(fake, waveform)
        projection = (tokenizer.expand(latents).float() - injection.features.detach().float()).square().mean()
        loss = losses.mel_weight * mel + losses.projection_weight * projection
        figures: dict[str, Tensor | float] = {
            "mel": mel.detach(),
            "projection": projection.detach(),
            "codes_in_use": sum(use) / len(use),
        }
        if tokenizer.config.inject:
            preservation = preservation_loss(injection)
            loss = loss + losses.preservation_weight * preservation
            figures["preservation"] = preservation.detach()
        if self.adversary.plays(step):
            against, said = self.adversary.against(fake, batch, step)
            loss, figures = loss + against, {**figures, **said}
        return loss, figures

    def decodable(
        self, features: Float[Tensor, "B T C"], latents: Float[Tensor, "B T D"], generator: torch.Generator
    ) -> Float[Tensor, "B T C"]:
        """What the decoder sees in training: features in the first rows, then what comes back from latents."""
        losses = self.config.losses
        count = round(losses.features_share * features.shape[0])
        compact, _ = bottleneck(
            self.tokenizer.quantizer,
            latents[count:],
            noise_gamma=losses.noise_gamma,
            quantized_share=losses.quantized_share,
            full_depth_share=losses.full_depth_share,
            generator=generator,
        )
        expanded = self.tokenizer.expand(compact)
        return torch.cat([features[:count].to(expanded.dtype), expanded])

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Random segments at random loudness."""
        place = {"seed": seed, "rank": rank, "world_size": world_size, "skip": skip}
        return training_batches(self.train_data, self.config.data.batch_size, self.num_samples, **place)

    def size(self, batch: Batch) -> int:
        """Frames in the batch."""
        return batch["waveform"].shape[0] * self.config.data.segment_frames

    def validate(self) -> Mapping[str, float]:
        """Mel distance from features, from latents and from all codebooks; their mean is what is watched."""
        device = next(self.tokenizer.parameters()).device
        self.mel.to(device)
        waveform = self.validation.to(device)
        figures = {f"mel_{kind}": float(self.mel(audio, waveform)) for kind, audio in self._decoded(waveform).items()}
        return {**figures, "loss": sum(figures.values()) / len(figures)}

    def export(self, folder: Path) -> None:
        """The tokenizer's folder."""
        self.tokenizer.save(folder)

    def samples(self) -> Sequence[Sample]:
        """Held-out segments, as they are and from features, latents and codes."""
        waveform = self.validation[:4].to(next(self.tokenizer.parameters()).device)
        return [
            Sample(name=f"{name}/{row}", waveform=audio[row, 0].cpu(), sample_rate_hz=self.tokenizer.sample_rate_hz)
            for name, audio in {"original": waveform, **self._decoded(waveform)}.items()
            for row in range(len(waveform))
        ]

    def _decoded(self, waveform: Float[Tensor, "B 1 S"]) -> dict[str, Float[Tensor, "B 1 S"]]:
        frames = self.tokenizer.encode(waveform)
        assert frames.features is not None
        return {
            "features": self.tokenizer.decode_features(frames.features),
            "latents": self.tokenizer.decode_latents(frames.latents),
            "codes": self.tokenizer.decode_codes(frames.codes),
        }


def _untrained(config: DashengTaskConfig) -> DashengTokenizer:
    """The tokenizer before its training, with all that stays as it is frozen."""
    wanted = config.tokenizer
    if config.published is not None:
        tokenizer = load_published_tokenizer(
            config.published,
            window_frames=config.window_frames,
            latent_dim=wanted.latent_dim,
            num_codebooks=wanted.num_codebooks,
            codebook_size=wanted.codebook_size,
        ).requires_grad_(False)
        tokenizer.compress.requires_grad_(True)
        tokenizer.expand.requires_grad_(True)
        return tokenizer
    assert config.semantic is not None
    encoder = load_semantic_encoder(config.semantic, window_frames=config.window_frames)
    if wanted.semantic not in (DashengEncoderConfig(), encoder.config):
        given, loaded = asdict(wanted.semantic), asdict(encoder.config)
        name = next(name for name in given if given[name] != loaded[name])
        raise UserError(
            f"dasheng.tokenizer.semantic has {name}={given[name]}, but the encoder {config.semantic} has "
            f"{loaded[name]}; leave tokenizer.semantic out"
        )
    try:
        settings = replace(wanted, semantic=encoder.config)
    except ValueError as error:
        raise UserError(f"dasheng.tokenizer does not fit the encoder {config.semantic}: {error}") from error
    tokenizer = DashengTokenizer(settings)
    tokenizer.encoder.model.load_state_dict(encoder.state_dict())
    return tokenizer
