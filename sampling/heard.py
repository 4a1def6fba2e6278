"""Features of frames that were just drawn: they exist only once the frames have sounded (WHISPER-GPT's generation).

Shapes: B rows, K codebooks, D latent, F feature, S samples.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames, Source, Tokenizer
from tokenizer.mel import CausalLogMel, LogMelStream


def can_be_heard(tokenizer: Tokenizer) -> bool:
    """Whether features of a frame depend on nothing after it, so that they can be had before the next is drawn."""
    return tokenizer.feature_dim > 0 and tokenizer.lookahead_frames == 0


class HeardFeatures:
    """Decodes drawn frames one by one, and computes the features of what is heard.

    A log-mel comes from the samples alone; other features from the tokenizer's own encoder, which hears them again.

    Args:
        tokenizer: Of the frames; see `can_be_heard`.
        source: What is decoded.
        rows: Recordings that are drawn side by side.
        prompt: One row of frames that precede them all; None for none.
    """

    def __init__(self, tokenizer: Tokenizer, source: Source, rows: int, prompt: AudioFrames | None) -> None:
        self.tokenizer, self.source = tokenizer, source
        self._decoder = tokenizer.streaming_decoder(rows, source)
        mel = getattr(tokenizer, "mel", None)
        self._mels = LogMelStream(mel, rows) if isinstance(mel, CausalLogMel) else None
        self._encoder = None if self._mels is not None else tokenizer.streaming_encoder(rows)
        if prompt is not None:
            frames = prompt.codes if source == "codes" else prompt.latents
            self.push(frames.expand(rows, -1, -1))

    @torch.inference_mode()
    def push(self, frames: Tensor) -> Float[Tensor, "B T F"]:
        """Features of these codes (B, K, T) or latents (B, T, D).

        Raises:
            UserError: a decoder that holds samples back.
        """
        count = frames.shape[2] if self.source == "codes" else frames.shape[1]
        waveform = self._decoder.push(frames)
        if waveform.shape[-1] != count * self.tokenizer.hop_length:
            raise UserError(
                f"tokenizer {self.tokenizer.name} decodes {waveform.shape[-1]} samples of {count} frames at once: its "
                "features come too late to predict the next frame from; use one that holds nothing back, such as "
                "encodec-causal or log-mel:box"
            )
        if self._mels is not None:
            self._mels.push(waveform)
            return self._mels.take(count)
        assert self._encoder is not None
        features = self._encoder.push(waveform).features
        assert features is not None and features.shape[1] == count
        return features
