"""Silence at the ends of clips is cut off, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command import Command, assert_refused, runner
from tests.support.recordings import RATE, SILENT, BlockTokenizer, tokens
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from training.corpus import PcmCache, TokenCache, prepare_audio
from training.prepare import prepare
from training.silent_ends import SilentEnds, sound_span

command = pytest.fixture(runner)


def noise(seconds: float, level: float = 0.1, rate: int = RATE) -> np.ndarray:
    samples = level * np.random.default_rng(0).standard_normal(round(seconds * rate))
    return samples.astype(np.float32)


def silence(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.zeros(round(seconds * rate), dtype=np.float32)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    long_pause = [silence(1.0), noise(2.0), silence(2.5), noise(1.0), silence(3.0)]
    for name, parts in {"a": long_pause, "b": [silence(0.1), noise(1.0)], "c": [silence(1.0)]}.items():
        soundfile.write(folder / f"{name}.wav", np.concatenate(parts), RATE)
    rows = [{"path": f"{name}.wav"} for name in "abc"]
    rows += [{"path": "a.wav", "start": 2.0, "end": 9.0}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@settings(max_examples=30, deadline=None)
@given(
    before=st.integers(0, 3000),
    during=st.integers(100, 3000),
    after=st.integers(0, 3000),
    block=st.integers(100, 9000),
    rate=st.sampled_from([8000, 11025, 22050]),
)
def test_sound_is_found_whatever_the_blocks(before: int, during: int, after: int, block: int, rate: int) -> None:
    x = torch.from_numpy(
        np.concatenate([silence(before / 1e3, rate), noise(during / 1e3, rate=rate), silence(after / 1e3, rate)])
    )
    span = sound_span(x.split(block), rate)
    assert span is not None
    assert span[0] == pytest.approx(before / 1e3, abs=0.021)
    assert span[1] == pytest.approx((before + during) / 1e3, abs=0.021)
    assert sound_span((0.01 * x).split(block), rate) is None  # -60 dB


def test_clips_keep_their_sound_and_some_silence(clips: Path, tmp_path: Path) -> None:
    report = prepare_audio(clips, tmp_path / "out", sample_rate_hz=RATE, trim_silence_s=0.2, console=SILENT)
    assert (report.num_clips, report.num_trimmed) == (3, 2)
    assert report.problems == ["c.wav: silent throughout (below -50 dB); make it louder, or leave it out"]
    cache = PcmCache(tmp_path / "out")
    kept = {"a.wav": (0.8, 6.7), "b.wav": (0.0, 1.1), "a.wav#2-9": (2.0, 6.7)}
    assert report.trimmed_s == pytest.approx(9.5 - 5.9 + 7.0 - 4.7, abs=0.05)
    for number in range(len(cache)):
        clip = cache.index.clip(number)
        begin, end = kept.pop(clip.key)
        found = cache.read(number)
        audio = read_audio(clips.parent / clip.key.split("#")[0], RATE)
        assert found.shape[1] == pytest.approx((end - begin) * RATE, abs=0.021 * RATE)
        shift = np.arange(-170, 171) + round(begin * RATE)
        windows = [audio[:, s : s + found.shape[1]] for s in shift if s >= 0]
        assert min(float((w - found).abs().max()) for w in windows if w.shape == found.shape) < 1e-4
    assert not kept


def test_tokens_are_those_of_the_trimmed_clip(clips: Path, tmp_path: Path) -> None:
    tokens(clips, tmp_path / "all")
    tokens(clips, tmp_path / "cut", trim_silence_s=0.0)
    whole, cut = (TokenCache(tmp_path / name, tokenizer=BlockTokenizer()) for name in ("all", "cut"))
    assert (len(whole), len(cut)) == (4, 3)
    found, (begin, end) = cut[0], (100, 650)
    assert found.latents.shape[0] == end - begin
    assert torch.equal(found.latents, whole[0].latents[begin:end])
    # A cache is cut throughout or not at all.
    for wrong in (None, 0.3):
        with pytest.raises(UserError, match=rf"was made with trim_silence_s=0.0, but {wrong} is asked for"):
            prepare(clips, tmp_path / "cut", BlockTokenizer(), trim_silence_s=wrong, console=SILENT)
    with pytest.raises(UserError, match=r"was made with trim_silence_s=None, but 0.3 is asked for"):
        prepare(clips, tmp_path / "all", BlockTokenizer(), trim_silence_s=0.3, console=SILENT)


def test_the_command_line(clips: Path, tmp_path: Path, command: Command) -> None:
    made = command("prepare", clips, "--output", tmp_path / "out", "--audio", "--trim-silence", "0.2")
    assert made.status == 0
    assert "0.1 min of silence cut off the ends of 2 clips" in made.err
    assert "skipped: c.wav: silent throughout" in made.err
    again = command("prepare", clips, "--output", tmp_path / "out", "--audio")
    assert_refused(again, "trim_silence_s=0.2", "choose another output folder")
    assert command("prepare", clips, "--output", tmp_path / "out2", "--trim-silence", "-1").status == 2
    with pytest.raises(UserError, match=r"trim_silence_s=inf must be a number of seconds from 0"):
        SilentEnds(float("inf"))
