"""Supervision by a frozen language model: features must be a prefix from which it can tell what was said.

The second half of F3-Tokenizer's representation learning (arXiv 2606.06357): features, downsampled and projected into
the model's embedding space, are followed by the transcript or caption, whose cross-entropy is the loss. Only what made
the prefix learns. Any causal language model of `transformers` serves; `Qwen/Qwen2.5-0.5B` is what is meant.

Shapes: B batch, T frames, F feature, P prefix positions, N text tokens, E embedding of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenizer.errors import UserError
from tokenizer.text import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Projector(nn.Module):
    """`stride` neighbouring frames, joined, through two layers to one embedding of the language model."""

    def __init__(self, feature_dim: int, embedding_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.hidden = nn.Linear(stride * feature_dim, embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)

    def forward(
        self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B P E"], Bool[Tensor, "B P"]]:
        """P = ceil(T / stride) embeddings and which of them are real; frames past a row's length count as zero."""
        time = torch.arange(features.shape[1], device=features.device)
        features = features * (time < lengths[:, None])[..., None]
        padded = F.pad(features, (0, 0, 0, -features.shape[1] % self.stride))
        joined = padded.reshape(padded.shape[0], padded.shape[1] // self.stride, -1)
        real = torch.arange(joined.shape[1], device=features.device) < -(-lengths[:, None] // self.stride)
        return self.out(F.gelu(self.hidden(joined))), real


class TextNLL(NamedTuple):
    """What the language model says of the texts."""

    nats: Float[Tensor, " B"]
    """-log p(text, end | prefix), summed over tokens."""
    tokens: Int[Tensor, " B"]
    """How many, the end among them."""


class FrozenLLM:
    """A causal language model whose weights stay as they are.

    Args:
        model: Of `transformers`.
        encode: Text to ids.
        end_id: Token that ends a text.

    Raises:
        UserError: the tokenizer's ids do not fit the model's embeddings.
    """

    def __init__(self, model: PreTrainedModel, encode: TextEncoder, end_id: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.encode, self.end_id = encode, end_id
        rows = self._embedding.weight.shape[0]
        if max(encode.size, end_id + 1) > rows:
            raise UserError(
                f"the language model embeds {rows} tokens, but its tokenizer has {max(encode.size, end_id + 1)}; "
                "give a folder in which both belong together"
            )

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self._embedding.weight.shape[1]

    @property
    def _embedding(self) -> nn.Embedding:
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def to(self, device: torch.device) -> FrozenLLM:
        """Move the weights; returns itself."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def nll(self, prefix: Float[Tensor, "B P E"], real: Bool[Tensor, "B P"], texts: Sequence[str]) -> TextNLL:
        """Score each text after its row's prefix.

        No gradient reaches the model's weights, so that the graph holds no inputs of its matrices, and only the states
        that predict text go through the output layer.
        """
        device = prefix.device
        ids = [[*self.encode(text), self.end_id] for text in texts]
        tokens = torch.tensor([len(row) for row in ids], device=device)
        padded = torch.zeros(len(ids), int(tokens.max()), dtype=torch.int64, device=device)
        for row, values in enumerate(ids):
            padded[row, : len(values)] = torch.tensor(values, device=device)
        is_text = torch.arange(padded.shape[1], device=device) < tokens[:, None]
        # The prefix ends where the text begins in every row: shorter ones are moved to the right.
        order = real.to(torch.int8).argsort(dim=1, stable=True)
        prefix = prefix.gather(1, order[..., None].expand_as(prefix))
        embedded = self._embedding(padded).to(prefix.dtype)
        mask = torch.cat([real.gather(1, order), is_text], dim=1)
        output = self.model.base_model(
            inputs_embeds=torch.cat([prefix, embedded], dim=1),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
        states = output.last_hidden_state[:, prefix.shape[1] - 1 : -1][is_text]
        logits = self.model.get_output_embeddings()(states).float()
        rows = torch.arange(len(ids), device=device)[:, None].expand_as(is_text)[is_text]
        nats = F.cross_entropy(logits, padded[is_text], reduction="none")
        return TextNLL(torch.zeros(len(ids), device=device).index_add(0, rows, nats), tokens)


class TextEncoder:
    """Text to ids, by the pieces of `text.model` or by a tokenizer of `transformers`."""

    def __init__(self, tokenizer: object, size: int) -> None:
        self._tokenizer, self.size = tokenizer, size

    def __call__(self, text: str) -> list[int]:
        """Ids without any symbol of begin or end."""
        if isinstance(self._tokenizer, TextTokenizer):
            return self._tokenizer.encode(text, [])[:-1]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]


def load_llm(name_or_dir: str, device: torch.device | None = None) -> FrozenLLM:
    """Load a causal language model and its tokenizer: a hub id, or a folder.

    A folder that holds `text.model`, as `task: text` writes it, uses those pieces. Weights are safetensors, and no code
    of the model's own is run.

    Raises:
        UserError: not there, not reachable, no safetensors, or a vocabulary that does not fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_dir, use_safetensors=True, trust_remote_code=False)
        if (Path(name_or_dir) / "text.model").is_file():
            pieces = TextTokenizer.load(Path(name_or_dir))
            found = FrozenLLM(model, TextEncoder(pieces, pieces.vocab_size), pieces.audio_id)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
            if tokenizer.eos_token_id is None:
                raise UserError(f"llm={name_or_dir}: its tokenizer has no end-of-text token; choose another model")
            found = FrozenLLM(model, TextEncoder(tokenizer, len(tokenizer)), tokenizer.eos_token_id)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"llm={name_or_dir} cannot be loaded ({reason}); give the folder of a causal language model, or a hub id "
            "where there is a network"
        ) from error
    return found if device is None else found.to(device)
