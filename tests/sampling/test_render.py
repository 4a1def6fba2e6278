"""A plan rendered as it was drawn is the recording, bit by bit; otherwise only what was asked for changes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sampling.assemble
from sampling.assemble import GeneratedAudio
from sampling.controls import Controls
from sampling.generate import Limits, generate_frames
from sampling.longform import LongForm
from sampling.loudness import loudness_lufs
from sampling.pipeline import AudioModel
from sampling.plan import Plan
from sampling.render import CROSS_FADE_SECONDS, parse_span, render, splice
from tests.support.command import Command, assert_refused, runner
from tests.support.saved_model import save_tiny_model
from tests.support.tiny_audio_model import tiny_model, tiny_tokenizer
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames

RATE, HOP, FADE = 24000, 960, round(CROSS_FADE_SECONDS * 24000)
READER = {"reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8, "text_in_prefix": False, "alignment_heads": 0}
FLOW = {"flow_layers": 1, "flow_dim": 16, "flow_distill": 1.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "discrete": ("discrete", {}),
    "hybrid": ("hybrid", {}),
    "first codebook": ("hybrid", {"num_input_codebooks": 1, "num_output_codebooks": 1}),
    "reader": ("hybrid", READER),
    "flow": ("hybrid", FLOW),
    "heard": ("hybrid", {"continuous_input": "features"}),
}


@lru_cache
def model_of(kind: str) -> AudioModel:
    representation, settings = KINDS[kind]
    if kind == "heard":
        settings = {**settings, "tokenizer": tiny_tokenizer().with_log_mel(num_mels=12)}
    if kind == "reader":
        settings = {**settings, "first_text_id": tiny_model().text.first_text_id}
    return tiny_model(representation, stop_bias=-2.0, **settings)


def prompt(frames: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, frames * HOP, generator=torch.Generator().manual_seed(1))


def planned(kind: str, **asked: Any) -> tuple[AudioModel, GeneratedAudio, Plan]:
    model = model_of(kind)
    controls = Controls(latent_steps=2) if kind == "flow" else Controls()
    made = model.generate(**{"controls": controls, **asked}, keep_plan=True)
    assert made.plan is not None
    return model, made, made.plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "asked",
    [{"text": "good morning", "num_samples": 3, "seed": 11}, {"audio": prompt(7), "duration": 0.6, "seed": 4}],
    ids=["guided speech of three lengths", "continuation"],
)
def test_a_plan_gives_the_same_samples_from_its_file(kind: str, asked: dict[str, Any], tmp_path: Path) -> None:
    model, made, plan = planned(kind, **asked)
    plan.save(tmp_path / "plan.safetensors")
    again = render(model, Plan.load(tmp_path / "plan.safetensors"))
    assert torch.equal(again.waveform, made.waveform)
    assert torch.equal(again.lengths, made.lengths)
    assert (again.seed, again.seconds_made, again.sample_rate_hz) == (made.seed, made.seconds_made, RATE)
    for row, length in enumerate(made.frames.lengths.tolist()):
        assert torch.equal(again.frames.codes[row, :, :length], made.frames.codes[row, :, :length])
        assert torch.equal(again.frames.latents[row, :length], made.frames.latents[row, :length])


@pytest.mark.parametrize("kind", ["discrete", "hybrid", "heard"])
def test_long_music_has_a_plan_and_spans(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the model's longest sequence, decoded in pieces; what it had forgotten, it forgets again."""
    monkeypatch.setattr(sampling.assemble, "PIECE_FRAMES", 16)
    representation, settings = KINDS[kind]
    if kind == "heard":
        settings = {**settings, "tokenizer": tiny_tokenizer().with_log_mel(num_mels=12)}
    model = tiny_model(representation, max_frames=30, **settings)
    asked: dict[str, Any] = {"tags": ["music"], "duration": 1.8, "seed": 3, "num_samples": 2}
    made = model.generate(**asked, keep_plan=True, long_form=LongForm(window_seconds=0.48, max_drift=math.inf))
    assert made.plan is not None and made.plan.request.window_frames == 12
    made.plan.save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert torch.equal(render(model, plan).waveform, made.waveform)
    edited = render(model, plan, seed=100, edit=(1.2, 1.4))
    assert not torch.equal(edited.frames.codes, made.frames.codes)
    outside = [t for t in range(45) if not 30 <= t < 35]
    assert torch.equal(edited.frames.codes[:, :, outside], made.frames.codes[:, :, outside])
    assert torch.equal(edited.waveform[..., : 30 * HOP - FADE], made.waveform[..., : 30 * HOP - FADE])
    assert torch.equal(edited.waveform[..., 35 * HOP + FADE :], made.waveform[..., 35 * HOP + FADE :])


@pytest.mark.parametrize("kind", ["hybrid", "reader", "flow", "heard"])
def test_other_latents_of_the_same_codes(kind: str) -> None:
    model, made, plan = planned(kind, text="good morning", num_samples=2, seed=11)
    changes: list[dict[str, Any]] = [{"seed": 5}, {"latent_temperature": 0.1}]
    if kind == "flow":
        changes.append({"latent_steps": 3})
    for change in changes:
        other = render(model, plan, **change)
        assert torch.equal(other.lengths, made.lengths)
        for row, length in enumerate(made.frames.lengths.tolist()):
            assert torch.equal(other.frames.codes[row, :, :length], plan.codes[row, :, :length])
            apart = (other.frames.latents[row, :length] - made.frames.latents[row, :length]).abs().amax(dim=-1)
            assert float(apart.min()) > 0  # every frame
        assert not torch.equal(other.waveform, made.waveform)
    twice, once = render(model, plan, seed=5), render(model, plan, seed=5)
    assert torch.equal(twice.waveform, once.waveform) and twice.seed == 5


def test_latents_without_noise_are_those_of_the_codes_teacher_forced() -> None:
    model, _, plan = planned("hybrid", tags=["music"], duration=0.6, seed=3, temperature=0.0)
    found = render(model, plan, latent_temperature=0.0).frames
    prefix = torch.tensor([list(plan.request.prefix)])
    with torch.inference_mode():
        h = model.model.states(prefix, torch.ones_like(prefix, dtype=torch.bool), found)[0, :-1]
        mixture = model.model.latent_distribution(h, plan.codes[0].T)
    best = mixture.means[torch.arange(15), mixture.log_weights.argmax(-1)]
    torch.testing.assert_close(found.latents[0], best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_its_span_alone(kind: str) -> None:
    controls = Controls(min_duration=0.48, latent_steps=2 if kind == "flow" else None)
    model, made, plan = planned(kind, text="good morning", num_samples=2, seed=11, controls=controls)
    start, stop = 4, 8
    edited = render(model, plan, seed=100, edit=(start / 25, stop / 25))
    old, new = made.frames, edited.frames
    assert torch.equal(edited.lengths, made.lengths) and edited.seed == 100
    assert edited.seconds_made == pytest.approx(2 * (stop - start) / 25)
    for row, length in enumerate(old.lengths.tolist()):
        outside = [t for t in range(length) if not start <= t < stop]
        assert torch.equal(new.codes[row][:, outside], old.codes[row][:, outside])
        if kind != "first codebook":  # whose frames have the codes of their latents
            assert torch.equal(new.codes[row][:, outside], plan.codes[row][:, outside])
        assert torch.equal(new.latents[row][outside], old.latents[row][outside])
        assert not torch.equal(new.codes[row, :, start:stop], old.codes[row, :, start:stop])
    a, b = start * HOP, stop * HOP
    assert torch.equal(edited.waveform[..., : a - FADE], made.waveform[..., : a - FADE])
    torch.testing.assert_close(edited.waveform[..., a - FADE : a], made.waveform[..., a - FADE : a], atol=1e-6, rtol=0)
    assert torch.equal(edited.waveform[..., b + FADE :], made.waveform[..., b + FADE :])
    raw = decoded(model, new)
    assert torch.equal(edited.waveform[0, :, a:b], raw[0, :, a:b])
    assert not torch.equal(edited.waveform[0, :, a:b], made.waveform[0, :, a:b])
    # The decoder remembers the span: without the old samples, what follows would differ, and not jumping matters.
    assert not torch.equal(raw[0, :, b + FADE : b + 2 * FADE], made.waveform[0, :, b + FADE : b + 2 * FADE])
    step = (edited.waveform[0, 0, b] - raw[0, 0, b]).abs()
    assert step <= 0.01 * (made.waveform[0, 0, b] - raw[0, 0, b]).abs() + 1e-7


def decoded(model: AudioModel, frames: AudioFrames) -> torch.Tensor:
    length = int(frames.lengths[0])
    if model.source == "codes":
        return model.tokenizer.decode_codes(frames.codes[:1, :, :length])
    return model.tokenizer.decode_latents(frames.latents[:1, :length])


@pytest.mark.parametrize("kind", ["discrete", "hybrid", "heard"])
def test_an_edit_is_drawn_given_all_that_comes_before(kind: str) -> None:
    model, made, plan = planned(kind, audio=prompt(7), duration=0.8, seed=4, tags=["music"], cfg=2.0)
    edited = render(model, plan, seed=9, edit=(12 / 25, 17 / 25)).frames
    features = model.tokenizer.encode(made.waveform).features
    past = AudioFrames(
        codes=made.frames.codes[:, :, :12],
        latents=made.frames.latents[:, :12],
        lengths=torch.tensor([12]),
        features=None if features is None else features[:, :12],
    )
    asked = replace(plan.request, prompt=past, context_frames=99, seeds=(9,), limits=Limits(minimum=5, maximum=5))
    following = list(generate_frames(model.model, asked, model.hear(asked)))
    codes = torch.cat([frame.codes for frame in following if frame.codes is not None], dim=2)
    assert torch.equal(codes, edited.codes[:, :, 12:17])
    assert not torch.equal(codes, made.frames.codes[:, :, 12:17])


def test_edits_at_either_end_and_by_other_settings() -> None:
    model, made, plan = planned("hybrid", tags=["music"], duration=0.6, seed=3)
    whole = render(model, plan, seed=3, edit=(0.0, 0.6))
    assert torch.equal(whole.waveform, made.waveform)  # drawn anew from the same seed
    first, last = render(model, plan, seed=8, edit=(0.0, 0.2)), render(model, plan, seed=8, edit=(0.4, 0.6))
    assert torch.equal(first.frames.codes[:, :, 5:], plan.codes[:, :, 5:])
    assert torch.equal(last.frames.codes[:, :, :10], plan.codes[:, :, :10])
    warm = render(model, plan, seed=8, edit=(0.2, 0.4))
    cold = render(model, plan, seed=8, edit=(0.2, 0.4), latent_temperature=0.0)
    assert torch.equal(cold.frames.latents[:, :5], made.frames.latents[:, :5])
    assert torch.equal(cold.frames.latents[:, 10:], made.frames.latents[:, 10:])
    assert torch.equal(cold.waveform[..., 10 * HOP + FADE :], made.waveform[..., 10 * HOP + FADE :])
    assert not torch.equal(cold.frames.latents[:, 5:10], warm.frames.latents[:, 5:10])


def test_loudness_is_part_of_a_plan_and_an_edit_keeps_the_gain() -> None:
    model, made, plan = planned("hybrid", tags=["music"], duration=1.0, seed=3, controls=Controls(loudness=-30.0))
    assert loudness_lufs(made.row(0), RATE) == pytest.approx(-30.0, abs=0.1)
    assert torch.equal(render(model, plan).waveform, made.waveform)
    edited = render(model, plan, seed=8, edit=(0.4, 0.6))
    assert torch.equal(edited.waveform[..., 15 * HOP + FADE :], made.waveform[..., 15 * HOP + FADE :])
    assert torch.equal(edited.waveform[..., : 10 * HOP - FADE], made.waveform[..., : 10 * HOP - FADE])


def test_a_splice_fades_over_on_both_sides() -> None:
    old, new = torch.zeros(1, 1, 100), torch.ones(1, 1, 100)
    found = splice(old, new, 40, 60, 10)[0, 0]
    assert (
        found[:30].tolist() == [0.0] * 30 and found[40:60].tolist() == [1.0] * 20 and found[70:].tolist() == [0.0] * 30
    )
    assert bool((found[29:41].diff() > 0).all()) and bool((found[59:71].diff() < 0).all())
    torch.testing.assert_close(found[30:40], found[60:70].flip(0))
    noise = torch.randn(1, 1, 100)
    assert torch.equal(splice(noise, noise.clone(), 40, 60, 10), noise)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ((0.6, 0.5), "edit=0.6:0.5 must be START:END"),
        ((0.52, 0.53), "at least one frame"),
        ((0.1, 0.5), "edit=0.1:0.5 must lie within 0.28:0.88, what was drawn$"),  # 7 frames of prompt
        ((0.5, 0.96), "must lie within 0.28:0.88"),
        ((float("nan"), 1.0), "edit=nan:1 must be START:END"),
    ],
)
def test_spans_that_make_no_sense(edit: tuple[float, float], message: str) -> None:
    model, _, plan = planned("hybrid", audio=prompt(7), duration=0.6)
    with pytest.raises(UserError, match=message):
        render(model, plan, edit=edit)


def test_requests_that_make_no_sense() -> None:
    model, _, plan = planned("hybrid", tags=["music"], duration=0.2)
    with pytest.raises(UserError, match="latent_steps=2 needs a model with a flow head"):
        render(model, plan, latent_steps=2)
    with pytest.raises(UserError, match="seed=-1 must be"):
        render(model, plan, seed=-1)
    with pytest.raises(UserError, match="the plan's codes do not fit 3 codebooks of 32"):
        render(model, replace(plan, codes=plan.codes + 32))
    other = tiny_model("hybrid", stop_bias=-5.0)
    other.name = "another"
    with pytest.raises(UserError) as caught:
        render(other, plan)
    assert str(plan.origin) in str(caught.value) and str(other.origin) in str(caught.value)
    assert "'another'" in str(caught.value) and plan.origin.model != other.origin.model
    for text in ("1", "1:2:3", "a:2", ""):
        with pytest.raises(UserError, match="must be START:END"):
            parse_span(text)
    assert parse_span("1.5:2") == (1.5, 2.0)


def test_a_plan_of_another_tokenizer_is_refused_though_the_weights_are_the_same() -> None:
    model, _, plan = planned("hybrid", tags=["music"], duration=0.2)
    changed = copy.deepcopy(model.tokenizer)
    with torch.no_grad():
        next(changed.parameters()).add_(0.01)
    other = AudioModel(model.model, changed, model.text)
    assert other.origin.model == plan.origin.model and other.origin.tokenizer != plan.origin.tokenizer
    with pytest.raises(UserError, match=f"tokenizer {plan.origin.tokenizer}.*tokenizer {other.origin.tokenizer}"):
        render(other, plan)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(monkeypatch, capsys)


def test_the_command_line_keeps_plans_and_renders_them(command: Command, tmp_path: Path) -> None:
    folder, plan = save_tiny_model(tmp_path / "model", stop_bias=-30.0), tmp_path / "take.safetensors"
    words = ("generate", "--model", folder, "--text", "hm", "--duration", 0.8, "--num-samples", 2, "--seed", 5)
    done = command(*words, "--output", tmp_path / "take.wav", "--save-plan", plan)
    assert done.status == 0, done.err
    assert command("render", plan, "--output", tmp_path / "again.wav").status == 0
    for number in (1, 2):
        again, take = (tmp_path / f"{name}-{number}.wav" for name in ("again", "take"))
        assert again.read_bytes() == take.read_bytes()
    edited = command("render", plan, "--edit", "0.2:0.4", "--output", tmp_path / "edited.wav")
    assert edited.status == 0, edited.err
    seed = edited.out.splitlines()[0].rsplit(" ", 1)[1]
    words = ("render", plan, "--model", folder, "--device", "cpu", "--output", tmp_path / "b.wav", "--edit", "0.2:0.4")
    assert command(*words, "--seed", seed).status == 0
    assert (tmp_path / "b-2.wav").read_bytes() == (tmp_path / "edited-2.wav").read_bytes()
    assert (tmp_path / "b-2.wav").read_bytes() != (tmp_path / "take-2.wav").read_bytes()
    assert command(*words, "--seed", seed, "--latent-temperature", 0.1).status == 0
    assert (tmp_path / "b-2.wav").read_bytes() != (tmp_path / "edited-2.wav").read_bytes()
    assert_refused(command("render", plan, "--latent-steps", 2), "latent_steps=2", "flow head")
    assert_refused(command("render", plan, "--edit", "now"), "edit='now'", "START:END")
    assert_refused(command("render", tmp_path / "none.safetensors"), "none.safetensors", "no such plan")
    other = save_tiny_model(tmp_path / "other", stop_bias=-3.0)
    assert_refused(command("render", plan, "--model", other), str(folder), str(other))


def test_plans_that_cannot_be_kept_are_told_before_anything_is_made(command: Command, tmp_path: Path) -> None:
    folder, output = save_tiny_model(tmp_path / "model", "continuous"), tmp_path / "take.wav"
    words = ("generate", "--model", folder, "--duration", 0.2, "--output", output, "--save-plan")
    assert_refused(command(*words, tmp_path / "take.safetensors"), "continuous model draws no codes")
    assert_refused(command(*words, tmp_path / "take.json"), "take.json", ".safetensors")
    assert_refused(command(*words, tmp_path / "model" / "config.json" / "take.safetensors"), "can't be written")
    assert not output.exists() and not (tmp_path / "take.safetensors").exists()
