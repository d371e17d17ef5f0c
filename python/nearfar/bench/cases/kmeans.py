"""k-means: Lloyd's iterations from given centroids, k-means++, a mini-batch.

What is compared is the objective, evaluated in float64 from the centroids that came out; peers start where we start.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

import nearfar as nf
from nearfar.lloyd import Data

from .. import reference
from ..case import Array, Case, Problem, Shape, Step, load

ITERATIONS = 20


def _points_and_start(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "start": x[rng.choice(shape["n"], shape["k"], replace=False)]}


def _objective(problem: Problem, centers: Array) -> Array:
    """The mean squared distance to the nearest centroid, (1,)."""
    x, total, block = problem["x"], 0.0, 4096
    for begin in range(0, len(x), block):
        total += reference.square_distances(x[begin : begin + block], np.asarray(centers)).min(1).sum()
    return np.array([total / len(x)])


def _view(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    return (_objective(problem, result[0]),)


# ---- Lloyd's iterations ----------------------------------------------------------------------------------------------


def _kmeans(problem: Problem) -> Step:
    x, start = problem["x"], problem["start"]
    return lambda: (nf.KMeans(len(start), init=start, max_iter=ITERATIONS, tol=0).fit(x).cluster_centers_,)


def _sklearn_kmeans(problem: Problem) -> Step:
    cluster, x, start = load("sklearn.cluster"), problem["x"], problem["start"]
    options = {"n_init": 1, "max_iter": ITERATIONS, "tol": 0}
    return lambda: (cluster.KMeans(len(start), init=start, **options).fit(x).cluster_centers_,)


def _faiss_kmeans(problem: Problem) -> Step:
    faiss, x, start = load("faiss"), problem["x"], problem["start"]

    def step() -> tuple[Any, ...]:
        # All points: by default it samples 256 for each centroid.
        model = faiss.Kmeans(x.shape[1], len(start), niter=ITERATIONS, max_points_per_centroid=len(x))
        model.train(x, init_centroids=start)
        return (model.centroids,)

    return step


def _sums(x: Array, centers: Array) -> tuple[Array, Array]:
    """Sums of the rows of each centroid (k, d), and how many they are (k, 1), in float64."""
    labels = np.concatenate(
        [reference.square_distances(part, centers).argmin(1) for part in np.array_split(x, len(x) // 4096 + 1)]
    )
    counts = np.bincount(labels, minlength=len(centers))[:, None]
    return np.stack([np.bincount(labels, column, len(centers)) for column in x.T], 1), counts


def _lloyd_reference(problem: Problem) -> tuple[Array, ...]:
    x, centers = problem["x"].astype(np.float64), problem["start"].astype(np.float64)
    for _ in range(ITERATIONS):
        sums, counts = _sums(x, centers)
        centers = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
    return (_objective(problem, centers),)


KMEANS = Case(
    name="kmeans",
    what=f"KMeans.fit, {ITERATIONS} iterations from the same centroids",
    shapes=({"n": 200000, "k": 256, "d": 64},),
    quick={"n": 2000, "k": 16, "d": 64},
    make=_points_and_start,
    ours=_kmeans,
    peers={"FAISS": _faiss_kmeans, "sklearn": _sklearn_kmeans},
    reference=_lloyd_reference,
    # And once more, so that labels and inertia belong to the centroids.
    flops=lambda s: 2 * s["n"] * s["k"] * s["d"] * (ITERATIONS + 1),
    view=_view,
)


# ---- first centroids -------------------------------------------------------------------------------------------------


def _seeding(problem: Problem) -> Step:
    x, k = problem["x"], problem.shape["k"]
    return lambda: (x[Data(x, None, False).spread(k, np.random.RandomState(0))],)


def _sklearn_seeding(problem: Problem) -> Step:
    cluster = load("sklearn.cluster")
    return lambda: (cluster.kmeans_plusplus(problem["x"], problem.shape["k"], random_state=0)[0],)


def _seeding_reference(problem: Problem) -> tuple[Array, ...]:
    """The algorithm in float64, with the same random numbers."""
    x, k = problem["x"].astype(np.float64), problem.shape["k"]
    generator = np.random.RandomState(0)
    chosen = [generator.choice(len(x), p=np.full(len(x), 1 / len(x)))]
    closest = reference.square_distances(x[chosen], x)[0]
    for _ in range(k - 1):
        shares = generator.uniform(size=2 + int(np.log(k))) * closest.sum()
        drawn = np.minimum(np.searchsorted(np.cumsum(closest), shares), len(x) - 1)
        left = np.minimum(closest, reference.square_distances(x[drawn], x))
        best = left.sum(1).argmin()
        closest = left[best]
        chosen.append(drawn[best])
    return (_objective(problem, x[chosen]),)


KMEANS_SEEDING = dataclasses.replace(
    KMEANS,
    name="kmeans_seeding",
    what="greedy k-means++, the same random numbers",
    shapes=({"n": 100000, "k": 1000, "d": 64},),
    ours=_seeding,
    peers={"sklearn": _sklearn_seeding},
    reference=_seeding_reference,
    flops=lambda s: 2 * s["n"] * s["k"] * s["d"] * (2 + int(np.log(s["k"]))),
)


# ---- a mini-batch ----------------------------------------------------------------------------------------------------


def _partial_fit(make: Any, **options: Any) -> Any:
    def build(problem: Problem) -> Step:
        x, start = problem["x"], problem["start"]
        model = make()(len(start), init=start, random_state=0, reassignment_ratio=0, **options).partial_fit(x)
        # The second batch, whenever it is called.
        return lambda: (copy.deepcopy(model).partial_fit(x).cluster_centers_,)

    return build


def _batch_reference(problem: Problem) -> tuple[Array, ...]:
    x, centers = problem["x"].astype(np.float64), problem["start"].astype(np.float64)
    weights = np.zeros((len(centers), 1))
    for _ in range(2):
        sums, counts = _sums(x, centers)
        total = weights + counts
        centers = np.where(total > 0, (centers * weights + sums) / np.maximum(total, 1), centers)
        weights = total
    return (_objective(problem, centers),)


KMEANS_BATCH = dataclasses.replace(
    KMEANS,
    name="kmeans_batch",
    what="MiniBatchKMeans.partial_fit, one batch",
    shapes=({"n": 10000, "k": 256, "d": 64},),
    ours=_partial_fit(lambda: nf.MiniBatchKMeans),
    peers={"sklearn": _partial_fit(lambda: load("sklearn.cluster").MiniBatchKMeans, n_init=1)},
    reference=_batch_reference,
    flops=lambda s: 2 * 2 * s["n"] * s["k"] * s["d"],  # labels are those of the moved centroids
)
