import pytest
import torch

from hybridlm.code_head import draw, row_uniforms
from hybridlm.model import HybridLM
from tests.support.tiny_frames import CODEBOOKS, SIZE, tiny_config, tiny_model


def _generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _all_codes(num_codebooks=2):
    grid = torch.cartesian_prod(*[torch.arange(SIZE)] * num_codebooks)
    return grid.view(-1, num_codebooks)


def _two_codebooks():
    head = tiny_model(num_codebooks=2).code_head
    with torch.no_grad():
        head.output.mul_(4.0)  # probabilities far from uniform
    return head


def test_the_probabilities_of_all_frames_sum_to_one():
    head = _two_codebooks()
    codes = _all_codes()
    h = torch.randn(1, 32).expand(len(codes), -1)
    total = head.log_prob(h, codes).sum(dim=1).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_sampled_codes_have_the_frequencies_that_log_prob_says():
    head = _two_codebooks()
    codes = _all_codes()
    state = torch.randn(1, 32)
    with torch.no_grad():
        expected = head.log_prob(state.expand(len(codes), -1), codes).sum(dim=1).exp().view(SIZE, SIZE)
        rows = 8_000
        drawn = head.sample(state.expand(rows, -1), [torch.Generator().manual_seed(0)] * rows)
    counts = torch.zeros(SIZE, SIZE).index_put((drawn[:, 0], drawn[:, 1]), torch.ones(rows), accumulate=True)
    # Five standard errors of a frequency, in every one of the 121 cells.
    error = 5 * (expected * (1 - expected) / rows).sqrt() + 1e-4
    assert ((counts / rows - expected).abs() < error).all()
    assert expected.max() / expected.min() > 20, "too uniform to tell a wrong order of the codebooks"


def test_a_code_depends_on_the_codes_before_it_alone():
    head = tiny_model().code_head
    h = torch.randn(1, 32)
    codes = torch.randint(0, SIZE, (1, CODEBOOKS))
    logits = head.logits(h, codes)
    for k in range(CODEBOOKS):
        changed = codes.clone()
        changed[0, k] = (changed[0, k] + 1) % SIZE
        other = head.logits(h, changed)
        torch.testing.assert_close(other[: k + 1], logits[: k + 1], rtol=0, atol=0)
        for later in range(k + 1, CODEBOOKS):
            assert not torch.allclose(other[later], logits[later])


def test_one_after_the_other_gives_what_all_at_once_gives():
    head = tiny_model().code_head
    h = torch.randn(4, 32)
    seen = []

    def keep(logits, codebook):
        seen.append(logits)
        return logits

    with torch.no_grad():
        codes = head.sample(h, _generators(0, 1, 2, 3), keep)
        torch.testing.assert_close(torch.stack(seen), head.logits(h, codes), rtol=0, atol=1e-5)


def test_a_row_draws_the_same_alone_and_in_a_batch():
    head = tiny_model().code_head
    h = torch.randn(4, 32)
    with torch.no_grad():
        together = head.sample(h, _generators(5, 6, 7, 8))
        alone = [head.sample(h[i : i + 1], _generators(5 + i)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_guidance_extrapolates_log_probabilities():
    head = tiny_model().code_head
    conditional, free = torch.randn(2, 3, 32)
    seen = []

    def keep(logits, codebook):
        seen.append(logits)
        return logits

    with torch.no_grad():
        codes = head.sample(conditional, _generators(1, 2, 3), keep, unconditional=free, cfg=2.5)
        c = head.logits(conditional, codes).log_softmax(dim=-1)
        u = head.logits(free, codes).log_softmax(dim=-1)
        torch.testing.assert_close(torch.stack(seen), u + 2.5 * (c - u), rtol=0, atol=1e-4)
        plain = head.sample(conditional, _generators(1, 2, 3))
        neutral = head.sample(conditional, _generators(1, 2, 3), unconditional=free, cfg=1.0)
    assert torch.equal(plain, neutral)


def test_what_a_filter_forbids_is_never_drawn():
    logits = torch.full((3, 5), float("-inf"))
    logits[:, 2] = 0.0
    for uniform in (0.0, 0.5, 1.0 - 2**-24, 1.0):
        assert draw(logits, torch.full((3,), uniform)).tolist() == [2, 2, 2]
    logits[:, 4] = 0.0
    assert draw(logits, torch.tensor([0.0, 0.49, 0.51])).tolist() == [2, 2, 4]


def test_uniforms_follow_each_generator():
    numbers = row_uniforms(_generators(3, 4), 5, torch.device("cpu"))
    assert torch.equal(numbers[1:], row_uniforms(_generators(4), 5, torch.device("cpu")))


def test_hits_are_counted_where_the_most_likely_code_is_the_true_one():
    head = tiny_model().code_head
    h = torch.randn(6, 32)
    codes = torch.randint(0, SIZE, (6, CODEBOOKS))
    codes[:3, 0] = head.logits(h, codes)[0, :3].argmax(dim=-1)
    scores = head.score(h, codes)
    assert torch.equal(scores.correct.T, head.logits(h, codes).argmax(dim=-1) == codes.T)
    assert scores.correct[:3, 0].all()


def test_the_first_prediction_of_a_new_model_is_nearly_uniform():
    torch.manual_seed(0)
    head = HybridLM(tiny_config()).code_head
    log_prob = head.log_prob(torch.randn(50, 32), torch.randint(0, SIZE, (50, CODEBOOKS)))
    assert log_prob.mean().item() == pytest.approx(-torch.tensor(float(SIZE)).log().item(), abs=0.05)
