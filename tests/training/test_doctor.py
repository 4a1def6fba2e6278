"""The doctor: a clean corpus is fine throughout, and every fault changes its own verdict and no other."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torchaudio.functional import resample

from hybridlm import cli_training
from hybridlm.adapter import LoraConfig, add_lora, save_adapter
from hybridlm.checkpoint import Checkpoint, load_model
from hybridlm.model import HybridLM
from sampling.pipeline import AudioModel
from tests.support.command import Command, runner
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_text
from tests.support.toy_corpus import write_cache
from tokenizer.audio import read_audio, write_audio
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from tokenizer.text import TextTokenizer
from training.corpus import TokenCache
from training.doctor import examine_recordings, run
from training.doctor_corpus import CorpusPass, Table
from training.doctor_model import codec_verdict, latents_verdict, learning_verdict, scratch_clips, stop_verdict
from training.doctor_sound import bandwidth_hz, clipped_share
from training.manifest import Clip, iterate_clips, read_manifest
from training.task import Sample
from training.verdict import Verdict

RATE = 24_000
DATA = Path(__file__).parent.parent / "data"
WORDS = "the quick brown fox jumps over the lazy dog and how are you"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


def noise(seed: int, seconds: float = 1.2) -> Tensor:
    """(1, S): noise that falls off by 6 dB an octave, in syllables, at about -24 dB."""
    generator = torch.Generator().manual_seed(seed)
    size = int(seconds * RATE)
    spectrum = torch.fft.rfft(torch.randn(size, generator=generator))
    spectrum = spectrum / (torch.arange(len(spectrum)) + size / RATE * 300)
    x = torch.fft.irfft(spectrum, n=size)
    pace = torch.nn.functional.interpolate(torch.rand(1, 1, 12, generator=generator), size=size, mode="linear")[0, 0]
    x = x * (0.1 + pace)
    return (0.06 * x / x.square().mean().sqrt())[None]


Rows = list[dict[str, object]]


def write_clean(folder: Path, count: int = 10) -> Rows:
    """Clips of unlike noise with texts of a fitting length; two splits that share nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for n in range(count):
        write_audio(folder / f"{n}.wav", noise(n), RATE)
        split = "test" if n >= count - 3 else "train"
        text = WORDS[n : n + 18]
        rows.append({"path": f"{n}.wav", "split": split, "text": text, "speaker": f"{split}-{n % 2}"})
    return rows


def examine(folder: Path, rows: Rows, num_clips: int = 50) -> dict[str, Verdict]:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {v.name: v for v in examine_recordings(iterate_clips(folder), num_clips, RATE, tiny_text())}


def replace_audio(change: Callable[[Tensor], Tensor], *numbers: int, rate: int = RATE) -> Callable[[Path, Rows], None]:
    def fault(folder: Path, rows: Rows) -> None:
        for n in numbers:
            write_audio(folder / f"{n}.wav", change(noise(n)), rate)

    return fault


def copied(to: str, change: Callable[[Tensor], Tensor] | None = None) -> Callable[[Path, Rows], None]:
    """Clip 0 (of split train) once more at the end, in a split."""

    def fault(folder: Path, rows: Rows) -> None:
        if change is None:
            (folder / "copy.wav").write_bytes((folder / "0.wav").read_bytes())
            name = "copy.wav"
        else:
            write_audio(folder / "copy.flac", change(noise(0)), RATE)
            name = "copy.flac"
        rows.append({"path": name, "split": to, "text": "a text of its own", "speaker": f"{to}-0"})

    return fault


def edited(number: int, **values: object) -> Callable[[Path, Rows], None]:
    return lambda folder, rows: rows[number].update(values)


def broken_file(folder: Path, rows: Rows) -> None:
    (folder / "3.wav").write_bytes(b"RIFF, but nothing else")


FAULTS: dict[str, tuple[Callable[[Path, Rows], None], dict[str, str], str]] = {
    "missing file": (edited(2, path="gone.wav"), {"rows": "look"}, "1 of 10"),
    "unreadable": (broken_file, {"reading": "look"}, "1 of 10"),
    "upsampled": (
        replace_audio(lambda x: resample(resample(x, RATE, 8000), 8000, RATE), 1, 4),
        {"bandwidth": "look"},
        "2 of 10",
    ),
    "low rate": (replace_audio(lambda x: resample(x, RATE, 8000), 1, 4, rate=8000), {"sample rate": "look"}, "8 kHz"),
    "clipped": (replace_audio(lambda x: (6 * x).clamp(-0.3, 0.3), 2), {"clipping": "look"}, "1 of 10"),
    "silent": (replace_audio(torch.zeros_like, 5), {"silence": "look"}, "1 of 10 clips are silent"),
    "mostly silent": (
        replace_audio(torch.zeros_like, *range(6)),
        {"silence": "broken", "exact copies": "look"},
        "6 of 10",
    ),
    "offset": (replace_audio(lambda x: x + 0.04, 5), {"offset": "look"}, "1 of 10"),
    "uneven": (replace_audio(lambda x: 0.04 * x, 0, 1, 2), {"loudness": "look"}, "within 2"),
    "a copy": (copied("train"), {"exact copies": "look", "near copies": "look"}, "1 clips"),
    "a copy in another form": (copied("train", lambda x: 0.5 * x[:, 2400:]), {"near copies": "look"}, "1 pairs"),
    "a copy in another split and form": (
        copied("test", lambda x: 0.5 * x[:, 2400:]),
        {"near copies": "broken"},
        "1 of them in two splits",
    ),
    "a copy in another split": (
        copied("test"),
        {"same audio in two splits": "broken", "exact copies": "look", "near copies": "broken"},
        "1 of 10",
    ),
    "a text in both splits": (edited(9, text=WORDS[:18]), {"same text in two splits": "look"}, "1 of 9"),
    "a speaker in both splits": (edited(9, speaker="train-0"), {"same speaker in two splits": "look"}, "1 of 4"),
    "text too long": (edited(4, text=WORDS * 3), {"transcripts": "look"}, "1 of 10"),
    "another script": (edited(4, text="доброе утро, как дела"), {"letters": "look"}, "1 of them mostly"),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    write_clean(folder)
    return folder


def test_clean_recordings_are_fine_throughout(clean: Path) -> None:
    verdicts = examine(clean, write_clean(clean))
    assert {name: v.line() for name, v in verdicts.items() if v.level != "fine"} == {}
    assert len(verdicts) == 15
    assert all("\n" not in v.line() and v.remedy == "" for v in verdicts.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_changes_its_own_verdict_alone(tmp_path: Path, fault: str) -> None:
    rows = write_clean(tmp_path)
    make, expected, words = FAULTS[fault]
    make(tmp_path, rows)
    verdicts = examine(tmp_path, rows)
    assert {name: v.level for name, v in verdicts.items() if v.level != "fine"} == expected
    first = verdicts[next(iter(expected))]
    assert words in first.finding
    assert all(verdicts[name].remedy for name in expected)


def test_real_recordings_have_the_bandwidth_that_they_have() -> None:
    x = read_audio(DATA / "kathleen-1.opus", RATE)[0]
    assert bandwidth_hz(x, RATE) == RATE / 2
    assert bandwidth_hz(resample(resample(x, RATE, 8000), 8000, RATE), RATE) == pytest.approx(4000, rel=0.2)
    assert clipped_share(x.numpy()) == 0
    assert clipped_share((20 * x).clamp(-0.9, 0.9).numpy()) > 0.01
    slow = 0.9 * torch.sin(2 * torch.pi * 40 * torch.arange(RATE) / RATE)  # its crests are flat, but have no corners
    assert clipped_share(slow.numpy()) == 0


def test_a_sample_is_drawn_evenly_and_its_size_is_told(clean: Path) -> None:
    verdicts = examine(clean, write_clean(clean), num_clips=4)
    assert "4 clips sampled from 10" in verdicts["reading"].finding
    rows = [clip for clip in iterate_clips(clean) if isinstance(clip, Clip)]
    drawn: dict[str, int] = {}
    for seed in range(200):
        corpus = CorpusPass(3, seed=seed)
        for clip in rows:
            corpus._count(clip)
        for clip in corpus.sample:
            drawn[clip.key] = drawn.get(clip.key, 0) + 1
    assert min(drawn[clip.key] for clip in rows) > 35  # of 60 expected


def test_tables_keep_the_same_keys_of_every_split() -> None:
    table = Table(100)
    for split in ("train", "test"):
        for number in range(1000):
            table.add(str(number if split == "train" or number % 4 == 0 else -number), split, split)
    assert 25 <= len(table.seen) <= 100
    assert table.share < 0.2
    assert len(table.shared()) / table.share == pytest.approx(250, rel=0.6)


def test_memory_does_not_grow_with_the_corpus(clean: Path) -> None:
    def rows(count: int) -> Iterator[Clip | str]:
        for number in range(count):
            name = f"{number % 10}.wav"
            text = f"some words of row {number}"
            yield Clip(path=clean / name, key=f"{name}#{number}", text=text, start=number, end=number + 2.0)

    peaks = []
    for count in (300, 1200):
        tracemalloc.start()
        corpus = CorpusPass(20, table_size=50)
        corpus.read(rows(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert corpus.num_clips == count
        assert "sample of" in corpus.verdicts()[1].finding
    assert peaks[1] < 1.2 * peaks[0]


# With a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def found(model: Path) -> Checkpoint:
    return load_model(model)


@pytest.fixture
def cache(corpus: dict[str, str]) -> TokenCache:
    return TokenCache(Path(corpus["cache"]))


def test_latents_unlike_the_models_are_told(found: Checkpoint, cache: TokenCache) -> None:
    latents = torch.cat([cache[i].latents for i in range(len(cache))])
    found.model.statistics.set(latent_mean=latents.mean(dim=0), latent_std=latents.std(dim=0))
    assert latents_verdict(found, cache).level == "fine"
    assert latents_verdict(found, cache).figures["shift"] < 0.01
    found.model.statistics.set(latent_mean=latents.mean(dim=0) + 2 * latents.std(dim=0))
    assert latents_verdict(found, cache).figures["shift"] == pytest.approx(2, abs=0.1)
    assert latents_verdict(found, cache).level == "look"
    found.model.statistics.set(latent_mean=latents.mean(dim=0), latent_std=2 * latents.std(dim=0))
    assert latents_verdict(found, cache).level == "look"


def test_one_batch_is_learned_and_the_weights_come_back(found: Checkpoint, cache: TokenCache) -> None:
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    verdict = learning_verdict(found, cache, steps=8)
    assert verdict.level == "fine"
    assert verdict.figures["losses"][0] > verdict.figures["losses"][-1] + 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.model.state_dict().items())
    assert not found.model.training
    assert all(p.grad is None and p.requires_grad for p in found.model.parameters())


def test_a_model_that_cannot_learn_is_told(
    found: Checkpoint, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        assert learning_verdict(found, cache, steps=2).level == "broken"
    with torch.no_grad():
        found.model.stop.weight.fill_(float("nan"))
    verdict = learning_verdict(found, cache)
    assert verdict.level == "broken"
    assert stop_verdict(found, cache).level == "broken"


@pytest.mark.parametrize("bias", [-7.0, 2.0])
def test_a_stop_at_the_wrong_time_is_told(tmp_path: Path, cache: TokenCache, bias: float) -> None:
    verdict = stop_verdict(load_model(save_tiny_model(tmp_path / "m", stop_bias=bias)), cache)
    assert verdict.level == "look"
    chance = 1 / (1 + torch.tensor(-bias).exp().item())
    assert verdict.figures["at_the_end"] == pytest.approx(chance, rel=0.05, abs=1e-6)
    states = sum(cache.num_frames(i) + 1 for i in range(len(cache)))
    assert verdict.figures["foreseen"] == pytest.approx(chance * states, rel=0.05)
    assert verdict.figures["early"] == (len(cache) if bias > 0 else 0)


def test_a_codec_that_loses_too_much_is_told(found: Checkpoint, corpus: dict[str, str]) -> None:
    clips = scratch_clips(read_manifest(Path(corpus["clips"])).clips, 3, 5.0)
    verdict = codec_verdict(found, clips)  # random weights
    assert verdict.level == "look"
    assert verdict.figures["mel_distance"] > 0.5


def make_adapter(model: Path, folder: Path, std: float) -> Path:
    found = load_model(model)
    add_lora(found.model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=torch.Generator().manual_seed(0))
    assert found.base is not None
    save_adapter(folder, found.model, found.base, card="")
    return folder


def brief(model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer) -> list[Sample]:
    made = AudioModel(model, tokenizer, text).generate(tags=["music"], duration=0.2, seed=3)
    return [Sample(name="music", waveform=made.row(0)[0], sample_rate_hz=made.sample_rate_hz)]


def test_an_adapter_that_changes_nothing_is_broken_and_the_status_says_so(
    command: Command, model: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_training, "_sound", brief)
    examine(clean, write_clean(clean))
    still, moving = make_adapter(model, tmp_path / "still", 0.0), make_adapter(model, tmp_path / "moving", 0.3)
    figures = tmp_path / "figures.json"
    words = ("--data", clean, "--device", "cpu", "--clips", 3)
    done = command("doctor", "--model", model, "--adapter", still, "--json", figures, *words)
    assert done.status == 1
    assert "broken  adapter: it changes nothing" in done.out
    report = json.loads(figures.read_text())
    assert report["verdict"] == "broken"
    assert [check["name"] for check in report["checks"] if check["level"] == "broken"] == ["adapter"]
    assert len(done.out.splitlines()) == len(report["checks"]) == 20
    done = command("doctor", "--model", moving, *words)
    assert done.status == 0
    assert "music at a fixed seed: differs from" in done.out


def test_a_good_corpus_with_a_good_model_is_fine_throughout(tmp_path: Path) -> None:
    texts = {entry["path"]: entry for entry in map(json.loads, (DATA / "manifest.jsonl").read_text().splitlines())}
    for name in ("kathleen-1", "kathleen-2"):
        write_audio(tmp_path / f"{name}.wav", read_audio(DATA / f"{name}.opus", RATE), RATE)
        (tmp_path / f"{name}.txt").write_text(texts[f"{name}.opus"]["text"])
    text = io.StringIO()
    verdicts = run(tmp_path, console=Console(file=text, width=300))
    assert {v.name: v.line() for v in verdicts if v.level != "fine"} == {}
    assert {"latents", "codec", "one batch", "stop"} <= {v.name for v in verdicts}
    assert len(text.getvalue().splitlines()) == len(verdicts)


def test_what_cannot_be_examined_is_one_line(corpus: dict[str, str], model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        run(tmp_path / "none", model)
    with pytest.raises(UserError, match="is a cache; give the recordings"):
        run(Path(corpus["cache"]), model)
    with pytest.raises(UserError, match="--clips 0 must be at least 1"):
        run(Path(corpus["clips"]), model, num_clips=0)
    (tmp_path / "empty").mkdir()
    verdicts = run(tmp_path / "empty", model, console=Console(file=io.StringIO()))
    assert [v.name for v in verdicts if v.level == "broken"] == ["reading"]
