"""Losses, value and gradient: against the dense torch forms that people write."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, gradient_step, load, normal, our_gradient_step

TEMPERATURE = 0.07
SIMCLR_TEMPERATURE = 0.5
T = 2.0


def _pairs(units: float) -> Any:
    return lambda s: units * 2 * s["n"] ** 2 * s["d"]


def _matching(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    # Keys near their queries, as in training: independent ones would be a loss at its start only.
    query = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"query": query, "key": query + rng.standard_normal(query.shape, np.float32)}


# ---- InfoNCE, one direction ------------------------------------------------------------------------------------------


def _info_nce_of_matrices(n: int) -> Callable[[Any, Any], Any]:
    torch, F = load("torch"), load("torch.nn.functional")
    target = torch.arange(n)

    def loss(query: Any, key: Any) -> Any:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
        return F.cross_entropy(logits, target)

    return loss


def _info_nce_dense(problem: Problem) -> Step:
    return gradient_step(_info_nce_of_matrices(problem.shape["n"]), problem["query"], problem["key"])


def _info_nce_reference(problem: Problem) -> tuple[Array, ...]:
    q, k = problem["query"], problem["key"]
    own = np.arange(len(q))
    value, dq, dk = reference.cross_entropy(reference.unit(q), reference.unit(k), own, 1 / TEMPERATURE)
    return np.float64(value), reference.through_unit(q, dq), reference.through_unit(k, dk)


INFO_NCE = Case(
    name="info_nce",
    what="info_nce_loss, value and gradient",
    shapes=({"n": 8192, "d": 128}, {"n": 4096, "d": 512}, {"n": 256, "d": 128}),
    quick={"n": 256, "d": 128},
    make=_matching,
    ours=lambda p: our_gradient_step(nf.info_nce_loss, p["query"], p["key"], temperature=TEMPERATURE),
    peers={"torch dense": _info_nce_dense},
    reference=_info_nce_reference,
    flops=_pairs(3),
    sweep=(1024, 2048, 4096, 8192, 16384),
)


def _matching_bfloat16(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    upper = np.uint32(0xFFFF0000)  # half of a float32: all that a bfloat16 holds
    return {name: (a.view(np.uint32) & upper).view(np.float32) for name, a in _matching(shape, rng).items()}


def _of_bfloat16(loss: Callable[..., Any]) -> Callable[..., Any]:
    """As mixed precision hands rows over: gradients are those of float32 parameters behind a cast."""
    return lambda *rows: loss(*(row.bfloat16() for row in rows)).float()


INFO_NCE_BFLOAT16 = dataclasses.replace(
    INFO_NCE,
    name="info_nce_bfloat16",
    what="info_nce_loss of bfloat16 rows, value and gradient",
    shapes=({"n": 8192, "d": 128}, {"n": 4096, "d": 512}, {"n": 2048, "d": 768}),
    make=_matching_bfloat16,
    ours=lambda p: gradient_step(
        _of_bfloat16(functools.partial(nf.info_nce_loss, temperature=TEMPERATURE)), p["query"], p["key"]
    ),
    peers={
        "torch dense": lambda p: gradient_step(_of_bfloat16(_info_nce_of_matrices(p.shape["n"])), p["query"], p["key"])
    },
    tolerance=5e-3,  # of gradients, rounded
    peer_tolerance=0.1,  # scores too
    sweep=(),
)

# Larger than is comfortable to time densely (over 2 GB): what matters here is memory.
INFO_NCE_MEMORY = dataclasses.replace(
    INFO_NCE,
    name="info_nce_memory",
    what="info_nce_loss, value and gradient: peak extra memory",
    shapes=({"n": 16384, "d": 128},),
    timed=False,
    sweep=(),
)


# ---- InfoNCE against a queue: keys that are constant -----------------------------------------------------------------


def _with_queue(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    return {**_matching(shape, rng), "queue": rng.standard_normal((shape["m"], shape["d"]), np.float32)}


def _info_nce_queue(problem: Problem) -> Step:
    torch = load("torch")
    key, queue = (torch.from_numpy(problem[name]) for name in ("key", "queue"))
    return gradient_step(lambda query: nf.info_nce_loss(query, key, queue, temperature=TEMPERATURE), problem["query"])


def _info_nce_queue_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    key, queue = (torch.from_numpy(problem[name]) for name in ("key", "queue"))
    target = torch.zeros(problem.shape["n"], dtype=torch.int64)

    def loss(query: Any) -> Any:
        q = F.normalize(query, dim=1)
        positive = (q * F.normalize(key, dim=1)).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ F.normalize(queue, dim=1).T], 1) / TEMPERATURE
        return F.cross_entropy(logits, target)

    return gradient_step(loss, problem["query"])


def _info_nce_queue_reference(problem: Problem) -> tuple[Array, ...]:
    q, k, queue = (reference.unit(problem[name]) for name in ("query", "key", "queue"))
    value, gradient = 0.0, np.empty_like(q)
    for i in range(len(q)):  # a row's keys are its positive and the queue
        keys = np.concatenate([k[i : i + 1], queue])
        own, gradient[i : i + 1], _ = reference.cross_entropy(q[i : i + 1], keys, np.zeros(1, int), 1 / TEMPERATURE)
        value += own / len(q)
    return np.float64(value), reference.through_unit(problem["query"], gradient / len(q))


INFO_NCE_QUEUE = Case(
    name="info_nce_queue",
    what="info_nce_loss of a batch against a queue, value and gradient of the queries",
    shapes=({"n": 256, "m": 65536, "d": 128},),
    quick={"n": 32, "m": 256, "d": 16},
    make=_with_queue,
    ours=_info_nce_queue,
    peers={"torch dense": _info_nce_queue_dense},
    reference=_info_nce_queue_reference,
    flops=lambda s: 2 * 2 * s["n"] * s["m"] * s["d"],
)


# ---- CLIP: both directions -------------------------------------------------------------------------------------------


def _clip_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    target = torch.arange(problem.shape["n"])

    def loss(image: Any, text: Any) -> Any:
        logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * (1 / TEMPERATURE)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return gradient_step(loss, problem["query"], problem["key"])


def _clip_reference(problem: Problem) -> tuple[Array, ...]:
    q, k = problem["query"], problem["key"]
    a, b, own = reference.unit(q), reference.unit(k), np.arange(len(q))
    value, da, db = reference.cross_entropy(a, b, own, 1 / TEMPERATURE)
    back, eb, ea = reference.cross_entropy(b, a, own, 1 / TEMPERATURE)
    dq, dk = reference.through_unit(q, (da + ea) / 2), reference.through_unit(k, (db + eb) / 2)
    return np.float64((value + back) / 2), dq, dk


CLIP = Case(
    name="clip",
    what="clip_loss, value and gradient",
    shapes=({"n": 8192, "d": 128},),
    quick={"n": 256, "d": 128},
    make=_matching,
    ours=lambda p: our_gradient_step(nf.clip_loss, p["query"], p["key"], logit_scale=1 / TEMPERATURE),
    peers={"torch dense": _clip_dense},
    reference=_clip_reference,
    flops=_pairs(4),  # without an N x N workspace: column sums are known only after a whole pass
)


# ---- NT-Xent ---------------------------------------------------------------------------------------------------------


def _nt_xent_dense(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")
    n = problem.shape["n"]
    target = (torch.arange(2 * n) + n) % (2 * n)

    def loss(z1: Any, z2: Any) -> Any:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = z @ z.T / SIMCLR_TEMPERATURE
        logits.fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, target)

    return gradient_step(loss, problem["query"], problem["key"])


def _nt_xent_reference(problem: Problem) -> tuple[Array, ...]:
    z = np.concatenate([problem["query"], problem["key"]])
    n, u = len(z) // 2, reference.unit(z)
    positive = (np.arange(2 * n) + n) % (2 * n)
    value, rows, columns = reference.cross_entropy(u, u, positive, 1 / SIMCLR_TEMPERATURE, without_self=True)
    dz = reference.through_unit(z, rows + columns)
    return np.float64(value), dz[:n], dz[n:]


NT_XENT = Case(
    name="nt_xent",
    what="nt_xent_loss, value and gradient: two views of n",
    shapes=({"views": 2, "n": 4096, "d": 128},),
    quick={"views": 2, "n": 128, "d": 128},
    make=_matching,
    ours=lambda p: our_gradient_step(nf.nt_xent_loss, p["query"], p["key"], temperature=SIMCLR_TEMPERATURE),
    peers={"torch dense": _nt_xent_dense},
    reference=_nt_xent_reference,
    flops=lambda s: 2 * 2 * (2 * s["n"]) ** 2 * s["d"],  # scores are symmetric: half the tiles, twice; then one product
)


# ---- uniformity ------------------------------------------------------------------------------------------------------


def _uniformity_product(problem: Problem) -> Step:
    F = load("torch.nn.functional")
    n = problem.shape["n"]

    def loss(x: Any) -> Any:
        u = F.normalize(x, dim=1)
        potential = (2 * T * (u @ u.T) - 2 * T).exp()
        return ((potential.sum() - potential.diagonal().sum()) / (n * (n - 1))).log()

    return gradient_step(loss, problem["x"])


def _uniformity_pdist(problem: Problem) -> Step:
    torch, F = load("torch"), load("torch.nn.functional")

    def loss(x: Any) -> Any:  # as published with the paper
        return torch.pdist(F.normalize(x, dim=1), p=2).pow(2).mul(-T).exp().mean().log()

    return gradient_step(loss, problem["x"])


def _uniformity_reference(problem: Problem) -> tuple[Array, ...]:
    value, du = reference.log_potential(reference.unit(problem["x"]), T)
    return np.float64(value), reference.through_unit(problem["x"], du)


UNIFORMITY = Case(
    name="uniformity",
    what="uniformity, value and gradient",
    shapes=({"n": 8192, "d": 128},),
    quick={"n": 256, "d": 128},
    make=normal("x"),
    ours=lambda p: our_gradient_step(nf.uniformity, p["x"], t=T),
    peers={"torch product": _uniformity_product, "torch.pdist": _uniformity_pdist},
    reference=_uniformity_reference,
    flops=_pairs(3 / 2),
)
