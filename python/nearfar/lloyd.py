"""The steps of k-means: data, first centroids, one fused pass, Lloyd's iterations.

Everything here is NumPy on K x D numbers around two kernels: `clusters.lloyd`, which assigns every row to its nearest
centroid and adds it to that centroid's sum, and `clusters.seeding`, greedy k-means++. What there is of every row,
points, labels and distances, stays on the device of the points: an iteration copies K x D numbers there and back.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import clusters, rowwise
from .arrays import Array, compute_dtype, empty, is_torch, of_kind, rows_at, to_numpy
from .backend import on_cuda

__all__ = ["Data", "Fit", "Numbers", "Pass", "lloyd", "unit"]

Numbers = NDArray[Any]


class Pass(NamedTuple):
    """What one pass over the data gives."""

    labels: Array  # (n,) int64; as the distances NumPy, or on the GPU beside the points
    distances: Array | None  # (n,) squared; None where nobody asked, and then there is no inertia
    sums: Numbers  # (k, d) float64
    counts: Numbers  # (k,) float64
    inertia: float
    changed: int


class Data:
    """Points, weights and whether rows are brought to unit norm. Results are NumPy arrays whatever the points are, but
    for what there is of every row of points on the GPU, which is there too.
    """

    def __init__(self, x: Array, weights: Numbers | None, normalize: bool) -> None:
        self.x, self.weights, self.normalize = x, weights, normalize
        self.n, self.d = map(int, x.shape)
        self.dtype = np.dtype(compute_dtype(x))
        self.own_weights = weights if weights is None or not on_cuda(x) else of_kind(weights, x)

    def _of_rows(self, dtype: str) -> Array:
        """Room for a number of every row, where the kernel puts it."""
        return empty(self.x, (self.n,), dtype) if on_cuda(self.x) else np.empty(self.n, dtype)

    def no_labels(self) -> Array:
        labels = self._of_rows("int64")
        labels[...] = -1
        return labels

    def rows(self, index: Any) -> Numbers:
        """Some rows in the compute dtype."""
        rows = to_numpy(rows_at(self.x, index))
        return unit(rows) if self.normalize else rows

    def part(self, index: Numbers) -> Data:
        """The data of some rows."""
        return Data(rows_at(self.x, index), None if self.weights is None else self.weights[index], self.normalize)

    def draw(self, count: int, generator: np.random.RandomState) -> Data:
        """Rows drawn with probabilities that are their weights, which the result no longer has."""
        return Data(rows_at(self.x, generator.choice(self.n, count, p=self.probabilities())), None, self.normalize)

    @property
    def total(self) -> int:
        """How many rows there are; `n` of them are here, which is not all where processes share them."""
        return self.n

    def distinct(self, labels: Array, k: int) -> int:
        """How many of the k labels occur."""
        return int(np.count_nonzero(np.bincount(to_numpy(labels), minlength=k)))

    def spread(self, k: int, generator: np.random.RandomState) -> Numbers:
        """Greedy k-means++: the indices of k rows. Draws the same random numbers as scikit-learn."""
        trials = 2 + int(math.log(k))
        first = int(generator.choice(self.n, p=self.probabilities()))
        uniforms = generator.uniform(size=(k - 1, trials))
        chosen: Numbers = clusters.seeding(self.x, self.normalize, self.own_weights, first, uniforms)
        return chosen

    def farthest(self, step: Pass, centers: Numbers, count: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """The rows (float64) farthest from their centroids, at most `count`: distances, rows, labels and weights."""
        found = self.assign(centers).distances if step.distances is None else step.distances
        assert found is not None
        distances = to_numpy(found)
        if self.weights is not None:
            distances = np.where(self.weights > 0, distances, -1)
        count = min(count, self.n)
        index = np.argpartition(distances, -count)[: -count - 1 : -1] if count else np.empty(0, np.int64)
        weights = np.ones(count) if self.weights is None else self.weights[index].astype(np.float64)
        return (
            distances[index],
            Data.rows(self, index).astype(np.float64),
            to_numpy(rows_at(step.labels, index)),
            weights,
        )

    def probabilities(self) -> Numbers:
        if self.weights is None:
            return np.full(self.n, 1 / self.n)
        weights = self.weights.astype(np.float64)
        shares: Numbers = weights / weights.sum()
        return shares

    def iterate(self, centers: Numbers, labels: Array | None = None, measure: bool = True) -> Pass:
        """Assign all rows; `labels` are the previous ones and are overwritten."""
        return self._pass(centers, labels, True, measure)

    def assign(self, centers: Numbers) -> Pass:
        """The same without the sums."""
        step = self._pass(centers, None, False, True)
        if not math.isfinite(step.inertia):
            self.refuse(step.labels)
        return step

    def _pass(self, centers: Numbers, labels: Array | None, sums: bool, measure: bool) -> Pass:
        """The rows that are here, with the sums of the centroids or without."""
        labels = self.no_labels() if labels is None else labels
        distances = self._of_rows(self.dtype.name) if measure else None
        totals, counts = (np.zeros(centers.shape), np.zeros(len(centers))) if sums else (np.empty(0), np.empty(0))
        inertia, changed = 0.0, 0
        if self.n:
            wanted = (totals, counts) if sums else (None, None)
            inertia, changed = clusters.lloyd(
                self.x, centers, self.normalize, self.own_weights, labels, distances, *wanted
            )
        return Pass(labels, distances, totals, counts, inertia, changed)

    def tolerance(self, tol: float) -> float:
        """`tol` times the mean over coordinates of their variance: the inertia of one cluster, per row and coordinate.

        Also refuses rows that are not finite, which have no distance to anything.
        """
        plain = Data(self.x, None, self.normalize)
        first = plain.iterate(self.rows(slice(0, 1)))
        if not math.isfinite(first.inertia):
            self.refuse(first.labels)
        if tol == 0:
            return 0.0
        return tol * plain.variance(first.sums)

    def variance(self, sums: Numbers) -> float:
        """The mean over coordinates, from the sums of all rows; weights are not looked at."""
        mean = sums / self.total
        if self.normalize:  # E|u|^2 - |mean|^2
            return max(1 - float((mean**2).sum()), 0.0) / self.d
        return self.assign(mean.astype(self.dtype)).inertia / (self.total * self.d)

    def check_finite(self) -> None:
        """For what is not a pass over the data."""
        total = self.x.double().sum(1) if is_torch(self.x) else self.x.sum(1, dtype=np.float64)
        bad = ~np.isfinite(to_numpy(total))
        if bad.any():
            self.refuse(np.where(bad, -1, 0))

    def refuse(self, labels: Array) -> None:
        bad = int(np.flatnonzero(to_numpy(labels) < 0)[0])
        if np.isfinite(to_numpy(self.x[bad])).all():
            raise ValueError(f"X: row {bad} is so large that its squared distances overflow {self.dtype}")
        raise ValueError(f"X: expected finite numbers, got NaN or inf in row {bad}")


def unit(rows: Numbers) -> Numbers:
    """Rows of unit norm, rounded once; a zero row stays zero."""
    return rowwise.unit(rows.astype(np.float64))[0].astype(rows.dtype)


# ---- the steps -------------------------------------------------------------------------------------------------------


def relocate(data: Data, step: Pass, centers: Numbers) -> None:
    """Give every empty centroid one of the rows that are farthest from their own, and take it away there."""
    empty = np.flatnonzero(step.counts == 0)
    if not len(empty):
        return
    distances, rows, labels, weights = data.farthest(step, centers, len(empty))
    if distances.max() <= 0:  # fewer distinct rows than centroids
        return
    for target, row, source, weight in zip(empty, rows, labels, weights, strict=True):
        step.sums[source] -= weight * row
        step.counts[source] -= weight
        step.sums[target] = weight * row
        step.counts[target] = weight


def means(data: Data, step: Pass, centers: Numbers) -> Numbers:
    """Centroids from sums; one without rows stays where it is."""
    filled = step.counts > 0
    new = centers.astype(np.float64)
    new[filled] = step.sums[filled] / step.counts[filled, None]
    if data.normalize:
        directions = unit(new)
        new = np.where(directions.any(1, keepdims=True), directions, centers)
    return new.astype(centers.dtype)


class Fit(NamedTuple):
    """What one run of k-means found."""

    labels: Array
    inertia: float
    centers: Numbers
    n_iter: int


def lloyd(data: Data, centers: Numbers, max_iter: int, tol: float, verbose: bool) -> Fit:
    """Lloyd's iterations until labels stay, or centroids move by less than `tol` (squared, summed)."""
    labels = data.no_labels()
    still = False
    for iteration in range(max_iter):
        step = data.iterate(centers, labels, measure=verbose)
        relocate(data, step, centers)
        new = means(data, step, centers)
        shift = float(((new.astype(np.float64) - centers) ** 2).sum())
        if verbose:
            print(f"Iteration {iteration}, inertia {step.inertia:.6g}.")
        still = np.array_equal(new, centers)
        centers = new
        if step.changed == 0 or shift <= tol:
            if verbose:
                why = (
                    "strict convergence"
                    if step.changed == 0
                    else f"center shift {shift:.3g} within tolerance {tol:.3g}"
                )
                print(f"Converged at iteration {iteration}: {why}.")
            break
    if not still or step.distances is None:  # labels and inertia of the centroids that are returned
        step = data.assign(centers)
    return Fit(step.labels, step.inertia, centers, iteration + 1)
