"""Training of a small language model of text alone, for where no published one can be had (`task: text`).

The model is `transformers`' Llama; the result is its folder with the sentencepiece `text.model` beside it, which
`training.llm_supervision.load_llm` takes like any other.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokenizer.errors import UserError
from tokenizer.text import TextTokenizer
from training.language_task import read_sentences
from training.state import checkpoints
from training.task import Batch, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTaskConfig:
    """Settings of `task: text`, under `text:`."""

    sentences: str
    """Text file, a sentence a line."""
    model: str | None = None
    """Text model (sentencepiece) whose pieces are used; None: learn one from the sentences."""
    vocab_size: int = 1024
    validation_fraction: float = 0.02
    batch_size: int = 32
    max_tokens: int = 128
    """Longer sentences are cut."""
    hidden_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 704

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "hidden_dim", "num_layers", "num_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be at least 0 and below 1")
        if self.hidden_dim % self.num_heads or (self.hidden_dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads={self.num_heads} must divide hidden_dim={self.hidden_dim} into even widths; use 4 or 8"
            )


class TextTask:
    """See `training.task.Task`.

    A sentence is its pieces between two ends (`<audio>`, with which every text of this project ends): so the model
    learns how one begins.

    Raises:
        UserError: sentences or a text model that cannot be read, or too few sentences.
    """

    def __init__(self, config: TextTaskConfig, *, output: Path) -> None:
        self.config = config
        sentences = read_sentences(Path(config.sentences))
        kept = output / "text.model"
        if config.model is not None:
            self.text = TextTokenizer.load(Path(config.model))
        elif checkpoints(output) and kept.is_file():
            self.text = TextTokenizer.load(kept)
        else:
            self.text = TextTokenizer.train(sentences, kept, vocab_size=config.vocab_size)
        ids = [self.text.encode(sentence)[: config.max_tokens] for sentence in sentences]
        rows = [torch.tensor([self.text.audio_id, *row]) for row in ids if len(row) > 1]
        held = round(config.validation_fraction * len(rows))
        if len(rows) - held < 1:
            raise UserError(f"text.sentences={config.sentences} has {len(rows)} sentences; give more")
        order = np.random.default_rng(0).permutation(len(rows))
        self.validation = [rows[i] for i in order[:held]] or rows
        self.training = [rows[i] for i in order[held:]]
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.text.vocab_size,
                hidden_size=config.hidden_dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                pad_token_id=self.text.pad_id,
                bos_token_id=self.text.audio_id,
                eos_token_id=self.text.audio_id,
            )
        )

    def modules(self) -> Mapping[str, nn.Module]:
        """The model."""
        return {"model": self.model}

    def turns(self, step: int) -> Sequence[str]:
        """The model, always."""
        return ("model",)

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Random sentences."""
        number = skip
        while True:
            rng = np.random.default_rng([seed, rank, number])
            yield self._batch([self.training[i] for i in rng.integers(len(self.training), size=self.config.batch_size)])
            number += 1

    def size(self, batch: Batch) -> int:
        """Tokens to be predicted."""
        return int(batch["lengths"].sum() - len(batch["lengths"]))

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cross-entropy in nats a token."""
        total, count = self._nats(batch)
        return total / count, {}

    def validate(self) -> Mapping[str, float]:
        """Nats a token, and perplexity, of held-out sentences."""
        device = next(self.model.parameters()).device
        nats, tokens = 0.0, 0
        for start in range(0, len(self.validation), self.config.batch_size):
            batch = self._batch(self.validation[start : start + self.config.batch_size])
            total, count = self._nats({name: value.to(device) for name, value in batch.items()})
            nats, tokens = nats + float(total), tokens + count
        return {"loss": nats / tokens, "perplexity": float(np.exp(nats / tokens))}

    def export(self, folder: Path) -> None:
        """A folder that `transformers` reads, and `text.model`."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.text.save(folder)

    def samples(self) -> Sequence[Sample]:
        """Nothing: text makes no sound."""
        return ()

    def _nats(self, batch: Batch) -> tuple[Tensor, int]:
        ids, lengths = batch["ids"], batch["lengths"]
        time = torch.arange(ids.shape[1], device=ids.device)
        # Right padding needs no mask: causality hides it from all that counts.
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        counts = time[1:] < lengths[:, None]
        return F.cross_entropy(logits[counts], ids[:, 1:][counts], reduction="sum"), int(counts.sum())

    def _batch(self, rows: Sequence[Tensor]) -> Batch:
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.text.pad_id)
        return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}
