"""Steps that must not move the weights, not finite or a spike: what was in them, and when to give up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from tokenizer.errors import UserError
from training.config import RunConfig
from training.distributed import Replicas
from training.journal import Journal
from training.state import Progress, checkpoints
from training.task import Batch

CLIPS_NAMED = 5
"""Clips of a bad step that are named in a line; the log has all."""
NOT_FINITE = "loss or gradient is not finite"
LEAST_SPREAD = 1e-3
"""Standard deviation of losses, as a share of their mean, below which a run that stands still would skip everything."""


class Guard:
    """Knows the latest updates, judges a step by them, and counts those that are skipped.

    Args:
        config: Settings of the run.
        progress: Where the latest updates and the count are kept, for a resumed run judges as an uninterrupted one.
        backend: The processes, whose clips are named.
        journal: Is told of every skipped step.
    """

    def __init__(self, config: RunConfig, progress: Progress, backend: Replicas, journal: Journal) -> None:
        self._config, self._progress, self._backend, self._journal = config, progress, backend, journal
        self._spikes = config.spikes
        self.watches = config.spikes.loss_deviations > 0 or config.spikes.norm_ratio > 0
        """Whether `updated` is to be told of updates."""
        self._in_a_row = 0

    @property
    def watches_loss(self) -> bool:
        """Whether `loss_reason` is to be asked, which takes the mean of all processes."""
        return self._spikes.loss_deviations > 0

    def loss_reason(self, turn: str, loss: float) -> str | None:
        """Why a step with this loss is to be skipped, if it is."""
        latest = [entry[0] for entry in self._progress.latest.get(turn, ())]
        if len(latest) < self._spikes.min_updates:
            return None
        mean = statistics.fmean(latest)
        spread = max(statistics.pstdev(latest, mean), LEAST_SPREAD * abs(mean))
        if loss <= mean + self._spikes.loss_deviations * spread:
            return None
        return (
            f"{turn}'s loss {loss:.4g} is {(loss - mean) / spread:.1f} standard deviations above {mean:.4g}, the mean "
            f"of {len(latest)} updates"
        )

    def norm_limit(self, turn: str) -> float:
        """The largest gradient norm that is no spike."""
        latest = [entry[1] for entry in self._progress.latest.get(turn, ())]
        if self._spikes.norm_ratio == 0 or len(latest) < self._spikes.min_updates:
            return math.inf
        return self._spikes.norm_ratio * statistics.median(latest)

    def norm_reason(self, turn: str, norm: float) -> str:
        """Why an update with this gradient was not made, whose loss was no spike."""
        limit = self.norm_limit(turn)
        if not limit < norm < math.inf:
            return NOT_FINITE
        ratio = self._spikes.norm_ratio
        return f"{turn}'s gradient norm {norm:.4g} is above {ratio:g} times the median {limit / ratio:.4g}"

    def updated(self, turn: str, loss: float, norm: float) -> None:
        """Take in an update that was made."""
        latest = self._progress.latest.setdefault(turn, [])
        latest.append([loss, norm])
        del latest[: -self._spikes.window]

    def after_step(self, reason: str | None, micro_batches: Sequence[Batch], output: Path) -> None:
        """Count a step that was skipped for this reason, name what was in it, and stop when there is no end of them.

        Raises:
            UserError: so many in a row that the run is lost.
        """
        if reason is None:
            self._in_a_row = 0
            return
        progress = self._progress
        self._in_a_row += 1
        progress.bad_steps += 1
        last = progress.batches
        first = last - len(micro_batches) + 1
        own = [clip for batch in micro_batches for clip in batch.get("clips", ())]
        clips = [clip for each in self._backend.everybody(own) for clip in each]
        what = f"batch {last}" if first == last else f"batches {first} to {last}"
        what += f" of {', '.join(clips[:CLIPS_NAMED])}" if clips else ""
        what += f" and {len(clips) - CLIPS_NAMED} more" if len(clips) > CLIPS_NAMED else ""
        record = {
            "reason": reason,
            "in_a_row": self._in_a_row,
            "first_batch": first,
            "last_batch": last,
            "clips": clips,
        }
        self._journal.record("skipped", progress.step, record)
        self._journal.say(f"step {progress.step}: {reason}; skipped ({what})")
        if self._in_a_row >= self._config.max_bad_steps:
            kept = checkpoints(output)
            raise UserError(
                f"{self._in_a_row} steps in a row were skipped, up to step {progress.step} ({what}): {reason}; lower "
                f"optimizer.learning_rate{' or set precision=fp32' if reason == NOT_FINITE else ''}, then resume from "
                f"{kept[-1] if kept else 'the start'}"
            )
