"""What the metric learners share: d_M(x, y) = |L (x - y)|, M = L^T L, and scikit-learn's interface around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, is_torch, of_kind, to_numpy
from ..distances import cdist
from ..estimator import Estimator, floating

Numbers = NDArray[np.float64]

_BLOCK = 1 << 22  # distances at a time


Learner = TypeVar("Learner", bound="MetricLearner")


class MetricLearner(Estimator):
    """A linear map ``components_`` (K, D) whose Euclidean distance is the learned one."""

    components_: Numbers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def fit(self: Learner, X: Any, y: Any = None) -> Learner:
        """Learn the metric.

        Parameters
        ----------
        X : array (N, D); for `MMC` and `ITML` also (P, 2, D)
            Points; or pairs of points.
        y : array (N,); (P,)
            Classes, at least two: all pairs of one class are similar, all others dissimilar. For pairs 1 (similar) or
            -1 (dissimilar), at least one of these.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            One class, no dissimilar pair, or none whose points differ; NaN or infinity; shapes that do not match; a
            parameter out of range.
        ModuleNotFoundError
            Without SciPy.
        """
        self._fit(X, y)
        return self

    def _fit(self, X: Any, y: Any) -> None:
        raise NotImplementedError

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """`fit`, then `transform` of the same points."""
        return self.fit(X, y).transform(X)

    def transform(self, X: Any) -> Array:
        """The points in the learned space: ``X @ components_.T``.

        Parameters
        ----------
        X : array (N, D)

        Returns
        -------
        array (N, K)
            Of the kind of X; float32 for float32 and half precisions.
        """
        self._check_fitted()
        X = self._points(X, reset=False)
        points = _finite(to_numpy(X), "X")
        return of_kind(np.ascontiguousarray((points @ self.components_.T).astype(points.dtype)), X)

    def get_mahalanobis_matrix(self) -> Numbers:
        """``M = components_.T @ components_``, positive semi-definite, (D, D)."""
        self._check_fitted()
        metric: Numbers = self.components_.T @ self.components_
        return metric

    def score_pairs(self, pairs: Any) -> Array:
        """The learned distance of each pair; near 0 means similar.

        Parameters
        ----------
        pairs : array (P, 2, D)

        Returns
        -------
        array (P,)
            Of the kind of the pairs; float32 for float32 and half precisions.
        """
        self._check_fitted()
        pairs = floating(pairs, "pairs")
        if pairs.ndim != 3 or tuple(pairs.shape[1:]) != (2, self.n_features_in_):
            raise ValueError(f"pairs: expected shape (p, 2, {self.n_features_in_}), got {tuple(pairs.shape)}")
        points = to_numpy(pairs)
        distances = np.linalg.norm((points[:, 0] - points[:, 1]) @ self.components_.T, axis=1)
        return of_kind(distances.astype(points.dtype), pairs)

    def _labelled(self, X: Any, y: Any) -> tuple[Numbers, NDArray[np.int64]]:
        """Points in float64 about their mean, and labels as 0, 1, ...; the least a supervised learner needs."""
        if y is None:
            raise ValueError(f"This {type(self).__name__} estimator requires y to be passed, but the target y is None")
        X = self._points(X, reset=True)
        points = _finite(to_numpy(X), "X").astype(np.float64)
        labels = np.asarray(to_numpy(y) if is_torch(y) else y)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != (len(points),):
            raise ValueError(f"y: expected shape ({len(points)},) to match X, got {labels.shape}")
        if labels.dtype.kind == "f" and not np.array_equal(labels, np.floor(labels)):
            raise ValueError("y: Unknown label type: continuous; expected classes")
        codes = np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)
        classes = int(codes.max()) + 1
        if classes < 2:
            raise ValueError(f"y: expected at least two classes, got 1 class ({len(points)} rows)")
        return points - points.mean(0), codes

    def _paired(self, pairs: Any, y: Any) -> tuple[Numbers, NDArray[np.bool_]]:
        """Differences of the two points of each pair, and which pairs are similar (y = 1, the others -1)."""
        pairs = floating(pairs, "X")
        if pairs.shape[1] != 2 or pairs.shape[2] < 1:
            raise ValueError(f"X: expected points (n, d) or pairs (p, 2, d), got shape {tuple(pairs.shape)}")
        pairs = _finite(to_numpy(pairs), "X").astype(np.float64)
        signs = np.asarray(to_numpy(y) if is_torch(y) else y)
        if signs.shape != (len(pairs),) or not np.isin(signs, (-1, 1)).all():
            raise ValueError(f"y: expected ({len(pairs)},) of 1 (similar) and -1 (dissimilar) to match the pairs in X")
        if (signs == 1).all() or not len(signs):
            raise ValueError("y: expected at least one dissimilar pair (-1)")
        self.n_features_in_ = int(pairs.shape[2])
        return pairs[:, 0] - pairs[:, 1], signs == 1

    def _initial(self, X: Numbers, n_components: Any) -> Numbers:
        """The identity; with fewer components the principal axes."""
        d = X.shape[1]
        if n_components is None or n_components == d:
            return np.eye(d)
        if not 1 <= n_components <= d:
            raise ValueError(f"n_components: expected 1 to {d} (columns of X), got {n_components}")
        axes: Numbers = np.linalg.eigh(X.T @ X)[1][:, ::-1][:, :n_components].T
        return axes


def _finite(points: NDArray[Any], name: str) -> NDArray[Any]:
    finite = np.isfinite(points).reshape(len(points), -1).all(1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or inf in row {int(finite.argmin())}")
    return points


def square_blocks(z: Numbers, rounding: float = 0.0) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Squared distances of mapped points, a block of rows against all at a time; infinite from a point to itself.

    In float32 where that rounds them by less than `rounding`, else in float64.
    """
    n = len(z)
    largest = float(np.einsum("ij,ij->i", z, z).max(initial=0))
    points = z.astype(np.float32) if largest * np.finfo(np.float32).eps < rounding else z
    step = max(1, _BLOCK // max(n, 1))
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        # All rows at once are a set against itself: half the arithmetic.
        square = cdist(points[rows], None if step >= n else points, "sqeuclidean")
        square[np.arange(len(square)), np.arange(rows.start, rows.stop)] = np.inf
        yield rows, square


def laplacian(weights: Any, rows: slice, z: Numbers, out: Numbers) -> None:
    """Adds sum_j w_ij (z_i - z_j) to row i, and the same with signs exchanged to row j, for a block of weights."""
    points = z.astype(weights.dtype, copy=False)
    out[rows] += np.asarray(weights.sum(1)).reshape(-1, 1) * z[rows] - weights @ points
    out += np.asarray(weights.sum(0)).reshape(-1, 1) * z - weights.T @ points[rows]


def minimise(
    function: Callable[[Numbers], tuple[float, Numbers]],
    start: Numbers,
    *,
    max_iter: int,
    tol: float,
    name: str,
    verbose: int = 0,
    **options: Any,
) -> tuple[Numbers, float, int]:
    """SciPy's L-BFGS on a matrix: where it ends, the value there and the number of iterations."""
    try:
        from scipy.optimize import minimize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"nearfar.{name} needs SciPy: pip install 'nearfar[metric]'") from error

    def flat(vector: Numbers) -> tuple[float, Numbers]:
        value, gradient = function(vector.reshape(start.shape))
        if verbose:
            print(f"{name}: {value:.6g}")
        return value, gradient.ravel()

    limits = {key: options.pop(key) for key in ("bounds",) if key in options}
    result = minimize(
        flat, start.ravel(), jac=True, method="L-BFGS-B", tol=tol, options={"maxiter": max_iter, **options}, **limits
    )
    value = float(result.fun)
    if not math.isfinite(value):
        raise ValueError(f"X: {name} met numbers that are not finite; scale the columns")
    return result.x.reshape(start.shape), value, int(result.nit)
