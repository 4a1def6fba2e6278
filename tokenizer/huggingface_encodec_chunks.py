"""EnCodec at 48 kHz (arXiv 2210.13438) in the form of `transformers`: stereo, in chunks of one second.

The library brings each chunk to unit loudness and keeps the factor beside the codes. It can't be left out: the networks
normalize every layer over the chunk, the decoder's last one too, so that every chunk would come out equally loud. Here
it is part of the frames: the last number of a latent is the natural logarithm of its chunk's loudness (root mean
square), and the first codebook is that loudness in `codebook_size` steps of `LEVEL_SPAN_DB / codebook_size` decibels,
from `LEVEL_FLOOR_DB` on. The residual quantizer's codebooks follow. A chunk of latents is decoded at the mean of its
loudnesses in decibels, so latents that a model made need not agree on it.

Three things differ from the library's use of the model. Chunks follow each other without the published 1 % of overlap,
which is no whole number of frames (1.5) and gives the same moment two frames: this is the library with `overlap=0`.
The mono waveform goes into all channels, and the channels' mean comes out. And codes bear the loudness to half a step
(0.06 dB for 1024), latents exactly.

A frame depends on its whole chunk, and so do a frame's samples; a chunk depends on no other. So streams answer once a
chunk, and the look-ahead is a chunk less one frame.

Shapes: B batch, T frames, K codebooks, D latent, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import EncodecConfig

from tokenizer.errors import UserError
from tokenizer.huggingface_encodec import EncodecCodec
from tokenizer.streaming import Chain, ChunkStream

LEVEL_FLOOR_DB, LEVEL_SPAN_DB = -100.0, 128.0
NEPER_DB = 20.0 / math.log(10.0)


class ChunkedEncodecCodec(EncodecCodec):
    """See `tokenizer.huggingface_codec.Codec`."""

    def __init__(self, config: Mapping[str, Any], num_codebooks: int | None) -> None:
        if num_codebooks == 1:
            raise UserError("num_codebooks=1 must be at least 2: the first codebook of EnCodec at 48 kHz is loudness")
        super().__init__(config, None if num_codebooks is None else num_codebooks - 1)
        self.available_codebooks += 1
        self.num_codebooks += 1
        self.latent_dim += 1
        self.channels: int = self.model.config.audio_channels
        self.chunk_frames: int = self.model.config.chunk_length // self.hop_length

    @staticmethod
    def check(settings: EncodecConfig) -> None:
        """Refuse what is not of this layout.

        Raises:
            UserError: the chunks are no whole number of frames.
        """
        hop = math.prod(settings.upsampling_ratios)
        if settings.chunk_length < hop or settings.chunk_length % hop:
            raise UserError(
                f"chunk_length_s={settings.chunk_length_s} is {settings.chunk_length} samples, but must be a multiple "
                f"of {hop}, the samples of a frame; use 1.0, as facebook/encodec_48khz"
            )

    def encoder(self) -> Chain:
        frames = self.chunk_frames
        return Chain([ChunkStream(self._encode, frames * self.hop_length, frames, channels=self.latent_dim)])

    def decoder(self) -> Chain:
        frames = self.chunk_frames
        return Chain([ChunkStream(self._decode, frames, frames * self.hop_length, channels=1)])

    def quantize(self, latents: Float[Tensor, "B D T"]) -> Int[Tensor, "B K T"]:
        content, level = latents[:, :-1], latents[:, -1:]
        steps = (NEPER_DB * level - LEVEL_FLOOR_DB) * self.codebook_size / LEVEL_SPAN_DB
        return torch.cat([steps.round().long().clamp(0, self.codebook_size - 1), super().quantize(content)], dim=1)

    def dequantize(self, codes: Int[Tensor, "B k T"]) -> Float[Tensor, "B D T"]:
        level = (codes[:, :1] * (LEVEL_SPAN_DB / self.codebook_size) + LEVEL_FLOOR_DB) / NEPER_DB
        content = level.new_zeros(codes.shape[0], self.latent_dim - 1, codes.shape[2])
        if codes.shape[1] > 1:
            content = content + super().dequantize(codes[:, 1:])
        return torch.cat([content, level], dim=1)

    def _encode(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B D T"]:
        loudness = waveform.square().mean(dim=-1, keepdim=True).sqrt() + 1e-8
        content = self.model.encoder((waveform / loudness).expand(-1, self.channels, -1))
        return torch.cat([content, loudness.log().expand(-1, 1, content.shape[-1])], dim=1)

    def _decode(self, latents: Float[Tensor, "B D T"]) -> Float[Tensor, "B 1 S"]:
        loudness = latents[:, -1:].mean(dim=-1, keepdim=True).exp()
        return (self.model.decoder(latents[:, :-1]) * loudness).mean(dim=1, keepdim=True)
