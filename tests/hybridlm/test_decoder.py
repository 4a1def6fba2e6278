import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from hybridlm.cache import KeyValueCache
from hybridlm.decoder import Attention, Decoder, attention_backend
from tests.support.tiny_frames import tiny_config


def _llama(config):
    torch.manual_seed(1)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=config.hidden_dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_epsilon,
            rope_theta=config.rope_theta,
            max_position_embeddings=64,
        )
    ).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return llama


@pytest.fixture
def pair():
    config = tiny_config()
    llama = _llama(config)
    decoder = Decoder(config).eval()
    decoder.load_llama(llama.state_dict())
    return decoder, llama


def test_states_are_those_of_a_llama_with_the_same_weights(pair):
    decoder, llama = pair
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        ours = decoder(x, torch.arange(10).expand(2, -1)).states
        theirs = llama(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_left_padded_states_are_those_of_llama_without_the_padding(pair):
    decoder, llama = pair
    x = torch.randn(2, 10, 32)
    mask = torch.arange(10) >= torch.tensor([[0], [4]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = decoder(x, positions, key_mask=mask).states
        torch.testing.assert_close(ours[:1], llama(inputs_embeds=x[:1]).last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[1:, 4:], llama(inputs_embeds=x[1:, 4:]).last_hidden_state, rtol=0, atol=1e-5)
    assert ours.isfinite().all()


def test_a_wrong_size_of_llama_is_refused(pair):
    decoder, _ = pair
    with pytest.raises(RuntimeError):
        decoder.load_llama(_llama(tiny_config(ffn_dim=64)).state_dict())


@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 6), (3, 9)])
def test_the_cache_gives_the_states_of_the_whole(chunks):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).eval()
    x = torch.randn(2, 12, 32)
    mask = torch.arange(12) >= torch.tensor([[0], [2]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = decoder(x, positions, key_mask=mask).states
        cache, parts, at = KeyValueCache.empty(), [], 0
        for size in chunks:
            part = slice(at, at + size)
            parts.append(decoder(x[:, part], positions[:, part], key_mask=mask[:, part], cache=cache).states)
            at += size
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_outgrows_its_first_buffer(padded):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config(num_layers=1, alignment_layer=0)).eval()
    x = torch.randn(2, 516, 32)
    mask = torch.arange(516) >= torch.tensor([[0], [3 * padded]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = decoder(x, positions, key_mask=mask if padded else None).states
        cache = KeyValueCache.empty()
        decoder(x[:, :250], positions[:, :250], key_mask=mask[:, :250] if padded else None, cache=cache)
        decoder(x[:, 250:500], positions[:, 250:500], cache=cache)
        for t in range(500, 516):
            last = decoder(x[:, t : t + 1], positions[:, t : t + 1], cache=cache).states
            torch.testing.assert_close(last[:, 0], whole[:, t], rtol=0, atol=1e-5)


def test_selected_rows_of_a_cache_go_on_alone():
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).eval()
    x, positions = torch.randn(3, 6, 32), torch.arange(6).expand(3, -1)
    with torch.no_grad():
        cache = KeyValueCache.empty()
        decoder(x[:, :5], positions[:, :5], key_mask=torch.ones(3, 5, dtype=torch.bool), cache=cache)
        rows = torch.tensor([2, 0, 2])
        chosen = decoder(x[rows, 5:], positions[rows, 5:], cache=cache.select(rows)).states
        whole = decoder(x, positions).states
    torch.testing.assert_close(chosen[:, 0], whole[rows, 5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_written_out_for_training_in_bfloat16_equals_the_kernel(padded):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).train()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # attention that matters
    x, positions = torch.randn(2, 9, 32), torch.arange(9).expand(2, -1)
    mask = torch.arange(9) >= torch.tensor([[0], [3]]) if padded else None
    with torch.autocast("cpu", torch.bfloat16):
        trained = decoder(x, positions, key_mask=mask).states.float()
        with torch.no_grad():
            kernel = decoder(x, positions, key_mask=mask).states.float()
    exact = decoder(x, positions, key_mask=mask).states
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask
    assert (trained - kernel)[real].abs().mean() < 0.01
    assert (trained - exact)[real].abs().mean() < 0.01
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_the_kernel_is_chosen_once_and_can_be_read(monkeypatch):
    decoder = Decoder(tiny_config())
    expected = "sdpa" if not torch.cuda.is_available() or "flash_attn" not in sys.modules else "flash-attn"
    assert decoder.attention == expected
    assert {layer.attention.backend for layer in decoder.layers} == {decoder.attention}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    attention_backend.cache_clear()
    try:
        assert attention_backend() == "flash-attn"
        assert Attention(tiny_config(), 0).backend == "flash-attn"
    finally:
        attention_backend.cache_clear()
