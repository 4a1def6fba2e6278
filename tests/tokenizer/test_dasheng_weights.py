"""Published checkpoints: names, shapes and precisions as published, the mapping to our modules, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load, save_file
from torch import Tensor

from tests.tokenizer.test_dasheng import audio
from tokenizer import dasheng_weights
from tokenizer.dasheng import DashengConfig, DashengTokenizer
from tokenizer.dasheng_encoder import DashengEncoder
from tokenizer.dasheng_weights import (
    encoder_config,
    load_published_tokenizer,
    load_semantic_encoder,
    rename,
    save_semantic_encoder,
    skipped,
    tokenizer_config,
)
from tokenizer.errors import UserError
from tokenizer.loading import load_tokenizer

FILES = ("config.json", "model.safetensors")
FULL_CONFIG = {
    "model_type": "dashengtokenizer",
    "embed_dim": 1280,
    "depth": 32,
    "num_heads": 16,
    "n_mels_patch": 128,
    "hop_length": 160,
    "upsample_tokens": 2,
    "decoder_dim": 1280,
    "decoder_embed_dim": 1280,
    "decoder_intermediate_size": 5120,
    "decoder_depth": 12,
    "istft_hop": 320,
    "istft_n_fft": 1280,
}
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_dim": 16, "decoder_embed_dim": 8}
SMALL_CONFIG: dict[str, Any] = {**FULL_CONFIG, **SMALL, "decoder_intermediate_size": 24, "decoder_depth": 2}


def encoder_shapes(prefix: str, dim: int, depth: int, sequence: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published Dasheng encoder; all are float32 but the batch count, int64."""
    bn = f"{prefix}init_bn.1" if sequence else f"{prefix}init_bn"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}time_pos_embed": (1, dim, 1, 252),
        f"{prefix}freq_pos_embed": (1, dim, 1, 1),
        f"{bn}.weight": (64,),
        f"{bn}.bias": (64,),
        f"{bn}.running_mean": (64,),
        f"{bn}.running_var": (64,),
        f"{bn}.num_batches_tracked": (),
        f"{prefix}patch_embed.proj.weight": (dim, 1, 64, 4),
        f"{prefix}patch_embed.proj.bias": (dim,),
        f"{prefix}norm.weight": (dim,),
        f"{prefix}norm.bias": (dim,),
    }
    for layer in range(depth):
        block = f"{prefix}blocks.{layer}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for name, out_dim, in_dim in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes |= {f"{block}.{name}.weight": (out_dim, in_dim), f"{block}.{name}.bias": (out_dim,)}
    return shapes


def tokenizer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published DashengTokenizer."""
    dim, width, inside = config["embed_dim"], config["decoder_embed_dim"], config["decoder_intermediate_size"]
    shapes = encoder_shapes("encoder.model.", dim, config["depth"])
    shapes |= {
        "encoder.model.front_end.0.spectrogram.window": (512,),
        "encoder.model.front_end.0.mel_scale.fb": (257, 64),
        "encoder.front_end.mel_spec.spectrogram.window": (1024,),
        "encoder.front_end.mel_spec.mel_scale.fb": (513, 128),
        "encoder.patch_embed.weight": (dim, 1, 128, 4),
        "encoder.patch_embed.bias": (dim,),
        "encoder.norm.weight": (dim,),
        "encoder.norm.bias": (dim,),
        "upsampler.weight": (dim, dim, 2),
        "upsampler.bias": (dim,),
        "decoder.backbone.embed.weight": (width, dim, 7),
        "decoder.backbone.embed.bias": (width,),
        "decoder.head.out.weight": (1282, width),
        "decoder.head.out.bias": (1282,),
        "decoder.head.istft.window": (1280,),
    }
    for name in ("norm", "final_layer_norm"):
        shapes |= {f"decoder.backbone.{name}.weight": (width,), f"decoder.backbone.{name}.bias": (width,)}
    for layer in range(config["decoder_depth"]):
        block = f"decoder.backbone.convnext.{layer}"
        shapes |= {f"{block}.dwconv.weight": (width, 1, 7), f"{block}.dwconv.bias": (width,)}
        shapes |= {f"{block}.norm.weight": (width,), f"{block}.norm.bias": (width,), f"{block}.gamma": (width,)}
        shapes |= {f"{block}.pwconv1.weight": (inside, width), f"{block}.pwconv1.bias": (inside,)}
        shapes |= {f"{block}.pwconv2.weight": (width, inside), f"{block}.pwconv2.bias": (width,)}
    return shapes


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of these shapes, with the constants that torchaudio and Vocos store."""
    generator = torch.Generator().manual_seed(seed)
    weights = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key in weights:
        if key.endswith("running_var"):
            weights[key] = weights[key].abs() + 10.0
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
        if key.endswith("window"):
            weights[key] = torch.hann_window(len(weights[key]))
    for key, n_fft, bands in (("encoder.model.front_end.0", 512, 64), ("encoder.front_end.mel_spec", 1024, 128)):
        if f"{key}.mel_scale.fb" in weights:
            mel = torchaudio.transforms.MelSpectrogram(16000, n_fft, hop_length=160, n_mels=bands)
            weights[f"{key}.mel_scale.fb"] = mel.mel_scale.fb
    return weights


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def contents(folder: Path) -> dict[str, Tensor]:
    """The weights, in memory: a mapped file must not be written over."""
    return load((folder / "model.safetensors").read_bytes())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write(tmp_path / "published", SMALL_CONFIG, random(tokenizer_shapes(SMALL_CONFIG)))


def refusal(folder: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_published_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_published_layout_is_ours_at_full_size() -> None:
    """Every published tensor has a place of its shape, and nothing of ours is left but the way to latents and codes."""
    published = tokenizer_shapes(FULL_CONFIG)
    config = tokenizer_config(FULL_CONFIG, "test", None)
    assert config == DashengConfig(causal=False)
    with torch.device("meta"):
        ours = shapes_of(DashengTokenizer(config))
    assert {rename(key): shape for key, shape in published.items() if not skipped(key)} == {
        key: shape for key, shape in ours.items() if not key.startswith(("compress.", "expand.", "quantizer."))
    }
    assert sum(key in dasheng_weights.CONSTANTS for key in published) == 5


@pytest.mark.parametrize(
    ("name", "dim", "depth"), [("dasheng-base", 768, 12), ("dasheng-0.6B", 1280, 32), ("dasheng-1.2B", 1536, 40)]
)
def test_the_published_encoders_are_ours_at_full_size(name: str, dim: int, depth: int) -> None:
    with torch.device("meta"):
        ours = shapes_of(DashengEncoder(encoder_config({"model_type": "dasheng", "name": name}, "test")))
    published = encoder_shapes("encoder.", dim, depth)
    assert {rename(key).removeprefix("encoder."): shape for key, shape in published.items()} == ours


def test_every_published_tensor_arrives(published: Path) -> None:
    tokenizer = load_published_tokenizer(published, latent_dim=4, num_codebooks=2, codebook_size=8)
    weights = contents(published)
    found = {**tokenizer.state_dict(), **dict(tokenizer.named_buffers())}
    for key, value in weights.items():
        assert torch.allclose(found[dasheng_weights.CONSTANTS.get(key, rename(key))].float(), value.float(), atol=1e-6)
    assert not tokenizer.config.causal and tokenizer.latent_dim == 4
    frames = tokenizer.encode(audio(1, 6400))
    assert frames.features is not None
    assert tokenizer.decode_features(frames.features).shape == (1, 1, 6400)


def test_half_precision_and_shards(published: Path) -> None:
    weights = {k: v.bfloat16() if v.is_floating_point() else v for k, v in contents(published).items()}
    (published / FILES[1]).unlink()
    parts = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, published / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (published / f"{FILES[1]}.index.json").write_text(json.dumps({"weight_map": index}))
    tokenizer = load_published_tokenizer(published)
    assert tokenizer.upsampler.weight.dtype == torch.float32
    assert torch.equal(tokenizer.upsampler.weight.detach(), weights["upsampler.weight"].float())
    (published / names[1]).unlink()
    assert f"lack the shard {names[1]}" in refusal(published)


def test_an_encoder_of_its_own_and_one_inside_a_tokenizer(published: Path, tmp_path: Path) -> None:
    inside = load_semantic_encoder(published)
    weights = contents(published)
    renamed = {
        key.replace("encoder.model.", "encoder."): value
        for key, value in weights.items()
        if key.startswith("encoder.model.") and "front_end" not in key
    }
    config = {"model_type": "dasheng", "name": "dasheng-base", "encoder_kwargs": {**SMALL, "target_length": 1008}}
    alone = load_semantic_encoder(write(tmp_path / "alone", config, renamed))
    waveform = audio(1, 6400)[:, 0]
    assert torch.equal(alone(waveform), inside(waveform))
    assert not any(p.requires_grad for p in alone.parameters())
    save_semantic_encoder(alone, tmp_path / "saved")
    saved = load_semantic_encoder(tmp_path / "saved", window_frames=10)
    assert saved.time_pos_embed.shape == (1, 16, 1, 10)
    torch.testing.assert_close(saved(waveform), alone(waveform), atol=0.1, rtol=0.1)
    with pytest.raises(UserError, match="window_frames=253, but it has learned 252 positions"):
        load_semantic_encoder(tmp_path / "saved", window_frames=253)


def test_wrong_folders(published: Path, tmp_path: Path) -> None:
    weights = contents(published)
    short = (published / "model.safetensors").read_bytes()[:-100]
    (published / "model.safetensors").write_bytes(short)
    assert "cut short" in refusal(published)
    (published / "model.safetensors").unlink()
    assert "has no model.safetensors; only safetensors are read" in refusal(published)
    lacking = {key: value for key, value in weights.items() if key != "upsampler.bias"}
    assert "lack 'upsampler.bias'" in refusal(write(published, SMALL_CONFIG, lacking))
    assert "hold 'extra'" in refusal(write(published, SMALL_CONFIG, {**weights, "extra": torch.zeros(1)}))
    bent = {**weights, "encoder.norm.bias": torch.zeros(9)}
    assert "'encoder.norm.bias' has shape (9,), but must have (16,)" in refusal(write(published, SMALL_CONFIG, bent))
    whole = {**weights, "encoder.norm.bias": torch.zeros(16, dtype=torch.int32)}
    assert "must be of floating point" in refusal(write(published, SMALL_CONFIG, whole))
    other = {**weights, "decoder.head.istft.window": torch.ones(1280)}
    assert "has another front end" in refusal(write(published, SMALL_CONFIG, other))
    assert "istft_hop=160, but only 320" in refusal(write(published, {**SMALL_CONFIG, "istft_hop": 160}, weights))
    assert "model_type='bert'" in refusal(write(published, {"model_type": "bert"}, weights))
    (published / "config.json").unlink()
    assert "has no config.json" in refusal(published)
    assert "neither a folder nor a hub id" in refusal(tmp_path / "absent")
    with pytest.raises(UserError, match="is no Dasheng encoder"):
        load_semantic_encoder(write(published, {"model_type": "bert"}, weights))
    with pytest.raises(UserError, match="name='dasheng-big'"):
        load_semantic_encoder(write(published, {"model_type": "dasheng", "name": "dasheng-big"}, weights))


def test_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo_id: str, filename: str) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    message = refusal("mispeech/dashengtokenizer")
    assert "mispeech/dashengtokenizer: it is not in the cache and the hub can't be reached" in message
    assert "copy config.json and model.safetensors into a folder" in message


def test_a_hub_id_asks_for_the_expected_files(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(published / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_published_tokenizer("mispeech/dashengtokenizer")
    assert asked == [("mispeech/dashengtokenizer", name) for name in FILES]


@pytest.mark.parametrize("name", ["mispeech/dashengtokenizer", "folder"])
def test_published_weights_alone_are_no_tokenizer(name: str, published: Path) -> None:
    with pytest.raises(UserError, match=r"has no latents and codes yet; train them .*dasheng-published\.yaml"):
        load_tokenizer(published if name == "folder" else name)
