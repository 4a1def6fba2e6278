"""Dasheng's semantic encoder (arXiv 2406.06992): a transformer on patches of a 16 kHz spectrogram, 25 frames a second.

Layout as in the public code (RicherMans/Dasheng, and the encoder inside `mispeech/dashengtokenizer`): centred 64-band
mel energies in decibels, batch normalization per band, one patch of all bands x 4 hops a frame, learned positions,
pre-norm blocks with exact GELU. Modules carry the published names.

A recording is cut into windows of `window_frames` frames (published: 252, which are 10.08 s), each encoded by itself
from the windowed positions; the last one is as short as what remains, as in DashengTokenizer (RicherMans/Dasheng
instead fills the last of several windows with zeros). So a window is all that a frame sees, besides the half
spectrogram window at each end of it.

Shapes: B batch, T frames of a window or recording, M mel bands, H hops (`patch_hops` to a frame), C hidden, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.centred_mel import CentredMel, reflect


@dataclass(frozen=True, kw_only=True, slots=True)
class DashengEncoderConfig:
    """Shape of the semantic encoder; the defaults are Dasheng 0.6B's, whose layout MiDashengLM's encoder shares."""

    sample_rate_hz: int = 16000
    n_fft: int = 512
    hop_length: int = 160
    """Samples a hop of the spectrogram."""
    patch_hops: int = 4
    """Hops a frame: 4 gives 25 Hz."""
    num_mels: int = 64
    hidden_dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    mlp_ratio: int = 4
    window_frames: int = 252
    """Frames that attend to each other, and learned positions; fewer means less look-ahead."""
    dynamic_range_db: float = 120.0
    """Energies further below a window's maximum are raised to this. (Published: below the recording's maximum.)"""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_dim={self.hidden_dim}; use 4, 8 or 16")
        check_n_fft("n_fft", self.n_fft, self.frame_samples)

    @property
    def frame_samples(self) -> int:
        """Samples a frame."""
        return self.hop_length * self.patch_hops


def check_n_fft(name: str, n_fft: int, frame_samples: int) -> None:
    """One frame must be long enough to be mirrored at the ends of a recording.

    Raises:
        ValueError: the window is odd, or half of it reaches over a frame.
    """
    if n_fft % 2 or n_fft // 2 >= frame_samples:
        raise ValueError(f"{name}={n_fft} must be even and less than {2 * frame_samples}, twice a frame's samples")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        batch, num_frames, _ = x.shape
        qkv = self.qkv(x).reshape(batch, num_frames, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, heads, T, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_frames, -1))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """One linear map of a patch of all bands x `patch_hops` hops."""

    def __init__(self, num_mels: int, patch_hops: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, (num_mels, patch_hops), stride=(num_mels, patch_hops))

    def forward(self, spectrogram: Float[Tensor, "B M H"]) -> Float[Tensor, "B C 1 T"]:
        return self.proj(spectrogram.unsqueeze(1))


class DashengEncoder(nn.Module):
    """Waveforms to semantic features; see the module's docstring."""

    def __init__(self, config: DashengEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = CentredMel(
            sample_rate_hz=config.sample_rate_hz,
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            num_mels=config.num_mels,
            power=2,
        )
        dim = config.hidden_dim
        self.init_bn = nn.BatchNorm1d(config.num_mels, momentum=0.01)
        self.patch_embed = Patches(config.num_mels, config.patch_hops, dim)
        self.time_pos_embed = nn.Parameter(0.02 * torch.randn(1, dim, 1, config.window_frames))
        self.freq_pos_embed = nn.Parameter(0.02 * torch.randn(1, dim, 1, 1))
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, waveform: Float[Tensor, "B S"]) -> Float[Tensor, "B T C"]:
        """Features of a complete recording of whole frames, window by window."""
        windows = split_windows(waveform, self.config, self.mel.margin)
        return torch.cat([self.window(piece) for piece in windows], dim=1)

    def window(self, samples: Float[Tensor, "B S"]) -> Float[Tensor, "B T C"]:
        """Features of one window, whose samples begin `mel.margin` before its first frame and reach as far after."""
        return self.transform(self.embed(self.decibels(samples)))

    def decibels(self, samples: Float[Tensor, "B S"]) -> Float[Tensor, "B M H"]:
        """10 log10 of the mel energies, at least 1e-10, at most `dynamic_range_db` below the window's maximum."""
        energies = self.mel(samples)
        energies = energies[..., : energies.shape[-1] // self.config.patch_hops * self.config.patch_hops]
        decibels = 10.0 * energies.clamp(min=1e-10).log10()
        return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - self.config.dynamic_range_db)

    def embed(self, decibels: Float[Tensor, "B M H"]) -> Float[Tensor, "B T C"]:
        """Patches with their positions in the window."""
        x = self.patch_embed(self.init_bn(decibels))
        x = x + self.time_pos_embed[..., : x.shape[-1]] + self.freq_pos_embed
        return x.squeeze(2).transpose(1, 2)

    def transform(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The transformer over any subset of a window's embedded frames."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def split_windows(
    waveform: Float[Tensor, "B S"], config: DashengEncoderConfig, margin: int
) -> Iterator[Float[Tensor, "B L"]]:
    """Windows of a complete recording of whole frames, each with `margin` samples before its first frame.

    The recording is mirrored at its ends. A window reaches to the end of the last of its spectrogram windows, which are
    2 * margin samples long and centred on the hops.
    """
    extended = reflect(waveform, margin, margin)
    num_frames = waveform.shape[1] // config.frame_samples
    for first in range(0, num_frames, config.window_frames):
        count = min(config.window_frames, num_frames - first)
        start = first * config.frame_samples
        yield extended[:, start : start + window_span(count, config, margin)]


def window_span(num_frames: int, config: DashengEncoderConfig, margin: int) -> int:
    """Samples of a window of so many frames, margins included."""
    return (num_frames * config.patch_hops - 1) * config.hop_length + 2 * margin
