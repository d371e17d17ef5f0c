"""Nearest neighbours and k-means assignment: against libraries built for search.

Points have no cluster structure, which is the hardest case for an implementation that screens candidates. Errors are
those of the exact distances to what was found, so that a tie decided otherwise is not an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import CHECKED_ROWS, Array, Case, Problem, Shape, Step, load


def _found(query: Array, targets: Array, indices: Array) -> Array:
    """Exact squared distances of the first rows to the targets found for them, (rows, k)."""
    rows = min(len(query), CHECKED_ROWS)
    indices = np.asarray(indices)[:rows].reshape(rows, -1)
    differences = query[:rows, None, :].astype(np.float64) - targets[indices]
    squared: Array = (differences**2).sum(-1)
    return squared


def _faiss_search(query: Array, targets: Array, k: int) -> Step:
    index = load("faiss").IndexFlatL2(targets.shape[1])
    index.add(targets)  # a copy: not timed

    def step() -> tuple[Any, ...]:
        squared, indices = index.search(query, k)
        return indices, squared

    return step


# ---- k-means assignment ----------------------------------------------------------------------------------------------


def _points_and_centroids(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    # Centroids are points, as k-means starts.
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "centroids": x[rng.choice(shape["n"], shape["k"], replace=False)]}


def _assign(problem: Problem) -> Step:
    return lambda: nf.kmeans_assign(problem["x"], problem["centroids"])


def _sklearn_argmin(problem: Problem) -> Step:
    metrics = load("sklearn.metrics")
    return lambda: (metrics.pairwise_distances_argmin(problem["x"], problem["centroids"]),)


def _assign_view(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    exact = _found(problem["x"], problem["centroids"], result[0])
    return exact, *(np.asarray(a)[:CHECKED_ROWS].reshape(-1, 1) for a in result[1:])


def _assign_reference(problem: Problem) -> tuple[Array, ...]:
    squared = reference.square_distances(problem["x"][:CHECKED_ROWS], problem["centroids"]).min(1, keepdims=True)
    return squared, squared


KMEANS_ASSIGN = Case(
    name="kmeans_assign",
    what="kmeans_assign, labels and distances",
    shapes=({"n": 100000, "k": 1024, "d": 64}, {"n": 100000, "k": 1024, "d": 256}),
    quick={"n": 1000, "k": 64, "d": 64},
    make=_points_and_centroids,
    ours=_assign,
    peers={
        "FAISS flat": lambda p: _faiss_search(p["x"], p["centroids"], 1),
        "sklearn": _sklearn_argmin,
    },
    reference=_assign_reference,
    flops=lambda s: 2 * s["n"] * s["k"] * s["d"],
    view=_assign_view,
    sweep=(3000, 10000, 30000, 100000, 300000),
)


# ---- k nearest neighbours --------------------------------------------------------------------------------------------


def _two_sets(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    size, others = (shape["n"], shape["d"]), (shape.get("m", shape["n"]), shape["d"])
    return {"query": rng.standard_normal(size, np.float32), "reference": rng.standard_normal(others, np.float32)}


def _knn(problem: Problem) -> Step:
    def step() -> tuple[Any, ...]:
        squared, indices = nf.knn(problem["query"], problem["reference"], problem.shape["k"], metric="sqeuclidean")
        return indices, squared

    return step


def _sklearn_knn(problem: Problem) -> Step:
    neighbors = load("sklearn.neighbors").NearestNeighbors(
        n_neighbors=problem.shape["k"], algorithm="brute", metric="sqeuclidean"
    )
    neighbors.fit(problem["reference"])

    def step() -> tuple[Any, ...]:
        squared, indices = neighbors.kneighbors(problem["query"])
        return indices, squared

    return step


def _knn_view(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    exact = _found(problem["query"], problem["reference"], result[0])
    return exact, *(np.asarray(a)[:CHECKED_ROWS] for a in result[1:])


def _knn_reference(problem: Problem) -> tuple[Array, ...]:
    k = problem.shape["k"]
    squared = reference.square_distances(problem["query"][:CHECKED_ROWS], problem["reference"])
    nearest = np.sort(np.partition(squared, k - 1, axis=1)[:, :k], axis=1)
    return nearest, nearest


KNN = Case(
    name="knn",
    what="knn, queries against other points",
    shapes=({"n": 20000, "d": 128, "k": 10},),
    quick={"n": 500, "d": 128, "k": 10},
    make=_two_sets,
    ours=_knn,
    peers={
        "FAISS flat": lambda p: _faiss_search(p["query"], p["reference"], p.shape["k"]),
        "sklearn": _sklearn_knn,
    },
    reference=_knn_reference,
    flops=lambda s: 2 * s["n"] ** 2 * s["d"],
    view=_knn_view,
    sweep=(1250, 2500, 5000, 10000, 20000),
)


def _sklearn_tree(problem: Problem) -> Step:
    """What "auto" takes in few dimensions; the tree is built in the step, as ours orders the rows in it."""
    neighbors = load("sklearn.neighbors").NearestNeighbors(n_neighbors=problem.shape["k"])

    def step() -> tuple[Any, ...]:
        distances, indices = neighbors.fit(problem["reference"]).kneighbors(problem["query"])
        return indices, distances**2

    return step


KNN_LOW = dataclasses.replace(
    KNN,
    name="knn_low",
    what="knn in three dimensions",
    shapes=({"n": 100000, "d": 3, "k": 10},),
    quick={"n": 500, "d": 3, "k": 10},
    peers={**KNN.peers, "sklearn": _sklearn_tree},
    sweep=(),
)


KNN_FEW = dataclasses.replace(
    KNN,
    name="knn_few",
    what="knn, few queries against many points",
    shapes=({"n": 100, "m": 1000000, "d": 96, "k": 10},),
    quick={"n": 20, "m": 5000, "d": 96, "k": 10},
    flops=lambda s: 2 * s["n"] * s["m"] * s["d"],
    sweep=(),
)
