import math

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from sampling.controls import Controls, penalize, restrict, sharpen
from tokenizer.errors import UserError

LOGITS = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_without_restriction_the_distribution_is_unchanged() -> None:
    same = restrict(LOGITS, Controls(temperature=1.0, top_p=1.0)).softmax(-1)
    torch.testing.assert_close(same, LOGITS.softmax(-1))


def test_temperature_takes_the_root_of_the_odds() -> None:
    warm = restrict(LOGITS, Controls(temperature=2.0, top_p=None)).softmax(-1)
    torch.testing.assert_close(warm[0, 0] / warm[0, 3], torch.tensor(math.sqrt(5.0)))


def test_temperature_zero_keeps_the_likeliest_alone_even_among_equals() -> None:
    assert kept(restrict(LOGITS, Controls(temperature=0.0))) == [[0], [3]]
    assert sharpen(torch.zeros(1, 5), 0.0).isfinite().sum() == 1


def test_top_k_keeps_k() -> None:
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_k=2, top_p=None)))[1] == [2, 3]
    assert len(kept(restrict(torch.zeros(1, 9), Controls(top_k=3, top_p=None)))[0]) == 3  # also among equals
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_k=99, top_p=None)))[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(("top_p", "expected"), [(0.39, [3]), (0.41, [2, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, expected: list[int]) -> None:
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_p=top_p)))[1] == expected


def test_top_p_always_leaves_one() -> None:
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_p=1e-9))) == [[0], [3]]


def test_min_p_keeps_what_is_likely_beside_the_likeliest_after_temperature() -> None:
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_p=None, min_p=0.45))) == [[0], [1, 2, 3]]
    assert kept(restrict(LOGITS, Controls(temperature=0.5, top_p=None, min_p=0.45))) == [[0], [2, 3]]
    assert kept(restrict(LOGITS, Controls(temperature=1.0, top_p=None, min_p=1.0))) == [[0], [3]]
    assert kept(restrict(LOGITS, Controls(temperature=0.0, top_p=None, min_p=0.5))) == [[0], [3]]
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    theirs = MinPLogitsWarper(0.2)(torch.zeros(50, 1, dtype=torch.int64), logits / 0.8)
    assert torch.equal(restrict(logits, Controls(temperature=0.8, top_p=None, min_p=0.2)), theirs)


def test_the_penalty_on_repetition_is_that_of_ctrl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, recent = torch.randn(20, 30, generator=generator), torch.randint(30, (20, 12), generator=generator)
    for penalty in (1.5, 0.5):
        ours = penalize(logits, recent, Controls(repetition_penalty=penalty))
        assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(penalty)(recent, logits.clone()))
        assert not torch.equal(ours, logits)
    assert penalize(logits, recent, Controls()) is logits
    assert penalize(logits, recent[:, :0], Controls(repetition_penalty=2.0)) is logits


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be"),
        ({"temperature": math.nan}, "temperature=nan must be"),
        ({"latent_temperature": -1.0}, "latent_temperature=-1.0 must be"),
        ({"top_k": 0}, "top_k=0 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be"),
        ({"top_p": 1.5}, "top_p=1.5 must be"),
        ({"cfg": -1.0}, "cfg=-1.0 must be"),
        ({"cfg": math.inf}, "cfg=inf must be"),
        ({"stop_floor": 1.0}, "stop_floor=1.0 must be"),
        ({"min_p": -0.1}, "min_p=-0.1 must be"),
        ({"min_p": 1.1}, "min_p=1.1 must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be"),
        ({"repetition_window": 0}, "repetition_window=0 must be"),
        ({"stop_threshold": 0.0}, "stop_threshold=0.0 must be"),
        ({"stop_threshold": 1.1}, "stop_threshold=1.1 must be"),
        ({"min_duration": -1.0}, "min_duration=-1.0 must be"),
        ({"loudness": 1.0}, "loudness=1.0 LUFS must lie"),
        ({"loudness": -71.0}, "loudness=-71.0 LUFS must lie"),
        ({"loudness": math.nan}, "loudness=nan LUFS must lie"),
        ({"num_candidates": 0}, "num_candidates=0 must be"),
    ],
)
def test_bad_values_are_told(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Controls(**setting)


def test_latents_follow_the_temperature_unless_told_otherwise() -> None:
    assert Controls(temperature=0.5).latent_variance_scale == 0.5
    assert Controls(temperature=0.5, latent_temperature=0.9).latent_variance_scale == 0.9


def test_top_p_is_that_of_a_stable_sort() -> None:
    """Of many values, with equals at the border and excluded ones among them."""
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        logits = torch.randn(3, 500, generator=generator) * 3
        logits = logits.round() if number % 2 else logits
        logits[:, number::7] = -torch.inf
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        ordered[probability.cumsum(-1) - probability >= 0.9] = -torch.inf
        expected = torch.empty_like(logits).scatter(-1, order, ordered)
        assert torch.equal(restrict(logits, Controls(temperature=1.0, top_p=0.9)), expected)
