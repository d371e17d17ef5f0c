"""Xing et al.'s metric learning from similar and dissimilar pairs, solved to a certified optimum.

The problem, min sum_S d_M^2 subject to sum_D d_M >= 1, is convex in M. Let A be the sum of the similar pairs' outer
products, so that sum_S d_M^2 = tr(A M), and g(M) = sum_D d_M, which is concave and homogeneous of degree 1/2: scaling M
to meet the constraint leaves tr(A M) / g(M)^2 to minimise. We do so over M = L^T L in coordinates where A is the
identity (there a dozen steps of L-BFGS are enough), and prove the result: with the gradient G of g at any M of trace 1,
concavity gives g(M') <= <G, M'> + g(M) / 2 for every other M', hence, with the best scale of M,
g(M')^2 <= 2 g(M) lambda for every M' of trace 1, lambda the largest eigenvalue of G. At the optimum lambda = g(M) / 2
and both sides are equal.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..estimator import convergence_warning
from .base import MetricLearner, Numbers, minimise, square_blocks

# Directions in which similar pairs do not differ cost nothing; this share of the mean cost keeps the problem bounded.
RIDGE = 1e-9


class MMC(MetricLearner):
    """Mahalanobis metric learning for clustering (Xing, Ng, Jordan & Russell, 2002).

    .. math:: \\min_{M \\succeq 0} \\sum_{(x, x') \\in S} d_M(x, x')^2
              \\quad\\text{subject to}\\quad \\sum_{(x, x') \\in D} d_M(x, x') \\ge 1

    over similar pairs S and dissimilar pairs D. The second sum is of distances, not of their squares.

    Parameters
    ----------
    diagonal : bool
        Whether M is diagonal: a weight for each column.
    max_iter : int
        Iterations of L-BFGS.
    tol : float
        The relative gap to the optimum that is to be proved; where it is not, `fit` warns.
    verbose : int
        1 prints the logarithm of the objective at every step.

    Attributes
    ----------
    components_ : array (K, D)
        K is the rank of M; D if `diagonal`.
    objective_ : float
        The sum over similar pairs, with the sum over dissimilar ones scaled to 1.
    gap_ : float
        No feasible M has an objective below ``objective_ * (1 - gap_)``: the certificate, computed at the end.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    The optimum is often of rank one or nearly so: a projection on a line. That is what the objective asks for; it helps
    k-means with side information, for which it was made, more than nearest neighbours, and costs many points of
    accuracy where there are many classes (the handwritten digits).

    From labels the pairs are all pairs of rows, processed a block of rows at a time: O(N^2 D) time a step, bounded
    memory. Where similar pairs do not differ in some direction the infimum is 0 and not attained; a ridge of 1e-9 of
    their mean square keeps the problem defined.

    Xing, Ng, Jordan, Russell: Distance Metric Learning with Application to Clustering with Side-Information, 2002.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> x = np.stack([y + 0.1 * rng.standard_normal(60), 5 * rng.standard_normal(60)], 1)  # the second column is noise
    >>> learner = nf.MMC().fit(x, y)
    >>> m = learner.get_mahalanobis_matrix()
    >>> bool(m[0, 0] > 100 * m[1, 1]), len(learner.components_), learner.gap_ < 1e-5
    (True, 1, True)
    """

    objective_: float
    gap_: float
    n_iter_: int

    def __init__(self, *, diagonal: bool = False, max_iter: int = 500, tol: float = 1e-5, verbose: int = 0) -> None:
        self.diagonal = diagonal
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose

    def _fit(self, X: Any, y: Any) -> None:
        dissimilar: _OfPairs | _OfClasses
        if getattr(X, "ndim", 2) == 3:
            differences, similar = self._paired(X, y)
            between = differences[~similar]
            scatter = differences[similar].T @ differences[similar]
        else:
            points, codes = self._labelled(X, y)
            scatter = class_scatter(points, codes)
            between = points
        if not between.any():
            raise ValueError("X: expected points that differ, got dissimilar pairs of equal points only")
        d = len(scatter)
        # Relative to the spread of what is to be kept apart where all similar pairs coincide.
        scale = np.trace(scatter) or np.square(between).sum()
        scatter = scatter + RIDGE * scale / d * np.eye(d)
        if self.diagonal:
            root = np.diag(1 / np.sqrt(np.diag(scatter)))
        else:
            values, axes = np.linalg.eigh(scatter)
            root = axes / np.sqrt(values)
        between = between @ root
        unit = float(np.abs(between).max())
        dissimilar = _OfPairs(between / unit) if getattr(X, "ndim", 2) == 3 else _OfClasses(between / unit, codes)

        components = self._solve(dissimilar, d)
        total, _ = dissimilar.spread(components)
        slope = dissimilar.slope(components) / 2
        steepest = np.diag(slope).max() if self.diagonal else np.linalg.eigvalsh(slope)[-1]
        self.gap_ = max(0.0, float(1 - total / (2 * steepest)))
        self.objective_ = float((total * unit) ** -2)
        if self.gap_ > self.tol:
            text = f"MMC: the gap to the optimum is {self.gap_:.1e}, not {self.tol:.1e}; raise max_iter"
            warnings.warn(text, convergence_warning(), stacklevel=2)
        if not self.diagonal:
            _, sizes, axes = np.linalg.svd(components)
            components = sizes[:, None] * axes
            components = components[sizes > 1e-6 * sizes[0]]
        self.components_ = components @ root.T / (total * unit)

    def _solve(self, dissimilar: _OfPairs | _OfClasses, d: int) -> Numbers:
        """The factor of the best M of trace 1, in coordinates where tr(A M) is the trace."""

        def ratio(components: Numbers) -> tuple[float, Numbers]:
            full = np.diag(components) if self.diagonal else components
            total, gradient = dissimilar.spread(full)
            square = float(np.vdot(full, full))
            gradient = 2 * (full / square - gradient / total)
            return np.log(square) - 2 * np.log(total), np.diag(gradient).copy() if self.diagonal else gradient

        start = np.ones(d) if self.diagonal else np.eye(d)
        exact = {"gtol": 1e-12, "maxcor": 20, "maxfun": 10 * self.max_iter}
        components, _, self.n_iter_ = minimise(
            ratio, start, max_iter=self.max_iter, tol=1e-15, name="MMC", verbose=self.verbose, **exact
        )
        components = np.diag(components) if self.diagonal else components
        unit: Numbers = components / np.linalg.norm(components)
        return unit


def class_scatter(points: Numbers, codes: NDArray[np.int64]) -> Numbers:
    """Sum over pairs i < j of one class of (x_i - x_j)(x_i - x_j)^T, in O(N D^2)."""
    scatter = np.zeros((points.shape[1],) * 2)
    for c in range(codes.max() + 1):
        own = points[codes == c]
        own = own - own.mean(0)
        scatter += len(own) * (own.T @ own)
    return scatter


# What MMC needs of the dissimilar pairs: `spread`, g = sum |L (x - x')| and its gradient by L, (K, D); and `slope`,
# sum (x - x')(x - x')^T / |L (x - x')|, (D, D), twice the gradient of g by M = L^T L.


class _OfPairs:
    """Dissimilar pairs as they were given: differences of their points."""

    def __init__(self, differences: Numbers) -> None:
        self.differences = differences

    def _weighted(self, components: Numbers, right: Numbers) -> Numbers:
        """Rows of `right` over the distances of the pairs."""
        distance = np.linalg.norm(self.differences @ components.T, axis=1)
        weighted: Numbers = right * np.divide(1, distance, out=np.zeros_like(distance), where=distance > 0)[:, None]
        return weighted

    def spread(self, components: Numbers) -> tuple[float, Numbers]:
        mapped = self.differences @ components.T
        weighted = self._weighted(components, mapped)
        return float(np.vdot(mapped, weighted)), weighted.T @ self.differences

    def slope(self, components: Numbers) -> Numbers:
        slope: Numbers = self._weighted(components, self.differences).T @ self.differences
        return slope


class _OfClasses:
    """All pairs of rows of different classes, a block of rows at a time."""

    def __init__(self, points: Numbers, codes: NDArray[np.int64]) -> None:
        self.points, self.codes = points, codes

    def _weighted(self, z: Numbers, right: Numbers) -> Numbers:
        """sum_j (right_i - right_j) / |z_i - z_j|: the Laplacian of the pairs, applied to `right`."""
        product = np.empty_like(right)
        for rows, square in square_blocks(z):
            # Points that coincide have a distance of 0, which pulls nowhere.
            square[(self.codes[rows, None] == self.codes) | (square == 0)] = np.inf
            inverse = np.divide(1, np.sqrt(square, out=square), out=square)
            product[rows] = inverse.sum(1, keepdims=True) * right[rows] - inverse @ right
        return product

    def spread(self, components: Numbers) -> tuple[float, Numbers]:
        z = self.points @ components.T
        product = self._weighted(z, z)
        return float(np.vdot(z, product)), product.T @ self.points

    def slope(self, components: Numbers) -> Numbers:
        product = self._weighted(self.points @ components.T, self.points).T @ self.points
        slope: Numbers = (product + product.T) / 2  # symmetric up to rounding
        return slope
