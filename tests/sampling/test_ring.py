"""Requests longer than the model's longest sequence: the oldest frames fall out, and nothing grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sampling.controls import Controls
from sampling.generate import Drawn, FrameLoop, Limits, Request, generate_frames
from sampling.pipeline import AudioModel
from sampling.plan import Origin, Plan
from sampling.render import render
from sampling.scheduler import Scheduler
from tests.support.tiny_audio_model import tiny_model
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames

WINDOW, SINKS = 20, 3


def request(frames: int, **changes: object) -> Request:
    plain = Request(
        prefix=[5, 20, 21, 22, 2],
        unconditional=[5, 2],
        prompt=None,
        context_frames=10,
        limits=Limits(minimum=frames, maximum=frames),
        seeds=(3, 4),
        controls=Controls(cfg=2.0),
        sink_frames=SINKS,
    )
    return replace(plain, **changes)


def joined(frames: list[Drawn], rows: slice = slice(None)) -> AudioFrames:
    codes = torch.cat([frame.codes[rows] for frame in frames if frame.codes is not None], dim=2)
    latents = torch.cat([frame.latents[rows] for frame in frames if frame.latents is not None], dim=1)
    return AudioFrames(codes=codes, latents=latents, lengths=torch.full((len(codes),), len(frames)))


def test_until_the_ring_is_full_nothing_differs() -> None:
    model = tiny_model(max_frames=WINDOW, stop_bias=-30).model
    short = joined(list(generate_frames(model, request(WINDOW, sink_frames=None))))
    long = joined(list(generate_frames(model, request(3 * WINDOW))))
    assert torch.equal(long.codes[:, :, :WINDOW], short.codes)
    assert torch.equal(long.latents[:, :WINDOW], short.latents)
    assert len(long.codes[0, 0, WINDOW:].unique()) > 5


def test_a_window_forgets_as_a_shorter_longest_sequence_does() -> None:
    shorter = tiny_model(max_frames=WINDOW, stop_bias=-30).model
    longer = tiny_model(max_frames=80, stop_bias=-30).model
    short = joined(list(generate_frames(shorter, request(60))))
    long = joined(list(generate_frames(longer, request(60, window_frames=WINDOW))))
    whole = joined(list(generate_frames(longer, request(60))))
    assert torch.equal(long.codes, short.codes) and torch.equal(long.latents, short.latents)
    assert torch.equal(whole.codes[:, :, :WINDOW], long.codes[:, :, :WINDOW])
    assert not torch.equal(whole.codes, long.codes)


def test_a_prompt_longer_than_the_window_is_forgotten_first() -> None:
    model = tiny_model(max_frames=80, stop_bias=-30).model
    past = joined(list(generate_frames(model, request(50, seeds=(9,)))))
    loop = FrameLoop(model, request(60, prompt=past, context_frames=40, window_frames=WINDOW))
    assert loop.held == 40
    frame = loop.draw(may_stop=False)
    assert frame is not None
    loop.advance(frame)
    assert loop.held == WINDOW - (WINDOW - SINKS) // 8 + 1


def test_memory_is_flat() -> None:
    model = tiny_model(max_frames=WINDOW, stop_bias=-30).model
    loop, shapes, lengths = FrameLoop(model, request(90)), set(), []
    for _ in range(90):
        frame = loop.draw(may_stop=False)
        assert frame is not None
        loop.advance(frame)
        attention = loop.cache.attention
        shapes.add((attention.keys[0].shape, attention.values[-1].shape))
        lengths.append(attention.length)
    prefix = 5
    assert len(shapes) == 1 and max(lengths) == prefix + WINDOW
    assert min(lengths[WINDOW:]) >= prefix + WINDOW - (WINDOW - SINKS) // 8
    assert int(loop.cache.positions.max()) <= prefix + WINDOW


@torch.no_grad()
def test_the_ring_equals_its_window_from_scratch() -> None:
    """With one layer, keys know nothing of what is forgotten: states are those of prefix, sinks and latest frames."""
    model = tiny_model(max_frames=WINDOW, stop_bias=-30, num_layers=1, alignment_layer=0).model
    asked = request(70)
    loop, frames, compared = FrameLoop(model, asked), [], 0
    for index in range(70):
        frame = loop.draw(may_stop=False)
        assert frame is not None
        frames.append(frame)
        loop.advance(frame)
        if index < WINDOW or index % 7:
            continue
        held = [*frames[:SINKS], *frames[len(frames) - (loop.held - SINKS) :]]
        assert SINKS < len(held) == loop.held <= WINDOW < len(frames)
        for row in range(2):  # conditional and unconditional, of unequal prefixes
            for number, prefix in ((row, asked.prefix), (2 + row, asked.unconditional)):
                ids = torch.tensor([list(prefix)])
                h, _ = model.start(ids, torch.ones_like(ids, dtype=torch.bool), joined(held, slice(row, row + 1)))
                torch.testing.assert_close(loop.h[number : number + 1], h, atol=1e-5, rtol=1e-4)
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("settings", [{}, {"reader_layer": 0, "first_text_id": 15, "text_in_prefix": False}])
def test_side_by_side_as_alone(settings: dict[str, object]) -> None:
    alignment = {"alignment_heads": 0} if settings else {}
    model = tiny_model(max_frames=WINDOW, stop_bias=-30, **settings, **alignment).model
    past = joined(list(generate_frames(model, request(12, seeds=(9,)))))
    asked = [
        request(55, seeds=(1,)),
        request(14, seeds=(2,), sink_frames=None, controls=Controls(cfg=1.0)),
        request(40, seeds=(3,), sink_frames=0, controls=Controls(cfg=1.0)),
        request(45, seeds=(5,), window_frames=11, controls=Controls(cfg=1.0)),
        request(33, seeds=(4,), prompt=past, prefix=[6, 30, 31, 2], controls=Controls(cfg=1.0)),
    ]
    scheduler = Scheduler(model, max_rows=3)
    tickets = [scheduler.submit(one) for one in asked]
    made: dict[int, list[Drawn]] = {ticket: [] for ticket in tickets}
    for event in scheduler.run():
        assert event.frame is not None
        made[event.ticket].append(event.frame)
    for ticket, one in zip(tickets, asked, strict=True):
        alone, beside = joined(list(generate_frames(model, one))), joined(made[ticket])
        assert torch.equal(alone.codes, beside.codes)
        torch.testing.assert_close(alone.latents, beside.latents, atol=1e-4, rtol=1e-4)


def test_a_plan_of_a_long_request_plays_again(tmp_path: Path) -> None:
    model: AudioModel = tiny_model(max_frames=WINDOW, stop_bias=-30)
    asked = request(50, seeds=(3,), window_frames=13)
    frames = joined(list(generate_frames(model.model, asked)))
    origin: Origin = model.origin
    plan = Plan(codes=frames.codes, lengths=frames.lengths, request=asked, origin=origin, frame_rate_hz=25.0)
    plan.save(tmp_path / "plan.safetensors")
    again = render(model, Plan.load(tmp_path / "plan.safetensors"))
    assert torch.equal(again.frames.latents, frames.latents)


def test_too_long_without_sinks_is_refused() -> None:
    model = tiny_model(max_frames=WINDOW).model
    with pytest.raises(UserError, match=r"21 frames are more than max_frames=20.*give sink_frames"):
        next(generate_frames(model, request(21, sink_frames=None)))
    with pytest.raises(UserError, match="sink_frames=20 must be at least 0 and below max_frames=20"):
        next(generate_frames(model, request(21, sink_frames=20)))
    with pytest.raises(UserError, match="sink_frames=5 must be at least 0 and below window_frames=5"):
        next(generate_frames(model, request(21, sink_frames=5, window_frames=5)))
    with pytest.raises(UserError, match="window_frames=21 must be at least 1 and at most max_frames=20"):
        next(generate_frames(model, request(21, window_frames=21)))
    with pytest.raises(UserError, match="window_frames=5 needs sink_frames"):
        next(generate_frames(model, request(5, sink_frames=None, window_frames=5)))
