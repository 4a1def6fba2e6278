"""The reader goes through the text from left to right, sees the text alone, and learns its place where it is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hybridlm.model import HybridLM
from hybridlm.reader import MIDDLE_MOVE, WIDEST_MOVE, Guide, Page, Reading, TextReader, place_loss
from tests.support.tiny_frames import tiny_config, tiny_frames, tiny_model, tiny_prefix

READER: dict[str, Any] = {"reader_layer": 0, "reader_heads": 3, "reader_head_dim": 8, "first_text_id": 5}


def opened(model: HybridLM, prefix: torch.Tensor, mask: torch.Tensor) -> Page:
    assert model.reader is not None
    return model.reader.open(model.text_embedding(prefix), prefix, mask)


def states_and_places(model: HybridLM, guide: Guide | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    prefix, mask = tiny_prefix()
    run = model._run(prefix.clamp(min=5), mask, tiny_frames(), None, None, guide)
    assert run.places is not None
    return run.states, run.places


def test_an_untrained_reader_moves_at_the_given_pace() -> None:
    torch.manual_seed(0)
    model = HybridLM(tiny_config(**READER, reader_pace=0.37)).eval()
    with torch.no_grad():
        for glance in model.reader.glances[1:]:  # type: ignore[union-attr]
            glance.shift.weight.zero_()
    _, places = states_and_places(model)
    torch.testing.assert_close(places[-1], 0.37 * torch.arange(1.0, 11.0).expand(3, -1), rtol=0, atol=1e-4)


def test_every_state_starts_where_the_one_before_arrived() -> None:
    model = tiny_model(**READER)
    _, places = states_and_places(model)
    moves = places[-1].diff(dim=1, prepend=torch.zeros(3, 1))
    assert moves.min() >= MIDDLE_MOVE - WIDEST_MOVE and moves.max() <= MIDDLE_MOVE + WIDEST_MOVE
    assert places[-1].min() >= 0 and moves.std() > 0.01
    before = torch.cat([torch.zeros(3, 1), places[-1][:, :-1]], dim=1)
    _, given = states_and_places(model, Guide(before=before))
    torch.testing.assert_close(given[-1], places[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text_in_prefix", [True, False])
def test_the_walk_arrives_where_single_steps_do(text_in_prefix: bool) -> None:
    """Over rows of different prefixes, the places and states of generation's steps, with gradients and without."""
    model = tiny_model(**READER, num_layers=3, alignment_heads=0, text_in_prefix=text_in_prefix)
    prefix, mask = tiny_prefix()
    prefix, frames = prefix.clamp(min=3), tiny_frames()
    with torch.no_grad():
        h, cache = model.start(prefix, mask)
        states, places = [h], [cache.page.place]  # type: ignore[union-attr]
        for t in range(9):
            one = slice(t, t + 1)
            h, cache = model.step(frames.codes[:, :, one], frames.latents[:, one], None, cache)
            states.append(h)
            places.append(cache.page.place)  # type: ignore[union-attr]
        run = model._run(prefix, mask, frames, None, None)
    stepped = torch.stack(places, dim=1)
    assert not mask.all() and stepped.diff(dim=1).std() > 0.01
    assert run.places is not None and len(run.places) == 2
    torch.testing.assert_close(run.places[-1], stepped, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.states, torch.stack(states, dim=1), rtol=0, atol=1e-5)
    learning = model._run(prefix, mask, frames, None, None)
    assert learning.states.requires_grad and not run.states.requires_grad
    torch.testing.assert_close(learning.states.detach(), run.states, rtol=0, atol=1e-5)


def test_a_page_holds_the_pieces_and_not_the_tags() -> None:
    model = tiny_model(**READER)
    prefix = torch.tensor([[0, 3, 9, 7, 2], [4, 8, 6, 11, 2]])
    mask = torch.tensor([[False, True, True, True, True], [True] * 5])
    page = opened(model, prefix, mask)
    assert page.mask.tolist() == [[False, False, True, True, False], [False, True, True, True, False]]
    assert page.numbers[0, 2:4].tolist() == [1, 2] and page.numbers[1, 1:4].tolist() == [1, 2, 3]
    # Another tag, more padding: the same page.
    other = opened(model, torch.tensor([[1, 1, 2, 9, 7, 2]]), torch.tensor([[False, False, True, True, True, True]]))
    torch.testing.assert_close(other.keys[:, :, 3:5], page.keys[:1, :, 2:4])
    # A piece is heard through its neighbours, on both sides.
    changed = opened(model, torch.tensor([[0, 3, 9, 10, 2]]), mask[:1])
    assert not torch.allclose(changed.values[:, :, 2], page.values[:1, :, 2])


def test_a_state_reads_what_is_at_its_place_and_nothing_far_from_it() -> None:
    model = tiny_model(**READER)
    reader = model.reader
    assert isinstance(reader, TextReader)
    glance = reader.glances[0]
    with torch.no_grad():
        glance.query.weight.zero_()
        glance.centre.zero_()
        glance.log_width.fill_(-0.5)
    prefix = torch.randint(5, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 30, dtype=torch.bool)
    page = opened(model, prefix, mask)
    states = torch.zeros(1, 1, model.config.hidden_dim)
    at_ten = glance(states, page, torch.tensor([[10.0]]))
    far, near = dataclasses.replace(page, values=page.values.clone()), dataclasses.replace(page, values=page.values + 0)
    far.values[:, :, 20:] = 7.0
    near.values[:, :, 9] = 7.0  # the tenth piece
    torch.testing.assert_close(glance(states, far, torch.tensor([[10.0]])), at_ten)
    assert not torch.allclose(glance(states, near, torch.tensor([[10.0]])), at_ten)
    # Long past the end, and where there is no text, nothing is read.
    assert glance(states, page, torch.tensor([[60.0]])).abs().max() < 1e-4
    empty = dataclasses.replace(page, mask=torch.zeros_like(page.mask))
    assert glance(states, empty, torch.tensor([[10.0]])).abs().max() == 0


def test_without_text_the_reader_is_silent() -> None:
    model = tiny_model(**READER)
    prefix, frames = torch.tensor([[3, 2]] * 3), tiny_frames()
    mask = torch.ones_like(prefix, dtype=torch.bool)
    with_reader = model.states(prefix, mask, frames)
    assert model.reader is not None
    for glance in model.reader.glances:
        torch.nn.init.zeros_(glance.out.weight)
    torch.testing.assert_close(model.states(prefix, mask, frames), with_reader)


def test_rows_without_known_places_are_shown_an_even_pace() -> None:
    model = tiny_model(**READER)
    prefix = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    page = opened(model, prefix, torch.ones(2, 6, dtype=torch.bool))
    lengths, given = torch.tensor([3, 4]), torch.full((2, 5), 2.5)
    guide = TextReader.even_guide(page, lengths, 5, None)
    torch.testing.assert_close(guide.before, torch.tensor([[0.0, 2, 4, 6, 6], [0.0, 1.5, 3, 4.5, 6]]))
    known = torch.tensor([True, False])
    mixed = TextReader.even_guide(page, lengths, 5, Guide(before=given, places=given, known=known))
    assert torch.equal(mixed.before[0], given[0]) and torch.equal(mixed.before[1], guide.before[1])


def test_where_a_row_is_shown_to_be_decides_what_it_reads() -> None:
    model = tiny_model(**READER)
    at_one, _ = states_and_places(model, Guide(before=torch.full((3, 10), 1.0)))
    at_four, places = states_and_places(model, Guide(before=torch.tensor([[1.0], [4.0], [1.0]]).expand(-1, 10)))
    torch.testing.assert_close(at_four[0], at_one[0])
    assert not torch.allclose(at_four[1], at_one[1])
    assert (places[-1][1] - 4.0 - MIDDLE_MOVE).abs().max() <= WIDEST_MOVE


def guide_for(places: torch.Tensor, known: list[bool]) -> Guide:
    before = torch.cat([torch.zeros(len(places), 1), places[:, :-1]], dim=1)
    return Guide(before=before, places=places, known=torch.tensor(known))


def test_the_place_loss_wants_the_places() -> None:
    true = torch.linspace(0, 6, 10).expand(3, -1)
    lengths = torch.tensor([9, 5, 7])
    guide = guide_for(true, [True, True, False])
    assert place_loss([true, true], guide, lengths).tolist() == [0, 0, 0]
    near, far = place_loss([true + 1.0, true], guide, lengths), place_loss([true, true + 2.0], guide, lengths)
    assert near[0] > 0 and far[0] > near[0] and near[2] == far[2] == 0
    padded = true.clone()
    padded[1, 6:] += 100  # past the row's end
    assert place_loss([padded, true], guide, lengths)[1] == 0


def test_a_reader_that_was_taught_walks_alone() -> None:
    torch.manual_seed(0)
    model = HybridLM(tiny_config(**READER, alignment_heads=0)).train()
    prefix, frames = tiny_prefix()[0].clamp(min=5), tiny_frames()
    mask = torch.ones_like(prefix, dtype=torch.bool)
    places = torch.stack(
        [torch.linspace(0.7, 7, 10), torch.linspace(0.3, 3, 10), torch.linspace(0.7, 5, 10).square() / 5]
    )
    text = mask & (prefix >= 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        noise = 0.3 * torch.randn(places.shape, generator=torch.Generator().manual_seed(step))
        guide = guide_for(places, [True] * 3)
        guide = dataclasses.replace(guide, before=(guide.before + noise).clamp(min=0))
        nll = model.nll(prefix, mask, frames, text_mask=text, guide=guide)
        assert nll.alignment is not None
        optimizer.zero_grad()
        nll.alignment.mean().backward()
        optimizer.step()
    found = model.eval()._run(prefix, mask, frames, None, None).places
    assert found is not None
    valid = torch.arange(10) <= frames.lengths[:, None]
    assert ((found[-1] - places).abs() * valid).max() < 0.5


def test_reading_is_done_once_a_layer() -> None:
    model = tiny_model(**READER)
    prefix, mask = tiny_prefix()
    assert model.reader is not None
    reading = Reading(model.reader, opened(model, prefix, mask), 5)
    x = torch.randn(3, 6, model.config.hidden_dim)
    first = reading(0, x)
    assert torch.equal(first[:, :5], x[:, :5]) and not torch.equal(first[:, 5:], x[:, 5:])
    assert reading.places == []  # the first layer looks
    reading(1, first)
    assert reading.arrived.shape == (3, 1)
