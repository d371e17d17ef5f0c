"""k-means: `KMeans` (Lloyd's iterations) and `MiniBatchKMeans`.

Both are loops of one fused pass, `operations.lloyd`: assign every row to its nearest centroid and add it to that
centroid's sum. What remains is arithmetic on K x D numbers.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import operations
from .arrays import Array, cast, compute_dtype, integer, is_torch, number
from .distances import cdist
from .estimator import Estimator, check_random_state, convergence_warning, floating, weights_of

__all__ = ["KMeans", "MiniBatchKMeans"]

Numbers = NDArray[Any]


class Pass(NamedTuple):
    """What one pass over the data gives."""

    labels: Numbers  # (n,) int64
    distances: Numbers  # (n,) squared
    sums: Numbers  # (k, d) float64
    counts: Numbers  # (k,) float64
    inertia: float
    changed: int


class Data:
    """Points, weights and whether rows are brought to unit norm; results are NumPy arrays whatever the points are."""

    def __init__(self, x: Array, weights: Numbers | None, normalize: bool) -> None:
        self.x, self.weights, self.normalize = x, weights, normalize
        self.n, self.d = map(int, x.shape)
        self.dtype = np.dtype(compute_dtype(x))

    def rows(self, index: Any) -> Numbers:
        """Some rows in the compute dtype."""
        rows = np.asarray(cast(self.x[index], self.dtype.name))
        return unit(rows) if self.normalize else rows

    def part(self, index: Numbers) -> Data:
        """The data of some rows."""
        return Data(self.x[index], None if self.weights is None else self.weights[index], self.normalize)

    def total_weight(self) -> float:
        return float(self.n) if self.weights is None else float(self.weights.sum(dtype=np.float64))

    def probabilities(self) -> Numbers:
        if self.weights is None:
            return np.full(self.n, 1 / self.n)
        weights = self.weights.astype(np.float64)
        return weights / weights.sum()

    def iterate(self, centers: Numbers, labels: Numbers | None = None) -> Pass:
        """Assign all rows; `labels` are the previous ones and are overwritten."""
        labels = np.full(self.n, -1, np.int64) if labels is None else labels
        distances = np.empty(self.n, self.dtype)
        sums, counts = np.empty(centers.shape), np.empty(len(centers))
        inertia, changed = operations.lloyd(
            self.x, centers, self.normalize, self.weights, labels, distances, sums, counts
        )
        return Pass(labels, distances, sums, counts, inertia, changed)

    def assign(self, centers: Numbers) -> Pass:
        """The same without the sums."""
        labels, distances = np.full(self.n, -1, np.int64), np.empty(self.n, self.dtype)
        inertia, changed = operations.lloyd(
            self.x, centers, self.normalize, self.weights, labels, distances, None, None
        )
        if not math.isfinite(inertia):
            self.refuse(labels)
        return Pass(labels, distances, np.empty(0), np.empty(0), inertia, changed)

    def mean_variance(self) -> float:
        """The mean over coordinates of their variance: the inertia of one cluster, per row and coordinate.

        Also refuses rows that are not finite, which have no distance to anything.
        """
        plain = Data(self.x, None, self.normalize)
        first = plain.iterate(self.rows(slice(0, 1)))
        if not math.isfinite(first.inertia):
            self.refuse(first.labels)
        mean = first.sums / self.n
        if self.normalize:  # E|u|^2 - |mean|^2
            return max(1 - float((mean**2).sum()), 0.0) / self.d
        return plain.assign(mean.astype(self.dtype)).inertia / (self.n * self.d)

    def refuse(self, labels: Numbers) -> None:
        bad = int(np.flatnonzero(labels < 0)[0])
        if np.isfinite(self.rows(slice(bad, bad + 1))).all():
            raise ValueError(f"X: row {bad} is so large that its squared distances overflow {self.dtype}")
        raise ValueError(f"X: expected finite numbers, got NaN or inf in row {bad}")


def unit(rows: Numbers) -> Numbers:
    """Rows of unit norm; a zero row stays zero."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    result: Numbers = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0, casting="same_kind")
    return result


# ---- the steps -------------------------------------------------------------------------------------------------------


def seed(data: Data, k: int, generator: np.random.RandomState) -> Numbers:
    """Greedy k-means++: the indices of k rows. Draws the same random numbers as scikit-learn."""
    trials = 2 + int(math.log(k))
    first = int(generator.choice(data.n, p=data.probabilities()))
    uniforms = generator.uniform(size=(k - 1, trials))
    return operations.seeding(data.x, data.normalize, data.weights, first, uniforms)


def relocate(data: Data, step: Pass) -> None:
    """Give every empty centroid one of the rows that are farthest from their own, and take it away there."""
    empty = np.flatnonzero(step.counts == 0)
    distances = step.distances if data.weights is None else np.where(data.weights > 0, step.distances, -1)
    if not len(empty) or distances.max() <= 0:  # fewer distinct rows than centroids
        return
    farthest = np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]
    rows = data.rows(farthest).astype(np.float64)
    for target, index, row in zip(empty, farthest, rows, strict=True):
        weight = 1.0 if data.weights is None else float(data.weights[index])
        source = step.labels[index]
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
    labels: Numbers
    inertia: float
    centers: Numbers
    n_iter: int


def lloyd(data: Data, centers: Numbers, max_iter: int, tol: float, verbose: bool) -> Fit:
    """Lloyd's iterations until labels stay, or centroids move by less than `tol` (squared, summed)."""
    labels = np.full(data.n, -1, np.int64)
    still = False
    for iteration in range(max_iter):
        step = data.iterate(centers, labels)
        relocate(data, step)
        new = means(data, step, centers)
        shift = float(((new.astype(np.float64) - centers) ** 2).sum())
        if verbose:
            print(f"Iteration {iteration}, inertia {step.inertia:.6g}.")
        still = np.array_equal(new, centers)
        centers = new
        if step.changed == 0 or shift <= tol:
            if verbose:
                why = "strict convergence" if step.changed == 0 else f"center shift {shift:.3g} within tolerance {tol:.3g}"
                print(f"Converged at iteration {iteration}: {why}.")
            break
    if not still:  # labels and inertia of the centroids that are returned
        step = data.assign(centers)
    return Fit(step.labels, step.inertia, centers, iteration + 1)


# ---- estimators ------------------------------------------------------------------------------------------------------


class _Clusterer(Estimator):
    """What both estimators share: validation, prediction, and the view of k-means as an auto-encoder."""

    _estimator_type = "clusterer"
    n_clusters: int
    init: Any
    n_init: Any
    random_state: Any
    spherical = False
    _random_inits: int  # what n_init="auto" is for random centroids

    def _data(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Data:
        x = self._points(X, reset=reset)
        return Data(x, weights_of(sample_weight, x), bool(self.spherical))

    def _fitted(self, X: Any, sample_weight: Any = None) -> tuple[Data, Numbers]:
        """Data to predict for, and the centroids in its dtype."""
        self._check_fitted()
        data = self._data(X, sample_weight)
        return data, np.asarray(self.cluster_centers_).astype(data.dtype, copy=False)

    def _check_clusters(self, n: int) -> int:
        k = integer(self.n_clusters, "n_clusters")
        if k < 1:
            raise ValueError(f"n_clusters: expected at least 1, got {k}")
        if n < k:
            raise ValueError(f"n_clusters: n_samples={n} should be >= n_clusters={k}")
        return k

    def _check_init(self, data: Data, k: int) -> tuple[Any, int]:
        """'k-means++', 'random' or centroids; and how many starts."""
        init = self.init
        if isinstance(init, str):
            if init not in ("k-means++", "random"):
                raise ValueError(f"init: expected 'k-means++', 'random' or an array, got {init!r}")
            default = 1 if init == "k-means++" else self._random_inits
        elif callable(init):
            raise TypeError("init: expected 'k-means++', 'random' or an array, got a callable")
        else:
            init = floating(init.detach() if is_torch(init) else init, "init")
            init = np.array(cast(init, data.dtype.name))
            if init.shape != (k, data.d):
                raise ValueError(f"init: expected shape {(k, data.d)}, got {init.shape}")
            if not np.isfinite(init).all():
                raise ValueError("init: expected finite numbers, got NaN or inf")
            init = unit(init) if data.normalize else init
            default = 1
        if isinstance(self.n_init, str) and self.n_init == "auto":
            return init, default
        n_init = integer(self.n_init, "n_init")
        if n_init < 1:
            raise ValueError(f"n_init: expected 'auto' or at least 1, got {n_init}")
        return init, n_init if isinstance(init, str) else 1

    def _start(self, data: Data, k: int, init: Any, generator: np.random.RandomState) -> Numbers:
        """First centroids."""
        if not isinstance(init, str):
            return np.array(init)
        if init == "k-means++":
            return data.rows(seed(data, k, generator))
        return data.rows(generator.choice(data.n, size=k, replace=False, p=data.probabilities()))

    def _keep(self, data: Data, fit: Fit) -> None:
        """Results as attributes, of the kind of the data."""
        self._torch = is_torch(data.x)
        self.cluster_centers_ = self._like(data, fit.centers)
        self.labels_ = self._like(data, fit.labels)
        self.inertia_ = fit.inertia
        self.n_iter_ = fit.n_iter

    @staticmethod
    def _like(data: Data, array: Numbers) -> Array:
        if not is_torch(data.x):
            return array
        import torch

        return torch.from_numpy(np.ascontiguousarray(array))

    def _check_max_iter(self) -> int:
        max_iter = integer(self.max_iter, "max_iter")  # type: ignore[attr-defined]
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        return max_iter

    def _check_tol(self) -> float:
        tol = number(self.tol, "tol")  # type: ignore[attr-defined]
        if not 0 <= tol < math.inf:
            raise ValueError(f"tol: expected a number that is not negative, got {tol}")
        return tol

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """`fit`, then ``labels_``."""
        return self.fit(X, sample_weight=sample_weight).labels_  # type: ignore[attr-defined]

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """`fit`, then `transform`."""
        return self.fit(X, sample_weight=sample_weight).transform(X)  # type: ignore[attr-defined]

    def predict(self, X: Any) -> Array:
        """The nearest centroid of every row: int64 (N,), ties by lower index; of the kind of X."""
        data, centers = self._fitted(X)
        return self._like(data, data.assign(centers).labels)

    def transform(self, X: Any) -> Array:
        """The Euclidean distance of every row to every centroid (N, K); cosine distance where `spherical`."""
        data, centers = self._fitted(X)
        x = cast(data.x, data.dtype.name)
        return cdist(x, self._like(data, centers), metric="cosine" if data.normalize else "euclidean")

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus `reconstruction_error`."""
        return -self.reconstruction_error(X, sample_weight)

    def encode(self, X: Any) -> Array:
        """The code of every row, its nearest centroid: `predict` by the name it has in an auto-encoder."""
        return self.predict(X)

    def decode(self, codes: Array) -> Array:
        """The centroid of every code.

        Parameters
        ----------
        codes : integer array (...)
            0 to K - 1.

        Returns
        -------
        array (..., D)
            torch for tensors.
        """
        self._check_fitted()
        centers = np.asarray(self.cluster_centers_)
        index = np.asarray(codes)
        if index.dtype.kind not in "iu":
            raise TypeError(f"codes: expected integers, got {index.dtype}")
        if index.size and (index.min() < 0 or index.max() >= len(centers)):
            raise ValueError(f"codes: expected 0 to {len(centers) - 1}, got {index.min()} to {index.max()}")
        means = centers[index]
        if not is_torch(codes):
            return means
        import torch

        return torch.from_numpy(means)

    def reconstruct(self, X: Any) -> Array:
        """``decode(encode(X))``: every row replaced by its centroid."""
        return self.decode(self.encode(X))

    def reconstruction_error(self, X: Any, sample_weight: Any = None) -> float:
        """``sum_i w_i |x_i - reconstruct(x)_i|^2``: the inertia of X, of unit rows where `spherical`."""
        data, centers = self._fitted(X, sample_weight)
        return data.assign(centers).inertia


class KMeans(_Clusterer):
    r"""k-means clustering by Lloyd's iterations, with scikit-learn's estimator interface.

    .. math:: \min_{c_1 \dots c_K} \sum_i w_i \min_k \lVert x_i - c_k \rVert^2

    k-means is an auto-encoder whose code is one-hot. Write the labels as rows :math:`z_i` of a matrix Z, each a unit
    vector of K coordinates, and the centroids as the rows of C. The objective is then the reconstruction error

    .. math:: \min_{Z \in \{e_1 \dots e_K\}^N,\; C} \lVert X - Z C \rVert_F^2 .

    The encoder :math:`z_i = e_{\arg\min_k \lVert x_i - c_k \rVert}` is the best Z for a given C, and the decoder, which
    looks a code up in C, is best at the least-squares solution :math:`C = (Z^T Z)^{-1} Z^T X` for a given Z: the means
    of the classes. Lloyd's iterations alternate the two. `encode`, `decode`, `reconstruct` and `reconstruction_error`
    are this view; a row costs :math:`\log_2 K` bits.

    Parameters
    ----------
    n_clusters : int
        K, at most the number of rows.
    init : {"k-means++", "random"} or array (K, D)
        Greedy k-means++ (2 + floor(ln K) candidates a step, as scikit-learn), K different rows at random, or centroids.
    n_init : int or "auto"
        Starts, of which the least inertia is kept. "auto": 10 for "random", else 1. An array is one start.
    max_iter : int
        Iterations of one start.
    tol : float
        A start ends when the summed squared movement of the centroids is at most `tol` times the mean variance of the
        columns, or when no label changes.
    spherical : bool
        Spherical k-means: rows and centroids have unit norm (a zero row stays zero), a centroid is the direction of the
        sum of its rows. Squared distances of unit vectors, :math:`2 - 2 \cos`, are in the place of the others.
    random_state : int, RandomState or None
        None: NumPy's global generator. The same seed draws the same rows as scikit-learn, up to round-off.
    verbose : int
        1: a line per iteration.

    Attributes
    ----------
    cluster_centers_ : array (K, D)
        float32 for half precisions, else the dtype of X; a tensor if X was one, as the other arrays.
    labels_ : int64 array (N,)
        The nearest of `cluster_centers_` for every row of X, ties by lower index.
    inertia_ : float
        The objective, for `labels_` and `cluster_centers_` as they are.
    n_iter_, n_features_in_ : int

    Raises
    ------
    ValueError
        From `fit`: a parameter out of range, fewer rows than clusters, NaN or inf in X, weights that are negative.

    Notes
    -----
    One iteration is one fused pass: the distances of a strip of rows stay in cache until their minimum is known, and the
    rows are added to their centroids' sums while they are still there. Sums are in float64. Assignments are those of
    distances computed from differences, though most pairs are screened by the cheaper expansion, so neither an offset
    of the data nor duplicates disturb them. Results are bitwise the same for every number of threads. Extra memory is
    O(N + K D) for the iterations; k-means++ packs a copy of X (up to 1 GiB) and keeps 3 + floor(ln K) numbers a row.

    An empty cluster takes the row that is farthest from its centroid. More clusters than distinct rows: the rest of the
    centroids stay where they were, with a warning (scikit-learn's ConvergenceWarning where that is in use). X is not
    differentiated.

    References
    ----------
    Lloyd, Least squares quantization in PCM, 1982. Arthur and Vassilvitskii, k-means++, 2007. Dhillon and Modha,
    Concept decompositions for large sparse text data using clustering, 2001 (spherical).

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0], [9.0], [11.0]])
    >>> model = nf.KMeans(n_clusters=2, random_state=0).fit(x)
    >>> model.inertia_, sorted(model.cluster_centers_.ravel().tolist())
    (2.5, [0.5, 10.0])
    >>> float(model.reconstruction_error(x)), model.reconstruct(np.array([[0.4]]))
    (2.5, array([[0.5]]))
    """

    _random_inits = 10

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        spherical: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.spherical = spherical
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Find the centroids of X.

        Parameters
        ----------
        X : array (N, D)
            NumPy or torch; lists, integers and frames are converted to float64.
        y : ignored
            For scikit-learn's pipelines.
        sample_weight : array (N,), optional
            Not negative; default 1 for every row.
        """
        data = self._data(X, sample_weight, reset=True)
        k = self._check_clusters(data.n)
        init, starts = self._check_init(data, k)
        max_iter, tol = self._check_max_iter(), self._check_tol() * data.mean_variance()
        generator = check_random_state(self.random_state)
        best: Fit | None = None
        for _ in range(starts):
            centers = self._start(data, k, init, generator)
            if self.verbose:
                print("Initialization complete")
            own = lloyd(data, centers, max_iter, tol, bool(self.verbose))
            if best is None or own.inertia < best.inertia:
                best = own
        assert best is not None  # starts >= 1
        distinct = len(np.unique(best.labels))
        if distinct < k:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters ({k}). "
                "Possibly due to duplicate points in X.",
                convergence_warning(),
                stacklevel=2,
            )
        self._keep(data, best)
        return self


class MiniBatchKMeans(_Clusterer):
    """k-means from small random batches: each centroid moves to the running mean of the rows it was given.

    scikit-learn's algorithm, interface and random numbers. Faster than `KMeans` to a slightly larger inertia, and, by
    `partial_fit`, for data that arrives in pieces.

    Parameters
    ----------
    n_clusters, init, random_state, verbose
        As in `KMeans`.
    max_iter : int
        Passes over the data, in batches drawn with replacement.
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
        if not 0 <= number(self.reassignment_ratio, "reassignment_ratio") < math.inf:
            raise ValueError(f"reassignment_ratio: expected a number that is not negative, got {self.reassignment_ratio}")
        batch = min(batch, n)
        size = max(3 * batch, 3 * k) if self.init_size is None else integer(self.init_size, "init_size")
        if size < 1:
            raise ValueError(f"init_size: expected at least 1, got {size}")
        return batch, min(max(size, k), n)

    def _sampled_start(
        self, data: Data, k: int, init: Any, size: int, generator: np.random.RandomState
    ) -> Numbers:
        """First centroids from a random sample."""
        if isinstance(init, str) and size < data.n:
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
        max_iter, tol = self._check_max_iter(), self._check_tol() * data.mean_variance()
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
            part = data.part(generator.randint(0, data.n, batch))
            result, new = self._step(part, centers, self._reassigns(batch))
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
            data.mean_variance()  # refuses NaN
            self._generator = check_random_state(self.random_state)
            centers = self._sampled_start(data, k, init, size, self._generator)
            self._counts, self._since_reassignment, self.n_steps_ = np.zeros(k), 0, 0
        else:
            centers = np.asarray(self.cluster_centers_).astype(data.dtype, copy=False)
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
