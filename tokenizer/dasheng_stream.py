"""DashengTokenizer in pieces: an encoder that answers a window at a time, and the decoder in both its forms.

Both equal the offline forms, since they run the same windows on the same samples: the encoder waits for a whole window,
the centred decoder repeats as many frames before and after as reach into the ones that became final.

Shapes: B batch, T frames, C hidden, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokenizer.centred_mel import reflect
from tokenizer.dasheng import DashengTokenizer
from tokenizer.dasheng_encoder import window_span
from tokenizer.frames import AudioFrames, Source
from tokenizer.vocos import VocosState


class DashengStreamingEncoder:
    """See `tokenizer.frames.StreamingEncoder`."""

    def __init__(self, tokenizer: DashengTokenizer, batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.config, self.margin = tokenizer.config.semantic, tokenizer.encoder.margin
        device = next(tokenizer.parameters()).device
        self._samples = torch.zeros(batch_size, 0, device=device)
        """From `margin` before the next window's first frame on; before `_started`, from the recording's begin on."""
        self._started = False

    @torch.inference_mode()
    def push(self, waveform: Float[Tensor, "B 1 S"]) -> AudioFrames:
        """Frames of the windows that became complete."""
        self._samples = torch.cat([self._samples, waveform[:, 0]], dim=1)
        if not self._started and self._samples.shape[1] > self.margin:
            self._start()
        count = self.config.window_frames
        needed = max(window_span(count, self.config, self.margin), self.margin + count * self.config.frame_samples)
        windows = []
        while self._started and self._samples.shape[1] >= needed:
            windows.append(self._window(count))
        return self._frames(windows)

    @torch.inference_mode()
    def flush(self) -> AudioFrames:
        """The frames of the last windows, the last frame padded with silence."""
        own = self._samples.shape[1] - (self.margin if self._started else 0)
        self._samples = F.pad(self._samples, (0, -own % self.config.frame_samples))
        remaining = -(-own // self.config.frame_samples)
        windows = []
        if remaining:
            if not self._started:
                self._start()
            self._samples = reflect(self._samples, 0, self.margin)
            while remaining:
                count = min(remaining, self.config.window_frames)
                windows.append(self._window(count))
                remaining -= count
        self._samples, self._started = self._samples[:, :0], False
        return self._frames(windows)

    def _start(self) -> None:
        self._samples, self._started = reflect(self._samples, self.margin, 0), True

    def _window(self, count: int) -> Float[Tensor, "B T C"]:
        span = window_span(count, self.config, self.margin)
        features = self.tokenizer.encoder.window(self._samples[:, :span]).features
        self._samples = self._samples[:, count * self.config.frame_samples :]
        return features

    def _frames(self, windows: list[Float[Tensor, "B T C"]]) -> AudioFrames:
        batch = self._samples.shape[0]
        features = self._samples.new_zeros(batch, 0, self.tokenizer.feature_dim)
        features = torch.cat([features, *windows], dim=1)
        lengths = torch.full((batch,), features.shape[1], device=features.device)
        return self.tokenizer.frames_of(features, lengths)


class DashengStreamingDecoder:
    """See `tokenizer.frames.StreamingDecoder`."""

    def __init__(self, tokenizer: DashengTokenizer, batch_size: int, source: Source | Literal["features"]) -> None:
        self.tokenizer, self.source = tokenizer, source
        device = next(tokenizer.parameters()).device
        self._state: VocosState | None = None
        self._features = torch.zeros(batch_size, 0, tokenizer.feature_dim, device=device)
        """Of the centred form: frames that are not final yet, and before them the context."""
        self._context = 0

    @torch.inference_mode()
    def push(self, frames: Tensor) -> Float[Tensor, "B 1 S"]:
        """All samples of the pushed frames when causal; otherwise of those with the whole look-ahead behind them."""
        latents = self.tokenizer.dequantize(frames) if self.source == "codes" else frames
        features = frames if self.source == "features" else self.tokenizer.expand(latents)
        if not self.tokenizer.config.causal:
            self._features = torch.cat([self._features, features], dim=1)
            return self._final(self._features.shape[1] - self._context - self.tokenizer.decoder_lookahead_frames)
        if features.shape[1] == 0:
            return self._nothing()
        waveform, self._state = self.tokenizer.synthesize(features, self._state)
        return waveform.clamp(-1.0, 1.0).unsqueeze(1)

    @torch.inference_mode()
    def flush(self) -> Float[Tensor, "B 1 S"]:
        """What was held back; nothing, when causal."""
        waveform = self._final(self._features.shape[1] - self._context)
        self._state, self._features, self._context = None, self._features[:, :0], 0
        return waveform

    def _final(self, count: int) -> Float[Tensor, "B 1 S"]:
        """Samples of so many frames after the context, which then join it."""
        if count <= 0:
            return self._nothing()
        hop, reach = self.tokenizer.hop_length, self.tokenizer.decoder_lookahead_frames
        waveform = self.tokenizer.decode_features(self._features)
        waveform = waveform[..., self._context * hop : (self._context + count) * hop]
        dropped = max(self._context + count - reach, 0)
        self._features, self._context = self._features[:, dropped:], self._context + count - dropped
        return waveform

    def _nothing(self) -> Float[Tensor, "B 1 S"]:
        return self._features.new_zeros(self._features.shape[0], 1, 0)
