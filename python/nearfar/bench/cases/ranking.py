"""Triplet losses of a labelled batch, value and gradient: against dense torch and pytorch-metric-learning."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, gradient_step, load

MARGIN = 0.2


def _classes(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    # Half way through training: classes show, and overlap.
    labels = rng.integers(0, shape["classes"], shape["n"])
    means = rng.standard_normal((shape["classes"], shape["d"]), np.float32)
    return {"x": 0.5 * means[labels] + rng.standard_normal((shape["n"], shape["d"]), np.float32), "labels": labels}


def _ours(mining: str) -> Any:
    def ours(problem: Problem) -> Step:
        x, labels = problem["x"], problem["labels"]
        try:
            labels = load("torch").from_numpy(labels)
        except ModuleNotFoundError:
            return functools.partial(nf.value_and_grad(nf.batch_triplet_loss), x, labels, mining=mining, margin=MARGIN)
        return gradient_step(lambda x: nf.batch_triplet_loss(x, labels, mining=mining, margin=MARGIN), x)

    return ours


def _dense(mining: str) -> Any:
    """The N x N matrices that people write; semihard by sorting the negatives of every row."""

    def dense(problem: Problem) -> Step:
        torch, F = load("torch"), load("torch.nn.functional")
        labels = torch.from_numpy(problem["labels"])
        same = labels[:, None] == labels
        positive = same & ~torch.eye(len(labels), dtype=torch.bool)
        rows, columns = torch.nonzero(positive, as_tuple=True)
        negatives = (~same).sum(1)

        def loss(x: Any) -> Any:
            u = F.normalize(x, dim=1)
            d = torch.cdist(u, u)
            if mining == "hard":
                farthest = d.masked_fill(~positive, -1).amax(1)
                return F.relu(farthest - d.masked_fill(same, torch.inf).amin(1) + MARGIN).mean()
            with torch.no_grad():
                ascending, index = d.masked_fill(same, torch.inf).sort(1)
                place = torch.searchsorted(ascending, d, right=True)[rows, columns]
                chosen = index[rows, torch.minimum(place, negatives[rows] - 1)]
            return F.relu(d[rows, columns] - d[rows, chosen] + MARGIN).mean()

        return gradient_step(loss, problem["x"])

    return dense


def _metric_learning_hard(problem: Problem) -> Step:
    library = "pytorch_metric_learning."
    distance = load(library + "distances").LpDistance()
    miner = load(library + "miners").BatchHardMiner(distance=distance)
    mean = load(library + "reducers").MeanReducer()
    loss = load(library + "losses").TripletMarginLoss(MARGIN, distance=distance, reducer=mean)
    labels = load("torch").from_numpy(problem["labels"])
    return gradient_step(lambda x: loss(x, labels, miner(x, labels)), problem["x"])


def _reference(mining: str) -> Any:
    def evaluate(problem: Problem) -> tuple[Array, ...]:
        u, labels = reference.unit(problem["x"]), problem["labels"]
        value, count, du = 0.0, 0, np.zeros_like(u)
        for i in range(len(u)):
            difference = u[i] - u
            d = np.sqrt((difference * difference).sum(1))
            same = labels == labels[i]
            negatives = np.flatnonzero(~same)
            same[i] = False
            positives = np.flatnonzero(same)
            if mining == "hard":
                positives = positives[[d[positives].argmax()]]
                chosen = negatives[[d[negatives].argmin()]]
            else:
                negatives = negatives[np.argsort(d[negatives], kind="stable")]
                place = np.searchsorted(d[negatives], d[positives], "right")
                chosen = negatives[np.minimum(place, len(negatives) - 1)]
            terms = d[positives] - d[chosen] + MARGIN
            value += float(terms[terms > 0].sum())
            count += len(terms)
            for index, sign in ((positives, 1.0), (chosen, -1.0)):
                pull = np.where(terms > 0, sign / d[index], 0.0)[:, None] * difference[index]
                du[i] += pull.sum(0)
                np.subtract.at(du, index, pull)
        return np.float64(value / count), reference.through_unit(problem["x"], du / count)

    return evaluate


def _case(mining: str, peers: dict[str, Any]) -> Case:
    return Case(
        name=f"batch_triplet_{mining}",
        what=f"batch_triplet_loss, {mining}, value and gradient",
        shapes=({"n": 4096, "d": 128, "classes": 100},),
        quick={"n": 256, "d": 128, "classes": 16},
        make=_classes,
        ours=_ours(mining),
        peers={"torch dense": _dense(mining), **peers},
        reference=_reference(mining),
        flops=lambda s: 2 * s["n"] ** 2 * s["d"],  # distances; the gradient touches few pairs
    )


BATCH_TRIPLET_HARD = _case("hard", {"pytorch-metric-learning": _metric_learning_hard})
# pytorch-metric-learning's semihard is another set of triplets, and cubic. Which negative is the closest beyond a
# positive depends on the last bit now and then: errors at the full size count those.
BATCH_TRIPLET_SEMIHARD = _case("semihard", {})
