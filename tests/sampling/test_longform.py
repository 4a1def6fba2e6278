"""Music of any length is what one loop makes, sentences follow each other, and what drifts goes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import sampling.assemble
import sampling.long_run
import sampling.pipeline
from sampling.controls import Controls
from sampling.generate import Drawn, FrameLoop, Request, generate_frames
from sampling.longform import LongForm, segment_sentences
from sampling.monitor import Watch
from sampling.pipeline import AudioModel
from tests.support.tiny_audio_model import tiny_model, tiny_text, tiny_tokenizer
from tests.support.tiny_tokenizers import tokenizer_of
from tokenizer.errors import UserError

HOP = 960
SENTENCES = ("Good morning, my dear fox.", "How are you?", "The quick brown dog sells sea shells.")
TEXT, SIZES = " ".join(SENTENCES), [len(one) for one in SENTENCES]
KINDS = ("discrete", "continuous", "hybrid", "heard")
READER: dict[str, Any] = {
    **{"reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8, "text_in_prefix": False, "alignment_heads": 0},
    "first_text_id": tiny_text().first_text_id,
}


def maker(kind: str, **settings: Any) -> AudioModel:
    if kind != "heard":
        return tiny_model(kind, **settings)
    tokenizer = tiny_tokenizer().with_log_mel(num_mels=12)
    return tiny_model("hybrid", continuous_input="features", tokenizer=tokenizer, **settings)


def recording(frames: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(1, frames * HOP, generator=torch.Generator().manual_seed(seed))


def requests_of(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests of the loops that are entered from here on."""
    seen: list[Request] = []
    loop = sampling.long_run.FrameLoop

    def spy(model: Any, request: Request, hear: Any = None) -> Any:
        seen.append(request)
        return loop(model, request, hear)

    monkeypatch.setattr(sampling.long_run, "FrameLoop", spy)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_prompt", [False, True])
def test_until_the_window_is_full_segments_make_what_is_made_at_once(kind: str, with_prompt: bool) -> None:
    model = maker(kind)
    asked: dict[str, Any] = {"tags": ["music"], "duration": 0.88, "seed": 3}
    if with_prompt:
        asked["audio"] = recording(7)
    long_form = LongForm(segment_seconds=0.24, max_drift=1e9)  # 6, 6, 6, 4 frames
    once, segments = model.generate(**asked), model.generate(**asked, long_form=long_form)
    assert torch.equal(segments.frames.codes, once.frames.codes)
    torch.testing.assert_close(segments.frames.latents, once.frames.latents, atol=1e-5, rtol=0)
    assert segments.waveform.shape == once.waveform.shape and segments.lengths.tolist() == once.lengths.tolist()
    assert segments.seconds_made == once.seconds_made and segments.warnings == once.warnings
    stream = model.generate_stream(**asked, long_form=long_form, chunk_frames=4)
    pieces = list(stream)
    assert stream.num_samples == sum(piece.shape[-1] for piece in pieces) == once.waveform.shape[-1]
    first = 7 if with_prompt else 1
    assert pieces[0].shape[-1] == first * HOP and stream.num_frames == once.waveform.shape[-1] // HOP
    assert stream.share_done == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_music_runs_on_in_one_loop_that_forgets(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the model's longest sequence: nothing is read again, and what it holds is the window."""
    monkeypatch.setattr(sampling.assemble, "PIECE_FRAMES", 16)
    model = maker(kind, max_frames=30)
    seen = requests_of(monkeypatch)
    asked: dict[str, Any] = {"tags": ["music"], "duration": 1.8, "seed": 3}
    asked["long_form"] = LongForm(window_seconds=0.48, segment_seconds=0.4, max_drift=math.inf)
    streamed = torch.cat(list(model.generate_stream(**asked)), dim=-1)
    (request,) = seen
    made = model.generate(**asked)
    assert made.frames.lengths.tolist() == [45] and made.waveform.shape[-1] == 45 * HOP
    torch.testing.assert_close(streamed, made.waveform, atol=1e-5, rtol=0)
    assert (request.limits.minimum, request.limits.maximum) == (45, 45)
    assert (request.sink_frames, request.window_frames) == (0, 12)
    drawn = list(generate_frames(model.model, request, model.hear(request)))
    if kind == "continuous":
        latents = torch.cat([frame.latents for frame in drawn if frame.latents is not None], dim=1)
        torch.testing.assert_close(made.frames.latents, latents, atol=1e-5, rtol=0)
    else:
        codes = torch.cat([frame.codes for frame in drawn if frame.codes is not None], dim=2)
        assert torch.equal(made.frames.codes, codes)


def test_a_prompt_fills_the_window_and_a_reference_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(max_frames=30)
    loops: list[FrameLoop] = []
    enter = sampling.long_run.LongRun._enter

    def spy(run: Any, request: Request) -> FrameLoop:
        loops.append(enter(run, request))
        return loops[-1]

    monkeypatch.setattr(sampling.long_run.LongRun, "_enter", spy)
    long_form = LongForm(window_seconds=0.48)
    asked: dict[str, Any] = {"tags": ["music"], "duration": 1.8, "seed": 3, "long_form": long_form}
    for given, frames in (({"audio": recording(20)}, 65), ({"reference": recording(9)}, 45)):
        assert sum(piece.shape[-1] for piece in model.generate_stream(**given, **asked)) == frames * HOP
    assert sum(piece.shape[-1] for piece in model.generate_stream(reference=recording(25), **asked)) == 45 * HOP
    prefix = [int(loop.sinks[0]) - (loop.request.sink_frames or 0) for loop in loops]
    assert len(loops) == 3 and len(set(prefix)) == 1
    settings = [(one.request.context_frames, one.request.sink_frames, one.request.window_frames) for one in loops]
    assert settings == [(12, 0, 12), (9, 9, 21), (18, 18, 30)]
    assert all(loop.held <= (loop.window or 0) for loop in loops)


@pytest.mark.parametrize("kind", ["hybrid", "heard"])
def test_it_goes_back_to_the_frames_of_its_first_seconds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(window_seconds=0.2, step_seconds=0.12, anchor_seconds=0.4)
    long_form = LongForm(segment_seconds=0.2, carry_seconds=0.28, max_drift=1e-3, watch=watch)
    model, seen = maker(kind), requests_of(monkeypatch)
    made = model.generate(duration=1.6, seed=3, long_form=long_form)
    assert made.frames.lengths.tolist() == [40] and len(seen) > 2
    (told,) = made.warnings
    assert told.startswith("seed 3: went back to its first seconds at 1 s and") and "max_drift=0.001" in told
    for request in seen[1:]:
        assert request.prompt is not None and request.reference
        assert torch.equal(request.prompt.codes, made.frames.codes[:, :, :7])
        torch.testing.assert_close(request.prompt.latents, made.frames.latents[:, :7])
        assert (request.prompt.features is not None) == (kind == "heard")
        if request.prompt.features is not None:
            assert request.prompt.features.shape[1] == 7


@pytest.mark.parametrize("max_drift", [math.inf, 1e9])
def test_long_rows_are_those_that_are_made_alone(max_drift: float) -> None:
    """At once, or one after the other where each may go back to its beginning."""
    model, long_form = tiny_model(max_frames=30), LongForm(segment_seconds=0.8, max_drift=max_drift)
    rows = model.generate(duration=1.6, seed=3, num_samples=2, long_form=long_form, controls=Controls(loudness=-30.0))
    plain = [model.generate(duration=1.6, seed=seed, long_form=long_form) for seed in (3, 4)]
    assert rows.seconds_made == 3.2 and rows.lengths.tolist() == [40 * HOP] * 2
    for row, alone in enumerate(plain):
        assert torch.equal(rows.frames.codes[row], alone.frames.codes[0])
        gain = rows.row(row).std() / alone.row(0).std()
        torch.testing.assert_close(rows.row(row), alone.row(0) * gain, atol=1e-5, rtol=0)


def prefix_text(model: AudioModel, request: Request) -> str:
    first = model.text.first_text_id
    return model.text.decode([piece for piece in request.prefix if piece >= first])


@pytest.mark.parametrize("reader", [True, False])
def test_sentences_follow_the_end_of_the_one_before(reader: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(stop_bias=30.0, max_frames=200, **(READER if reader else {}))
    seen = requests_of(monkeypatch)
    long_form = LongForm(at_once_seconds=1.0, speech_carry_seconds=0.2, pause_seconds=0.0)
    made = model.generate(text=TEXT, seed=3, long_form=long_form)
    lengths = [int(0.03 * size * 25) for size in SIZES]  # ends as soon as it may
    assert made.frames.lengths.tolist() == [sum(lengths)] and made.warnings == ()
    texts = [prefix_text(model, request) for request in seen]
    first, second = seen[1].prompt, seen[2].prompt
    assert first is not None and second is not None and seen[0].prompt is None
    tags = [model.text.tag_id(tag) for tag in ("speech", "speaker:kathleen")]
    assert all(list(request.prefix[:2]) == tags and request.reference for request in seen[1:])
    if reader:
        assert [text.strip() for text in texts] == [one.lower() for one in SENTENCES]
        assert [request.place for request in seen[1:]] == [0, 0]
        assert first.codes.shape[2] == second.codes.shape[2] == 5
    else:
        assert texts[1].endswith("my dear fox. how are you?") and texts[2].startswith("how are you?")
        assert (first.codes.shape[2], second.codes.shape[2]) == (lengths[0], lengths[1])
        tight = tiny_model(stop_bias=30.0, max_frames=160)  # of which the last sentence may take all
        tight.generate(text=TEXT, seed=3, long_form=long_form)
        assert seen[-1].prompt is None and prefix_text(tight, seen[-1]) == texts[2].removeprefix("how are you? ")
    ends = [sum(lengths[:1]), sum(lengths[:2])]
    for prompt, end in ((first, ends[0]), (second, ends[1])):
        assert torch.equal(prompt.codes, made.frames.codes[:, :, end - prompt.codes.shape[2] : end])


def test_a_reference_stays_before_what_is_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(stop_bias=30.0, max_frames=200, **READER)
    seen = requests_of(monkeypatch)
    long_form = LongForm(at_once_seconds=1.0, speech_carry_seconds=0.2, pause_seconds=0.0)
    made = model.generate(text=TEXT, reference=recording(9), reference_text="how", seed=3, long_form=long_form)
    encoded = model.requests.encode(recording(9))
    lengths = [int(0.03 * size * 25) for size in SIZES]
    assert seen[2].prompt is not None and seen[2].prompt.codes.shape[2] == 14
    assert torch.equal(seen[2].prompt.codes[:, :, :9], encoded.codes)
    end = sum(lengths[:2])
    assert torch.equal(seen[2].prompt.codes[:, :, 9:], made.frames.codes[:, :, end - 5 : end])
    assert prefix_text(model, seen[2]).startswith("how") and seen[2].place == len(model.text.encode("how")) - 1


def smooth_model(**settings: Any) -> AudioModel:
    """Of a tokenizer whose random decoder does not make much of rounding, as that of `tiny_tokenizer` does."""
    return tiny_model(tokenizer=tokenizer_of("dasheng"), **settings)  # type: ignore[arg-type]


def test_no_click_at_the_joints() -> None:
    """One decoder goes through: the samples are those of all frames, decoded together."""
    model = smooth_model(stop_bias=30.0, max_frames=150)
    made = model.generate(text=TEXT, seed=3, long_form=LongForm(at_once_seconds=1.0))
    assert made.frames.lengths.tolist() == [sum(int(0.03 * size * 25) for size in SIZES) + 12], "two pauses"
    torch.testing.assert_close(made.waveform, model.tokenizer.decode_latents(made.frames.latents), atol=1e-5, rtol=0)


def test_duration_caps_a_text_and_unended_sentences_are_told() -> None:
    model = tiny_model(stop_bias=-30.0, max_frames=150)
    long_form = LongForm(at_once_seconds=1.0)
    stream = model.generate_stream(text=TEXT, duration=6.4, seed=3, long_form=long_form)
    next(stream)
    assert stream.num_frames is None and stream.share_done == 1 / 160
    capped = model.generate(text=TEXT, duration=6.4, seed=3, long_form=long_form)
    assert capped.frames.lengths.tolist() == [160]
    # 2 s and 0.12 s a byte for the first sentence; the second is cut by the duration.
    assert capped.warnings == ("sentence 1 (Good morning, my dear fox.) stopped at its limit of 5.1 s",)


@pytest.mark.parametrize("kind", ["discrete", "hybrid"])
def test_a_pause_is_put_between_sentences(kind: str) -> None:
    """The voice draws what it draws without; a stream has the same pauses, however it is cut."""
    model = smooth_model(representation=kind, stop_bias=30.0, max_frames=150)
    asked: dict[str, Any] = {"text": TEXT, "seed": 3}
    plain = model.generate(**asked, long_form=LongForm(at_once_seconds=1.0, pause_seconds=0.0))
    long_form = LongForm(at_once_seconds=1.0, pause_seconds=0.2)
    made = model.generate(**asked, long_form=long_form)
    first, second = (int(0.03 * size * 25) for size in SIZES[:2])
    kept = [*range(first), *range(first + 5, first + 5 + second)]
    kept += range(first + second + 10, int(made.frames.lengths))
    assert torch.equal(made.frames.codes[:, :, kept], plain.frames.codes)
    silence = made.frames.codes[:, :, first : first + 5]
    assert torch.equal(silence, silence[:, :, :1].expand_as(silence)) and len(kept) == int(plain.frames.lengths)
    for chunk_frames in (1, 7):
        pieces = list(model.generate_stream(**asked, long_form=long_form, chunk_frames=chunk_frames))
        torch.testing.assert_close(torch.cat(pieces, dim=-1), made.waveform, atol=1e-5, rtol=0)
    capped = model.generate(**asked, duration=(first + 3) / 25, long_form=long_form)
    assert torch.equal(capped.frames.codes, made.frames.codes[:, :, : first + 3]), "a pause counts"


def segmented(*asked: Any, **settings: Any) -> Sequence[str] | None:
    return segment_sentences(*asked, LongForm(**settings), 25.0, 250)


def test_what_is_made_in_segments() -> None:
    assert segmented(None, None) is None and segmented(None, 10.0) is None
    assert segmented(None, 10.1) == () and segmented(None, 7.0, max_drift=2.0) == ()
    assert segmented(None, 7.0, max_drift=math.inf) is None and segmented(TEXT, None, max_drift=math.inf) is None
    assert segmented("Good morning.", None) is None and segmented("Good morning.", None, max_drift=2.0) is None
    assert segmented("Good morning.", 20.0) == ["Good morning."]
    assert segmented(TEXT, None) is None and segmented(f"{TEXT} {TEXT} {TEXT}", None) is not None
    assert segmented(TEXT, None, max_drift=2.0) is not None
    blah = segmented("blah " * 400, None)
    assert blah is not None and " ".join(blah).split() == ["blah"] * 400


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": f"{TEXT} " * 3, "audio": recording(5)}, "give the recording as the reference"),
        ({"text": f"{TEXT} " * 3, "controls": Controls(min_duration=1.0)}, "min_duration=1.0 s"),
        ({"duration": 11.0, "keep_plan": True}, "no plan to save; leave it out, or give max_drift=inf"),
        ({"text": f"{TEXT} " * 3, "keep_plan": True}, "no plan to save; leave it out, or ask for less text"),
        ({"duration": 1e6}, "at most 86400 s"),
        ({"text": "hm", "duration": float("nan")}, "duration=nan"),
        ({"tags": ["musik"], "duration": 20.0}, "unknown tag 'musik'"),
    ],
)
def test_bad_requests(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model().generate(**asked)


def test_a_limit_on_drift_that_has_no_effect_is_told() -> None:
    asked: dict[str, Any] = {"duration": 0.2, "long_form": LongForm(max_drift=2.0)}
    told = ("max_drift=2 has no effect: this is made at once, not in segments",)
    assert tiny_model().generate(**asked).warnings == tiny_model().generate_stream(**asked).warnings == told
    assert tiny_model().generate_stream(duration=7.0, long_form=LongForm(max_drift=2.0)).warnings == ()


def test_a_pause_that_has_no_effect_is_told() -> None:
    told = ("pause_seconds=0.5 has no effect: this is not read sentence by sentence",)
    long_form = LongForm(pause_seconds=0.5)
    for duration in (0.2, 10.1):
        assert tiny_model().generate_stream(duration=duration, long_form=long_form).warnings == told
    assert tiny_model().generate_stream(text=f"{TEXT} " * 3, long_form=long_form).warnings == ()


@pytest.mark.parametrize(
    "name", ["window_seconds", "pause_seconds", "segment_seconds", "carry_seconds", "max_drift", "at_once_seconds"]
)
def test_bad_settings(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=-1"):
        LongForm(**{name: -1.0})


class Ramp(FrameLoop):
    """A loop whose frames say how loud they are: a bit louder than the last one that it was shown."""

    def __init__(self, model: Any, request: Request, hear: Any = None) -> None:
        self.generators: list[torch.Generator] = []
        self.level = 1.0 if request.prompt is None else float(request.prompt.latents[0, -1, 0])

    def draw(self, *, may_stop: bool, codes: torch.Tensor | None = None) -> Drawn:
        self.level *= 1.01
        # Of nearly one length and direction, so that it is the sound alone that drifts.
        latents = torch.tensor([[[self.level, 1000.0, *[0.0] * 6]]])
        return Drawn(codes=None, latents=latents, active=torch.ones(1, dtype=torch.bool))

    def advance(self, frame: Drawn) -> None:
        pass


class LoudnessDecoder:
    """A hum, as loud as the frames say."""

    def push(self, frames: torch.Tensor) -> torch.Tensor:
        hum = 0.001 * torch.sin(torch.arange(HOP) * (2 * torch.pi / 96))
        return (frames[:, :, :1] * hum).reshape(1, 1, -1)

    def flush(self) -> torch.Tensor:
        return torch.zeros(1, 1, 0)


@pytest.fixture
def ramp(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Reports on a model that grows louder by 1 % with every frame it hears."""
    model = tiny_model("continuous")
    watch = Watch(window_seconds=0.4, step_seconds=0.2, anchor_seconds=1.0)
    monkeypatch.setattr(sampling.long_run, "FrameLoop", Ramp)
    monkeypatch.setattr(model.tokenizer, "streaming_decoder", lambda *_: LoudnessDecoder())

    def run(max_drift: float | None, segment_seconds: float = 1.0) -> dict[str, Any]:
        long_form = LongForm(segment_seconds=segment_seconds, carry_seconds=1.0, max_drift=max_drift, watch=watch)
        stream = model.generate_stream(duration=12.0, long_form=long_form, measure_drift=True)
        count = sum(piece.shape[-1] for piece in stream)
        assert count == 300 * HOP
        return stream.report()

    return run


def test_a_model_that_grows_louder_goes_back_to_its_first_seconds(ramp: Callable[..., dict[str, Any]]) -> None:
    """Left alone it is more than 20 dB louder in the end; a band is at least 2 dB wide, and a segment adds 2.2 dB."""
    free, held = ramp(math.inf), ramp(2.0)
    assert ramp(None)["re_anchorings"] != [], "what is longer than can be made at once is held without being asked to"
    assert free["re_anchorings"] == [] and free["drift"]["largest"] > 8
    drifts = [window["loudness_db"] for window in free["drift"]["windows"]]
    assert drifts == sorted(drifts), "it only grows"
    assert held["drift"]["largest"] < 4
    found = held["re_anchorings"]
    assert len(found) >= 2 and found[0]["measure"] == "loudness_db" and found[0]["drift"] > 2
    assert all(later["at_s"] - one["at_s"] >= 2.0 for one, later in zip(found, found[1:], strict=False))
    width = held["drift"]["bands"]["loudness_db"]["width"]
    windows = {round(window["at_s"], 3): window["loudness_db"] * width for window in held["drift"]["windows"]}
    at = found[0]["at_s"]
    assert windows[round(at, 3)] > 2 * width > windows[round(at + 0.4, 3)], "back within the band at once"


def test_what_was_heard_before_it_was_re_anchored_does_not_count(ramp: Callable[..., dict[str, Any]]) -> None:
    """Segments half as long as a window: the next verdict is that of a window which began afterwards."""
    found = ramp(2.0, segment_seconds=0.2)["re_anchorings"]
    assert len(found) > 2
    assert all(later["at_s"] - one["at_s"] > 0.39 for one, later in zip(found, found[1:], strict=False))


def test_the_size_of_the_pieces_makes_no_difference_to_re_anchoring() -> None:
    model, watch = smooth_model(), Watch(window_seconds=0.2, step_seconds=0.12, anchor_seconds=0.4)
    long_form = LongForm(segment_seconds=0.4, carry_seconds=0.4, max_drift=1.0, watch=watch)
    asked: dict[str, Any] = {"duration": 2.0, "seed": 3, "long_form": long_form}
    once = model.generate(**asked)
    reports = []
    for chunk_frames in (1, 3, 100):
        stream = model.generate_stream(**asked, chunk_frames=chunk_frames)
        torch.testing.assert_close(torch.cat(list(stream), dim=-1), once.waveform, atol=1e-5, rtol=0)
        reports.append([anchored["at_s"] for anchored in stream.report()["re_anchorings"]])
    assert reports[0] == reports[1] == reports[2] != []


def test_memory_does_not_grow_with_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two hours, nothing is held but the loop."""
    model = tiny_model("continuous")
    monkeypatch.setattr(sampling.long_run, "FrameLoop", Ramp)
    runs: list[sampling.long_run.LongRun] = []
    plain = sampling.long_run.LongRun

    def spy(*args: Any) -> sampling.long_run.LongRun:
        runs.append(plain(*args))
        return runs[-1]

    monkeypatch.setattr(sampling.pipeline, "LongRun", spy)
    monkeypatch.setattr(model.tokenizer, "streaming_decoder", lambda *_: LoudnessDecoder())
    pieces: Iterator[torch.Tensor] = model.generate_stream(
        duration=60.0, chunk_frames=250, long_form=LongForm(segment_seconds=6.0, max_drift=math.inf)
    )
    for _ in range(5):
        next(pieces)
    run = runs[0]
    assert run.drawn == 600 and run._tail is run._anchor is None
    assert not run._ending and not run._features and run._loop is not None
