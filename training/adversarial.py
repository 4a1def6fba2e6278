"""The adversary's part in a tokenizer's training: when it plays, what it says of a batch, and its own turn.

Shapes: B batch, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.adversary import (
    MultiResolutionDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from training.task import Batch


@runtime_checkable
class AdversarialSettings(Protocol):
    """What a task's loss settings say of the adversary."""

    @property
    def adversarial_weight(self) -> float: ...
    @property
    def feature_matching_weight(self) -> float: ...
    @property
    def adversarial_from_step(self) -> int: ...
    @property
    def discriminator_n_ffts(self) -> tuple[int, ...]: ...
    @property
    def discriminator_channels(self) -> int: ...


class Adversary:
    """The multi-resolution discriminator with its schedule; no part of the task where both its weights are 0.

    Args:
        settings: Weights, shape, and the step before which it rests.
        ramp_steps: Over how many steps its losses then come in.
        every: It judges one row of so many: judging is the dearest part.
    """

    def __init__(self, settings: AdversarialSettings, *, ramp_steps: int = 1, every: int = 1) -> None:
        self.discriminator = MultiResolutionDiscriminator(
            settings.discriminator_n_ffts, settings.discriminator_channels
        )
        self._settings, self._ramp_steps, self._judged = settings, ramp_steps, slice(0, None, every)

    @property
    def _takes_part(self) -> bool:
        return self._settings.adversarial_weight + self._settings.feature_matching_weight > 0

    def modules(self) -> Mapping[str, nn.Module]:
        """What learns beside the model."""
        return {"discriminator": self.discriminator} if self._takes_part else {}

    def plays(self, step: int) -> bool:
        """Whether it has a turn at this step."""
        return self._takes_part and step >= self._settings.adversarial_from_step

    def against(
        self, fake: Float[Tensor, "B 1 S"], batch: Batch, step: int
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """What the model's loss gets of it, weighted; keeps what the model made for its own turn."""
        settings, fake = self._settings, fake[self._judged]
        batch["fake"] = fake.detach()
        with torch.no_grad():
            real = self.discriminator(batch["waveform"][self._judged])
        judgement = self.discriminator(fake)
        fooled, matching = adversarial_loss(judgement), feature_matching_loss(real, judgement)
        ramp = min(1.0, (step - settings.adversarial_from_step + 1) / self._ramp_steps)
        loss = ramp * (settings.adversarial_weight * fooled + settings.feature_matching_weight * matching)
        return loss, {"adversarial": fooled.detach(), "feature_matching": matching.detach()}

    def own_loss(self, batch: Batch) -> Tensor:
        """The hinge loss of its own turn, on what the model just made."""
        return discriminator_loss(
            self.discriminator(batch["waveform"][self._judged]), self.discriminator(batch["fake"])
        )
