"""A training step without its numbers: what it would keep in memory, and what it would compute.

Every operation of forward and backward runs on fake tensors, which have shapes and no content; what lives at each
moment is what a real step would hold. What the step asks of contents (is anything padded? how many frames are scored?)
is answered as an ordinary batch would.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm.latent_head import GaussianMixture
from hybridlm.model import HybridLM
from training.flops import step_flop
from training.task import Batch, Task

aten = torch.ops.aten
BACKWARD, COPIES, OTHER = "backward", "bf16 copies of weights", "batch and losses"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the contents of a batch would say."""

    scored: float
    """Share of the frames that the heads score."""
    columns: int
    """Tags and `<audio>`: the decoder's prefix without its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """Memory beside weights, buffers and the optimizer's state, and FLOP, of one micro-batch."""

    activations: Mapping[str, int]
    """Bytes at the moment of the peak, without gradients, by the part of the model whose forward pass made them;
    `BACKWARD` is what the backward pass works with, `COPIES` autocast's."""
    gradients: int
    """Bytes of gradients at that moment."""
    flop: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.activations.values()) + self.gradients


def dry_run(
    make: Callable[[], tuple[Task, Batch]],
    answers: Answers,
    *,
    autocast: torch.dtype | None,
    fused: bool,
    keep_gradients: bool = False,
) -> DryRun:
    """Walk through one micro-batch of a language task.

    Args:
        make: Gives the task, with a `HybridLM` as its module, and a batch; called under fake tensors.
        answers: About the batch.
        autocast: The precision of matrix products; None: fp32.
        fused: Attention keeps no probabilities, in any precision, as on a GPU.
        keep_gradients: Those of an earlier micro-batch are there already.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        task, batch = make()
        model = task.modules()["model"]
        assert isinstance(model, HybridLM)
        model.train()
        if fused:
            for layer in model.decoder.layers:
                layer.attention.written_out_in_half = False
        with _Answering(answers):
            flop = step_flop(task, batch)
        if keep_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        watch = _Watch(answers, model)
        with watch:
            batch = {name: value.clone() for name, value in batch.items()}
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss, _ = task.loss("model", batch, step=0, generator=torch.Generator())
            watch.default = BACKWARD
            loss.backward()
        return watch.result(flop)


class _Answering(TorchDispatchMode):
    """Answers the questions that a language task asks of its batch's contents."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            # Something is always there (latents, texts), and never is all the same (some prefix is padded).
            return not hasattr(args[0], "_of_all") if args[0].dtype == torch.bool else self.answers.columns
        if func is aten.nonzero.default:
            rows = round(self.answers.scored * args[0].numel())
            return self.made(func, args, torch.empty(rows, args[0].dim(), dtype=torch.int64))
        out = func(*args, **(kwargs or {}))
        if func is aten.all.default:
            out._of_all = True
        return self.made(func, args, out)

    def made(self, func: Any, args: Any, out: Any) -> Any:
        """Sees every result."""
        return out


@dataclass(kw_only=True, slots=True)
class _Storage:
    alive: weakref.ref[Any]
    bytes: int
    part: str
    number: int
    """In order of creation."""


class _Watch(_Answering):
    """Knows what lives, and what lived when it was the most."""

    def __init__(self, answers: Answers, model: HybridLM) -> None:
        super().__init__(answers)
        self.default = OTHER
        """Part of what no module makes."""
        self._model = model
        self._parts = {id(module): name for name, child in model.named_children() for module in child.modules()}
        self._given = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._earlier = [p.grad for p in model.parameters() if p.grad is not None]
        self._given |= {_key(gradient) for gradient in self._earlier}
        self._live: dict[int, _Storage] = {}
        self._bytes: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._created = self._created_at_most = 0

    def made(self, func: Any, args: Any, out: Any) -> Any:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self._live and key not in self._given:
                copied = func is aten._to_copy.default and _key(args[0]) in self._given
                self._add(key, tensor.untyped_storage(), COPIES if copied else self._part())
        return out

    def result(self, flop: int) -> DryRun:
        """After the backward pass."""
        activations, gradients = Counter(self._most), sum(g.untyped_storage().nbytes() for g in self._earlier)
        for parameter in self._model.parameters():
            found = None if parameter.grad is None else self._live.get(_key(parameter.grad))
            if found is not None and found.number <= self._created_at_most:
                gradients += found.bytes
                activations[found.part] -= found.bytes
        return DryRun(activations={part: n for part, n in activations.items() if n}, gradients=gradients, flop=flop)

    def _add(self, key: int, storage: torch.UntypedStorage, part: str) -> None:
        self._created += 1

        def gone(_: Any) -> None:
            self._bytes[part] -= self._live.pop(key).bytes

        size = storage.nbytes()
        self._live[key] = _Storage(alive=weakref.ref(storage, gone), bytes=size, part=part, number=self._created)
        self._bytes[part] += size
        if self._bytes.total() > self._most.total():
            self._most, self._created_at_most = Counter(self._bytes), self._created

    def _part(self) -> str:
        """The part of the model whose code is running, found on the stack: heads are called by many methods."""
        frame = sys._getframe(2) if self.default == OTHER else None
        while frame is not None:
            me = frame.f_locals.get("self")
            if id(me) in self._parts:
                return self._parts[id(me)]
            if isinstance(me, GaussianMixture):
                return "latent_head"
            frame = frame.f_back
        return self.default


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
