"""Tokenizer folders: `config.json` with a type, `model.safetensors`, and the way back to a tokenizer.

Nothing is unpickled, and what is wrong with a folder is told in one line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import Tokenizer

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PRETRAINED = ("encodec", "encodec-causal")
"""Names that need no folder: the published EnCodec weights, as they are and with a causal start."""
HUGGING_FACE = "hf:"
"""Before a hub id or a folder: a codec of `transformers`, as it publishes them."""
LOG_MEL = "log-mel:"
"""Before any other name or folder: the same frames, with a right-aligned log-mel as features (`with_log_mel`)."""
TYPES = ("dasheng", "encodec", "f3", "hf")
ENHANCER = "enhancer"
"""The type of a folder of `tokenizer.enhancer`, which holds its tokenizer as a language model's folder does."""


def load_tokenizer(name_or_dir: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_dir: `encodec` (published weights, the package's own frames), `encodec-causal` (the same weights,
            started on silence so that no frame looks ahead), `hf:` and the hub id or folder of a codec of
            `transformers` (`hf:kyutai/mimi`), or a folder with `config.json` and `model.safetensors`. A model's folder
            counts as the `tokenizer` folder inside it.
        device: Where its weights live, such as `cpu` or `cuda:0`.

    Raises:
        UserError: no such folder or name, no or broken `config.json`, an unknown type, another format version, missing
            or truncated weights, a device that is not there.
    """
    device = resolve_device(device)
    if str(name_or_dir) in PRETRAINED:
        from tokenizer.encodec import EncodecConfig, EncodecTokenizer

        config = EncodecConfig(start="reflect" if str(name_or_dir) == "encodec" else "silence")
        return EncodecTokenizer.pretrained(config).to(device)
    if str(name_or_dir).startswith(HUGGING_FACE):
        from tokenizer.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.pretrained(str(name_or_dir)).to(device)
    folder = Path(name_or_dir)
    if _is_published_dasheng(name_or_dir):
        raise UserError(
            f"tokenizer '{name_or_dir}' has no latents and codes yet; train them with configs/dasheng-published.yaml "
            "and give the run's model folder"
        )
    if not folder.is_dir():
        names = " or ".join(f"'{name}'" for name in PRETRAINED)
        raise UserError(
            f"tokenizer '{name_or_dir}' is not a folder; give a folder with {CONFIG_FILE}, {names}, or "
            f"{HUGGING_FACE}ID for a codec of the Hugging Face hub"
        )
    kind = read_json(folder / CONFIG_FILE).get("type") if (folder / CONFIG_FILE).is_file() else None
    if kind in (None, ENHANCER):
        inner = folder / "tokenizer"
        folder = inner if (inner / CONFIG_FILE).is_file() else folder
    kind = read_config(folder)["type"]
    if kind == "encodec":
        from tokenizer.encodec import EncodecTokenizer

        return EncodecTokenizer.load(folder).to(device)
    if kind == "dasheng":
        from tokenizer.dasheng import DashengTokenizer

        return DashengTokenizer.load(folder).to(device)
    if kind == "hf":
        from tokenizer.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(folder).to(device)
    from tokenizer.f3 import F3Tokenizer

    return F3Tokenizer.load(folder).to(device)


def with_log_mel(tokenizer: Tokenizer) -> Tokenizer:
    """The same frames with a log-mel as features, WHISPER-GPT's slices.

    Raises:
        UserError: a tokenizer that can't give them beside its own features.
    """
    from tokenizer.f3 import F3Tokenizer

    if isinstance(tokenizer, F3Tokenizer):
        return tokenizer.with_log_mel()
    if tokenizer.name in ("encodec", "hf"):
        return tokenizer  # a log-mel is what it gives
    raise UserError(f"{LOG_MEL} cannot go before a tokenizer of type {tokenizer.name}; it is for f3, encodec and hf:")


def _is_published_dasheng(name_or_dir: str | Path) -> bool:
    path = Path(name_or_dir) / CONFIG_FILE
    if path.is_file():
        return read_json(path).get("model_type") in ("dasheng", "dashengtokenizer")
    return str(name_or_dir).startswith("mispeech/dasheng")


def needs_no_folder(name: str | Path) -> bool:
    """Whether `name` is one that `load_tokenizer` finds by itself, and neither a folder nor a model's name."""
    return str(name) in PRETRAINED or str(name).startswith(HUGGING_FACE)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check a tokenizer folder's `config.json`; `type` is one of `TYPES`.

    Raises:
        UserError: see `load_tokenizer`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"tokenizer folder {folder} has no {CONFIG_FILE}; give the folder that holds it")
    config = read_json(path)
    kind = config.get("type")
    if kind is None and "model_type" in config:
        raise UserError(
            f"{path} is of transformers (model_type={config['model_type']!r}); give its folder as "
            f"{HUGGING_FACE}{folder}"
        )
    if kind not in TYPES:
        near = difflib.get_close_matches(str(kind), TYPES, n=1, cutoff=0.0)[0]
        known = ", ".join(f"'{name}'" for name in TYPES)
        raise UserError(f"{path}: type={kind!r} is none of {known}; did you mean '{near}'?")
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={version!r}, but this version reads {FORMAT_VERSION}; "
            "convert the folder or install the version that wrote it"
        )
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Args:
        path: The file.

    Raises:
        UserError: there is no such file, or it is cut short or not safetensors.
    """
    if not path.is_file():
        raise UserError(f"weights {path} are missing; copy or save the folder again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"weights {path} are cut short or not safetensors ({reason}); copy them again") from error


def write_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; each appears whole or not at all.

    Args:
        folder: Created if need be.
        config: With its `type`; `format_version` is added.
        weights: Tensors by name, on any device.

    Raises:
        UserError: the folder can't be written.
    """
    text = json.dumps({"type": config["type"], "format_version": FORMAT_VERSION, **config}, indent=2) + "\n"
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in weights.items()}
    with replacing(folder / WEIGHTS_FILE) as path:
        try:
            save_file(tensors, path)
            path.chmod(0o644)  # safetensors lets no one but the owner read
        except SafetensorError as error:  # it hides the system's error, such as a full disk
            raise OSError(str(error)) from error
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: it can't be read, or is something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); copy or save the folder again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, but must hold a JSON object; save the folder again")
    return config


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None for CUDA where there is one, else the CPU.

    Raises:
        UserError: for a name that torch doesn't know, and for a device that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is no device; use cpu, cuda or cuda:0") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(device)!r} asked for, but this machine has no usable CUDA device; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={str(device)!r}, but there are {torch.cuda.device_count()} CUDA devices; use cuda:0")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={str(device)!r} asked for, but this machine has no Metal device; use cpu")
    return found
