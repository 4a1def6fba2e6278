import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.recordings import sines, tokens, write_corpus
from tokenizer.errors import UserError
from training.corpus import TokenCache, Window
from training.manifest import TagRule


def mixed(folder: Path) -> Path:
    """Twenty spoken clips of ten sentences, ten of music, three of a test split."""
    spoken = [
        {"path": f"s{i}.wav", "duration": 0.02, "split": "train", "text": f"text {i // 2}", "set": "speech"}
        for i in range(20)
    ]
    music = [{"path": f"m{i}.wav", "duration": 0.1, "split": "train", "set": "music"} for i in range(10)]
    test = [{"path": f"t{i}.wav", "duration": 0.02, "split": "test", "set": "speech"} for i in range(3)]
    source = write_corpus(folder / "in", [*spoken, *music, *test])
    tokens(source, folder / "out")
    return folder / "out"


def keys(cache: TokenCache) -> set[str]:
    return {cache[i].key for i in range(len(cache))}


def test_splits_and_sentences_held_back(tmp_path: Path) -> None:
    folder = mixed(tmp_path)
    assert len(TokenCache(folder)) == 33
    assert keys(TokenCache(folder, split="test")) == {"t0.wav", "t1.wav", "t2.wav"}
    train = TokenCache(folder, split="train", validation_fraction=0.3)
    held = TokenCache(folder, split="validation", validation_fraction=0.3)
    assert keys(train) | keys(held) == keys(TokenCache(folder, split="train"))
    assert not keys(train) & keys(held)
    assert 3 <= len(held) <= 18
    assert not {train[i].text for i in range(len(train))} & {held[i].text for i in range(len(held))} - {None}
    music = [TagRule(where={"set": "music"}, text=False)]
    by_rule = TokenCache(folder, split="validation", validation_fraction=0.3, rules=music)
    assert keys(by_rule) == {key for key in keys(held) if key.startswith("m")}, "rules do not move the border"
    assert len(TokenCache(folder, split="validation", validation_fraction=1e-9)) in (1, 2), "at least one sentence"
    with pytest.raises(UserError, match=r"no clip of split 'nope' is left .* the splits there are test, train"):
        TokenCache(folder, split="nope")
    with pytest.raises(UserError, match=r"validation_fraction=1\.5"):
        TokenCache(folder, validation_fraction=1.5)


def test_rules_give_tags_text_and_weight(tmp_path: Path) -> None:
    folder = mixed(tmp_path)
    rules = [
        TagRule(where={"set": "speech"}, tags=("speech", "set:{set}"), text=False, weight=3.0),
        TagRule(where={"path": "m[0-4].wav"}, tags=("music",)),
    ]
    cache = TokenCache(folder, split="train", rules=rules)
    assert len(cache) == 25
    assert cache.index.all_tags() == ["music", "set:speech", "speech"]
    assert (cache[0].tags, cache[0].text, cache.index.weight[0]) == (("speech", "set:speech"), None, 3.0)
    assert (cache[24].key, cache[24].tags, cache.index.weight[24]) == ("m4.wav", ("music",), 1.0)


def test_several_caches_are_one_corpus(tmp_path: Path) -> None:
    tokens(sines(tmp_path / "in1", [0.1, 0.2]), tmp_path / "one")
    tokens(sines(tmp_path / "in2", [0.3]), tmp_path / "two")
    cache = TokenCache([tmp_path / "one", tmp_path / "two"])
    assert [cache.num_frames(i) for i in range(3)] == [10, 20, 30]
    assert torch.equal(cache[2].codes, TokenCache(tmp_path / "two")[0].codes)
    with pytest.raises(UserError, match="no cache is given"):
        TokenCache([])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Sixty clips of 1 to 40 frames."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    tokens(sines(folder / "in", [int(n) / 100 for n in rng.integers(1, 41, 60)], text="x"), folder / "out")
    return TokenCache(folder / "out")


def take(cache: TokenCache, count: int, **values: Any) -> list[list[Window]]:
    return list(itertools.islice(cache.batches(**{"seed": 0, **values}), count))


def test_epoch_has_every_clip_once_within_the_budget(many: TokenCache) -> None:
    seen: Counter[int] = Counter()
    padded = real = 0
    for batch in many.batches(seed=0, batch_frames=120):
        assert len(batch) * max(w.frames for w in batch) <= 120
        assert all(w.start == 0 and w.frames == many.num_frames(w.clip) for w in batch)
        padded += len(batch) * max(w.frames for w in batch)
        real += sum(w.frames for w in batch)
        seen.update(w.clip for w in batch)
        if sum(seen.values()) >= 60:
            break
    assert seen == Counter(range(60))
    assert real > 0.85 * padded, "clips of like length come together"


def test_batches_depend_on_seed_and_position_alone(many: TokenCache) -> None:
    batches = take(many, 60, batch_size=4, batch_frames=150)
    assert batches == take(many, 60, batch_size=4, batch_frames=150)
    assert batches != take(many, 60, batch_size=4, batch_frames=150, seed=1)
    for skip in (1, 14, 15, 16, 40):
        assert take(many, 5, batch_size=4, batch_frames=150, skip=skip) == batches[skip : skip + 5]
    assert max(len(batch) for batch in batches) == 4
    epochs = [batches[:15], batches[15:30]]
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


@pytest.mark.parametrize("world_size", [2, 7, 40])
def test_ranks_share_an_epoch_out(many: TokenCache, world_size: int) -> None:
    steps = math.ceil(20 / world_size)
    ranks = [take(many, steps, batch_size=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = Counter(window.clip for batches in ranks for batch in batches for window in batch)
    assert set(seen) == set(range(60))
    assert sum(seen.values()) == 3 * steps * world_size
    if world_size == 2:
        spread = [abs(ranks[0][i][-1].frames - ranks[1][i][-1].frames) for i in range(steps)]
        assert np.mean(spread) < 6, "ranks work on like lengths at a time"
    assert take(many, 1, batch_size=3, rank=1, world_size=world_size, skip=steps - 1) == ranks[1][steps - 1 : steps]


def test_long_clips_give_random_windows_but_texts_their_beginning(tmp_path: Path) -> None:
    entries = [{"path": "music.wav", "duration": 1.0}, {"path": "speech.wav", "duration": 1.0, "text": "hello"}]
    tokens(write_corpus(tmp_path / "in", entries), tmp_path / "out")
    cache = TokenCache(tmp_path / "out")
    windows = [w for batch in take(cache, 120, batch_size=4, max_frames=30) for w in batch]
    music = [w.start for w in windows if w.clip == 0]
    speech = [w for w in windows if w.clip == 1]
    assert all(w.frames == 30 for w in windows)
    assert {w.start for w in speech} == {0}
    assert len(music) == 4 * len(speech), "as many windows as cover the clip"
    assert min(music) < 5
    assert max(music) > 65
    assert max(music) <= 70
    assert all(w.frames == 20 for batch in take(cache, 9, batch_frames=20) for w in batch)


def test_weights_are_times_an_epoch(tmp_path: Path) -> None:
    folder = mixed(tmp_path)
    rules = [TagRule(where={"set": "speech"}, weight=0.25), TagRule(where={"set": "music"}, weight=2.0)]
    cache = TokenCache(folder, split="train", rules=rules)
    sets = [cache[clip].labels["set"] for clip in range(len(cache))]
    seen = Counter(sets[w.clip] for batch in take(cache, 200, batch_size=1000) for w in batch)
    assert seen["music"] == 2 * 10 * 200
    assert seen["speech"] == pytest.approx(0.25 * 20 * 200, rel=0.1)


def test_batches_need_a_limit(many: TokenCache) -> None:
    with pytest.raises(ValueError, match="must be given"):
        take(many, 1)
    with pytest.raises(ValueError, match="at least 1"):
        take(many, 1, batch_size=0)
