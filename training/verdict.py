"""What a check-up says: one line for a person, figures for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["fine", "look", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one check."""

    name: str
    level: Level
    """`look`: a person should look whether it is meant so. `broken`: training or figures would be worth nothing."""
    finding: str
    """What was found, on how many clips."""
    remedy: str = ""
    """What to do; empty when all is fine."""
    figures: dict[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    """A few clips that show it."""

    def line(self) -> str:
        """One line."""
        shown = f" (such as {', '.join(self.examples[:2])})" if self.examples and self.level != "fine" else ""
        return f"{self.level:7s} {self.name}: {self.finding}{shown}" + (f"; {self.remedy}" if self.remedy else "")


def judge(
    name: str,
    finding: str,
    *,
    look: bool = False,
    broken: bool = False,
    remedy: str,
    figures: dict[str, Any] | None = None,
    examples: Sequence[str] = (),
) -> Verdict:
    """The verdict of the worst that holds; the remedy is dropped when nothing does."""
    level: Level = "broken" if broken else "look" if look else "fine"
    return Verdict(
        name=name,
        level=level,
        finding=finding,
        remedy=remedy if level != "fine" else "",
        figures=figures or {},
        examples=tuple(examples[:10]),
    )
