"""Tokenizer folders: both types come back, and every way a folder can be wrong is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenizer.encodec import EncodecConfig, EncodecTokenizer
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.f3_network import F3Config
from tokenizer.loading import load_tokenizer, read_weights, write_folder


@pytest.fixture(scope="module")
def encodec() -> EncodecTokenizer:
    return EncodecTokenizer.random(EncodecConfig(num_codebooks=2, start="silence"))


@pytest.fixture
def folder(encodec: EncodecTokenizer, tmp_path: Path) -> Path:
    encodec.save(tmp_path / "codec")
    return tmp_path / "codec"


def change(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def refusal(folder: str | Path, device: str = "cpu") -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, device)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_encodec(folder: Path, encodec: EncodecTokenizer) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, EncodecTokenizer)
    assert tokenizer.fingerprint() == encodec.fingerprint()


def test_f3(tmp_path: Path) -> None:
    sizes = {"encoder_dim": 16, "decoder_dim": 16, "frame_dim": 16, "encoder_blocks": 1, "decoder_blocks": 1}
    saved = F3Tokenizer(F3Config(**sizes, codebook_size=16))
    saved.save(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, F3Tokenizer)
    assert tokenizer.fingerprint() == saved.fingerprint()


def test_a_model_s_folder_stands_for_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_dim": 8}')
    folder.rename(model / "tokenizer")
    assert load_tokenizer(model).name == "encodec"


@pytest.mark.parametrize(("name", "start"), [("encodec", "reflect"), ("encodec-causal", "silence")])
def test_names(
    name: str, start: str, encodec: EncodecTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EncodecTokenizer.random().save(tmp_path)
    monkeypatch.setenv("HYBRIDLM_ENCODEC", str(tmp_path / "model.safetensors"))
    tokenizer = load_tokenizer(name)
    assert isinstance(tokenizer, EncodecTokenizer)
    assert tokenizer.config == EncodecConfig(start=start)  # type: ignore[arg-type]


def test_no_such_folder(tmp_path: Path) -> None:
    assert "'encodec' or 'encodec-causal'" in refusal(tmp_path / "absent")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"encodec"'])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder)


def test_unknown_type_names_the_nearest(folder: Path) -> None:
    change(folder, type="encodek")
    assert "did you mean 'encodec'?" in refusal(folder)
    change(folder, type="f33")
    assert "did you mean 'f3'?" in refusal(folder)


def test_other_version(folder: Path) -> None:
    change(folder, format_version=2)
    assert "format_version=2" in refusal(folder)


def test_unknown_setting_names_the_nearest(folder: Path) -> None:
    change(folder, num_codebook=2)
    assert "unknown key 'num_codebook'; did you mean 'num_codebooks'?" in refusal(folder)


@pytest.mark.parametrize("kind", ["encodec", "f3"])
def test_weights_cut_short(folder: Path, kind: str) -> None:
    if kind == "f3":
        (folder / "config.json").write_text('{"type": "f3", "format_version": 1}')
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors are cut short" in refusal(folder)
    weights.write_bytes(b"")
    assert "model.safetensors are cut short" in refusal(folder)
    weights.unlink()
    assert "model.safetensors are missing" in refusal(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    change(folder, num_codebooks=3)
    assert "lack 'quantizer.vq.layers.2._codebook.embed'" in refusal(folder)
    weights = read_weights(folder / "model.safetensors")
    weights["decoder.model.0.conv.conv.bias"] = torch.zeros(3)
    write_folder(folder, {"type": "encodec"}, weights)
    change(folder, num_codebooks=2)
    assert "'decoder.model.0.conv.conv.bias' has shape (3,), but must have (512,)" in refusal(folder)


def test_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable CUDA device; use cpu" in refusal(folder, "cuda")
    assert "is no device" in refusal(folder, "gpu")


def test_a_folder_that_can_t_be_written(encodec: EncodecTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        encodec.save(tmp_path / "file" / "codec")


def test_an_interrupted_save_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenizer.loading.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        EncodecTokenizer.random(EncodecConfig(num_codebooks=2), seed=5).save(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
