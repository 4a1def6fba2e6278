import dataclasses

import pytest
import torch

from hybridlm.alignment import alignment_loss
from hybridlm.fusion import history_noise
from hybridlm.model import HybridLM
from tests.support.tiny_frames import (
    LENGTHS,
    PREFIX_LENGTHS,
    VARIANTS,
    select,
    tiny_config,
    tiny_frames,
    tiny_model,
    tiny_prefix,
)
from tokenizer.frames import AudioFrames
from training.examples import drop_conditions

variants = pytest.mark.parametrize("variant", VARIANTS)
ENDED = torch.tensor([True, False, True])


def _step(model, frames, t, cache):
    return model.step(frames.codes[:, :, t : t + 1], frames.latents[:, t : t + 1], frames.features[:, t : t + 1], cache)


def _valid_states():
    return torch.arange(max(LENGTHS) + 1) <= torch.tensor(LENGTHS)[:, None]


def _changed_from(frames, t):
    """Other frames from t on."""
    other = tiny_frames(seed=9)
    late = torch.arange(max(LENGTHS)) >= t
    return AudioFrames(
        codes=torch.where(late, other.codes, frames.codes),
        latents=torch.where(late[:, None], other.latents, frames.latents),
        features=torch.where(late[:, None], other.features, frames.features),
        lengths=frames.lengths,
    )


@variants
def test_step_by_step_gives_the_states_of_the_whole(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    with torch.no_grad():
        whole = model.states(prefix, mask, frames)
        h, cache = model.start(prefix, mask)
        states = [h]
        for t in range(max(LENGTHS)):
            h, cache = _step(model, frames, t, cache)
            states.append(h)
    torch.testing.assert_close(torch.stack(states, dim=1), whole, rtol=0, atol=1e-5)
    assert whole.diff(dim=1).abs().amax(dim=(0, 2)).min() > 1e-2, "states that don't change prove nothing"


@variants
def test_going_on_from_a_prompt_gives_the_states_of_the_whole(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    given = torch.tensor([4, 0, 6])
    prompt = dataclasses.replace(_changed_from(frames, 6), lengths=given)
    with torch.no_grad():
        h, cache = model.start(prefix, mask, prompt)
        for row, n in enumerate(given.tolist()):
            alone = model.states(prefix[row : row + 1], mask[row : row + 1], select(frames, row, 0, 9))
            torch.testing.assert_close(h[row], alone[0, n], rtol=0, atol=1e-5)
        # Each row goes on with its own next frames.
        for i in range(3):
            rows, t = torch.arange(3), given + i
            h, cache = model.step(
                frames.codes[rows, :, t][:, :, None], frames.latents[rows, t][:, None],
                frames.features[rows, t][:, None], cache,
            )  # fmt: skip
        for row, n in enumerate(given.tolist()):
            alone = model.states(prefix[row : row + 1], mask[row : row + 1], select(frames, row, 0, 9))
            torch.testing.assert_close(h[row], alone[0, n + 3], rtol=0, atol=1e-5)


def test_selected_rows_of_a_cache_go_on_alone():
    model, frames = tiny_model(), tiny_frames()
    prefix, mask = tiny_prefix()
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        _, cache = model.start(prefix, mask)
        for t in range(3):
            h, cache = _step(model, frames, t, cache)
        chosen = cache.select(rows)
        expected, _ = _step(model, frames, 3, cache)
        codes, latents = frames.codes[rows, :, 3:4], frames.latents[rows, 3:4]
        h, _ = model.step(codes, latents, None, chosen)
    torch.testing.assert_close(h, expected[rows], rtol=0, atol=1e-5)


@variants
def test_a_row_is_scored_the_same_alone_and_in_a_batch(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    with torch.no_grad():
        together = model.nll(prefix, mask, frames, ended=ENDED)
        for row, length in enumerate(LENGTHS):
            real = slice(6 - PREFIX_LENGTHS[row], 6)
            one = slice(row, row + 1)
            alone = model.nll(prefix[one, real], mask[one, real], select(frames, row), ended=ENDED[one])
            torch.testing.assert_close(together.codes[one, :, :length], alone.codes, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.latents[one, :length], alone.latents, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.stop[one, : length + 1], alone.stop, rtol=0, atol=1e-5)
            assert torch.equal(together.correct[one, :, :length], alone.correct)


@variants
def test_later_frames_leave_earlier_states_bit_identical(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    with torch.no_grad():
        before = model.states(prefix, mask, frames)
        for t in (0, 3, 8):
            after = model.states(prefix, mask, _changed_from(frames, t))
            assert torch.equal(before[:, : t + 1], after[:, : t + 1])
            assert not torch.allclose(before[:, t + 1], after[:, t + 1])


@variants
def test_no_gradient_flows_from_a_state_to_its_own_or_later_frames(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    latents, features = frames.latents.clone().requires_grad_(), frames.features.clone().requires_grad_()
    frames = dataclasses.replace(frames, latents=latents, features=features)
    seen = {"latents": latents, "features": features}.get(model.config.continuous)
    for t in (0, 4, 9):
        h = model.states(prefix, mask, frames)[:, t]
        if seen is None:
            continue
        (gradient,) = torch.autograd.grad(h.square().sum(), seen, allow_unused=True)
        assert gradient[:, t:].abs().sum() == 0
        assert t == 0 or gradient[:, :t].abs().amax(dim=(0, 2)).min() > 0


@variants
def test_what_lies_in_the_padding_changes_nothing(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    prefix, mask = tiny_prefix()
    other = tiny_frames(seed=5)
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    changed = AudioFrames(
        codes=torch.where(padding[:, None], other.codes, frames.codes),
        latents=torch.where(padding[..., None], other.latents, frames.latents),
        features=torch.where(padding[..., None], other.features, frames.features),
        lengths=frames.lengths,
    )
    with torch.no_grad():
        before = model.nll(prefix, mask, frames, ended=ENDED)
        after = model.nll(torch.where(mask, prefix, 0), mask, changed, ended=ENDED)
    for field in ("codes", "latents", "stop", "correct"):
        assert torch.equal(getattr(before, field), getattr(after, field))


@variants
def test_nothing_is_scored_in_the_padding_and_all_is_scored_elsewhere(variant):
    model, frames = tiny_model(**VARIANTS[variant]), tiny_frames()
    config = model.config
    nll = model.nll(*tiny_prefix(), frames, ended=ENDED)
    valid = torch.arange(max(LENGTHS)) < frames.lengths[:, None]
    assert torch.equal(nll.mask, valid)
    assert nll.codes.shape == (3, config.output_codebooks, 9)
    assert torch.equal(nll.codes != 0, valid[:, None].expand_as(nll.codes))
    assert torch.equal(nll.latents != 0, valid & config.predicts_latents)
    expected = torch.arange(10) < (frames.lengths + ENDED)[:, None]
    assert torch.equal(nll.stop != 0, expected)
    assert torch.equal(nll.stop_mask, expected)
    sums = nll.codes.sum() + nll.latents.sum() + nll.stop.sum()
    torch.testing.assert_close(nll.total().sum(), sums)


def test_the_stop_is_asked_for_at_the_end_and_nowhere_else():
    model, frames = tiny_model(), tiny_frames()
    h = model.states(*tiny_prefix(), frames)
    nll = model.nll(*tiny_prefix(), frames, ended=ENDED)
    log_stop = torch.nn.functional.logsigmoid(model.stop_logit(h))
    log_go = torch.nn.functional.logsigmoid(-model.stop_logit(h))
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(nll.stop[row, :length], -log_go[row, :length])
        expected = -log_stop[row, length] if ENDED[row] else torch.tensor(0.0)
        torch.testing.assert_close(nll.stop[row, length], expected)


def test_the_heads_score_what_their_own_functions_say():
    model, frames = tiny_model(), tiny_frames()
    with torch.no_grad():
        h = model.states(*tiny_prefix(), frames)
        nll = model.nll(*tiny_prefix(), frames)
        for row, t in ((0, 0), (1, 4), (2, 3)):
            codes, state = frames.codes[row, :, t][None], h[row, t][None]
            torch.testing.assert_close(nll.codes[row, :, t], -model.code_head.log_prob(state, codes)[0])
            density = model.latent_distribution(state, codes)
            torch.testing.assert_close(nll.latents[row, t], -density.log_prob(frames.latents[row, t][None])[0])


def test_a_fraction_of_the_frames_is_scored_like_the_whole():
    model, frames = tiny_model(), tiny_frames()
    with torch.no_grad():
        whole = model.nll(*tiny_prefix(), frames)
        part = model.nll(*tiny_prefix(), frames, head_fraction=0.5, generator=torch.Generator().manual_seed(0))
    assert 0 < part.mask.sum() < whole.mask.sum()
    assert (part.mask & ~whole.mask).sum() == 0
    torch.testing.assert_close(part.latents, whole.latents * part.mask)
    torch.testing.assert_close(part.codes, whole.codes * part.mask[:, None])
    torch.testing.assert_close(part.stop, whole.stop)


@variants
def test_every_parameter_gets_a_gradient_and_moves(variant):
    torch.manual_seed(0)
    model = HybridLM(tiny_config(**VARIANTS[variant])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        nll = model(*tiny_prefix(seed), tiny_frames(seed), ended=ENDED, generator=generator, with_flow=True)
        optimizer.zero_grad()
        (nll.total().sum() + (0.0 if nll.flow is None else nll.flow.sum())).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("variant", ["hybrid", "continuous", "discrete", "whisper-gpt"])
def test_one_batch_is_learned_by_heart(variant):
    torch.manual_seed(0)
    changes = {"history_noise": 0.0, **VARIANTS[variant]}
    model, frames = HybridLM(tiny_config(**changes)).train(), tiny_frames()
    prefix, mask = tiny_prefix()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        nll = model(prefix, mask, frames, ended=ENDED)
        optimizer.zero_grad()
        nll.total().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    counted = int(frames.lengths.sum())
    with torch.no_grad():
        learned = model.eval().nll(prefix, mask, frames, ended=ENDED)
    if model.config.uses_codes:
        assert learned.codes.sum() / (counted * model.config.output_codebooks) < 0.2
        assert learned.correct[learned.mask[:, None].expand_as(learned.correct)].float().mean() > 0.97
    if model.config.predicts_latents:
        assert learned.latents.sum() / counted < -5.0
    assert learned.stop.sum() / counted < 0.1


def test_noise_meets_the_long_history_in_training_alone():
    model, frames = tiny_model(), tiny_frames()
    prefix, mask = tiny_prefix()
    with torch.no_grad():
        clean = model.states(prefix, mask, frames)
        model.train()
        noised = model.states(prefix, mask, frames, generator=torch.Generator().manual_seed(0))
        again = model.states(prefix, mask, frames, generator=torch.Generator().manual_seed(0))
        other = model.states(prefix, mask, frames, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noised, again)
    assert not torch.allclose(noised, other)
    assert torch.equal(noised[:, 0], clean[:, 0]), "no frame, no noise"
    assert not torch.allclose(noised[:, 1:], clean[:, 1:])


def test_the_short_path_stays_clean_under_noise():
    model, frames = tiny_model(), tiny_frames()
    with torch.no_grad():
        model.fusion.continuous.weight.zero_()  # now latents reach the state by the short path alone
        clean = model.states(*tiny_prefix(), frames)
        noised = model.train().states(*tiny_prefix(), frames, generator=torch.Generator().manual_seed(0))
        assert torch.equal(noised, clean)
        late = model.states(*tiny_prefix(), _changed_from(frames, 5))
    assert not torch.allclose(clean[:, 6], late[:, 6])


def test_the_short_path_sees_its_window_and_no_more():
    model = tiny_model()
    short, latents = model.short_context, torch.randn(1, 9, 5, requires_grad=True)
    for t in range(10):
        (gradient,) = torch.autograd.grad(short(latents)[0, t].sum(), latents)
        seen = gradient.abs().sum(dim=-1)[0] > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - 4), t))


def test_history_noise_keeps_the_variance_and_has_the_stated_share():
    x = torch.randn(2000, 10, 4)
    noised = history_noise(x, 1.0, torch.Generator().manual_seed(0))
    assert noised.var().item() == pytest.approx(1.0, abs=0.02)
    # E sqrt(1 - k) = 2 / 3 for k ~ U(0, 1): the correlation with the clean history
    assert (x * noised).mean().item() == pytest.approx(2 / 3, abs=0.02)
    assert torch.equal(history_noise(x, 0.0), x)
    per_frame = (x * noised).mean(dim=-1)
    assert per_frame.std() > 0.1


def test_the_scale_of_latents_is_taken_off_and_put_back():
    """A model told that latents are y = m + s * x scores y as the plain model scores x, but for the volume."""
    plain, scaled, frames = tiny_model(), tiny_model(), tiny_frames()
    mean, std = torch.randn(5), torch.rand(5) + 0.5
    scaled.statistics.set(latent_mean=mean, latent_std=std)
    for model in (plain, scaled):
        model.latent_head.scale_floor = 0.0
    shifted = dataclasses.replace(frames, latents=mean + std * frames.latents)
    with torch.no_grad():
        a = plain.nll(*tiny_prefix(), frames)
        b = scaled.nll(*tiny_prefix(), shifted)
    torch.testing.assert_close(b.codes, a.codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.latents, a.latents + std.log().sum() * a.mask, rtol=1e-4, atol=1e-3)


def test_a_dropped_condition_leaves_the_audio_id_alone():
    _, mask = tiny_prefix()
    everyone = drop_conditions(mask, 1.0)
    assert everyone.sum(dim=1).tolist() == [1, 1, 1]
    assert everyone[:, -1].all()
    assert torch.equal(drop_conditions(mask, 0.0), mask)
    many = drop_conditions(torch.ones(4000, 3, dtype=torch.bool), 0.25, torch.Generator().manual_seed(0))
    assert (many.sum(dim=1) == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert set(many.sum(dim=1).tolist()) == {1, 3}


def test_a_hidden_condition_is_no_condition():
    model, frames = tiny_model(), tiny_frames()
    prefix, mask = tiny_prefix()
    with torch.no_grad():
        hidden = model.states(prefix, drop_conditions(mask, 1.0), frames)
        absent = model.states(prefix[:, -1:], torch.ones(3, 1, dtype=torch.bool), frames)
        shown = model.states(prefix, mask, frames)
    torch.testing.assert_close(hidden, absent, rtol=0, atol=1e-5)
    assert not torch.allclose(hidden[:2], shown[:2])


def test_padding_costs_a_dense_mask_and_nothing_else():
    """Without padding the causal kernel is used, with padding a dense mask; the states are the same."""
    model, frames = tiny_model(), tiny_frames()
    prefix = torch.randint(0, 50, (3, 4))
    with torch.no_grad():
        plain = model.states(prefix, torch.ones(3, 4, dtype=torch.bool), frames)
        wide = torch.cat([torch.zeros(3, 2, dtype=torch.int64), prefix], dim=1)
        mask = torch.arange(6).expand(3, -1) >= 2
        torch.testing.assert_close(model.states(wide, mask, frames), plain, rtol=0, atol=1e-5)


def test_alignment_is_a_distribution_over_the_text():
    model, frames = tiny_model(), tiny_frames()
    prefix, mask = tiny_prefix()
    text = mask.clone()
    text[:, -1] = False
    alignment = model.alignment(prefix, mask, frames, text)
    assert alignment.shape == (3, 2, 9, 6)
    torch.testing.assert_close(alignment[:2].sum(dim=-1), torch.ones(2, 2, 9))
    assert alignment[:2].masked_select(~text[:2, None, None]).abs().max() < 1e-6
    nll = model.nll(prefix, mask, frames, text_mask=text, aligned=torch.tensor([True, False, True]))
    expected = alignment_loss(alignment, text, frames.lengths)
    assert nll.alignment.tolist() == [pytest.approx(expected[0].item(), abs=1e-6), 0.0, 0.0]
    nll.alignment.sum().backward()
    attention = model.decoder.layers[1].attention.qkv.weight.grad
    queries, keys = attention[:16], attention[32:40]  # two of four heads; the one group that they share
    assert queries.abs().sum() > 0
    assert keys.abs().sum() > 0
    assert model.fusion.codes.weight.grad.abs().sum() > 0


def test_the_alignment_loss_wants_the_diagonal():
    text = torch.ones(1, 8, dtype=torch.bool)
    lengths = torch.tensor([8])
    diagonal = torch.eye(8)[None, None]
    assert alignment_loss(diagonal, text, lengths).item() < 1e-6
    uniform = torch.full((1, 1, 8, 8), 1 / 8)
    flipped = diagonal.flip(-1)
    order = [alignment_loss(a, text, lengths).item() for a in (diagonal, uniform, flipped)]
    assert order == sorted(order)
    # Tachibana et al., by hand: piece 8 of 8 at frame 1 of 8 is 7/8 off
    corner = torch.zeros(1, 1, 1, 8)
    corner[..., 7] = 1.0
    only = alignment_loss(torch.cat([corner, diagonal[:, :, 1:]], dim=2), text, lengths)
    by_hand = (1 - torch.exp(torch.tensor(-((7 / 8) ** 2) / (2 * 0.2**2)))) / 8
    torch.testing.assert_close(only[0], by_hand)


def test_no_alignment_heads_no_alignment():
    model = tiny_model(alignment_heads=0)
    prefix, mask = tiny_prefix()
    with pytest.raises(ValueError, match="alignment_heads=0"):
        model.alignment(prefix, mask, tiny_frames(), mask)


def test_no_weight_is_stored_twice():
    state = tiny_model().state_dict()
    assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel()}) == sum(
        tensor.numel() > 0 for tensor in state.values()
    )
