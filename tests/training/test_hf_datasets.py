"""Data sets of Hugging Face's library as a corpus: from disk, from the hub, and without the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.recordings import tokens, write_sine
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from training.corpus import TokenCache
from training.manifest import read_manifest


def table(folder: Path, **changes: Any) -> Any:
    """Three rows: two that hold their audio, one that holds none."""
    datasets = pytest.importorskip("datasets")
    sound = [write_sine(folder / f"{n}.wav", 0.1 * (n + 1), 200.0 + n).read_bytes() for n in range(2)]
    columns = {
        "id": [7, 8, 9],
        "sentence": ["Good morning.", "Hello.", None],
        "accent": [0, 1, -1],
        "audio": [{"bytes": s, "path": None} for s in sound] + [None],
        **changes,
    }
    accents = datasets.ClassLabel(names=["north", "south"])
    features = {"id": datasets.Value("int64"), "sentence": datasets.Value("string"), "accent": accents}
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = datasets.Dataset.from_dict(columns, datasets.Features({**features, "audio": stored}))
    return rows.cast_column("audio", datasets.Audio())  # given to Audio at once, they would need torchcodec


def test_a_saved_data_set(tmp_path: Path) -> None:
    rows = table(tmp_path)
    rows.save_to_disk(str(tmp_path / "saved"))
    found = read_manifest(tmp_path / "saved")
    assert found.problems == []
    first, second, third = found.clips
    assert (first.key, first.text, first.split) == ("0", "Good morning.", None)
    assert first.labels == {"id": "7", "accent": "north"}
    assert (second.labels["accent"], third.text, third.labels["accent"]) == ("south", None, "-1")
    assert torch.equal(read_audio(second.audio, 8000), read_audio(tmp_path / "1.wav", 8000))
    tokens(tmp_path / "saved", tmp_path / "out", workers=2)
    cache = TokenCache(tmp_path / "out")
    assert [cache[i].text for i in range(len(cache))] == ["Good morning.", "Hello."]
    assert (tmp_path / "out/problems.txt").read_text() == f"{tmp_path / 'saved'}, row 2: holds no audio\n"
    assert tokens(tmp_path / "saved", tmp_path / "out").num_encoded == 0


def test_splits_of_a_data_set_are_those_of_clips(tmp_path: Path) -> None:
    rows = table(tmp_path)
    datasets = sys.modules["datasets"]
    both = datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])})
    both.save_to_disk(str(tmp_path / "saved"))
    clips = read_manifest(tmp_path / "saved").clips
    assert [(clip.key, clip.split, clip.text) for clip in clips] == [
        ("train/0", "train", "Good morning."),
        ("test/0", "test", "Hello."),
    ]
    assert len(read_manifest(tmp_path / "saved", "test").clips) == 1


def test_the_hub_is_asked_for_a_name_and_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(tmp_path)
    datasets = sys.modules["datasets"]
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        if arguments[0] == "no/where":
            raise FileNotFoundError("Couldn't find\nany data")
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_manifest(Path("hf:owner/name:clean")).clips) == 3
    assert len(read_manifest(Path("hf:owner/name"), "train").clips) == 3
    assert asked == [("owner/name", "clean"), ("owner/name", None)]
    with pytest.raises(UserError, match=r"hf:no/where cannot be loaded \(Couldn't find any data\); check the name"):
        read_manifest(Path("hf:no/where"))


@pytest.mark.parametrize("place", ["../secret.wav", "absolute"])
def test_a_row_that_points_outside_is_refused(tmp_path: Path, place: str) -> None:
    """Made by hand: the library itself copies files into what it saves."""
    write_sine(tmp_path / "secret.wav", 0.1)
    saved = tmp_path / "saved"
    place = str(tmp_path / "secret.wav") if place == "absolute" else place
    rows = table(tmp_path, audio=[None, None, None])
    rows.save_to_disk(str(saved))
    from training.hf_datasets import DatasetRow

    audio = [{"audio": {"bytes": None, "path": place}}, {"audio": {"bytes": None, "path": "in.wav"}}]
    row = DatasetRow(rows=audio, number=0, column="audio", root=saved, name="saved, row 0")
    with pytest.raises(UserError, match=r"saved, row 0: its audio, .*secret.wav, lies outside .*saved; move it inside"):
        row.open()
    write_sine(saved / "in.wav", 0.1)
    inside = DatasetRow(rows=audio, number=1, column="audio", root=saved, name="saved, row 1")
    assert read_audio(inside, 8000).shape == (1, 800)


def test_a_data_set_without_audio_is_one_line(tmp_path: Path) -> None:
    table(tmp_path).remove_columns(["audio"]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no column of type Audio among id, sentence, accent; use cast_column"):
        read_manifest(tmp_path / "saved")


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    for source in (tmp_path, Path("hf:owner/name")):
        with pytest.raises(UserError) as error:
            read_manifest(source)
        assert str(error.value) == (
            f"{source} is a data set of Hugging Face, which needs its library; pip install 'hybridlm[datasets]'"
        )
