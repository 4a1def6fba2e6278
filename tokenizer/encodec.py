"""EnCodec (arXiv 2210.13438) at 24 kHz, the `encodec` package's causal model, as a tokenizer at 75 Hz.

Codes are its residual quantizer's, latents the encoder's output before it, features a right-aligned log-mel. Everything
runs through the streaming form of the network (`encodec_stream`), in blocks, so memory does not grow with the length.

Look-ahead. The package pads every convolution's left edge by reflection. At the start of a recording that makes frames
0, 1 and 2 depend on samples of frames up to 6, and the first decoded samples on frames up to 6; frame t >= 3 depends on
nothing after it. Two starts are offered:

- `start="reflect"` is the package itself: `lookahead_frames` is 6, and a streaming decoder's first samples come with
  the seventh frame.
- `start="silence"` runs both networks over eight frames of silence first and drops them: what the package gives for the
  recording with that silence before it. Then nothing looks ahead, and each frame decodes at once.

Shapes: B batch, T frames, K codebooks, D latent, F mel bands, S samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.encodec_stream import stream_seanet
from tokenizer.encodec_weights import find_checkpoint, read_checkpoint
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, WholeFrames, join_frames
from tokenizer.loading import WEIGHTS_FILE, read_config, read_weights, write_folder
from tokenizer.mel import CausalLogMel, LogMelStream
from tokenizer.settings import from_mapping
from tokenizer.streaming import Chain

REFLECTED_FRAMES = 6
"""Frames that the reflection at the left edge of the convolutions at the frame rate reaches ahead."""
SILENT_FRAMES = 8
"""Frames of silence before a recording with `start="silence"`: enough that the reflection sees nothing else."""
BLOCK_FRAMES = 300
"""Frames (summed over the batch) that are computed at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodecConfig:
    """How EnCodec's 24 kHz model is used; the network itself is fixed."""

    num_codebooks: int = 8
    """The first K of 32; each is 0.75 kbit/s, so 8 are 6 kbit/s."""
    num_mels: int = 80
    """Bands of the log-mel features."""
    n_fft: int = 1024
    """Window of the log-mel features in samples."""
    start: Literal["reflect", "silence"] = "reflect"
    """What precedes a recording: the package's reflection (looks six frames ahead), or silence (causal)."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_codebooks <= 32:
            raise ValueError(f"num_codebooks={self.num_codebooks} must be from 1 to 32, EnCodec's number at 24 kbit/s")
        if self.n_fft < 320:
            raise ValueError(f"n_fft={self.n_fft} must be at least 320, the samples of a frame; use 1024")
        if self.num_mels < 1:
            raise ValueError(f"num_mels={self.num_mels} must be at least 1; use 80")


class EncodecTokenizer(nn.Module):
    """Waveforms to 128-d latents, 1024-way residual codes and log-mel features at 75 Hz, and back.

    Build one with `pretrained`, `load` or `random`.
    """

    name = "encodec"
    sample_rate_hz = 24000
    hop_length = 320
    frame_rate_hz = 75.0
    codebook_size = 1024
    latent_dim = 128

    def __init__(self, config: EncodecConfig, weights: Mapping[str, Tensor]) -> None:
        """See the class methods.

        Args:
            config: How to use the model.
            weights: Under the package's names with weight normalization folded; further codebooks are left out.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        super().__init__()
        self.config = config
        self.num_codebooks = config.num_codebooks
        self.feature_dim = config.num_mels
        self.lookahead_frames = REFLECTED_FRAMES if config.start == "reflect" else 0
        self.mel = CausalLogMel(self.sample_rate_hz, config.n_fft, self.hop_length, config.num_mels)
        self.encoder, self.quantizer, self.decoder = _networks(config.num_codebooks)
        self._take(weights)
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(cls, config: EncodecConfig | None = None, repository: Path | None = None) -> EncodecTokenizer:
        """The published weights; see `encodec_weights.find_checkpoint` for where they are looked for.

        Args:
            config: How to use the model.
            repository: The checkpoint (`.th` or `.safetensors`) or a folder that holds it.
        """
        return cls(config or EncodecConfig(), read_checkpoint(find_checkpoint(repository)))

    @classmethod
    def random(cls, config: EncodecConfig | None = None, seed: int = 0) -> EncodecTokenizer:
        """Random weights of a scale that keeps signals alive through all layers: for tests and for measuring speed."""
        config = config or EncodecConfig()
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for part, network in zip(("encoder", "quantizer", "decoder"), _networks(config.num_codebooks), strict=True):
            for key, tensor in network.state_dict().items():
                fan_in = tensor.shape[1:].numel() if tensor.dim() > 1 else 1
                std = {1: 0.02, 2: fan_in**-0.5}.get(tensor.dim(), 1.2 * fan_in**-0.5)
                if key.endswith("embed"):
                    std = 0.5 * 0.8 ** int(key.split(".")[2])
                weights[f"{part}.{key}"] = std * torch.randn(tensor.shape, generator=generator)
        return cls(config, weights)

    @classmethod
    def load(cls, folder: Path) -> EncodecTokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: the folder is not one of an EnCodec tokenizer, or its files are broken.
        """
        folder = Path(folder)
        settings = read_config(folder)
        if settings["type"] != cls.name:
            raise UserError(f"{folder} holds a tokenizer of type '{settings['type']}', not '{cls.name}'")
        own = {key: value for key, value in settings.items() if key not in ("type", "format_version")}
        config = from_mapping(EncodecConfig, own, where=str(folder / "config.json"))
        return cls(config, read_weights(folder / WEIGHTS_FILE))

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        write_folder(Path(folder), {"type": self.name, **asdict(self.config)}, self._weights())

    def fingerprint(self) -> str:
        """Sixteen hex digits of the settings and the weights."""
        digest = hashlib.sha256(json.dumps({"type": self.name, **asdict(self.config)}, sort_keys=True).encode())
        for key, tensor in sorted(self._weights().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode; the last frame is padded with silence, T = ceil(S / 320).

        Rows are silenced past their lengths. A padded row's valid frames are those of the row alone: no frame sees more
        than `lookahead_frames` ahead, and recordings shorter than that are always continued with silence. (There the
        package differs: below seven frames it continues the network's inner layers with zeros instead.)

        Args:
            waveform: Samples, usually in [-1, 1].
            lengths: Samples per row, at most S.

        Raises:
            ValueError: the waveform is not (B, 1, S).
        """
        if waveform.dim() != 3 or waveform.shape[1] != 1:
            raise ValueError(f"waveform has shape {tuple(waveform.shape)}, but must be (B, 1, S); average the channels")
        batch, _, samples = waveform.shape
        waveform = waveform.to(self._device(), torch.float32)
        if lengths is None:
            lengths = torch.full((batch,), samples)
        lengths = lengths.to(waveform.device)
        if batch > 1:
            waveform = waveform * (torch.arange(samples, device=waveform.device) < lengths[:, None, None])
        stream = self.streaming_encoder(batch)
        pieces = [stream.push(piece) for piece in _blocks(waveform, self.hop_length * self._block(batch))]
        frames = join_frames([*pieces, stream.flush()])
        return replace(frames, lengths=(lengths + self.hop_length - 1) // self.hop_length)

    def quantize(self, latents: Float[Tensor, "B T D"]) -> Int[Tensor, "B K T"]:
        """Codes of latents: the nearest entry of each codebook to what the codebooks before it leave over."""
        batch, steps, _ = latents.shape
        if batch * steps == 0:
            return torch.zeros(batch, self.num_codebooks, steps, dtype=torch.long, device=latents.device)
        pieces = [self.quantizer.vq.encode(x) for x in _blocks(latents.transpose(1, 2), 4 * self._block(batch))]
        return torch.cat(pieces, dim=2).transpose(0, 1)  # (K, B, T) -> (B, K, T)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B T D"]:
        """Latents of the first k codebooks: the sum of their entries.

        Raises:
            ValueError: there are more codebooks than the tokenizer has, or none.
        """
        if not 1 <= codes.shape[1] <= self.num_codebooks:
            raise ValueError(f"codes have {codes.shape[1]} codebooks, but the tokenizer has 1 to {self.num_codebooks}")
        return self.quantizer.vq.decode(codes.transpose(0, 1)).transpose(1, 2)

    def decode_codes(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B 1 S"]:
        """Audio of the first k codebooks, S = 320 T."""
        return self._decode(codes, 2, "codes")

    def decode_latents(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of latents, quantized or not, S = 320 T."""
        return self._decode(latents, 1, "latents")

    def streaming_encoder(self, batch_size: int = 1) -> EncodecStreamingEncoder:
        """An encoder for `batch_size` recordings of one length that arrive in pieces."""
        return EncodecStreamingEncoder(self, batch_size)

    def streaming_decoder(self, batch_size: int = 1, source: Source = "latents") -> EncodecStreamingDecoder:
        """A decoder for frames that arrive in pieces."""
        return EncodecStreamingDecoder(self, batch_size, source)

    def silence(self, batch_size: int = 1) -> Float[Tensor, "B T D"]:
        """Latents of the `SILENT_FRAMES` frames of silence that `start="silence"` puts first."""
        zeros = torch.zeros(1, 1, SILENT_FRAMES * self.hop_length, device=self._device())
        return stream_seanet(self.encoder)(zeros, False).transpose(1, 2).expand(batch_size, -1, -1)

    def _decode(self, frames: Tensor, time: int, source: Source) -> Tensor:
        stream = self.streaming_decoder(frames.shape[0], source)
        frames = frames.to(self._device())
        pieces = [stream.push(piece) for piece in frames.split(self._block(frames.shape[0]), dim=time)]
        return torch.cat([*pieces, stream.flush()], dim=-1)

    def _block(self, batch: int) -> int:
        return max(REFLECTED_FRAMES + 1, BLOCK_FRAMES // max(batch, 1))

    def _device(self) -> torch.device:
        return self.mel.window.device

    def _weights(self) -> dict[str, Tensor]:
        # The statistics that the quantizer's training keeps (cluster sizes, moving averages) are no part of the codec.
        unused = ("inited", "cluster_size", "embed_avg")
        return {key: tensor for key, tensor in self.state_dict().items() if not key.endswith(unused)}

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        own = self._weights()
        for key, tensor in own.items():
            if key not in weights:
                raise UserError(f"EnCodec weights lack '{key}'; they are not those of the 24 kHz model, or cut short")
            if weights[key].shape != tensor.shape:
                raise UserError(
                    f"EnCodec weights: '{key}' has shape {tuple(weights[key].shape)}, but must have "
                    f"{tuple(tensor.shape)}; use the weights of the 24 kHz model"
                )
        self.load_state_dict({key: weights[key] for key in own}, strict=False)


class EncodecStreamingEncoder:
    """See `tokenizer.frames.StreamingEncoder`; a flush ends the recording and the next push starts another."""

    def __init__(self, tokenizer: EncodecTokenizer, batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._reset()

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Frames that became final; with `start="reflect"` the first seven come together."""
        return self._advance(self._samples.push(waveform), last=False)

    def flush(self) -> AudioFrames:
        """The frames held back, the last one padded with silence."""
        hop = self.tokenizer.hop_length
        partial = self._samples.flush()
        total = self._frames_in + partial.shape[-1] // hop
        shortest = REFLECTED_FRAMES + 1 if self.tokenizer.config.start == "reflect" and total > 0 else 0
        frames = self._advance(F.pad(partial, (0, max(0, shortest - total) * hop)), last=True, keep=total)
        self._reset()
        return frames

    def _reset(self) -> None:
        tokenizer = self.tokenizer
        device = tokenizer.mel.window.device
        self._network = stream_seanet(tokenizer.encoder)
        self._samples = WholeFrames(tokenizer.hop_length, self.batch_size, device)
        self._features = LogMelStream(tokenizer.mel, self.batch_size)
        self._frames_in = self._frames_out = 0
        if tokenizer.config.start == "silence":
            silence = torch.zeros(self.batch_size, 1, SILENT_FRAMES * tokenizer.hop_length, device=device)
            self._network(silence, False)

    def _advance(self, waveform: Tensor, *, last: bool, keep: int | None = None) -> AudioFrames:
        self._frames_in += waveform.shape[-1] // self.tokenizer.hop_length
        latents = self._network(waveform, last).transpose(1, 2)
        self._features.push(waveform)
        count = latents.shape[1] if keep is None else keep - self._frames_out
        self._frames_out += count
        latents = latents[:, :count]
        return AudioFrames(
            codes=self.tokenizer.quantize(latents),
            latents=latents,
            features=self._features.take(count),
            lengths=torch.full((latents.shape[0],), count, device=latents.device),
        )


class EncodecStreamingDecoder:
    """See `tokenizer.frames.StreamingDecoder`; a flush ends the recording and the next push starts another."""

    def __init__(self, tokenizer: EncodecTokenizer, batch_size: int, source: Source) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.source = source
        self._network: Chain | None = None

    def push(self, frames: Tensor) -> Float[Tensor, "B 1 S"]:
        """Samples that became final: all of the frames' own once the start is over (at once with `start="silence"`)."""
        tokenizer = self.tokenizer
        frames = frames.to(tokenizer.mel.window.device)
        if self._network is None:
            self._network = self._start(frames)
        latents = tokenizer.dequantize(frames) if self.source == "codes" else frames
        return self._network(latents.transpose(1, 2), False)

    def flush(self) -> Float[Tensor, "B 1 S"]:
        """What a recording of fewer than seven frames still held back."""
        device = self.tokenizer.mel.window.device
        if self._network is None:
            return torch.zeros(self.batch_size, 1, 0, device=device)
        rest = self._network(torch.zeros(self.batch_size, self.tokenizer.latent_dim, 0, device=device), True)
        self._network = None
        return rest

    def _start(self, frames: Tensor) -> Chain:
        network = stream_seanet(self.tokenizer.decoder)
        if self.tokenizer.config.start == "silence":
            silence = self.tokenizer.silence(frames.shape[0])
            if self.source == "codes":
                silence = self.tokenizer.dequantize(self.tokenizer.quantize(silence)[:, : frames.shape[1]])
            network(silence.transpose(1, 2), False)
        return network


def _blocks(x: Tensor, size: int) -> Iterator[Tensor]:
    yield from x.split(size, dim=-1)


def _networks(num_codebooks: int) -> tuple[SEANetEncoder, ResidualVectorQuantizer, SEANetDecoder]:
    """EnCodec's 24 kHz encoder, quantizer and decoder, without the weight normalization that only training needs."""
    with torch.random.fork_rng(devices=[]):  # initializing draws from the global generator
        encoder = SEANetEncoder(norm="none", causal=True)
        decoder = SEANetDecoder(norm="none", causal=True)
        quantizer = ResidualVectorQuantizer(dimension=128, n_q=num_codebooks, bins=1024)
    return encoder, quantizer, decoder
