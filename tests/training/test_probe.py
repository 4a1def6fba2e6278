"""Probes from vectors to figures, and the command: a floor first, honest intervals, bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.command import Command, assert_refused, runner
from tests.support.recordings import SILENT, write_corpus, write_sine
from tests.support.tiny_audio_model import tiny_tokenizer
from training.classifiers import METHODS
from training.embeddings import TokenizerFrames
from training.manifest import Clip, read_manifest
from training.partitions import Plan, ProbeTask, make_plan
from training.probe import conditions, probe, run, score


def plan_of(labels: list[str], groups: list[str], **task: Any) -> Plan:
    clips = [
        Clip(path=Path(f"{i}.wav"), key=f"{i}.wav", labels={"word": label, "speaker": group})
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]
    return make_plan(clips, ProbeTask(label="word", **task))


def telling(labels: list[str]) -> Tensor:
    """Vectors (N, 64) around a corner of a cube for each label."""
    corners = torch.randn(4, 64, generator=torch.Generator().manual_seed(9)).sign()
    names = sorted(set(labels))
    noise = torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(0))
    return corners[[names.index(label) for label in labels]] + 0.1 * noise


def test_separable_vectors_reach_one_and_random_ones_stay_at_chance() -> None:
    labels = [("yes", "no")[i % 2] for i in range(400)]
    plan = plan_of(labels, [str(i % 5) for i in range(400)], leave_out="speaker")
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    report = score(plan, {"floor": noise, "good": telling(labels)})
    rows = {(row.representation, row.method): row for row in report.rows}
    for method in METHODS:
        good, bad = rows["good", method], rows["floor", method]
        assert good.accuracy.value == good.accuracy.low == 1.0
        assert bad.accuracy.low <= 0.5 + 0.03 and bad.accuracy.high >= 0.5 - 0.03
        assert abs(bad.accuracy.value - 0.5) < 0.08
        assert bad.over_floor is None
        assert good.over_floor is not None and good.over_floor.value == pytest.approx(1.0 - bad.accuracy.value)
        assert good.over_floor.low > 0.3


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_learned_from_the_group_left_out(method: str) -> None:
    """Each group's vectors tell its labels, but the other groups' say the opposite: a leak would reach 1."""
    signs = torch.randn(4, 16, generator=torch.Generator().manual_seed(9)).sign()
    labels, groups, vectors = [], [], []
    for group in range(4):
        pattern = torch.full((4, 1), -0.5).index_fill(0, torch.tensor([group]), 4.0) * signs
        for number in range(400):
            labels.append(("no", "yes")[number % 2])
            groups.append(str(group))
            vectors.append((1 if number % 2 else -1) * pattern.flatten())
    table = torch.stack(vectors)
    honest = score(plan_of(labels, groups, leave_out="speaker"), {"floor": table}, methods=[method])  # type: ignore[list-item]
    leaking = score(plan_of(labels, groups, folds="4"), {"floor": table}, methods=[method])  # type: ignore[list-item]
    assert leaking.rows[0].accuracy.value == 1.0
    assert honest.rows[0].accuracy.value < 0.1


def test_intervals_are_over_groups_where_groups_are_left_out() -> None:
    """Four speakers, one of whom is always misjudged: few independent speakers, a wide interval."""
    labels = [("yes", "no")[i % 2] for i in range(400)]
    groups = [str(i // 100) for i in range(400)]
    vectors = telling(labels)
    vectors[300:] = vectors[300:].flip(0)  # the last speaker's vectors belong to the other class
    grouped = score(plan_of(labels, groups, leave_out="speaker"), {"floor": vectors}, methods=["knn"])
    single = score(plan_of(labels, groups, folds="speaker"), {"floor": vectors}, methods=["knn"])
    assert (grouped.interval_over, single.interval_over) == ("groups", "clips")
    wide, narrow = grouped.rows[0].accuracy, single.rows[0].accuracy
    assert wide.value == narrow.value
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low) > 0


def test_clips_of_unseen_classes_count_as_wrong() -> None:
    labels = ["yes", "no"] * 10 + ["go"] * 5
    plan = plan_of(labels, ["a"] * 10 + ["b"] * 15, folds="speaker")
    report = score(plan, {"floor": telling(labels)}, methods=["knn"])
    assert report.unseen == {"go": 5}
    assert report.rows[0].class_accuracy["go"] == 0.0
    assert report.rows[0].accuracy.value <= 20 / 25
    assert any("5 test clips are of classes that their training lacks and count as wrong: go" in line
               for line in conditions(report))  # fmt: skip


def test_figures_belong_to_the_right_clips() -> None:
    labels = ["yes", "no"] * 6 + ["no"] * 2
    plan = plan_of(labels, ["abba"[i % 4] for i in range(14)], leave_out="speaker")
    report = score(plan, {"floor": torch.randn(14, 4, generator=torch.Generator().manual_seed(0))}, methods=["knn"])
    row = report.rows[0]
    assert report.labels == {f"{i}.wav": label for i, label in enumerate(labels)}
    right = [row.predictions[key] == label for key, label in report.labels.items()]
    assert row.accuracy.value == pytest.approx(sum(right) / 14)
    for name, group in (("speaker a", "a"), ("speaker b", "b")):
        keys = [clip.key for clip in plan.clips if clip.labels["speaker"] == group]
        own = [row.predictions[key] == report.labels[key] for key in keys]
        assert row.part_accuracy[name] == pytest.approx(sum(own) / len(own))
    for label in ("yes", "no"):
        own = [row.predictions[key] == label for key, true in report.labels.items() if true == label]
        assert row.class_accuracy[label] == pytest.approx(sum(own) / len(own))
    assert row.balanced_accuracy == pytest.approx(sum(row.class_accuracy.values()) / 2)


# From audio, by the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low and high tones of four singers; singer d is split test."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for number in range(48):
        pitch, singer = ("low", "high")[number % 2], "abcd"[number % 4 // 2 + 2 * (number % 3 == 0)]
        name = f"{number}.wav"
        write_sine(folder / name, 0.2 + 0.01 * (number % 7), hz=(300, 1500)[number % 2] + 5.0 * number)
        rows.append(
            {"path": name, "pitch": pitch, "singer": singer, "fold": number % 3, "set": "tones", "language": "x"}
            | {"split": "test" if singer == "d" else "train"}
        )
    return write_corpus(folder, rows)


def test_the_command_prints_the_floor_first_and_writes_json(
    command: Command, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    words = ("probe", "--tokenizer", tokenizer, "--data", corpus, "--label", "pitch", "--json", tmp_path / "f.json")
    result = command(*words)
    assert result.status == 0, result
    lines = result.out.splitlines()
    table = lines[[line.split()[:1] for line in lines].index(["representation"]) + 1 :]
    assert table[0].startswith("log-mel (floor)") and "linear" in table[0] and "the floor" in table[0]
    assert table[1].startswith("log-mel (floor)") and "knn" in table[1]
    for part in ("pitch: 48 clips, ", "chance 0.500", "95 % interval over clips"):
        assert part in result.out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert set(figures) == {
        *("data", "tokenizer", "fingerprint", "task", "seed", "num_clips", "num_scored", "num_parts"),
        *("interval_over", "classes", "chance", "majority", "unseen", "notes", "problems", "labels", "rows"),
    }
    assert figures["seed"] == 42 and figures["num_clips"] == 48
    assert figures["fingerprint"] == tiny_tokenizer().fingerprint()
    assert [(row["representation"], row["method"]) for row in figures["rows"]] == [
        (name, method) for name in ("log-mel (floor)", f"{tokenizer} latents") for method in METHODS
    ]
    for row in figures["rows"]:
        assert set(row["accuracy"]) == {"value", "low", "high"}
        assert 0.0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"] <= 1.0
        assert set(row["predictions"]) == set(figures["labels"])
    assert figures["rows"][1]["accuracy"]["value"] == 1.0
    assert {row["dim"] for row in figures["rows"]} == {256, 8}


def test_options_of_the_command(command: Command, corpus: Path, tokenizer: Path) -> None:
    base = ("probe", "--tokenizer", tokenizer, "--data", corpus.parent, "--label", "pitch", "--device", "cpu")
    knn = command(*base, "--input", "codes", "--method", "knn", "--leave-out", "singer")
    assert knn.status == 0, knn
    assert "codes" in knn.out and "linear" not in knn.out
    assert "one singer left out at a time (4)" in knn.out and "95 % interval over groups" in knn.out
    folds = command(*base, "--method", "knn", "--folds", "fold", "--where", "singer=[ab]", "--split", "train")
    assert folds.status == 0, folds
    assert "folds by fold; split train alone" in folds.out and "pitch (singer=[ab])" in folds.out
    first, again, other = (command(*base, "--folds", 3, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other
    assert "3 random folds" in first


def test_a_bad_file_is_reported_counted_and_skipped(
    command: Command, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    bad = tmp_path / "bad.wav"
    bad.write_text("This is a letter.")
    lines = [{**row, "path": str(corpus.parent / row["path"])} for row in rows] + [{**rows[0], "path": str(bad)}]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, [*lines, {**rows[0], "path": "missing.wav"}])))
    result = command("probe", "--tokenizer", tokenizer, "--data", manifest, "--label", "pitch", "--method", "knn")
    assert result.status == 0, result
    assert "bad.wav is not audio" in result.err and "no such file: missing.wav" in result.err
    assert "2 files skipped" in result.err
    assert "2 files could not be read" in result.out and "pitch: 48 clips" in result.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--label", "ptich"], ["no clip has the label 'ptich'", "did you mean 'pitch'"]),
        (["--label", "language"], ["'x' for all 48 clips", "at least 2 classes"]),
        (["--label", "pitch", "--where", "set=music"], ["no clip meets set=music"]),
        (["--label", "pitch", "--where", "set"], ["where='set' must be label=value"]),
        (["--label", "pitch", "--folds", "fold", "--leave-out", "singer"], ["exclude each other"]),
        (["--label", "pitch", "--split", "train"], ["needs folds or leave_out"]),
        (["--label", "singer"], ["no class of the test clips, such as 'd', occurs in training"]),
        (["--label", "pitch", "--input", "features"], ["has no features", "latents or codes"]),
        (["--label", "pitch", "--input", "sound"], ["--input"]),
        (["--label", "pitch", "--method", "svm"], ["--method"]),
        (["--label", "pitch", "--device", "gpu"], ["device='gpu'"]),
        (["--label", "pitch", "--data", "nowhere"], ["nowhere: no such file"]),
        (["--label", "pitch", "--tokenizer", "nowhere"], ["'nowhere' is not a folder"]),
    ],
)
def test_bad_input_is_one_line(
    command: Command, corpus: Path, tokenizer: Path, words: list[str], parts: list[str]
) -> None:
    given = {"--tokenizer": tokenizer, "--data": corpus} | dict(zip(words[::2], words[1::2], strict=True))
    assert_refused(command("probe", *(word for pair in given.items() for word in pair)), *parts)


def test_three_clips_are_too_few(command: Command, tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"path": f"{i}.wav", "duration": 0.1, "word": "ab"[i % 2], "split": "train"} for i in range(3)]
    words = ("probe", "--tokenizer", tokenizer, "--data", write_corpus(tmp_path, rows), "--label", "word")
    assert_refused(command(*words), "3 clips have the label 'word', but a probe needs at least 10")


def test_no_readable_file_is_one_line(command: Command, tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"path": f"{i}.wav", "word": "ab"[i % 2], "split": ("train", "test")[i // 6]} for i in range(12)]
    for row in rows:
        (tmp_path / row["path"]).write_text("This is a letter.")
    words = ("probe", "--tokenizer", tokenizer, "--data", write_corpus(tmp_path, rows), "--label", "word")
    assert_refused(command(*words), "none of the 12 files could be read")


def test_json_that_cannot_be_written(command: Command, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ("probe", "--tokenizer", tokenizer, "--data", corpus, "--label", "pitch", "--method", "knn")
    (tmp_path / "file").write_text("")
    assert_refused(command(*words, "--json", tmp_path / "file" / "f.json"), "cannot be written")


def test_several_views_share_one_table(corpus: Path) -> None:
    source = TokenizerFrames(tiny_tokenizer(), ("latents", "codes"), "tiny")
    report = probe(read_manifest(corpus).clips, ProbeTask(label="pitch"), [source], methods=["knn"], console=SILENT)
    assert [row.representation for row in report.rows] == ["log-mel (floor)", "tiny latents", "tiny codes"]


def test_a_run_computes_what_the_command_shows(corpus: Path, tokenizer: Path) -> None:
    report = run(tokenizer, corpus, {"label": "pitch", "folds": "fold"}, method="knn", device="cpu", console=SILENT)
    assert [row.method for row in report.rows] == ["knn", "knn"]
    assert report.num_scored == report.num_clips == 48
