"""Requests side by side: each the same alone, in any company and in any order; who is done makes room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sampling.controls import Controls
from sampling.generate import Drawn, Limits, Request, generate_frames
from sampling.scheduler import Scheduler
from tests.support.tiny_audio_model import tiny_model
from tokenizer.frames import AudioFrames

REPRESENTATIONS = ["discrete", "continuous", "hybrid"]


def prompt(frames: int) -> AudioFrames:
    generator = torch.Generator().manual_seed(frames)
    return AudioFrames(
        codes=torch.randint(32, (1, 3, frames), generator=generator),
        latents=torch.randn(1, frames, 8, generator=generator),
        lengths=torch.tensor([frames]),
    )


def requests() -> list[Request]:
    """Prefixes, prompts, lengths, guidance and controls that all differ."""
    plain = Request(
        prefix=[5, 20, 21, 22, 2],
        unconditional=[5, 2],
        prompt=None,
        context_frames=100,
        limits=Limits(minimum=4, maximum=12),
        seeds=(3,),
        controls=Controls(cfg=1.0),
    )
    return [
        plain,
        replace(plain, seeds=(4,), prompt=prompt(7), prefix=[5, 2]),
        replace(plain, seeds=(5,), controls=Controls(cfg=2.0), limits=Limits(minimum=9, maximum=9)),
        replace(plain, seeds=(6,), controls=Controls(cfg=1.0, temperature=0.4, repetition_penalty=1.5)),
        replace(plain, seeds=(7,), controls=Controls(cfg=2.0), prompt=prompt(3), prefix=[6, 30, 31, 32, 33, 34, 2]),
        replace(plain, seeds=(8,), limits=Limits(minimum=1, maximum=3)),
    ]


def streams(frames: list[Drawn]) -> list[torch.Tensor]:
    """Codes (K, T) and latents (T, D), as far as they are drawn."""
    codes = [frame.codes[0] for frame in frames if frame.codes is not None]
    latents = [frame.latents[0] for frame in frames if frame.latents is not None]
    return [torch.cat(parts, dim=dim) for parts, dim in ((codes, 1), (latents, 0)) if parts]


def run(scheduler: Scheduler, asked: list[Request]) -> list[list[Drawn]]:
    tickets = [scheduler.submit(request) for request in asked]
    made: dict[int, list[Drawn]] = {ticket: [] for ticket in tickets}
    ended = []
    for event in scheduler.run():
        made[event.ticket] += [event.frame] if event.frame is not None else []
        ended += [event.ticket] if event.finished else []
    assert sorted(ended) == tickets and len(scheduler) == 0
    return [made[ticket] for ticket in tickets]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("max_rows", [1, 2, 6])
def test_company_changes_nothing(representation: str, max_rows: int) -> None:
    model = tiny_model(representation, stop_bias=-1.5).model
    asked = requests()
    alone = [streams(list(generate_frames(model, request))) for request in asked]
    assert len({part[0].shape[-1 if representation != "continuous" else 0] for part in alone}) > 2
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]):
        found = run(Scheduler(model, max_rows=max_rows), [asked[number] for number in order])
        for number, frames in zip(order, found, strict=True):
            for one, other in zip(streams(frames), alone[number], strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_model_with_a_reader() -> None:
    model = tiny_model(reader_layer=0, reader_heads=2, reader_head_dim=8, first_text_id=7, stop_bias=-30.0).model
    asked = requests()
    alone = [streams(list(generate_frames(model, request))) for request in asked]
    for frames, expected in zip(run(Scheduler(model, max_rows=3), asked), alone, strict=True):
        for one, other in zip(streams(frames), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_who_comes_late_enters_and_who_leaves_makes_room() -> None:
    model = tiny_model(stop_bias=-30.0).model
    asked = requests()
    scheduler = Scheduler(model, max_rows=2)
    first = scheduler.submit(asked[0])
    assert [event.ticket for event in scheduler.step()] == [first]
    short, waiting = scheduler.submit(asked[5]), scheduler.submit(asked[2])
    assert [event.ticket for event in scheduler.step()] == [first, short] and len(scheduler) == 3
    seen = [sorted(event.ticket for event in scheduler.step()) for _ in range(3)]
    assert seen == [[first, short], [first, short], [first, waiting]]  # three frames are all of the short one
    scheduler.cancel(first)
    expected = streams(list(generate_frames(model, asked[2])))
    frames = [event.frame for event in scheduler.run() if event.frame is not None]
    assert len(frames) == 8 and len(scheduler) == 0
    torch.testing.assert_close(streams(frames)[0], expected[0][:, 1:])
    scheduler.cancel(99)


def test_one_seed_a_request() -> None:
    scheduler = Scheduler(tiny_model().model)
    with pytest.raises(ValueError, match="a request has one seed here, not 2"):
        scheduler.submit(replace(requests()[0], seeds=(1, 2)))
    with pytest.raises(ValueError, match="max_rows=0 must be at least 1"):
        Scheduler(tiny_model().model, max_rows=0)
