"""k-means from mini-batches: `MiniBatchKMeans`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import finite, integer, to_numpy
from .estimator import check_random_state
from .kmeans import Clusterer
from .lloyd import Data, Fit, Numbers, Pass

__all__ = ["MiniBatchKMeans"]


class MiniBatchKMeans(Clusterer):
    """k-means from small random batches: each centroid moves to the running mean of the rows it was given.

    scikit-learn's algorithm, interface and random numbers. Faster than `KMeans` to a slightly larger inertia, and, by
    `partial_fit`, for data that arrives in pieces.

    Parameters
    ----------
    n_clusters, init, random_state, verbose
        As in `KMeans`.
    max_iter : int
        Passes over the data, in batches drawn with replacement, by weight.
    batch_size : int
    tol : float
        Ends when the summed squared movement of a batch is at most `tol` times the mean variance; 0: never.
    max_no_improvement : int or None
        Ends after so many batches in a row without a new minimum of the smoothed inertia of a batch.
    init_size : int, optional
        Rows drawn to choose first centroids from. Default 3 batches, or 3 K if that is more; at most N.
    n_init : int or "auto"
        Starts, of which the best on `init_size` rows is used. "auto": 3 for "random", else 1.
    reassignment_ratio : float
        Now and then, centroids with less than this part of the largest weight are replaced by random rows.

    Attributes
    ----------
    cluster_centers_, labels_, inertia_, n_iter_, n_features_in_
        As in `KMeans`; `n_iter_` counts passes. After `partial_fit` labels and inertia are of the last batch.
    n_steps_ : int
        Batches seen.

    Raises
    ------
    ValueError
        As `KMeans`.

    Notes
    -----
    Views of k-means as an auto-encoder: see `KMeans`.

    References
    ----------
    Sculley, Web-scale k-means clustering, 2010.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0], [9.0], [11.0]])
    >>> model = nf.MiniBatchKMeans(n_clusters=2, random_state=0).partial_fit(x)
    >>> sorted(model.partial_fit(x).cluster_centers_.ravel().tolist())
    [0.5, 10.0]
    """

    _random_inits = 3
    _counts: Numbers  # weight that each centroid has been given
    _since_reassignment: int  # rows

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        max_iter: int = 100,
        batch_size: int = 1024,
        verbose: int = 0,
        random_state: Any = None,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        init_size: int | None = None,
        n_init: int | str = "auto",
        reassignment_ratio: float = 0.01,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.verbose = verbose
        self.random_state = random_state
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.init_size = init_size
        self.n_init = n_init
        self.reassignment_ratio = reassignment_ratio

    def _check_batches(self, n: int, k: int) -> tuple[int, int]:
        """The sizes of a batch and of the sample that first centroids are chosen from."""
        batch = integer(self.batch_size, "batch_size")
        if batch < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch}")
        if self.max_no_improvement is not None and integer(self.max_no_improvement, "max_no_improvement") < 0:
            raise ValueError(f"max_no_improvement: expected None or at least 0, got {self.max_no_improvement}")
        finite(self.reassignment_ratio, "reassignment_ratio", 0.0)
        batch = min(batch, n)
        size = max(3 * batch, 3 * k) if self.init_size is None else integer(self.init_size, "init_size")
        if size < 1:
            raise ValueError(f"init_size: expected at least 1, got {size}")
        return batch, min(max(size, k), n)

    def _sampled_start(self, data: Data, k: int, init: Any, size: int, generator: np.random.RandomState) -> Numbers:
        """First centroids from a random sample."""
        if size < data.n:  # also where centroids are given: the random numbers stay those of scikit-learn
            data = data.part(generator.randint(0, data.n, size))
        return self._start(data, k, init, generator)

    def _step(self, data: Data, centers: Numbers, reassign: bool) -> tuple[Pass, Numbers]:
        """One batch: centroids after it, and `_counts` brought forward."""
        step = data.iterate(centers)
        if not math.isfinite(step.inertia):
            data.refuse(step.labels)
        new = centers.copy()
        filled = step.counts > 0
        weighted = centers[filled].astype(np.float64) * self._counts[filled, None] + step.sums[filled]
        self._counts += step.counts
        new[filled] = weighted / self._counts[filled, None]
        ratio = float(self.reassignment_ratio)
        if not reassign or ratio == 0:
            return step, new
        few = self._counts < ratio * self._counts.max()
        if few.sum() > data.n // 2:  # at most half a batch becomes centroids
            few[np.argsort(self._counts)[int(0.5 * data.n) :]] = False
        count = int(few.sum())
        if count:
            if self.verbose:
                print(f"[MiniBatchKMeans] Reassigning {count} cluster centers.")
            new[few] = data.rows(self._generator.choice(data.n, replace=False, size=count))
        # Not so small that they are replaced again at once.
        self._counts[few] = self._counts[~few].min()
        return step, new

    def _reassigns(self, batch: int) -> bool:
        """Every 10 K rows, and whenever a cluster is empty."""
        self._since_reassignment += batch
        if (self._counts == 0).any() or self._since_reassignment >= 10 * len(self._counts):
            self._since_reassignment = 0
            return True
        return False

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """Find the centroids of X; parameters as in `KMeans.fit`."""
        data = self._data(X, sample_weight, reset=True)
        k = self._check_clusters(data.n)
        init, starts = self._check_init(data, k)
        batch, size = self._check_batches(data.n, k)
        max_iter, tol = self._check_max_iter(), data.tolerance(self._check_tol())
        self._generator = generator = check_random_state(self.random_state)
        sample = data.part(generator.randint(0, data.n, size))
        least, centers = math.inf, np.empty(0)
        for start in range(starts):
            own = self._sampled_start(data, k, init, size, generator)
            inertia = sample.assign(own).inertia
            if self.verbose:
                print(f"Init {start + 1}/{starts} inertia {inertia:.6g}.")
            if inertia < least or start == 0:
                least, centers = inertia, own
        self._counts, self._since_reassignment = np.zeros(k), 0
        steps = max_iter * data.n // batch
        progress = Progress(self.max_no_improvement, tol, min(2 * batch / (data.n + 1), 1))
        for step in range(steps):
            result, new = self._step(data.draw(batch, generator), centers, self._reassigns(batch))
            moved = float(((new.astype(np.float64) - centers) ** 2).sum())
            centers = new
            if self.verbose:
                print(f"Minibatch step {step + 1}/{steps}: mean batch inertia {result.inertia / batch:.6g}.")
            if step > 0 and progress.ends(result.inertia / batch, moved):
                if self.verbose:
                    print(f"Converged at step {step + 1}/{steps}: {progress.why}.")
                break
        final = data.assign(centers)
        self.n_steps_ = step + 1
        self._keep(data, Fit(final.labels, final.inertia, centers, math.ceil(self.n_steps_ * batch / data.n)))
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """Move the centroids by one batch X; the first call chooses them from it."""
        first = not hasattr(self, "cluster_centers_")
        data = self._data(X, sample_weight, reset=first)
        if first:
            k = self._check_clusters(data.n)
            init, _ = self._check_init(data, k)
            _, size = self._check_batches(data.n, k)
            data.tolerance(0.0)  # refuses NaN
            self._generator = check_random_state(self.random_state)
            centers = self._sampled_start(data, k, init, size, self._generator)
            self._counts, self._since_reassignment, self.n_steps_ = np.zeros(k), 0, 0
        else:
            centers = to_numpy(self.cluster_centers_).astype(data.dtype, copy=False)
        _, new = self._step(data, centers, self._reassigns(data.n))
        self.n_steps_ += 1
        final = data.assign(new)
        self._keep(data, Fit(final.labels, final.inertia, new, getattr(self, "n_iter_", 0) + 1))
        return self


class Progress:
    """Whether batches still improve: an exponential average of their inertia."""

    def __init__(self, patience: int | None, tol: float, alpha: float) -> None:
        self.patience, self.tol, self.alpha = patience, tol, alpha
        self.average: float | None = None
        self.least = math.inf
        self.waited = 0
        self.why = ""

    def ends(self, inertia: float, moved: float) -> bool:
        self.average = inertia if self.average is None else self.average * (1 - self.alpha) + inertia * self.alpha
        if self.tol > 0 and moved <= self.tol:
            self.why = f"center shift {moved:.3g} within tolerance {self.tol:.3g}"
            return True
        self.waited = 0 if self.average < self.least else self.waited + 1
        self.least = min(self.least, self.average)
        self.why = "lack of improvement in inertia"
        return self.patience is not None and self.waited >= self.patience
