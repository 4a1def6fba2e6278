"""A published text model as the decoder: Llama, Qwen2 and Qwen3 as `transformers` saves them.

Their layers, text embeddings and text pieces are taken over; their output over text is not, for no text is predicted.
Read without `transformers`: `config.json`, safetensors, and `tokenizer.json` by the `tokenizers` library.

Shapes: W words of the published vocabulary, C hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridlm.config import Llama3RopeScaling
from hybridlm.model import HybridLM
from tokenizer.errors import UserError
from tokenizer.huggingface_text import HuggingFaceText
from tokenizer.huggingface_weights import INDEX_FILE, find_folder, read_shards
from tokenizer.loading import CONFIG_FILE, HUGGING_FACE, read_json
from tokenizer.settings import from_mapping

TEXT_FILE = "tokenizer.json"
SUPPORTED = "Llama, Qwen2 and Qwen3 with full attention, SwiGLU without bias, and plain or Llama 3's rotary positions"
_HEAD_DIM = {"qwen3": 128}
"""What a missing `head_dim` means, where it isn't hidden_size / num_attention_heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """A published model that is there, its weights not yet read."""

    name: str
    """As it was asked for."""
    folder: Path
    fields: Mapping[str, Any]
    """Those of `ModelConfig` that it decides."""

    @classmethod
    def open(cls, name: str, *, weights: bool = True) -> Backbone:
        """Find a model and read its configuration.

        Args:
            name: `hf:` and a hub id or a folder.
            weights: Whether they will be needed: otherwise they are not downloaded.

        Raises:
            UserError: it isn't there, or is of a kind that the decoder isn't.
        """
        if not name.startswith(HUGGING_FACE):
            raise UserError(f"backbone={name!r} must be hf: and a hub id or folder, such as hf:Qwen/Qwen2.5-0.5B")
        files = (CONFIG_FILE, TEXT_FILE, *(("model*.safetensors", INDEX_FILE) if weights else ()))
        rest = name.removeprefix(HUGGING_FACE)
        folder = find_folder(rest, files, kind="backbone", example="Qwen/Qwen2.5-0.5B")
        path = folder / CONFIG_FILE
        return cls(name=name, folder=folder, fields=_fields(read_json(path), str(path)))

    def text(self, tags: Iterable[str]) -> HuggingFaceText:
        """Its text pieces, with these tags.

        Raises:
            UserError: it has no `tokenizer.json`.
        """
        return HuggingFaceText.published(self.folder / TEXT_FILE, tags)

    @torch.no_grad()
    def fill(self, model: HybridLM, text: HuggingFaceText) -> None:
        """Copy layers and text embeddings; padding, `<audio>` and tags get random ones with the words' mean and spread.

        Args:
            model: Made of `fields` and of the sizes of `text`.
            text: What `text` gave.

        Raises:
            UserError: weights that are missing, pickled, cut short, or not of the configuration's sizes.
        """
        weights = {name.removeprefix("model."): tensor for name, tensor in read_shards(self.folder).items()}
        try:
            model.decoder.load_llama(weights)
            words = weights["embed_tokens.weight"].float()  # (W, C)
        except (KeyError, RuntimeError) as error:
            what = f"lack {error}" if isinstance(error, KeyError) else f"do not fit its {CONFIG_FILE}: {error}"
            raise UserError(f"backbone {self.name!r}: the weights {what}; copy or save the model again") from error
        if len(words) < text.num_pieces or words.shape[1] != model.config.hidden_dim:
            raise UserError(
                f"backbone {self.name!r}: {tuple(words.shape)} text embeddings do not serve {text.num_pieces} pieces "
                f"of {TEXT_FILE} at width {model.config.hidden_dim}; give a folder in which both belong together"
            )
        first, table = text.first_text_id, model.text_embedding.weight
        words = words[: text.num_pieces]
        table[first:] = words
        table[:first] = words.mean(dim=0) + words.std(dim=0) * torch.randn_like(table[:first])


def _fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that a published `config.json` decides.

    Raises:
        UserError: what the decoder can't do, or no such configuration.
    """
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    rope = {**rope, **(config.get("rope_scaling") or {})}  # as configurations before transformers' fifth version say it
    scaling = rope.get("rope_type", rope.get("type", "default"))
    layers = set(config.get("layer_types") or ())
    unsupported = {
        f"model_type={kind!r}": kind not in ("llama", "qwen2", "qwen3"),
        "sliding-window attention": bool(config.get("use_sliding_window")) or not layers <= {"full_attention"},
        f"hidden_act={config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(config.get("mlp_bias")),
        f"rope scaling {scaling!r}": scaling not in ("default", "llama3"),
        "partial_rotary_factor": config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        "quantized weights": config.get("quantization_config") is not None,
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{where}: {feature} is not supported as a backbone; {SUPPORTED} are")
    try:
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        bias = "qkvo" if config.get("attention_bias") else "none"
        stretch = None
        if scaling == "llama3":
            given = {name: rope[name] for name in Llama3RopeScaling.__slots__}
            stretch = from_mapping(Llama3RopeScaling, given, where=f"{where}: rope scaling")
        return {
            "hidden_dim": width,
            "num_layers": int(config["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": int(config.get("num_key_value_heads") or heads),
            "ffn_dim": int(config["intermediate_size"]),
            "attention_head_dim": int(config.get("head_dim") or _HEAD_DIM.get(kind, width // heads)),
            "attention_bias": "qkv" if kind == "qwen2" else bias,
            "qk_norm": kind == "qwen3",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
            "rope_scaling": stretch,
            "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} lacks a valid {error}; copy the model's folder again") from error
