"""Planning by lengths, sharing out, and recordings of every kind: each frame is scored once, wherever it is done."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hybridlm.checkpoint import Checkpoint, save_model
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import RATE, write_cache
from tests.training.test_evaluate import checkpoint
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from training.audio_clips import AudioClips
from training.corpus import TokenCache
from training.evaluate import Evaluation, evaluate, run
from training.manifest import read_manifest
from training.positions import PositionNLL
from training.processes import Processes
from training.scoring import plan_groups, share_out

READER: dict[str, Any] = {"reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8, "first_text_id": 10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"), 6)


@pytest.fixture(scope="module")
def found(folders: dict[str, str]) -> Checkpoint:
    return checkpoint(folders, **READER)


def audio(folder: Path, found: Checkpoint) -> AudioClips:
    return AudioClips(read_manifest(folder), found.tokenizer)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).uniform(-0.3, 0.3, samples)


class Lengths:
    """A source of nothing but lengths; every third clip has a text."""

    def __init__(self, *lengths: int) -> None:
        self.name, self.lengths = "lengths", lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, clip: int) -> Any:
        raise UserError("nothing to read")

    def num_frames(self, clip: int) -> int:
        return self.lengths[clip]

    def has_text(self, clip: int) -> bool:
        return clip % 3 == 0

    def all_tags(self) -> list[str]:
        return []


@pytest.mark.parametrize(("batch_size", "batch_frames"), [(None, 400), (3, 10_000), (4, 300), (None, 1)])
def test_groups_hold_every_clip_once_and_fit_a_batch(batch_size: int | None, batch_frames: int) -> None:
    source = Lengths(*torch.randint(1, 120, (50,), generator=torch.Generator().manual_seed(0)).tolist(), 900)
    groups = plan_groups(source, batch_size=batch_size, batch_frames=batch_frames)
    assert sorted(clip for group in groups for clip in group) == list(range(51))
    for group in groups:
        assert len(group) <= (batch_size or 51)
        assert len(group) == 1 or len(group) * max(source.num_frames(clip) for clip in group) <= batch_frames
        assert len({source.has_text(clip) for clip in group}) == 1
    joined = [len({source.has_text(clip) for clip in group}) for group in plan_groups(source, with_text=False)]
    assert max(joined) == 2
    for count in (1, 2, 3):
        shares = share_out(source, groups, count)
        assert sorted(map(tuple, (group for share in shares for group in share))) == sorted(map(tuple, groups))
        loads = [sum(source.num_frames(clip) for group in share for clip in group) for share in shares]
        longest = max(sum(source.num_frames(clip) for clip in group) for group in groups)
        assert max(loads) - min(loads) <= longest


def test_a_lying_duration_changes_no_figure(folders: dict[str, str], found: Checkpoint) -> None:
    honest = audio(Path(folders["clips"]), found)
    lying = audio(Path(folders["clips"]), found)
    lying.clips = [replace(clip, duration=0.01 if number % 2 else 90.0) for number, clip in enumerate(lying.clips)]
    assert [honest.num_frames(clip) for clip in range(6)] == [len(honest[clip].latents) for clip in range(6)]
    assert lying.num_frames(0) == 2250 and lying.num_frames(1) == 1
    one, other = evaluate(found, honest), evaluate(found, lying)
    for a, b in zip(one.clips, other.clips, strict=True):
        assert a.key == b.key and a.nll.total == pytest.approx(b.nll.total, rel=1e-5)


def test_recordings_of_every_kind(found: Checkpoint, tmp_path: Path) -> None:
    """One sample, less than a frame, silence, 8 kHz, and one longer than the context, told its text at the start."""
    samples = {"one": 1, "part": 480, "second": RATE, "long": 25 * RATE + 1}
    for name, count in samples.items():
        write(tmp_path / "in" / f"{name}.wav", noise(count))
    write(tmp_path / "in" / "silence.wav", np.zeros(RATE))
    write(tmp_path / "in" / "slow.wav", noise(8000), 8000)
    (tmp_path / "in" / "long.txt").write_text("how are you")
    positions = PositionNLL(3, 25.0)
    result = evaluate(found, audio(tmp_path / "in", found), positions=positions)
    frames = {clip.key: clip.nll.num_frames for clip in result.clips}
    assert frames == {
        "long.wav": 626, "one.wav": 1, "part.wav": 1, "second.wav": 25, "silence.wav": 25, "slow.wav": 25
    }  # fmt: skip
    assert result.report.num_frames == 703 and result.skipped == ()
    assert all(math.isfinite(clip.nll.total) for clip in result.clips)
    assert result.conditions["window_frames"] == 250 and result.conditions["context_frames"] == 125
    expected = torch.tensor([sum(length > place for length in frames.values()) for place in range(1500)]).double()
    assert torch.equal(positions.frames, expected)
    # The rate of a file makes no difference but the resampling.
    write(tmp_path / "again" / "slow.wav", read_audio(tmp_path / "in" / "slow.wav", RATE)[0].numpy())
    again = evaluate(found, audio(tmp_path / "again", found)).clips[0].nll
    slow = next(clip.nll for clip in result.clips if clip.key == "slow.wav")
    assert again.total == pytest.approx(slow.total, rel=1e-5)


def test_what_cannot_be_read_is_told_counted_and_skipped(
    folders: dict[str, str], found: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", found.model, found.tokenizer, found.text)
    lines = (Path(folders["clips"]) / "manifest.jsonl").read_text().splitlines()
    entries = [{**json.loads(line), "path": str(Path(folders["clips"]) / f"{n}.wav")} for n, line in enumerate(lines)]
    (tmp_path / "letter.wav").write_text("This is a letter.")
    bad = [{"path": "letter.wav"}, {"path": "gone.wav"}]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in [bad[0], *entries, bad[1]]))
    result = run(tmp_path / "model", manifest, None, tmp_path / "figures.json")
    assert [Path(clip.key).name for clip in result.clips] == [f"{n}.wav" for n in range(6)]
    assert len(result.skipped) == 2 and "no such file: gone.wav" in result.skipped[0]
    assert "letter.wav is not audio" in result.skipped[1]
    assert json.loads((tmp_path / "figures.json").read_text())["skipped"] == list(result.skipped)
    captured = capsys.readouterr()
    assert "2 clips skipped, the first: " in captured.err and "6 clips" in captured.out
    manifest.write_text(json.dumps(bad[0]) + "\n")
    with pytest.raises(
        UserError, match=r"manifest.jsonl has no usable clip \(1 problems, the first: .*letter.wav is not audio"
    ):
        run(tmp_path / "model", manifest, None)


def test_frames_of_another_tokenizer_are_refused_and_both_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    from tokenizer.f3 import F3Tokenizer

    torch.manual_seed(1)
    other = F3Tokenizer(tiny_model().tokenizer.config).eval()  # type: ignore[attr-defined]
    made = tiny_model(tokenizer=other)
    save_model(tmp_path / "model", made.model, other, made.text)
    own, its = checkpoint(folders).tokenizer.fingerprint(), other.fingerprint()
    with pytest.raises(UserError, match=f"{own}, but f3 {its} is asked for"):
        run(tmp_path / "model", Path(folders["cache"]), None)
    other_codec = tmp_path / "model" / "tokenizer"
    for file in other_codec.iterdir():
        file.write_bytes((Path(folders["tokenizer"]) / file.name).read_bytes())
    with pytest.raises(UserError, match=f"has fingerprint {own}, but the model was trained with {its}"):
        run(tmp_path / "model", Path(folders["clips"]), None)


class Threads(Processes):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, shared: tuple[threading.Barrier, list[Any]]) -> None:
        super().__init__(rank, shared[0].parties)
        self.barrier, self.items = shared

    def gather(self, item: Any) -> list[Any]:
        self.items[self.rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found


def on_threads(count: int, work: Any) -> list[Any]:
    """What `work` gives, or the exception it ends in, on each of so many."""
    shared = (threading.Barrier(count, timeout=600), [None] * count)

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, shared))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("kind", ["audio", "cache"])
def test_fewer_clips_than_processes(folders: dict[str, str], found: Checkpoint, kind: str) -> None:
    data = Path(folders["clips" if kind == "audio" else "cache"])

    def source() -> Any:
        if kind == "cache":
            return TokenCache(data, split="test")
        return AudioClips(read_manifest(data, "test"), found.tokenizer)

    alone = evaluate(found, source(), positions=(positions := PositionNLL(3, 25.0)))
    assert alone.report.num_clips == 1

    def work(processes: Processes) -> tuple[Evaluation, PositionNLL]:
        own = PositionNLL(3, 25.0)
        return evaluate(found, source(), positions=own, processes=processes), own

    for result, sums in on_threads(3, work):
        assert result == alone
        assert torch.equal(sums.frames, positions.frames) and torch.equal(sums.codes, positions.codes)


def test_shares_give_the_figures_of_one_process(folders: dict[str, str], found: Checkpoint) -> None:
    source = audio(Path(folders["clips"]), found)
    alone = evaluate(found, source, batch_size=2)
    assert on_threads(2, lambda processes: evaluate(found, source, batch_size=2, processes=processes)) == [alone] * 2


def test_one_process_that_fails_ends_all_and_the_first_tells(folders: dict[str, str], found: Checkpoint) -> None:
    def work(processes: Processes) -> None:
        with processes.agreed():
            if processes.rank == 1:
                raise UserError("no room here; make some")

    first, second, third = on_threads(3, work)
    assert isinstance(first, UserError) and str(first) == "no room here; make some"
    assert isinstance(second, SystemExit) and second.code == third.code == 0
