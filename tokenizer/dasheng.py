"""DashengTokenizer (arXiv 2602.23765): acoustics injected into a frozen semantic encoder by one linear layer.

    semantic = Dasheng(x)                             frozen
    acoustic = LayerNorm(Conv2d_{128 x 4}(log max(mel(x), 1e-7)))
    features = semantic + acoustic                    1280-d at 25 Hz: for input and understanding
    latents  = normalize(W features)                  64-d: what a language model generates
    codes    = RVQ(latents)
    x'       = Vocos(ConvTranspose1d(features'))      with features' = features, or W' latents

The features, their layout and the decoder are the paper's. Latents and codes are this project's: 1280 dimensions are
hard to generate, so a linear map takes them to 64 and back, and the decoder learns to bear its loss.

The encoder looks ahead: to the end of the window of frames in which a frame lies (`tokenizer.dasheng_encoder`) and over
half a spectrogram window more. `lookahead_frames` says how far at most.

Shapes: B batch, T frames, K codebooks, D latent, C hidden (the features), S samples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.bottleneck import normalize_channels
from tokenizer.centred_mel import CentredMel
from tokenizer.dasheng_encoder import DashengEncoder, DashengEncoderConfig, check_n_fft, split_windows
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source
from tokenizer.loading import read_config, read_weights, write_folder
from tokenizer.quantizer import ResidualQuantizer
from tokenizer.settings import from_mapping
from tokenizer.vocos import Vocos, VocosState

if TYPE_CHECKING:
    from tokenizer.dasheng_stream import DashengStreamingDecoder, DashengStreamingEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class DashengConfig:
    """Shape of the tokenizer; the defaults are the published layout, but for `causal`."""

    semantic: DashengEncoderConfig = field(default_factory=DashengEncoderConfig)
    """Of the frozen encoder; it also decides sample rate, frame rate and the width of the features."""
    n_fft: int = 1024
    num_mels: int = 128
    """Bands of the log-mel that the acoustic layer sees."""
    inject: bool = True
    """Whether there is an acoustic layer; without it, features are the frozen semantics alone, for comparison."""
    causal: bool = True
    """Whether the decoder sees present and past frames alone. The published one was trained centred: false."""
    upsampling: int = 2
    """Hops of the decoder a frame: 2 gives 50 Hz."""
    decoder_dim: int = 1280
    decoder_hidden_dim: int = 5120
    decoder_blocks: int = 12
    kernel_size: int = 7
    synthesis_window: int = 1280
    latent_dim: int = 64
    num_codebooks: int = 8
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name not in ("semantic", "causal", "inject")):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        frame_samples = self.semantic.frame_samples
        check_n_fft("n_fft", self.n_fft, frame_samples)
        if frame_samples % self.upsampling:
            raise ValueError(f"upsampling={self.upsampling} must divide a frame's {frame_samples} samples; use 2")
        hop = frame_samples // self.upsampling
        if self.synthesis_window % hop or self.synthesis_window < 2 * hop or (self.synthesis_window - hop) % 2:
            raise ValueError(
                f"synthesis_window={self.synthesis_window} must be a multiple of the decoder's hop {hop}, "
                f"at least {2 * hop}, and differ from it by an even number"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")


class Injection(NamedTuple):
    """The two sides of the features."""

    semantic: Float[Tensor, "B T C"]
    """Without gradient."""
    acoustic: Float[Tensor, "B T C"]

    @property
    def features(self) -> Float[Tensor, "B T C"]:
        """Their sum."""
        return self.semantic + self.acoustic


class InjectedEncoder(nn.Module):
    """Frozen semantics plus one layer of acoustics."""

    def __init__(self, config: DashengConfig) -> None:
        super().__init__()
        semantic = config.semantic
        self.model = DashengEncoder(semantic).requires_grad_(False).eval()
        self.mel = CentredMel(
            sample_rate_hz=semantic.sample_rate_hz,
            n_fft=config.n_fft,
            hop_length=semantic.hop_length,
            num_mels=config.num_mels,
            power=1,
        )
        patch = (config.num_mels, semantic.patch_hops)
        self.inject = config.inject
        if config.inject:
            self.patch_embed = nn.Conv2d(1, semantic.hidden_dim, patch, stride=patch)
            self.norm = nn.LayerNorm(semantic.hidden_dim)
        self.margin = max(self.mel.margin, self.model.mel.margin)

    def train(self, mode: bool = True) -> InjectedEncoder:
        """As any module, but the semantic encoder keeps its running statistics."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, waveform: Float[Tensor, "B S"]) -> Injection:
        """Of a complete recording of whole frames."""
        windows = [self.window(piece) for piece in split_windows(waveform, self.model.config, self.margin)]
        return Injection(*(torch.cat(side, dim=1) for side in zip(*windows, strict=True)))

    def window(self, samples: Float[Tensor, "B S"]) -> Injection:
        """Of one window, whose samples begin and end `margin` before its first hop's centre and after its last's."""
        with torch.no_grad():
            semantic = self.model.window(_crop(samples, self.margin - self.model.mel.margin))
        if not self.inject:
            return Injection(semantic, torch.zeros_like(semantic))
        log_mel = self.mel(_crop(samples, self.margin - self.mel.margin)).clamp(min=1e-7).log()
        acoustic = self.patch_embed(log_mel.unsqueeze(1)).squeeze(2).transpose(1, 2)
        return Injection(semantic, self.norm(acoustic))


class DashengTokenizer(nn.Module):
    """Waveforms to 1280-d features, 64-d latents and residual codes at 25 Hz, and back."""

    name = "dasheng"

    def __init__(self, config: DashengConfig) -> None:
        super().__init__()
        self.config = config
        semantic = config.semantic
        self.sample_rate_hz = semantic.sample_rate_hz
        self.hop_length = semantic.frame_samples
        self.frame_rate_hz = semantic.sample_rate_hz / semantic.frame_samples
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.latent_dim = config.latent_dim
        self.feature_dim = semantic.hidden_dim
        self.encoder = InjectedEncoder(config)
        # The last hop's centre lies a hop before the end of its frame: so far do spectrogram windows reach over it.
        overhangs = [max(mel.margin - semantic.hop_length, 0) for mel in (self.encoder.model.mel, self.encoder.mel)]
        semantic_frames, acoustic_frames = (-(-overhang // self.hop_length) for overhang in overhangs)
        self.lookahead_frames = max(semantic.window_frames - 1 + semantic_frames, acoustic_frames)
        self.compress = nn.Linear(self.feature_dim, config.latent_dim)
        self.quantizer = ResidualQuantizer(
            num_codebooks=config.num_codebooks, codebook_size=config.codebook_size, dim=config.latent_dim
        )
        self.expand = nn.Linear(config.latent_dim, self.feature_dim)
        self.upsampler = nn.ConvTranspose1d(
            self.feature_dim, self.feature_dim, kernel_size=config.upsampling, stride=config.upsampling
        )
        self.decoder = Vocos(
            input_dim=self.feature_dim,
            dim=config.decoder_dim,
            hidden_dim=config.decoder_hidden_dim,
            num_blocks=config.decoder_blocks,
            kernel_size=config.kernel_size,
            n_fft=config.synthesis_window,
            hop_length=self.hop_length // config.upsampling,
            causal=config.causal,
        )
        self.decoder_lookahead_frames = -(-self.decoder.reach_hops // config.upsampling)
        """Frames after its own that a decoded sample depends on; 0 when causal."""

    @torch.inference_mode()
    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode a batch; `lengths` in samples. The last frame is padded with silence.

        Rows of as many frames go together; every row is mirrored at its own end, so that none sees padding. What lies
        past a row's frames is zero.
        """
        batch, _, samples = waveform.shape
        if lengths is None:
            lengths = torch.full((batch,), samples, device=waveform.device)
        frames = (lengths + self.hop_length - 1) // self.hop_length
        padded = F.pad(waveform[:, 0], (0, -samples % self.hop_length))
        padded = padded * (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])
        features = padded.new_zeros(batch, padded.shape[1] // self.hop_length, self.feature_dim)
        for count in sorted(set(frames.tolist()) - {0}):
            rows = frames == count
            features[rows, :count] = self.encoder(padded[rows, : count * self.hop_length]).features.to(features.dtype)
        return self.frames_of(features, frames)

    def frames_of(self, features: Float[Tensor, "B T C"], lengths: Int[Tensor, " B"]) -> AudioFrames:
        """Latents and codes beside their features."""
        latents = self.project(features)
        return AudioFrames(codes=self.quantize(latents), latents=latents, lengths=lengths, features=features)

    def project(self, features: Float[Tensor, "B T C"]) -> Float[Tensor, "B T D"]:
        """Latents of features."""
        return normalize_channels(self.compress(features))

    def quantize(self, latents: Float[Tensor, "B T D"]) -> Int[Tensor, "B K T"]:
        """Codes of latents."""
        return self.quantizer.encode(latents)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B T D"]:
        """Latents of the first k codebooks."""
        return self.quantizer.decode(codes)

    @torch.inference_mode()
    def decode_codes(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B 1 S"]:
        """Audio of the first k codebooks."""
        return self.decode_latents(self.dequantize(codes))

    @torch.inference_mode()
    def decode_latents(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of latents, in [-1, 1]."""
        return self.decode_features(self.expand(latents))

    @torch.inference_mode()
    def decode_features(self, features: Float[Tensor, "B T C"]) -> Float[Tensor, "B 1 S"]:
        """Audio of features, as the paper decodes, in [-1, 1]."""
        if features.shape[1] == 0:
            return features.new_zeros(features.shape[0], 1, 0)
        return self.synthesize(features)[0].clamp(-1.0, 1.0).unsqueeze(1)

    def synthesize(
        self, features: Float[Tensor, "B T C"], state: VocosState | None = None
    ) -> tuple[Float[Tensor, "B S"], VocosState | None]:
        """Samples of features, unclipped; the state is the causal decoder's."""
        return self.decoder(self.upsampler(features.transpose(1, 2)).transpose(1, 2), state)

    def streaming_encoder(self, batch_size: int = 1) -> DashengStreamingEncoder:
        """An encoder for `batch_size` recordings that arrive in pieces; it answers once a window of frames."""
        from tokenizer.dasheng_stream import DashengStreamingEncoder

        return DashengStreamingEncoder(self, batch_size)

    def streaming_decoder(
        self, batch_size: int = 1, source: Source | Literal["features"] = "latents"
    ) -> DashengStreamingDecoder:
        """A decoder for `batch_size` recordings whose frames arrive in pieces.

        The centred one holds `decoder_lookahead_frames` back until `flush`.
        """
        from tokenizer.dasheng_stream import DashengStreamingDecoder

        return DashengStreamingDecoder(self, batch_size, source)

    def fingerprint(self) -> str:
        """Hash of the configuration, the encoder, the projection and the codebooks, as they are stored.

        The decoder does not count: with another one, the same frames only sound different.
        """
        without = {"causal", "upsampling", "kernel_size", "synthesis_window"} | (
            {"inject"} if self.config.inject else set()
        )
        settings = {
            name: value
            for name, value in asdict(self.config).items()
            if name not in without and not name.startswith("decoder_")
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            if key.startswith(("encoder.", "compress.", "quantizer.")):
                digest.update(key.encode())
                digest.update(tensor.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (bfloat16)."""
        weights = {key: tensor.bfloat16() for key, tensor in self.state_dict().items()}
        write_folder(Path(folder), {"type": self.name, **asdict(self.config)}, weights)

    @classmethod
    def load(cls, folder: Path) -> DashengTokenizer:
        """Read what `save` wrote, to float32.

        Raises:
            UserError: for an unknown setting, missing or damaged weights, or ones that do not fit the configuration.
        """
        folder = Path(folder)
        settings = {k: v for k, v in read_config(folder).items() if k not in ("type", "format_version")}
        tokenizer = cls(from_mapping(DashengConfig, settings, where=str(folder / "config.json")))
        weights = {key: tensor.float() for key, tensor in read_weights(folder / "model.safetensors").items()}
        try:
            tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{folder}: model.safetensors does not fit config.json: {reason}") from error
        return tokenizer.eval()


def _crop(samples: Float[Tensor, "B S"], count: int) -> Float[Tensor, "B R"]:
    return samples[:, count : samples.shape[1] - count]
