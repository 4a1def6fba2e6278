"""Published codecs of `transformers` as tokenizers: EnCodec at 24 and 48 kHz, Mimi, and the Descript Audio Codec.

Codes are the codec's own, latents what its encoder gives to the quantizer and its decoder takes, features a
right-aligned log-mel. Everything runs through the streaming form of the networks (`streaming`), in blocks, so memory
does not grow with the length. On whole frames the results are those of the library; a last partial frame is first
filled up with silence, where the library's EnCodec and Mimi pad layer by layer.

How far a frame looks ahead is computed from the layers: EnCodec six frames (its left edges are reflected, so only
frames near the start do), Mimi none, DAC eight frames everywhere, EnCodec at 48 kHz to the end of a frame's second
(`huggingface_encodec_chunks`, which also tells where the loudness of a second is kept). A DAC whose hop has an odd
factor (16 and 24 kHz) decodes to a few samples less than its frames span; silence makes up for them.

Shapes: B batch, T frames, K codebooks, D latent, F mel bands, S samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, WholeFrames, join_frames
from tokenizer.huggingface_codec import HuggingFaceConfig, build_codec, check_type
from tokenizer.huggingface_weights import find_folder, own_weights, read_published, take_weights
from tokenizer.loading import CONFIG_FILE, WEIGHTS_FILE, read_config, read_json, read_weights, write_folder
from tokenizer.mel import CausalLogMel, LogMelStream
from tokenizer.settings import from_mapping
from tokenizer.streaming import lookahead

BLOCK_SAMPLES = 96_000
"""Samples (summed over the batch) that are computed at once."""


class HuggingFaceTokenizer(nn.Module):
    """A codec of `transformers` behind the `Tokenizer` protocol. Build one with `pretrained` or `load`."""

    name = "hf"

    def __init__(self, config: HuggingFaceConfig, weights: Mapping[str, Tensor], where: str = "weights") -> None:
        """See the class methods.

        Args:
            config: Which codec, and how to use it.
            weights: By published name, weight normalization folded; further codebooks are left out.
            where: How to call the weights in messages.

        Raises:
            UserError: an unsupported codec or configuration, or a tensor is missing or has another shape.
        """
        super().__init__()
        self.codec, fields, self._rename = build_codec(config)
        self.model: nn.Module = self.codec.model
        take_weights(self.model, weights, self._rename, where)
        codec = self.codec
        self.sample_rate_hz, self.hop_length = codec.sample_rate_hz, codec.hop_length
        self.frame_rate_hz = codec.sample_rate_hz / codec.hop_length
        self.num_codebooks, self.codebook_size = codec.num_codebooks, codec.codebook_size
        self.latent_dim, self.feature_dim = codec.latent_dim, config.num_mels
        self.lookahead_frames = lookahead(codec.encoder(), codec.hop_length)
        n_fft = config.n_fft or max(1024, 1 << (codec.hop_length - 1).bit_length())
        if n_fft < codec.hop_length:
            raise UserError(f"n_fft={n_fft} must be at least {codec.hop_length}, the samples of a frame; leave it out")
        try:
            self.mel = CausalLogMel(codec.sample_rate_hz, n_fft, codec.hop_length, config.num_mels)
        except ValueError as error:
            raise UserError(str(error)) from error
        own = {"model_type": config.codec["model_type"], **fields}
        self.config = replace(config, codec=own, num_codebooks=codec.num_codebooks, n_fft=n_fft)
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(cls, name: str, *, num_codebooks: int | None = None) -> HuggingFaceTokenizer:
        """A codec as `transformers` publishes it.

        Args:
            name: A hub id such as `kyutai/mimi`, or a folder with `config.json` and `model.safetensors`; a leading
                `hf:` is dropped.
            num_codebooks: Only the first K; None for all.

        Raises:
            UserError: it can't be had, is of an unsupported kind, or its files are broken.
        """
        name = name.removeprefix("hf:")
        folder = find_folder(name)
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"tokenizer 'hf:{name}': {folder} has no {CONFIG_FILE}; give the folder that holds it")
        codec = read_json(folder / CONFIG_FILE)
        if codec.get("type") == cls.name and num_codebooks is None:
            return cls.load(folder)
        config = HuggingFaceConfig(codec=codec, num_codebooks=num_codebooks)
        check_type(codec, str(folder / CONFIG_FILE))
        return cls._build(config, read_published(folder), folder)

    @classmethod
    def load(cls, folder: Path) -> HuggingFaceTokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: the folder is not one of such a tokenizer, or its files are broken.
        """
        folder = Path(folder)
        settings = read_config(folder)
        if settings["type"] != cls.name:
            raise UserError(f"{folder} holds a tokenizer of type '{settings['type']}', not '{cls.name}'")
        own = {key: value for key, value in settings.items() if key not in ("type", "format_version")}
        config = from_mapping(HuggingFaceConfig, own, where=str(folder / CONFIG_FILE))
        check_type(config.codec, f"{folder / CONFIG_FILE}: codec")
        return cls._build(config, read_weights(folder / WEIGHTS_FILE), folder)

    @classmethod
    def _build(cls, config: HuggingFaceConfig, weights: Mapping[str, Tensor], folder: Path) -> HuggingFaceTokenizer:
        try:
            return cls(config, weights, f"weights {folder / WEIGHTS_FILE}")
        except UserError as error:
            message = str(error)
            raise UserError(message if str(folder) in message else f"{folder / CONFIG_FILE}: {message}") from error

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`, its tensors under their published names."""
        write_folder(Path(folder), {"type": self.name, **asdict(self.config)}, own_weights(self.model, self._rename))

    def fingerprint(self) -> str:
        """Sixteen hex digits of the settings and the weights."""
        digest = hashlib.sha256(json.dumps({"type": self.name, **asdict(self.config)}, sort_keys=True).encode())
        for key, tensor in sorted(own_weights(self.model, self._rename).items()):
            digest.update(key.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(self, waveform: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None) -> AudioFrames:
        """Encode; the last frame is padded with silence, T = ceil(S / hop_length).

        A row's valid frames are those of the row alone: rows are silenced past their lengths, and where a codec looks
        ahead, rows of different numbers of frames are encoded one after the other, because the codec sees the end of a
        recording otherwise than silence after it.

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
        counts = (lengths + self.hop_length - 1) // self.hop_length
        total = -(-samples // self.hop_length)
        if self.lookahead_frames and bool((counts != total).any()):
            rows = [self._encode(waveform[i : i + 1, :, : int(lengths[i])]) for i in range(batch)]
            return _stack([_fill(row, total) for row in rows], counts)
        waveform = waveform * (torch.arange(samples, device=waveform.device) < lengths[:, None, None])
        return replace(self._encode(waveform), lengths=counts)

    def _encode(self, waveform: Tensor) -> AudioFrames:
        stream = self.streaming_encoder(waveform.shape[0])
        block = self.hop_length * self._block(waveform.shape[0])
        return join_frames([*(stream.push(piece) for piece in waveform.split(block, dim=-1)), stream.flush()])

    def quantize(self, latents: Float[Tensor, "B T D"]) -> Int[Tensor, "B K T"]:
        """Codes of latents: the codec's residual quantizer, which `encode` applies to its own."""
        batch, steps, _ = latents.shape
        if batch * steps == 0:
            return torch.zeros(batch, self.num_codebooks, steps, dtype=torch.long, device=latents.device)
        pieces = latents.transpose(1, 2).split(4 * self._block(batch), dim=-1)
        return torch.cat([self.codec.quantize(piece) for piece in pieces], dim=2)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B T D"]:
        """Latents of the first k codebooks, as the decoder takes them.

        Raises:
            ValueError: there are more codebooks than the tokenizer has, or none.
        """
        if not 1 <= codes.shape[1] <= self.num_codebooks:
            raise ValueError(f"codes have {codes.shape[1]} codebooks, but the tokenizer has 1 to {self.num_codebooks}")
        if codes.shape[0] * codes.shape[2] == 0:
            return torch.zeros(codes.shape[0], codes.shape[2], self.latent_dim, device=codes.device)
        return self.codec.dequantize(codes).transpose(1, 2)

    def decode_codes(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B 1 S"]:
        """Audio of the first k codebooks, S = T * hop_length."""
        return self._decode(codes, 2, "codes")

    def decode_latents(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of latents, quantized or not, S = T * hop_length."""
        return self._decode(latents, 1, "latents")

    def streaming_encoder(self, batch_size: int = 1) -> HuggingFaceStreamingEncoder:
        """An encoder for `batch_size` recordings of one length that arrive in pieces."""
        return HuggingFaceStreamingEncoder(self, batch_size)

    def streaming_decoder(self, batch_size: int = 1, source: Source = "latents") -> HuggingFaceStreamingDecoder:
        """A decoder for frames that arrive in pieces."""
        return HuggingFaceStreamingDecoder(self, batch_size, source)

    def _decode(self, frames: Tensor, time: int, source: Source) -> Tensor:
        stream = self.streaming_decoder(frames.shape[0], source)
        pieces = frames.to(self._device()).split(self._block(frames.shape[0]), dim=time)
        return torch.cat([*(stream.push(piece) for piece in pieces), stream.flush()], dim=-1)

    def _block(self, batch: int) -> int:
        return max(1, BLOCK_SAMPLES // self.hop_length // max(batch, 1))

    def _device(self) -> torch.device:
        return self.mel.window.device


class HuggingFaceStreamingEncoder:
    """See `tokenizer.frames.StreamingEncoder`; a flush ends the recording and the next push starts another."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._reset()

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Frames that became final: `lookahead_frames` later than their samples, at most."""
        return self._advance(self._samples.push(waveform), last=False)

    def flush(self) -> AudioFrames:
        """The frames held back, the last one padded with silence."""
        frames = self._advance(self._samples.flush(), last=True)
        self._reset()
        return frames

    def _reset(self) -> None:
        tokenizer = self.tokenizer
        self._network = tokenizer.codec.encoder()
        self._samples = WholeFrames(tokenizer.hop_length, self.batch_size, tokenizer.mel.window.device)
        self._features = LogMelStream(tokenizer.mel, self.batch_size)

    def _advance(self, waveform: Tensor, *, last: bool) -> AudioFrames:
        latents = self._network(waveform, last).transpose(1, 2)
        self._features.push(waveform)
        batch, count, _ = latents.shape
        return AudioFrames(
            codes=self.tokenizer.quantize(latents),
            latents=latents,
            features=self._features.take(count),
            lengths=torch.full((batch,), count, device=latents.device),
        )


class HuggingFaceStreamingDecoder:
    """See `tokenizer.frames.StreamingDecoder`; a flush ends the recording and the next push starts another."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, batch_size: int, source: Source) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.source = source
        self._reset()

    def push(self, frames: Tensor) -> Float[Tensor, "B 1 S"]:
        """Samples that became final; a codec whose decoder looks ahead gives them some frames later."""
        tokenizer = self.tokenizer
        frames = frames.to(tokenizer.mel.window.device)
        latents = tokenizer.dequantize(frames) if self.source == "codes" else frames
        self._owed += latents.shape[1] * tokenizer.hop_length
        return self._advance(latents.transpose(1, 2), last=False)

    def flush(self) -> Float[Tensor, "B 1 S"]:
        """What was held back, and silence where the codec gives less than its frames span."""
        empty = torch.zeros(self.batch_size, self.tokenizer.latent_dim, 0, device=self.tokenizer.mel.window.device)
        samples = self._advance(empty, last=True)
        samples = F.pad(samples, (0, self._owed))
        self._reset()
        return samples

    def _reset(self) -> None:
        self._network = self.tokenizer.codec.decoder()
        self._owed = 0

    def _advance(self, latents: Tensor, *, last: bool) -> Tensor:
        samples = self._network(latents, last)
        self._owed -= samples.shape[-1]
        return samples


def _fill(frames: AudioFrames, total: int) -> AudioFrames:
    missing = total - frames.codes.shape[2]
    assert frames.features is not None
    return replace(
        frames,
        codes=F.pad(frames.codes, (0, missing)),
        latents=F.pad(frames.latents, (0, 0, 0, missing)),
        features=F.pad(frames.features, (0, 0, 0, missing)),
    )


def _stack(rows: list[AudioFrames], lengths: Tensor) -> AudioFrames:
    return AudioFrames(
        codes=torch.cat([row.codes for row in rows]),
        latents=torch.cat([row.latents for row in rows]),
        features=torch.cat([row.features for row in rows if row.features is not None]),
        lengths=lengths,
    )
