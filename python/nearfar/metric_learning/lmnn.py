"""Large-margin nearest neighbours: target neighbours are pulled near, impostors are pushed beyond them by a margin."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import integer
from ..neighbors import knn
from .base import MetricLearner, Numbers, laplacian, minimise, square_blocks


class LMNN(MetricLearner):
    """Large-margin nearest neighbours (Weinberger & Saul, 2005).

    .. math:: \\min_L\\ (1 - \\mu) \\sum_{i,\\, j \\in T_i} d_{ij}^2
              + \\mu \\sum_{i,\\, j \\in T_i} \\sum_{l: y_l \\ne y_i} \\bigl[1 + d_{ij}^2 - d_{il}^2\\bigr]_+,
              \\qquad d_{ij} = \\lVert L(x_i - x_j)\\rVert

    :math:`T_i`, the targets, are the nearest rows of the same class in the space of X.

    Parameters
    ----------
    n_neighbors : int
        Targets of each row, at least 1; fewer where its class has fewer others.
    n_components : int, optional
        Rows of L, 1 to D. Default D.
    push : float
        mu, between 0 and 1.
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
        The value above.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    The margin of 1 is in squared units of X: scale the columns first. Every step looks at all pairs, a block of rows at
    a time, and finds all impostors anew. The problem is convex in M = L^T L, not in L; L-BFGS starts at the identity.

    Weinberger, Saul: Distance Metric Learning for Large Margin Nearest Neighbor Classification, 2005 and 2009.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> x = np.stack([y + 0.1 * rng.standard_normal(60), 5 * rng.standard_normal(60)], 1)  # the second column is noise
    >>> m = nf.LMNN().fit(x, y).get_mahalanobis_matrix()
    >>> bool(m[0, 0] > 100 * m[1, 1])
    True
    """

    objective_: float
    n_iter_: int

    def __init__(
        self,
        n_neighbors: int = 3,
        *,
        n_components: int | None = None,
        push: float = 0.5,
        max_iter: int = 200,
        tol: float = 1e-5,
        verbose: int = 0,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.n_components = n_components
        self.push = push
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose

    def _fit(self, X: Any, y: Any) -> None:
        points, codes = self._labelled(X, y)
        if not 0 < self.push < 1:
            raise ValueError(f"push: expected a number between 0 and 1, got {self.push}")
        if integer(self.n_neighbors, "n_neighbors") < 1:
            raise ValueError(f"n_neighbors: expected at least 1, got {self.n_neighbors}")
        targets = target_neighbors(points, codes, self.n_neighbors)
        start = self._initial(points, self.n_components)

        def loss(components: Numbers) -> tuple[float, Numbers]:
            value, gradient = objective(points @ components.T, codes, targets, self.push)
            return value, gradient.T @ points

        self.components_, self.objective_, self.n_iter_ = minimise(
            loss, start, max_iter=self.max_iter, tol=self.tol, name="LMNN", verbose=self.verbose
        )


def target_neighbors(x: Numbers, codes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The k nearest rows of the own class, (N, k); -1 where the class has no more."""
    targets = np.full((len(x), k), -1)
    for c in range(codes.max() + 1):
        own = np.flatnonzero(codes == c)
        some = min(k, len(own) - 1)
        if some:
            targets[own, :some] = own[knn(x[own], k=some)[1]]
    return targets


def objective(z: Numbers, codes: NDArray[np.int64], targets: NDArray[np.int64], push: float) -> tuple[float, Numbers]:
    """The loss of the mapped points and its gradient, a block of rows at a time."""
    from scipy.sparse import coo_array

    total, gradient = 0.0, np.zeros_like(z)
    for rows, square in square_blocks(z):
        index = np.arange(len(square))
        mine = targets[rows]
        present = mine >= 0
        pulled = np.square(z[rows, None] - z[mine]).sum(-1) * present
        # Whoever is of another class and nearer than the farthest target's margin may be an impostor of some target.
        reach = np.where(present.any(1), pulled.max(1) + 1, -np.inf)
        row, column = np.nonzero(square < reach[:, None])
        other = codes[rows][row] != codes[column]
        row, column = row[other], column[other]
        slack = (1 + pulled[row] - square[row, column, None]) * present[row]
        active = slack > 0
        total += (1 - push) * pulled.sum() + push * slack[active].sum()
        pull = (1 - push) * present
        for k in range(mine.shape[1]):
            pull[:, k] += push * np.bincount(row, active[:, k], len(square))
        edges = (
            np.concatenate([np.broadcast_to(index[:, None], mine.shape)[present], row]),
            np.concatenate([mine[present], column]),
        )
        weights = np.concatenate([pull[present], -push * active.sum(1)])
        laplacian(coo_array((weights, edges), shape=square.shape).tocsr(), rows, z, gradient)
    return total, 2 * gradient
