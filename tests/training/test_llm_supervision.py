"""The frozen language model: its likelihood is transformers' own, its weights stay, its gradients reach the prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_audio_model import tiny_text
from tokenizer.errors import UserError
from training.llm_supervision import FrozenLLM, Projector, TextEncoder, load_llm

TEXTS = ["good morning", "how are you", "she sells sea shells"]


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def llm() -> FrozenLLM:
    pieces = tiny_text()
    return FrozenLLM(tiny_llama(pieces.vocab_size), TextEncoder(pieces, pieces.vocab_size), pieces.audio_id)


def prefixes() -> tuple[torch.Tensor, torch.Tensor]:
    prefix = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    return prefix, torch.arange(4) < torch.tensor([4, 2, 3])[:, None]


def test_the_likelihood_of_each_row_is_that_of_the_row_alone(llm: FrozenLLM) -> None:
    """Written out with transformers' own call, one row at a time, without any padding."""
    prefix, real = prefixes()
    found = llm.nll(prefix, real, TEXTS)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[*llm.encode(text), llm.end_id]])
        own = prefix[row : row + 1, real[row]]
        embedded = torch.cat([own, llm.model.get_input_embeddings()(ids)], dim=1)
        logits = llm.model(inputs_embeds=embedded).logits[0, own.shape[1] - 1 : -1]
        nats = F.cross_entropy(logits, ids[0], reduction="sum")
        torch.testing.assert_close(found.nats[row], nats, atol=1e-4, rtol=0)
        assert found.tokens[row] == ids.shape[1]


def test_only_what_made_the_prefix_learns(llm: FrozenLLM) -> None:
    before = {name: weight.clone() for name, weight in llm.model.state_dict().items()}
    prefix, real = prefixes()
    prefix.requires_grad_()
    llm.nll(prefix, real, TEXTS).nats.sum().backward()
    assert prefix.grad is not None
    assert (prefix.grad[real].abs().sum(dim=-1) > 0).all() and not prefix.grad[~real].any()
    assert all(weight.grad is None for weight in llm.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in llm.model.state_dict().items())


def test_the_projector_joins_neighbours_and_ignores_padding() -> None:
    torch.manual_seed(0)
    projector = Projector(4, 6, stride=3)
    features = torch.randn(2, 8, 4)
    out, real = projector(features, torch.tensor([8, 4]))
    assert out.shape == (2, 3, 6) and real.tolist() == [[True, True, True], [True, True, False]]
    changed = features.clone()
    changed[1, 4:] += 100
    assert torch.equal(projector(changed, torch.tensor([8, 4]))[0], out)
    changed[1, 3] += 1
    again = projector(changed, torch.tensor([8, 4]))[0]
    assert torch.equal(again[1, 0], out[1, 0]) and not torch.equal(again[1, 1], out[1, 1])


def test_a_folder_of_ours_is_read_back(llm: FrozenLLM, tmp_path: Path) -> None:
    llm.model.save_pretrained(tmp_path, safe_serialization=True)
    tiny_text().save(tmp_path)
    loaded = load_llm(str(tmp_path))
    prefix, real = prefixes()
    torch.testing.assert_close(loaded.nll(prefix, real, TEXTS).nats, llm.nll(prefix, real, TEXTS).nats)


def test_what_cannot_serve_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(str(tmp_path / "nowhere"))
    pieces = tiny_text()
    tiny_llama(pieces.vocab_size - 7).save_pretrained(tmp_path, safe_serialization=True)
    pieces.save(tmp_path)
    with pytest.raises(UserError, match=f"embeds {pieces.vocab_size - 7} tokens, but its tokenizer has") as caught:
        load_llm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_unpickled_weights_are_never_read(llm: FrozenLLM, tmp_path: Path) -> None:
    llm.model.config.save_pretrained(tmp_path)
    torch.save(llm.model.state_dict(), tmp_path / "pytorch_model.bin")
    tiny_text().save(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(str(tmp_path))
