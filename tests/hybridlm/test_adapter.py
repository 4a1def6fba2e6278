"""Adapters: what `peft` makes of the files, the base untouched, several side by side, and what does not belong told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from hybridlm.adapter import (
    LoraConfig,
    adapter_names,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    use_adapter,
)
from hybridlm.checkpoint import Checkpoint, describe, load_model, save_model
from hybridlm.merge import run as merge
from hybridlm.model import HybridLM
from hybridlm.precision import pack
from sampling.pipeline import load
from tests.support.saved_model import save_tiny_model
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


def make_adapter(base: Path, folder: Path, seed: int = 0, rank: int = 4) -> Path:
    """An adapter with random weights in both factors."""
    found = load_model(base)
    add_lora(found.model, LoraConfig(rank=rank), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    assert found.base is not None
    save_adapter(folder, found.model, found.base, card="# Mine\n")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "mine")


@torch.no_grad()
def scores(model: HybridLM) -> torch.Tensor:
    """Nats of some frames, stream by stream."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    frames = AudioFrames(
        codes=torch.randint(config.codebook_size, (2, config.num_codebooks, 7), generator=generator),
        latents=torch.randn(2, 7, config.latent_dim, generator=generator),
        lengths=torch.tensor([7, 5]),
    )
    prefix = torch.tensor([[config.first_text_id + 3, config.first_text_id + 5, 2]] * 2)
    nll = model.nll(prefix, torch.ones_like(prefix, dtype=torch.bool), frames)
    return torch.cat([nll.codes.flatten(), nll.latents.flatten(), nll.stop.flatten()])


def test_an_adapter_starts_as_nothing_and_reaches_every_part(base: Path) -> None:
    found = load_model(base)
    before = scores(found.model)
    add_lora(found.model, LoraConfig(rank=2), seed=0)
    assert torch.equal(scores(found.model), before)
    reached = {name.split(".")[0] for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    assert reached == {
        *("text_embedding", "fusion", "decoder", "short_context", "code_head", "latent_head", "stop"),
    }
    assert not [n for n, p in found.model.named_parameters() if p.requires_grad and "lora_" not in n]


def test_the_random_numbers_of_the_program_are_left_alone(base: Path, adapter: Path) -> None:
    found = load_model(base)
    assert found.base is not None
    before = torch.get_rng_state()
    load_adapter(found.model, adapter, found.base)
    add_lora(found.model, LoraConfig(), seed=0, name="new")
    assert torch.equal(torch.get_rng_state(), before)
    assert adapter_names(found.model) == ["default", "new"]


def test_peft_reads_the_folder_as_its_own(base: Path, adapter: Path) -> None:
    ours = load_model(base, adapter=adapter).model
    plain = load_model(base).model
    theirs = peft.PeftModel.from_pretrained(plain, str(adapter)).base_model.model
    assert not torch.allclose(scores(ours), scores(load_model(base).model), atol=1e-2)
    assert torch.equal(scores(ours), scores(theirs))
    assert {file.name for file in adapter.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base.json", "README.md"),
    }


def test_several_side_by_side_and_the_base_exact(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(base, tmp_path / "other", seed=1, rank=2)
    alone = [load_model(base, adapter=folder).model for folder in (adapter, other)]
    plain = load_model(base).model
    for one in (*alone, plain):
        pack(one, "fp32")  # as `load` does
    model = load(base, adapter={"mine": adapter, "other": other})
    assert model.adapters == ["mine", "other"]
    assert torch.equal(scores(model.model), scores(alone[0]))
    model.use_adapter("other")
    assert torch.equal(scores(model.model), scores(alone[1]))
    model.use_adapter(None)
    assert torch.equal(scores(model.model), scores(plain))
    made = model.generate(tags=["music"], duration=0.4, seed=5).waveform
    assert torch.equal(made, load(base).generate(tags=["music"], duration=0.4, seed=5).waveform)
    model.use_adapter("mine")
    assert not torch.equal(made, model.generate(tags=["music"], duration=0.4, seed=5).waveform)
    with pytest.raises(UserError, match="no adapter 'his' is loaded; there are: mine, other"):
        model.use_adapter("his")
    with pytest.raises(UserError, match="adapter name 'mine' must be new"):
        model.add_adapter(adapter, "mine")


def test_a_folder_that_is_an_adapter_is_a_model(base: Path, adapter: Path) -> None:
    assert torch.equal(scores(load_model(adapter).model), scores(load_model(base, adapter=adapter).model))
    assert describe(adapter)["base"]["name"] == str(base)
    assert describe(base, adapter)["adapter"]["rank"] == 4
    with pytest.raises(UserError, match="is an adapter; give its base"):
        load_model(adapter, adapter=adapter)


def test_merging_gives_a_plain_model_of_the_same_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    found = load_model(tmp_path / "merged")
    assert not [module for module in found.model.modules() if type(module).__module__.startswith("peft")]
    assert found.model.state_dict().keys() == load_model(base).model.state_dict().keys()
    torch.testing.assert_close(scores(found.model), scores(load_model(adapter).model), rtol=1e-4, atol=1e-4)
    assert "merged into `model`" in (tmp_path / "merged/README.md").read_text()
    with pytest.raises(UserError, match="holds a model already"):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="is no adapter"):
        merge(base, tmp_path / "again")


def test_merging_with_none_in_use_leaves_the_base(base: Path, adapter: Path) -> None:
    model = load_model(base, adapter=adapter).model
    use_adapter(model, None)
    merge_adapter(model)
    plain = load_model(base).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_another_base_is_refused_and_both_are_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", stop_bias=1.0)
    with pytest.raises(UserError) as error:
        load_model(other, adapter=adapter)
    assert str(base) in str(error.value)
    assert str(other) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="was made for"):
        describe(other, adapter)
    moved = make_adapter(other, tmp_path / "lost")
    other.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is not there; give that model's folder"):
        load_model(moved)
    assert adapter_names(load_model(tmp_path / "elsewhere", adapter=moved).model) == ["default"]


def damaged(source: Path, folder: Path, kind: str) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    edits: dict[str, dict[str, Any]] = {
        "another method": {"peft_type": "IA3"},
        "modules to import": {"megatron_config": {"a": 1}, "megatron_core": "os"},
        "other layers": {"target_modules": ["qkv"]},
    }
    if kind in edits:
        config.write_text(json.dumps({**json.loads(config.read_text()), **edits[kind]}))
    elif kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no base":
        (folder / "base.json").unlink()
    elif kind == "other weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another method", "peft_type='IA3'"),
        ("modules to import", "megatron_con"),
        ("other layers", "does not fit"),
        ("weights cut short", "cut short or damaged"),
        ("no weights", "lacks adapter_model.safetensors"),
        ("no base", "lacks base.json"),
        ("other weights", "two different adapters"),
    ],
)
def test_damaged_folders_are_one_line_and_leave_the_model_as_it_was(
    base: Path, adapter: Path, tmp_path: Path, kind: str, message: str
) -> None:
    found = load_model(base, adapter=adapter)
    assert found.base is not None
    folder = damaged(adapter, tmp_path / "bad", kind)
    for in_use in ("default", None):
        use_adapter(found.model, in_use)
        before = scores(found.model)
        with pytest.raises(UserError, match=message) as error:
            load_adapter(found.model, folder, found.base, name="bad")
        assert "\n" not in str(error.value)
        assert adapter_names(found.model) == ["default"]
        assert torch.equal(scores(found.model), before)


def test_a_model_with_adapters_is_not_saved_as_if_it_were_plain(base: Path, adapter: Path, tmp_path: Path) -> None:
    found: Checkpoint = load_model(base, adapter=adapter)
    with pytest.raises(ValueError, match="merge them first"):
        save_model(tmp_path / "m", found.model, found.tokenizer, found.text)


def test_without_peft_it_is_told_what_to_install(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'hybridlm\[lora\]'"):
        load_model(base, adapter=adapter)
    assert isinstance(load_model(base).model, nn.Module)
