"""Caches that join and forget: rows go on as if they were alone, or as if what is forgotten had never been."""

from __future__ import annotations

import pytest
import torch

from hybridlm.cache import KeyValueCache
from hybridlm.decoder import Decoder
from hybridlm.model import HybridLM
from hybridlm.model_cache import ModelCache
from tests.support.tiny_frames import VARIANTS, select, tiny_config, tiny_frames, tiny_model, tiny_prefix


def begin(model: HybridLM, row: int, steps: int) -> tuple[torch.Tensor, ModelCache]:
    """One row alone: its prefix, two frames at once, then `steps` one by one."""
    prefix, mask = tiny_prefix()
    ids = prefix[row : row + 1, mask[row]]
    frames = tiny_frames()
    h, cache = model.start(ids, torch.ones_like(ids, dtype=torch.bool), select(frames, row, 0, 2))
    for t in range(2, 2 + steps):
        h, cache = take(model, [row], t, cache)
    return h, cache


def take(model: HybridLM, rows: list[int], t: int, cache: ModelCache) -> tuple[torch.Tensor, ModelCache]:
    frames = tiny_frames()
    assert frames.features is not None
    part = slice(t, t + 1)
    return model.step(frames.codes[rows, :, part], frames.latents[rows, part], frames.features[rows, part], cache)


@torch.no_grad()
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_joined_rows_go_on_as_alone(variant: str) -> None:
    """Rows of other prefixes and ages enter one after the other; one leaves."""
    model = tiny_model(**VARIANTS[variant])
    alone = {row: begin(model, row, steps) for row, steps in ((0, 3), (1, 0), (2, 1))}
    cache = ModelCache.join([alone[0][1], alone[1][1].select(torch.tensor([0]))])
    rows = [0, 1]
    for step in range(4):
        if step == 1:
            cache, rows = ModelCache.join([cache, begin(model, 2, 1)[1]]), [0, 1, 2]
        if step == 2:
            cache, rows = cache.select(torch.tensor([2, 0])), [2, 0]
        h, cache = take(model, rows, 4 + step, cache)
        for number, row in enumerate(rows):
            expected, own = take(model, [row], 4 + step, alone[row][1])
            alone[row] = (expected, own)
            torch.testing.assert_close(h[number : number + 1], expected, atol=2e-5, rtol=1e-4)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def test_what_is_forgotten_has_never_been() -> None:
    """With one layer, keys know nothing of what came before: the rest equals a sequence without the forgotten part."""
    torch.manual_seed(0)
    config = tiny_config(num_layers=1, alignment_layer=0)
    decoder = Decoder(config).eval()
    x, new = torch.randn(3, 14, 32), torch.randn(3, 1, 32)
    mask = torch.arange(14) >= torch.tensor([[0], [3], [5]])
    mask[2, 8:10] = False  # padding inside a row, as prompts of unequal length leave it
    cache = KeyValueCache.empty()
    decoder(x, positions_of(mask), key_mask=mask, cache=cache)
    sinks, dropped = torch.tensor([2, 1, 3]), torch.tensor([5, 6, 0])
    shorter = cache.forget(sinks, dropped, decoder.rotation)
    assert shorter.length == 9  # of 14, 11 and 7 real ones 9, 5 and 7 are left
    positions = mask.sum(dim=1, keepdim=True) - dropped[:, None]
    found = decoder(new, positions, cache=shorter).states[:, 0]
    for row in range(3):
        real = x[row, mask[row]]
        left = torch.cat([real[: sinks[row]], real[sinks[row] + dropped[row] :], new[row]])[None]
        expected = decoder(left, torch.arange(left.shape[1])[None]).states[0, -1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
    assert cache.length == 14  # the old one is as it was but for a step's room


@torch.no_grad()
def test_memory_stays_bounded() -> None:
    torch.manual_seed(0)
    config = tiny_config(num_layers=1, alignment_layer=0)
    decoder = Decoder(config).eval()
    cache, position = KeyValueCache.empty(), torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(700):
        if cache.length == 40:
            gone = torch.full((2,), 10)
            cache, position = cache.forget(torch.full((2,), 4), gone, decoder.rotation), position - gone[:, None]
        decoder(torch.randn(2, 1, 32), position, cache=cache)
        position = position + 1
    assert cache.length <= 40 and cache.keys[0].shape[2] == 256 and int(position.max()) <= 40


@torch.no_grad()
def test_steps_across_the_end_of_a_block_equal_the_whole() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).eval()
    x = torch.randn(1, 262, 32)
    cache = KeyValueCache.empty()
    states = [decoder(x[:, :250], torch.arange(250)[None], cache=cache).states]
    states += [decoder(x[:, t : t + 1], torch.tensor([[t]]), cache=cache).states for t in range(250, 262)]
    whole = decoder(x, torch.arange(262)[None]).states
    torch.testing.assert_close(torch.cat(states, dim=1), whole, atol=1e-5, rtol=1e-4)
