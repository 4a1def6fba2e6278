"""The networks of the autoencoder half of F3-Tokenizer (arXiv 2606.06357): STFT/ConvNeXt, causal, with their state.

Encoder: right-aligned STFT, ConvNeXt blocks at the STFT's rate, a strided projection to the frame rate, ConvNeXt
blocks, a projection to D channels, normalization per time step (or none). Decoder: the mirror image, ending in
magnitudes and phases of overlapping windows as in Vocos (arXiv 2306.00814), each window starting at its own hop, so
that a sample depends on present and past frames alone; beside them, filters on pulses at a predicted pitch and on noise
(`tokenizer.excitation`), which keep a voice periodic across windows.

Shapes: B batch, T frames, H hops (`hops_per_frame` to a frame), D latent, S samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from tokenizer.bottleneck import normalize_channels
from tokenizer.excitation import Excitation, ExcitationState
from tokenizer.layers import ConvNeXtStack
from tokenizer.mel import mel_filterbank
from tokenizer.pitch import GRID_POINTS, pitch_grid, pitch_of
from tokenizer.representation import RepresentationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class F3Config:
    """Shape of the autoencoder."""

    sample_rate_hz: int = 24000
    hop_length: int = 960
    """Samples per frame: 960 at 24 kHz gives 25 Hz."""
    hops_per_frame: int = 4
    """STFT hops per frame: 4 gives 100 Hz."""
    analysis_window: int = 1024
    num_mels: int = 128
    num_phase_bins: int = 128
    """Lowest STFT bins whose real and imaginary parts, root-compressed, the encoder sees beside the log-mel."""
    encoder_dim: int = 256
    encoder_blocks: int = 3
    decoder_dim: int = 320
    decoder_blocks: int = 5
    frame_dim: int = 384
    """Width of the blocks at the frame rate, on both sides."""
    encoder_frame_blocks: int = 3
    decoder_frame_blocks: int = 4
    expansion: int = 3
    kernel_size: int = 7
    synthesis_window: int = 480
    excitation: Literal["none", "pitch"] = "pitch"
    """`pitch`: the decoder also filters pulses at a pitch that it predicts, and noise; `none`: a plain Vocos."""
    latent_dim: int = 64
    normalization: Literal["channels", "none"] = "channels"
    """`channels`: every frame is normalized over its channels, as in F3; `none`: latents as the encoder projects them,
    whose scale is folded into the weights around them when training ends (`F3Tokenizer.standardized`)."""
    num_codebooks: int = 8
    codebook_size: int = 1024
    representation: RepresentationConfig | None = None
    """The encoder that reads the latents and gives features (`tokenizer.representation`)."""
    feature_mels: int = 0
    """Bands of a right-aligned log-mel that is given as features instead: WHISPER-GPT's slices. 0: none."""
    feature_window: int = 2048
    """Its window in samples; it ends with the frame."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < (0 if name in ("num_phase_bins", "feature_mels") else 1):
                raise ValueError(f"{name}={value} must be positive")
        if self.hop_length % self.hops_per_frame:
            raise ValueError(
                f"hops_per_frame={self.hops_per_frame} must divide hop_length={self.hop_length}; use 2, 4 or 8"
            )
        if self.feature_mels and self.representation is not None:
            raise ValueError(f"feature_mels={self.feature_mels} and a representation both give features; choose one")
        hop = self.hop_length // self.hops_per_frame
        if self.synthesis_window % hop or self.synthesis_window < 2 * hop:
            raise ValueError(
                f"synthesis_window={self.synthesis_window} must be a multiple of the STFT hop {hop}, at least {2 * hop}"
            )
        if self.analysis_window < hop:
            raise ValueError(f"analysis_window={self.analysis_window} must be at least the STFT hop {hop}")
        if self.num_phase_bins > self.analysis_window // 2 + 1:
            raise ValueError(
                f"num_phase_bins={self.num_phase_bins} must be at most analysis_window // 2 + 1 = "
                f"{self.analysis_window // 2 + 1}"
            )


class Spectrum(nn.Module):
    """What the encoder sees of a hop: log-mel, and the root-compressed complex spectrum of the lowest bins."""

    window: Tensor
    mel_filters: Tensor

    def __init__(self, config: F3Config) -> None:
        super().__init__()
        self.n_fft, self.hop = config.analysis_window, config.hop_length // config.hops_per_frame
        self.num_phase_bins = config.num_phase_bins
        self.dim = config.num_mels + 2 * config.num_phase_bins
        window = torch.hann_window(self.n_fft)
        self.register_buffer("window", window / window.sum(), persistent=False)
        filters = mel_filterbank(config.sample_rate_hz, self.n_fft, config.num_mels)
        self.register_buffer("mel_filters", filters, persistent=False)

    def forward(self, waveform: Float[Tensor, "B S"], past: Float[Tensor, "B past"]) -> Float[Tensor, "B H F"]:
        """Hop h's window ends at sample (h + 1) * hop of `waveform`; `past` is the n_fft - hop samples before it."""
        windows = torch.cat([past, waveform], dim=1).unfold(1, self.n_fft, self.hop)
        spectrum = torch.fft.rfft(windows * self.window)  # (B, H, n_fft // 2 + 1)
        magnitude = spectrum.abs()
        log_mel = (magnitude @ self.mel_filters).clamp(min=1e-5).log()
        low = torch.view_as_real(spectrum[..., : self.num_phase_bins])  # (B, H, bins, 2)
        compressed = low * (magnitude[..., : self.num_phase_bins, None] + 1e-5).rsqrt()
        # Constants that bring both parts near zero mean and unit scale on speech and music.
        return torch.cat([(log_mel + 7.0) / 2.5, 8.0 * compressed.flatten(-2)], dim=-1)


class EncoderState(NamedTuple):
    samples: Tensor
    hops: list[Tensor]
    frames: list[Tensor]


class Encoder(nn.Module):
    def __init__(self, config: F3Config) -> None:
        super().__init__()
        self.hops_per_frame = config.hops_per_frame
        self.normalization = config.normalization
        self.spectrum = Spectrum(config)
        stack = {"expansion": config.expansion, "kernel_size": config.kernel_size}
        self.embed = nn.Linear(self.spectrum.dim, config.encoder_dim)
        self.hop_blocks = ConvNeXtStack(config.encoder_dim, num_blocks=config.encoder_blocks, **stack)
        self.downsample = nn.Linear(config.encoder_dim * config.hops_per_frame, config.frame_dim)
        self.frame_blocks = ConvNeXtStack(config.frame_dim, num_blocks=config.encoder_frame_blocks, **stack)
        self.project = nn.Linear(config.frame_dim, config.latent_dim)

    def forward(
        self, waveform: Float[Tensor, "B S"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "B T D"], EncoderState]:
        """Whole frames in, latents out."""
        keep = self.spectrum.n_fft - self.spectrum.hop
        if state is None:
            state = EncoderState(waveform.new_zeros(waveform.shape[0], keep), None, None)  # type: ignore[arg-type]
        x = self.embed(self.spectrum(waveform, state.samples))
        x, hops = self.hop_blocks(x, state.hops)
        x = self.downsample(x.reshape(x.shape[0], x.shape[1] // self.hops_per_frame, -1))  # (B, T, frame_dim)
        x, frames = self.frame_blocks(x, state.frames)
        samples = torch.cat([state.samples, waveform], dim=1)
        latents = self.project(x).float()
        if self.normalization == "channels":
            latents = normalize_channels(latents)
        return latents, EncoderState(samples[:, samples.shape[1] - keep :], hops, frames)


class DecoderState(NamedTuple):
    frames: list[Tensor]
    hops: list[Tensor]
    tail: Tensor
    excitation: ExcitationState | None


class Synthesis(NamedTuple):
    """What the decoder makes of latents."""

    waveform: Float[Tensor, "B S"]
    pitch_logits: Float[Tensor, "B H Q"] | None
    """Of every hop, over `tokenizer.pitch.pitch_grid`; None without excitation."""
    state: DecoderState


class Decoder(nn.Module):
    window: Tensor
    pitch_grid: Tensor

    def __init__(self, config: F3Config) -> None:
        super().__init__()
        self.hops_per_frame, self.hop = config.hops_per_frame, config.hop_length // config.hops_per_frame
        self.n_fft = config.synthesis_window
        stack = {"expansion": config.expansion, "kernel_size": config.kernel_size}
        self.embed = nn.Linear(config.latent_dim, config.frame_dim)
        self.frame_blocks = ConvNeXtStack(config.frame_dim, num_blocks=config.decoder_frame_blocks, **stack)
        self.upsample = nn.Linear(config.frame_dim, config.decoder_dim * config.hops_per_frame)
        self.hop_blocks = ConvNeXtStack(config.decoder_dim, num_blocks=config.decoder_blocks, **stack)
        # Hann windows at this hop add up to a constant, which the scale makes one.
        window = torch.hann_window(self.n_fft) * (2.0 * self.hop / self.n_fft)
        self.register_buffer("window", window, persistent=False)
        bins = self.n_fft // 2 + 1
        if config.excitation == "none":
            self.excitation = None
            self.head = nn.Linear(config.decoder_dim, 2 * bins)
            return
        self.excitation = Excitation(config.sample_rate_hz, self.hop, self.n_fft)
        self.register_buffer("pitch_grid", pitch_grid(), persistent=False)
        # Of the pulses' filter magnitude and phase, of the noise's magnitude, and magnitude and phase drawn freely.
        self.head = nn.Linear(config.decoder_dim, 5 * bins)
        self.pitch_head = nn.Linear(config.decoder_dim, GRID_POINTS)
        with torch.no_grad():
            self.head.weight.mul_(0.3)

    def forward(
        self, latents: Float[Tensor, "B T D"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "B S"], DecoderState]:
        waveform, _, state = self.synthesize(latents, state)
        return waveform, state

    def synthesize(self, latents: Float[Tensor, "B T D"], state: DecoderState | None = None) -> Synthesis:
        """All samples of the given frames."""
        x, frames = self.frame_blocks(self.embed(latents), state.frames if state else None)
        x = self.upsample(x)
        x = x.reshape(x.shape[0], x.shape[1] * self.hops_per_frame, -1)  # (B, H, decoder_dim)
        x, hops = self.hop_blocks(x, state.hops if state else None)
        pitch_logits, excitation = None, None
        if self.excitation is None:
            free = self.head(x).float().chunk(2, dim=-1)
            windows = x.new_zeros((), dtype=torch.float32)
        else:
            pitch_logits = self.pitch_head(x)
            pulses, noise, excitation = self.excitation(
                pitch_of(pitch_logits, self.pitch_grid), state.excitation if state else None
            )
            colour, turn, hiss, *free = self.head(x).float().chunk(5, dim=-1)
            # The offsets let an untrained decoder start about as loud as speech.
            spectrum = _polar(colour - 3.0, turn) * pulses + (hiss - 4.0).clamp(max=6.0).exp() * noise
            windows = torch.fft.irfft(spectrum, n=self.n_fft) * self.excitation.window
        windows = windows + torch.fft.irfft(_polar(*free), n=self.n_fft) * self.window
        tail = state.tail if state else windows.new_zeros(x.shape[0], self.n_fft - self.hop)
        waveform, tail = self._overlap_add(windows, tail)
        return Synthesis(waveform, pitch_logits, DecoderState(frames, hops, tail, excitation))

    def _overlap_add(
        self, windows: Float[Tensor, "B H W"], tail: Float[Tensor, "B rest"]
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B rest"]]:
        """Add window h at sample h * hop; what reaches past the last hop is the next call's tail."""
        batch, num_hops, width = windows.shape
        length = num_hops * self.hop + width - self.hop
        if num_hops == 0:
            return windows.new_zeros(batch, 0), tail
        summed = F.fold(
            windows.transpose(1, 2), output_size=(1, length), kernel_size=(1, width), stride=(1, self.hop)
        ).reshape(batch, length)
        summed = summed + F.pad(tail, (0, length - tail.shape[1]))
        return summed[:, : num_hops * self.hop], summed[:, num_hops * self.hop :]


def _polar(log_magnitude: Float[Tensor, "*N F"], phase: Float[Tensor, "*N F"]) -> Complex[Tensor, "*N F"]:
    return torch.polar(log_magnitude.clamp(max=6.0).exp(), phase)
