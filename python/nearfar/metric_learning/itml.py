"""Information-theoretic metric learning: the metric nearest to a prior that keeps bounds on pairs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import finite, integer
from ..estimator import check_random_state, convergence_warning
from .base import MetricLearner, Numbers, minimise


class ITML(MetricLearner):
    """Information-theoretic metric learning (Davis, Kulis, Jain, Sra & Dhillon, 2007).

    .. math:: \\min_{M \\succeq 0} \\operatorname{tr}(M) - \\log\\det M
              \\quad\\text{subject to}\\quad d_M(x, x')^2 \\le u \\quad\\text{or}\\quad d_M(x, x')^2 \\ge l

    for similar and for dissimilar pairs, with slack: a bound b may move to b' at the price
    :math:`\\gamma(b'/b - \\log(b'/b) - 1)`. Convex, with one optimum.

    Parameters
    ----------
    gamma : positive number
        Price of slack; larger keeps the bounds more strictly.
    n_constraints : int, optional
        Pairs of each sort that are drawn from labels. Default 20 C (C - 1) for C classes.
    max_iter : int
        Iterations of L-BFGS.
    tol : positive number
        How small the gradient (in the learned units) is to be; where it is not, `fit` warns.
    random_state : int, RandomState or None
        Draws the pairs.
    verbose : int
        1 prints the objective at every step.

    Attributes
    ----------
    components_ : array (D, D)
        M is ``components_.T @ components_``.
    bounds_ : tuple of float
        (u, l): the 5th and 95th percentile of the squared distances of pairs.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    The prior is the identity: scale the columns first. From labels u and l are those of the drawn pairs.

    Davis, Kulis, Jain, Sra, Dhillon: Information-Theoretic Metric Learning, 2007.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> x = np.stack([y + 0.1 * rng.standard_normal(60), rng.standard_normal(60)], 1)  # the second column is noise
    >>> m = nf.ITML(random_state=0).fit(x, y).get_mahalanobis_matrix()
    >>> bool(m[0, 0] > 10 * m[1, 1])
    True
    """

    bounds_: tuple[float, float]
    n_iter_: int

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        n_constraints: int | None = None,
        max_iter: int = 1000,
        tol: float = 1e-3,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.gamma = gamma
        self.n_constraints = n_constraints
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def _fit(self, X: Any, y: Any) -> None:
        gamma = finite(self.gamma, "gamma", 0.0, strict=True)
        if getattr(X, "ndim", 2) == 3:
            differences, similar = self._paired(X, y)
        else:
            points, codes = self._labelled(X, y)
            classes = int(codes.max()) + 1
            count = 20 * classes * (classes - 1) if self.n_constraints is None else self.n_constraints
            if integer(count, "n_constraints") < 1:
                raise ValueError(f"n_constraints: expected at least 1, got {count}")
            first, second = draw_pairs(codes, count, check_random_state(self.random_state))
            differences, similar = points[first] - points[second], codes[first] == codes[second]
        square = np.square(differences).sum(1)
        differences, similar, square = (a[square > 0] for a in (differences, similar, square))
        if not len(square):
            raise ValueError("X: expected points that differ, got pairs of equal points only")
        low, high = np.percentile(square, (5, 95))
        self.bounds_ = (float(low), float(high))
        self.components_, self.n_iter_, remaining = solve(
            differences, similar, np.where(similar, low, high), gamma, self.max_iter, self.verbose
        )
        if remaining > self.tol:
            text = f"ITML: the gradient is {remaining:.1e}, not {self.tol:.1e}; raise max_iter"
            warnings.warn(text, convergence_warning(), stacklevel=2)


def draw_pairs(
    codes: NDArray[np.int64], count: int, generator: np.random.RandomState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`count` pairs of one class (none where no class has two rows), then `count` of two classes."""
    n = len(codes)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    begins = np.cumsum(sizes) - sizes
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    shared = np.flatnonzero(sizes[codes] > 1)
    first = generator.choice(shared, count) if len(shared) else shared
    own = codes[first]
    # A step of 1 to size - 1 round the own class; of 0 to n - size - 1 past its end, round the others.
    within = begins[own] + (place[first] - begins[own] + 1 + generator.randint(0, sizes[own] - 1)) % sizes[own]
    third = generator.randint(0, n, count)
    own = codes[third]
    beyond = (begins[own] + sizes[own] + generator.randint(0, n - sizes[own])) % n
    return np.concatenate([first, third]), np.concatenate([order[within], order[beyond]])


def solve(
    differences: Numbers, similar: NDArray[np.bool_], bound: Numbers, gamma: float, max_iter: int, verbose: int
) -> tuple[Numbers, int, float]:
    """A factor L of M, the number of iterations, and how far from 0 the gradient is.

    The best bound for a distance is known: it stays where it is kept and moves to the distance where it is not. With
    r = d^2 / b and h(r) = r - log r - 1 that leaves a smooth convex function of M without constraints,
    tr M - log det M + gamma sum h(max(r, 1) or min(r, 1)). Its gradient G by M gives 2 L G by L, which is 0 only where
    G is: L-BFGS on L finds the optimum. The published method, cyclic projections, needs P updates of M in each of up to
    thousands of rounds to get there: iris 0.01 s in place of 2.6 s, the digits 1.1 s in place of minutes.
    """
    d = differences.shape[1]

    def loss(components: Numbers) -> tuple[float, Numbers]:
        mapped = differences @ components.T
        ratio = np.square(mapped).sum(1) / bound
        ratio = np.where(similar, np.maximum(ratio, 1), np.minimum(ratio, 1))
        _, log_det = np.linalg.slogdet(components)
        value = np.square(components).sum() - 2 * log_det + gamma * (ratio - np.log(ratio) - 1).sum()
        slope = gamma * (1 - 1 / ratio) / bound
        pull = (slope[:, None] * mapped).T @ differences  # L times the slopes' part of G
        return value, 2 * (components + pull - np.linalg.inv(components).T)

    options = {"maxcor": 20, "gtol": 0.0, "maxfun": 20 * max_iter}
    # Not the identity: a first step of length 1 would end in the singular 0 where there is one column.
    start = 0.75 * np.eye(d)
    components, _, rounds = minimise(loss, start, max_iter=max_iter, tol=1e-14, name="ITML", verbose=verbose, **options)
    remaining = loss(components)[1] @ components.T / 2  # L G L^T, which has no unit: L M^-1 L^T = 1
    return components, rounds, float(np.linalg.norm(remaining) / np.sqrt(d))
