"""What a run may do with a language model's layers: compute them twice to save memory, or compile them to save time.

Both act on the layers of every `Decoder`, which is where the time goes; other models are left as they are, and the run
says so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hybridlm.decoder import Decoder
from tokenizer.errors import UserError
from training.distributed import Replicas

COMPILER = "inductor"
"""PyTorch's own; it needs a C++ compiler on a CPU and Triton on a GPU."""
GRAPHS = 32
"""Most that are compiled; the next one would run as it is written."""


def keep_inputs_alone(modules: Mapping[str, nn.Module]) -> list[str]:
    """Switch gradient checkpointing on (arXiv 1604.06174); returns why it is not, if so."""
    decoders = _decoders(modules)
    for decoder in decoders:
        decoder.gradient_checkpointing = True
    return [] if decoders else ["gradient_checkpointing is not used: this task trains no language model's decoder"]


def compile_layers(modules: Mapping[str, nn.Module], backend: Replicas) -> list[str]:
    """Have the layers compiled, if one can be, for tensors of any length; returns why they are not, if so.

    A copy of a layer is tried first, forward and backward, so that a machine that cannot compile it is found out before
    the run depends on it.
    """
    decoders = _decoders(modules)
    if not decoders:
        return ["compile is not used: this task trains no language model's decoder"]
    if not backend.compiles:
        return [f"compile is not used: {backend.name} hands weights out by hooks that cannot be compiled"]
    reason = _reason_against(decoders[0], backend)
    told = [other for other in backend.everybody(reason) if other is not None]
    if told:
        return [f"compile is not used, layers run uncompiled: {told[0]}"]
    # Layers of all kinds share a list of what was compiled: for masks and none, the alignment's layer and the others.
    torch._dynamo.config.cache_size_limit = GRAPHS
    for decoder in decoders:
        for layer in decoder.layers:
            layer.compile(dynamic=True, backend=COMPILER)
    return []


@contextlib.contextmanager
def uncompiled(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block layers run as they are written: what is measured does not depend on a compiler, and what was
    compiled for weights that processes share does not meet whole ones."""
    layers = [layer for decoder in _decoders(modules) for layer in decoder.layers]
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """A compiler that fails in the midst of a run ends it in one line.

    Raises:
        UserError: it failed.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise UserError(f"compile=true: {_in_one_line(error)}; set compile=false and go on with --resume") from error


def _decoders(modules: Mapping[str, nn.Module]) -> list[Decoder]:
    return [part for module in modules.values() for part in module.modules() if isinstance(part, Decoder)]


def _reason_against(decoder: Decoder, backend: Replicas) -> str | None:
    layer = copy.deepcopy(decoder.layers[0]).to(backend.device).train()
    layer.compile(dynamic=True, backend=COMPILER)
    x = torch.randn(2, 9, decoder.config.hidden_dim, device=backend.device, requires_grad=True)
    try:
        with torch.autocast(backend.device.type, backend.dtype, enabled=backend.dtype is not None):
            rotation = decoder.rotation(x, torch.arange(9, device=backend.device).expand(2, -1))
            y, _ = layer(x, rotation, None, None, None)
        y.float().sum().backward()
    except Exception as error:  # whatever it is, the run can do without
        return _in_one_line(error)
    return None


def _in_one_line(error: Exception) -> str:
    """What went wrong, out of a text of many lines that ends in advice."""
    text = str(error).split("\n\nSet TORCHDYNAMO_VERBOSE")[0]
    return " ".join(text.split())[:300] or type(error).__name__
