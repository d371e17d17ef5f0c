"""Metric learning: neighbourhood components analysis from start to end, against scikit-learn's.

Both start at the identity and stop by the same tolerance; what is compared is the objective of the metrics they find,
computed in float64. The classes can be separated, so that it is known: 1.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, load


def _classes(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    """Ten classes as far apart as their noise allows to tell."""
    y = np.arange(shape["n"]) % 10
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    x += np.float32(48 / shape["d"]) * rng.standard_normal((10, shape["d"]), np.float32)[y]
    return {"x": x, "y": y}


def _nca(problem: Problem) -> Step:
    return lambda: (nf.NCA().fit(problem["x"], problem["y"]).components_,)


def _sklearn_nca(problem: Problem) -> Step:
    learner = load("sklearn.neighbors").NeighborhoodComponentsAnalysis(init="identity", tol=1e-5, max_iter=50)

    def step() -> tuple[Any, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterations that ended
            return (learner.fit(problem["x"], problem["y"]).components_,)

    return step


def _objective(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    """Expected leave-one-out accuracy."""
    mapped = problem["x"].astype(np.float64) @ np.asarray(result[0], np.float64).T
    total = 0.0
    for rows in reference.blocks(len(mapped)):
        square = reference.square_distances(mapped[rows], mapped)
        square[np.arange(len(square)), np.arange(rows.start, rows.start + len(square))] = np.inf
        weights = np.exp(square.min(1, keepdims=True) - square)
        same = problem["y"][rows, None] == problem["y"]
        total += float(((weights * same).sum(1) / weights.sum(1)).sum())
    return (np.array([total / len(mapped)]),)


NCA = Case(
    name="nca",
    what="NCA fit, float64 objective found",
    shapes=({"n": 1797, "d": 64},),
    quick={"n": 200, "d": 8},
    make=_classes,
    ours=_nca,
    peers={"sklearn": _sklearn_nca},
    reference=lambda problem: (np.ones(1),),
    flops=lambda s: 2 * s["n"] ** 2 * s["d"],
    view=_objective,
)
