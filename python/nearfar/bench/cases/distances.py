"""Pairwise distances: the matrix, and the gradient through it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import CHECKED_ROWS, Array, Case, Problem, Shape, Step, first_rows, load


def _two_sets(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    batch = (shape["b"],) if "b" in shape else ()
    return {
        "x": rng.standard_normal((*batch, shape["n"], shape["d"]), np.float32),
        "y": rng.standard_normal((*batch, shape["m"], shape["d"]), np.float32),
    }


def _product(units: float) -> Callable[[Shape], float]:
    return lambda s: units * 2 * s["n"] * s["m"] * s["d"]


# ---- the matrix ------------------------------------------------------------------------------------------------------


def _torch_cdist(problem: Problem) -> Step:
    torch = load("torch")
    x, y = torch.from_numpy(problem["x"]), torch.from_numpy(problem["y"])
    return lambda: (torch.cdist(x, y),)


def _ours(problem: Problem) -> Step:
    """On the same tensors as torch.cdist gets, where torch is installed."""
    x, y = problem["x"], problem["y"]
    with contextlib.suppress(ModuleNotFoundError):
        x, y = (load("torch").from_numpy(a) for a in (x, y))
    return lambda: (nf.cdist(x, y),)


def _sklearn_distances(problem: Problem) -> Step:
    metrics = load("sklearn.metrics.pairwise")
    return lambda: (metrics.euclidean_distances(problem["x"], problem["y"]),)


def _scipy_cdist(problem: Problem) -> Step:
    distance = load("scipy.spatial.distance")
    return lambda: (distance.cdist(problem["x"], problem["y"]),)


def _cdist_reference(problem: Problem) -> tuple[Array, ...]:
    return (np.sqrt(reference.square_distances(problem["x"][:CHECKED_ROWS], problem["y"])),)


CDIST = Case(
    name="cdist",
    what="cdist, the matrix of distances",
    shapes=({"n": 4096, "m": 4096, "d": 128},),
    quick={"n": 256, "m": 192, "d": 128},
    make=_two_sets,
    ours=_ours,
    peers={"torch.cdist": _torch_cdist, "sklearn": _sklearn_distances, "scipy": _scipy_cdist},
    reference=_cdist_reference,
    flops=_product(1),
    writes=lambda s: 4 * s["n"] * s["m"],
    view=first_rows,
)


def _batches_reference(problem: Problem) -> tuple[Array, ...]:
    x, y = (problem[name][:CHECKED_ROWS].astype(np.float64) for name in "xy")
    return (np.linalg.norm(x[:, :, None] - y[:, None], axis=-1),)


CDIST_BATCH = dataclasses.replace(
    CDIST,
    name="cdist_batch",
    what="cdist, a batch of tiny problems",
    shapes=({"b": 4096, "n": 8, "m": 8, "d": 4},),
    quick={"b": 64, "n": 8, "m": 8, "d": 4},
    peers={"torch.cdist": _torch_cdist},
    reference=_batches_reference,
    flops=lambda s: 3 * s["b"] * s["n"] * s["m"] * s["d"],
    writes=lambda s: 4 * s["b"] * s["n"] * s["m"],
)


# ---- its backward ----------------------------------------------------------------------------------------------------


def _with_gradient(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    return {**_two_sets(shape, rng), "g": rng.standard_normal((shape["n"], shape["m"]), np.float32)}


def _backward(cdist: Callable[..., Any]) -> Callable[[Problem], Step]:
    """Only the backward pass: the forward one is run once, before."""

    def build(problem: Problem) -> Step:
        torch = load("torch")
        x, y = (torch.from_numpy(problem[name]).requires_grad_() for name in "xy")
        distances, g = cdist(x, y), torch.from_numpy(problem["g"])

        def step() -> tuple[Any, ...]:
            gradients: tuple[Any, ...] = torch.autograd.grad(distances, (x, y), g, retain_graph=True)
            return gradients

        return step

    return build


def _one_side(x: Array, y: Array, g: Array) -> Array:
    distances = np.sqrt(reference.square_distances(x, y))
    w = np.divide(g, distances, out=np.zeros_like(distances), where=distances > 0)
    gradient: Array = w.sum(1, keepdims=True) * x - w @ y.astype(np.float64)
    return gradient


def _backward_reference(problem: Problem) -> tuple[Array, ...]:
    x, y, g = problem["x"], problem["y"], problem["g"]
    rows = slice(CHECKED_ROWS)
    return _one_side(x[rows], y, g[rows]), _one_side(y[rows], x, g[:, rows].T)


CDIST_BACKWARD = Case(
    name="cdist_backward",
    what="cdist, backward only, both inputs",
    shapes=({"n": 4096, "m": 4096, "d": 128},),
    quick={"n": 256, "m": 192, "d": 128},
    make=_with_gradient,
    ours=_backward(nf.cdist),
    peers={"torch.cdist": _backward(lambda x, y: load("torch").cdist(x, y))},
    reference=_backward_reference,
    flops=_product(2),  # distances are saved: W Y and W^T X are left
    view=first_rows,
)


# ---- metrics of coordinates ------------------------------------------------------------------------------------------


def _cityblock_reference(problem: Problem) -> tuple[Array, ...]:
    x, y = (problem[name].astype(np.float64) for name in "xy")
    return (np.stack([np.abs(row - y).sum(1) for row in x[:CHECKED_ROWS]]),)


CDIST_CITYBLOCK = Case(
    name="cdist_cityblock",
    what="cdist, cityblock",
    shapes=({"n": 4096, "m": 4096, "d": 64},),
    quick={"n": 256, "m": 192, "d": 64},
    make=_two_sets,
    ours=lambda p: lambda: (nf.cdist(p["x"], p["y"], "cityblock"),),
    peers={
        "torch.cdist": lambda p: lambda: (load("torch").cdist(*map(load("torch").from_numpy, (p["x"], p["y"])), p=1),),
        "scipy": lambda p: lambda: (load("scipy.spatial.distance").cdist(p["x"], p["y"], "cityblock"),),
    },
    reference=_cityblock_reference,
    flops=lambda s: 3 * s["n"] * s["m"] * s["d"],  # subtraction, absolute value, addition
    writes=lambda s: 4 * s["n"] * s["m"],
    view=first_rows,
)
