"""Between two sentences there is as much quiet as was asked for, counting what there is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sampling.generate import Drawn
from sampling.pauses import Pauses, quiet_around
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.f3 import F3Tokenizer
from tokenizer.frames import AudioFrames

RATE, HOP = 24_000, 960
SPOKEN, QUIET, PUT_IN = 0.3, 1e-4, 0.0


def hum(latents: torch.Tensor) -> torch.Tensor:
    """Frames say how loud they hum."""
    return (latents * torch.sin(torch.arange(HOP) / 5.0)).reshape(1, 1, -1)


def heard(waveform: torch.Tensor) -> AudioFrames:
    """What `hum` makes it from."""
    loudness = waveform.reshape(1, -1, HOP).abs().amax(dim=-1)[..., None]
    codes = torch.ones(1, 2, loudness.shape[1], dtype=torch.int64)
    return AudioFrames(codes=codes, latents=loudness, lengths=torch.tensor([loudness.shape[1]]))


def humming() -> F3Tokenizer:
    tokenizer: Any = copy.copy(tiny_tokenizer())
    tokenizer.decode_latents, tokenizer.encode = hum, heard
    return tokenizer  # type: ignore[no-any-return]


def drawn(*levels: float) -> list[Drawn]:
    active = torch.ones(1, dtype=torch.bool)
    return [Drawn(codes=None, latents=torch.full((1, 1, 1), level), active=active) for level in levels]


def lengthened(before: list[Drawn], after: Iterator[Drawn], **settings: Any) -> Iterator[Drawn]:
    settings = {"seconds": 0.25, "num_codebooks": None, **settings}
    pauses = Pauses(humming(), "latents", with_latents=True, **settings)
    return pauses.lengthened(before, after)


def levels(frames: Iterator[Drawn]) -> list[float]:
    return [round(float(frame.latents), 4) for frame in frames if frame.latents is not None]


@pytest.mark.parametrize(
    ("ends", "begins", "lacking"), [(0, 0, 6), (3, 0, 3), (0, 2, 4), (2, 2, 2), (6, 0, 0), (20, 0, 0), (0, 9, 0)]
)
def test_existing_quiet_counts_on_both_sides(ends: int, begins: int, lacking: int) -> None:
    before = drawn(*[SPOKEN] * (25 - ends), *[QUIET] * ends)
    after = [*[QUIET] * begins, *[SPOKEN] * 12]
    assert levels(lengthened(before, iter(drawn(*after)))) == [*[PUT_IN] * lacking, *after]


def test_quiet_within_speech_does_not_count() -> None:
    before, after = drawn(*[SPOKEN] * 10, *[QUIET] * 5, SPOKEN), [SPOKEN, *[QUIET] * 5, SPOKEN]
    assert levels(lengthened(before, iter(drawn(*after)))) == [*[PUT_IN] * 6, *after]


def test_no_more_is_drawn_ahead_than_a_pause_has() -> None:
    taken: list[Drawn] = []

    def sentence() -> Iterator[Drawn]:
        for frame in drawn(*[SPOKEN] * 20):
            taken.append(frame)
            yield frame

    frames = lengthened(drawn(SPOKEN), sentence())
    next(frames)
    assert len(taken) == 6
    assert len(list(frames)) == 25
    assert levels(lengthened(drawn(SPOKEN), iter(drawn(SPOKEN)))) == [*[PUT_IN] * 6, SPOKEN], "a short sentence"
    assert levels(lengthened(drawn(SPOKEN), iter([]))) == []


def test_silence_has_the_streams_of_drawn_frames() -> None:
    silence = next(lengthened(drawn(SPOKEN), iter(drawn(SPOKEN)), num_codebooks=1))
    assert silence.codes is not None and silence.codes.shape == (1, 1, 1) and silence.latents is not None
    assert bool(silence.active.all())


def test_quiet_is_what_lies_far_below_the_voice() -> None:
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(RATE * 2, generator=generator)
    joint = RATE + 77  # no multiple of a block
    assert quiet_around(waveform, joint, RATE) == 0.0
    waveform[joint - 2400 : joint + 1200] *= 10 ** (-35 / 20)
    assert quiet_around(waveform, joint, RATE) == pytest.approx(0.15, abs=1e-6)
    waveform[joint - 2400 : joint + 1200] *= 10 ** (10 / 20)
    assert quiet_around(waveform, joint, RATE) == 0.0
    assert quiet_around(torch.zeros(4800), 2400, RATE) == pytest.approx(0.2)
    assert quiet_around(torch.zeros(100), 50, RATE) == 0.0  # less than a block
