"""The flow head: learns a conditional density, in one step too, row by row, and stays out of all likelihoods."""

from __future__ import annotations

import pytest
import torch

from hybridlm.flow_head import FlowHead
from hybridlm.model import HybridLM
from tests.support.tiny_frames import CODEBOOKS, SIZE, tiny_config, tiny_frames, tiny_model, tiny_prefix

FLOW = {"flow_layers": 2, "flow_dim": 32, "flow_draws": 4}


def sides(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """States (count, 32) that say a side, and the sides (count, 1), -1 or 1."""
    side = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1.0
    return side.expand(-1, 32), side


def trained(distill: float) -> FlowHead:
    """Latents are 1.5 to one side, with a spread of 0.3."""
    model = tiny_model(representation="continuous", **FLOW, flow_distill=distill)
    head = model.flow_head
    assert head is not None
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 300)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        h, side = sides(64, generator)
        latents = 1.5 * side + 0.3 * torch.randn(64, model.config.latent_dim, generator=generator)
        optimizer.zero_grad()
        head.loss(h, None, latents, generator).mean().backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@pytest.fixture(scope="module")
def distilled() -> FlowHead:
    return trained(1.0)


@torch.no_grad()
def errors(head: FlowHead, **settings: float) -> torch.Tensor:
    """(rows, D): drawn latents from where the side is."""
    h, side = sides(400, torch.Generator().manual_seed(2))
    return head.sample(h, None, [torch.Generator().manual_seed(3)] * 400, **settings) - 1.5 * side  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 4])
def test_it_learns_the_density(distilled: FlowHead, steps: int) -> None:
    error = errors(distilled, num_steps=steps)
    assert float(error.mean(dim=0).abs().max()) < 0.15
    assert float(error.std()) == pytest.approx(0.3, abs=0.1)
    assert float(errors(distilled, num_steps=steps, temperature=0.25).std()) < 0.75 * float(error.std())


def test_one_step_needs_distillation() -> None:
    """Undistilled, one Euler step gives the mean alone: no spread is left."""
    head = trained(0.0)
    assert float(errors(head, num_steps=1).std()) < 0.5 * float(errors(head, num_steps=8).std())


def test_rows_are_independent_of_the_batch() -> None:
    model = tiny_model(representation="hybrid", **FLOW, flow_distill=1.0)
    head = model.flow_head
    assert head is not None
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.2)
    h, codes = torch.randn(3, 32), torch.randint(SIZE, (3, CODEBOOKS))

    def draw(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return head.sample(h[rows], codes[rows], generators, num_steps=2)

    torch.testing.assert_close(draw([0, 1, 2])[1:2], draw([1]))
    assert not torch.allclose(head.sample(h[:1], codes[1:2], [torch.Generator().manual_seed(0)]), draw([0]))


def test_it_is_no_likelihood() -> None:
    """With or without a flow head the same weights give the same NLL; its loss is in no total."""
    model = tiny_model(representation="hybrid", **FLOW)
    without = HybridLM(tiny_config(representation="hybrid"))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("flow_head")})
    ids, mask = tiny_prefix()
    batch = tiny_frames()
    for one in (model, without):
        one.train()
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    a = model.nll(ids, mask, batch, generator=seeds[0], with_flow=True)
    b = without.nll(ids, mask, batch, generator=seeds[1], with_flow=True)
    assert a.flow is not None and b.flow is None
    torch.testing.assert_close(a.total(), b.total())
    assert bool((a.flow[a.mask] > 0).all()) and not bool(a.flow[~a.mask].any())
    assert model.nll(ids, mask, batch).flow is None


def test_a_discrete_model_has_none() -> None:
    with pytest.raises(ValueError, match="flow_layers=2: representation=discrete predicts no latents"):
        tiny_config(representation="discrete", **FLOW)
