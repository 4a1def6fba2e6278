"""A plain Llama-shaped decoder: RMSNorm, rotary positions, grouped queries, SwiGLU, and a key-value cache as argument.

Shapes: B batch, L positions of a call, N keys so far, H query heads, G key-value heads, E width of a head, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hybridlm.cache import KeyValueCache
from hybridlm.config import ModelConfig
from hybridlm.packing import PackedAttention, PackedKernel, Packing, packed_kernel
from tokenizer.transformer import SwiGLU, rotary, rotate

AttentionBackend = Literal["sdpa", "flash-attn"]
Result = TypeVar("Result")
INIT_STD = 0.02


@lru_cache(maxsize=1)
def attention_backend() -> AttentionBackend:
    """The kernel for attention on this machine: flash-attn where it is installed and CUDA is there, else SDPA."""
    if torch.cuda.is_available():
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash-attn"
    return "sdpa"


class Attention(nn.Module):
    """Grouped-query attention; biases and norms of queries and keys where a taken-over backbone has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.alignment_heads = config.alignment_heads if layer == config.alignment_layer else 0
        # One matrix for queries, keys and values: a third of the calls, which is what a batch-1 step is made of.
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_dim, width, bias=config.attention_bias != "none")
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_dim, bias=config.attention_bias == "qkvo")
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon) if config.qk_norm else None
        self.backend = attention_backend()
        self.written_out_in_half = True
        """On a CPU, in training; False where a CPU stands in for a GPU."""

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, E), keys and values (B, G, L, E) of normalized inputs."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H + 2G, L, E)
        turned, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split([self.num_heads, self.num_kv_heads], dim=1)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1).to(v.dtype)
        q, k = rotate(turned, *rotation).split([self.num_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | PackedAttention | None,
        cache: KeyValueCache | None,
        text: TextKeys | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads see (B, L, H * E), before `out`; and the alignment."""
        alignment = None
        if text is not None and self.alignment_heads:
            alignment = self._alignment(q, k, text)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self._attend(q, k, v, mask), alignment

    def packed_kernel(self, device_type: str, dtype: torch.dtype) -> PackedKernel:
        """What attends within packed documents."""
        half = dtype in (torch.float16, torch.bfloat16)
        return packed_kernel(device_type, half=half, flash=self.backend == "flash-attn", head_dim=self.head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | PackedAttention | None) -> Tensor:
        batch, num_heads, length, head_dim = q.shape
        group = num_heads // self.num_kv_heads
        if mask is not None and not isinstance(mask, Tensor):
            return mask(q, k, v)
        if length == 1:
            # The heads of a group share their keys, so they are the "positions" of one query: nothing is repeated.
            grouped = q.reshape(batch, self.num_kv_heads, group, head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, -1)
        half = q.dtype in (torch.float16, torch.bfloat16)
        if self.backend == "flash-attn" and mask is None and q.is_cuda and half:
            from flash_attn import flash_attn_func

            y = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
            return y.reshape(batch, length, -1)
        if half and q.requires_grad and q.device.type == "cpu" and self.written_out_in_half:
            return _plain_attention(q, k, v, mask)
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).reshape(batch, length, -1)

    def _alignment(self, q: Tensor, k: Tensor, text: TextKeys) -> Tensor:
        """Attention probabilities over the text pieces alone, (B, heads, T, P), in float32."""
        if text.packing is not None:
            q, k = (text.packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
        group = self.num_heads // self.num_kv_heads
        prefix = text.mask.shape[1]
        queries = q[:, : self.alignment_heads, prefix - 1 : -1]  # the states that predict frames 0 .. T-1
        keys = k[:, :, :prefix].repeat_interleave(group, dim=1)[:, : self.alignment_heads]
        scores = (queries @ keys.transpose(-1, -2)).float() / math.sqrt(self.head_dim)
        # A finite filling keeps rows without text free of NaN; the loss gives those rows no weight.
        return scores.masked_fill(~text.mask[:, None, None], -1e4).softmax(dim=-1)


class ResidualSwiGLU(nn.Module):
    """x + SwiGLU(LayerNorm(x)): the layer of both heads' networks.

    LayerNorm where the backbone has RMSNorm: PyTorch has a fused CPU kernel of it alone, three times as fast, and the
    heads run over eight times as many positions as the backbone.
    """

    def __init__(self, dim: int, ffn_dim: int, norm_epsilon: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_epsilon, bias=False)
        self.mlp = SwiGLU(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU on a residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_epsilon)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config.hidden_dim, config.ffn_dim)
        self.dropout = config.dropout
        self.compiled: tuple[int, Callable[..., Any], Callable[..., Any]] | None = None
        """`before` and `after` attention, compiled for one position of so many rows (`hybridlm.compiling`)."""

    def before(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the residual stream."""
        return self.attention.project(self.attention_norm(x), rotation)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after it has taken in what the heads see."""
        x = x + self._drop(self.attention.out(y))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | PackedAttention | None,
        cache: KeyValueCache | None,
        text: TextKeys | None,
    ) -> tuple[Tensor, Tensor | None]:
        before, after = self.before, self.after
        if self.compiled is not None and x.shape[:2] == (self.compiled[0], 1):
            _, before, after = self.compiled
        y, alignment = self.attention(*before(x, rotation), mask, cache, text)
        return after(x, y), alignment

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


@dataclass(frozen=True, kw_only=True, slots=True)
class TextKeys:
    """Asks for attention to the text: which prefix columns are pieces of the text to be spoken."""

    mask: Bool[Tensor, "B P"]
    packing: Packing | None = None
    """Of the documents, where rows hold several."""


@dataclass(frozen=True, kw_only=True)  # no slots: DeepSpeed's ZeRO-3 calls `vars` on what a forward returns
class DecoderOutput:
    """What a decoder call gives."""

    states: Float[Tensor, "B L C"]
    """After the final norm."""
    alignment: Float[Tensor, "B heads T P"] | None = None
    """Attention of the designated heads from frame to text piece, if it was asked for."""


class Decoder(nn.Module):
    """The stack, from embeddings to normalized states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_dim, eps=config.norm_epsilon)
        self.attention: AttentionBackend = attention_backend()
        self.gradient_checkpointing = False
        """See `call`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.layers:
            # Each layer adds two branches to the residual stream; this keeps the stream's variance (GPT-2).
            for linear in (layer.attention.out, layer.mlp.down):
                nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(2 * config.num_layers))  # type: ignore[arg-type]

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        positions: Int[Tensor, "B L"],
        *,
        key_mask: Bool[Tensor, "B L"] | None = None,
        cache: KeyValueCache | None = None,
        text: TextKeys | None = None,
        after_layer: Callable[[int, Tensor], Tensor] | None = None,
        packing: Packing | None = None,
    ) -> DecoderOutput:
        """Run the stack.

        Args:
            x: Embeddings.
            positions: Of each embedding in its row, for the rotary angles.
            key_mask: False for positions that nobody may attend to; None if there are none.
            cache: Earlier positions, which these follow; extended in place.
            text: Asks for the alignment; only in a call that holds the whole sequence.
            after_layer: Given each layer's number and output; returns what the next layer gets.
            packing: Which rows the layers get in place of these; it says what is masked, too, and comes without cache.
        """
        if x.is_cuda and any(layer.compiled for layer in self.layers):
            torch.compiler.cudagraph_mark_step_begin()  # what graphs made is kept until here
        if packing is None:
            mask: Tensor | PackedAttention | None = self.visible(x, key_mask, cache)
        else:
            mask = packing.mask()
            x, positions, after_layer = packing.pack(x), packing.positions, packing.within(after_layer)
        x, alignment = self.run(
            range(len(self.layers)),
            x,
            self.rotation(x, positions) if cache is None else cache.rotation(x, positions, self.rotation),
            mask,
            cache=cache,
            text=text,
            after_layer=after_layer,
        )
        states = self.norm(x)
        return DecoderOutput(states=states if packing is None else packing.unpack(states), alignment=alignment)

    def run(
        self,
        numbers: range,
        x: Float[Tensor, "B L C"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 L N"] | Bool[Tensor, "1 1 L N"] | PackedAttention | None,
        *,
        cache: KeyValueCache | None = None,
        text: TextKeys | None = None,
        after_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B L C"], Tensor | None]:
        """Run some of the layers, without the final norm; see `forward`.

        Returns:
            What the next layer takes, and the alignment if the designated layer was among these.
        """
        alignment = None
        for number in numbers:
            x, found = self.call(self.layers[number], x, rotation, mask, cache, text)
            alignment = found if found is not None else alignment
            if after_layer is not None:
                x = after_layer(number, x)
        if cache is not None:
            cache.length += x.shape[1]
        return x, alignment

    def call(self, part: Callable[..., Result], *inputs: object) -> Result:
        """Call a layer or a head; in training with `gradient_checkpointing`, only its inputs are kept, and the backward
        pass calls it again."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return part(*inputs)

    def rotation(self, x: Tensor, positions: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, L, E) at these positions, as the layers want them beside x."""
        return rotary(positions, self.config.head_dim, self.config.rope_theta, self.dtype(x), self._stretched)

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        """What queries and keys made of x are in."""
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

    def _stretched(self, frequencies: Tensor) -> Tensor:
        """Llama 3.1's longer context: frequencies of long waves divided by a factor, with a ramp to the short ones."""
        scaling = self.config.rope_scaling
        if scaling is None:
            return frequencies
        fits = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((fits - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)

    def visible(self, x: Tensor, key_mask: Tensor | None, cache: KeyValueCache | None) -> Tensor | None:
        """The dense mask (B, 1, L, N), or None where plain causal attention says the same."""
        length = x.shape[1]
        past = 0
        if cache is not None:
            past = cache.length
            if key_mask is not None or cache.key_mask is not None:
                key_mask = cache.extend_mask(key_mask, length)
        if key_mask is None and (past == 0 or length == 1):
            return None
        total = past + length
        causal = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(past) if length > 1 else None
        if key_mask is None:
            assert causal is not None, "one new position without a mask sees everything"
            return causal[None, None]
        keys = key_mask[:, None, None, :total]
        if causal is None:
            return keys
        # A padding position sees itself: a row that sees nothing has no softmax.
        own = torch.eye(length, dtype=torch.bool, device=x.device)
        own = F.pad(own, (past, 0)) if past else own
        return (causal & keys) | own

    @torch.no_grad()
    def load_llama(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the layers of a `transformers` Llama, Qwen2 or Qwen3 (its base model's state), of the same sizes.

        Raises:
            KeyError: if a weight is missing.
            RuntimeError: if a size differs.
        """
        for i, layer in enumerate(self.layers):
            at, own = f"layers.{i}.", layer.attention
            for kind in ("weight", "bias"):
                joined = {
                    own.qkv: [f"{at}self_attn.{part}_proj.{kind}" for part in "qkv"],
                    own.out: [f"{at}self_attn.o_proj.{kind}"],
                    layer.mlp.gate_up: [f"{at}mlp.{part}_proj.{kind}" for part in ("gate", "up")],
                    layer.mlp.down: [f"{at}mlp.down_proj.{kind}"],
                }
                for linear, names in joined.items():
                    tensor = getattr(linear, kind)
                    if isinstance(tensor, Tensor):
                        _copy(tensor, torch.cat([weights[name] for name in names]), names[0])
            norms = {
                "input_layernorm": layer.attention_norm,
                "post_attention_layernorm": layer.mlp_norm,
                "self_attn.q_norm": own.q_norm,
                "self_attn.k_norm": own.k_norm,
            }
            for name, norm in norms.items():
                if isinstance(norm, nn.RMSNorm):
                    _copy(norm.weight, weights[f"{at}{name}.weight"], at + name)
        _copy(self.norm.weight, weights["norm.weight"], "norm")


def _copy(target: Tensor, value: Tensor, name: str) -> None:
    """As `copy_`, without broadcasting."""
    if target.shape != value.shape:
        raise RuntimeError(f"{name} makes {tuple(value.shape)}, but {tuple(target.shape)} is asked for")
    target.copy_(value)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out: (B, H, L, E) queries of G key-value heads to (B, L, H * E).

    Forward and backward in bfloat16 take a third of the time of PyTorch's CPU kernel, which is made for inference and
    repeats the key-value heads.
    """
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, total = k.shape[1:3]
    if mask is None:
        mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    grouped = (q * head_dim**-0.5).reshape(batch, num_kv_heads, -1, head_dim)  # (B, G, H / G * L, E)
    scores = (grouped @ k.transpose(-1, -2)).view(batch, num_kv_heads, -1, length, total) + bias[:, :, None]
    weights = scores.softmax(dim=-1).view(batch, num_kv_heads, -1, total)
    return (weights.to(v.dtype) @ v).view(batch, num_heads, length, head_dim).transpose(1, 2).reshape(batch, length, -1)
