"""Neighbourhood components analysis: a supervised InfoNCE on squared distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..operations import exponential
from .base import MetricLearner, Numbers, laplacian, minimise, square_blocks

TAIL = 20.0  # neighbours whose weights add up to less than exp(-20) = 2e-9 of the nearest one's are left out
ROUNDING = 1e-3  # of squared distances: weights right to a thousandth, whose errors have both signs and average out
# A block is cheaper as a matrix where it is small or a larger share of its pairs has weight.
SMALL, DENSE = 1 << 16, 0.04


class NCA(MetricLearner):
    """Neighbourhood components analysis (Goldberger et al., 2005).

    Learns L so that a neighbour drawn with probability

    .. math:: p_{ij} = \\frac{e^{-\\lVert L x_i - L x_j\\rVert^2}}{\\sum_{l \\ne i} e^{-\\lVert L x_i - L x_l\\rVert^2}}

    has the label of i as often as can be: maximises :math:`J = \\sum_i \\sum_{j \\ne i, y_j = y_i} p_{ij}` with L-BFGS.

    Parameters
    ----------
    n_components : int, optional
        Rows of L, 1 to D. Default D.
    max_iter : int
        Iterations of L-BFGS.
    tol : float
        Its tolerance (SciPy's ``tol``).
    verbose : int
        1 prints the objective at every step.

    Attributes
    ----------
    components_ : array (K, D)
    objective_ : float
        J / N: the expected leave-one-out accuracy of such a neighbour.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    J is the sum of exp(-loss) of a supervised InfoNCE whose score is the negative squared distance. Distances are
    computed a block of rows at a time, in float32 where that is enough; only neighbours that have weight take part (the
    others have less than 2e-9 of the nearest one's together). Memory is bounded, not N x N. J is not concave: the start
    is the identity, or the principal axes for fewer components. scikit-learn's NeighborhoodComponentsAnalysis has the
    same objective.

    Goldberger, Roweis, Hinton, Salakhutdinov: Neighbourhood Components Analysis, 2004.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> x = np.stack([y + 0.1 * rng.standard_normal(60), 5 * rng.standard_normal(60)], 1)  # the second column is noise
    >>> learner = nf.NCA().fit(x, y)
    >>> m = learner.get_mahalanobis_matrix()
    >>> bool(m[0, 0] > 100 * m[1, 1]), learner.objective_ > 0.99
    (True, True)
    """

    objective_: float
    n_iter_: int

    def __init__(
        self, n_components: int | None = None, *, max_iter: int = 50, tol: float = 1e-5, verbose: int = 0
    ) -> None:
        self.n_components = n_components
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose

    def _fit(self, X: Any, y: Any) -> None:
        points, codes = self._labelled(X, y)
        start = self._initial(points, self.n_components)

        def loss(components: Numbers) -> tuple[float, Numbers]:
            value, gradient = objective(points @ components.T, codes)
            return -value, -(gradient.T @ points)

        self.components_, value, self.n_iter_ = minimise(
            loss, start, max_iter=self.max_iter, tol=self.tol, name="NCA", verbose=self.verbose
        )
        self.objective_ = -value / len(points)


def objective(z: Numbers, codes: NDArray[np.int64]) -> tuple[float, Numbers]:
    """J of the mapped points and its gradient, a block of rows at a time.

    With s_ij = -|z_i - z_j|^2, dJ/ds_ij = p_ij ([y_i = y_j] - p_i) =: -w_ij.
    """
    total, gradient = 0.0, np.zeros_like(z)
    cut = TAIL + math.log(len(z))
    for rows, square in square_blocks(z, ROUNDING):
        square -= square.min(1, keepdims=True)
        near = square <= cut
        if near.size > SMALL and np.count_nonzero(near) < DENSE * near.size:
            part, weights = _sparse_weights(square, near, codes, rows)
        else:
            part, weights = _dense_weights(square, codes, rows)
        total += float(part)
        laplacian(weights, rows, z, gradient)
    return total, 2 * gradient


def _sparse_weights(
    square: NDArray[Any], near: NDArray[np.bool_], codes: NDArray[np.int64], rows: slice
) -> tuple[Any, Any]:
    from scipy.sparse import csr_array

    flat = np.flatnonzero(near)
    count, n = square.shape
    begins = np.searchsorted(flat, np.arange(count + 1) * n)
    row = np.repeat(np.arange(count), np.diff(begins))
    column = flat - n * row
    p = np.exp(-square.ravel()[flat])
    p /= np.bincount(row, p, count)[row]
    same = codes[rows][row] == codes[column]
    right = np.bincount(row, p * same, count)
    weights = (p * (right[row] - same)).astype(square.dtype)
    narrow = (part.astype(np.int32) if n < 2**31 else part for part in (column, begins))
    return right.sum(), csr_array((weights, *narrow), shape=square.shape)


def _dense_weights(square: NDArray[Any], codes: NDArray[np.int64], rows: slice) -> tuple[Any, Any]:
    p = exponential(np.negative(square, out=square))
    p /= p.sum(1, keepdims=True)
    same = codes[rows, None] == codes
    right = np.einsum("ij,ij->i", p, same.astype(p.dtype))
    p *= right[:, None] - same
    return right.sum(dtype=np.float64), p
