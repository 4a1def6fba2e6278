"""The parts of a language model's loss: codes, latents, stop, alignment.

Shapes: B batch, T frames, K codebooks, D latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridlm.frame_nll import FrameNLL


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageLossConfig:
    """Weights of the parts, and what is hidden from the model in training."""

    code_weights: tuple[float, ...] = ()
    """Of each predicted codebook, in the mean over codebooks; none: equal."""
    code_weight: float = 1.0
    latent_weight: float = 1.0
    """Of the latents' NLL a frame and dimension."""
    flow_weight: float = 1.0
    """Of the flow head's loss a frame and dimension, where the model has such a head."""
    stop_weight: float = 0.5
    alignment_weight: float = 0.2
    """Of the guided attention loss or, of a model with a reader, of its places, on complete utterances with text."""
    guide_error: float = 2.5
    """Largest standard deviation, in pieces, of the error in the places that a reader is given to set right."""
    text_dropout: float = 0.05
    """Share of rows whose text is hidden and whose tags are not; `model.condition_dropout` hides both."""
    tag_dropout: float = 0.0
    """Share of rows that keep only the first of their tags, so that it works alone too (`music` without a genre)."""
    head_fraction: float = 1.0
    """Share of the frames whose codes and latents are scored: less is faster and noisier."""

    def __post_init__(self) -> None:
        for name in ("code_weight", "latent_weight", "flow_weight", "stop_weight", "alignment_weight", "guide_error"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if any(weight < 0 for weight in self.code_weights) or (self.code_weights and sum(self.code_weights) == 0):
            raise ValueError(f"code_weights={list(self.code_weights)} must be at least 0, and not all 0")
        for name in ("text_dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if not 0 < self.head_fraction <= 1:
            raise ValueError(f"head_fraction={self.head_fraction} must lie in (0, 1]")


def combine(
    nll: FrameNLL, losses: LanguageLossConfig, *, latent_dim: int, aligned: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its parts.

    Args:
        nll: What the model says.
        losses: Weights.
        latent_dim: D.
        aligned: Rows that the alignment loss counts.
    """
    frames = nll.mask.sum().clamp(min=1)
    total = losses.stop_weight * (stop := nll.stop.sum() / nll.stop_mask.sum().clamp(min=1))
    parts = {"stop": stop.detach()}
    if nll.codes.shape[1]:
        per_codebook = nll.codes.sum(dim=(0, 2)) / frames
        weights = per_codebook.new_tensor(losses.code_weights or [1.0] * len(per_codebook))
        total = total + losses.code_weight * (per_codebook * weights).sum() / weights.sum()
        parts["code"] = per_codebook.detach().mean()
        parts["first_code"] = per_codebook[0].detach()
        parts["accuracy"] = nll.correct.sum() / (frames * len(per_codebook))
    if bool(nll.latents.detach().any()):
        latent = nll.latents.sum() / (frames * latent_dim)
        total = total + losses.latent_weight * latent
        parts["latent"] = latent.detach()
    if nll.flow is not None:
        flow = nll.flow.sum() / frames
        total = total + losses.flow_weight * flow
        parts["flow"] = flow.detach()
    if nll.alignment is not None:
        alignment = nll.alignment.sum() / aligned.sum().clamp(min=1)
        total = total + losses.alignment_weight * alignment
        parts["alignment"] = alignment.detach()
    return total, parts


def sums(nll: FrameNLL) -> dict[str, float]:
    """Nats of each stream, summed over all that was scored. `accuracy` is the sum over frames of the share of codes;
    `flow`, if it was asked for, is no likelihood."""
    figures = {
        "codes": float(nll.codes.sum()),
        "latents": float(nll.latents.sum()),
        "stop": float(nll.stop.sum()),
    }
    if outputs := nll.codes.shape[1]:
        figures["accuracy"] = float(nll.correct.sum()) / outputs
        figures["first_code"] = float(nll.codes[:, 0].sum())
    if nll.flow is not None:
        figures["flow"] = float(nll.flow.sum())
    return figures
