"""Losses that are functions of log-sum-exps by label, value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, gradient_step, load, our_gradient_step
from .losses import NT_XENT
from .losses import SIMCLR_TEMPERATURE as TEMPERATURE

TAU_PLUS = 0.1

# ---- HCL -------------------------------------------------------------------------------------------------------------


def _hcl_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    n = problem.shape["n"]
    m, index = 2 * n - 2, torch.arange(2 * n)

    def loss(z1: Any, z2: Any) -> Any:  # the published code with its masks made cheap
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        s = z @ z.T / TEMPERATURE
        positive = s[index, (index + n) % (2 * n)]
        s[index, index] = -torch.inf
        s[index, (index + n) % (2 * n)] = -torch.inf
        reweighted = m * (torch.logsumexp(2 * s, 1) - torch.logsumexp(s, 1)).exp()
        negative = (reweighted - TAU_PLUS * m * positive.exp()) / (1 - TAU_PLUS)
        negative = negative.clamp(min=m * np.exp(-1 / TEMPERATURE))
        return torch.log1p(negative / positive.exp()).mean()

    return gradient_step(loss, problem["query"], problem["key"])


def _hcl_reference(problem: Problem) -> tuple[Array, ...]:
    z = np.concatenate([problem["query"], problem["key"]])
    u, n, scale = reference.unit(z), len(z) // 2, 1 / TEMPERATURE
    m, value, du = 2 * n - 2, 0.0, np.zeros_like(u)
    for rows in reference.blocks(2 * n):
        s = scale * (u[rows] @ u.T)
        own = np.arange(len(s))
        other = (rows.start + own + n) % (2 * n)
        positive = s[own, other]
        s[own, rows.start + own] = s[own, other] = -np.inf
        e, ee = np.exp(s), np.exp(2 * s)
        first, second = e.sum(1), ee.sum(1)
        estimate = (m * second / first - TAU_PLUS * m * np.exp(positive)) / (1 - TAU_PLUS)
        bound = m * np.exp(-scale)
        negative = np.maximum(estimate, bound)
        total = negative + np.exp(positive)
        value += float(np.log(total).sum() - positive.sum())
        # d loss / d R, spread over the negatives; and d loss / d positive.
        on = np.where(estimate > bound, m / ((1 - TAU_PLUS) * total), 0.0)
        weights = (on * second / first)[:, None] * (2 * ee / second[:, None] - e / first[:, None])
        weights[own, other] = np.exp(positive) / total - 1 - on * TAU_PLUS * np.exp(positive)
        du[rows] += weights @ u
        du += weights.T @ u[rows]
    dz = reference.through_unit(z, du * (scale / (2 * n)))
    return np.float64(value / (2 * n)), dz[:n], dz[n:]


HCL = Case(
    name="hcl",
    what="hcl_loss, value and gradient: two views of n",
    shapes=({"views": 2, "n": 4096, "d": 128},),
    quick={"views": 2, "n": 128, "d": 128},
    make=NT_XENT.make,
    ours=lambda p: our_gradient_step(nf.hcl_loss, p["query"], p["key"], temperature=TEMPERATURE, tau_plus=TAU_PLUS),
    peers={"torch dense": _hcl_dense},
    reference=_hcl_reference,
    flops=NT_XENT.flops,
)


# ---- multi-similarity ------------------------------------------------------------------------------------------------

ALPHA, BETA, BASE, PER_CLASS = 2.0, 50.0, 0.5, 4


def _classes(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    labels = np.arange(shape["n"]) // PER_CLASS
    centres = rng.standard_normal((shape["n"] // PER_CLASS + 1, shape["d"]), np.float32)
    x = centres[labels] + rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "labels": labels}


def _multi_similarity(problem: Problem) -> Step:
    try:
        labels = load("torch").from_numpy(problem["labels"])
    except ModuleNotFoundError:
        labels = problem["labels"]
    return our_gradient_step(nf.multi_similarity_loss, problem["x"], labels=labels, alpha=ALPHA, beta=BETA, base=BASE)


def _multi_similarity_peer(problem: Problem) -> Step:
    torch, losses = load("torch"), load("pytorch_metric_learning.losses")
    loss, labels = losses.MultiSimilarityLoss(alpha=ALPHA, beta=BETA, base=BASE), torch.from_numpy(problem["labels"])
    return gradient_step(lambda x: loss(x, labels), problem["x"])


def _multi_similarity_reference(problem: Problem) -> tuple[Array, ...]:
    u, labels = reference.unit(problem["x"]), problem["labels"]
    n, value, du = len(u), 0.0, np.zeros_like(u)
    for rows in reference.blocks(n):
        s = u[rows] @ u.T
        same = labels[rows, None] == labels
        e = np.where(same, np.exp(-ALPHA * (s - BASE)), np.exp(BETA * (s - BASE)))
        e[np.arange(len(s)), rows.start + np.arange(len(s))] = 0
        pull, push = 1 + (e * same).sum(1, keepdims=True), 1 + (e * ~same).sum(1, keepdims=True)
        value += float((np.log(pull) / ALPHA + np.log(push) / BETA).sum())
        weights = np.where(same, -e / pull, e / push)
        du[rows] += weights @ u
        du += weights.T @ u[rows]
    return np.float64(value / n), reference.through_unit(problem["x"], du / n)


MULTI_SIMILARITY = Case(
    name="multi_similarity",
    what="multi_similarity_loss, value and gradient: four rows a class, all pairs",
    shapes=({"n": 4096, "d": 128},),
    quick={"n": 256, "d": 128},
    make=_classes,
    ours=_multi_similarity,
    peers={"metric-learning": _multi_similarity_peer},
    reference=_multi_similarity_reference,
    flops=lambda s: 2 * 2 * s["n"] ** 2 * s["d"],  # as NT-Xent
)
