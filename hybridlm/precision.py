"""A loaded model's matrices, laid out and rounded for drawing from it.

One frame at batch 1 reads every matrix once, so its time is that of reading them. Three ways on a CPU, by kernels of
PyTorch's own:

- fp32: columns instead of rows, which are read faster; large matrices in oneDNN's blocks, which are so by far where
  there are a few rows of input, but whose calls cost some 15 us. The values are the same, results differ in the last
  bits.
- bf16: oneDNN's blocks in half the bytes, where the processor multiplies bf16.
- int8: the backbone's and the depth decoder's matrices as one byte a weight with a scale per output. Inputs stay bf16:
  quantizing them too is faster for large models, but a row's scale would depend on its batch.

A packed model is for drawing alone: it has no gradients and no state to save. Training and evaluation load a model as
it is.

Shapes: N rows, K inputs and V outputs of a matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.adapter import adapter_names
from hybridlm.model import HybridLM
from tokenizer.errors import UserError

Precision = Literal["fp32", "bf16", "int8"]
AUTO = "auto"
INT8_WIDTH = 16
"""The int8 kernel reads so many inputs at once, and past the end of a matrix whose width is no multiple."""
BLOCKED_FROM = 1_000_000
"""Weights from which a matrix is read from blocks at fp32."""
ROUNDED_FROM = 32_768
"""Weights from which rounding a matrix saves more than the call costs."""
MEASURED_WEIGHTS = 4_000_000
"""`choose` times so many of the backbone's weights."""
WORTH = 0.9
"""A less exact precision is chosen if it takes at most this share of the time."""


class PackedLinear(nn.Module):
    """y = x W^T + b, with W in oneDNN's blocks.

    Args:
        weight: W.
        bias: b, or None.
    """

    def __init__(self, weight: Float[Tensor, "V K"], bias: Float[Tensor, " V"] | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.packed = self._laid_out(weight.detach())

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def dense(self) -> Float[Tensor, "V K"]:
        """W, exactly."""
        return self.packed.to_dense()

    def forward(self, x: Float[Tensor, "*N K"]) -> Float[Tensor, "*N V"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedHalf(PackedLinear):
    """The same in bf16; sums are float32, inputs and outputs float32 outside."""

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return PackedLinear._laid_out(weight.bfloat16())

    def forward(self, x: Float[Tensor, "*N K"]) -> Float[Tensor, "*N V"]:
        y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, None, "none", [], "").float()
        return y if self.bias is None else y + self.bias


class RoundedLinear(nn.Module):
    """y = x W^T + b with W in bf16, without blocks: on a GPU, or for a compiler."""

    def __init__(self, weight: Float[Tensor, "V K"], bias: Float[Tensor, " V"] | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.packed = weight.detach().bfloat16()

    def forward(self, x: Float[Tensor, "*N K"]) -> Float[Tensor, "*N V"]:
        y = F.linear(x.bfloat16(), self.packed).float()
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """y = x W^T + b, where W is int8 times a scale per output."""

    def __init__(self, weight: Float[Tensor, "V K"], bias: Float[Tensor, " V"] | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # The scale is rounded first, so that the weights are rounded for the one that is used.
        self.scales = (weight.detach().abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        self.packed = (weight.detach() / self.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Float[Tensor, "*N K"]) -> Float[Tensor, "*N V"]:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.packed, self.scales).float()
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Chosen(NamedTuple):
    """A precision, and why."""

    precision: Precision
    reason: str
    """One line for the user."""


def check(precision: str, device: torch.device) -> None:
    """Raises:
    UserError: an unknown precision, or one that the device can't do.
    """
    if precision not in (AUTO, *get_args(Precision)):
        raise UserError(f"precision={precision!r} must be one of {', '.join((AUTO, *get_args(Precision)))}")
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"precision=int8 is for CPUs, not for {device.type}; use bf16 there")
    if precision == "bf16" and not _has_bf16(device):
        lacks = "AVX512-BF16 and AMX" if device.type == "cpu" else "bf16"
        raise UserError(f"precision=bf16: this {device.type} lacks {lacks}; use fp32, or int8 on a CPU")
    if precision == "int8" and not hasattr(torch, "_weight_int8pack_mm"):
        raise UserError(f"precision=int8: PyTorch {torch.__version__} lacks the kernel; use fp32")


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    supported = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and any(ask() for ask in supported)


@torch.no_grad()
def pack(model: HybridLM, precision: Precision, *, blocks: bool = True) -> str | None:
    """Lay the model's matrices out, in place; see the module's text.

    Args:
        model: In evaluation mode, where it is to stay.
        precision: Of the backbone and the depth decoder; everything else is fp32.
        blocks: Whether oneDNN's blocks may be used, which a compiler can't read.

    Returns:
        What stayed at fp32 that should not have, in words; None for nothing.

    Raises:
        UserError: another precision than fp32 for a model with adapters, or one that the device can't do.
    """
    device = next(model.parameters()).device
    check(precision, device)
    if model.packed is not None:
        raise ValueError(f"the model is packed at {model.packed} already")
    if adapter_names(model) and precision != "fp32":
        raise UserError(f"precision={precision} needs a model without adapters; merge first (`hybridlm merge`)")
    unfit: list[str] = []

    def laid_out(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        rounded = name.startswith(("decoder.layers.", "code_head.")) and weight.numel() >= ROUNDED_FROM
        if rounded and precision == "int8" and weight.shape[1] % INT8_WIDTH:
            unfit.append(name)
            rounded = False
        return _laid_out(weight, bias, precision if rounded else "fp32", device, blocks)

    for name, parent, key, linear in list(_linears(model)):
        setattr(parent, key, laid_out(name, _dense(linear), linear.bias))
    head = model.code_head
    if head is not None:
        head.read_outs = nn.ModuleList(laid_out("code_head.output", matrix, None) for matrix in head.output)
        head.output = None  # type: ignore[assignment]
    model.requires_grad_(False)
    model.packed = precision
    if unfit:
        return f"{len(unfit)} matrices whose width is no multiple of {INT8_WIDTH} stay at fp32, {unfit[0]} for one"
    return None


@torch.no_grad()
def unpack(model: HybridLM) -> None:
    """Undo `pack`.

    Raises:
        UserError: matrices that were rounded.
    """
    if model.packed is None:
        return
    if model.packed != "fp32":
        raise UserError(
            f"the model was loaded at precision={model.packed}, which was rounded; load it at fp32 for this"
        )
    for _, parent, key, child in list(_linears(model)):
        setattr(parent, key, _linear(_dense(child), child.bias))
    head = model.code_head
    if head is not None and head.read_outs is not None:
        head.output = nn.Parameter(_read_outs(head.read_outs))
        head.read_outs = None
    model.packed = None
    model.requires_grad_(not adapter_names(model))


@torch.no_grad()
def plain_state(model: HybridLM) -> dict[str, Tensor]:
    """The state that `pack` found, of a model at fp32.

    Raises:
        ValueError: matrices that were rounded.
    """
    if model.packed not in (None, "fp32"):
        raise ValueError(f"a model packed at {model.packed} has lost its state")
    packed, model.packed = model.packed, None
    state: dict[str, Tensor] = dict(model.state_dict())
    model.packed = packed
    state |= {f"{name}.weight": _dense(linear) for name, _, _, linear in _linears(model)}
    head = model.code_head
    if head is not None and head.read_outs is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("code_head.read_outs.")}
        state["code_head.output"] = _read_outs(head.read_outs)
    return state


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear | PackedLinear]]:
    """Every `nn.Linear` and what `pack` makes of one, but for the read-outs: its name, its parent, its name there."""
    for name, parent in model.named_modules():
        if ".lora_" in name or isinstance(parent, nn.ModuleList):
            continue  # an adapter's own matrices are switched and scaled
        for key, child in parent.named_children():
            if type(child) in (nn.Linear, PackedLinear):
                yield f"{name}.{key}".lstrip("."), parent, key, cast("nn.Linear | PackedLinear", child)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With this very storage, laid out as it is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    linear.bias = None if bias is None else nn.Parameter(bias.detach())  # type: ignore[assignment]
    return linear


def _dense(linear: nn.Linear | PackedLinear) -> Tensor:
    return linear.dense() if isinstance(linear, PackedLinear) else linear.weight.detach().contiguous()


def _read_outs(read_outs: nn.ModuleList) -> Float[Tensor, "K V E"]:
    return torch.stack([_dense(cast("nn.Linear | PackedLinear", one)) for one in read_outs])


def _laid_out(
    weight: Tensor, bias: Tensor | None, precision: Precision, device: torch.device, blocks: bool = True
) -> nn.Module:
    if precision == "int8":
        return Int8Linear(weight, bias)
    if precision == "bf16":
        return PackedHalf(weight, bias) if device.type == "cpu" and blocks else RoundedLinear(weight, bias)
    if device.type != "cpu":
        return _linear(weight, bias)
    if blocks and weight.numel() >= BLOCKED_FROM and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    return _linear(weight.t().contiguous().t(), bias)


_chosen: dict[tuple[object, ...], Chosen] = {}


def choose(model: HybridLM) -> Chosen:
    """The precision that is fastest here for a model's backbone at batch 1, by a measurement of some tens of ms.

    Kept for the process, for models of the same sizes.
    """
    device = next(model.parameters()).device
    if adapter_names(model):
        return Chosen("fp32", "precision auto: fp32, for adapters are on")
    key = (device, torch.get_num_threads(), model.config.hidden_dim, model.config.ffn_dim, model.config.num_layers)
    if key not in _chosen:
        _chosen[key] = _measure(model, device)
    return _chosen[key]


@torch.inference_mode()
def _measure(model: HybridLM, device: torch.device) -> Chosen:
    weights: list[Tensor] = []
    for _, _, _, linear in _linears(model.decoder):
        if sum(weight.numel() for weight in weights) < MEASURED_WEIGHTS:
            weights.append(_dense(linear))
    seconds: dict[Precision, float] = {}
    for precision in get_args(Precision):
        try:
            check(precision, device)
        except UserError:
            continue
        if precision == "int8" and any(weight.shape[1] % INT8_WIDTH for weight in weights):
            continue
        products = [_laid_out(weight, None, precision, device) for weight in weights]
        inputs = [torch.randn(1, 1, weight.shape[1], device=device) for weight in weights]
        seconds[precision] = min(_time(products, inputs, device) for _ in range(5))
    best: Precision = "fp32"
    for precision in seconds:  # from the most to the least exact
        if seconds[precision] <= WORTH * seconds[best]:
            best = precision
    speeds: dict[str, str] = {
        name: f"{name}: {seconds['fp32'] / took:.1f}x fp32" for name, took in seconds.items() if name != "fp32"
    }
    told = speeds.pop(best, "fp32")
    beside = f", not {' nor '.join(speeds.values())}" if speeds else ""
    return Chosen(best, f"precision auto: {told} here{beside}, measured on the backbone's matrices")


def _time(products: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor], device: torch.device) -> float:
    began = time.perf_counter()
    for product, x in zip(products, inputs, strict=True):
        product(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
