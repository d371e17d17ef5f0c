"""Losses of classes (SupCon), DCL and SigLIP, value and gradient: against the dense torch forms that people write."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, gradient_step, load, our_gradient_step
from .losses import _matching, _pairs

TEMPERATURE = 0.1
CLASSES = 100
SCALE, BIAS = 10.0, -10.0


def _labelled(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    labels = rng.integers(0, CLASSES, shape["n"])
    centers = rng.standard_normal((CLASSES, shape["d"]), np.float32)
    return {"x": centers[labels] + rng.standard_normal((shape["n"], shape["d"]), np.float32), "labels": labels}


# ---- SupCon ----------------------------------------------------------------------------------------------------------


def _sup_con_ours(problem: Problem) -> Step:
    try:
        labels = load("torch").from_numpy(problem["labels"])
    except ModuleNotFoundError:
        labels = problem["labels"]
    return our_gradient_step(functools.partial(nf.sup_con_loss, labels=labels, temperature=TEMPERATURE), problem["x"])


def _sup_con_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    labels = torch.from_numpy(problem["labels"])

    def loss(x: Any) -> Any:
        z = F.normalize(x, dim=1)
        logits = z @ z.T / TEMPERATURE
        logits.fill_diagonal_(float("-inf"))
        positive = labels[:, None] == labels
        positive.fill_diagonal_(False)
        log_prob = torch.where(positive, torch.log_softmax(logits, 1), 0.0)
        count = positive.sum(1)
        return -(log_prob.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()

    return gradient_step(loss, problem["x"])


def _sup_con_reference(problem: Problem) -> tuple[Array, ...]:
    u, labels = reference.unit(problem["x"]), problem["labels"]
    n = len(u)
    count = np.bincount(labels)[labels] - 1
    weight = np.where(count > 0, 1 / np.maximum(count, 1), 0) / max(int((count > 0).sum()), 1)
    value, du = 0.0, np.zeros_like(u)
    for rows in reference.blocks(n):
        s = u[rows] @ u.T / TEMPERATURE
        own = np.arange(len(s))
        s[own, rows.start + own] = -np.inf
        positive = labels[rows, None] == labels
        positive[own, rows.start + own] = False
        log_sum = np.logaddexp.reduce(s, axis=1, keepdims=True)
        value -= float((np.where(positive, s - log_sum, 0) * weight[rows, None]).sum())
        g = (np.exp(s - log_sum) * count[rows, None] - positive) * weight[rows, None] / TEMPERATURE
        du[rows] += g @ u
        du += g.T @ u[rows]
    return np.float64(value), reference.through_unit(problem["x"], du)


SUP_CON = Case(
    name="sup_con",
    what=f"sup_con_loss of {CLASSES} classes, value and gradient",
    shapes=({"n": 8192, "d": 128},),
    quick={"n": 256, "d": 128},
    make=_labelled,
    ours=_sup_con_ours,
    peers={"torch dense": _sup_con_dense},
    reference=_sup_con_reference,
    flops=_pairs(2),  # scores are symmetric: half the tiles, twice; then one product
)


# ---- DCL -------------------------------------------------------------------------------------------------------------


def _dcl_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    n = problem.shape["n"]
    own = torch.arange(2 * n)
    other = (own + n) % (2 * n)

    def loss(z1: Any, z2: Any) -> Any:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = z @ z.T / TEMPERATURE
        match = logits[own, other]
        logits[own, own] = logits[own, other] = float("-inf")
        return (torch.logsumexp(logits, 1) - match).mean()

    return gradient_step(loss, problem["query"], problem["key"])


def _dcl_reference(problem: Problem) -> tuple[Array, ...]:
    z = np.concatenate([problem["query"], problem["key"]])
    n, u = len(z) // 2, reference.unit(z)
    value, du = 0.0, np.zeros_like(u)
    for rows in reference.blocks(2 * n):
        s = u[rows] @ u.T / TEMPERATURE
        own = np.arange(len(s))
        other = (rows.start + own + n) % (2 * n)
        match = s[own, other]
        s[own, rows.start + own] = s[own, other] = -np.inf
        log_sum = np.logaddexp.reduce(s, axis=1)
        value += float((log_sum - match).sum())
        g = np.exp(s - log_sum[:, None])
        g[own, other] = -1
        du[rows] += g @ u
        du += g.T @ u[rows]
    dz = reference.through_unit(z, du / (2 * n * TEMPERATURE))
    return np.float64(value / (2 * n)), dz[:n], dz[n:]


DCL = Case(
    name="dcl",
    what="dcl_loss, value and gradient: two views of n",
    shapes=({"views": 2, "n": 4096, "d": 128},),
    quick={"views": 2, "n": 128, "d": 128},
    make=_matching,
    ours=lambda p: our_gradient_step(nf.dcl_loss, p["query"], p["key"], temperature=TEMPERATURE),
    peers={"torch dense": _dcl_dense},
    reference=_dcl_reference,
    flops=lambda s: 2 * 2 * (2 * s["n"]) ** 2 * s["d"],  # as nt_xent
)


# ---- SigLIP ----------------------------------------------------------------------------------------------------------


def _siglip_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    n = problem.shape["n"]
    sign = 2 * torch.eye(n) - 1

    def loss(image: Any, text: Any) -> Any:
        logits = SCALE * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + BIAS
        return -F.logsigmoid(sign * logits).sum() / n

    return gradient_step(loss, problem["query"], problem["key"])


def _siglip_reference(problem: Problem) -> tuple[Array, ...]:
    x, y = reference.unit(problem["query"]), reference.unit(problem["key"])
    n, value, dx, dy = len(x), 0.0, np.zeros_like(x), np.zeros_like(y)
    for rows in reference.blocks(n):
        logits = SCALE * (x[rows] @ y.T) + BIAS
        own = np.arange(len(logits))
        match = logits[own, rows.start + own]
        logits[own, rows.start + own] = -match
        value += float(np.logaddexp(0, logits).sum())
        g = 1 / (1 + np.exp(-logits))
        g[own, rows.start + own] *= -1
        dx[rows] += g @ y
        dy += g.T @ x[rows]
    factor = SCALE / n
    dq, dk = reference.through_unit(problem["query"], dx * factor), reference.through_unit(problem["key"], dy * factor)
    return np.float64(value / n), dq, dk


SIGLIP = Case(
    name="siglip",
    what="siglip_loss, value and gradient",
    shapes=({"n": 8192, "d": 128},),
    quick={"n": 256, "d": 128},
    make=_matching,
    ours=lambda p: our_gradient_step(nf.siglip_loss, p["query"], p["key"], logit_scale=SCALE, logit_bias=BIAS),
    peers={"torch dense": _siglip_dense},
    reference=_siglip_reference,
    flops=_pairs(3),
)
