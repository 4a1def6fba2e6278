import json
from pathlib import Path

import pytest

from tests.support.recordings import write_corpus, write_sine
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.manifest import Clip, TagRule, apply_rules, read_manifest


def clip(**values: object) -> Clip:
    return Clip(**{"path": Path("a.wav"), "key": "a.wav", **values})


def test_json_lines(tmp_path: Path) -> None:
    manifest = write_corpus(
        tmp_path,
        [
            {
                "path": "b/one.wav",
                "duration": 0.1,
                "split": "train",
                "text": "Hello",
                "tags": ["speech"],
                "speaker": "ann",
                "take": 3,
                "none": None,
            },
            {"path": "a.wav", "duration": 0.2},
        ],
    )
    for source in (manifest, tmp_path):
        found = read_manifest(source)
        assert found.problems == []
        first, second = found.clips
        assert first.path == tmp_path / "b" / "one.wav"
        assert (first.key, first.duration, first.split, first.text) == ("b/one.wav", 0.1, "train", "Hello")
        assert first.tags == ("speech",)
        assert first.labels == {"speaker": "ann", "take": "3"}
        assert (second.key, second.split, second.text, second.tags, second.labels) == ("a.wav", None, None, (), {})


def test_parts_of_a_file_have_keys_of_their_own(tmp_path: Path) -> None:
    write_sine(tmp_path / "a.wav", 1.0)
    lines = [{"audio": "a.wav", "start": 0.25, "end": 0.5}, {"audio": "a.wav", "start": 0.5}, {"audio": "a.wav"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips = read_manifest(tmp_path / "m.jsonl").clips
    assert [c.key for c in clips] == ["a.wav#0.25-0.5", "a.wav#0.5-", "a.wav"]
    assert [c.read_duration for c in clips] == [0.25, None, None]


def test_bad_lines_are_counted_told_and_skipped(tmp_path: Path) -> None:
    write_sine(tmp_path / "good.wav", 0.1)
    bad = {
        b'{"path": "good.wav"': "not JSON",
        b'["good.wav"]': "is not a JSON object",
        b'{"file": "good.wav", "text": "x"}': "has neither 'audio' nor 'path'; its keys are file, text",
        b'{"path": "missing.wav"}': "no such file: missing.wav",
        b'{"path": ""}': "path='' must be a path",
        b'{"path": 7}': "path=7 must be a path",
        b'{"path": "good.wav", "duration": -1}': "duration=-1 must be a number of seconds, at least 0",
        b'{"path": "good.wav", "duration": 0}': "duration=0.0 must be above 0",
        b'{"path": "good.wav", "start": "1"}': "start='1' must be a number of seconds",
        b'{"path": "good.wav", "start": NaN}': "start=nan must be a number",
        b'{"path": "good.wav", "start": 2, "end": 1}': "end=1.0 must be after start=2.0",
        b'{"path": "good.wav", "text": 5}': "text=5 must be text",
        b'{"path": "good.wav", "split": []}': "split=[] must be text",
        b'{"path": "good.wav", "tags": "speech"}': "tags='speech' must be a list of texts",
        b'{"path": "good.wav", "text": "\xff"}': "not UTF-8 text",
    }
    lines = [b'\xef\xbb\xbf{"path": "good.wav"}', b"", *bad, b'{"path": "good.wav", "text": "last"}']
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    found = read_manifest(tmp_path / "m.jsonl")
    assert [c.text for c in found.clips] == [None, "last"]
    assert len(found.problems) == len(bad)
    for number, (problem, message) in enumerate(zip(found.problems, bad.values(), strict=True), start=3):
        assert problem.startswith(f"m.jsonl:{number}: ")
        assert message in problem


def test_rows_that_leave_their_folder_are_refused(tmp_path: Path) -> None:
    write_sine(tmp_path / "secret.wav", 0.1)
    corpus = tmp_path / "corpus"
    write_sine(corpus / "wavs" / "mine.wav", 0.1)
    names = ["../secret.wav", "wavs/../../secret.wav", "wavs/../wavs/mine.wav", str(corpus / "wavs/mine.wav")]
    (corpus / "m.jsonl").write_text("\n".join(json.dumps({"path": name}) for name in names))
    found = read_manifest(corpus / "m.jsonl")
    assert [clip.key for clip in found.clips] == names[2:]
    assert [problem.split(" leaves")[0] for problem in found.problems] == [
        "m.jsonl:1: path='../secret.wav'",
        "m.jsonl:2: path='wavs/../../secret.wav'",
    ]
    ids = ["mine", "../../secret", str(tmp_path / "secret")]
    (corpus / "metadata.csv").write_text("".join(f"{name}|Some text.\n" for name in ids))
    found = read_manifest(corpus / "metadata.csv")
    assert [clip.key for clip in found.clips] == ["wavs/mine.wav"]
    assert len(found.problems) == 2
    assert all("leaves the folder" in problem for problem in found.problems)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "missing.wav"}\nnonsense\n')
    with pytest.raises(UserError, match=r"no usable clip \(2 problems, the first: m.jsonl:1: no such file"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no audio found"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or folder"):
        read_manifest(tmp_path / "nowhere")


def test_split_keeps_its_own_and_unmarked_clips(tmp_path: Path) -> None:
    entries = [{"path": f"{name}.wav", "duration": 0.1, "split": name} for name in ("train", "test")]
    source = write_corpus(tmp_path, [*entries, {"path": "none.wav", "duration": 0.1}])
    assert [c.key for c in read_manifest(source, "test").clips] == ["test.wav", "none.wav"]
    source = write_corpus(tmp_path, entries)
    with pytest.raises(UserError, match="no clip of split 'valid'; its splits are test, train"):
        read_manifest(source, "valid")


def test_folder_in_a_fixed_order_with_texts_beside(tmp_path: Path) -> None:
    for name in ("b.wav", "a/2.flac", "a/10.wav", ".hidden/x.wav", "c.WAV"):
        write_sine(tmp_path / name, 0.1)
    (tmp_path / "notes.md").write_text("not audio")
    (tmp_path / "b.txt").write_text("Good\n morning ")
    (tmp_path / "a" / "2.lab").write_text("two")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    found = read_manifest(tmp_path)
    assert [(c.key, c.text) for c in found.clips] == [
        ("b.wav", "Good morning"),
        ("a/10.wav", None),
        ("a/2.flac", "two"),
    ]
    assert len(found.problems) == 1
    assert "c.WAV: the text beside it is not UTF-8" in found.problems[0]


def test_single_file(tmp_path: Path) -> None:
    write_sine(tmp_path / "a.wav", 0.1)
    (tmp_path / "a.txt").write_text("hello")
    (only,) = read_manifest(tmp_path / "a.wav").clips
    assert (only.key, only.text) == ("a.wav", "hello")


def test_ljspeech(tmp_path: Path) -> None:
    write_sine(tmp_path / "wavs" / "LJ1.wav", 0.1)
    write_sine(tmp_path / "LJ2.flac", 0.1)
    (tmp_path / "metadata.csv").write_text('LJ1|In 1455, "x"|In fourteen "x"\nLJ2|plain\nLJ3|gone|gone\nno fields\n')
    found = read_manifest(tmp_path)
    assert [(c.key, c.text) for c in found.clips] == [("wavs/LJ1.wav", 'In fourteen "x"'), ("LJ2.flac", "plain")]
    assert [p.split(":")[1] for p in found.problems] == ["3", "4"]


def test_first_matching_rule_gives_tags_text_and_weight() -> None:
    rules = [
        TagRule(where={"set": "kath*", "split": "train"}, tags=("speech", "speaker:{speaker}"), weight=2.0),
        TagRule(where={"set": "music"}, tags=("music",), keep_tags=True, text=False),
        TagRule(where={"set": "skipped"}, weight=0.0),
        TagRule(where={"tag": "sound*"}, tags=("sound",)),
        TagRule(where={"set": "music"}, tags=("never reached",)),
    ]
    clips = [
        clip(labels={"set": "kathleen", "speaker": "Kathleen B"}, split="train", text="hi", tags=("own",)),
        clip(labels={"set": "kathleen", "speaker": "Kathleen B"}, split="test"),
        clip(labels={"set": "music"}, text="la", tags=("piano", "music")),
        clip(labels={"set": "skipped"}),
        clip(tags=("sound:rain",)),
        clip(),
    ]
    first, music, sound = apply_rules(clips, rules)
    assert (first.tags, first.text, first.weight) == (("speech", "speaker:kathleen-b"), "hi", 2.0)
    assert (music.tags, music.text, music.weight) == (("music", "piano"), None, 1.0)
    assert sound.tags == ("sound",)


def test_without_rules_clips_pass_as_they_are() -> None:
    clips = [clip(tags=("own",), text="x"), clip()]
    assert list(apply_rules(clips, [])) == clips


def test_rules_that_cannot_work_are_told() -> None:
    with pytest.raises(UserError, match="no clip has the label 'sett'; did you mean 'set'"):
        list(apply_rules([clip(labels={"set": "a"})], [TagRule(where={"sett": "a"})]))
    with pytest.raises(UserError, match="has no label 'speaker'; its labels are set"):
        list(apply_rules([clip(labels={"set": "a"})], [TagRule(tags=("speaker:{speaker}",))]))


def test_rules_come_from_settings() -> None:
    rule = from_mapping(TagRule, {"where": {"set": "kathleen"}, "tags": ["speech"], "text": False, "weight": 3})
    assert rule == TagRule(where={"set": "kathleen"}, tags=("speech",), text=False, weight=3.0)
    with pytest.raises(UserError, match=r"weight=-1.0 must be a number of at least 0"):
        from_mapping(TagRule, {"weight": -1.0})


def test_the_recordings_beside_the_tests_are_whole() -> None:
    found = read_manifest(Path(__file__).parents[1] / "data")
    assert found.problems == []
    assert {c.labels["license"] for c in found.clips} == {"CC0-1.0"}
    for c in found.clips:
        assert read_audio(c.path).shape[1] == pytest.approx(c.duration * 24_000, abs=50)
