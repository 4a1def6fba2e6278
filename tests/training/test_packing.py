"""Rows that clips share, and corpora that are mixed by weight."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.recordings import sines, tokens
from tests.support.toy_corpus import write_cache
from tests.training.test_language_task import language, run, task
from tokenizer.errors import UserError
from training.corpus import TokenCache, Window
from training.language_task import LanguageTask
from training.packing import first_fit, packed_batches
from training.state import checkpoints
from training.task import Batch


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Sixty clips of 1 to 40 frames."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    tokens(sines(folder / "in", [int(n) / 100 for n in rng.integers(1, 41, 60)], text="x"), folder / "out")
    return TokenCache(folder / "out")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A hundred clips of 4 frames, and ten of 10 to 19 frames without text."""
    folder = tmp_path_factory.mktemp("two")
    tokens(sines(folder / "a", [0.04] * 100, text="x"), folder / "large")
    tokens(sines(folder / "b", [(10 + i) / 100 for i in range(10)]), folder / "small")
    return [folder / "large", folder / "small"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"), 12)


LIMITS = {"batch_frames": 160, "row_frames": 50, "max_frames": 50}


def take(cache: TokenCache, count: int, **values: Any) -> list[list[list[Window]]]:
    return list(itertools.islice(cache.packed(**{"seed": 0, **LIMITS, **values}), count))


def test_first_fit() -> None:
    assert first_fit([7, 6, 4, 3, 3, 1, 1], 10, 10**6) == [[0, 3], [1, 2], [4, 5, 6]]
    assert first_fit([8, 1, 1, 1], 20, 16) == [[0, 1], [2, 3]], "8 frames side by side with at most one other"
    assert first_fit([], 10, 10) == []


def test_an_epoch_has_every_clip_once_in_full_rows(many: TokenCache) -> None:
    frames = int(many.index.rows.sum())
    fewest = -(-frames // 50)
    rows, seen = 0, Counter[int]()
    for batch in many.packed(seed=0, **LIMITS):
        assert len(batch) <= 3
        assert all(sum(window.frames for window in row) <= 50 for row in batch)
        rows += len(batch)
        seen.update(window.clip for row in batch for window in row)
        if sum(seen.values()) >= 60:
            break
    assert seen == Counter(range(60))
    assert rows <= fewest + 1


def test_one_long_among_tiny_ones_stays_small() -> None:
    lengths = np.array([700] + [1] * 1500)
    batches = list(packed_batches(lengths, 1000, 1000, np.random.default_rng(0)))
    assert sorted(n for batch in batches for row in batch for n in row) == list(range(1501))
    for batch in batches:
        numbers = [n for row in batch for n in row]
        assert len(numbers) * lengths[numbers].max() <= 4000


def test_the_order_depends_on_nothing_but_the_seed(many: TokenCache) -> None:
    batches = take(many, 40)
    assert batches == take(many, 40)
    assert batches != take(many, 40, seed=1)
    for skip in (1, 7, 8, 9, 25):
        assert take(many, 5, skip=skip) == batches[skip : skip + 5]
    for world_size in (2, 3):
        ranks = [take(many, 6, rank=rank, world_size=world_size, skip=2) for rank in range(world_size)]
        dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert dealt == batches[2 * world_size : 8 * world_size], "as one process has them, in turn"


@pytest.mark.parametrize("packed", [False, True])
def test_shares_are_as_asked_for_whatever_the_sizes(two: list[Path], packed: bool) -> None:
    cache = TokenCache(two, shares=[1, 3])
    limits: dict[str, Any] = {"batch_frames": 80, "max_frames": 16}
    if packed:
        batches = (list(itertools.chain(*rows)) for rows in cache.packed(seed=0, row_frames=20, **limits))
    else:
        batches = cache.batches(seed=0, **limits)
    frames = np.zeros(2)
    early = np.zeros(2)
    for number, windows in enumerate(itertools.islice(batches, 400)):
        for window in windows:
            frames[cache.index.reader[window.clip]] += window.frames
        early = frames.copy() if number == 20 else early
    assert frames[1] / frames.sum() == pytest.approx(0.75, abs=0.01)
    assert early[1] / early.sum() == pytest.approx(0.75, abs=0.15), "from the start"
    lines = cache.mixture(16)
    assert lines[0].startswith("large: 25.0% of the frames, 0.00 h, heard 0.")
    assert lines[1].startswith("small: 75.0% of the frames")


def test_a_mixture_does_not_depend_on_the_number_of_ranks(two: list[Path]) -> None:
    cache = TokenCache(two, shares=[1, 3])
    limits: dict[str, Any] = {"seed": 0, "batch_frames": 80, "row_frames": 20, "max_frames": 16}
    one = list(itertools.islice(cache.packed(**limits), 12))
    halves = [list(itertools.islice(cache.packed(**limits, rank=r, world_size=2, skip=1), 5)) for r in range(2)]
    assert [batch for pair in zip(*halves, strict=True) for batch in pair] == one[2:]


def test_fewer_windows_than_ranks_are_refused(two: list[Path]) -> None:
    cache = TokenCache(two[1])  # ten clips of 10 to 19 frames, without text
    cache.check_shared(10, 100)
    cache.check_shared(19, 10)  # a long clip is several windows
    with pytest.raises(UserError, match="10 clips to learn from, in 10 windows of at most 100 frames, are too"):
        cache.check_shared(11, 100)


def test_a_folder_without_clips_is_refused(two: list[Path], tmp_path: Path) -> None:
    tokens(sines(tmp_path / "in", [0.1], split="test"), tmp_path / "other")
    with pytest.raises(UserError, match=r"other has no clip of split 'train' .* 50\.0% of what is heard; leave it out"):
        TokenCache([two[0], tmp_path / "other"], split="train", shares=[1, 1])


def test_packed_task_scores_what_the_unpacked_does(folders: dict[str, str], tmp_path: Path) -> None:
    model = {"condition_dropout": 0.0, "max_frames": 40}
    data = {"pack_frames": 60, "max_frames": 40}
    trained = task(folders, tmp_path, data=data, model=model, losses={"text_dropout": 0.5})
    batch = next(trained.batches(seed=0, rank=0, world_size=1, skip=0))
    rows = batch["rows"].tolist()
    assert len(rows) > len(set(rows)), "rows are shared"
    trained.model.train()
    losses = []
    for shown in (batch, {name: value for name, value in batch.items() if name != "rows"}):
        loss, parts = trained.loss("model", shown, step=0, generator=torch.Generator().manual_seed(0))
        losses.append(torch.stack([loss.detach(), *(torch.as_tensor(parts[name]) for name in sorted(parts))]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_a_packed_mixture_resumes_exactly_and_is_told(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders["cache"], tmp_path / "second")
    data = {"caches": [folders["cache"], str(tmp_path / "second")], "weights": [1, 3]}
    data |= {"pack_frames": 60, "max_frames": 40}
    settings: dict[str, Any] = {"data": data, "model": {"max_frames": 40, "dropout": 0.1}}
    run(folders, tmp_path / "whole", steps=6, **settings)
    told = capsys.readouterr().err
    assert "packing: 2 rows of 60 frames a batch, attention by SDPA with a block mask" in told
    assert "cache: 25.0% of the frames" in told and "second: 75.0% of the frames" in told
    original = LanguageTask.loss

    def crash(self: LanguageTask, turn: str, batch: Batch, *, step: int, generator: torch.Generator) -> Any:
        if step == 4:
            raise MemoryError
        return original(self, turn, batch, step=step, generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageTask, "loss", crash)
        with pytest.raises(MemoryError):
            run(folders, tmp_path / "parts", steps=6, **settings)
    run(folders, tmp_path / "parts", resume=True, steps=6, **settings)
    one, two = (checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()
    lines = map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines())
    figures = next(line for line in lines if line["kind"] == "train")
    assert figures["share/cache"] + figures["share/second"] == pytest.approx(1.0)
    assert 0 < figures["share/cache"] < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_frames": 60}, "pack_frames=60 must lie between max_frames=750 and batch_frames=120"),
        ({"weights": [1, 2]}, "weights=[1.0, 2.0] must be 1 numbers above 0, one for each of caches"),
        ({"weights": [0]}, "weights=[0.0] must be 1 numbers above 0"),
    ],
)
def test_bad_settings_are_one_line(
    folders: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        task(folders, tmp_path, data=changes)
    assert message in str(error.value)
    assert language(folders)["data"]["caches"] == [folders["cache"]]
