"""A reference is looked at as what came before, is not heard, and leaves the text to be said from its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from hybridlm.reader import TextReader
from sampling.controls import Controls
from sampling.pipeline import AudioModel
from sampling.plan import Plan
from sampling.render import render
from tests.support.tiny_audio_model import tiny_model, tiny_text, tiny_tokenizer
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames

HOP = 960
READER: dict[str, Any] = {
    **{"reader_layer": 0, "reader_heads": 2, "reader_head_dim": 8, "text_in_prefix": False, "alignment_heads": 0},
    "first_text_id": tiny_text().first_text_id,
}


def recording(frames: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(1, frames * HOP, generator=torch.Generator().manual_seed(seed))


def reader_model(**settings: Any) -> AudioModel:
    model = tiny_model("hybrid", stop_bias=-2.0, **{**READER, **settings})
    with torch.no_grad():
        for glance in model.model.reader.glances:  # type: ignore[union-attr]
            glance.out.weight.mul_(8.0)  # what is read decides
    return model


@pytest.mark.parametrize("representation", ["discrete", "continuous", "hybrid", "heard"])
def test_the_frames_are_a_continuations_and_the_sound_is_theirs_alone(representation: str) -> None:
    settings: dict[str, Any] = {}
    if representation == "heard":
        settings = {"continuous_input": "features", "tokenizer": tiny_tokenizer().with_log_mel(num_mels=12)}
    model = tiny_model("hybrid" if settings else representation, **settings)
    asked: dict[str, Any] = {"tags": ["music"], "duration": 0.4, "num_samples": 2, "seed": 3}
    like, after = model.generate(**asked, reference=recording(7)), model.generate(**asked, audio=recording(7))
    assert like.frames.lengths.tolist() == [10, 10] and like.seconds_made == pytest.approx(0.8)
    assert torch.equal(like.frames.codes, after.frames.codes[:, :, 7:])
    assert torch.equal(like.frames.latents, after.frames.latents[:, 7:])
    alone = like.frames.codes if representation == "discrete" else like.frames.latents
    decode = model.tokenizer.decode_codes if representation == "discrete" else model.tokenizer.decode_latents
    torch.testing.assert_close(like.waveform, decode(alone), atol=1e-6, rtol=0)
    other = model.generate(**asked, reference=recording(7, seed=2))
    assert not torch.equal(other.frames.latents, like.frames.latents)
    streamed = torch.cat(list(model.stream(tags=["music"], duration=0.4, seed=3, reference=recording(7))), dim=-1)
    torch.testing.assert_close(streamed[0], like.row(0), atol=1e-5 if representation != "heard" else 1e-3, rtol=0)


def places(model: AudioModel, **asked: Any) -> tuple[list[float], int]:
    """Where the reader stands before the first new frame is drawn, and how many pieces the prefix has."""
    seen: dict[str, Any] = {}
    start = model.model.start

    def spy(prefix: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
        h, cache = start(prefix, mask, *rest)
        seen.update(page=cache.page, place=cache.page.place.clone())  # the last call, after that of a walk
        return h, cache

    model.model.start = spy  # type: ignore[method-assign]
    try:
        model.generate(**asked, duration=0.2)
    finally:
        model.model.start = start  # type: ignore[method-assign]
    return seen["place"].tolist(), int(seen["page"].mask[0].sum())


def test_the_reader_begins_at_the_texts_start() -> None:
    model = reader_model()
    with torch.no_grad():
        for glance in model.model.reader.glances[1:]:  # type: ignore[union-attr]
            glance.shift.weight.zero_()  # half a piece a frame, whatever was heard
    text = model.text.encode("how are you")[:-1]
    asked: dict[str, Any] = {"text": "how are you", "cfg": 1.0}
    assert places(model, **asked) == ([pytest.approx(0.5, abs=1e-4)], len(text))
    assert places(model, **asked, audio=recording(7)) == ([pytest.approx(4.0, abs=1e-4)], len(text))
    assert places(model, **asked, reference=recording(7)) == ([pytest.approx(0.5, abs=1e-4)], len(text))
    spoken = model.text.encode("good morning")[:-1]
    found = places(model, **asked, reference=recording(7), reference_text="good morning")
    assert found == ([pytest.approx(len(spoken) + 0.5, abs=1e-4)], len(spoken) + len(text))


def test_a_references_states_know_nothing_of_the_text() -> None:
    """Its keys and values are those of the same frames without text, or with the text that they speak alone."""
    model = reader_model().model
    frames = tiny_tokenizer().encode(recording(6)[None])
    text = tiny_text()
    new, spoken = text.encode("how are you")[:-1], text.encode("good morning")[:-1]

    next_state = {}

    def caches(ids: list[int], place: float, before: AudioFrames) -> list[torch.Tensor]:
        prefix = torch.tensor([[*ids, text.audio_id]])
        mask = torch.ones_like(prefix, dtype=torch.bool)
        with torch.no_grad():
            next_state[len(ids), place], found = model.start(prefix, mask, before, torch.tensor([place]))
        cache = found.attention
        return [x[:, :, : cache.length - 1] for x in (*cache.keys, *cache.values)]  # but the last state, which reads on

    without, with_text = caches([], 0.0, frames), caches(new, 0.0, frames)
    for ours, theirs in zip(with_text, without, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # The last state, from which the first new frame is drawn, does see the text.
    assert not torch.allclose(next_state[len(new), 0.0], next_state[0, 0.0], atol=1e-3)
    late = caches(new, 5.0, frames)
    assert not all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(late, without, strict=True))
    # Pieces are heard through their neighbours, so those of the text near the border do reach over; not far ones.
    long = caches(spoken + new * 4, float(len(spoken)), frames)
    other = caches(spoken + new * 3 + spoken, float(len(spoken)), frames)
    for ours, theirs in zip(long, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_guide_of_spoken_frames_counts_each_row_for_itself() -> None:
    guide = TextReader.spoken_guide(torch.tensor([0.0, 6.0]), torch.tensor([4, 3]), 5)
    torch.testing.assert_close(guide.before, torch.tensor([[0.0] * 5, [0.0, 2.0, 4.0, 6.0, 6.0]]))
    inf = float("inf")
    assert guide.reach is not None
    assert guide.reach.tolist() == [[0, 0, 0, 0, inf], [6, 6, 6, inf, inf]]


def test_text_decides_what_follows_a_reference_and_the_reference_too() -> None:
    model = reader_model()

    def codes(text: str, reference: torch.Tensor | None, **more: Any) -> torch.Tensor:
        controls = Controls(temperature=0.0, min_duration=0.4)
        made = model.generate(text=text, reference=reference, duration=0.4, controls=controls, **more)
        return made.frames.codes

    base = codes("how are you", recording(7))
    assert not torch.equal(base, codes("she sells sea", recording(7)))
    assert not torch.equal(base, codes("how are you", recording(7, seed=2)))
    assert not torch.equal(base, codes("how are you", None))
    assert not torch.equal(base, codes("how are you", recording(7), reference_text="good morning"))
    # Whose voice it is the reference tells: no speaker's tag is added.
    assert torch.equal(base, codes("how are you", recording(7), tags=["speech"]))


def test_a_plan_keeps_its_reference(tmp_path: Path) -> None:
    model = reader_model()
    asked: dict[str, Any] = {"text": "how are you", "reference": recording(7), "reference_text": "good morning"}
    made = model.generate(**asked, seed=4, num_samples=2, keep_plan=True, controls=Controls(min_duration=0.5))
    assert made.plan is not None
    made.plan.save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert plan.prompt_frames == 0
    assert torch.equal(render(model, plan).waveform, made.waveform)
    edited = render(model, plan, seed=9, edit=(0.12, 0.2))
    assert torch.equal(edited.frames.codes[:, :, :3], made.frames.codes[:, :, :3])
    assert not torch.equal(edited.frames.codes[:, :, 3:5], made.frames.codes[:, :, 3:5])


def test_a_long_reference_is_looked_at_from_its_last_minute(tmp_path: Path) -> None:
    model = reader_model()
    soundfile.write(tmp_path / "long.wav", recording(70 * 25)[0].numpy(), 24000, subtype="FLOAT")
    made = model.generate(tags=["music"], reference=tmp_path / "long.wav", duration=0.2)
    assert made.frames.lengths.tolist() == [5]
    assert made.warnings == ("the recording is 70 s long; its last 60 s are looked at",)
    with pytest.raises(UserError, match=r"reference of 60\.0 s is too long.* at most at 9\.8 s"):
        model.generate(text="hm", reference=tmp_path / "long.wav", reference_text="good morning", duration=0.2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"audio": recording(2), "reference": recording(2)}, "give only one of them"),
        ({"text": "hm", "reference_text": "good"}, "give both, or leave it out"),
        ({"reference": recording(2), "reference_text": "good"}, "give both, or leave it out"),
        ({"text": "hm", "reference": recording(2), "reference_text": " "}, "reference_text is empty"),
        ({"text": "hm", "reference": "no-such-file.wav"}, "no such file"),
    ],
)
def test_requests_that_make_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reader_model().generate(**asked)


def test_a_model_without_a_reader_wants_to_know_what_the_reference_says() -> None:
    model = tiny_model("discrete")
    asked: dict[str, Any] = {"text": "how are you", "reference": recording(7), "duration": 0.2, "temperature": 0.0}
    with pytest.raises(UserError, match="no reader to tell it that text begins after the reference"):
        model.generate(**asked)
    made = model.generate(**asked, reference_text="good morning", cfg=1.0, tags=["speech"])
    both = model.generate(text="good morning how are you", tags=["speech"], audio=recording(7), duration=0.2, cfg=1.0,
                          temperature=0.0)  # fmt: skip
    assert torch.equal(made.frames.codes, both.frames.codes[:, :, 7:])
