"""Where in the audio every character of a text is spoken, found out from the corpus (its training split) alone.

    python -m training.align CACHE [CACHE ...] [--steps N] [--seed N]

A small convolutional network learns to spell the cached latents (connectionist temporal classification, Graves et al.
2006), which needs texts and no times; the most likely path of the right text through its spelling then has the times.
Written as `alignment.jsonl` into each cache: a row a clip, `frames` with the place of each character of the text in
NFKC and lower case. A language model with a reader takes its lessons from there (`hybridlm.reader`). It takes some
minutes for some thousand clips, in any language whose letters say when they are spoken.

Shapes: B batch, T frames, U = 2 T steps of the network, D latent, A characters and a blank.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchaudio.functional import forced_align, merge_tokens

from tokenizer.errors import UserError
from tokenizer.files import replacing
from training.allocator import keep_freed_memory
from training.corpus import TokenCache, Window
from training.optimizer import gradient_norm

FILE_NAME = "alignment.jsonl"
FEWEST = 30
"""Utterances from which on a network learns to spell at all."""
STEPS_A_FRAME = 2
"""Of the network; people speak up to 20 characters a second, and a repeated one needs a blank."""
RAREST_SHARE = 1e-4
"""Characters that make up less of the texts than this are left out, as are signs; they get their neighbours' places."""


def normalized(text: str) -> str:
    """The characters that alignments count."""
    return unicodedata.normalize("NFKC", text).lower()


class Alphabet:
    """Characters to be spelled: letters, digits, the apostrophe, and one space for all that lies between words."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(c for text in texts for c in normalized(text) if c.isalnum() or c == "'")
        least = RAREST_SHARE * counts.total()
        self.characters = [" ", *sorted(c for c, count in counts.items() if count >= least)]
        self._ids = {c: number for number, c in enumerate(self.characters, start=1)}  # 0 is the blank

    def __len__(self) -> int:
        return len(self.characters) + 1

    def spell(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the index of its character in `normalized(text)`."""
        ids: list[int] = []
        places: list[int] = []
        for place, character in enumerate(normalized(text)):
            found = self._ids.get(character, 0 if character.isalnum() else 1)
            if found > 1 or (found == 1 and ids and ids[-1] != 1):
                ids.append(found)
                places.append(place)
        if ids and ids[-1] == 1:
            ids.pop()
            places.pop()
        return ids, places


class SpellerBlock(nn.Module):
    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix_time = nn.Conv1d(dim, dim, 5, padding=2 * dilation, dilation=dilation)
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        y = self.mix_time(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix(F.gelu(y, approximate="tanh"))


class Speller(nn.Module):
    """Latents to log-probabilities of characters, two steps a frame; sees the whole recording."""

    def __init__(self, latent_dim: int, num_characters: int, dim: int = 192) -> None:
        super().__init__()
        self.embed = nn.Linear(latent_dim, dim)
        self.frames = nn.ModuleList(SpellerBlock(dim, dilation) for dilation in (1, 1, 2))
        self.widen = nn.Linear(dim, STEPS_A_FRAME * dim)
        self.steps = nn.ModuleList(SpellerBlock(dim, dilation) for dilation in (1, 2))
        self.norm = nn.LayerNorm(dim)
        self.read_out = nn.Linear(dim, num_characters)

    def forward(self, latents: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B U A"]:
        valid = mask[..., None]
        x = self.embed(latents) * valid
        for block in self.frames:
            x = block(x) * valid
        x = self.widen(x).reshape(x.shape[0], STEPS_A_FRAME * x.shape[1], -1)
        valid = valid.repeat_interleave(STEPS_A_FRAME, dim=1)
        for block in self.steps:
            x = block(x) * valid
        return self.read_out(self.norm(x)).float().log_softmax(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """A clip to be aligned."""

    key: str
    length: int
    """Characters of the normalized text."""
    latents: Float[Tensor, "T D"]
    ids: list[int]
    places: list[int]


def train_speller(
    utterances: Sequence[Utterance], num_characters: int, *, steps: int, seed: int = 0, batch_size: int = 16
) -> Speller:
    """Learn to spell; tells its progress on the error stream.

    Args:
        utterances: What to learn from.
        num_characters: Size of the alphabet with the blank.
        steps: Updates.
        seed: Of weights and order.
        batch_size: Utterances an update.
    """
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    speller = Speller(utterances[0].latents.shape[1], num_characters)
    optimizer = torch.optim.AdamW(speller.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    order: list[list[Utterance]] = []
    total = 0.0
    for step in range(steps):
        if not order:
            by_length = sorted(utterances, key=lambda u: len(u.latents) * shuffle.uniform(1.0, 1.1))
            order = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            shuffle.shuffle(order)
        batch = order.pop()
        latents, mask, lengths = _stack(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
            log_probs = speller(latents + 0.2 * torch.randn_like(latents), mask)
        targets = torch.tensor([len(u.ids) for u in batch])
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat([torch.tensor(u.ids) for u in batch]),
            STEPS_A_FRAME * lengths,
            targets,
            reduction="none",
            zero_infinity=True,
        )
        loss = (losses / targets).mean()
        rate = 2e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        gradient_norm(list(speller.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            count = (step % 100) + 1
            print(f"step {step + 1}/{steps}  nats a character {total / count:.3f}", file=sys.stderr, flush=True)
            total = 0.0
    return speller.eval()


@torch.inference_mode()
def align(speller: Speller, utterance: Utterance) -> npt.NDArray[np.float64]:
    """The frame, with fractions, in the middle of which each character of the normalized text is spoken."""
    latents, mask, _ = _stack([utterance])
    log_probs = speller(latents, mask)
    path, scores = forced_align(log_probs, torch.tensor([utterance.ids], dtype=torch.int32), blank=0)
    spans = merge_tokens(path[0], scores[0].exp(), blank=0)
    middles = [(span.start + span.end) / 2 / STEPS_A_FRAME for span in spans]
    return np.interp(np.arange(utterance.length), utterance.places, middles)


def utterances_of(cache: TokenCache) -> tuple[list[Utterance], Alphabet]:
    """All clips with a text that fits into their time."""
    chosen = [i for i in range(len(cache)) if cache.index.clip(i).text]
    alphabet = Alphabet([str(cache.index.clip(i).text) for i in chosen])
    found = []
    for i in chosen:
        clip = cache.read(Window(i, 0, cache.num_frames(i)))
        assert clip.text is not None
        ids, places = alphabet.spell(clip.text)
        repeats = sum(a == b for a, b in zip(ids, ids[1:], strict=False))
        if ids and len(ids) + repeats <= STEPS_A_FRAME * len(clip.latents):
            found.append(
                Utterance(key=clip.key, length=len(normalized(clip.text)), latents=clip.latents, ids=ids, places=places)
            )
    return found, alphabet


def align_caches(folders: Sequence[Path], *, steps: int | None = None, seed: int = 0) -> int:
    """Train on all caches together and write each one's `alignment.jsonl`; returns the number of aligned clips.

    Raises:
        UserError: caches that can't be read or are of different tokenizers, or that have too few texts.
    """
    everything, alphabet = utterances_of(TokenCache(folders, split="train"))
    if len(everything) < FEWEST:
        raise UserError(
            f"{', '.join(map(str, folders))}: {len(everything)} clips of the training split have a text that could be "
            f"aligned, but a network that spells needs {FEWEST} or more"
        )
    if steps is None:
        steps = max(300, min(4000, 8 * math.ceil(len(everything) / 16)))
    speller = train_speller(everything, len(alphabet), steps=steps, seed=seed)
    places = {utterance.key: align(speller, utterance) for utterance in everything}
    for folder in folders:
        cache = TokenCache([folder])
        keys = [cache.index.clip(i).key for i in range(len(cache))]
        with replacing(folder / FILE_NAME) as path, path.open("w", encoding="utf-8") as file:
            for key in keys:
                if key in places:
                    rounded = [round(float(frame), 2) for frame in places[key]]
                    file.write(json.dumps({"key": key, "frames": rounded}, ensure_ascii=False) + "\n")
    return len(everything)


def read_alignments(folder: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Keys and places from a cache's file; nothing where there is none.

    Raises:
        UserError: a damaged file.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                yield str(row["key"]), np.asarray(row["frames"], dtype=np.float32)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number} is damaged; run `python -m training.align {folder}` again") from error


def _stack(batch: Sequence[Utterance]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, T, D), their mask, and their lengths."""
    latents = nn.utils.rnn.pad_sequence([u.latents for u in batch], batch_first=True)
    lengths = torch.tensor([len(u.latents) for u in batch])
    return latents, torch.arange(latents.shape[1]) < lengths[:, None], lengths


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Find where every character of the texts in token caches is spoken.")
    parser.add_argument("caches", type=Path, nargs="+", help="folders made by `hybridlm prepare`")
    parser.add_argument("--steps", type=int, help="updates of the network that spells; from the number of clips")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    try:
        count = align_caches(arguments.caches, steps=arguments.steps, seed=arguments.seed)
    except UserError as error:
        print(f"align: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{count} clips aligned")


if __name__ == "__main__":
    main()
