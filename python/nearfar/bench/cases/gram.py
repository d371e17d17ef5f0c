"""What needs a Gram matrix and does not store it: alignment of representations, kernel ridge regression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import CHECKED_ROWS, Array, Case, Problem, Shape, Step, load, normal

ALPHA = 1.0


def _lengthscale(problem: Problem) -> float:
    return math.sqrt(problem.shape["d"])


def _gaussian(problem: Problem, x: Array) -> Array:
    """Dense, in place, in the dtype of x: how NumPy does it best."""
    squares = (x * x).sum(1)
    matrix = x @ x.T
    matrix *= -2
    matrix += squares
    matrix += squares[:, None]
    matrix *= -0.5 / _lengthscale(problem) ** 2
    return np.asarray(np.exp(matrix, out=matrix))


def _linear(problem: Problem, x: Array) -> Array:
    return np.asarray(x @ x.T)


def _alignment(k: Array, l_: Array) -> float:
    for matrix in (k, l_):
        matrix -= matrix.mean(0)
        matrix -= matrix.mean(1)[:, None]
    return float(np.vdot(k, l_) / math.sqrt(np.vdot(k, k) * np.vdot(l_, l_)))


# ---- centred kernel alignment ----------------------------------------------------------------------------------------


def _related(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "y": x + rng.standard_normal(x.shape, np.float32)}


def _cka_case(name: str, what: str, gram: Any, units: float) -> Case:
    def kernel(problem: Problem) -> Any:
        return "linear" if gram is _linear else nf.kernels.Gaussian(_lengthscale(problem))

    def ours(problem: Problem) -> Step:
        return lambda: (nf.cka(problem["x"], problem["y"], kernel(problem)),)

    def dense(problem: Problem, dtype: Any = np.float32) -> Array:
        x, y = (problem[side].astype(dtype, copy=False) for side in "xy")
        return np.asarray(_alignment(gram(problem, x), gram(problem, y)))

    return Case(
        name=name,
        what=what,
        shapes=({"n": 10000, "d": 64},),
        quick={"n": 256, "d": 16},
        make=_related,
        ours=ours,
        peers={"NumPy dense": lambda problem: lambda: (dense(problem),)},
        reference=lambda problem: (dense(problem, np.float64),),
        flops=lambda s: units * s["n"] * s["d"] * (s["d"] if gram is _linear else s["n"]),
    )


CKA_LINEAR = _cka_case("cka_linear", "cka of two linear Gram matrices", _linear, 6)
CKA_GAUSSIAN = _cka_case("cka_gaussian", "cka of two Gaussian Gram matrices", _gaussian, 2)  # two, half of each


# ---- kernel ridge regression -----------------------------------------------------------------------------------------


def _regression(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    x = normal("x")(shape, rng)["x"]
    y = np.tanh(x @ rng.standard_normal((shape["d"], 3), np.float32)).sum(1)
    return {"x": x, "y": y + 0.1 * rng.standard_normal(shape["n"], np.float32)}


def _ridge(problem: Problem) -> Step:
    tol = 1e-4 if problem.shape["n"] > 1000 else 1e-6  # the tests compare small problems to 1e-5
    model = nf.KernelRidge(nf.kernels.Gaussian(_lengthscale(problem)), ALPHA, tol=tol)
    return lambda: (model.fit(problem["x"], problem["y"]).dual_coef_,)


def _sklearn_ridge(problem: Problem) -> Step:
    gamma = 0.5 / _lengthscale(problem) ** 2
    model = load("sklearn.kernel_ridge").KernelRidge(kernel="rbf", gamma=gamma, alpha=ALPHA)
    return lambda: (model.fit(problem["x"], problem["y"]).dual_coef_,)


def _fitted(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    """``(K + alpha I) beta``, to be compared with y: the relative residual, on some rows."""
    x, beta = problem["x"], np.asarray(result[0], np.float64)
    squares = reference.square_distances(x[:CHECKED_ROWS], x)
    return (np.exp(-0.5 * squares / _lengthscale(problem) ** 2) @ beta + ALPHA * beta[:CHECKED_ROWS],)


KERNEL_RIDGE = Case(
    name="kernel_ridge",
    what="KernelRidge.fit to relative residual 1e-4, Gaussian",
    shapes=({"n": 20000, "d": 32},),
    quick={"n": 300, "d": 8},
    make=_regression,
    ours=_ridge,
    peers={"sklearn": _sklearn_ridge},
    reference=lambda problem: (problem["y"][:CHECKED_ROWS].astype(np.float64),),
    flops=lambda s: 2 * s["n"] ** 2 * s["d"],  # one product with the Gram matrix: the least that reads every pair
    view=_fitted,
)
