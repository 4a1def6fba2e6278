"""Training of the F3 autoencoder: mel, loudness, pitch and adversarial losses around the noise-regularized bottleneck.

Shapes: B batch, T frames, K codebooks, D latent, S samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.bottleneck import (
    add_noise,
    add_sigma_vae_noise,
    centre_and_scale,
    coding_rate,
    kl_to_standard_normal,
)
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config
from tokenizer.loudness import LoudnessLoss
from tokenizer.mel import MultiResolutionMelLoss
from tokenizer.pitch import pitch_loss, track_pitch
from tokenizer.quantizer import ResidualQuantizer
from training.adversarial import Adversary
from training.task import Batch, Sample
from training.tokenizer_data import TokenizerDataConfig, open_segments, training_batches, validation_segments

SCALE_BATCHES = 8
"""Batches of 16 segments from which the scale of latents that are not normalized is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerLossConfig:
    """Weights and schedules of the autoencoder's losses."""

    noise_gamma: float = 0.35
    """Largest standard deviation of the noise on the latents that the decoder learns to bear (gamma of F3)."""
    sigma_vae_noise: float = 0.0
    """Instead of `noise_gamma`, which must then be 0: standard deviation of a sigma-VAE's noise strength (VibeVoice:
    0.625), in the unit of latents that are not normalized."""
    kl_weight: float = 0.0
    """Of the KL divergence of a sigma-VAE's posterior, which keeps latents that are not normalized from growing."""
    quantized_share: float = 0.25
    """Share of a batch whose decoder sees quantized latents instead of noisy ones."""
    full_depth_share: float = 0.5
    """Share of the quantized rows that use all codebooks; the rest use a uniformly drawn number (quantizer dropout)."""
    mel_weight: float = 1.0
    loudness_weight: float = 0.3
    """Of the disturbance of perceived loudness (`tokenizer.loudness`)."""
    pitch_weight: float = 0.05
    """Of the decoder's pitch, where it has an excitation."""
    rate_weight: float = 0.05
    """Of the latents' coding rate, which is maximized; it falls linearly to 0 at `rate_until_step`."""
    rate_noise: float = 0.2
    """Standard deviation of the noise in the coding rate."""
    rate_until_step: int = 2000
    adversarial_weight: float = 0.05
    feature_matching_weight: float = 0.2
    adversarial_from_step: int = 0
    """Before this step the discriminator rests, and the mel loss works alone."""
    adversarial_ramp_steps: int = 200
    """Steps over which its losses then come in."""
    codebook_decay: float = 0.99
    revive_below: float = 0.03
    """Codes chosen less often than this a batch (moving average) restart at a vector of the batch."""
    discriminator_n_ffts: tuple[int, ...] = (256, 512, 1024)
    discriminator_channels: int = 16

    def __post_init__(self) -> None:
        for name in ("quantized_share", "full_depth_share", "codebook_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("noise_gamma", "sigma_vae_noise", *(name for name in self.__slots__ if name.endswith("_weight"))):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.noise_gamma > 0 and self.sigma_vae_noise > 0:
            raise ValueError(
                f"noise_gamma={self.noise_gamma} and sigma_vae_noise={self.sigma_vae_noise} are two kinds of noise; "
                "set one of them to 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTaskConfig:
    """Settings of `task: tokenizer`, under `tokenizer_task:`."""

    data: TokenizerDataConfig
    part: Literal["all", "decoder"] = "all"
    """`decoder`: encoder and codebooks stay as they are (see `init_from`), so that latents and codes of the finished
    tokenizer equal those of the one it started from, and what was trained on them stays valid."""
    tokenizer: F3Config = field(default_factory=F3Config)
    losses: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)


class TokenizerTask:
    """See `training.task.Task`.

    Raises:
        UserError: caches or sources that cannot be read, or of another sample rate.
    """

    def __init__(self, config: TokenizerTaskConfig) -> None:
        self.config = config
        self.tokenizer = F3Tokenizer(config.tokenizer)
        self.tokenizer.encoder.requires_grad_(config.part == "all")
        self.adversary = Adversary(config.losses, ramp_steps=config.losses.adversarial_ramp_steps, every=2)
        self.mel = MultiResolutionMelLoss(config.tokenizer.sample_rate_hz)
        self.loudness = LoudnessLoss(config.tokenizer.sample_rate_hz)
        rate = config.tokenizer.sample_rate_hz
        self.train_data = open_segments(config.data, "train", rate)
        self.validation = validation_segments(config.data, rate, self._segment_samples)

    def modules(self) -> Mapping[str, nn.Module]:
        """The autoencoder and, where it takes part at all, its adversary."""
        return {"model": self.tokenizer, **self.adversary.modules()}

    def turns(self, step: int) -> Sequence[str]:
        """The autoencoder alone at first; from `adversarial_from_step` on also its adversary."""
        return ("model", "discriminator") if self.adversary.plays(step) else ("model",)

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The autoencoder's weighted sum, or the discriminator's hinge loss on what the autoencoder just made."""
        waveform = batch["waveform"]
        if turn == "discriminator":
            return self.adversary.own_loss(batch), {}
        losses = self.config.losses
        latents, _ = self.tokenizer.encoder(waveform[:, 0])
        figures: dict[str, Tensor | float] = {}
        if self.config.part == "all":
            use = self.tokenizer.quantizer.update(
                latents.detach(), decay=losses.codebook_decay, revive_below=losses.revive_below, generator=generator
            )
            figures["codes_in_use"] = sum(use) / len(use)
        decodable, quantization_error = bottleneck(
            self.tokenizer.quantizer,
            latents,
            noise_gamma=losses.noise_gamma,
            sigma_vae_noise=losses.sigma_vae_noise,
            quantized_share=losses.quantized_share,
            full_depth_share=losses.full_depth_share,
            generator=generator,
        )
        made = self.tokenizer.decoder.synthesize(decodable)
        fake = made.waveform.unsqueeze(1)
        self.mel.to(fake.device)
        mel = self.mel(fake, waveform)
        loss = losses.mel_weight * mel
        if losses.loudness_weight > 0:
            self.loudness.to(fake.device)
            loudness = self.loudness(fake, waveform)
            loss = loss + losses.loudness_weight * loudness
            figures["loudness"] = loudness.detach()
        if made.pitch_logits is not None and losses.pitch_weight > 0:
            measured = track_pitch(waveform[:, 0], self.tokenizer.sample_rate_hz, self.tokenizer.decoder.hop)
            pitch = pitch_loss(made.pitch_logits, *measured)
            loss = loss + losses.pitch_weight * pitch
            figures["pitch"] = pitch.detach()
        if self.config.part == "all" and step < losses.rate_until_step:
            rate = coding_rate(latents, losses.rate_noise)
            loss = loss - losses.rate_weight * (1 - step / losses.rate_until_step) * rate
            figures["coding_rate"] = rate.detach()
        if losses.kl_weight > 0:
            kl = kl_to_standard_normal(latents)
            loss = loss + losses.kl_weight * kl
            figures["kl"] = kl.detach()
        if self.config.tokenizer.normalization == "none":
            figures["latent_scale"] = centre_and_scale(latents.detach())[1]
        figures |= {"mel": mel.detach(), "quantization_error": quantization_error}
        if self.adversary.plays(step):
            against, said = self.adversary.against(fake, batch, step)
            loss, figures = loss + against, {**figures, **said}
        return loss, figures

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Random segments at random loudness."""
        place = {"seed": seed, "rank": rank, "world_size": world_size, "skip": skip}
        return training_batches(self.train_data, self.config.data.batch_size, self._segment_samples, **place)

    def size(self, batch: Batch) -> int:
        """Frames in the batch."""
        return batch["waveform"].shape[0] * self.config.data.segment_frames

    def validate(self) -> Mapping[str, float]:
        """Mel distance from latents and from all codebooks; their mean is what is watched."""
        device = next(self.tokenizer.parameters()).device
        self.mel.to(device)
        waveform = self.validation.to(device)
        frames = self.tokenizer.encode(waveform)
        figures = {
            "mel_latents": float(self.mel(self.tokenizer.decode_latents(frames.latents), waveform)),
            "mel_codes": float(self.mel(self.tokenizer.decode_codes(frames.codes), waveform)),
        }
        return {**figures, "loss": sum(figures.values()) / 2}

    def export(self, folder: Path) -> None:
        """The tokenizer's folder; latents that are not normalized come out at zero mean and unit scale."""
        tokenizer = self.tokenizer
        if self.config.part == "all" and self.config.tokenizer.normalization == "none":
            mean, scale = centre_and_scale(torch.cat(list(self._scale_latents())))
            tokenizer = tokenizer.standardized(mean, float(scale))
        tokenizer.save(folder)

    def _scale_latents(self) -> Iterator[Float[Tensor, "B T D"]]:
        """Latents of training segments that are always the same."""
        device = next(self.tokenizer.parameters()).device
        segments = self.train_data.segments(16, self._segment_samples, seed=0)
        for waveform in itertools.islice(segments, SCALE_BATCHES):
            yield self.tokenizer.encoder(waveform[:, 0].to(device))[0]

    def samples(self) -> Sequence[Sample]:
        """Held-out segments, as they are and from latents and codes."""
        device = next(self.tokenizer.parameters()).device
        waveform = self.validation[:4].to(device)
        frames = self.tokenizer.encode(waveform)
        kinds = {
            "original": waveform,
            "latents": self.tokenizer.decode_latents(frames.latents),
            "codes": self.tokenizer.decode_codes(frames.codes),
        }
        return [
            Sample(name=f"{name}/{row}", waveform=audio[row, 0].cpu(), sample_rate_hz=self.tokenizer.sample_rate_hz)
            for name, audio in kinds.items()
            for row in range(len(waveform))
        ]

    @property
    def _segment_samples(self) -> int:
        return self.config.data.segment_frames * self.config.tokenizer.hop_length


def bottleneck(
    quantizer: ResidualQuantizer,
    latents: Float[Tensor, "B T D"],
    *,
    noise_gamma: float,
    sigma_vae_noise: float = 0.0,
    quantized_share: float,
    full_depth_share: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
    """What the decoder sees in training: quantized latents in the first rows, noisy ones in the others.

    No gradient passes the quantization: with one (straight through), the encoder learns what is easy to quantize, and
    its 64 dimensions collapse to fewer than ten. The codes follow the latents, never the other way round. Also returns
    the mean squared error of the full-depth quantization.

    Args:
        quantizer: Of the tokenizer in training.
        latents: Of the batch.
        noise_gamma: See `TokenizerLossConfig`, as of the other three.
        sigma_vae_noise: Above 0, it takes the place of the other noise.
        quantized_share: Share of the rows that are quantized.
        full_depth_share: Share of those that use all codebooks.
        generator: Of noise and depths.
    """
    detached = latents.detach()
    codes = quantizer.encode(detached)
    error = (detached - quantizer.decode(codes)).square().mean()
    num_quantized = round(quantized_share * latents.shape[0])
    num_full = round(full_depth_share * num_quantized)
    rows = []
    for row in range(num_quantized):
        depth = quantizer.num_codebooks
        if row >= num_full:
            depth = int(torch.randint(1, quantizer.num_codebooks + 1, (), generator=generator, device=generator.device))
        rows.append(quantizer.decode(codes[row : row + 1, :depth]))
    plain = latents[num_quantized:]
    if sigma_vae_noise > 0:
        noisy = add_sigma_vae_noise(plain, sigma_vae_noise, generator)
    else:
        noisy = add_noise(plain, noise_gamma, generator)
    return torch.cat([*rows, noisy]), error
