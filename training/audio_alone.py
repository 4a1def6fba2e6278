"""Language models of audio alone, for comparisons: an empty prefix for all, and clips cut to their beginnings."""

from __future__ import annotations

from pathlib import Path

from tokenizer.text import TextTokenizer
from training.corpus import CachedClip, TokenCache, Window
from training.examples import GOES_ON


class Beginnings(TokenCache):
    """Clips cut after `max_frames`; noise drawn for a part is that of the whole clip's beginning."""

    max_frames = 1

    def __getitem__(self, clip: int) -> CachedClip:
        found = self.read(Window(clip, 0, min(self.max_frames, self.num_frames(clip))))
        if self.num_frames(clip) > self.max_frames:
            found.labels[GOES_ON] = "true"
        return found


def empty_text(output: Path) -> TextTokenizer:
    """The pieces of the empty prefix, in `text.model` of the study's folder: the same for all runs, learned once."""
    path = output / "text.model"
    return TextTokenizer.load(path) if path.is_file() else TextTokenizer.train(["a"], path)
