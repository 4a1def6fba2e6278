from dataclasses import replace

import pytest
import torch

from sampling.controls import Controls
from sampling.generate import Limits, Request, generate_frames
from sampling.pipeline import AudioModel
from tests.support.tiny_audio_model import tiny_model
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames

REPRESENTATIONS = ("discrete", "continuous", "hybrid")


def request(model: AudioModel, *, tags: tuple[str, ...] = ("music",), frames: int = 12, **changes: object) -> Request:
    plain = Request(
        prefix=model.text.encode("", list(tags)),
        unconditional=model.text.encode("", []),
        prompt=None,
        context_frames=100,
        limits=Limits(minimum=frames, maximum=frames),
        seeds=(0,),
        controls=Controls(temperature=1.0, top_p=None),
    )
    return replace(plain, **changes)


def drawn(model: AudioModel, asked: Request) -> AudioFrames:
    frames = list(generate_frames(model.model, asked))
    rows, time = len(asked.seeds), len(frames)
    config = model.model.config
    codes = torch.zeros(rows, config.num_codebooks, time, dtype=torch.int64)
    latents = torch.zeros(rows, time, config.latent_dim)
    for t, frame in enumerate(frames):
        if frame.codes is not None:
            codes[:, :, t : t + 1] = frame.codes
        if frame.latents is not None:
            latents[:, t : t + 1] = frame.latents
    lengths = torch.stack([frame.active for frame in frames]).sum(0)
    return AudioFrames(codes=codes, latents=latents, lengths=lengths)


def test_greedy_codes_are_the_likeliest_under_the_full_model() -> None:
    model = tiny_model("discrete")
    asked = request(model, controls=Controls(temperature=1.0, top_k=1, top_p=None))
    frames = drawn(model, asked)
    prefix = torch.tensor([list(asked.prefix)])
    scores = model.model.nll(prefix, torch.ones_like(prefix, dtype=torch.bool), frames)
    assert bool(scores.correct.all())
    assert len(frames.codes.unique()) > 5  # not one code all the time, which would prove little
    zero = drawn(model, replace(asked, controls=Controls(temperature=0.0), seeds=(7,)))
    assert torch.equal(zero.codes, frames.codes)


def test_zero_temperature_latents_are_component_means_under_the_full_model() -> None:
    model = tiny_model("continuous")
    frames = drawn(model, request(model, controls=Controls(temperature=0.0)))
    prefix = torch.tensor([model.text.encode("", ["music"])])
    with torch.inference_mode():
        h = model.model.states(prefix, torch.ones_like(prefix, dtype=torch.bool), frames)
        mixture = model.model.latent_distribution(h[0, :-1], None)
    best = mixture.means[torch.arange(12), mixture.log_weights.argmax(-1)]
    torch.testing.assert_close(frames.latents[0], best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_row_is_the_same_alone_and_in_a_batch(representation: str) -> None:
    model = tiny_model(representation)
    batch = drawn(model, request(model, seeds=(5, 6, 7)))
    for row, seed in enumerate((5, 6, 7)):
        alone = drawn(model, request(model, seeds=(seed,)))
        assert torch.equal(alone.codes[0], batch.codes[row])
        torch.testing.assert_close(alone.latents[0], batch.latents[row], atol=1e-5, rtol=1e-5)
    assert not torch.equal(batch.codes[0], batch.codes[1]) or representation == "continuous"
    assert not torch.equal(batch.latents[0], batch.latents[1]) or representation == "discrete"


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_guidance_of_one_is_none_and_of_zero_is_unconditional(representation: str) -> None:
    model = tiny_model(representation)
    plain = drawn(model, request(model))
    free = drawn(model, request(model, tags=()))
    one = drawn(model, request(model, controls=Controls(temperature=1.0, top_p=None, cfg=1.0)))
    assert torch.equal(one.codes, plain.codes)
    assert torch.equal(one.latents, plain.latents)
    strong = drawn(model, request(model, controls=Controls(temperature=1.0, top_p=None, cfg=3.0)))
    if representation == "continuous":
        assert not torch.equal(strong.latents, plain.latents)
        return
    zero = drawn(model, request(model, controls=Controls(temperature=1.0, top_p=None, cfg=0.0)))
    assert not torch.equal(strong.codes, plain.codes)
    assert not torch.equal(free.codes, plain.codes)
    if representation == "discrete":
        assert torch.equal(zero.codes, free.codes)
    else:  # later codes see latents, which stay conditional; the first frame's codes see none
        assert torch.equal(zero.codes[:, :, 0], free.codes[:, :, 0])


def test_guidance_of_latents_prefers_what_the_condition_makes_likelier() -> None:
    model = tiny_model("continuous")
    prefixes = [torch.tensor([model.text.encode("", tags)]) for tags in (["music"], [])]
    with torch.inference_mode():
        states = [model.model.start(p, torch.ones_like(p, dtype=torch.bool))[0] for p in prefixes]

    @torch.inference_mode()
    def mean_ratio(cfg: float) -> float:
        controls = Controls(temperature=1.0, cfg=cfg)
        asked = request(model, frames=1, seeds=tuple(range(200)), controls=controls)
        z = drawn(model, asked).latents[:, 0]
        log_probs = [model.model.latent_distribution(h.expand(200, -1), None).log_prob(z) for h in states]
        return float((log_probs[0] - log_probs[1]).mean())

    assert mean_ratio(0.0) < mean_ratio(1.0) - 0.5
    assert mean_ratio(1.0) < mean_ratio(3.0) - 0.5


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_guided_row_is_the_same_alone_and_in_a_batch(representation: str) -> None:
    model = tiny_model(representation)
    controls = Controls(temperature=1.0, cfg=2.0)
    batch = drawn(model, request(model, seeds=(5, 6), controls=controls))
    alone = drawn(model, request(model, seeds=(6,), controls=controls))
    assert torch.equal(alone.codes[0], batch.codes[1])
    torch.testing.assert_close(alone.latents[0], batch.latents[1], atol=1e-5, rtol=1e-5)


def test_a_model_that_always_wants_to_stop_is_heard_after_the_minimum() -> None:
    model = tiny_model(stop_bias=30.0)
    assert drawn(model, request(model, limits=Limits(minimum=4, maximum=9))).lengths.tolist() == [4]
    assert drawn(model, request(model, limits=Limits(minimum=0, maximum=9))).lengths.tolist() == [1]


def test_a_model_that_never_stops_is_stopped() -> None:
    model = tiny_model(stop_bias=-30.0)
    assert drawn(model, request(model, limits=Limits(minimum=1, maximum=9))).lengths.tolist() == [9]


def test_stop_probabilities_below_the_floor_are_not_drawn() -> None:
    model = tiny_model(stop_bias=-2.0)  # probability 0.12
    limits = Limits(minimum=1, maximum=60)
    low = drawn(model, request(model, limits=limits, seeds=(0, 1, 2, 3), controls=Controls(stop_floor=0.1)))
    high = drawn(model, request(model, limits=limits, seeds=(0, 1, 2, 3), controls=Controls(stop_floor=0.2)))
    assert max(low.lengths.tolist()) < 60
    assert len(set(low.lengths.tolist())) > 1
    assert high.lengths.tolist() == [60] * 4


def test_a_stop_threshold_stops_every_seed_at_the_same_frame() -> None:
    model = tiny_model(stop_bias=-2.0)  # probability 0.12
    asked = request(model, limits=Limits(minimum=3, maximum=20), seeds=(0, 1, 2, 3))
    low, high = (replace(asked, controls=replace(asked.controls, stop_threshold=p)) for p in (0.1, 0.13))
    assert drawn(model, low).lengths.tolist() == [3] * 4
    found = drawn(model, high)
    assert found.lengths.tolist() == [20] * 4
    assert torch.equal(found.codes, drawn(model, replace(asked, limits=Limits(minimum=20, maximum=20))).codes)


@pytest.mark.parametrize("representation", ["discrete", "hybrid"])
@pytest.mark.parametrize("cfg", [None, 2.0])
def test_a_huge_penalty_takes_other_codes_than_the_window_has(representation: str, cfg: float | None) -> None:
    model = tiny_model(representation)
    loose = Controls(temperature=0.0, cfg=cfg)
    given = drawn(model, request(model, frames=4, seeds=(9,)))
    asked = request(model, frames=40, seeds=(0, 1), prompt=given)

    def repeats(controls: Controls, distance: int) -> int:
        drawn_ones = drawn(model, replace(asked, controls=controls)).codes
        codes = torch.cat([given.codes.expand(2, -1, -1), drawn_ones], dim=2)  # the prompt's count as recent
        return int((codes[:, :, distance:] == codes[:, :, :-distance])[:, :, max(0, 4 - distance) :].sum())

    strict = replace(loose, repetition_penalty=1e6, repetition_window=4)
    assert sum(repeats(loose, distance) for distance in (1, 2, 3, 4)) > 10
    assert [repeats(strict, distance) for distance in (1, 2, 3, 4)] == [0] * 4
    assert repeats(strict, 5) + repeats(strict, 6) > 0  # beyond the window they may come again


def test_rows_that_stop_early_leave_the_others_alone() -> None:
    model = tiny_model(stop_bias=-2.0)
    limits = Limits(minimum=1, maximum=60)
    batch = drawn(model, request(model, limits=limits, seeds=(0, 1, 2, 3)))
    for row in range(4):
        alone = drawn(model, request(model, limits=limits, seeds=(row,)))
        length = int(batch.lengths[row])
        assert alone.lengths.tolist() == [length]
        assert torch.equal(alone.codes[0], batch.codes[row, :, :length])


def test_a_prompt_is_read_before_the_first_frame() -> None:
    model = tiny_model()
    whole = drawn(model, request(model, frames=10, controls=Controls(temperature=0.0)))
    prompt = AudioFrames(codes=whole.codes[:, :, :6], latents=whole.latents[:, :6], lengths=torch.tensor([6]))
    rest = drawn(model, request(model, frames=4, prompt=prompt, controls=Controls(temperature=0.0)))
    assert torch.equal(rest.codes, whole.codes[:, :, 6:])
    torch.testing.assert_close(rest.latents, whole.latents[:, 6:], atol=1e-5, rtol=1e-5)


def test_only_the_last_frames_of_a_long_prompt_are_looked_at() -> None:
    model = tiny_model()
    whole = drawn(model, request(model, frames=10))
    prompt = AudioFrames(codes=whole.codes, latents=whole.latents, lengths=whole.lengths)
    last = AudioFrames(codes=whole.codes[:, :, -4:], latents=whole.latents[:, -4:], lengths=torch.tensor([4]))
    assert torch.equal(
        drawn(model, request(model, frames=4, prompt=prompt, context_frames=4)).codes,
        drawn(model, request(model, frames=4, prompt=last)).codes,
    )


@pytest.mark.parametrize("method", ["start", "step"])
def test_memory_that_is_out_is_told_in_a_line(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    model = tiny_model()
    asked = request(model, frames=200, seeds=(1, 2, 3), controls=Controls(cfg=2.0))
    monkeypatch.setattr(model.model, method, fail)
    with pytest.raises(UserError, match=r"memory is out: 200 frames x 3 at once hold 0.00043 GiB.*; ask for fewer"):
        list(generate_frames(model.model, asked))

    def other(*given: object) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr(model.model, method, other)
    with pytest.raises(RuntimeError, match="shapes"):
        list(generate_frames(model.model, asked))
