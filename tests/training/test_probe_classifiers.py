"""The probes: X-ARES' linear layer and neighbours, and a logistic regression, on vectors of known classes."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from training.classifiers import (
    BATCH_SIZE,
    EPOCHS,
    METHODS,
    classify,
    linear_probe,
    logistic_regression,
    neighbor_votes,
)


def blobs(per_class: int, *, classes: int = 4, seed: int = 0, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Points (N, 64) around a corner of a cube for each class."""
    corners = torch.randn(classes, 64, generator=torch.Generator().manual_seed(9)).sign()
    targets = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(targets), 64, generator=torch.Generator().manual_seed(seed))
    return corners[targets] + spread * noise, targets


@pytest.mark.parametrize("method", METHODS)
def test_separable_vectors_are_told_apart(method: str) -> None:
    train, targets = blobs(100)
    test, truth = blobs(25, seed=1)
    assert bool((classify(method, train, targets, test) == truth).all())


@pytest.mark.parametrize("method", METHODS)
def test_random_labels_stay_at_chance(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(400, 16, generator=generator), torch.randn(400, 16, generator=generator)
    targets, truth = (torch.randint(4, (400,), generator=generator) for _ in range(2))
    accuracy = (classify(method, train, targets, test) == truth).double().mean().item()
    assert abs(accuracy - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("method", METHODS)
def test_only_classes_of_the_training_are_named(method: str) -> None:
    """Classes may be any numbers; one that training lacks is never named, not even by luck."""
    train, targets = blobs(100, classes=3)
    test, _ = blobs(20, classes=4, seed=1)
    named = classify(method, train, torch.tensor([7, 2, 90])[targets], test)
    assert set(named.tolist()) <= {7, 2, 90}
    assert named[:20].tolist() == [7] * 20


def test_the_linear_probe_is_decided_by_its_seed_alone() -> None:
    train, targets = blobs(20, spread=1.0)
    torch.manual_seed(1)
    first = linear_probe(train, targets, 4, seed=5).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = (linear_probe(train, targets, 4, seed=seed).state_dict() for seed in (5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_the_linear_probe_trains_as_x_ares_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's learning rate: 1e-3 at first, cosine to a tenth, changed by the epoch; all weights move."""
    rates, sizes = [], []
    step, loss = torch.optim.Adam.step, torch.nn.functional.cross_entropy

    def noted(self: torch.optim.Adam, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    def counted(scores: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(targets))
        return loss(scores, targets)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    train, targets = blobs(20)
    probe = linear_probe(train, targets, 4)
    assert [type(layer).__name__ for layer in probe] == ["LayerNorm", "Linear"]
    batches = math.ceil(len(train) / BATCH_SIZE)
    assert sizes == [32, 32, 16] * EPOCHS
    expected = [1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(batches)])
    assert not torch.equal(probe[0].weight, torch.ones(64)) and bool((probe[0].bias != 0).all())


def brute_force(train: Tensor, targets: Tensor, one: Tensor, classes: int) -> list[float]:
    """The votes for one vector, in plain Python."""
    cosines = []
    for vector, target in zip(train.double(), targets.tolist(), strict=True):
        cosines.append((float(vector @ one.double()) / (float(vector.norm()) * float(one.double().norm())), target))
    nearest = sorted(cosines, reverse=True)[:10]
    weights = [math.exp(cosine / 0.07) for cosine, _ in nearest]
    votes = [0.0] * classes
    for weight, (_, target) in zip(weights, nearest, strict=True):
        votes[target] += weight / sum(weights)
    return votes


@pytest.mark.parametrize("count", [60, 6])
def test_neighbors_vote_like_brute_force(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    train, test = torch.randn(count, 5, generator=generator), torch.randn(9, 5, generator=generator)
    targets = torch.randint(3, (count,), generator=generator)
    votes = neighbor_votes(train, targets, test, 3)
    for row, one in zip(votes, test, strict=True):
        assert row.tolist() == pytest.approx(brute_force(train, targets, one, 3), abs=1e-4)


def test_many_test_vectors_are_scored_in_pieces() -> None:
    train, targets = blobs(10)
    test, truth = blobs(300, seed=1)
    assert len(test) > 1024
    assert bool((classify("knn", train, targets, test) == truth).all())


def test_the_logistic_regression_is_that_of_scikit_learn() -> None:
    """With C=1 on standardized vectors, and as sure of its classes."""
    train, targets = blobs(12, spread=3.0)
    test, _ = blobs(50, spread=3.0, seed=1)
    train, test = 50 + 20 * train, 50 + 20 * test
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=5000))
    expected = torch.from_numpy(reference.fit(train.double().numpy(), targets.numpy()).predict_proba(test.numpy()))
    found = logistic_regression(train, targets, 4)(test).softmax(dim=1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert 0.3 < found.max(dim=1).values.mean() < 0.95


def test_the_logistic_regression_knows_neither_scale_nor_shift_nor_constants() -> None:
    train, targets = blobs(12, spread=3.0)
    test, _ = blobs(50, spread=3.0, seed=1)
    scale = torch.linspace(0.01, 90, 64)
    plain = logistic_regression(train, targets, 4)(test)
    moved = logistic_regression(scale * train + 7, targets, 4)(scale * test + 7)
    torch.testing.assert_close(moved, plain, atol=1e-2, rtol=1e-2)
    constant = torch.full((len(train), 1), 0.3)
    wider = logistic_regression(torch.cat([train, constant], dim=1), targets, 4)
    torch.testing.assert_close(wider(torch.cat([test, torch.full((len(test), 1), 5.0)], dim=1)), plain)


def test_vectors_of_inference_mode_can_be_probed() -> None:
    with torch.inference_mode():
        train, targets = blobs(60)
    assert all(bool((classify(method, train, targets, train) == targets).all()) for method in METHODS)
