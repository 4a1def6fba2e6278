"""How boldly to draw: temperature, top-k, top-p, min-p, a guard against repetition, classifier-free guidance, when to
believe a stop, and how loud the result is.

Shapes: B rows, V choices, W recent frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenizer.errors import UserError

TEXT_GUIDANCE = 3.0
"""Default guidance of speech, chosen on held-out sentences: the box's words come out far clearer than without."""
LOWEST_LUFS = -70.0
"""What is quieter counts as silence in ITU-R BS.1770."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """The settings of one generation. The defaults are the ones that `hybridlm generate` uses."""

    temperature: float = 0.7
    """Divides the logits of codes and of mixture components; 0 takes the most likely choice every time, the stop
    included, whatever the seed."""
    latent_temperature: float | None = None
    """Multiplies the variance of the drawn latents (CALM, arXiv 2509.06926); None: `temperature`."""
    latent_steps: int | None = None
    """Steps in which the flow head draws a latent; None: the mixture of Gaussians draws it."""
    top_k: int | None = None
    """Keep only the k most likely codes."""
    top_p: float | None = 0.95
    """Keep the smallest set of codes whose probability reaches p; 1 or None keeps all."""
    min_p: float | None = None
    """Keep only codes at least p times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Makes codes unlikelier that their own codebook had in recent frames, a prompt's included: a logit above 0 is
    divided by the penalty, one below 0 multiplied (CTRL, arXiv 1909.05858). 1: off; below 1, repetition is favoured."""
    repetition_window: int = 32
    """Frames that count as recent; only a `repetition_penalty` uses it."""
    cfg: float | None = None
    """Classifier-free guidance: 1 is the conditional model, more follows the text (or, without one, the tags) more
    closely. None: 3 for codes of a text, 1 elsewhere."""
    stop_floor: float = 0.1
    """Stop probabilities below this count as 0: at 25 frames a second even 1 % a frame would cut most sentences."""
    stop_threshold: float | None = None
    """Stop at the first frame whose stop probability reaches this, whatever the seed. None: the stop is drawn, or at
    temperature 0 taken where it is likelier than not."""
    min_duration: float | None = None
    """Seconds before which speech does not stop. None: those that the fastest reader would take."""
    loudness: float | None = None
    """Loudness of the result in LUFS, by one gain that keeps its true peak at most at -1 dBTP (`sampling.loudness`).
    None: as the model makes it."""
    num_candidates: int = 16
    """Latents drawn a frame, of which guidance chooses one; only a continuous-only model with `cfg` above 1 uses it."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "use 0 for the most likely choice, about 0.7 for a natural one")
        if self.latent_temperature is not None:
            _check_number("latent_temperature", self.latent_temperature, "use about 0.7")
        if self.latent_steps is not None and self.latent_steps < 1:
            raise UserError(f"latent_steps={self.latent_steps} must be at least 1; leave it out for the mixture head")
        if self.cfg is not None:
            _check_number("cfg", self.cfg, "use 1 for no guidance, 1.5 to 3 for more")
        if self.top_k is not None and (isinstance(self.top_k, bool) or int(self.top_k) != self.top_k or self.top_k < 1):
            raise UserError(f"top_k={self.top_k} must be a whole number of at least 1; leave it out to keep all codes")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all codes")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must be at least 0 and at most 1; use about 0.05")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0; use 1 for none, about 1.2")
        if self.repetition_window < 1:
            raise UserError(f"repetition_window={self.repetition_window} must be at least 1 frame; use 32")
        if self.stop_threshold is not None and not 0 < self.stop_threshold <= 1:
            raise UserError(f"stop_threshold={self.stop_threshold} must be above 0 and at most 1; use 0.5")
        if self.min_duration is not None:
            _check_number("min_duration", self.min_duration, "give seconds, such as 2")
        if self.loudness is not None and not LOWEST_LUFS <= self.loudness <= 0:
            raise UserError(
                f"loudness={self.loudness} LUFS must lie between {LOWEST_LUFS:g} and 0; use -23, as broadcasts do"
            )
        if not 0 <= self.stop_floor < 1:
            raise UserError(f"stop_floor={self.stop_floor} must be at least 0 and below 1; use 0.1")
        if self.num_candidates < 1:
            raise UserError(f"num_candidates={self.num_candidates} must be at least 1; use 16")

    def guidance(self, *, with_text: bool) -> float:
        """Strength of the guidance."""
        if self.cfg is not None:
            return self.cfg
        return TEXT_GUIDANCE if with_text else 1.0

    @property
    def stops_at(self) -> float | None:
        """Stop probability at which every seed stops; None where the stop is drawn."""
        if self.stop_threshold is None and self.temperature == 0:
            return 0.5
        return self.stop_threshold

    @property
    def latent_variance_scale(self) -> float:
        """Factor on the variance of the latents."""
        return self.temperature if self.latent_temperature is None else self.latent_temperature


def changed(controls: Controls, **changes: float | int | None) -> Controls:
    """With these fields; those that are None stay."""
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(controls, **given)


def sharpen(logits: Float[Tensor, "*B V"], temperature: float) -> Float[Tensor, "*B V"]:
    """Divide by the temperature; at 0, the most likely choice gets 0 and every other one -inf."""
    if temperature > 0:
        return logits / temperature
    best = logits.argmax(-1, keepdim=True)  # one of them even among equals
    return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)


def restrict(logits: Float[Tensor, "*B V"], controls: Controls) -> Float[Tensor, "*B V"]:
    """Apply temperature, then top-k, top-p and min-p; an excluded choice gets -inf, and one choice always remains."""
    logits = sharpen(logits, controls.temperature)
    if controls.top_k is not None and controls.top_k < logits.shape[-1]:
        kept = logits.topk(controls.top_k, dim=-1).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    if controls.top_p is not None and controls.top_p < 1:
        logits = _nucleus(logits, controls.top_p)
    if controls.min_p:
        least = logits.amax(dim=-1, keepdim=True) + math.log(controls.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _nucleus(logits: Float[Tensor, "*B V"], top_p: float) -> Float[Tensor, "*B V"]:
    """Keep the smallest set that reaches top_p."""
    if logits.device.type == "cpu":
        # NumPy sorts values in a twentieth of the time that PyTorch takes for values and their places.
        values = torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1)).flip(-1)
        count = _reaching(values, top_p).sum(dim=-1, keepdim=True)
        kept = logits >= values.gather(-1, count - 1)
        if torch.equal(kept.sum(dim=-1, keepdim=True), count):  # no equals at the border
            return logits.masked_fill(~kept, -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(~_reaching(ordered, top_p), -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def _reaching(ordered: Float[Tensor, "*B V"], top_p: float) -> Bool[Tensor, "*B V"]:
    """Which of the choices, the likeliest first, it takes to reach top_p: always the first."""
    probability = ordered.softmax(-1)
    return probability.cumsum(-1) - probability < top_p


def penalize(logits: Float[Tensor, "B V"], recent: Int[Tensor, "B W"], controls: Controls) -> Float[Tensor, "B V"]:
    """Make the codes of recent frames unlikelier, once each, however often they came (CTRL, arXiv 1909.05858)."""
    penalty = controls.repetition_penalty
    if penalty == 1.0 or recent.shape[-1] == 0:
        return logits
    said = logits.gather(-1, recent)
    return logits.scatter(-1, recent, torch.where(said > 0, said / penalty, said * penalty))


def _check_number(name: str, value: float, remedy: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name}={value} must be a number of at least 0; {remedy}")
