"""Published weights of DashengTokenizer and Dasheng, by hub id or folder: safetensors alone, no code of others is run.

    mispeech/dashengtokenizer              encoder.model.*, encoder.patch_embed, encoder.norm, upsampler, decoder.*
    mispeech/dasheng-base, -0.6B, -1.2B    encoder.*

Our modules carry the published names, so little is renamed: the batch normalization stands inside a sequence there, and
the constants of the front ends (windows, mel filters) are stored; they are compared with ours, then left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.dasheng import DashengConfig, DashengTokenizer
from tokenizer.dasheng_encoder import DashengEncoder, DashengEncoderConfig
from tokenizer.errors import UserError
from tokenizer.loading import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, read_json, read_weights, write_folder
from tokenizer.settings import from_mapping

ENCODER_TYPE = "dasheng-encoder"
"""`type` in the `config.json` of a semantic encoder that this project trained."""
SIZES = {
    "dasheng-base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "dasheng-0.6B": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "dasheng-1.2B": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
}
OWN = ("compress.", "expand.", "quantizer.")
"""What the published tokenizer has not: the way to latents and codes."""
CONSTANTS = {
    "encoder.model.front_end.0.spectrogram.window": "encoder.model.mel.window",
    "encoder.model.front_end.0.mel_scale.fb": "encoder.model.mel.filterbank",
    "encoder.front_end.mel_spec.spectrogram.window": "encoder.mel.window",
    "encoder.front_end.mel_spec.mel_scale.fb": "encoder.mel.filterbank",
    "decoder.head.istft.window": "decoder.head.window",
}
"""Published constants and the buffers of ours that they must equal."""


def load_published_tokenizer(
    name_or_dir: str | Path,
    *,
    window_frames: int | None = None,
    latent_dim: int = 64,
    num_codebooks: int = 8,
    codebook_size: int = 1024,
) -> DashengTokenizer:
    """Load `mispeech/dashengtokenizer`: features and their decoder as published, latents and codes still untrained.

    Args:
        name_or_dir: Hub id, or a folder with `config.json` and `model.safetensors`.
        window_frames: Frames encoded together; fewer than the published 252 look less far ahead, and differ.
        latent_dim: Of the untrained projection.
        num_codebooks: Of the untrained quantizer.
        codebook_size: Of the untrained quantizer.

    Raises:
        UserError: not to be had, no such tokenizer, of an unsupported layout, incomplete or damaged.
    """
    folder = Repository(name_or_dir)
    published = folder.config()
    if published.get("model_type") != "dashengtokenizer":
        raise UserError(
            f"{name_or_dir}: model_type={published.get('model_type')!r} in {CONFIG_FILE}, but must be "
            "'dashengtokenizer'; give mispeech/dashengtokenizer or a copy of it"
        )
    config = tokenizer_config(published, str(name_or_dir), window_frames)
    sizes = {"latent_dim": latent_dim, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
    tokenizer = DashengTokenizer(from_mapping(DashengConfig, {**asdict(config), **sizes}, where=str(name_or_dir)))
    weights = folder.weights()
    own = dict(tokenizer.named_buffers())
    for name, ours in CONSTANTS.items():
        if name in weights:
            _check_constant(name, weights[name], own[ours], folder.name)
    fill(tokenizer, {rename(key): value for key, value in weights.items() if not skipped(key)}, folder.name, OWN)
    return tokenizer.eval()


def load_semantic_encoder(name_or_dir: str | Path, *, window_frames: int | None = None) -> DashengEncoder:
    """Load a semantic encoder.

    Args:
        name_or_dir: Hub id or folder of `mispeech/dasheng-*`, of `mispeech/dashengtokenizer` (its encoder), or the
            folder that training one wrote (configs/dasheng-semantic-small.yaml).
        window_frames: Frames encoded together, at most as many as there are learned positions; None keeps all.

    Raises:
        UserError: see `load_published_tokenizer`.
    """
    folder = Repository(name_or_dir)
    published = folder.config()
    kind = published.get("type", published.get("model_type"))
    prefix = "encoder."
    if kind == ENCODER_TYPE:
        if published.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{name_or_dir}: format_version={published.get('format_version')!r}, but this version reads "
                f"{FORMAT_VERSION}; train it again or install the version that wrote it"
            )
        settings = {key: value for key, value in published.items() if key not in ("type", "format_version")}
        config, prefix = from_mapping(DashengEncoderConfig, settings, where=f"{name_or_dir}/{CONFIG_FILE}"), ""
    elif kind == "dashengtokenizer":
        config, prefix = tokenizer_config(published, str(name_or_dir), None).semantic, "encoder.model."
    elif kind == "dasheng":
        config = encoder_config(published, str(name_or_dir))
    else:
        raise UserError(
            f"{name_or_dir}: type={kind!r} in {CONFIG_FILE} is no Dasheng encoder; give mispeech/dasheng-base, "
            "mispeech/dashengtokenizer, or the model folder of configs/dasheng-semantic-small.yaml"
        )
    if window_frames is not None:
        if window_frames > config.window_frames:
            raise UserError(
                f"{name_or_dir}: window_frames={window_frames}, but it has learned {config.window_frames} positions; "
                f"use at most {config.window_frames}"
            )
        config = from_mapping(DashengEncoderConfig, {**asdict(config), "window_frames": window_frames})
    encoder = DashengEncoder(config)
    weights = {
        rename(key).removeprefix(prefix): value
        for key, value in folder.weights().items()
        if key.startswith(prefix) and not skipped(key)
    }
    fill(encoder, weights, folder.name)
    return encoder.requires_grad_(False).eval()


def save_semantic_encoder(encoder: DashengEncoder, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16) for `load_semantic_encoder`."""
    weights = {key: value.bfloat16() for key, value in encoder.state_dict().items()}
    write_folder(Path(folder), {"type": ENCODER_TYPE, **asdict(encoder.config)}, weights)


def tokenizer_config(published: Mapping[str, Any], where: str, window_frames: int | None) -> DashengConfig:
    """Our settings for a `config.json` of model_type `dashengtokenizer`; what it leaves out has the public default.

    Raises:
        UserError: a layout that these modules do not have.
    """
    defaults = {
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "n_mels_patch": 128,
        "hop_length": 160,
        "patch_stride_time": 4,
        "upsample_tokens": 2,
        "decoder_embed_dim": 1280,
        "decoder_intermediate_size": 5120,
        "decoder_depth": 12,
        "istft_n_fft": 1280,
        "istft_hop": 320,
    }
    given = {name: published.get(name, value) for name, value in defaults.items()}
    given["decoder_dim"] = published.get("decoder_dim", given["embed_dim"])
    fixed = {"hop_length": 160, "patch_stride_time": 4, "decoder_dim": given["embed_dim"]}
    fixed["istft_hop"] = 640 // max(1, given["upsample_tokens"])
    for name, wanted in fixed.items():
        if given[name] != wanted:
            raise UserError(f"{where}: {name}={given[name]!r}, but only {wanted} is supported; give another checkpoint")
    semantic = {"hidden_dim": given["embed_dim"], "num_layers": given["depth"], "num_heads": given["num_heads"]}
    if window_frames is not None:
        semantic["window_frames"] = window_frames
    settings = {
        "semantic": semantic,
        "num_mels": given["n_mels_patch"],
        "causal": False,
        "upsampling": given["upsample_tokens"],
        "decoder_dim": given["decoder_embed_dim"],
        "decoder_hidden_dim": given["decoder_intermediate_size"],
        "decoder_blocks": given["decoder_depth"],
        "synthesis_window": given["istft_n_fft"],
    }
    return from_mapping(DashengConfig, settings, where=f"{where}/{CONFIG_FILE}")


def encoder_config(published: Mapping[str, Any], where: str) -> DashengEncoderConfig:
    """Our settings for a `config.json` of model_type `dasheng`: sizes by name, or as `encoder_kwargs` has them.

    Raises:
        UserError: neither a known name nor sizes, or patches of another form.
    """
    sizes = {**SIZES.get(str(published.get("name")), {}), **published.get("encoder_kwargs", {})}
    missing = [name for name in ("embed_dim", "depth", "num_heads") if name not in sizes]
    if missing:
        raise UserError(
            f"{where}: name={published.get('name')!r} in {CONFIG_FILE} is none of {', '.join(SIZES)}, and "
            f"encoder_kwargs lack '{missing[0]}'; give one of mispeech/dasheng-base, -0.6B, -1.2B"
        )
    for name in ("patch_size", "patch_stride"):
        if list(sizes.get(name, [64, 4])) != [64, 4]:
            raise UserError(f"{where}: {name}={sizes[name]!r}, but only [64, 4] is supported; give another checkpoint")
    settings = {
        "hidden_dim": sizes["embed_dim"],
        "num_layers": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "window_frames": int(sizes.get("target_length", 1008)) // 4,
    }
    return from_mapping(DashengEncoderConfig, settings, where=f"{where}/{CONFIG_FILE}")


def rename(key: str) -> str:
    """Our name of a published tensor."""
    return re.sub(r"(^|\.)init_bn\.1\.", r"\1init_bn.", key)


def skipped(key: str) -> bool:
    """Whether a published tensor has no place here: a constant, or a classifier's head."""
    return key in CONSTANTS or "front_end." in key or key.startswith(("outputlayer.", "encoder.model.outputlayer."))


def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str, absent: tuple[str, ...] = ()) -> None:
    """Copy weights into a module, in its own precision; learned positions beyond its window are left out.

    Args:
        module: What to fill.
        weights: By the module's names.
        where: Name of the weights in messages.
        absent: Beginnings of names that need not be there.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not of floating point.
    """
    own = {key: value for key, value in module.state_dict().items() if not key.startswith(absent)}
    remedy = "give the unchanged checkpoint of the layout in its config.json"
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(f"weights {where} lack '{missing[0]}' and {len(missing) - 1} more; {remedy}")
    unknown = [key for key in weights if key not in own]
    if unknown:
        raise UserError(f"weights {where} hold '{unknown[0]}' and {len(unknown) - 1} more of no use here; {remedy}")
    for key, value in weights.items():
        target = own[key]
        if key.endswith("time_pos_embed"):
            value = value[..., : target.shape[-1]]
        if value.shape != target.shape:
            raise UserError(
                f"weights {where}: '{key}' has shape {tuple(value.shape)}, but must have {tuple(target.shape)}; "
                f"{remedy}"
            )
        if not value.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise UserError(f"weights {where}: '{key}' is of {value.dtype}, but must be of floating point; {remedy}")
        with torch.no_grad():
            target.copy_(value)


class Repository:
    """A folder, or a repository of the Hugging Face hub, of which the files asked for are downloaded once."""

    def __init__(self, name_or_dir: str | Path) -> None:
        self.name = str(name_or_dir)
        self.folder = Path(name_or_dir) if Path(name_or_dir).is_dir() else None

    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        path = self.file(CONFIG_FILE)
        if path is None:
            raise UserError(f"{self.name} has no {CONFIG_FILE}; give the folder or hub id that holds it")
        return read_json(path)

    def weights(self) -> dict[str, Tensor]:
        """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""
        whole = self.file(WEIGHTS_FILE)
        if whole is not None:
            return read_weights(whole)
        index = self.file(f"{WEIGHTS_FILE}.index.json")
        if index is None:
            raise UserError(f"{self.name} has no {WEIGHTS_FILE}; only safetensors are read, so convert other formats")
        tensors: dict[str, Tensor] = {}
        for shard in _shards(index):
            path = self.file(shard)
            if path is None:
                raise UserError(f"weights {self.name} lack the shard {shard}; copy them again")
            tensors |= read_weights(path)
        return tensors

    def file(self, name: str) -> Path | None:
        """Its path on this machine; None if the repository has no such file.

        Raises:
            UserError: the hub can't be reached, or has no such repository.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        if self.name.count("/") != 1 or self.name.startswith((".", "/", "~")):
            raise UserError(f"{self.name} is neither a folder nor a hub id such as mispeech/dashengtokenizer")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name))
        except LocalEntryNotFoundError as error:
            raise self._unreachable("it is not in the cache and the hub can't be reached") from error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unreachable(" ".join(str(error).split())[:200]) from error

    def _unreachable(self, reason: str) -> UserError:
        return UserError(
            f"hub id {self.name}: {reason}; copy {CONFIG_FILE} and {WEIGHTS_FILE} into a folder and give that instead"
        )


def _shards(index: Path) -> Iterable[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise UserError(f"{index} has no weight_map of file names; copy it again")
    return sorted(set(names.values()))


def _check_constant(name: str, found: Tensor, wanted: Tensor, where: str) -> None:
    if found.shape != wanted.shape or not torch.allclose(found.float(), wanted.float(), atol=1e-2):
        raise UserError(f"weights {where}: the constant '{name}' differs; the checkpoint has another front end")
