"""The Gaussian kernel: its Gram matrix, and products with it that never store it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import CHECKED_ROWS, Array, Case, Problem, Shape, Step, first_rows, load, normal


def _lengthscale(problem: Problem) -> float:
    """sqrt(D): typical entries are about exp(-1), neither an identity matrix nor all ones."""
    return math.sqrt(problem.shape["d"])


def _gram_rows(problem: Problem) -> Array:
    squared = reference.square_distances(problem["x"][:CHECKED_ROWS], problem["x"])
    rows: Array = np.exp(-squared / (2 * _lengthscale(problem) ** 2))
    return rows


# ---- Gram matrix -----------------------------------------------------------------------------------------------------


def _gram(problem: Problem) -> Step:
    kernel, x = nf.kernels.Gaussian(_lengthscale(problem)), problem["x"]
    return lambda: (kernel(x),)


def _sklearn_gram(problem: Problem) -> Step:
    metrics = load("sklearn.metrics.pairwise")
    x, gamma = problem["x"], 1 / (2 * _lengthscale(problem) ** 2)
    return lambda: (metrics.rbf_kernel(x, gamma=gamma),)


def _torch_gram(problem: Problem) -> Step:
    torch = load("torch")
    x, gamma = torch.from_numpy(problem["x"]), 1 / (2 * _lengthscale(problem) ** 2)
    return lambda: (torch.exp(-gamma * torch.cdist(x, x).pow(2)),)


GAUSSIAN_GRAM = Case(
    name="gaussian_gram",
    what="kernels.Gaussian, Gram matrix of one set",
    shapes=({"n": 4096, "d": 128},),
    quick={"n": 256, "d": 128},
    make=normal("x"),
    ours=_gram,
    peers={"sklearn": _sklearn_gram, "torch cdist": _torch_gram},
    reference=lambda problem: (_gram_rows(problem),),
    flops=lambda s: s["n"] ** 2 * s["d"],  # symmetric: half a product
    writes=lambda s: 4 * s["n"] ** 2,
    view=first_rows,
)


# ---- Gram matrix times vectors ---------------------------------------------------------------------------------------


def _points_and_vector(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "v": rng.standard_normal((shape["n"], 1), np.float32)}


def _matmul(problem: Problem) -> Step:
    kernel, x, v = nf.kernels.Gaussian(_lengthscale(problem)), problem["x"], problem["v"]
    return lambda: (kernel.matmul(x, x, v),)


def _keops(problem: Problem) -> Step:
    pykeops = load("pykeops")
    pykeops.set_verbose(False)
    lazy = load("pykeops.numpy").LazyTensor
    x, v, gamma = problem["x"], problem["v"], 1 / (2 * _lengthscale(problem) ** 2)

    def step() -> tuple[Any, ...]:
        differences = lazy(x[:, None, :]) - lazy(x[None, :, :])
        return ((-gamma * (differences**2).sum(-1)).exp().__matmul__(v),)

    return step


def _torch_chunked(problem: Problem) -> Step:
    torch = load("torch")
    x, v = torch.from_numpy(problem["x"]), torch.from_numpy(problem["v"])
    gamma = 1 / (2 * _lengthscale(problem) ** 2)

    def step() -> tuple[Any, ...]:
        rows = (torch.exp(-gamma * torch.cdist(chunk, x).pow(2)) @ v for chunk in x.split(2048))
        return (torch.cat(list(rows)),)

    return step


GAUSSIAN_MATMUL = Case(
    name="gaussian_matmul",
    what="kernels.Gaussian.matmul, one column",
    shapes=({"n": 20000, "d": 3}, {"n": 20000, "d": 16}, {"n": 20000, "d": 64}),
    quick={"n": 300, "d": 3},
    make=_points_and_vector,
    ours=_matmul,
    peers={"KeOps": _keops, "torch chunked": _torch_chunked},
    reference=lambda problem: (_gram_rows(problem) @ problem["v"],),
    flops=lambda s: 2 * s["n"] ** 2 * (s["d"] + 1),  # at small D the exponential is the floor, not these
    view=first_rows,
)
