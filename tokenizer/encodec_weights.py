"""Where EnCodec's published weights come from, and the three names their tensors go by.

The checkpoint is the `encodec` package's own file. It is a pickle, so it is read only when its checksum is the one
published, and then as tensors alone. A safetensors file is taken under the package's names, under those of
`transformers` (`facebook/encodec_24khz`), or under ours (weight normalization folded into the weight).
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.errors import UserError
from tokenizer.loading import read_weights

CHECKPOINT = "encodec_24khz-d7cc33bc.th"
"""Published by the authors of EnCodec; the eight hex digits begin the file's SHA-256."""
URL = f"https://dl.fbaipublicfiles.com/encodec/v0/{CHECKPOINT}"
ENVIRONMENT = "HYBRIDLM_ENCODEC"
HUB_ID = "facebook/encodec_24khz"


def find_checkpoint(repository: Path | None = None) -> Path:
    """Find EnCodec's 24 kHz weights on this machine, or download them.

    Looked at in turn: `repository`, the environment variable `HYBRIDLM_ENCODEC`, the cache of `torch.hub` (where the
    `encodec` package keeps them), the cache of the Hugging Face hub, the authors' server.

    Args:
        repository: The file itself, or a folder that holds `encodec_24khz-d7cc33bc.th` or a `model.safetensors`.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    for origin, given in (("repository", repository), (ENVIRONMENT, os.environ.get(ENVIRONMENT))):
        if given:
            return _inside(Path(given), origin)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / CHECKPOINT
    if cached.is_file():
        return cached
    from_hub = _hub_cache()
    if from_hub is not None:
        return from_hub
    return _download(cached)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint as folded weights under the package's module names.

    Raises:
        UserError: the file is not what its name says.
    """
    if path.suffix == ".safetensors":
        return fold_weight_norm(rename(read_weights(path)))
    wanted = CHECKPOINT.rsplit("-", 1)[1].split(".")[0]
    found = _sha256(path)
    if not found.startswith(wanted):
        raise UserError(
            f"EnCodec weights {path} have SHA-256 {found[:8]}..., but the published file has {wanted}...; "
            f"download {URL} again"
        )
    return fold_weight_norm(torch.load(path, map_location="cpu", weights_only=True))


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of `transformers` to the package's; the package's pass unchanged."""
    if not any(key.startswith("encoder.layers.") for key in tensors):
        return dict(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        key = re.sub(r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", key)
        key = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", key)
        key = key.replace("parametrizations.weight.original0", "weight_g")
        key = key.replace("parametrizations.weight.original1", "weight_v")
        # The decoder's layers 3, 6, 9 and 12 are its transposed convolutions.
        key = re.sub(r"^(decoder\.model\.(?:3|6|9|12))\.conv\.", r"\1.convtr.convtr.", key)
        key = re.sub(r"(?<!convtr)\.conv\.(?=bias$|weight)", ".conv.conv.", key)
        renamed[key] = tensor
    return renamed


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair `weight_g`, `weight_v` by the weight g * v / |v| that it stands for."""
    folded = {key: tensor for key, tensor in tensors.items() if not key.endswith(("weight_g", "weight_v"))}
    for key, gain in tensors.items():
        if key.endswith("weight_g"):
            direction = tensors[key.removesuffix("_g") + "_v"]
            folded[key.removesuffix("_g")] = torch._weight_norm(direction, gain, 0)  # the bits that torch computes
    return folded


def _inside(place: Path, origin: str) -> Path:
    if place.is_file():
        return place
    for name in (CHECKPOINT, "model.safetensors"):
        if (place / name).is_file():
            return place / name
    raise UserError(f"EnCodec weights: {origin}={place} is neither a file nor a folder that holds {CHECKPOINT}")


def _hub_cache() -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(HUB_ID, "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _download(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            temporary = Path(scratch) / target.name
            with urllib.request.urlopen(URL, timeout=20) as response, temporary.open("wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
            temporary.replace(target)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"EnCodec weights are not on this machine and {URL} can't be reached ({reason}); put {CHECKPOINT} into "
            f"{target.parent}, or set {ENVIRONMENT} to where it is"
        ) from error
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
