"""The compiled operations of k-means: a pass over the rows, and greedy k-means++. As `nearfar.operations`."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import operations
from .arrays import Array, concatenate, empty, of_kind, to_numpy
from .backend import kernel, on_cuda


def lloyd(
    x: Array,
    centroids: Array,
    normalize: bool,
    weights: Array | None,
    labels: Array,
    distances: Array | None,
    sums: Array | None,
    counts: Array | None,
) -> tuple[float, int]:
    """One iteration of k-means: fills labels, squared distances, sums (k, d) and counts (k,) of the rows.

    Returns the inertia and how many labels differ from what `labels` held. `weights` None: all 1. On the GPU centroids,
    sums and counts are NumPy arrays all the same: they go there, and come back with the two numbers as one copy.
    """
    launch, centroids = kernel(x, "lloyd"), np.ascontiguousarray(centroids)
    if not on_cuda(x):
        inertia, changed = launch(
            x, centroids, normalize, weights, labels, distances, sums, counts, operations.SCREENING
        )
        return inertia, changed
    k, d = centroids.shape
    found = empty(x, (0 if sums is None else k * (d + 1),), "float64")
    there = (None, None) if sums is None else (found[: k * d].reshape(k, d), found[k * d :])
    totals = launch(x, of_kind(centroids, x), normalize, weights, labels, distances, *there)
    numbers = to_numpy(concatenate([found, *(total.reshape(1) for total in totals)]))
    if sums is not None and counts is not None:
        sums[...], counts[...] = numbers[: k * d].reshape(k, d), numbers[k * d : -2]
    return float(numbers[-2]), int(numbers[-1])


def seeding(x: Array, normalize: bool, weights: Array | None, first: int, uniforms: Any) -> Any:
    """Greedy k-means++ from given random numbers (k - 1, trials): the int64 indices of the k chosen rows."""
    launch, there = kernel(x, "seeding"), on_cuda(x)
    chosen = empty(x, (len(uniforms) + 1,), "int64") if there else np.empty(len(uniforms) + 1, np.int64)
    launch(x, normalize, weights, first, of_kind(uniforms, x) if there else uniforms, chosen)
    return to_numpy(chosen)
