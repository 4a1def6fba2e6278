"""Published text models as decoders: the same numbers as `transformers`, and one line for what can't be taken over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm.backbone import Backbone
from hybridlm.checkpoint import load_model, save_model
from hybridlm.config import ModelConfig
from hybridlm.decoder import KeyValueCache
from hybridlm.model import HybridLM
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.tiny_backbones import BACKBONES, save_tiny_backbone
from tokenizer.errors import UserError
from tokenizer.huggingface_text import HuggingFaceText

HEADS = {
    **{"num_codebooks": 3, "codebook_size": 32, "latent_dim": 8, "code_embedding_dim": 16, "depth_dim": 16},
    **{"depth_layers": 1, "depth_ffn_dim": 32, "latent_head_dim": 16, "latent_head_layers": 1},
    **{"latent_head_ffn_dim": 32, "short_context_dim": 16, "alignment_layer": 1},
}


def taken_over(folder: Path) -> tuple[HybridLM, HuggingFaceText]:
    backbone = Backbone.open(f"hf:{folder}")
    text = backbone.text(["speech", "music"])
    sizes: dict[str, Any] = {**HEADS, **backbone.fields}
    model = HybridLM(ModelConfig(vocab_size=text.vocab_size, first_text_id=text.first_text_id, **sizes)).eval()
    backbone.fill(model, text)
    return model, text


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_tiny_backbone(tmp_path, name)
    model, text = taken_over(tmp_path)
    prefix = torch.tensor([text.encode("good morning, how are you?")[:-1] * 3])
    words = prefix - text.first_text_id
    expected = theirs(words, output_hidden_states=True, use_cache=False)

    x, positions = model.text_embedding(prefix), torch.arange(prefix.shape[1])[None]
    states = model.decoder(x, positions).states
    torch.testing.assert_close(states, expected.hidden_states[-1], rtol=0, atol=1e-5)
    output = theirs.get_output_embeddings()
    torch.testing.assert_close(output(states), expected.logits, rtol=0, atol=1e-5)

    cache, at = KeyValueCache.empty(), 0
    for size in (5, 1, 1, prefix.shape[1] - 7):
        part = slice(at, at + size)
        states = model.decoder(x[:, part], positions[:, part], cache=cache).states
        torch.testing.assert_close(states, expected.hidden_states[-1][:, part], rtol=0, atol=1e-5)
        at += size


@torch.no_grad()
def test_shards_give_the_same_as_one_file(tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path / "one")
    save_tiny_backbone(tmp_path / "many", shard="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one, many = taken_over(tmp_path / "one")[0], taken_over(tmp_path / "many")[0]
    for name, parameter in one.decoder.named_parameters():
        assert torch.equal(parameter, many.decoder.get_parameter(name)), name


@torch.no_grad()
def test_tags_and_padding_get_rows_of_their_own(tmp_path: Path) -> None:
    theirs = save_tiny_backbone(tmp_path)
    model, text = taken_over(tmp_path)
    table, words = model.text_embedding.weight, theirs.get_input_embeddings().weight
    first = text.first_text_id
    assert first == 4 and (text.pad_id, text.audio_id, text.tag_id("music")) == (0, 1, 3)
    assert torch.equal(table[first:], words[: text.num_pieces])
    assert len({tuple(row.tolist()) for row in table[:first]}) == first
    torch.testing.assert_close(table[:first].std(), words.std(), rtol=0.3, atol=0)


def test_a_folder_of_the_configuration_before_version_five_is_read(tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path, "llama 3.1")
    now = Backbone.open(f"hf:{tmp_path}").fields
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Backbone.open(f"hf:{tmp_path}").fields == now
    assert now["rope_scaling"].factor == 8.0


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "model_type='qwen3_moe'"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, "rope scaling 'linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_in_one_line(
    changes: dict[str, Any], feature: str, tmp_path: Path
) -> None:
    save_tiny_backbone(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        Backbone.open(f"hf:{tmp_path}")
    assert f"{feature} is not supported" in str(caught.value) and "Llama, Qwen2 and Qwen3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    theirs = save_tiny_backbone(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds pytorch_model\.bin but no model\.safetensors; pickles are never read"):
        taken_over(tmp_path)


def test_damaged_folders_are_told_in_one_line(tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for change, message in (
        ({}, "lack 'layers.1.mlp.down_proj.weight'"),
        ({name: weights[name][:, :5].contiguous()}, "do not fit its config.json"),
        ({name: weights[name], "model.embed_tokens.weight": torch.zeros(9, 32)}, "do not serve 291 pieces"),
    ):
        rest = {key: tensor for key, tensor in weights.items() if key != name}
        save_file({**rest, **change}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message) as caught:
            taken_over(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="must be hf: and a hub id or folder"):
        Backbone.open(str(tmp_path))
    with pytest.raises(UserError, match="backbone 'hf:nowhere': no such folder"):
        Backbone.open("hf:nowhere")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Backbone.open(f"hf:{tmp_path}").text([])


def test_a_saved_model_loads_without_transformers(tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path / "published", "qwen3")
    model, text = taken_over(tmp_path / "published")
    save_model(tmp_path / "model", model, tiny_tokenizer(), text, dtype=torch.float32)
    loaded = load_model(tmp_path / "model")
    assert loaded.model.config == model.config
    assert loaded.text.encode("Good morning", ["music"]) == text.encode("Good morning", ["music"])
    code = (
        "import sys; sys.modules['transformers'] = None; from hybridlm.checkpoint import load_model; "
        f"print(load_model({str(tmp_path / 'model')!r}).text.vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(text.vocab_size)], done.stderr
