"""The autoencoder half of F3-Tokenizer (arXiv 2606.06357): a causal STFT/ConvNeXt codec, noise-regularized latents.

Encoder: right-aligned STFT, ConvNeXt blocks at the STFT's rate, a strided projection to the frame rate, ConvNeXt
blocks, a projection to D channels, normalization per time step. Decoder: the mirror image, ending in magnitudes and
phases of overlapping windows as in Vocos (arXiv 2306.00814), each window starting at its own hop, so that a sample
depends on present and past frames alone; beside them, filters on pulses at a predicted pitch and on noise
(`tokenizer.excitation`), which keep a voice periodic across windows. Residual quantization over the normalized latent
gives the codes.

Shapes: B batch, T frames, H hops (`hops_per_frame` to a frame), K codebooks, D latent, S samples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from tokenizer.bottleneck import normalize_channels
from tokenizer.errors import UserError
from tokenizer.excitation import Excitation, ExcitationState
from tokenizer.frames import AudioFrames, Source
from tokenizer.layers import ConvNeXtStack
from tokenizer.loading import read_config, read_weights, write_folder
from tokenizer.mel import mel_filterbank
from tokenizer.pitch import GRID_POINTS, pitch_grid, pitch_of
from tokenizer.quantizer import ResidualQuantizer
from tokenizer.settings import from_mapping


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
    num_codebooks: int = 8
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < (0 if name == "num_phase_bins" else 1):
                raise ValueError(f"{name}={value} must be positive")
        if self.hop_length % self.hops_per_frame:
            raise ValueError(
                f"hops_per_frame={self.hops_per_frame} must divide hop_length={self.hop_length}; use 2, 4 or 8"
            )
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
        """Whole frames in, normalized latents out."""
        keep = self.spectrum.n_fft - self.spectrum.hop
        if state is None:
            state = EncoderState(waveform.new_zeros(waveform.shape[0], keep), None, None)  # type: ignore[arg-type]
        x = self.embed(self.spectrum(waveform, state.samples))
        x, hops = self.hop_blocks(x, state.hops)
        x = self.downsample(x.reshape(x.shape[0], x.shape[1] // self.hops_per_frame, -1))  # (B, T, frame_dim)
        x, frames = self.frame_blocks(x, state.frames)
        samples = torch.cat([state.samples, waveform], dim=1)
        return normalize_channels(self.project(x)), EncoderState(samples[:, samples.shape[1] - keep :], hops, frames)


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


class F3Tokenizer(nn.Module):
    """Waveforms to 64-d latents and residual codes at 25 Hz, and back; causal both ways, no look-ahead.

    A frame's latent depends on samples up to the frame's end, a frame's samples on latents up to that frame.
    """

    name = "f3"
    lookahead_frames = 0
    feature_dim = 0

    def __init__(self, config: F3Config) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = config.sample_rate_hz
        self.hop_length = config.hop_length
        self.frame_rate_hz = config.sample_rate_hz / config.hop_length
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.latent_dim = config.latent_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = ResidualQuantizer(
            num_codebooks=config.num_codebooks, codebook_size=config.codebook_size, dim=config.latent_dim
        )

    @torch.inference_mode()
    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode a batch; `lengths` in samples. The last frame is padded with silence.

        Causality makes the padding of shorter rows harmless: no valid frame sees it.
        """
        batch, _, samples = waveform.shape
        if lengths is None:
            lengths = torch.full((batch,), samples, device=waveform.device)
        padded = F.pad(waveform[:, 0], (0, -samples % self.hop_length))
        latents, _ = self.encoder(padded)
        frames = (lengths + self.hop_length - 1) // self.hop_length
        return AudioFrames(codes=self.quantize(latents), latents=latents, lengths=frames)

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
        return self.decoder(latents)[0].clamp(-1.0, 1.0).unsqueeze(1)

    def streaming_encoder(self, batch_size: int = 1) -> F3StreamingEncoder:
        """An encoder for `batch_size` recordings that arrive in pieces."""
        return F3StreamingEncoder(self, batch_size)

    def streaming_decoder(self, batch_size: int = 1, source: Source = "latents") -> F3StreamingDecoder:
        """A decoder for `batch_size` recordings whose frames arrive in pieces."""
        return F3StreamingDecoder(self, batch_size, source)

    def fingerprint(self) -> str:
        """Hash of the configuration, the encoder and the codebooks, as they are stored.

        The decoder does not count: with another one, the same frames only sound different.
        """
        settings = {name: value for name, value in asdict(self.config).items() if name != "excitation"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            if key.startswith("decoder."):
                continue
            digest.update(key.encode())
            digest.update(tensor.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (bfloat16)."""
        weights = {key: tensor.bfloat16() for key, tensor in self.state_dict().items()}
        write_folder(Path(folder), {"type": self.name, **asdict(self.config)}, weights)

    @classmethod
    def load(cls, folder: Path) -> F3Tokenizer:
        """Read what `save` wrote, to float32.

        Raises:
            UserError: for an unknown setting, missing or damaged weights, or ones that do not fit the configuration.
        """
        folder = Path(folder)
        settings = {k: v for k, v in read_config(folder).items() if k not in ("type", "format_version")}
        settings.setdefault("excitation", "none")  # folders from before there was any
        tokenizer = cls(from_mapping(F3Config, settings, where=str(folder / "config.json")))
        weights = {key: tensor.float() for key, tensor in read_weights(folder / "model.safetensors").items()}
        try:
            tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{folder}: model.safetensors does not fit config.json: {reason}") from error
        return tokenizer.eval()


class F3StreamingEncoder:
    """See `tokenizer.frames.StreamingEncoder`."""

    def __init__(self, tokenizer: F3Tokenizer, batch_size: int) -> None:
        self.tokenizer = tokenizer
        device = next(tokenizer.parameters()).device
        self._pending = torch.zeros(batch_size, 0, device=device)
        self._state: EncoderState | None = None

    @torch.inference_mode()
    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Frames that became complete."""
        pending = torch.cat([self._pending, waveform[:, 0]], dim=1)
        whole = pending.shape[1] // self.tokenizer.hop_length * self.tokenizer.hop_length
        self._pending = pending[:, whole:]
        return self._encode(pending[:, :whole])

    @torch.inference_mode()
    def flush(self) -> AudioFrames:
        """The last frame, padded with silence."""
        pending, self._pending = self._pending, self._pending[:, :0]
        return self._encode(F.pad(pending, (0, -pending.shape[1] % self.tokenizer.hop_length)))

    def _encode(self, waveform: Float[Tensor, "B S"]) -> AudioFrames:
        batch = waveform.shape[0]
        if waveform.shape[1] == 0:
            latents = waveform.new_zeros(batch, 0, self.tokenizer.latent_dim)
            codes = torch.zeros(batch, self.tokenizer.num_codebooks, 0, dtype=torch.long, device=waveform.device)
        else:
            latents, self._state = self.tokenizer.encoder(waveform, self._state)
            codes = self.tokenizer.quantize(latents)
        lengths = torch.full((batch,), latents.shape[1], device=waveform.device)
        return AudioFrames(codes=codes, latents=latents, lengths=lengths)


class F3StreamingDecoder:
    """See `tokenizer.frames.StreamingDecoder`."""

    def __init__(self, tokenizer: F3Tokenizer, batch_size: int, source: Source) -> None:
        self.tokenizer, self.batch_size, self.source = tokenizer, batch_size, source
        self._state: DecoderState | None = None

    @torch.inference_mode()
    def push(self, frames: Tensor) -> Float[Tensor, "B 1 S"]:
        """All samples of the pushed frames: the decoder holds nothing back."""
        latents = self.tokenizer.dequantize(frames) if self.source == "codes" else frames
        if latents.shape[1] == 0:
            return latents.new_zeros(latents.shape[0], 1, 0)
        waveform, self._state = self.tokenizer.decoder(latents, self._state)
        return waveform.clamp(-1.0, 1.0).unsqueeze(1)

    @torch.inference_mode()
    def flush(self) -> Float[Tensor, "B 1 S"]:
        """Nothing: see `push`."""
        device = next(self.tokenizer.parameters()).device
        return torch.zeros(self.batch_size, 1, 0, device=device)
