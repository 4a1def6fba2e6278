"""Texts in letters that a model's text pieces do not know, such as another script's: counted, to be told."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizer.text import TextTokenizer


@dataclass(kw_only=True, slots=True)
class Letters:
    """How well a model's text pieces know the letters of some texts."""

    num_texts: int = 0
    num_partly_unknown: int = 0
    """Texts with at least one letter that no piece has."""
    num_foreign: int = 0
    """Texts most of whose letters no piece has: another script."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Unknown letters by script, as Unicode names it."""

    def add(self, words: str, text: TextTokenizer) -> None:
        """Count a text."""
        self.num_texts += 1
        letters, unknown = text.letters(words)
        self.num_partly_unknown += bool(unknown)
        self.num_foreign += 2 * len(unknown) > letters
        self.scripts.update(unicodedata.name(letter, "UNNAMED").split()[0] for letter in unknown)

    def line(self) -> str | None:
        """What a person should know of it; None when every letter is known."""
        if not self.scripts:
            return None
        scripts = ", ".join(f"{name} {count}" for name, count in self.scripts.most_common(4))
        return (
            f"{self.num_partly_unknown} of {self.num_texts} texts have letters that the model's text pieces do not "
            f"know ({scripts}), {self.num_foreign} of them mostly such: read byte by byte, they take more data to learn"
        )


def letters_of(texts: Iterable[str | None], text: TextTokenizer) -> Letters:
    """Count texts; None is none."""
    letters = Letters()
    for words in texts:
        if words:
            letters.add(words, text)
    return letters
