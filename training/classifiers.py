"""Probes of frozen vectors: the two of X-ARES, a linear layer and nearest neighbours, and a logistic regression.

Source: the package `xares` 0.1.3 (repository jimbozhang/xares): LayerNorm + Linear under cross-entropy, Adam at 1e-3
with cosine decay to a tenth, epoch by epoch, 10 epochs, batches of 32, seed 42; and the 10 nearest neighbours by
cosine, voting with weights softmax(cosine / 0.07). Deviation: `xares` keeps the epoch that does best on the validation
split, which under its cross-validation is the fold that it scores; here the last epoch counts.

Ten epochs of a few hundred clips are far from convergence, so that X-ARES' linear layer also measures how fast it
learns: wide vectors of a suitable scale do better for that alone. The logistic regression (L2, dimensions standardized
on the training clips) is at its optimum, which neither scale nor width nor a seed decides.

Shapes: N training clips, M test clips, E width of a vector, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Method = Literal["linear", "knn", "logistic"]
METHODS: tuple[Method, ...] = ("linear", "knn", "logistic")
EPOCHS, BATCH_SIZE, LEARNING_RATE, FINAL_RATIO = 10, 32, 1e-3, 0.1
NEIGHBORS, TEMPERATURE = 10, 0.07
PENALTY, MAX_ITERATIONS = 1.0, 300
_TEST_ROWS = 1024


def classify(
    method: Method,
    train: Float[Tensor, "N E"],
    targets: Int[Tensor, " N"],
    test: Float[Tensor, "M E"],
    *,
    seed: int = 42,
) -> Int[Tensor, " M"]:
    """The class of each test vector, always one that occurs in `targets`.

    Args:
        method: `linear`, `knn` or `logistic`.
        train: Vectors to learn from.
        targets: Their classes, any whole numbers.
        test: Vectors to tell the class of.
        seed: Of the linear layer's first weights and the order of its clips; the others need none.
    """
    classes, dense = torch.unique(targets, return_inverse=True)
    if method == "linear":
        scores = _batched(linear_probe(train, dense, len(classes), seed=seed), test)
    elif method == "logistic":
        scores = _batched(logistic_regression(train, dense, len(classes)), test)
    else:
        scores = _batched(lambda rows: neighbor_votes(train, dense, rows, len(classes)), test)
    return classes[scores.argmax(dim=1)]


def linear_probe(
    train: Float[Tensor, "N E"], targets: Int[Tensor, " N"], num_classes: int, *, seed: int = 42
) -> nn.Module:
    """Train LayerNorm and one Linear; on the CPU, so that the same seed gives the same probe everywhere.

    Args:
        train: Vectors to learn from.
        targets: Their classes, in [0, num_classes).
        num_classes: Rows of the linear layer.
        seed: Of the first weights and the order of the clips.
    """
    generator = torch.Generator().manual_seed(seed)
    width = train.shape[1]
    linear = nn.utils.skip_init(nn.Linear, width, num_classes)
    for parameter in linear.parameters():  # PyTorch's own bound for a Linear, drawn from our generator
        nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    probe = nn.Sequential(nn.LayerNorm(width), linear)
    optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE)
    with torch.inference_mode(False), torch.enable_grad():
        vectors = train.clone()  # vectors computed in inference mode can't be trained on
        for epoch in range(EPOCHS):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (
                    FINAL_RATIO + (1 - FINAL_RATIO) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
                )
            for rows in torch.randperm(len(vectors), generator=generator).split(BATCH_SIZE):
                loss = F.cross_entropy(probe(vectors[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return probe


def logistic_regression(
    train: Float[Tensor, "N E"], targets: Int[Tensor, " N"], num_classes: int
) -> Callable[[Float[Tensor, "M E"]], Float[Tensor, "M C"]]:
    """argmin_{W, b} sum_n -log softmax(W x_n + b)[c_n] + |W|^2 / 2, x standardized, by L-BFGS from zero, in float64.

    Args:
        train: Vectors to learn from.
        targets: Their classes, in [0, num_classes).
        num_classes: Columns of the scores.

    Returns:
        What scores other vectors; a dimension that is constant in `train` is left out.
    """
    with torch.inference_mode(False), torch.enable_grad():
        vectors = train.clone().double()  # vectors computed in inference mode can't be trained on
        mean, deviation = vectors.mean(dim=0), vectors.std(dim=0, correction=0)
        varies = deviation > 1e-6 * mean.abs().clamp(min=1e-6)
        scale = torch.where(varies, 1 / deviation.where(varies, 1.0), 0.0)
        standard = (vectors - mean) * scale
        weights = torch.zeros(num_classes, vectors.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            scores = standard @ weights[:, :-1].T + weights[:, -1]
            loss = F.cross_entropy(scores, targets, reduction="sum")
            loss = (loss + PENALTY / 2 * weights[:, :-1].square().sum()) / len(vectors)
            loss.backward()
            return loss

        optimizer.step(objective)
    found = weights.detach()
    return lambda rows: ((rows.double() - mean) * scale) @ found[:, :-1].T + found[:, -1]


def neighbor_votes(
    train: Float[Tensor, "N E"], targets: Int[Tensor, " N"], test: Float[Tensor, "M E"], num_classes: int
) -> Float[Tensor, "M C"]:
    """Votes of the nearest training vectors by cosine; all of them vote where there are fewer than ten.

    Args:
        train: Vectors to compare with.
        targets: Their classes, in [0, num_classes).
        test: Vectors that ask.
        num_classes: Columns of the result.
    """
    cosine = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T  # (M, N)
    nearest, rows = cosine.topk(min(NEIGHBORS, len(train)), dim=1)
    weights = (nearest / TEMPERATURE).softmax(dim=1)
    return torch.zeros(len(test), num_classes, dtype=weights.dtype).scatter_add(1, targets[rows], weights)


def _batched(score: Callable[[Tensor], Tensor], test: Float[Tensor, "M E"]) -> Float[Tensor, "M C"]:
    with torch.no_grad():
        return torch.cat([score(rows) for rows in test.split(_TEST_ROWS)])
