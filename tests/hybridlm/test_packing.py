"""Several documents in one row: the losses are those of each alone, and no document hears another."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.frame_nll import FrameNLL
from hybridlm.model import HybridLM
from hybridlm.packing import Packing, packed_kernel
from hybridlm.reader import Guide
from tests.support.tiny_frames import LENGTHS, VARIANTS, tiny_frames, tiny_model, tiny_prefix
from tokenizer.frames import AudioFrames

ROWS = torch.tensor([1, 0, 1])
ENDED = torch.tensor([True, False, True])
MASK = torch.tensor([[True, False, True, True, True, True], [False] * 3 + [True] * 3, [False] * 5 + [True]])
"""The first document has a column hidden in the midst of its text, as a dropped condition is."""


def score(model: HybridLM, frames: AudioFrames, rows: Tensor | None, **values: Any) -> FrameNLL:
    prefix, _ = tiny_prefix()
    config = model.config
    text = MASK & (torch.arange(6) < 5) & (prefix >= config.first_text_id)
    aligns = config.alignment_heads > 0 or config.reader_layer is not None
    values = {"ended": ENDED, "text_mask": text if aligns else None, **values}
    return model.nll(prefix, MASK, frames, rows=rows, with_flow=True, generator=torch.Generator(), **values)


def guide() -> Guide:
    states = max(LENGTHS) + 1
    places = torch.linspace(0, 4, states).expand(3, states)
    return Guide(before=places - 0.2, places=places, known=torch.tensor([True, False, False]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_packed_losses_are_those_of_documents_alone(variant: str, training: bool) -> None:
    """In training too: noise on the history is drawn for documents, and so is the same."""
    model, frames = tiny_model(**VARIANTS[variant]).train(training), tiny_frames()
    more = {"guide": guide()} if training and model.reader is not None else {}
    alone, packed = score(model, frames, None, **more), score(model, frames, ROWS, **more)
    for name in ("codes", "latents", "stop", "alignment", "flow"):
        one, other = getattr(alone, name), getattr(packed, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(packed.total(), alone.total(), rtol=1e-5, atol=1e-5)
    one, other = (
        torch.autograd.grad(nll.total().sum(), model.decoder.layers[0].parameters()) for nll in (alone, packed)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["hybrid", "whisper-gpt", "reader"])
def test_no_document_hears_another(variant: str) -> None:
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    assert frames.features is not None
    inputs = (frames.latents.requires_grad_(), frames.features.requires_grad_())
    embedded: list[Tensor] = []
    model.text_embedding.register_forward_hook(lambda module, ids, out: embedded.append(out.retain_grad() or out))
    total = score(model, frames, torch.zeros(3, dtype=torch.int64)).total()
    for document in range(3):
        model.zero_grad()
        for x in (*inputs, embedded[0]):
            x.grad = None
        total[document].backward(retain_graph=True)
        for x in (*inputs, embedded[0]):
            if x.grad is None:
                continue
            others = [other for other in range(3) if other != document]
            assert not bool(x.grad[others].any())
        heard = [bool(x.grad[document].any()) for x in (*inputs, embedded[0]) if x.grad is not None]
        assert any(heard)


def test_positions_restart_and_rows_keep_their_order() -> None:
    real = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, True]])
    packing = Packing.of(ROWS, real, "SDPA with a block mask")
    assert packing.documents.tolist() == [[1, 1, 1, 1], [0, 0, 2, 2]]
    assert packing.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert (packing.ends.tolist(), packing.longest) == ([0, 4, 6, 8], 4)
    x = torch.arange(12.0).view(3, 4, 1)
    assert packing.pack(x)[..., 0].tolist() == [[4, 5, 6, 7], [1, 2, 10, 11]]
    assert torch.equal(packing.unpack(packing.pack(x)), x * real[..., None])
    padded = Packing.of(ROWS, real, "FlexAttention")
    assert torch.equal(padded.documents, F.pad(packing.documents, (0, 124), value=-1)), "whole blocks"


def queries(packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = packing.documents.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, columns, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def expected(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.dense_mask()).transpose(1, 2).flatten(2)
    return y * (packing.documents >= 0)[..., None]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_and_varlen_calls_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as it is on a CPU; of flash-attn only what it is asked, for it needs a GPU."""
    real = torch.rand(7, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    packing = Packing.of(torch.tensor([2, 0, 1, 1, 2, 0, 0]), real, "FlexAttention")
    q, k, v = queries(packing)
    wanted = expected(packing, q, k, v)
    there = (packing.documents >= 0)[..., None]
    torch.testing.assert_close(packing.mask()(q, k, v) * there, wanted, rtol=0, atol=1e-5)

    def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, *rest: Any, causal: bool):
        assert causal and ends.dtype == torch.int32 and torch.equal(ends, ends_k) and rest == (longest,)
        assert longest == int(ends.diff().max())
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        parts = []
        for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            one = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1))
        return torch.cat(parts)

    varlen_packing = dataclasses.replace(packing, kernel="flash-attn varlen")
    stub = types.ModuleType("flash_attn")
    stub.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    torch.testing.assert_close(varlen_packing.mask()(q, k, v), wanted, rtol=0, atol=1e-5)


def test_which_kernel_attends() -> None:
    assert packed_kernel("cpu", half=True, flash=True, head_dim=64) == "SDPA with a block mask"
    assert packed_kernel("cuda", half=True, flash=True, head_dim=64) == "flash-attn varlen"
    assert packed_kernel("cuda", half=False, flash=True, head_dim=64) == "FlexAttention"
    assert packed_kernel("cuda", half=True, flash=False, head_dim=8) == "SDPA with a block mask"
