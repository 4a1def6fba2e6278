import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import sampling.pipeline
from hybridlm.checkpoint import save_model
from hybridlm.model import HybridLM
from sampling.assemble import GeneratedAudio
from sampling.controls import TEXT_GUIDANCE, Controls
from sampling.generate import Drawn, Hear, Request, generate_frames
from sampling.limits import FASTEST_SECONDS_PER_BYTE, SLACK_SECONDS, SLOWEST_SECONDS_PER_BYTE
from sampling.longform import LongForm
from sampling.pipeline import AudioModel, load
from tests.support.tiny_audio_model import tiny_model
from tokenizer.errors import UserError

REPRESENTATIONS = ("discrete", "continuous", "hybrid")
RATE = 24000


def prompt(samples: int) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_record_is_complete(representation: str) -> None:
    model = tiny_model(representation)
    audio = model.generate(tags=["music"], duration=1.0, num_samples=2, seed=3)
    assert audio.waveform.shape == (2, 1, RATE)
    assert audio.waveform.dtype == torch.float32
    assert audio.sample_rate_hz == RATE
    assert audio.lengths.tolist() == [RATE, RATE]
    assert audio.frames.codes.shape == (2, 3, 25)
    assert audio.frames.latents.shape == (2, 25, 8)
    assert audio.frames.lengths.tolist() == [25, 25]
    assert audio.seed == 3
    assert audio.seconds_made == 2.0
    assert float(audio.waveform.abs().max()) > 0.01
    for tensor in (audio.waveform, audio.frames.latents):  # fit for training on, and without a history
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    if representation == "discrete":
        torch.testing.assert_close(audio.frames.latents, model.tokenizer.dequantize(audio.frames.codes))
    if representation == "continuous":
        assert torch.equal(audio.frames.codes, model.tokenizer.quantize(audio.frames.latents))


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_same_seed_same_audio_alone_in_a_batch_and_streamed(representation: str) -> None:
    model = tiny_model(representation, stop_bias=-2.0)
    batch = model.generate(text="good morning", num_samples=3, seed=10)
    assert len(set(batch.lengths.tolist())) > 1  # rows end apart, so the end of a row has neighbours that go on
    for row in range(3):
        alone = model.generate(text="good morning", seed=10 + row)
        assert alone.lengths.tolist() == [int(batch.lengths[row])]
        assert torch.equal(alone.frames.codes[0], batch.frames.codes[row, :, : int(alone.frames.lengths)])
        torch.testing.assert_close(alone.row(0), batch.row(row), atol=1e-5, rtol=0)
        streamed = torch.cat(list(model.stream(text="good morning", seed=10 + row, chunk_frames=3)), dim=-1)
        torch.testing.assert_close(streamed[0], batch.row(row), atol=1e-5, rtol=0)
    assert not torch.equal(batch.frames.codes[0, :, :5], batch.frames.codes[1, :, :5])
    tail = batch.waveform[int(batch.lengths.argmin()), :, int(batch.lengths.min()) :]
    assert bool((tail == 0).all())


def test_latents_by_the_flow_head() -> None:
    model = tiny_model(stop_bias=-30.0, flow_layers=1, flow_dim=16, flow_distill=1.0)
    asked = {"tags": ["music"], "duration": 0.4}
    controls = Controls(latent_steps=2)
    batch = model.generate(**asked, num_samples=2, seed=10, controls=controls)
    alone = model.generate(**asked, seed=11, controls=controls)
    torch.testing.assert_close(alone.row(0), batch.row(1), atol=1e-5, rtol=0)
    streamed = torch.cat(list(model.stream(**asked, seed=11, controls=controls)), dim=-1)
    torch.testing.assert_close(streamed[0], batch.row(1), atol=1e-5, rtol=0)
    others = [None, 1, 3]
    made = [model.generate(**asked, seed=11, controls=Controls(latent_steps=steps)).frames.latents for steps in others]
    assert not any(torch.allclose(one, alone.frames.latents) for one in made)
    cold = model.generate(**asked, seed=11, controls=Controls(latent_steps=2, latent_temperature=0.1)).frames.latents
    assert not torch.allclose(cold, alone.frames.latents)
    with pytest.raises(UserError, match="latent_steps=2 needs a model with a flow head"):
        tiny_model().generate(**asked, controls=controls)


@pytest.mark.parametrize("kind", [*REPRESENTATIONS, "flow"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_at_temperature_zero_the_seed_makes_no_difference(kind: str, cfg: float) -> None:
    """Not even to when speech ends: here where the stop, which is drawn otherwise, is likelier than not."""
    flow = {"flow_layers": 1, "flow_dim": 16, "flow_distill": 1.0} if kind == "flow" else {}
    model = tiny_model("hybrid" if flow else kind, stop_bias=-3.0, **flow)
    with torch.no_grad():
        model.model.stop.weight.normal_(generator=torch.Generator().manual_seed(5))
    controls = Controls(temperature=0.0, cfg=cfg, latent_steps=2 if flow else None)
    rows = model.generate(text="good morning", num_samples=3, seed=1, controls=controls)
    assert len(set(rows.frames.lengths.tolist())) == 1
    for row in (1, 2):
        assert torch.equal(rows.frames.codes[row], rows.frames.codes[0])
        torch.testing.assert_close(rows.frames.latents[row], rows.frames.latents[0], atol=1e-4, rtol=0)
    warm = model.generate(text="good morning", num_samples=3, seed=1, controls=Controls(cfg=cfg))
    assert not torch.equal(warm.frames.latents[1], warm.frames.latents[0])


def test_different_requests_side_by_side() -> None:
    model = tiny_model(stop_bias=-2.0)
    asked: list[dict[str, Any]] = [
        {"text": "good morning", "seed": 3},
        {"tags": ["music"], "duration": 0.5, "seed": 4, "temperature": 0.4},
        {"audio": prompt(9600), "duration": 0.3, "seed": 5},
        {"text": "she sells sea shells", "seed": 6, "cfg": 1.0},
    ]
    for one, made in zip(asked, model.generate_many(asked, max_rows=3), strict=True):
        alone = model.generate(**one)
        assert made.seed == one["seed"] and made.lengths.tolist() == alone.lengths.tolist()
        torch.testing.assert_close(made.waveform, alone.waveform, atol=1e-5, rtol=0)
        assert made.warnings == alone.warnings
    for bad, message in (
        ({"duration": -1}, "duration=-1 s"),
        ({"duration": 11.0}, "duration=11.0 s must be above 0 and at most 10 s"),
        ({"text": "blah " * 400}, "text has 1999 bytes, but this model says at most about 153"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate_many([bad])
    with pytest.raises(TypeError, match="num_sample"):
        model.generate_many([{"num_samples": 2}])


def test_a_stream_hands_out_sound_after_one_frame_and_then_in_chunks() -> None:
    pieces = [piece.shape[-1] // 960 for piece in tiny_model().stream(tags=["music"], duration=0.5, chunk_frames=5)]
    assert pieces == [1, 5, 5, 1]  # 12 frames


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_continuation_keeps_its_prompt_without_a_joint(representation: str) -> None:
    model = tiny_model(representation)
    samples = prompt(10 * 960 + 500)  # the last 500 samples fill no frame
    audio = model.generate(audio=samples, duration=0.4, seed=2)
    encoded = model.tokenizer.encode(samples[None, :, : 10 * 960])
    assert audio.frames.lengths.tolist() == [20]
    assert audio.seconds_made == pytest.approx(0.4)
    if representation == "discrete":
        assert torch.equal(audio.frames.codes[:, :, :10], encoded.codes)
        whole = model.tokenizer.decode_codes(audio.frames.codes)
    else:
        torch.testing.assert_close(audio.frames.latents[:, :10], encoded.latents)
        whole = model.tokenizer.decode_latents(audio.frames.latents)
    torch.testing.assert_close(audio.waveform, whole, atol=1e-6, rtol=0)
    streamed = torch.cat(list(model.stream(audio=samples, duration=0.4, seed=2)), dim=-1)
    torch.testing.assert_close(streamed, audio.waveform, atol=1e-5, rtol=0)


def test_a_continuation_depends_on_its_prompt() -> None:
    model = tiny_model("discrete")
    controls = Controls(temperature=0.0)
    one = model.generate(audio=prompt(9600), duration=0.4, controls=controls).frames.codes[:, :, 10:]
    other = model.generate(audio=prompt(19200)[:, 9600:], duration=0.4, controls=controls).frames.codes[:, :, 10:]
    assert not torch.equal(one, other)


def test_a_prompt_may_be_a_file_one_sample_long_or_longer_than_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    soundfile.write(tmp_path / "one.wav", [0.5], 8000)
    assert model.generate(audio=tmp_path / "one.wav", duration=0.2).frames.lengths.tolist() == [1 + 5]
    assert model.generate(audio=prompt(300 * 960), duration=0.2).frames.lengths.tolist() == [300 + 5]


def test_of_a_long_prompt_the_last_minute_is_continued(tmp_path: Path) -> None:
    model = tiny_model()
    long = prompt(70 * 24000)
    soundfile.write(tmp_path / "long.wav", long[0].numpy(), 24000, subtype="FLOAT")
    for audio in (long, tmp_path / "long.wav"):
        made = model.generate(audio=audio, duration=0.2)
        assert made.frames.lengths.tolist() == [60 * 25 + 5]
        assert made.warnings == ("the recording is 70 s long; its last 60 s are continued",)
    short = model.generate(audio=long[:, 10 * 24000 :], duration=0.2)
    assert torch.equal(made.frames.codes, short.frames.codes)


def test_text_that_never_ends_is_cut_off_and_said() -> None:
    audio = tiny_model(stop_bias=-30.0).generate(text="good morning", num_samples=2, seed=4)
    expected = math.ceil((SLACK_SECONDS + SLOWEST_SECONDS_PER_BYTE * 12) * 25)
    assert audio.frames.lengths.tolist() == [expected, expected]
    assert [warning.split(":")[0] for warning in audio.warnings] == ["seed 4", "seed 5"]


def test_text_never_stops_absurdly_early_and_duration_caps_it() -> None:
    model = tiny_model(stop_bias=30.0)
    text = "the quick brown fox jumps over the lazy dog"
    assert model.generate(text=text).frames.lengths.tolist() == [math.floor(FASTEST_SECONDS_PER_BYTE * len(text) * 25)]
    assert model.generate(text=text).warnings == ()
    assert model.generate(text=text, duration=0.2).frames.lengths.tolist() == [5]


def test_speech_lasts_at_least_min_duration_and_at_most_duration() -> None:
    hasty, endless = tiny_model(stop_bias=30.0), tiny_model(stop_bias=-30.0)

    def frames(model: AudioModel, least: float, most: float | None = None) -> list[int]:
        made = model.generate(text="good morning", duration=most, controls=Controls(min_duration=least))
        return made.frames.lengths.tolist()

    assert frames(hasty, 2.01) == [51]
    assert frames(hasty, 0.0) == [1]  # also below what the fastest reader takes
    assert frames(hasty, 0.4, 0.4) == [10]
    assert frames(endless, 0.4, 0.6) == [15]
    assert frames(endless, 8.0) == [200]  # beyond the slowest reader's time
    for asked, message in (
        ({"text": "good morning", "duration": 0.5}, "min_duration=0.6 s must be at most duration=0.5 s"),
        ({"tags": ["music"]}, "min_duration=0.6 s needs a text"),
    ):
        with pytest.raises(UserError, match=message):
            hasty.generate(**asked, controls=Controls(min_duration=0.6))
    with pytest.raises(UserError, match="must be at most 10 s, this model's longest"):
        hasty.generate(text="good morning", controls=Controls(min_duration=10.5))


def test_without_text_the_duration_is_exact_and_has_a_default() -> None:
    model = tiny_model(stop_bias=30.0)
    assert model.generate(tags=["sound"], duration=0.31).frames.lengths.tolist() == [8]
    assert model.generate(duration=0.001).frames.lengths.tolist() == [1]
    assert model.generate().frames.lengths.tolist() == [250]


def test_text_gets_the_voice_it_was_trained_with_unless_told_otherwise() -> None:
    model = tiny_model("discrete")
    default = model.generate(text="good morning", duration=0.5).frames.codes
    explicit = model.generate(text="good morning", tags=["speech", "speaker:kathleen"], duration=0.5).frames.codes
    other = model.generate(text="good morning", tags=["speech"], duration=0.5).frames.codes
    assert torch.equal(default, explicit)
    assert not torch.equal(default, other)


@pytest.mark.parametrize("text", ["🙂", "日本語", "naïve café", "a"])
def test_any_text_is_said(text: str) -> None:
    assert float(tiny_model(stop_bias=0.0).generate(text=text).waveform.abs().max()) > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "  \n"}, "text is empty"),
        ({"tags": ["musik"]}, "unknown tag 'musik'.*music"),
        ({"duration": -1.0}, "duration=-1.0 s must be above 0 and at most 86400 s"),
        ({"duration": 0.0}, "duration=0.0 s"),
        ({"duration": math.nan}, "duration=nan s"),
        ({"duration": math.inf}, "duration=inf s"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"cfg": math.nan}, "cfg=nan"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": 2**63}, "seed=.* must be"),
        ({"audio": "no-such-file.wav"}, "no such file"),
        ({"audio": torch.zeros(1, 0)}, "audio is empty"),
    ],
)
def test_bad_requests_are_told_in_one_line(request_: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny_model().generate(**request_)
    assert "\n" not in str(caught.value)


def test_streams_refuse_at_the_call() -> None:
    with pytest.raises(UserError, match="text is empty"):
        tiny_model().stream(text="")
    with pytest.raises(UserError, match="chunk_frames=0"):
        tiny_model().stream(chunk_frames=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation": "discrete", "continuous_input": "features", "feature_dim": 5}, "reads features"),
        ({"representation": "discrete", "continuous_input": "latents"}, "reads latents"),
        ({"representation": "discrete", "num_output_codebooks": 1}, "reads codebooks 2 to 3"),
    ],
)
def test_models_that_read_what_they_do_not_predict_cannot_generate(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model(**settings).generate()


def test_models_that_make_only_the_first_codebooks_generate() -> None:
    settings = {"num_input_codebooks": 1, "num_output_codebooks": 1}
    coarse = tiny_model("discrete", **settings).generate(audio=prompt(9600), duration=0.4)
    assert coarse.frames.codes.shape == (1, 1, 20)
    hybrid = tiny_model("hybrid", **settings).generate(audio=prompt(9600), duration=0.4)
    assert hybrid.frames.codes.shape == (1, 3, 20)


def test_a_saved_model_makes_the_same_audio(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(tmp_path / "model", model.model, model.tokenizer, model.text, dtype=torch.float32)
    again = load(tmp_path / "model")
    assert again.tags == model.tags
    model.pack("fp32")
    ours, theirs = (m.generate(text="good morning", seed=1, duration=0.5) for m in (model, again))
    assert torch.equal(ours.waveform, theirs.waveform)
    assert torch.equal(ours.frames.codes, theirs.frames.codes)


def test_speech_is_guided_by_its_text_alone_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model(), []

    def spy(lm: HybridLM, request: Request, hear: Hear | None) -> Iterator[Drawn]:
        seen.append(request)
        return generate_frames(lm, request, hear)

    monkeypatch.setattr("sampling.pipeline.generate_frames", spy)
    default = model.generate(text="how are you", tags=["speech"], duration=0.2)
    strong = model.generate(text="how are you", tags=["speech"], duration=0.2, cfg=TEXT_GUIDANCE)
    plain = model.generate(text="how are you", tags=["speech"], duration=0.2, cfg=1.0)
    assert torch.equal(default.frames.codes, strong.frames.codes)
    assert not torch.equal(default.frames.codes, plain.frames.codes)
    assert list(seen[0].unconditional) == model.text.encode(None, ["speech"])
    music = model.generate(tags=["music"], duration=0.2)
    assert torch.equal(music.frames.codes, model.generate(tags=["music"], duration=0.2, cfg=1.0).frames.codes)
    assert list(seen[3].unconditional) == model.text.encode(None, [])
    tiny_model("continuous").generate(text="how are you", duration=0.2)
    assert seen[-1].controls.cfg == 1.0  # without codes there is nothing to extrapolate: only when asked for


def test_a_silent_recording_is_told_and_its_prompt_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("hybrid")
    assert model.generate(tags=["music"], duration=0.4, num_samples=2, seed=4).warnings == ()
    decode = model.tokenizer.decode_latents
    calls: list[int] = []

    def second_row_falls_silent(latents: torch.Tensor) -> torch.Tensor:
        waveform = decode(latents).clone()
        calls.append(len(calls))
        if len(calls) == 2:
            waveform[..., 10 * model.tokenizer.hop_length :] = 0
        return waveform

    monkeypatch.setattr(model.tokenizer, "decode_latents", second_row_falls_silent)
    made = model.generate(audio=prompt(10 * 960), duration=0.4, num_samples=2, seed=4)
    assert made.warnings == ("seed 5: silent; use another seed",)


def test_a_recording_that_falls_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("hybrid")
    decode = model.tokenizer.decode_latents

    def falls_silent(latents: torch.Tensor) -> torch.Tensor:
        waveform = decode(latents).clone()
        waveform[..., 24000:] = 0
        return waveform

    monkeypatch.setattr(model.tokenizer, "decode_latents", falls_silent)
    assert model.generate(duration=4.0, seed=4).warnings == ()
    (told,) = model.generate(duration=4.4, seed=4).warnings
    assert told.startswith("seed 4: silent from 1.0 s on; use another seed, or max_drift=8")
    # Going back is no remedy where it is done already.
    made = sampling.pipeline.assemble

    def silenced(*given: Any, **options: Any) -> GeneratedAudio:
        *rest, waveform = given
        return made(*rest, waveform * (torch.arange(waveform.shape[-1]) < 24000), **options)

    monkeypatch.setattr(sampling.pipeline, "assemble", silenced)
    held = model.generate(duration=7.0, seed=4, long_form=LongForm(max_drift=1e9)).warnings
    assert held == ("seed 4: silent from 1.0 s on; use another seed",)
