"""Folders and hub ids of published codecs: their layouts, and every way in which they can be wrong, in one line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tokenizer_layouts import PUBLISHED
from hybridlm.checkpoint import resolve
from tests.support.tiny_codecs import CHUNKED, CODECS, save_tiny_codec
from tokenizer.errors import UserError
from tokenizer.huggingface import HuggingFaceTokenizer
from tokenizer.huggingface_codec import HuggingFaceConfig, build_codec
from tokenizer.huggingface_weights import fold, own_weights
from tokenizer.loading import load_tokenizer
from tokenizer.streaming import lookahead


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_codec(tmp_path / "codec", "dac")


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "facebook/encodec_24khz": {
        "encoder.layers.0.conv.weight": (32, 1, 7),
        "encoder.layers.12.conv.weight": (512, 256, 16),
        "encoder.layers.13.lstm.weight_ih_l1": (2048, 512),
        "encoder.layers.15.conv.weight": (128, 512, 7),
        "quantizer.layers.31.codebook.embed": (1024, 128),
        "decoder.layers.3.conv.weight": (512, 256, 16),
        "decoder.layers.15.conv.bias": (1,),
    },
    "facebook/encodec_48khz": {
        "encoder.layers.0.conv.weight": (32, 2, 7),
        "encoder.layers.0.norm.weight": (32,),
        "encoder.layers.15.norm.bias": (128,),
        "quantizer.layers.15.codebook.embed": (1024, 128),
        "decoder.layers.15.conv.weight": (2, 32, 7),
        "decoder.layers.15.norm.weight": (2,),
    },
    "kyutai/mimi": {
        "encoder.layers.0.conv.weight": (64, 1, 7),
        "encoder.layers.14.conv.weight": (512, 1024, 3),
        "encoder_transformer.layers.7.self_attn.q_proj.weight": (512, 512),
        "encoder_transformer.layers.0.mlp_layer_scale.scale": (512,),
        "downsample.conv.weight": (512, 512, 4),
        "quantizer.semantic_residual_vector_quantizer.input_proj.weight": (256, 512, 1),
        "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": (2048, 256),
        "quantizer.acoustic_residual_vector_quantizer.layers.30.codebook.cluster_usage": (2048,),
        "upsample.conv.weight": (512, 1, 4),
        "decoder_transformer.layers.7.mlp.fc1.weight": (2048, 512),
        "decoder.layers.14.conv.weight": (1, 64, 3),
    },
    "descript/dac_44khz": {
        "encoder.conv1.weight": (64, 1, 7),
        "encoder.block.3.conv1.weight": (1024, 512, 16),
        "encoder.block.0.res_unit3.snake1.alpha": (1, 64, 1),
        "quantizer.quantizers.8.codebook.weight": (1024, 8),
        "quantizer.quantizers.0.in_proj.weight": (8, 1024, 1),
        "decoder.block.0.conv_t1.weight": (1536, 768, 16),
        "decoder.conv2.weight": (1, 96, 7),
    },
    "descript/dac_16khz": {
        "encoder.block.2.conv1.weight": (512, 256, 10),
        "quantizer.quantizers.11.codebook.weight": (1024, 8),
    },
    "descript/dac_24khz": {"quantizer.quantizers.31.out_proj.weight": (1024, 8, 1)},
}
FACTS = {  # sampling rate, hop, codebooks, codebook size, width of the latents, look-ahead
    "facebook/encodec_24khz": (24000, 320, 32, 1024, 128, 6),
    "facebook/encodec_48khz": (48000, 320, 17, 1024, 129, 149),
    "kyutai/mimi": (24000, 1920, 32, 2048, 512, 0),
    "descript/dac_44khz": (44100, 512, 9, 1024, 1024, 8),
    "descript/dac_16khz": (16000, 320, 12, 1024, 1024, 8),
    "descript/dac_24khz": (24000, 320, 32, 1024, 1024, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(name: str) -> None:
    tensors = TENSORS[name]
    with torch.device("meta"):
        codec, _, rename = build_codec(HuggingFaceConfig(codec=PUBLISHED[name]))
    weights = own_weights(codec.model, rename)
    assert {key: tuple(weights[key].shape) for key in tensors} == tensors
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not any(part in key for key in weights for part in ("original", "weight_g", "cluster_size", "inited"))
    ahead = lookahead(codec.encoder(), codec.hop_length)
    sizes = (codec.num_codebooks, codec.codebook_size, codec.latent_dim)
    assert (codec.sample_rate_hz, codec.hop_length, *sizes, ahead) == FACTS[name]


@pytest.mark.parametrize("name", CODECS)
def test_our_files_have_the_names_of_published_ones(name: str, tmp_path: Path) -> None:
    published = save_tiny_codec(tmp_path / "published", name)
    HuggingFaceTokenizer.pretrained(str(published)).save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / which / "model.safetensors") for which in ("ours", "published"))
    unused = ("inited", "initialized", "cluster_size", "embed_avg")
    assert set(ours) == {key for key in fold(theirs) if not key.endswith(unused)}


def test_both_names_of_weight_normalization(tmp_path: Path) -> None:
    folder = save_tiny_codec(tmp_path, "encodec")
    before = HuggingFaceTokenizer.pretrained(str(folder)).fingerprint()
    weights = load_file(folder / "model.safetensors")
    names = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    renamed = {}
    for key, tensor in weights.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    assert set(renamed) != set(weights)
    save_file(renamed, folder / "model.safetensors")
    assert HuggingFaceTokenizer.pretrained(str(folder)).fingerprint() == before


def test_half_precision_weights_are_widened(folder: Path) -> None:
    weights = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = HuggingFaceTokenizer.pretrained(str(folder))
    assert tokenizer.encode(torch.zeros(1, 1, 80)).latents.dtype == torch.float32


def test_a_hub_id_is_downloaded_without_pickles_or_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, **options: Any) -> str:
        asked[name] = options
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_tokenizer("hf:descript/dac_44khz").sample_rate_hz == 44100
    assert asked == {"descript/dac_44khz": {"allow_patterns": ["config.json", "model.safetensors"]}}


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    message = refusal("hf:facebook/encodec_24khz")
    assert "'hf:facebook/encodec_24khz' is no folder here" in message
    assert "(LocalEntryNotFoundError); offline, put its config.json and model.safetensors into a folder" in message


def test_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    for name in ("hf:", "hf:mimi", f"hf:{tmp_path / 'absent'}", "hf:./a/b", "hf:../b"):
        assert "no such folder, and no hub id either (OWNER/NAME)" in refusal(name)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refusal(f"hf:{folder}")


def test_an_unsupported_model_says_which_are_supported(folder: Path) -> None:
    change(folder, model_type="wav2vec2")
    message = refusal(f"hf:{folder}")
    assert "model_type='wav2vec2' is none of the supported codecs 'encodec', 'mimi', 'dac'" in message


def test_the_prefix_is_asked_for(folder: Path) -> None:
    assert f"(model_type='dac'); give its folder as hf:{folder}" in refusal(folder)


def test_a_tokenizer_is_no_model() -> None:
    with pytest.raises(UserError, match="'hf:kyutai/mimi' is a tokenizer, not a model"):
        resolve("hf:kyutai/mimi")


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("encodec", {"audio_channels": 2}, "audio_channels=2, norm_type='weight_norm'"),
        ("encodec", {"norm_type": "time_group_norm"}, "audio_channels=1, norm_type='time_group_norm'"),
        ("encodec", {"normalize": True}, "normalize=True, chunk_length_s=None"),
        ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "normalize=False, chunk_length_s=1.0"),
        ("mimi", {"use_causal_conv": False}, "use_causal_conv=False"),
        ("mimi", {"codebook_size": 17}, "no mimi codec can be made of this configuration"),
        ("dac", {"codebook_size": 17}, "The codebook_size must be a power of 2"),
        ("dac", {"n_codebooks": "nine"}, "no dac codec can be made of this configuration"),
    ],
)
def test_configurations_that_do_not_work(name: str, settings: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = save_tiny_codec(tmp_path, name)
    change(folder, **settings)
    message = refusal(f"hf:{folder}")
    assert found in message
    assert str(folder / "config.json") in message


def test_chunks_of_the_48_khz_layout_must_be_whole_frames(tmp_path: Path) -> None:
    folder = save_tiny_codec(tmp_path, CHUNKED)
    change(folder, chunk_length_s=0.0051)
    assert "chunk_length_s=0.0051 is 81 samples, but must be a multiple of 8" in refusal(f"hf:{folder}")
    with pytest.raises(UserError, match="num_codebooks=1 must be at least 2: the first codebook"):
        HuggingFaceTokenizer.pretrained(str(folder), num_codebooks=1)


def test_missing_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "model.safetensors are cut short" in refusal(f"hf:{folder}")
    weights.unlink()
    assert "model.safetensors are missing" in refusal(f"hf:{folder}")


def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled a file of unknown content"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds pytorch_model.bin but no model.safetensors; pickles are never read" in refusal(f"hf:{folder}")


def test_foreign_weights(folder: Path, tmp_path: Path) -> None:
    foreign = save_tiny_codec(tmp_path / "mimi", "mimi")
    (foreign / "model.safetensors").rename(folder / "model.safetensors")
    assert "model.safetensors lack 'encoder.conv1.weight'" in refusal(f"hf:{folder}")


def test_weights_of_another_shape(folder: Path) -> None:
    change(folder, encoder_hidden_size=8)
    message = refusal(f"hf:{folder}")
    assert "'encoder.conv1.weight' has shape (4, 1, 7), but config.json asks for (8, 1, 7)" in message


def test_too_many_codebooks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_codebooks=5 must be from 1 to 4"):
        HuggingFaceTokenizer.pretrained(str(folder), num_codebooks=5)
    HuggingFaceTokenizer.pretrained(str(folder), num_codebooks=2).save(tmp_path / "few")
    change(tmp_path / "few", num_codebooks=3)
    assert "lack 'quantizer.quantizers.2." in refusal(tmp_path / "few")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks=0 must be at least 1"),
        ({"n_fft": 4}, "n_fft=4 must be at least 8"),
        ({"num_mels": 0}, "num_mels=0 must be at least 1"),
        ({"num_mels": 900}, "num_mels=900 leaves bands empty"),
        ({"num_mel": 80}, "unknown key 'num_mel'; did you mean 'num_mels'?"),
        ({"codec": {"model_type": "speech"}}, "codec: model_type='speech' is none of the supported codecs"),
        ({"codec": 3}, "must be a mapping"),
    ],
)
def test_settings_of_a_saved_tokenizer(settings: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    HuggingFaceTokenizer.pretrained(str(folder)).save(tmp_path / "saved")
    change(tmp_path / "saved", **settings)
    assert message in refusal(tmp_path / "saved")


def test_without_the_package_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "needs the package transformers; install hybridlm[hf]" in refusal(f"hf:{folder}")


def test_an_old_version_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    assert "transformers 5.9.1 must be 5.23 or newer for dac; install hybridlm[hf]" in refusal(f"hf:{folder}")
