"""A model's folder: what is written is read back, what is damaged is told in one line, what was there is not lost."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridlm.checkpoint import describe, load_codec, load_model, resolve, save_model
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import TAGS, tiny_model, tiny_text, tiny_tokenizer
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.loading import resolve_device


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_layout_is_the_documented_one(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
        "text.model",
        "README.md",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_weights_return_as_float32_rounded_to_bfloat16(folder: Path) -> None:
    loaded, original = load_model(folder), tiny_model().model
    expected = {name: tensor.bfloat16().float() for name, tensor in original.state_dict().items()}
    assert loaded.model.config == original.config
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name


def test_saving_again_gives_the_same_bytes_and_full_precision_is_kept_on_request(folder: Path, tmp_path: Path) -> None:
    again = save_tiny_model(tmp_path / "again")
    assert contents(folder) == contents(again)
    model = tiny_model().model
    save_model(tmp_path / "exact", model, tiny_tokenizer(), tiny_text(), dtype=torch.float32)
    exact = load_model(tmp_path / "exact").model.state_dict()
    assert all(torch.equal(exact[name], tensor) for name, tensor in model.state_dict().items())


def test_text_and_tokenizer_come_back(folder: Path) -> None:
    loaded = load_model(folder)
    assert sorted(loaded.text.tags) == sorted(TAGS)
    assert loaded.text.encode("Good morning.", ["speech"]) == tiny_text().encode("Good morning.", ["speech"])
    assert load_codec(folder).fingerprint() == loaded.tokenizer.fingerprint()
    assert load_codec(folder / "tokenizer").fingerprint() == loaded.tokenizer.fingerprint()


def test_an_existing_folder_is_replaced(folder: Path) -> None:
    before = contents(folder)
    save_tiny_model(folder, stop_bias=1.0)
    after = contents(folder)
    assert before.keys() == after.keys()
    assert before["model.safetensors"] != after["model.safetensors"]
    load_model(folder)


@pytest.mark.parametrize("name", ["hybridlm.checkpoint.save_file", "hybridlm.folder._move_into_place"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr(name, full)
    with pytest.raises(UserError, match=r"can't write .* \(No space left on device\).*unchanged"):
        save_tiny_model(folder, stop_bias=1.0)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_weights_of_another_save_are_told(folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", stop_bias=1.0)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="two different models"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_weights_cut_short_are_told(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="cut short or damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "text.model", "tokenizer/config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=Path(name).name):
        load_model(folder)


def test_another_version_is_told(folder: Path) -> None:
    edit(folder / "config.json", format_version=99)
    with pytest.raises(UserError, match="format_version=99, but this hybridlm reads 1"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "not of a hybridlm model"),
        ('{"format": "hybridlm", "format_version": 1}', "lacks a valid 'model'"),
    ],
)
def test_a_damaged_config_is_told(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_bad_setting_in_the_config_is_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", model={**config["model"], "num_heads": 5})
    with pytest.raises(UserError, match="num_heads=5 must divide hidden_dim=32"):
        load_model(folder)
    edit(folder / "config.json", model={**config["model"], "num_layers": 4})
    with pytest.raises(UserError, match=r"doesn't fit its config\.json"):
        load_model(folder)


def test_another_tokenizer_is_told(folder: Path) -> None:
    F3Tokenizer(tiny_tokenizer().config).save(folder / "tokenizer")
    with pytest.raises(UserError, match="copy the tokenizer that came with the model"):
        load_model(folder)


def test_describe_reads_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    facts = describe(folder)
    assert facts["num_parameters"] == sum(p.numel() for p in tiny_model().model.parameters())
    assert sorted(facts["tags"]) == sorted(TAGS)
    assert facts["type"] == "model (hybrid)"
    assert "Random weights" in facts["card"]
    assert describe(folder / "tokenizer")["type"] == "tokenizer (f3)"


def test_names_that_lead_nowhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such model folder: 'nowhere'"):
        resolve("nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "file")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"'someone/model' .* offline, put config\.json, model\.safetensors"):
        resolve("someone/model")


def test_a_hub_id_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(folder))
    assert resolve("someone/model") == folder


def test_devices_that_are_not_there_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device='cuda' asked for, but this machine has no usable CUDA device; use cpu"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="device='cuda' asked for"):
        load_model(folder, "cuda")
    with pytest.raises(UserError, match="device='gpu' is no device"):
        resolve_device("gpu")
