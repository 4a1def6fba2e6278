import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.support.recordings import RATE, SILENT, sines, write_corpus
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from training.corpus import AudioFiles, PcmCache, prepare_audio
from training.manifest import Clip, TagRule, read_manifest


def test_segments_are_pieces_of_the_recordings(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.5, 0.3, 0.004])
    report = prepare_audio(source, tmp_path / "out", sample_rate_hz=RATE, console=SILENT)
    assert (report.num_clips, report.seconds) == (3, pytest.approx(0.804))
    cache = PcmCache(tmp_path / "out")
    assert cache.duration_s == pytest.approx(0.804)
    clips = [read_audio(tmp_path / "in" / f"{i}.wav", RATE)[0] for i in range(3)]
    for number, clip in enumerate(clips):
        torch.testing.assert_close(cache.read(number)[0], clip, atol=1e-4, rtol=0)
    for batch in itertools.islice(cache.segments(3, 100, seed=0), 20):
        assert batch.shape == (3, 1, 100)
        for row in batch[:, 0]:
            places = [clip.unfold(0, 100, 1) for clip in clips[:2]]
            found = any(bool(((windows - row).abs().amax(1) < 1e-4).any()) for windows in places)
            short = torch.cat([clips[2], torch.zeros(68)])
            assert found or bool(((row - short).abs() < 1e-4).all()), "a piece, or the short clip and silence"


def test_segments_depend_on_seed_rank_and_position_alone(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.5, 0.3])
    prepare_audio(source, tmp_path / "out", sample_rate_hz=RATE, console=SILENT)
    cache, files = PcmCache(tmp_path / "out"), AudioFiles(read_manifest(source).clips, RATE)
    for audio in (cache, files):
        first = torch.stack(list(itertools.islice(audio.segments(2, 50, seed=3), 6)))
        assert torch.equal(first[4], next(audio.segments(2, 50, seed=3, skip=4)))
        assert not torch.equal(first[0], next(audio.segments(2, 50, seed=4)))
        ranks = [next(audio.segments(2, 50, seed=3, rank=rank, world_size=2, skip=2)) for rank in range(2)]
        assert torch.equal(ranks[0], first[4])
        assert torch.equal(ranks[1], first[5])
    torch.testing.assert_close(
        next(cache.segments(8, 50, seed=0)), next(files.segments(8, 50, seed=0)), atol=1e-4, rtol=0
    )


def test_segments_are_uniform_over_weighted_duration(tmp_path: Path) -> None:
    entries = [
        {"path": f"{i}.wav", "duration": d, "set": s} for i, (d, s) in enumerate([(0.3, "a"), (0.1, "a"), (0.1, "b")])
    ]
    prepare_audio(write_corpus(tmp_path / "in", entries), tmp_path / "out", sample_rate_hz=RATE, console=SILENT)
    rules = [TagRule(where={"set": "b"}, weight=4.0), TagRule()]
    cache = PcmCache(tmp_path / "out", rules=rules)
    drawn = cache._draw(8000, 10, np.random.default_rng(0))
    shares = np.bincount([clip for clip, _ in drawn], minlength=3) / 8000
    np.testing.assert_allclose(shares, np.array([0.3, 0.1, 0.4]) / 0.8, atol=0.02)
    starts = [start for clip, start in drawn if clip == 0]
    assert min(starts) < 20
    assert 2370 < max(starts) <= 2390


def test_files_that_turn_out_damaged_are_noted_and_left_out(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.2, 0.2])
    (tmp_path / "in" / "bad.wav").write_text("no audio")
    clips = [*read_manifest(source).clips, Clip(path=tmp_path / "in" / "bad.wav", key="bad.wav")]
    clips.append(Clip(path=clips[0].path, key="late", start=7.0))
    files = AudioFiles(clips, RATE)
    assert len(files) == 2
    assert len(files.problems) == 2
    (tmp_path / "in" / "0.wav").write_text("gone bad")
    batch = next(files.segments(16, 50, seed=0))
    assert bool((batch.abs().amax(-1) > 0.1).all()), "every row holds sound of the good file"
    assert len(files.problems) == 3
    (tmp_path / "in" / "1.wav").write_text("gone bad")
    with pytest.raises(UserError, match="too many damaged files"):
        next(files.segments(2, 50, seed=1))
    with pytest.raises(UserError, match="no clip can be read"):
        AudioFiles(clips[2:3], RATE)


def test_parts_of_files_stay_within_their_bounds(tmp_path: Path) -> None:
    """What lies outside the part is half as loud."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.repeat([0.25, 0.5, 0.25], 4000), RATE)
    files = AudioFiles([Clip(path=path, key="a", start=0.5, end=1.0)], RATE)
    for batch in itertools.islice(files.segments(8, 100, seed=0), 5):
        assert bool((batch > 0.4).all())
    longer = next(files.segments(1, 6000, seed=0))[0, 0]
    assert bool((longer[:4000] > 0.4).all())
    assert not longer[4000:].any(), "silence follows, not the rest of the file"


def test_caches_of_different_rates_do_not_mix(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1])
    for rate in (8_000, 16_000):
        prepare_audio(source, tmp_path / str(rate), sample_rate_hz=rate, console=SILENT)
    with pytest.raises(UserError, match=r"sample_rate_hz=\[8000, 16000\], but must share one"):
        PcmCache([tmp_path / "8000", tmp_path / "16000"])
