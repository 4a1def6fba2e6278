"""Adapters: low-rank additions to a model's linear layers (LoRA, arXiv 2106.09685), by the library `peft`.

An adapter's folder is `adapter_config.json` and `adapter_model.safetensors`, as `peft` writes them, `base.json`, which
says what model it was made for, and `README.md`. Several can be attached to one model, of which one is in use or none;
with none in use the model gives exactly what it gave before. What is read is checked first: of a configuration only
the fields of plain LoRA count, for others name files and modules to load.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridlm.folder import fingerprint, written_whole
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.loading import read_json

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FORMAT_VERSION = 1
DEFAULT_NAME = "default"
PREFIX = "base_model.model."
"""Before the names of the weights in `peft`'s files."""
PLAIN_FIELDS = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
)
"""What is taken over of an adapter's configuration."""
HARMLESS_FIELDS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type"),
        *("peft_version", "revision", "task_type"),
    )
)
"""What may differ from `peft`'s defaults without changing what an adapter computes."""


class Base(NamedTuple):
    """Which model an adapter belongs to."""

    name: str
    """As `--model` takes it: "box", a folder or a hub id."""
    weights: str
    """Fingerprint of its weights."""
    tokenizer: str
    """Fingerprint of its tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """How large an adapter is."""

    rank: int = 16
    alpha: float | None = None
    """What is added is scaled by alpha / rank; None: twice the rank."""
    dropout: float = 0.0
    """Of the adapter's input, in training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def add_lora(model: HybridLM, config: LoraConfig, *, seed: int, name: str = DEFAULT_NAME) -> None:
    """Give every linear layer, and the embedding of the text, a low-rank addition that starts at 0; freeze the rest.

    Args:
        model: Changed in place.
        config: Size.
        seed: Of the first of the two factors, which starts at random.
        name: The adapter's; it is in use afterwards.
    """
    peft = peft_library()
    targets = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)] + ["text_embedding"]
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    _inject(peft, lora, model, name, seed)


def adapter_names(model: nn.Module) -> list[str]:
    """Adapters attached to a model, in the order in which they came."""
    return list(getattr(model, "peft_config", {}))


def adapter_size(model: nn.Module) -> int:
    """Number of weights of all adapters attached to a model."""
    return sum(parameter.numel() for key, parameter in model.named_parameters() if ".lora_" in key)


def adapter_in_use(model: nn.Module) -> str | None:
    """Name of the adapter in use, if any."""
    layer = next(_layers(model), None)
    return None if layer is None or layer.disable_adapters else str(layer.active_adapters[0])


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to an adapter, or to none: the model then computes exactly what it computed before any was attached.

    Raises:
        UserError: no adapter of that name is attached.
    """
    names = adapter_names(model)
    if name is not None and name not in names:
        raise UserError(f"no adapter {name!r} is loaded; there are: {', '.join(names) or 'none'}")
    for layer in _layers(model):
        if name is not None:
            layer.set_adapter(name, inference_mode=True)
        layer.enable_adapters(name is not None)
    if name is not None:
        # It would also unfreeze what an adapter in use for inference keeps frozen.
        model.requires_grad_(False)


def load_adapter(model: HybridLM, folder: Path, base: Base, *, name: str = DEFAULT_NAME) -> None:
    """Attach the adapter of a folder to its base, beside those attached already, and use it.

    Args:
        model: The base; changed in place.
        folder: The adapter's.
        base: What model `model` is.
        name: Under which `use_adapter` finds it.

    Raises:
        UserError: a folder that is damaged, an adapter of another base, or one that is more than plain LoRA.
    """
    check_base(folder, base)
    if name in adapter_names(model) or not name or "." in name:
        raise UserError(f"adapter name {name!r} must be new, not empty and without dots; choose another")
    peft = peft_library()
    config = _read_config(folder, peft)
    weights = _read_weights(folder / WEIGHTS_FILE)
    device = next(model.parameters()).device
    in_use = adapter_in_use(model)
    damaged = f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE} and this model; copy the adapter's folder again"
    try:
        _inject(peft, config, model, name)
        expected = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if {key: tensor.shape for key, tensor in expected.items()} != {k: v.shape for k, v in weights.items()}:
            raise ValueError("other names or shapes")
        peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        _drop(model, name, in_use)
        raise UserError(damaged) from error
    model.to(device)
    use_adapter(model, name)


def save_adapter(folder: Path, model: HybridLM, base: Base, *, card: str, name: str = DEFAULT_NAME) -> None:
    """Write an adapter's folder; the one that was there stays whole until the new one is complete.

    Raises:
        UserError: when the folder can't be written.
    """
    peft = peft_library()
    found = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in found.items()}
    config: Any = model.peft_config[name]  # type: ignore[index]
    config.base_model_name_or_path = base.name
    with written_whole(folder, last=CONFIG_FILE, what="adapter") as staging:
        config.save_pretrained(staging)
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        about = {
            "format": "hybridlm-adapter",
            "format_version": FORMAT_VERSION,
            "base": base._asdict(),
            "num_parameters": sum(tensor.numel() for tensor in weights.values()),
            "weights": fingerprint(weights),
        }
        (staging / BASE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")


def merge_adapter(model: HybridLM) -> None:
    """Add the adapter in use to the weights that it belongs to, and drop all adapters; `model` changes in place."""
    for path, layer in [(p, m) for p, m in model.named_modules() if _is_layer(m)]:
        if not layer.disable_adapters:
            layer.merge(safe_merge=True)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def read_base(folder: Path) -> Base:
    """The model that an adapter was made for.

    Raises:
        UserError: the folder says nothing of it, or says it in another format.
    """
    if not (folder / BASE_FILE).is_file():
        raise UserError(
            f"{str(folder)!r} is no adapter of hybridlm: it lacks {BASE_FILE}; give a folder that "
            "`hybridlm finetune --lora` made"
        )
    about = read_json(folder / BASE_FILE)
    if about.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / BASE_FILE}: format_version={about.get('format_version')!r}, but this hybridlm reads "
            f"{FORMAT_VERSION}; use the hybridlm that wrote it"
        )
    base = about.get("base")
    if not isinstance(base, Mapping) or not all(isinstance(base.get(field), str) for field in Base._fields):
        raise UserError(f"{folder / BASE_FILE} lacks a valid 'base'; it is damaged, copy the folder again")
    return Base(*(base[field] for field in Base._fields))


def check_base(folder: Path, base: Base) -> None:
    """Raise UserError, naming both, when the adapter of a folder was made for another model than `base`."""
    made_for = read_base(folder)
    for what in ("weights", "tokenizer"):
        if getattr(made_for, what) != getattr(base, what):
            raise UserError(
                f"adapter {str(folder)!r} was made for {made_for.name!r} ({what} {getattr(made_for, what)}), but this "
                f"model is {base.name!r} ({what} {getattr(base, what)}); give the model that it was made for"
            )


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What `hybridlm info` shows of an adapter, without loading any weights."""
    config = read_json(folder / CONFIG_FILE)
    about = read_json(folder / BASE_FILE)
    card = folder / "README.md"
    return {
        "type": "adapter (LoRA)",
        "base": read_base(folder)._asdict(),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "num_parameters": about.get("num_parameters"),
        "layers": sorted(config.get("target_modules") or ()),
        "card": card.read_text(encoding="utf-8") if card.is_file() else "",
    }


def _read_config(folder: Path, peft: ModuleType) -> Any:
    found = read_json(folder / CONFIG_FILE)
    if found.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / CONFIG_FILE}: peft_type={found.get('peft_type')!r}, but only LORA adapters are read"
        )
    usual = peft.LoraConfig().to_dict()
    odd = [
        key
        for key, value in found.items()
        if key not in PLAIN_FIELDS | HARMLESS_FIELDS and value and value != usual.get(key)
    ]
    if odd:
        raise UserError(f"{folder / CONFIG_FILE} sets {', '.join(odd)}, but only plain LoRA adapters are read")
    try:
        return peft.LoraConfig(**{key: found[key] for key in PLAIN_FIELDS & found.keys()}, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged ({error}); copy the folder again") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"adapter folder {str(path.parent)!r} lacks {path.name}; copy the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy or download it again") from error
    if read_json(path.parent / BASE_FILE).get("weights") != fingerprint(weights):
        raise UserError(f"{path} and {BASE_FILE} are of two different adapters; copy the folder again")
    return {name.removeprefix(PREFIX): tensor.float() for name, tensor in weights.items()}


def _inject(peft: ModuleType, config: Any, model: nn.Module, name: str, seed: int = 0) -> None:
    """Attach an adapter; `peft` draws its first weights from the global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are wanted
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, name)


def _drop(model: nn.Module, name: str, in_use: str | None) -> None:
    """Undo the attaching of an adapter that turned out not to fit."""
    for layer in _layers(model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            layer.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)
    use_adapter(model, in_use)


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _is_layer(module))


def peft_library() -> ModuleType:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need the package peft; install it: pip install 'hybridlm[lora]'") from error
    return peft
