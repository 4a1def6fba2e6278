"""Random Llamas, Qwen2s and Qwen3s as `transformers` publishes them, each with a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_audio_model import SENTENCES

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
}


def tiny_words() -> Tokenizer:
    """Byte-level pieces, of which the last is a special one, as in the published tokenizers."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    words.add_special_tokens(["<|endoftext|>"])
    return words


def save_tiny_backbone(folder: Path, name: str = "qwen2", *, shard: str = "5GB", **changes: Any) -> PreTrainedModel:
    """Write `config.json`, safetensors and `tokenizer.json`; returns the model, whose every weight is random."""
    family, settings = BACKBONES[name]
    words = tiny_words()
    rows = words.get_vocab_size() + 7  # published tables are longer than their vocabulary
    config = AutoConfig.for_model(family, **{**SIZES, **settings, "vocab_size": rows, **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    words.save(str(folder / "tokenizer.json"))
    return model
