"""Tokens in tar files: what goes in comes out, the library reads them too, and training reads from front to back."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import training.shards
from tests.support.recordings import BlockTokenizer, sines, tokens, write_corpus
from tests.support.torn_writing import assert_all_comes_back, cut
from tokenizer.errors import UserError
from training.corpus import TokenCache, Window


def test_a_cache_in_tar_files_is_the_other(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"path": f"{i}.wav", "duration": 0.1 * (i + 1), "text": f"größe {i}"} for i in range(4)
    ]
    source = write_corpus(tmp_path / "in", [{**entry, "speaker": "ann"} for entry in entries])
    tokens(source, tmp_path / "rows", BlockTokenizer(feature_dim=3))
    tokens(source, tmp_path / "tar", BlockTokenizer(feature_dim=3), layout="tar")
    assert tokens(source, tmp_path / "tar", BlockTokenizer(feature_dim=3), layout="tar").num_encoded == 0
    one, other = TokenCache(tmp_path / "rows"), TokenCache(tmp_path / "tar")
    for clip in range(4):
        for window in (Window(clip, 0, one.num_frames(clip)), Window(clip, 3, 5)):
            a, b = one.read(window), other.read(window)
            assert (a.key, a.text, a.labels) == (b.key, b.text, b.labels)
            assert torch.equal(a.codes, b.codes) and torch.equal(a.latents, b.latents)
            assert a.features is not None and b.features is not None and torch.equal(a.features, b.features)
    for layout, folder in (("rows", "tar"), ("tar", "rows")):
        with pytest.raises(UserError, match=f"was made with layout={folder}, but {layout} is asked for"):
            tokens(source, tmp_path / folder, BlockTokenizer(feature_dim=3), layout=layout)


def test_others_read_them(tmp_path: Path) -> None:
    """Python's tarfile, and the library; arrays are plain numpy files."""
    source = sines(tmp_path / "in", [0.1, 0.2], text="Hello.", tags=["speech"])
    tokens(source, tmp_path / "out", layout="tar")
    cache = TokenCache(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        assert [name.partition(".")[2] for name in names] == ["codes.npy", "latents.npy", "json"] * 2
        about = json.load(io.BytesIO(tar.extractfile(names[5]).read()))  # type: ignore[union-attr]
        codes = np.load(io.BytesIO(tar.extractfile(names[3]).read()), allow_pickle=False)  # type: ignore[union-attr]
    assert about == {"key": "1.wav", "split": None, "text": "Hello.", "tags": ["speech"], "labels": {}}
    assert np.array_equal(codes.T, cache[1].codes.numpy())
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False, empty_check=False))
    assert [json.loads(sample["json"])["key"] for sample in found] == ["0.wav", "1.wav"]
    latents = np.load(io.BytesIO(found[0]["latents.npy"]), allow_pickle=False)
    assert np.array_equal(latents.astype(np.float32), cache[0].latents.numpy())


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), stop=st.integers(0, 8), torn=st.integers(0, 4000))
def test_clips_come_back_wherever_writing_was_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], stop: int, torn: int
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    assert_all_comes_back(
        folder, lengths, stop, lambda: cut(list(folder.glob("*.tar")), torn), max_rows=20, layout="tar"
    )
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) % 3 == 0
        assert path.read_bytes().endswith(bytes(1024))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred clips in tar files of ten."""
    folder = tmp_path_factory.mktemp("tars")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.shards, "_MAX_SHARD_BYTES", 512 * 60)
        tokens(
            sines(folder / "in", [0.02 + 0.01 * (i % 3) for i in range(200)], text="x"), folder / "out", layout="tar"
        )
    return folder / "out"


def windows(cache: TokenCache, epochs: int = 1, *, packed: bool = False, **values: Any) -> list[Window]:
    limits: dict[str, Any] = {"seed": 0, "batch_frames": 16, "max_frames": 4, **values}
    if packed:
        batches = (list(itertools.chain(*rows)) for rows in cache.packed(row_frames=8, **limits))
    else:
        batches = cache.batches(**limits)
    found: list[Window] = []
    while len(found) < epochs * len(cache):
        found += next(batches)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_tar_files_are_read_from_front_to_back(tars: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.packing.POOL", 20)
    cache = TokenCache(tars, shuffle_buffer=10)
    num_shards = len(set(cache.index.shard.tolist()))
    assert num_shards >= 15
    order = windows(cache, packed=packed, **({} if packed else {"batch_size": 1}))
    assert Counter(w.clip for w in order) == Counter(range(200))
    shards = [int(cache.index.shard[w.clip]) for w in order]
    first = {shard: shards.index(shard) for shard in shards}
    last = {shard: len(shards) - shards[::-1].index(shard) for shard in shards}
    at_once = max(sum(first[s] <= moment < last[s] for s in first) for moment in range(len(shards)))
    assert at_once < num_shards / 2, "only some are open at a time"
    assert list(first) != sorted(first), "in random order"
    inside = [w.clip for w in order if cache.index.shard[w.clip] == 0]
    assert inside != sorted(inside), "and shuffled inside"
    assert order == windows(TokenCache(tars, shuffle_buffer=10), packed=packed, **({} if packed else {"batch_size": 1}))


def test_clips_twice_an_epoch_and_mixed_with_other_caches(tars: Path, tmp_path: Path) -> None:
    tokens(sines(tmp_path / "in", [0.03] * 20, text="x"), tmp_path / "rows")
    cache = TokenCache([tars, tmp_path / "rows"], shares=[1, 1], shuffle_buffer=10)
    found = windows(cache, 10, packed=True)
    frames = np.zeros((2, 2))
    for number, window in enumerate(found):
        frames[2 * number // len(found), cache.index.reader[window.clip]] += window.frames
    assert frames[0] / frames[0].sum() == pytest.approx([0.5, 0.5], abs=0.05)
    assert frames[1] / frames[1].sum() == pytest.approx([0.5, 0.5], abs=0.05)
