"""Every YAML file that ships is a valid run, and would be refused with one wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hybridlm.config import ModelConfig
from hybridlm.decoder import DecoderLayer
from hybridlm.model import HybridLM
from tokenizer.dasheng_encoder import Block
from tokenizer.errors import UserError
from tokenizer.layers import ConvNeXtBlock
from tokenizer.settings import from_mapping
from tokenizer.transformer import TransformerLayer
from training.config import SECTIONS, apply_overrides, read_yaml, resolve
from training.recipe import Recipe
from training.run import task_parts

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in SHIPPED if "task" in read_yaml(path)]
RECIPES = [
    path
    for path in [*SHIPPED, *sorted((ROOT / "benchmarks").glob("*.yaml"))]
    if {"variants", "domains"} <= read_yaml(path).keys()
]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def test_there_are_configs_of_all_tasks() -> None:
    assert {read_yaml(path)["task"] for path in CONFIGS} == set(SECTIONS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_resolves(path: Path) -> None:
    mapping = read_yaml(path)
    run, _, resolved = resolve(mapping, task_parts(mapping["task"])[0], where=str(path))
    assert run.task == mapping["task"]
    assert resolved["max_steps"] == mapping["max_steps"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_wrong_key_is_told_with_the_nearest_one(path: Path) -> None:
    mapping = apply_overrides(read_yaml(path), ["max_step=1"])
    with pytest.raises(UserError, match="unknown key 'max_step'; did you mean 'max_steps'"):
        resolve(mapping, task_parts(mapping["task"])[0], where=str(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_compares_models_that_can_be_made(path: Path) -> None:
    """Of a codec like the one in the box, with features."""
    recipe = from_mapping(Recipe, read_yaml(path), where=str(path))
    for variant in recipe.variants:
        settings = {**recipe.model_of(variant), "vocab_size": 8, "feature_dim": 80}
        with torch.device("meta"):
            HybridLM(from_mapping(ModelConfig, settings, where=f"variants.{variant}"))
    with pytest.raises(UserError, match="unknown key 'step'; did you mean 'steps'"):
        from_mapping(Recipe, {**read_yaml(path), "step": 1}, where=str(path))


def test_models_of_a_size_agree() -> None:
    recipe = from_mapping(Recipe, read_yaml(ROOT / "benchmarks" / "sizes.yaml"))
    counts: dict[str, list[int]] = {}
    for variant in recipe.variants:
        with torch.device("meta"):
            model = HybridLM(from_mapping(ModelConfig, {**recipe.model_of(variant), "vocab_size": 8}))
        counts.setdefault(variant.split()[1].strip(","), []).append(model.num_parameters())
    assert list(counts) == ["2M", "8M", "30M"]
    for size, found in counts.items():
        assert max(found) < 1.01 * min(found)
        assert found[0] == pytest.approx(float(size[:-1]) * 1e6, rel=0.2)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "no"
    assert not config.use_cpu
    # It takes the sections of a backend as they are, but has an option of `accelerate launch` for each of their keys.
    known = {action.dest for action in launch_command_parser()._actions} | {"zero3_init_flag"}
    assert {*config.deepspeed_config, *config.fsdp_config} <= known


def test_the_stages_are_those_that_the_names_say() -> None:
    launches = {path.stem: load_config_from_file(str(path)) for path in LAUNCHES}
    assert launches.keys() == {"ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2"}
    stages = {name: config.deepspeed_config.get("zero_stage") for name, config in launches.items()}
    assert stages == {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3, "fsdp2": None}
    offloaded = launches["zero3-offload"].deepspeed_config
    assert offloaded["offload_optimizer_device"] == offloaded["offload_param_device"] == "cpu"
    assert launches["fsdp2"].fsdp_config["fsdp_version"] == 2


def test_fsdp2_names_layers_that_exist() -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    named = set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","))
    classes = (DecoderLayer, TransformerLayer, ConvNeXtBlock, Block, LlamaDecoderLayer)
    assert named == {layer.__name__ for layer in classes}
