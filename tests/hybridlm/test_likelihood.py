import math

import pytest
import torch

from hybridlm.likelihood import (
    ClipNLL,
    bits_per_second,
    bootstrap_ratio,
    clip_nlls,
    noise_latents,
    paired_difference,
    summarize,
)
from tests.support.tiny_frames import LENGTHS, tiny_config, tiny_frames, tiny_model, tiny_prefix


def _clips(count, seed=0, shift=0.0, num_codebooks=3):
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(count):
        n = int(torch.randint(20, 60, (1,), generator=generator))
        level = float(torch.randn(1, generator=generator)) * 0.5 + 2.0 + shift
        clips.append(
            ClipNLL(
                num_frames=n,
                codes=tuple(n * level * (k + 1) for k in range(num_codebooks)),
                latents=-3.0 * n * level,
                stop=0.01 * n,
                correct=tuple(n // (k + 2) for k in range(num_codebooks)),
            )
        )
    return clips


def test_one_nat_at_25_frames_a_second_is_36_bits():
    assert bits_per_second(1.0, 25.0) == pytest.approx(25.0 / math.log(2.0))
    assert bits_per_second(math.log(1024.0), 25.0) == pytest.approx(250.0)


def test_clips_hold_the_sums_of_their_frames():
    model, frames = tiny_model(), tiny_frames()
    with torch.no_grad():
        nll = model.nll(*tiny_prefix(), frames, ended=torch.tensor([True, True, False]))
    clips = clip_nlls(nll)
    assert [clip.num_frames for clip in clips] == list(LENGTHS)
    for row, clip in enumerate(clips):
        assert clip.total == pytest.approx(nll.total()[row].item(), abs=1e-4)
        assert clip.codes == pytest.approx(nll.codes[row].sum(dim=1).tolist(), abs=1e-4)
        assert clip.correct == tuple(nll.correct[row].sum(dim=1).tolist())


@pytest.mark.parametrize("representation", ["hybrid", "discrete", "continuous"])
def test_the_streams_of_a_report_add_up_to_its_total(representation):
    model = tiny_model(representation=representation)
    with torch.no_grad():
        clips = clip_nlls(model.nll(*tiny_prefix(), tiny_frames(), ended=torch.ones(3, dtype=torch.bool)))
    report = summarize(clips, model.config, num_resamples=50)
    streams = [s for s in (report.codes, report.latents, report.stop) if s is not None]
    for unit in ("nats_per_frame", "bits_per_second"):
        assert sum(getattr(s, unit).value for s in streams) == pytest.approx(
            getattr(report.total, unit).value, abs=1e-4
        )
    assert (report.codes is None) == (representation == "continuous")
    assert (report.latents is None) == (representation == "discrete")
    assert (report.sigma, report.scale_floor) == (0.1, 0.02)
    assert report.num_frames == sum(LENGTHS)
    if report.codes is not None:
        assert sum(k.value for k in report.codebook_nats) == pytest.approx(report.codes.nats_per_frame.value, abs=1e-4)
        assert report.perplexity == pytest.approx([math.exp(k.value) for k in report.codebook_nats])


def test_a_report_weighs_clips_by_their_frames():
    short = ClipNLL(num_frames=1, codes=(10.0,), latents=0.0, stop=0.0, correct=(0,))
    long = ClipNLL(num_frames=9, codes=(9.0,), latents=0.0, stop=0.0, correct=(9,))
    report = summarize([short, long], tiny_config(num_output_codebooks=1), num_resamples=50)
    assert report.codebook_nats[0].value == pytest.approx(1.9)
    assert report.codebook_accuracy[0].value == pytest.approx(0.9)
    assert report.seconds == pytest.approx(10 / 25)


def test_pieces_of_a_clip_join():
    a, b = _clips(2)
    joined = a + b
    assert joined.total == pytest.approx(a.total + b.total)
    assert joined.num_frames == a.num_frames + b.num_frames


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        values = 1.0 + torch.randn(60, generator=generator)
        interval = bootstrap_ratio(values.tolist(), [1.0] * 60, seed=seed, num_resamples=200)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval():
    values, ones = torch.randn(30).tolist(), [1.0] * 30
    assert bootstrap_ratio(values, ones, seed=4) == bootstrap_ratio(values, ones, seed=4)
    assert bootstrap_ratio(values, ones, seed=4) != bootstrap_ratio(values, ones, seed=5)


def test_no_clips_no_interval():
    with pytest.raises(ValueError, match="0 numerators and 0 denominators"):
        bootstrap_ratio([], [])


def test_a_paired_difference_is_far_sharper_than_two_intervals():
    better, worse = _clips(40, shift=-0.02), _clips(40)
    difference = paired_difference(better, worse, lambda clip: sum(clip.codes))
    assert difference.value == pytest.approx(-0.02 * 6, abs=1e-6)
    assert difference.high < 0
    assert difference.excludes_zero()
    alone = bootstrap_ratio([sum(c.codes) for c in worse], [c.num_frames for c in worse])
    assert alone.high - alone.low > 10 * (difference.high - difference.low)
    assert not paired_difference(worse, worse, lambda clip: clip.total).excludes_zero()


def test_other_clips_cannot_be_paired():
    with pytest.raises(ValueError, match="same clips in the same order"):
        paired_difference(_clips(5), _clips(5)[::-1], lambda clip: clip.total)


def test_noise_depends_on_the_seed_and_the_frame_alone():
    latents = torch.randn(3, 150, 5)
    noised = noise_latents(latents, 0.1, [7, 8, 9])
    alone = noise_latents(latents[1:2, :97], 0.1, [8])
    assert torch.equal(noised[1:2, :97], alone)
    assert not torch.equal(noised[0] - latents[0], noised[1] - latents[1])
    assert torch.equal(noise_latents(latents, 0.0, [7, 8, 9]), latents)
    noise = (noise_latents(torch.zeros(1, 4000, 5), 0.1, [1])) / 0.1
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    repeated = noise[0, :64] == noise[0, 64:128]
    assert not repeated.any(), "each block has noise of its own"


def test_noise_wants_one_seed_a_row():
    with pytest.raises(ValueError, match="2 seeds given for 3 rows"):
        noise_latents(torch.randn(3, 4, 5), 0.1, [1, 2])
