"""F3-Tokenizer (arXiv 2606.06357): a causal codec with noise-regularized latents, and features read from them.

The networks stand in `tokenizer.f3_network`. Residual quantization over the normalized latent gives the codes; a
representation encoder, where there is one, reads the latents and changes nothing about them.

Shapes: B batch, T frames, K codebooks, D latent, F feature, S samples.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.errors import UserError
from tokenizer.f3_network import Decoder, DecoderState, Encoder, EncoderState, F3Config
from tokenizer.frames import AudioFrames, Source, WholeFrames
from tokenizer.loading import read_config, read_weights, write_folder
from tokenizer.mel import CausalLogMel, LogMelStream
from tokenizer.quantizer import ResidualQuantizer
from tokenizer.representation import RepresentationEncoder
from tokenizer.settings import from_mapping
from tokenizer.transformer import TransformerState


class F3Tokenizer(nn.Module):
    """Waveforms to 64-d latents and residual codes at 25 Hz, and back; causal both ways, no look-ahead.

    A frame's latent depends on samples up to the frame's end, a frame's samples on latents up to that frame.
    """

    name = "f3"
    lookahead_frames = 0

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
        self.representation = self.mel = None
        if config.representation is not None:
            self.representation = RepresentationEncoder(config.latent_dim, config.representation)
        if config.feature_mels:
            self.mel = CausalLogMel(
                config.sample_rate_hz, config.feature_window, config.hop_length, config.feature_mels
            )
        self.feature_dim = config.representation.feature_dim if config.representation else config.feature_mels

    @torch.inference_mode()
    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode a batch; `lengths` in samples. The last frame is padded with silence.

        Rows are silenced past their lengths; causality makes what follows their last frame harmless.
        """
        batch, _, samples = waveform.shape
        if lengths is None:
            lengths = torch.full((batch,), samples, device=waveform.device)
        padded = F.pad(waveform[:, 0], (0, -samples % self.hop_length))
        padded = padded * (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])
        latents = padded.new_zeros(batch, 0, self.latent_dim) if samples == 0 else self.encoder(padded)[0]
        frames = (lengths + self.hop_length - 1) // self.hop_length
        features = None
        if self.representation is not None:
            empty = latents.new_zeros(batch, 0, self.feature_dim)
            features = empty if samples == 0 else self.representation.features(latents)
        elif self.mel is not None:
            features = self.mel(padded.unsqueeze(1))
        return AudioFrames(codes=self.quantize(latents), latents=latents, lengths=frames, features=features)

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
        if latents.shape[1] == 0:
            return latents.new_zeros(latents.shape[0], 1, 0)
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
        without = {"excitation"} | ({"representation"} if self.representation is None else set())
        without |= {"normalization"} if self.config.normalization == "channels" else set()
        without |= {"feature_mels", "feature_window"} if self.mel is None else set()
        settings = {name: value for name, value in asdict(self.config).items() if name not in without}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            if key.startswith("decoder."):
                continue
            digest.update(key.encode())
            digest.update(tensor.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def standardized(self, mean: Float[Tensor, " D"], scale: float) -> F3Tokenizer:
        """A copy that sounds the same and has the same codes, whose latents are (z - mean) / scale.

        Both are folded into the weights before and after the latents and into the codebooks.

        Args:
            mean: Of each channel.
            scale: Of all channels together, above 0: with one a channel, other codes would be the nearest.

        Raises:
            ValueError: latents that are normalized have their scale already, and features hang on the latents' own.
        """
        if self.config.normalization != "none" or self.representation is not None:
            raise ValueError(
                f"normalization={self.config.normalization} and representation={self.config.representation} must both "
                "be none for latents to get another scale"
            )
        found = copy.deepcopy(self)
        project, embed, quantizer = found.encoder.project, found.decoder.embed, found.quantizer
        project.weight.div_(scale)
        project.bias.sub_(mean).div_(scale)
        embed.bias.add_(embed.weight @ mean)
        embed.weight.mul_(scale)
        quantizer.codebooks[0].sub_(mean)
        quantizer.codebooks.div_(scale)
        quantizer.sums.copy_(quantizer.codebooks * quantizer.counts[..., None])
        return found

    def with_representation(self, encoder: RepresentationEncoder) -> F3Tokenizer:
        """A tokenizer of the same autoencoder that also gives this encoder's features; nothing is copied."""
        found = self.without_representation()
        found.config = dataclasses.replace(found.config, representation=encoder.config)
        found.representation, found.feature_dim = encoder, encoder.config.feature_dim
        return found

    def with_log_mel(self, num_mels: int = 80, window: int = 2048) -> F3Tokenizer:
        """A tokenizer of the same autoencoder whose features are a log-mel (`CausalLogMel`); nothing is copied."""
        return self._alone(
            dataclasses.replace(self.config, representation=None, feature_mels=num_mels, feature_window=window)
        )

    def without_representation(self) -> F3Tokenizer:
        """A tokenizer of the same autoencoder alone; nothing is copied."""
        return self._alone(dataclasses.replace(self.config, representation=None, feature_mels=0))

    def _alone(self, config: F3Config) -> F3Tokenizer:
        found = F3Tokenizer(config)
        found.encoder, found.decoder, found.quantizer = self.encoder, self.decoder, self.quantizer
        return found.train(self.training)

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
        self._samples = WholeFrames(tokenizer.hop_length, batch_size, device)
        self._state: EncoderState | None = None
        self._heard: TransformerState | None = None
        self._mels = None if tokenizer.mel is None else LogMelStream(tokenizer.mel, batch_size)

    @torch.inference_mode()
    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Frames that became complete."""
        return self._encode(self._samples.push(waveform)[:, 0])

    @torch.inference_mode()
    def flush(self) -> AudioFrames:
        """The last frame, padded with silence."""
        frames = self._encode(self._samples.flush()[:, 0])
        self._state = self._heard = None
        if self.tokenizer.mel is not None:
            self._mels = LogMelStream(self.tokenizer.mel, frames.latents.shape[0])
        return frames

    def _encode(self, waveform: Float[Tensor, "B S"]) -> AudioFrames:
        batch = waveform.shape[0]
        if waveform.shape[1] == 0:
            latents = waveform.new_zeros(batch, 0, self.tokenizer.latent_dim)
            codes = torch.zeros(batch, self.tokenizer.num_codebooks, 0, dtype=torch.long, device=waveform.device)
        else:
            latents, self._state = self.tokenizer.encoder(waveform, self._state)
            codes = self.tokenizer.quantize(latents)
        features = None
        if self.tokenizer.representation is not None:
            features = latents.new_zeros(batch, 0, self.tokenizer.feature_dim)
            if latents.shape[1]:
                features, self._heard = self.tokenizer.representation(latents, self._heard)
        elif self._mels is not None:
            self._mels.push(waveform.unsqueeze(1))
            features = self._mels.take(latents.shape[1])
        lengths = torch.full((batch,), latents.shape[1], device=waveform.device)
        return AudioFrames(codes=codes, latents=latents, lengths=lengths, features=features)


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
        self._state = None
        device = next(self.tokenizer.parameters()).device
        return torch.zeros(self.batch_size, 1, 0, device=device)
