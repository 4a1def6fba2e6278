"""Folders and hub ids of models of `transformers`: where they are, what their tensors are called, whether they fit.

Only JSON and safetensors are read: nothing is unpickled, and no code comes from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.encodec_weights import fold_weight_norm
from tokenizer.errors import UserError
from tokenizer.loading import CONFIG_FILE, WEIGHTS_FILE, read_json, read_weights

INDEX_FILE = "model.safetensors.index.json"
STATISTICS = ("inited", "initialized", "cluster_size", "embed_avg")
"""What the training of quantizers keeps beside the codebooks; no part of the codec."""


def find_folder(
    name: str,
    files: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE),
    *,
    kind: str = "tokenizer",
    example: str = "facebook/encodec_24khz",
) -> Path:
    """The folder of a codec or language model, or of its files from the hub, downloaded once.

    Args:
        name: A folder, or a hub id such as `kyutai/mimi`.
        files: What of it is wanted; patterns are allowed.
        kind: How to call it in messages.
        example: A hub id that there is.

    Raises:
        UserError: it is neither, or the hub can't be reached and the files were never downloaded.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    wanted = " and ".join(files)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"{kind} 'hf:{name}': no such folder, and no hub id either (OWNER/NAME); give a folder with "
            f"{wanted}, or an id such as hf:{example}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # whatever the network and the hub's client raise, the remedy is the same
        raise UserError(
            f"{kind} 'hf:{name}' is no folder here and could not be had from the Hugging Face hub "
            f"({type(error).__name__}); offline, put its {wanted} into a folder and give hf:FOLDER"
        ) from error


def read_published(folder: Path) -> dict[str, Tensor]:
    """Weights of a codec's folder, with weight normalization folded; see `read_shards`."""
    return fold(read_shards(folder))


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder, in one file or, with an index, in several.

    Raises:
        UserError: they are missing, a pickle, cut short, or not safetensors.
    """
    if (folder / INDEX_FILE).is_file():
        listed = read_json(folder / INDEX_FILE).get("weight_map")
        names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder / INDEX_FILE} has no valid weight_map; copy it again")
        return {key: tensor for name in sorted(names) for key, tensor in read_weights(folder / name).items()}
    path = folder / WEIGHTS_FILE
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")]) if not path.is_file() else []
    if pickled:
        raise UserError(
            f"{folder} holds {pickled[0].name} but no {WEIGHTS_FILE}; pickles are never read: save the model again "
            "with save_pretrained, which writes safetensors"
        )
    return read_weights(path)


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold weight normalization, under either of torch's names for gain and direction."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    return fold_weight_norm(renamed)


def own_weights(model: nn.Module, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors that make the codec, under their published names."""
    return {rename(name): tensor for name, tensor in model.state_dict().items() if not name.endswith(STATISTICS)}


def take_weights(model: nn.Module, tensors: Mapping[str, Tensor], rename: Callable[[str], str], where: str) -> None:
    """Copy `tensors` into `model`; those that it has no place for, such as further codebooks, are left out.

    Args:
        model: Of `transformers`, without weight normalization.
        tensors: By published name, folded.
        rename: From the model's names to the published ones.
        where: How to call the weights in messages.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    given = {rename(name): tensor for name, tensor in tensors.items()}
    for name, tensor in own_weights(model, rename).items():
        if name not in given:
            raise UserError(f"{where} lack '{name}'; they are of another model than its {CONFIG_FILE}, or cut short")
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{where}: '{name}' has shape {tuple(given[name].shape)}, but {CONFIG_FILE} asks for "
                f"{tuple(tensor.shape)}; the two are of different models"
            )
        with torch.no_grad():
            tensor.copy_(given[name])
