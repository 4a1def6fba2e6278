"""A tokenizer as the package `xares` (repository jimbozhang/xares) takes an encoder; its frames are what is probed.

    HYBRIDLM_TOKENIZER=box HYBRIDLM_INPUT=latents python -m xares.run training/xares_encoder.py TASK.py ...

`xares` imports this file by its path and makes the one name in it that ends in `Encoder`, without arguments; so the
choice comes from the environment, and no other such name may be imported here.

Shapes: B batch, T frames, D width of a frame, S samples.
"""

from __future__ import annotations

import os

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hybridlm.checkpoint import load_codec
from training.embeddings import PIECE_S, TokenizerFrames, default_input


class HybridlmEncoder(nn.Module):
    """Audio to frozen frames, however long: it passes in pieces through the tokenizer's streaming encoder.

    Args:
        tokenizer: "box", "encodec", or a tokenizer's or model's folder; by default the variable `HYBRIDLM_TOKENIZER`,
            else the box.
        input: `features`, `latents` or `codes`; by default the variable `HYBRIDLM_INPUT`, else features where the
            tokenizer has them, else latents.

    Raises:
        UserError: a tokenizer that can't be loaded, or a view that it lacks.
    """

    def __init__(self, tokenizer: str | None = None, input: str | None = None) -> None:
        super().__init__()
        name = tokenizer or os.environ.get("HYBRIDLM_TOKENIZER") or "box"
        self.tokenizer = load_codec(name)
        wanted = input or os.environ.get("HYBRIDLM_INPUT") or default_input(self.tokenizer)
        self._frames = TokenizerFrames(self.tokenizer, (wanted,), name)
        self.sampling_rate = self.tokenizer.sample_rate_hz
        self.output_dim = self._frames.dims[0]
        self.hop_size_in_ms = 1000.0 / self.tokenizer.frame_rate_hz

    @torch.inference_mode()
    def forward(self, audio: Float[Tensor, "B S"] | Float[Tensor, " S"]) -> Float[Tensor, "B T D"]:
        """Frames of recordings of one length at `sampling_rate`; the last frame is padded with silence."""
        waveform = audio.unsqueeze(0) if audio.ndim == 1 else audio
        pieces = waveform.unsqueeze(1).split(round(PIECE_S * self.sampling_rate), dim=-1)
        frames = [found.views[0] for found in self._frames.stream(iter(pieces), len(waveform))]
        return torch.cat([found.to(audio.device) for found in frames], dim=1)
