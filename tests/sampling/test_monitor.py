"""What the monitor measures, and its bands."""

from __future__ import annotations

import pytest
import torch

from sampling.drift import average, changes, window_statistics
from sampling.generate import Drawn
from sampling.monitor import FLOORS, TIMBRE, DriftMonitor, Watch
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.tiny_tokenizers import tokenizer_of
from tokenizer.errors import UserError

HOP = 960
WATCH = Watch(window_seconds=0.4, step_seconds=0.2, anchor_seconds=1.2)


def noise(frames: int, gain: float = 1.0, seed: int = 0) -> torch.Tensor:
    return 0.05 * gain * torch.randn(frames * HOP, generator=torch.Generator().manual_seed(seed))


def frames_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 32, (3, count), generator=generator), torch.randn(count, 8, generator=generator)


def followed(waveform: torch.Tensor, piece: int = 1000) -> DriftMonitor:
    monitor, (codes, latents) = DriftMonitor(tiny_tokenizer(), WATCH), frames_of(len(waveform) // HOP)
    for t in range(codes.shape[1]):
        active = torch.ones(1, dtype=torch.bool)
        monitor.see(Drawn(codes=codes[None, :, t : t + 1], latents=latents[None, t : t + 1], active=active))
    for part in waveform.split(piece):
        monitor.hear(part.reshape(1, 1, -1))
    return monitor


def test_each_window_is_measured_against_the_mean_of_the_first_in_widths_of_their_own_spread() -> None:
    waveform = torch.cat([noise(30), noise(30, gain=4.0, seed=1)])
    monitor, (codes, latents) = followed(waveform), frames_of(60)
    assert [round(reading.at_s, 6) for reading in monitor.readings] == [1.4, 1.6, 1.8, 2.0, 2.2, 2.4]
    parts = [
        window_statistics(
            waveform[at * HOP : (at + 10) * HOP], 24000, latents=latents[at : at + 10], codes=codes[:, at : at + 10]
        )
        for at in range(0, 55, 5)
    ]
    anchor = average(parts[:5])
    for name in changes(parts[0], anchor):
        spread = (sum(changes(part, anchor)[name] ** 2 for part in parts[:5]) / 5) ** 0.5
        floor = FLOORS[name] * (anchor.latent_norm or 0.0 if name == "latent_norm" else 1.0)
        assert monitor.widths[name] == pytest.approx(max(floor, 2 * spread)), name
        for number, reading in enumerate(monitor.readings, start=5):
            expected = changes(parts[number], anchor)[name] / monitor.widths[name]
            assert reading.drift[name] == pytest.approx(expected), name
    last = monitor.readings[-1]
    assert last.drift["loudness_db"] == pytest.approx(12.0 / FLOORS["loudness_db"], abs=0.2)
    assert last.largest == abs(last.drift[last.worst]) >= abs(last.drift["loudness_db"])
    means = torch.stack([latents[at : at + 10].mean(dim=0) for at in range(0, 25, 5)])
    own = [1 - float(torch.cosine_similarity(mean, means.mean(dim=0), dim=0)) for mean in means]
    assert monitor.widths[TIMBRE] == pytest.approx(2 * (sum(x * x for x in own) / 5) ** 0.5, rel=1e-4)


def test_the_size_of_the_pieces_makes_no_difference_and_memory_stays() -> None:
    waveform = noise(200)
    one, other = followed(waveform, piece=317), followed(waveform, piece=len(waveform))
    assert one.report() == other.report()
    assert len(one._waveform) < one.window * HOP and len(one._codes) == len(one._latents) < one.window
    assert one._first == []


def test_what_stays_itself_stays_in_its_bands_mostly() -> None:
    readings = followed(noise(400)).readings
    outside = [reading for reading in readings if reading.largest > 2]
    assert len(readings) == 74 and len(outside) < 0.1 * len(readings)


def test_timbre_by_features_where_there_are_some() -> None:
    tokenizer = tokenizer_of("f3-representation")
    monitor = DriftMonitor(tokenizer, Watch(window_seconds=0.2, step_seconds=0.2, anchor_seconds=0.4))
    count = monitor.window * tokenizer.hop_length
    waveform = 0.1 * torch.randn(1, 1, 3 * count, generator=torch.Generator().manual_seed(0))
    frames = tokenizer.encode(waveform)
    monitor.see_prompt(frames, codes=True, latents=False)
    monitor.hear(waveform)
    means = [tokenizer.encode(part).features[0].mean(dim=0) for part in waveform.split(count, dim=-1)]
    expected = 1 - float(torch.cosine_similarity(means[2], (means[0] + means[1]) / 2, dim=0))
    assert monitor.readings[0].drift[TIMBRE] * monitor.widths[TIMBRE] == pytest.approx(expected, abs=1e-5)
    assert "latent_norm" not in monitor.widths and "code_entropy_bits" in monitor.widths


def test_too_short_to_tell() -> None:
    report = followed(noise(20)).report()
    assert report["windows"] == [] and report["largest"] is None and report["bands"] == {}
    for bad in ({"step_seconds": 0.0}, {"step_seconds": 4.0}, {"anchor_seconds": 3.5}):
        with pytest.raises(UserError, match="_seconds="):
            Watch(**bad)
