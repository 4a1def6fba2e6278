"""Training of speech enhancement in a frozen tokenizer's space (`tokenizer.enhancer`).

    loss = embedding |(y - clean) / s|^2 + mel * mel(decode(y), clean speech)

y: enhanced embeddings of a mixture; clean: the tokenizer's own embeddings of the speech in it; s: deviation of each
channel. The tokenizer is no module of the run: it gets no optimizer, is in no checkpoint, and is copied into the
finished folder as it came.

Shapes: B batch, T frames, D embedding, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hybridlm.checkpoint import load_codec
from tokenizer.bottleneck import normalize_channels
from tokenizer.enhancer import EmbeddingSpace, Enhancer, EnhancerConfig, SpeechEnhancer, View
from tokenizer.mel import MultiResolutionMelLoss
from training.examples import device_of
from training.noisy_speech import NoiseConfig, NoisySpeech
from training.task import Batch, Sample
from training.tokenizer_data import TokenizerDataConfig

MEASURED_BATCHES = 4
"""Batches of clean speech whose embeddings tell the channels' means and deviations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhancementLossConfig:
    """Weights of the losses."""

    embedding_weight: float = 1.0
    mel_weight: float = 0.0
    """Of the mel distance of what the frozen decoder makes; 0 spares the decoder. For f3 and dasheng."""
    mel_share: float = 0.25
    """Share of a batch that is decoded for it: decoding costs more than all the rest."""

    def __post_init__(self) -> None:
        for name in ("embedding_weight", "mel_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.embedding_weight == self.mel_weight == 0:
            raise ValueError("embedding_weight and mel_weight are both 0; give at least one")
        if not 0 < self.mel_share <= 1:
            raise ValueError(f"mel_share={self.mel_share} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhancementTaskConfig:
    """Settings of `task: enhancement`, under `enhancement:`."""

    tokenizer: str
    """`box`, or a tokenizer's name or folder, as `hybridlm reconstruct` takes it; it stays as it is."""
    data: TokenizerDataConfig
    """The speech. Segments should be no shorter than the enhancer's `window_frames`."""
    noise: NoiseConfig
    view: View | None = None
    """The embeddings to enhance; None: features where the tokenizer decodes them (dasheng), else latents."""
    enhancer: EnhancerConfig = field(default_factory=EnhancerConfig)
    losses: EnhancementLossConfig = field(default_factory=EnhancementLossConfig)


class EnhancementTask:
    """See `training.task.Task`.

    Raises:
        UserError: a tokenizer, caches or sources that cannot be read or do not fit together.
    """

    def __init__(self, config: EnhancementTaskConfig) -> None:
        self.config = config
        tokenizer = load_codec(config.tokenizer)
        if isinstance(tokenizer, nn.Module):
            tokenizer.requires_grad_(False).eval()
        self.tokenizer, self.space = tokenizer, EmbeddingSpace(tokenizer, config.view)
        self.num_samples = config.data.segment_frames * tokenizer.hop_length
        self.speech = NoisySpeech(config.data, config.noise, tokenizer.sample_rate_hz, self.num_samples)
        self.mel = MultiResolutionMelLoss(tokenizer.sample_rate_hz)
        clean = self._clean_embeddings()
        if config.losses.mel_weight > 0:
            self.space.synthesize(clean[:1, :2])  # refuses now what would fail at the first step
        normalized = self.space.view == "latents" and torch.allclose(normalize_channels(clean), clean, atol=1e-3)
        self.network = Enhancer(self.space.dim, config.enhancer, normalized=normalized)
        self.network.measure(clean)
        self.enhancer = SpeechEnhancer(self.space, self.network)

    def modules(self) -> Mapping[str, nn.Module]:
        """The network alone."""
        return {"model": self.network}

    def turns(self, step: int) -> Sequence[str]:
        """The network, always."""
        return ("model",)

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The weighted sum; `unchanged` in the log is the distance that noisy embeddings have as they are."""
        noisy, clean = (self._encode(batch[name]) for name in ("noisy", "clean"))
        enhanced, _ = self.network(noisy)
        embedding = self.distance(enhanced, clean)
        loss = self.config.losses.embedding_weight * embedding
        figures: dict[str, Tensor | float] = {
            "embedding": embedding.detach(),
            "unchanged": self.distance(noisy, clean).detach(),
        }
        if self.config.losses.mel_weight > 0:
            self.mel.to(noisy.device)
            rows = max(1, round(self.config.losses.mel_share * len(noisy)))
            mel = self.mel(self.space.synthesize(enhanced[:rows]), batch["clean"][:rows])
            loss = loss + self.config.losses.mel_weight * mel
            figures["mel"] = mel.detach()
        return loss, figures

    def distance(self, found: Float[Tensor, "B T D"], clean: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Mean squared difference, in deviations of each channel over clean speech."""
        return ((found.float() - clean.float()) / self.network.std).square().mean()

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Mixtures of random segments."""
        return self.speech.batches(seed=seed, rank=rank, world_size=world_size, skip=skip)

    def size(self, batch: Batch) -> int:
        """Frames in the batch."""
        return batch["noisy"].shape[0] * self.config.data.segment_frames

    def validate(self) -> Mapping[str, float]:
        """The loss on held-out speech and noise, and mel distances to the clean speech.

        `mel_noisy` and `mel_clean` are of what the tokenizer makes of noisy and of clean speech: where enhancement
        begins, and as far as it could come.
        """
        device = next(self.network.parameters()).device
        self.mel.to(device)
        noisy_audio, clean_audio = (audio.to(device) for audio in self.speech.validation)
        noisy, clean = self._encode(noisy_audio), self._encode(clean_audio)
        enhanced, _ = self.network(noisy)
        figures = {"embedding": float(self.distance(enhanced, clean)), "unchanged": float(self.distance(noisy, clean))}
        for name, embeddings in {"enhanced": enhanced, "noisy": noisy, "clean": clean}.items():
            figures[f"mel_{name}"] = float(self.mel(self.space.decode(embeddings), clean_audio))
        losses = self.config.losses
        loss = losses.embedding_weight * figures["embedding"] + losses.mel_weight * figures["mel_enhanced"]
        return {**figures, "loss": loss}

    def export(self, folder: Path) -> None:
        """The enhancer's folder, with its tokenizer."""
        self.enhancer.save(folder)

    def samples(self) -> Sequence[Sample]:
        """Held-out mixtures of rising ratios of speech to noise: clean, noisy and enhanced."""
        device = next(self.network.parameters()).device
        rows = torch.linspace(0, self.config.data.validation_segments - 1, 4).round().long()
        noisy, clean = (audio[rows].to(device) for audio in self.speech.validation)
        self._follow(device)
        return [
            Sample(name=f"{name}/{row}", waveform=audio[row, 0].cpu(), sample_rate_hz=self.tokenizer.sample_rate_hz)
            for name, audio in {"clean": clean, "noisy": noisy, "enhanced": self.enhancer.enhance(noisy)}.items()
            for row in range(len(rows))
        ]

    def _clean_embeddings(self) -> Float[Tensor, "B T D"]:
        size = self.config.data.batch_size
        batches = self.speech.speech_source.segments(size, self.num_samples, seed=0)
        return torch.cat([self._encode(batch) for batch in islice(batches, MEASURED_BATCHES)])

    def _encode(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B T D"]:
        self._follow(waveform.device)
        return self.space.encode(waveform)

    def _follow(self, device: torch.device) -> None:
        """The tokenizer goes where the network is: it is no module of the run, so the loop doesn't move it."""
        if isinstance(self.tokenizer, nn.Module) and device_of(self.tokenizer) != device:
            self.tokenizer.to(device)
