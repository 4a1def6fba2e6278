"""A model's folder: `config.json`, `model.safetensors`, `tokenizer/`, `text.model`, `README.md`.

A folder is written whole beside its place and moved there file by file, so a full disk leaves the old one as it was.
Only JSON, safetensors and sentencepiece files are read: nothing that could run code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridlm.adapter import Base, adapter_names, check_base, describe_adapter, is_adapter, load_adapter, read_base
from hybridlm.config import ModelConfig
from hybridlm.folder import fingerprint, written_whole
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from tokenizer.loading import (
    ENHANCER,
    HUGGING_FACE,
    LOG_MEL,
    load_tokenizer,
    needs_no_folder,
    read_json,
    resolve_device,
    with_log_mel,
)
from tokenizer.settings import from_mapping
from tokenizer.text import TextTokenizer

FORMAT_VERSION = 1
BOX = "box"
BOX_FOLDER = Path(__file__).parent / "box"
FILES = ("config.json", "model.safetensors", "tokenizer/config.json", "text.model")
LAYOUT = "config.json, model.safetensors, tokenizer/, text.model, README.md"


class Checkpoint(NamedTuple):
    """What a model's folder holds."""

    model: HybridLM
    tokenizer: Tokenizer
    text: TextTokenizer
    base: Base | None = None
    """Which weights these are, by name and fingerprint; None for a model that was not read from a folder."""


def resolve(name_or_dir: str | Path) -> Path:
    """The folder of a model: "box" is the one inside the package, a path is itself, else a Hugging Face hub id.

    Raises:
        UserError: when there is no such folder and the hub can't be reached or doesn't know the name.
    """
    if str(name_or_dir) == BOX:
        if not BOX_FOLDER.is_dir():
            raise UserError(f"model 'box' is missing: this installation has no {BOX_FOLDER}; reinstall hybridlm")
        return BOX_FOLDER
    if str(name_or_dir).startswith(HUGGING_FACE):
        raise UserError(f"{str(name_or_dir)!r} is a tokenizer, not a model; give it where a tokenizer is asked for")
    folder = Path(name_or_dir)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model {str(name_or_dir)!r} is a file; give the folder with {LAYOUT}")
    if str(name_or_dir).count("/") != 1 or str(name_or_dir).startswith((".", "/", "~")):
        raise UserError(f"no such model folder: {str(name_or_dir)!r}; give a folder with {LAYOUT}, or 'box'")
    return _download(str(name_or_dir))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.md"]))
    except Exception as error:  # whatever the network and the hub's client raise, the remedy is the same
        reason = type(error).__name__
        raise UserError(
            f"model {hub_id!r} is no folder here and could not be had from the Hugging Face hub ({reason}); "
            f"offline, put {LAYOUT} into a folder and give its path"
        ) from error


def save_model(
    folder: str | Path,
    model: HybridLM,
    tokenizer: Tokenizer,
    text: TextTokenizer,
    *,
    card: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a model's folder; the one that was there stays whole until the new one is complete.

    Args:
        folder: Where; made where missing.
        model: Its weights are rounded to `dtype` on disk, not in memory.
        tokenizer: What made the frames the model was trained on; its fingerprint is kept and compared on loading.
        text: The text pieces and tags of the prefix.
        card: The model card, in Markdown.
        dtype: Of the weights on disk.

    Raises:
        UserError: when the folder can't be written or the disk is full.
        ValueError: the model has adapters; merge or drop them.
    """
    folder = Path(folder)
    if adapter_names(model):
        raise ValueError(f"a model with adapters ({', '.join(adapter_names(model))}) has no folder; merge them first")
    weights = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).clone()
        for name, tensor in model.state_dict().items()
    }
    with written_whole(folder, last="config.json", what="model") as staging:
        tokenizer.save(staging / "tokenizer")
        text.save(staging / "text.model")
        saved = fingerprint(weights)
        config = {
            "format": "hybridlm",
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(model.config),
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()},
            "tags": list(text.tags),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights": saved,
        }
        (staging / "README.md").write_text(card or default_card(config), encoding="utf-8")
        save_file(weights, staging / "model.safetensors", metadata={"weights": saved})
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(
    folder: str | Path, device: str | torch.device | None = "cpu", adapter: str | Path | None = None
) -> Checkpoint:
    """Read a model's folder; weights become float32, the modules are in evaluation mode.

    Args:
        folder: "box", a folder or a hub id; see `resolve`. An adapter's folder is read onto the base that it names.
        device: Where the model and its tokenizer go; None for CUDA where there is one.
        adapter: Folder or hub id of an adapter to read onto the model, and to use.

    Raises:
        UserError: for a missing, cut-short or mixed-up folder, another format version, another tokenizer, an adapter
            of another base, or a device that is not there.
    """
    device = resolve_device(device)
    given, folder = str(folder), resolve(folder)
    if is_adapter(folder):
        if adapter is not None:
            raise UserError(f"model {given!r} is an adapter; give its base as the model, and one adapter beside it")
        return load_model(base_of(folder), device, folder)
    config = read_config(folder)
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(f"model folder {str(folder)!r} lacks {file}; it must hold {LAYOUT}")
    model = HybridLM(from_mapping(ModelConfig, config["model"], where=f"{folder / 'config.json'}: model"))
    weights, saved = _read_weights(folder / "model.safetensors")
    if saved != config["weights"]:
        raise UserError(
            f"{folder / 'config.json'} and model.safetensors are of two different models; copy the folder again"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'model.safetensors'} doesn't fit its config.json: {detail}") from error
    tokenizer = load_tokenizer(folder / "tokenizer", device=device)
    expected = config["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint() != expected:
        raise UserError(
            f"{folder / 'tokenizer'} has fingerprint {tokenizer.fingerprint()}, but the model was trained with "
            f"{expected}; copy the tokenizer that came with the model"
        )
    text = TextTokenizer.load(folder / "text.model")
    stands_for_itself = given == BOX or not Path(given).is_dir()
    name = given if stands_for_itself else str(folder.resolve())
    base = Base(name=name, weights=config["weights"], tokenizer=expected)
    if adapter is not None:
        load_adapter(model, resolve(adapter), base)
    return Checkpoint(model=model.eval().to(device), tokenizer=tokenizer, text=text, base=base)


def base_of(adapter: Path) -> str:
    """Name of the model that an adapter was made for.

    Raises:
        UserError: when that model is not there.
    """
    base = read_base(adapter)
    try:
        resolve(base.name)
    except UserError as error:
        raise UserError(
            f"adapter {str(adapter)!r} was made for {base.name!r} (weights {base.weights}), which is not there; "
            "give that model's folder as the model and this one as the adapter"
        ) from error
    return base.name


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `config.json` of a model's folder.

    Raises:
        UserError: when it is missing, not JSON, not a hybridlm model's, or of another version.
    """
    config = _read_own_config(folder)
    if config.get("format") != "hybridlm":
        raise UserError(f"{folder / 'config.json'} is not of a hybridlm model; give a folder with {LAYOUT}")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / 'config.json'}: format_version={config.get('format_version')!r}, but this hybridlm reads "
            f"{FORMAT_VERSION}; use the hybridlm that wrote it, or convert the model"
        )
    required = {"model": Mapping, "tokenizer": Mapping, "weights": str}
    for key, kind in required.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"{folder / 'config.json'} lacks a valid '{key}'; it is damaged, copy the folder again")
    if not isinstance(config["tokenizer"].get("fingerprint"), str):
        raise UserError(f"{folder / 'config.json'} lacks the tokenizer's fingerprint; it is damaged")
    return config


def _read_own_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is no model folder: it lacks config.json; it must hold {LAYOUT}")
    return read_json(folder / "config.json")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy or download it again") from error
    floats = {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}
    return {**weights, **floats}, metadata.get("weights")


def open_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """`load_codec` for training, which also takes the hub id of a model."""
    name = str(name_or_dir)
    if name.startswith(LOG_MEL):
        return with_log_mel(open_tokenizer(name.removeprefix(LOG_MEL)))
    return load_tokenizer(name_or_dir if needs_no_folder(name) else resolve(name_or_dir))


def open_text(name_or_dir: str | Path) -> TextTokenizer | None:
    """The text pieces of the model whose tokenizer `open_tokenizer` opens by this name; None where it is no model's."""
    name = str(name_or_dir).removeprefix(LOG_MEL)
    if needs_no_folder(name):
        return None
    folder = resolve(name)
    return TextTokenizer.load(folder) if (folder / "text.model").is_file() else None


def load_codec(name_or_dir: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
    """A tokenizer by name ("encodec", or "box" for the box model's), by its own folder, or by its model's folder; after
    `log-mel:`, with a log-mel as features."""
    if str(name_or_dir).startswith(LOG_MEL):
        return with_log_mel(load_codec(str(name_or_dir).removeprefix(LOG_MEL), device))
    return load_tokenizer(resolve(BOX) if str(name_or_dir) == BOX else name_or_dir, device=device)


def describe(name_or_dir: str | Path, adapter: str | Path | None = None) -> dict[str, Any]:
    """What `hybridlm info` shows of a folder of a model, adapter, enhancer or tokenizer, without loading any weights.

    Args:
        name_or_dir: "box", a folder or a hub id.
        adapter: An adapter to show beside a model.

    Returns:
        name, folder, type, and for a model num_parameters, size_mb, tags, tokenizer, model (its configuration) and
        card (Markdown), and `adapter`, where one is given; for an adapter its base and rank; for an enhancer or a
        tokenizer its configuration.

    Raises:
        UserError: nothing of the kind, or an adapter of another model.
    """
    folder = resolve(name_or_dir)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    facts: dict[str, Any] = {"name": str(name_or_dir), "folder": str(folder), "size_mb": round(size / 1e6, 2)}
    if is_adapter(folder):
        return {**facts, **describe_adapter(folder)}
    config = _read_own_config(folder)
    if "type" in config and "format" not in config:
        kind = ENHANCER if config["type"] == ENHANCER else f"tokenizer ({config['type']})"
        return {**facts, "type": kind, "config": config}
    config = read_config(folder)
    tokenizer = read_json(folder / "tokenizer" / "config.json")
    if adapter is not None:
        mine = Base(name=str(name_or_dir), weights=config["weights"], tokenizer=config["tokenizer"]["fingerprint"])
        check_base(resolve(adapter), mine)
        facts["adapter"] = {**describe_adapter(resolve(adapter)), "folder": str(resolve(adapter)), "card": None}
    card = folder / "README.md"
    return {
        **facts,
        "type": f"model ({config['model'].get('representation')})",
        "num_parameters": config.get("num_parameters"),
        "tags": config.get("tags", []),
        "model": config["model"],
        "tokenizer": {**tokenizer, "fingerprint": config["tokenizer"]["fingerprint"]},
        "card": card.read_text(encoding="utf-8") if card.is_file() else "",
    }


def default_card(config: Mapping[str, Any]) -> str:
    """A model card that holds what the folder itself knows."""
    return (
        "# A hybridlm model\n\n"
        f"- representation: {config['model']['representation']}\n"
        f"- parameters: {config['num_parameters']:,}\n"
        f"- tokenizer: {config['tokenizer']['name']} ({config['tokenizer']['fingerprint']})\n"
        f"- tags: {', '.join(config['tags']) or 'none'}\n\n"
        "Load it with `hybridlm.load(FOLDER)`, or `hybridlm generate --model FOLDER`.\n"
    )
