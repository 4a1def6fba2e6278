"""The windowed transformer: rows of different lengths are gone on from as if each were alone."""

from __future__ import annotations

import pytest
import torch

from tokenizer.transformer import CausalTransformer


@pytest.fixture
def stack() -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(16, num_layers=2, num_heads=2, ffn_dim=24, window=4).eval()


def inputs(frames: int, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, frames, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_rows_end_where_they_end(stack: CausalTransformer) -> None:
    """States after 0, 2 and 9 of 9 inputs, gone on from twice with other lengths, then frame by frame."""
    x, taken = inputs(30), torch.zeros(3, dtype=torch.int64)
    whole, _ = stack(x)
    state = None
    for lengths in ([0, 2, 9], [3, 0, 1], [5, 2, 0]):
        columns = taken[:, None] + torch.arange(9)
        part = x[torch.arange(3)[:, None], columns.clamp(max=29)]
        counts = torch.tensor(lengths)
        out, state = stack(part, state, counts)
        for row, count in enumerate(lengths):
            expected = whole[row, taken[row] : taken[row] + count]
            torch.testing.assert_close(out[row, :count], expected, atol=1e-5, rtol=0)
        taken = taken + counts
        assert state.layers[0].keys.shape[2] == 3 and state.known is not None
    for _ in range(6):
        rows = torch.arange(3)
        out, state = stack(x[rows, taken][:, None], state)
        torch.testing.assert_close(out[:, 0], whole[rows, taken], atol=1e-5, rtol=0)
        taken = taken + 1


@torch.no_grad()
def test_rows_can_be_chosen(stack: CausalTransformer) -> None:
    x = inputs(9)
    _, state = stack(x, None, torch.tensor([1, 9, 4]))
    chosen = torch.tensor([2, 2, 0])
    after = inputs(1)
    expected, _ = stack(after, state)
    for order in (chosen, torch.tensor([1])):
        found, _ = stack(after[order], state.select(order))
        torch.testing.assert_close(found, expected[order], atol=1e-6, rtol=0)
    _, plain = stack(x)
    found, _ = stack(after[chosen], plain.select(chosen))
    torch.testing.assert_close(found, stack(after, plain)[0][chosen], atol=1e-6, rtol=0)
