import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import training.prepare
from hybridlm.checkpoint import open_text
from tests.support.recordings import RATE, SILENT, BlockTokenizer, sines, tokens, write_corpus, write_sine
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.torn_writing import STREAMS, assert_all_comes_back, cut
from tests.support.toy_corpus import write_clips
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.text import TextTokenizer
from training.corpus import PcmCache, TokenCache, Window, prepare, prepare_audio
from training.layouts import Stream
from training.processes import Processes
from training.shards import ShardWriter


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_frames_are_the_tokenizer_s_own(tmp_path: Path) -> None:
    entries = [
        {"path": "a.wav", "duration": 0.5, "text": "one", "tags": ["speech"], "speaker": "ann", "split": "train"},
        {"path": "b.wav", "duration": 0.123},
    ]
    source = write_corpus(tmp_path / "in", entries)
    tokenizer = tokens(source, tmp_path / "out", BlockTokenizer(feature_dim=3), latent_dtype="float32")
    cache = TokenCache(tmp_path / "out", tokenizer=tokenizer)
    assert len(cache) == 2
    assert (cache.num_codebooks, cache.codebook_size, cache.latent_dim, cache.feature_dim) == (2, 300, 4, 3)
    assert cache.duration_s == pytest.approx(0.5 + 0.13)
    for number, entry in enumerate(entries):
        wanted = tokenizer.encode(read_audio(tmp_path / "in" / entry["path"], RATE)[None])
        found = cache[number]
        assert torch.equal(found.codes, wanted.codes[0])
        assert torch.equal(found.latents, wanted.latents[0])
        assert torch.equal(found.features, wanted.features[0])
        assert found.key == entry["path"]
    first, second = cache[0], cache[1]
    assert (first.text, first.tags, first.labels, first.split) == ("one", ("speech",), {"speaker": "ann"}, "train")
    assert (second.text, second.tags, second.labels, second.split) == (None, (), {}, None)
    part = cache.read(Window(0, 10, 5))
    assert torch.equal(part.codes, first.codes[:, 10:15])
    assert torch.equal(part.latents, first.latents[10:15])
    batch = cache.frames([second, part])
    assert batch.lengths.tolist() == [13, 5]
    assert batch.codes.shape == (2, 2, 13)
    assert torch.equal(batch.latents[1, :5], part.latents)
    assert not batch.latents[1, 5:].any()
    assert torch.equal(batch.features[0], second.features)
    with pytest.raises(IndexError):
        cache[2]


def test_half_precision_latents_and_parts_of_a_file(tmp_path: Path) -> None:
    write_sine(tmp_path / "in" / "a.wav", 1.0)
    write_corpus(tmp_path / "in", [{"path": "a.wav", "start": 0.25, "end": 0.5}])
    tokenizer = tokens(tmp_path / "in", tmp_path / "out", BlockTokenizer(feature_dim=3), features=False)
    cache = TokenCache(tmp_path / "out")
    wanted = tokenizer.encode(read_audio(tmp_path / "in" / "a.wav", RATE, 0.25, 0.25)[None])
    assert cache.num_frames(0) == 25
    assert cache.feature_dim == 0
    torch.testing.assert_close(cache[0].latents, wanted.latents[0], atol=1e-3, rtol=0)
    assert cache[0].latents.dtype == torch.float32


def test_long_clips_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.prepare, "_PIECE_S", 0.1234)
    source = sines(tmp_path / "in", [1.009])
    tokenizer = tokens(source, tmp_path / "out", latent_dtype="float32")
    assert tokenizer.longest < 0.3 * RATE, "no more than two pieces at once"
    whole = tokenizer.encode(read_audio(tmp_path / "in" / "0.wav", RATE)[None])
    found = TokenCache(tmp_path / "out")[0]
    assert torch.equal(found.codes, whole.codes[0])
    assert torch.equal(found.latents, whole.latents[0])


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(tmp_path: Path, workers: int) -> None:
    source = sines(tmp_path / "in", [0.1, 0.5, 0.02, 0.3, 0.2, 0.4, 0.1, 0.25])
    tokens(source, tmp_path / "one", workers=1)
    tokens(source, tmp_path / "other", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_finished_clips_are_not_redone_and_changed_ones_are(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1, 0.2, 0.3], text="old")
    tokens(source, tmp_path / "out")
    again = tokens(source, tmp_path / "out")
    assert again.num_encoded == 0
    write_sine(tmp_path / "in" / "1.wav", 0.05, hz=700.0)
    source.write_text(source.read_text().replace("old", "new").replace('"0.wav"', '"3.wav"'))
    write_sine(tmp_path / "in" / "3.wav", 0.4)
    changed = tokens(source, tmp_path / "out")
    assert changed.num_encoded == 2
    cache = TokenCache(tmp_path / "out")
    assert [(cache[i].key, cache[i].text) for i in range(3)] == [("3.wav", "new"), ("1.wav", "new"), ("2.wav", "new")]
    assert [cache.num_frames(i) for i in range(3)] == [40, 5, 30]
    wanted = changed.encode(read_audio(tmp_path / "in" / "1.wav", RATE)[None])
    assert torch.equal(cache[1].codes, wanted.codes[0])


def test_clip_that_went_bad_leaves_the_index(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1, 0.2])
    tokens(source, tmp_path / "out")
    (tmp_path / "in" / "0.wav").write_text("no audio")
    tokens(source, tmp_path / "out")
    cache = TokenCache(tmp_path / "out")
    assert [cache[i].key for i in range(len(cache))] == ["1.wav"]


@pytest.mark.parametrize("layout", ["rows", "tar"])
def test_killed_run_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path, layout: str) -> None:
    source = sines(tmp_path / "in", [0.1, 0.3, 0.2, 0.4, 0.1])
    tokens(source, tmp_path / "whole", layout=layout)
    script = textwrap.dedent(
        f"""
        import os, signal
        from tests.support.recordings import BlockTokenizer
        from training.corpus import prepare
        from training.shards import ShardWriter

        append = ShardWriter.append
        def killed(self, key, *values):
            if key == "3.wav":  # half of a clip's rows are out when the power goes
                self._files[0].write(b"torn rows")
                self._files[0].flush()
                self._log.write(b'{{"key": "3.w')
                self._log.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, key, *values)
        ShardWriter.append = killed
        prepare({str(source)!r}, {str(tmp_path / "cut")!r}, BlockTokenizer(), layout={layout!r})
        """
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    with pytest.raises(UserError, match=r"is not complete \(it has no clips.jsonl\)"):
        TokenCache(tmp_path / "cut")
    assert tokens(source, tmp_path / "cut", layout=layout).num_encoded == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_bad_files_are_counted_told_and_skipped(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1, 0.2])
    (tmp_path / "in" / "bad.wav").write_text("no audio")
    source.write_text(source.read_text() + '{"path": "bad.wav"}\n{"path": "gone.wav"}\n{"path": "0.wav", "start": 9}\n')
    said = io.StringIO()
    report = prepare(source, tmp_path / "out", BlockTokenizer(), console=Console(file=said, width=400))
    assert (report.num_clips, report.num_written) == (2, 2)
    assert report.seconds == pytest.approx(0.3)
    assert len(report.problems) == 3
    assert (tmp_path / "out" / "problems.txt").read_text().splitlines() == report.problems
    for message in ("gone.wav", "bad.wav is not audio", "start=9.0 lies past its end", "3 clips skipped", "2 clips"):
        assert message in said.getvalue()
    assert len(TokenCache(tmp_path / "out")) == 2


def test_only_bad_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"has no usable clip \(1 problems, the first: .*bad.wav is not audio"):
        prepare(tmp_path, tmp_path / "out", BlockTokenizer(), console=SILENT)


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1])
    tokens(source, tmp_path / "out", BlockTokenizer("aaaa"))
    with pytest.raises(UserError, match="tokenizer=block aaaa, but block bbbb is asked for"):
        tokens(source, tmp_path / "out", BlockTokenizer("bbbb"))
    with pytest.raises(UserError, match="made by tokenizer block aaaa, but block bbbb is asked for"):
        TokenCache(tmp_path / "out", tokenizer=BlockTokenizer("bbbb"))
    tokens(source, tmp_path / "other", BlockTokenizer("bbbb"))
    with pytest.raises(UserError, match="made by tokenizer block bbbb, but block aaaa"):
        TokenCache([tmp_path / "out", tmp_path / "other"])


def test_folders_that_are_no_such_cache(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1])
    with pytest.raises(UserError, match="is not a prepared cache"):
        TokenCache(tmp_path / "in")
    prepare_audio(source, tmp_path / "audio", sample_rate_hz=RATE, console=SILENT)
    with pytest.raises(UserError, match="is a cache of audio, but must be one of tokens"):
        TokenCache(tmp_path / "audio")
    (tmp_path / "audio" / "meta.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format_version=99, but must be 1"):
        PcmCache(tmp_path / "audio")
    (tmp_path / "audio" / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta.json is damaged"):
        PcmCache(tmp_path / "audio")
    with pytest.raises(UserError, match="cannot be written"):
        tokens(source, tmp_path / "in" / "0.wav" / "out")


def test_two_writers_are_refused(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1])
    streams = {"codes": Stream(dtype="uint16", width=1)}
    with (
        ShardWriter(tmp_path / "out", kind="tokens", streams=streams, about={}),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        tokens(source, tmp_path / "out")


@pytest.mark.parametrize("layout", ["rows", "tar"])
def test_full_disk_keeps_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    source = sines(tmp_path / "in", [0.1, 0.2, 0.3])
    append = ShardWriter.append

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    def full(self: ShardWriter, key: str, *values: Any) -> None:
        if key == "2.wav":
            self._files[-1] = Full()
        append(self, key, *values)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", full)
        with pytest.raises(UserError, match="No space left on device; what is complete stays"):
            tokens(source, tmp_path / "out", layout=layout)
    assert tokens(source, tmp_path / "out", layout=layout).num_encoded == 1
    tokens(source, tmp_path / "whole", layout=layout)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), stop=st.integers(0, 12), torn=st.integers(0, 40))
def test_shards_give_back_what_went_in_wherever_writing_was_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], stop: int, torn: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")

    def tear() -> None:  # rows of one stream got out, those of the other are lost
        for path in sorted(folder.glob("*.a.bin"))[-1:]:
            path.write_bytes(path.read_bytes() + b"x" * torn)
        cut(list(folder.glob("*.b.bin")), torn)

    assert_all_comes_back(folder, lengths, stop, tear, max_rows=10)
    for path in folder.glob("*.a.bin"):
        assert path.stat().st_size <= 10 * STREAMS["a"].row_bytes


def test_cut_shard_is_told(tmp_path: Path) -> None:
    tokens(sines(tmp_path / "in", [0.1]), tmp_path / "out")
    cache = TokenCache(tmp_path / "out")
    (tmp_path / "out" / "00000.codes.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(UserError, match=r"codes\.bin is cut short"):
        cache[0]
    (tmp_path / "out" / "00000.codes.bin").unlink()
    with pytest.raises(UserError, match=r"codes\.bin is missing"):
        TokenCache(tmp_path / "out")[0]


def test_index_is_one_json_line_a_clip(tmp_path: Path) -> None:
    tokens(sines(tmp_path / "in", [0.1, 0.2], text="größe\n2"), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "clips.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines] == ["größe\n2"] * 2


class Alone(Processes):
    """One of two processes, the other of which has died."""

    def gather(self, item: Any) -> list[Any]:
        return [item]


def test_what_one_of_two_processes_wrote_is_taken_over_by_any_number(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1, 0.2, 0.3, 0.4, 0.5])
    half = tokens(source, tmp_path / "out", processes=Alone(1, 2))
    assert half.num_encoded == 2
    assert not (tmp_path / "out" / "clips.jsonl").exists(), "the first process writes the index"
    log = tmp_path / "out" / "written.1.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    assert tokens(source, tmp_path / "out").num_encoded == 4, "all but the one whose line is whole"
    found, wanted = TokenCache(tmp_path / "out"), tokens(source, tmp_path / "one")
    one = TokenCache(tmp_path / "one", tokenizer=wanted)
    assert [found[i].key for i in range(5)] == [one[i].key for i in range(5)]
    assert all(torch.equal(found[i].latents, one[i].latents) for i in range(5))
    write_sine(tmp_path / "in" / "1.wav", 0.07, hz=900.0)
    assert tokens(source, tmp_path / "out", processes=Alone(1, 2)).num_encoded == 1, "changed since"
    assert tokens(source, tmp_path / "out").num_encoded == 0
    assert [TokenCache(tmp_path / "out").num_frames(i) for i in range(5)] == [10, 7, 30, 40, 50]


def test_two_processes_make_the_cache_of_one(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "clips", 5)
    (tmp_path / "clips" / "1.wav").write_text("no audio")
    (tmp_path / "clips" / "2.wav").unlink()
    tiny_tokenizer().save(tmp_path / "tokenizer")
    options = ["prepare", str(manifest), "--output", str(tmp_path / "two"), "--tokenizer", str(tmp_path / "tokenizer")]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(2):
        about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        about |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "hybridlm", *options]
        started.append(subprocess.Popen(command, env={**os.environ, **about}, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert "two: 3 clips, 3 of them new" in told[0] and "2 clips skipped" in told[0]
    assert "clips" not in told[1], "the first process speaks for both"
    prepare(manifest, tmp_path / "one", tmp_path / "tokenizer", console=SILENT)
    one, two = TokenCache(tmp_path / "one"), TokenCache(tmp_path / "two")
    assert [two[i].key for i in range(3)] == ["0.wav", "3.wav", "4.wav"] == [one[i].key for i in range(3)]
    assert all(torch.equal(one[i].latents, two[i].latents) for i in range(3))
    shards = {int(two.index.shard[i]) for i in range(3)}
    assert len(shards) == 2, "both had a part"
    assert (tmp_path / "two/problems.txt").read_text() == (tmp_path / "one/problems.txt").read_text()


def test_more_processes_than_clips_end_in_one_line(tmp_path: Path) -> None:
    source = sines(tmp_path / "in", [0.1])
    with pytest.raises(UserError, match="1 clips are too few for 2 processes; start at most 1"):
        tokens(source, tmp_path / "out", processes=Alone(0, 2))
    with pytest.raises(UserError, match="1 clips are too few for 20 processes"):
        tokens(source, tmp_path / "out", processes=Alone(0, 20))
    assert not (tmp_path / "out").exists()


def test_letters_of_another_script_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"path": "a.wav", "duration": 0.1, "text": "good morning"}]
    entries.append({"path": "b.wav", "duration": 0.1, "text": "доброе утро"})
    source = write_corpus(tmp_path / "in", entries)
    text = TextTokenizer.train(["good morning"], tmp_path / "text.model", vocab_size=300, tags=[])
    report = prepare(source, tmp_path / "out", BlockTokenizer(), text=text)
    assert report.letters is not None
    assert (report.letters.num_texts, report.letters.num_partly_unknown, report.letters.num_foreign) == (2, 1, 1)
    assert "1 of 2 texts have letters that the model's text pieces do not know (CYRILLIC 10)" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out", BlockTokenizer(), console=SILENT).letters is None
    assert open_text("encodec") is None
    box = open_text("log-mel:box")
    assert box is not None and box.letters("доброе утро")[1]
