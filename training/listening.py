"""How a language model is listened to while it is trained: by whom, and what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from hybridlm.model import HybridLM
from tokenizer.frames import Tokenizer
from tokenizer.text import TextTokenizer
from training.corpus import TokenCache
from training.task import Sample

PROMPTS = 4
"""Held-out clips whose text and tags a model is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model shall say or play."""

    name: str
    text: str | None
    tags: tuple[str, ...]


@runtime_checkable
class Sampler(Protocol):
    """Makes a model sound; given by the caller, for training does not know sampling."""

    def __call__(
        self, model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer, prompts: Sequence[Prompt] = ()
    ) -> Sequence[Sample]:
        """The same audio of the same weights; of something that the sampler chooses, where there are no prompts."""
        ...


def prompts_of(cache: TokenCache) -> list[Prompt]:
    """A few of a cache's clips, always the same: at most half of them with text, the others of as many kinds of audio
    as there are."""
    index, chosen, kinds = cache.index, list[Prompt](), set[str | None]()
    for clip in torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).tolist():
        about = index.clip(clip)
        kind = None if about.text is not None else " ".join(about.tags)
        if kind in kinds and (kind is not None or sum(p.text is not None for p in chosen) == PROMPTS // 2):
            continue
        kinds.add(kind)
        chosen.append(Prompt(name=f"generated/{len(chosen)}", text=about.text, tags=about.tags))
        if len(chosen) == PROMPTS:
            break
    return chosen
