"""Drift of continuations: one step from the truth against free running, and figures whose values are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import drift
from benchmarks.drift_measure import (
    CODEC,
    FREE,
    MEL_DISTANCE,
    REAL,
    TEACHER,
    Continuation,
    Span,
    forced_continuations,
    measure,
    teacher_forced,
)
from benchmarks.drift_report import MEASURES, SIGNED, Variant, cell, figures, slopes
from sampling.assemble import GeneratedAudio
from sampling.controls import Controls
from sampling.pipeline import AudioModel
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_model, tiny_tokenizer
from tokenizer.audio import write_audio
from tokenizer.frames import AudioFrames
from tokenizer.metrics import codes_bitrate, level_db, mel_distance

RATE, HOP = 24_000, 960
WHISPER_GPT: dict[str, Any] = {
    **{"continuous_input": "features", "fusion": "concat", "num_input_codebooks": 1, "num_output_codebooks": 1},
    **{"slice_layers": 1, "slice_dim": 16, "slice_heads": 2, "slice_ffn_dim": 24},
}
SPAN = Span(window=5, before=2, after=4)


def talk(number: int, seconds: float = 1.5) -> Tensor:
    """(1, S)"""
    time = torch.arange(round(seconds * RATE)) / RATE
    generator = torch.Generator().manual_seed(number)
    tone = 0.3 * torch.sin(2 * math.pi * (150 + 60 * number) * time) * (0.6 + 0.4 * torch.sin(2 * math.pi * 3 * time))
    return (tone + 0.02 * torch.randn(time.shape, generator=generator))[None]


def maker(kind: str) -> AudioModel:
    if kind == "whisper-gpt":
        return tiny_model("discrete", tokenizer=tiny_tokenizer().with_log_mel(num_mels=12), **WHISPER_GPT)
    return tiny_model(kind)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips that are long enough, of which four in the set `tone`, a short one, and one of another split."""
    folder, lines = tmp_path_factory.mktemp("corpus"), []
    for number in range(7):
        write_audio(folder / f"{number}.wav", talk(number, 0.5 if number == 5 else 1.5), RATE)
        split, label = ("train" if number == 6 else "test"), ("other" if number == 4 else "tone")
        lines.append(json.dumps({"path": f"{number}.wav", "split": split, "set": label}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predicts the coarsest codes, but reads all."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "coarse", "discrete", num_output_codebooks=1)


def words(manifest: Path, *more: object) -> list[str]:
    span = ["--prompt", 0.4, "--continue", 0.8, "--window", 0.2, "--seeds", 2, "--where", "set=tone"]
    return [str(word) for word in ["--data", manifest, *span, *more]]


def run(models: list[str], manifest: Path, output: Path, *more: object) -> dict[str, Any]:
    assert drift.main([*models, *words(manifest, *more, "--json", output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("kind", ["hybrid", "continuous", "discrete", "whisper-gpt"])
def test_forced_along_its_own_continuation_a_model_draws_that_continuation(kind: str) -> None:
    """Each step has the state and the random numbers of free running: where the past is the same, so is the frame."""
    model, controls = maker(kind), Controls()
    made = model.generate(audio=talk(0, 0.4), duration=0.8, seed=7)
    heard = model.tokenizer.encode(made.waveform).features
    before = model.requests.encode(talk(0, 0.4)).features
    own = AudioFrames(
        codes=model.tokenizer.quantize(made.frames.latents) if kind == "continuous" else made.frames.codes,
        latents=made.frames.latents,
        lengths=made.frames.lengths,
        features=None if heard is None else torch.cat([before, heard[:, 10:]], dim=1),
    )
    drawn = teacher_forced(model, own, 10, [7, 8], controls)
    if drawn.codes is not None:
        assert torch.equal(drawn.codes[0], made.frames.codes[0, :, 10:])
        assert not torch.equal(drawn.codes[1], drawn.codes[0])
    if drawn.latents is not None:
        torch.testing.assert_close(drawn.latents[0], made.frames.latents[0, 10:], atol=1e-4, rtol=0)

    real = model.tokenizer.encode(talk(0, 1.2)[None])
    first = teacher_forced(model, real, 10, [7], controls)
    found, expected = (first.latents, drawn.latents) if drawn.codes is None else (first.codes.mT, drawn.codes.mT)
    torch.testing.assert_close(found[0, 0], expected[0, 0], atol=1e-4, rtol=0)
    assert not torch.equal(found[0, 1:], expected[0, 1:]), "the real past is another"


def test_forced_a_model_reads_the_real_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = maker("whisper-gpt"), []
    step = model.model.step

    def spy(codes: Any, latents: Any, features: Any, cache: Any) -> Any:
        read.append(features)
        return step(codes, latents, features, cache)

    monkeypatch.setattr(model.model, "step", spy)
    real = model.tokenizer.encode(talk(0, 1.2)[None])
    teacher_forced(model, real, 10, [7, 8], Controls())
    assert torch.equal(torch.cat(read, dim=1), real.features[:, 10:].expand(2, -1, -1))


def test_a_model_of_the_coarsest_codes_is_decoded_from_these_and_so_is_the_codec() -> None:
    model, waveform = maker("whisper-gpt"), talk(0, 1.2)
    frames = model.tokenizer.encode(waveform[None])
    made = forced_continuations(model, frames, SPAN, [1, 2], Controls())
    expected = model.tokenizer.decode_codes(frames.codes[:, :1])[0, :, 10 * HOP :]
    torch.testing.assert_close(made[CODEC].waveform, expected, atol=1e-6, rtol=0)
    assert made[CODEC].codes.shape == (1, 1, 20) and made[CODEC].latents is None
    assert made[TEACHER].codes.shape == (2, 1, 20) and made[TEACHER].waveform.shape == (2, 20 * HOP)
    past = frames.codes[:, :1, :10].expand(2, -1, -1)
    sound = model.tokenizer.decode_codes(torch.cat([past, made[TEACHER].codes], dim=2))[:, 0, 10 * HOP :]
    torch.testing.assert_close(made[TEACHER].waveform, sound, atol=1e-6, rtol=0)
    values, _ = measure(model, waveform, frames, SPAN, made)
    entropies = [
        codes_bitrate([codes], 32, 1.0).entropy_bits_per_second for codes in frames.codes[0, :1].split(5, dim=1)
    ]
    found = values[REAL]["code_entropy_bits"][0] + sum(entropies[:2]) / 2
    assert found.tolist() == pytest.approx(entropies[2:]), "of the coarsest codes alone"


def test_what_is_measured() -> None:
    """A copy is at no distance, and has the real one's figures; a louder copy is so much louder, window by window."""
    model, waveform = maker("hybrid"), talk(1, 1.2)
    frames = model.tokenizer.encode(waveform[None])
    real = waveform[:, 10 * HOP :]
    own = {"codes": frames.codes[:, :, 10:], "latents": frames.latents[:, 10:]}
    decibels = torch.tensor([0.0, 1.0, 2.0, 3.0])
    louder = real * (10 ** (decibels / 20)).repeat_interleave(5 * HOP)
    other = {
        "codes": own["codes"].clone(),
        "latents": own["latents"] * torch.arange(1, 5).repeat_interleave(5)[:, None],
    }
    other["codes"][..., :5], other["codes"][..., 5:10] = 3, torch.arange(5)
    copies = {"copy": Continuation(waveform=real, **own), "louder": Continuation(waveform=louder, **own)}
    copies["other frames"] = Continuation(waveform=real, **other)
    values, prompt = measure(model, waveform, frames, SPAN, copies)
    assert bool((values["copy"][MEL_DISTANCE] == 0).all())
    assert list(values["copy"]) == [*list(values[REAL])] and set(values[REAL]) == set(MEASURES)
    for name in values[REAL]:
        assert torch.equal(values["copy"][name], values[REAL][name]), name
        changed = {MEL_DISTANCE, "log_mel_mean", "loudness_db"}
        assert name in changed or torch.allclose(values["louder"][name], values[REAL][name], atol=1e-2), name
    torch.testing.assert_close(
        (values["louder"]["loudness_db"] - values[REAL]["loudness_db"])[0].float(), decibels, atol=1e-4, rtol=0
    )
    found = {name: values["other frames"][name][0] for name in ("code_entropy_bits", "latent_norm")}
    assert (found["code_entropy_bits"][:2] + prompt.code_entropy_bits).tolist() == pytest.approx([0, math.log2(5)])
    lengths = [math.sqrt(8) * times for times in (1, 2, 3, 4)]  # of the tiny tokenizer's latents, which are normalized
    assert (found["latent_norm"] + prompt.latent_norm).tolist() == pytest.approx(lengths, rel=1e-4)
    parts = [level_db(part) for part in waveform[0, : 10 * HOP].split(5 * HOP)]
    assert prompt.loudness_db == pytest.approx(sum(parts) / 2)
    third = waveform[0, 20 * HOP : 25 * HOP]
    assert values[REAL]["loudness_db"][0, 2] == pytest.approx(level_db(third) - sum(parts) / 2)
    expected = mel_distance(third, louder[0, 10 * HOP : 15 * HOP], RATE)
    assert values["louder"][MEL_DISTANCE][0, 2] == pytest.approx(expected)


def test_the_report(
    hybrid: Path, coarse: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--markdown", tmp_path / "a.md", "--picture", tmp_path / "a.png"]
    report = run([f"all={hybrid}", f"coarse={coarse}"], manifest, tmp_path / "a.json", "--clips", 3, *files)
    assert report["clips"] == ["0.wav", "1.wav", "2.wav"]
    text, said = (tmp_path / "a.md").read_text(), capsys.readouterr().out
    assert text in said and "`python -m benchmarks.drift all=" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    both, first = report["models"]["all"], report["models"]["coarse"]
    assert "codebooks 2 to 3, which it does not predict" in first["cannot_run"] and both["cannot_run"] is None
    assert "decoded from 1 of 3 codebooks" in text and "teacher-forced only: this model reads codebooks" in text
    assert FREE in both and FREE not in first
    assert "latent_norm" in both[FREE] and "latent_norm" not in first[TEACHER]
    assert torch.tensor(report["values"]["all"][FREE]["loudness_db"]).shape == (1, 2, 3, 4)
    for name in MEASURES:
        assert len(both[FREE][name]["windows"]) == 4 and both[FREE][name]["mean"]["value"] >= 0
        if name not in (MEL_DISTANCE, "latent_norm"):
            assert both[REAL][name]["mean"]["value"] == pytest.approx(1.0), "the unit is what real audio does"
    norms = torch.tensor(report["values"]["all"][FREE]["latent_norm"]).abs().mean().item()
    assert both["units"]["latent_norm"] == pytest.approx(0.01 * math.sqrt(8), rel=1e-3)  # normalized latents
    assert both[FREE]["latent_norm"]["mean"]["value"] == pytest.approx(norms / both["units"]["latent_norm"], rel=1e-3)
    assert "| all, free-running |" in text and "| coarse, teacher-forced |" in text and "\n| real | " in text
    pairs = {(line["of"], line["minus"]) for line in report["differences"]}
    assert pairs == {("all, free-running", "all, teacher-forced"), ("coarse, teacher-forced", "all, teacher-forced")}


def test_a_model_whose_continuation_grows_louder(
    hybrid: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run([f"m={hybrid}"], manifest, tmp_path / "a.json", "--clips", 2)
    generate = AudioModel.generate

    def louder(self: AudioModel, *args: Any, **kwargs: Any) -> GeneratedAudio:
        made = generate(self, *args, **kwargs)
        decibels = torch.arange(-2, 4).clamp(min=0)  # two windows of prompt, then 0, 1, 2 and 3 dB
        made.waveform.mul_((10 ** (decibels / 20)).repeat_interleave(5 * HOP))
        return made

    monkeypatch.setattr(AudioModel, "generate", louder)
    broken = run([f"m={hybrid}"], manifest, tmp_path / "b.json", "--clips", 2)
    values = [torch.tensor(report["values"]["m"][FREE]["loudness_db"]) for report in (plain, broken)]
    torch.testing.assert_close((values[1] - values[0])[0, 1, 0], torch.arange(4.0), atol=1e-4, rtol=0)
    of = [report["models"]["m"] for report in (plain, broken)]
    drifts = [model[FREE]["loudness_db"]["signed_slope"]["value"] for model in of]
    assert drifts[1] - drifts[0] == pytest.approx(50.0, abs=1e-2)  # a decibel in 0.2 s, per 10 s
    assert of[1][TEACHER] == of[0][TEACHER] and of[1][CODEC] == of[0][CODEC]
    assert of[1][FREE]["code_entropy_bits"] == of[0][FREE]["code_entropy_bits"]


def test_what_is_drawn_depends_on_the_seed_and_the_clip_alone(hybrid: Path, manifest: Path, tmp_path: Path) -> None:
    four = run([f"m={hybrid}"], manifest, tmp_path / "a.json", "--clips", 9)
    two = run([f"m={hybrid}"], manifest, tmp_path / "b.json", "--clips", 2, "--seeds", 1)
    assert four["clips"] == ["0.wav", "1.wav", "2.wav", "3.wav"] and two["clips"] == ["0.wav", "2.wav"]
    other = run([f"m={hybrid}"], manifest, tmp_path / "c.json", "--clips", 2, "--seeds", 1, "--seed", 1)
    for kind in (FREE, TEACHER):
        found = [torch.tensor(report["values"]["m"][kind]["loudness_db"]) for report in (four, two, other)]
        torch.testing.assert_close(found[1][0, 0], found[0][0, 0, ::2], atol=1e-3, rtol=0)
        assert (found[0][0, 1] - found[0][0, 0]).abs().min() > 1e-3, "another sample is drawn"
        assert (found[2] - found[1]).abs().min() > 1e-3, "another seed draws another"
        assert (found[0][0, 0, 0] - found[0][0, 0, 1]).abs().min() > 1e-3


def test_models_of_several_seeds_are_the_rows(hybrid: Path, manifest: Path, tmp_path: Path) -> None:
    again = save_tiny_model(tmp_path / "again")
    weights = again / "model.safetensors"
    assert weights.read_bytes() == (hybrid / "model.safetensors").read_bytes()
    report = run([f"m={hybrid},{again}"], manifest, tmp_path / "a.json", "--clips", 2)
    found = report["models"]["m"][FREE]["loudness_db"]["mean"]["per_seed"]
    assert len(found) == 2 and found[0] == pytest.approx(found[1])
    assert torch.tensor(report["values"]["m"][FREE]["loudness_db"]).shape == (2, 2, 2, 4)


def variant(name: str, free: Tensor, real: Tensor) -> Variant:
    """Measured in loudness alone."""
    values = {REAL: {"loudness_db": real}, TEACHER: {"loudness_db": free / 2}, FREE: {"loudness_db": free}}
    return Variant(name=name, about={}, values=values, prompt_norms=None)


def test_figures_of_known_values() -> None:
    """Of two models, two samples each, three clips and two windows of a second."""
    real = torch.tensor([[[[1.0, -3.0], [2.0, 2.0], [-1.0, 3.0]]]], dtype=torch.float64)  # mean size 2
    free = torch.tensor([[6.0, -6.0], [2.0, 2.0]], dtype=torch.float64)[:, :, None, None] + torch.zeros(2, 2, 3, 2)
    free[..., 1] *= 2
    one, other = variant("one", free, real), variant("other", 3 * free, real)
    found = figures([one, other], window_s=1.0)
    loudness = found["models"]["one"][FREE]["loudness_db"]
    assert found["models"]["one"]["units"] == {"loudness_db": 2.0}
    assert [window["per_seed"] for window in loudness["windows"]] == [[3.0, 1.0], [6.0, 2.0]]
    assert loudness["mean"]["value"] == 3.0 and loudness["mean"]["interval"] == [1.5, 4.5]
    assert loudness["slope"]["per_seed"] == [30.0, 10.0], "per 10 s"
    assert loudness["signed_mean"]["per_seed"] == [0.0, 3.0], "samples on both sides cancel, distances don't"
    lines = {(line["of"], line["minus"]): line["mean"] for line in found["differences"]}
    assert list(lines)[-1] == ("other, teacher-forced", "one, teacher-forced")
    between = lines["other, free-running", "one, free-running"]
    assert between["per_seed"] == pytest.approx([9.0, 3.0]) and between["value"] == pytest.approx(6.0)
    assert between["interval"] == pytest.approx([3.0, 9.0]), "seeds are drawn as pairs"
    assert lines["one, free-running", "one, teacher-forced"]["value"] == pytest.approx(1.5)


def test_slopes_and_cells() -> None:
    assert slopes(torch.tensor([[1.0, 1.5, 2.0], [4.0, 4.0, 4.0]]), 0.5).tolist() == [10.0, 0.0]
    one = slopes(torch.tensor([[1.0]]), 0.5)
    assert bool(one.isnan().all())
    assert cell({"value": 1.0, "interval": [0.5, 2.0]}, "+.1f") == "+1.0 [+0.5, +2.0]"
    assert cell({"value": float("nan"), "interval": [0.5, 2.0]}, "+.1f") == "-"
    assert set(SIGNED) < set(MEASURES)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--continue", 40], "max_frames=250; use --continue 9.6 or less"),
        (["--where", "set=rain"], "no clip of 1.2 s in split 'test'"),
        (["--where", "colour=red"], "no clip has the label 'colour'"),
        (["--where", "set"], "--where set must be LABEL=VALUE"),
        (["--continue", 2], "the longest of 5 has 1.5 s"),
        (["--window", 0.02, "--prompt", 0.4], "--window 0.02 s holds no frame"),
        (["--temperature", -1], "temperature=-1.0 must be a number"),
        (["--json", "/"], "is a folder"),
        (["--top-p", 7], "top_p=7.0 must be above 0"),
    ],
)
def test_bad_requests(
    hybrid: Path, manifest: Path, capsys: pytest.CaptureFixture[str], more: list[object], message: str
) -> None:
    assert drift.main([str(hybrid), *words(manifest), *map(str, more)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_models_that_cannot_be_compared(
    hybrid: Path, coarse: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for models, message in (
        ([f"m={hybrid},{coarse}"], "differ in more than their training's seed"),
        ([f"m={hybrid},{hybrid}", f"n={coarse}"], "n has 1 folders and m 2"),
        (["no/such/model/here"], "no such model folder"),
        ([f"m={hybrid}", f"m={coarse}"], "two models are called m"),
    ):
        assert drift.main([*models, *words(manifest)]) == 2
        assert message in capsys.readouterr().err
    for bad, message in ((["--prompt", "0.3"], "multiple of --window"), (["--clips", "0"], "must be at least 1")):
        with pytest.raises(SystemExit) as stopped:
            drift.main([str(hybrid), *words(manifest), *bad])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
