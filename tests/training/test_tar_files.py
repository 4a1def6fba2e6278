"""WebDataset's tar files as a corpus, what is wrong with them, and that nothing but the audio is ever opened."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests.support.recordings import tokens, write_sine
from tokenizer.audio import audio_info, read_audio
from tokenizer.errors import UserError
from training.corpus import TokenCache
from training.manifest import read_manifest


def sine(folder: Path, hz: float = 440.0, suffix: str = "wav", seconds: float = 0.2) -> bytes:
    return write_sine(folder / f"{hz}.{suffix}", seconds, hz).read_bytes()


def write_tar(path: Path, members: dict[str, bytes | None]) -> Path:
    """None: a symbolic link to /etc/hostname."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
                tar.addfile(member)
                continue
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_members_are_what_files_would_be(tmp_path: Path) -> None:
    first, second = sine(tmp_path), sine(tmp_path, 220.0, "flac")
    about = {
        "text": "overruled",
        "speaker": "ann",
        "tags": ["speech"],
        "split": "test",
        "start": 0.05,
        "path": "/x.wav",
    }
    write_tar(tmp_path / "in/b.tar", {"x/2.flac": second})
    write_tar(
        tmp_path / "in/a.tar",
        {"1.json": json.dumps(about).encode(), "1.txt": b" Good \n morning.\n", "1.wav": first, "1.cls": b"3"},
    )
    found = read_manifest(tmp_path / "in")
    assert found.problems == []
    one, two = found.clips
    assert (one.key, one.text, one.tags, one.split) == ("a.tar/1.wav#0.05-", "Good morning.", ("speech",), "test")
    assert one.labels == {"speaker": "ann", "path": "/x.wav"}, "a path inside is a label, and never opened"
    assert (two.key, two.text, two.labels) == ("b.tar/x/2.flac", None, {})
    assert audio_info(two.audio).duration_s == pytest.approx(0.2)
    assert torch.equal(read_audio(two.audio, 8000), read_audio(tmp_path / "220.0.flac", 8000))
    assert two.open().read() == second
    assert [clip.key for clip in read_manifest(tmp_path / "in/b.tar").clips] == ["b.tar/x/2.flac"]


def test_a_pattern_names_numbered_files(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        write_tar(tmp_path / f"s{number % 2}/clips-{number:03d}.tar", {"1.wav": sine(tmp_path)})
    found = read_manifest(tmp_path / "s{0..1}/clips-{008..010}.tar")
    assert [clip.key for clip in found.clips] == [f"s{n % 2}/clips-{n:03d}.tar/1.wav" for n in (8, 10, 9)]
    assert len(found.problems) == 3 and found.problems[0].endswith("s0/clips-009.tar: no such file")


def test_what_is_wrong_is_told_counted_and_skipped(tmp_path: Path) -> None:
    good = sine(tmp_path)
    source = write_tar(
        tmp_path / "a.tar",
        {
            "link.wav": None,
            "../up.wav": good,
            "two.wav": good,
            "two.flac": good,
            "none.txt": b"words",
            "json.wav": good,
            "json.json": b"{",
            "list.wav": good,
            "list.json": b"[]",
            "bytes.wav": good,
            "bytes.txt": b"\xff\xfe",
            "range.wav": good,
            "range.json": b'{"start": 2, "end": 1}',
            "pickle.pyd": b"cos\nsystem\n(S'exit 1'\ntR.",
            "noise.wav": b"not audio at all",
            "last.wav": good,
        },
    )
    found = read_manifest(source)
    assert [clip.key for clip in found.clips] == ["a.tar/../up.wav", "a.tar/noise.wav", "a.tar/last.wav"]
    told = [
        "a.tar/link.wav: is a link or no plain file",
        "a.tar/two: has 2 recordings among wav, flac, but must have one",
        "a.tar/none: has 0 recordings among txt",
        "a.tar/json.json: not JSON",
        "a.tar/list.json: is not a JSON object",
        "a.tar/bytes.txt: not UTF-8 text",
        "a.tar/range: end=1.0 must be after start=2.0",
        "a.tar/pickle: has 0 recordings among pyd",
    ]
    assert len(found.problems) == len(told)
    for problem, wanted in zip(found.problems, told, strict=True):
        assert problem.startswith(wanted)
    assert not (tmp_path.parent / "up.wav").exists(), "a member's name is a key, never a place on disk"
    tokens(source, tmp_path / "out", workers=2)
    assert len(TokenCache(tmp_path / "out")) == 2
    problems = (tmp_path / "out" / "problems.txt").read_text()
    assert problems.count("\n") == len(told) + 1 and f"{source}/noise.wav is not audio that can be read" in problems


def test_damage_costs_no_more_than_what_follows_it(tmp_path: Path) -> None:
    good = sine(tmp_path)
    source = write_tar(tmp_path / "in/a.tar", {f"{n}.wav": good for n in range(3)})
    write_tar(tmp_path / "in/b.tar", {"1.wav": good})
    whole = source.read_bytes()
    step = 512 * (1 + -(-len(good) // 512))
    source.write_bytes(whole[: 2 * step + 600])
    found = read_manifest(tmp_path / "in")
    assert [clip.key for clip in found.clips] == ["a.tar/0.wav", "a.tar/1.wav", "b.tar/1.wav"]
    assert len(found.problems) == 1 and "a.tar" in found.problems[0]
    source.write_bytes(whole[:step] + b"x" * 512 + whole[step + 512 :])
    found = read_manifest(source)
    assert [clip.key for clip in found.clips] == ["a.tar/0.wav"]
    assert found.problems == [f"a.tar: damaged at byte {step}; what follows is left out"]
    (tmp_path / "z.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"z.tar: compressed tar files can't be read from the middle; unpack it"):
        read_manifest(tmp_path / "z.tar")
    (tmp_path / "n.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(UserError, match=r"n.tar: damaged, or no tar file"):
        read_manifest(tmp_path / "n.tar")


def test_the_library_writes_what_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = str(tmp_path / "w" / "clips-%06d.tar")
    (tmp_path / "w").mkdir()
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for number in range(5):
            about = {"speaker": f"s{number}"}
            content = sine(tmp_path, 200.0 + number)
            writer.write({"__key__": f"{number:04d}", "wav": content, "txt": f"text {number}", "json": about})
    found = read_manifest(tmp_path / "w" / "clips-{000000..000002}.tar")
    assert found.problems == []
    assert [(clip.text, clip.labels["speaker"]) for clip in found.clips] == [(f"text {n}", f"s{n}") for n in range(5)]
    tokenizer = tokens(tmp_path / "w", tmp_path / "out")
    assert tokenizer.num_encoded == 5
    assert tokens(tmp_path / "w", tmp_path / "out").num_encoded == 0, "prepared already"
