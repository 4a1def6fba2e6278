"""What a model says of frames that are given to it: negative log-likelihoods, stream by stream.

Shapes: B batch, T frames, L = T + 1 states, K codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)  # no slots: see `decoder.DecoderOutput`
class FrameNLL:
    """Negative log-likelihoods in nats, zero wherever nothing is scored."""

    codes: Float[Tensor, "B K T"]
    """K = 0 for a continuous model."""
    latents: Float[Tensor, "B T"]
    """Zero for a discrete model."""
    stop: Float[Tensor, "B L"]
    """Of going on at each frame, and of stopping after the last one where the audio `ended` there."""
    correct: Bool[Tensor, "B K T"]
    """Whether the code was the most likely one."""
    mask: Bool[Tensor, "B T"]
    """Frames whose codes and latents were scored."""
    stop_mask: Bool[Tensor, "B L"]
    """States whose stop decision was scored."""
    alignment: Float[Tensor, " B"] | None = None
    """Guided attention loss (`alignment_loss`) or, with a reader, `place_loss` of each row, if it was asked for."""

    flow: Float[Tensor, "B T"] | None = None
    """Loss of the flow head, if it was asked for: no likelihood, and in no total."""

    def total(self) -> Float[Tensor, " B"]:
        """-log p of all that was scored, per row."""
        return self.codes.sum(dim=(1, 2)) + self.latents.sum(dim=1) + self.stop.sum(dim=1)
