"""Audio to vectors: the same alone, in a batch and in pieces; only valid frames count; bad files are skipped."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.recordings import SILENT, BlockTokenizer, write_corpus, write_sine
from tests.support.tiny_audio_model import tiny_tokenizer
from tokenizer.audio import read_audio
from tokenizer.encodec import EncodecTokenizer
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames
from training import embeddings
from training.embeddings import FrameSource, LogMel, TokenizerFrames, default_input, embed
from training.manifest import Clip, read_manifest

DURATIONS = [0.3, 1.1, 0.05, 0.71, 2.0, 0.3]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    rows = [{"path": f"{i}.wav", "duration": duration} for i, duration in enumerate(DURATIONS)]
    return read_manifest(write_corpus(folder, rows)).clips


def sources() -> list[FrameSource]:
    return [LogMel(), TokenizerFrames(tiny_tokenizer(), ("latents", "codes"), "tiny")]


@pytest.mark.parametrize("source", sources(), ids=["floor", "f3"])
def test_alone_in_a_batch_and_in_pieces(
    source: FrameSource, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = embed(clips, source, console=SILENT)
    assert together.kept == tuple(range(len(clips))) and together.problems == ()
    alone = embed(clips, source, batch_seconds=0.01, console=SILENT)
    monkeypatch.setattr(embeddings, "PIECE_S", 0.13)
    pieces = embed(clips, source, console=SILENT)
    for name, vectors in together.vectors.items():
        assert vectors.dtype == torch.float32
        assert len({tuple(vector.tolist()) for vector in vectors}) == len(clips)
        torch.testing.assert_close(alone.vectors[name], vectors, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pieces.vectors[name], vectors, atol=1e-5, rtol=1e-5)


def test_vectors_are_means_over_the_valid_frames(clips: list[Clip]) -> None:
    tokenizer = tiny_tokenizer()
    found = embed(clips, TokenizerFrames(tokenizer, ("latents", "codes"), "tiny"), console=SILENT)
    for row, clip in enumerate(clips):
        frames = tokenizer.encode(read_audio(clip.path, 24_000)[None])
        torch.testing.assert_close(found.vectors["tiny latents"][row], frames.latents[0].mean(0), atol=1e-5, rtol=1e-5)
        embedded = tokenizer.dequantize(frames.codes)[0].mean(0)
        torch.testing.assert_close(found.vectors["tiny codes"][row], embedded, atol=1e-5, rtol=1e-5)


def test_the_floor_is_mean_and_deviation_of_a_log_mel(clips: list[Clip]) -> None:
    floor = LogMel()
    vectors = embed(clips, floor, console=SILENT).vectors["log-mel (floor)"]
    assert vectors.shape == (len(clips), 256)
    for row, clip in enumerate(clips):
        waveform = read_audio(clip.path, 24_000)[None]
        mel = floor.encode(waveform, torch.tensor([waveform.shape[-1]])).views[0][0]
        assert mel.shape == (-(-waveform.shape[-1] // 240), 128)
        expected = torch.cat([(mel.mean(0) + 7.0) / 2.5, mel.std(0, correction=0) - 1.5])
        torch.testing.assert_close(vectors[row], expected, atol=1e-4, rtol=1e-4)


def test_features_are_pooled_where_there_are_any(tmp_path: Path) -> None:
    clips = read_manifest(write_corpus(tmp_path, [{"path": "a.wav", "duration": 0.1}])).clips
    tokenizer = BlockTokenizer(feature_dim=6)
    assert default_input(tokenizer) == "features"
    found = embed(clips, TokenizerFrames(tokenizer, ("features",), "block"), console=SILENT)
    assert found.vectors["block features"].shape == (1, 6)
    assert default_input(BlockTokenizer()) == "latents"
    with pytest.raises(UserError, match=r"tokenizer 'it' \(block\) has no features; probe its latents or codes"):
        TokenizerFrames(BlockTokenizer(), ("features",), "it")


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """No batch holds more than its limit, and no long clip is ever encoded whole."""
    rows = [{"path": f"{i}.wav", "duration": 1.0} for i in range(20)] + [{"path": "long.wav", "duration": 50.0}]
    clips = read_manifest(write_corpus(tmp_path, rows)).clips
    sizes = []

    class Watched(BlockTokenizer):
        def encode(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> AudioFrames:
            sizes.append(waveform.numel())
            return super().encode(waveform, lengths)

    found = embed(clips, TokenizerFrames(Watched(), ("latents",), "block"), batch_seconds=4.0, console=SILENT)
    assert len(found.kept) == 21
    seconds = sorted(round(size / 8000) for size in sizes)
    # The twenty short clips four at a time; the long one in pieces, their rest and what flushing adds.
    assert [number for number in seconds if number == 4] == [4] * 5
    assert max(seconds) == 20 and sum(seconds) == 20 + 50


def test_bad_files_are_told_and_skipped(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.wav", "duration": 0.2} for i in range(4)]
    manifest = write_corpus(tmp_path, rows)
    (tmp_path / "1.wav").write_text("This is a letter.")
    found = embed(read_manifest(manifest).clips, LogMel(), console=SILENT)
    assert found.kept == (0, 2, 3)
    assert len(found.vectors["log-mel (floor)"]) == 3
    (problem,) = found.problems
    assert "1.wav is not audio" in problem


def test_vectors_that_are_no_numbers_are_told_and_skipped(tmp_path: Path) -> None:
    clips = read_manifest(write_corpus(tmp_path, [{"path": f"{i}.wav", "duration": 0.2} for i in range(2)])).clips

    class Broken(BlockTokenizer):
        def encode(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> AudioFrames:
            frames = super().encode(waveform, lengths)
            frames.latents[0] = float("nan")
            return frames

    found = embed(clips, TokenizerFrames(Broken(), ("latents",), "b"), batch_seconds=0.2, console=SILENT)
    assert found.kept == () and len(found.problems) == 2
    assert "b latents of it are not finite numbers" in found.problems[0]


def test_progress_is_a_plain_line_in_a_log_and_a_bar_on_a_terminal(
    tmp_path: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.progress._LOG_EVERY_S", 0.0)
    log, terminal = io.StringIO(), io.StringIO()
    embed(clips, LogMel(), console=Console(file=log, width=200))
    assert f"read {len(clips)}/{len(clips)} clips" in log.getvalue() and "x real time" in log.getvalue()
    assert "min left" in log.getvalue() and "\x1b" not in log.getvalue()
    embed(clips, LogMel(), console=Console(file=terminal, width=200, force_terminal=True))
    assert "\x1b" in terminal.getvalue() and "x real time" in terminal.getvalue()


def test_a_codec_that_looks_ahead_gives_the_same_in_a_batch(clips: list[Clip]) -> None:
    source = TokenizerFrames(EncodecTokenizer.random(seed=0), ("features", "latents"), "encodec")
    alone = embed(clips[:3], source, batch_seconds=0.01, console=SILENT).vectors
    together = embed(clips[:3], source, console=SILENT).vectors
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], atol=1e-4, rtol=1e-4)


def test_a_part_of_a_file_is_read_as_a_part(tmp_path: Path) -> None:
    path = write_sine(tmp_path / "a.wav", 1.0)
    whole, part = Clip(path=path, key="a"), Clip(path=path, key="a#0.5-", start=0.5)
    found = embed([whole, part], LogMel(), console=SILENT).vectors["log-mel (floor)"]
    assert not torch.allclose(found[0], found[1], atol=1e-3)
