"""Discriminators on complex spectrograms at several resolutions, and the losses that go with them.

In the manner of EnCodec's multi-scale STFT discriminator (arXiv 2210.13438) and Vocos (arXiv 2306.00814), with wide
strides over frequency so that a step is affordable on a CPU.

Shapes: B batch, S samples, T spectrogram frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Judgement = tuple[Tensor, list[Tensor]]
"""Scores of the patches, and the layers' activations."""


class SpectrogramDiscriminator(nn.Module):
    """Scores patches of one resolution's root-compressed complex spectrogram."""

    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        widths = (2, channels, 2 * channels, 4 * channels)
        self.layers = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(widths[0], widths[1], (3, 8), stride=(1, 4), padding=(1, 2))),
                weight_norm(nn.Conv2d(widths[1], widths[2], (3, 8), stride=(1, 4), padding=(1, 2))),
                weight_norm(nn.Conv2d(widths[2], widths[3], (3, 4), stride=(1, 2), padding=(1, 1))),
            ]
        )
        self.score = weight_norm(nn.Conv2d(widths[3], 1, (3, 3), padding=1))

    def forward(self, waveform: Float[Tensor, "B 1 S"]) -> Judgement:
        spectrum = torch.stft(
            waveform.squeeze(1).float(), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True
        )[:, :-1]  # (B, n_fft // 2, T)
        parts = torch.view_as_real(spectrum)
        compressed = parts * (parts.square().sum(-1, keepdim=True) + 1e-6).pow(-0.25)
        x = compressed.permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)  # (B, 2, T, frequencies)
        activations = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            activations.append(x)
        return self.score(x), activations


class MultiResolutionDiscriminator(nn.Module):
    """One `SpectrogramDiscriminator` a window length."""

    def __init__(self, n_ffts: Sequence[int] = (256, 512, 1024), channels: int = 16) -> None:
        super().__init__()
        self.parts = nn.ModuleList(SpectrogramDiscriminator(n_fft, channels) for n_fft in n_ffts)

    def forward(self, waveform: Float[Tensor, "B 1 S"]) -> list[Judgement]:
        return [part(waveform) for part in self.parts]


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator: mean over resolutions of max(0, 1 - D(x)) + max(0, 1 + D(G(x)))."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(losses).mean().float()


def adversarial_loss(fake: list[Judgement]) -> Float[Tensor, ""]:
    """Hinge loss of the generator: mean over resolutions of -D(G(x))."""
    return torch.stack([-score.mean() for score, _ in fake]).mean().float()


def feature_matching_loss(real: list[Judgement], fake: list[Judgement]) -> Float[Tensor, ""]:
    """L1 distance of activations, relative to the real ones' mean magnitude (EnCodec, section 3.4)."""
    losses = []
    for (_, real_layers), (_, fake_layers) in zip(real, fake, strict=True):
        for r, f in zip(real_layers, fake_layers, strict=True):
            r = r.detach().float()
            losses.append((f.float() - r).abs().mean() / (r.abs().mean() + 1e-6))
    return torch.stack(losses).mean()
