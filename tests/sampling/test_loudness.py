"""Loudness and true peak by what ITU-R BS.1770 and EBU Tech 3341 say of sines; generation keeps to both."""

import math

import pytest
import torch

from sampling.controls import Controls
from sampling.loudness import TRUE_PEAK_LIMIT_DB, gain_to, loudness_lufs, true_peak_db
from tests.support.tiny_audio_model import tiny_model
from tokenizer.errors import UserError

RATE = 24000


def sine(hertz: float, amplitude: float, seconds: float = 2.0, phase: float = 0.0) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return amplitude * torch.sin(2 * math.pi * hertz * time + phase)[None]


def test_a_full_scale_sine_of_997_hz_has_minus_3_lufs_and_gains_are_exact() -> None:
    quiet = sine(997.0, 0.05)
    gain = gain_to(-23.0, quiet, RATE)
    assert gain is not None
    assert 20 * math.log10(gain.factor * 0.05) == pytest.approx(-23.0 + 3.01, abs=0.1)  # EBU's tolerance
    assert gain.lufs == pytest.approx(-23.0)
    assert loudness_lufs(gain.factor * quiet, RATE) == pytest.approx(-23.0, abs=0.01)


def test_loud_treble_is_not_clipped_in_measuring() -> None:
    quiet, loud = (loudness_lufs(sine(6000.0, amplitude), RATE) for amplitude in (0.1, 1.0))
    assert quiet is not None and loud == pytest.approx(quiet + 20.0, abs=0.01)


def test_the_true_peak_lies_between_samples() -> None:
    between = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(1000)[None] * math.sqrt(0.5)  # of a sine of amplitude 1
    assert true_peak_db(between * torch.hann_window(4000)) == pytest.approx(0.0, abs=0.1)
    assert true_peak_db(torch.zeros(1, 100)) == -math.inf


def test_the_true_peak_bounds_the_gain() -> None:
    click = 0.01 * sine(997.0, 1.0)
    click[0, RATE] = 0.5
    gain = gain_to(-10.0, click, RATE)
    assert gain is not None and gain.lufs < -20.0
    assert true_peak_db(gain.factor * click) == pytest.approx(TRUE_PEAK_LIMIT_DB, abs=0.01)


def test_what_is_short_or_silent_has_no_loudness() -> None:
    assert gain_to(-16.0, sine(997.0, 0.5, seconds=0.39), RATE) is None
    assert gain_to(-16.0, torch.zeros(1, RATE), RATE) is None
    assert gain_to(-16.0, sine(997.0, 1e-5), RATE) is None


def test_every_row_gets_the_loudness_and_padding_does_not_count() -> None:
    model = tiny_model(stop_bias=-2.0)
    asked = {"text": "good morning", "num_samples": 3, "seed": 11}
    plain = model.generate(**asked)
    lengths = plain.lengths.tolist()
    assert min(lengths) >= 0.4 * RATE and len(set(lengths)) > 1
    made = model.generate(**asked, controls=Controls(loudness=-30.0))
    for row in range(3):
        assert loudness_lufs(made.row(row), RATE) == pytest.approx(-30.0, abs=0.05)  # more blocks pass the gate
        factor = made.row(row).norm() / plain.row(row).norm()
        torch.testing.assert_close(made.row(row), factor * plain.row(row))
    assert made.warnings == plain.warnings
    loud = model.generate(**asked, controls=Controls(loudness=0.0))
    assert all(true_peak_db(loud.row(row)) == pytest.approx(TRUE_PEAK_LIMIT_DB, abs=0.01) for row in range(3))
    assert [warning.split("LUFS instead of 0")[0][:8] for warning in loud.warnings] == [
        "seed 11:",
        "seed 12:",
        "seed 13:",
    ]


def test_a_short_recording_is_left_as_it_is_and_a_stream_is_refused() -> None:
    model = tiny_model()
    plain = model.generate(tags=["music"], duration=0.3)
    made = model.generate(tags=["music"], duration=0.3, controls=Controls(loudness=-16.0))
    assert torch.equal(made.waveform, plain.waveform)
    assert made.warnings == ("seed 0: too short or too quiet to have a loudness; left as it is",)
    with pytest.raises(UserError, match=r"loudness=-16\.0 LUFS needs the whole recording"):
        model.stream(tags=["music"], controls=Controls(loudness=-16.0))
