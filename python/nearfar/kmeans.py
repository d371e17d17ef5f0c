"""k-means: `KMeans`, and what it shares with `MiniBatchKMeans`.

The estimator; its steps are in `nearfar.lloyd`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from .arrays import Array, cast, dtype_name, finite, integer, is_torch, of_kind, to_numpy
from .distances import cdist
from .estimator import Estimator, check_random_state, convergence_warning, floating, weights_of
from .lloyd import Data, Fit, Numbers, lloyd, unit

__all__ = ["Clusterer", "KMeans"]

# ---- estimators ------------------------------------------------------------------------------------------------------


class Clusterer(Estimator):
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
        return data, to_numpy(self.cluster_centers_).astype(data.dtype, copy=False)

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
            init = np.array(to_numpy(floating(init, "init")), data.dtype)
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
            return data.rows(data.spread(k, generator))
        return data.rows(generator.choice(data.total, size=k, replace=False, p=data.probabilities()))

    def _keep(self, data: Data, fit: Fit) -> None:
        """Results as attributes, of the kind of the data."""
        self._torch = is_torch(data.x)
        self.cluster_centers_ = self._like(data, fit.centers)
        self.labels_ = self._like(data, fit.labels)
        self.inertia_ = fit.inertia
        self.n_iter_ = fit.n_iter

    @staticmethod
    def _like(data: Data, array: Array) -> Array:
        return of_kind(array, data.x) if isinstance(array, np.ndarray) else array

    def _check_max_iter(self) -> int:
        max_iter = integer(self.max_iter, "max_iter")  # type: ignore[attr-defined]
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        return max_iter

    def _check_tol(self) -> float:
        return finite(self.tol, "tol", 0.0)  # type: ignore[attr-defined]

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
        data.check_finite()
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
            torch for tensors, on their device.
        """
        self._check_fitted()
        centers = to_numpy(self.cluster_centers_)
        index: Array = codes if is_torch(codes) else np.asarray(codes)
        if not dtype_name(index).removeprefix("u").startswith("int"):
            raise TypeError(f"codes: expected integers, got {dtype_name(index)}")
        if math.prod(index.shape):
            least, most = int(index.min()), int(index.max())
            if least < 0 or most >= len(centers):
                raise ValueError(f"codes: expected 0 to {len(centers) - 1}, got {least} to {most}")
        return of_kind(centers, index)[index.long()] if is_torch(index) else centers[index]

    def reconstruct(self, X: Any) -> Array:
        """``decode(encode(X))``: every row replaced by its centroid."""
        return self.decode(self.encode(X))

    def reconstruction_error(self, X: Any, sample_weight: Any = None) -> float:
        """``sum_i w_i |x_i - reconstruct(x)_i|^2``: the inertia of X, of unit rows where `spherical`."""
        data, centers = self._fitted(X, sample_weight)
        return data.assign(centers).inertia


class KMeans(Clusterer):
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
    One iteration is one fused pass: the distances of a strip of rows stay in cache until their minimum is known, and
    the rows are added to their centroids' sums while they are still there. Sums are in float64. Assignments are those
    of distances computed from differences, though most pairs are screened by the cheaper expansion, so neither an
    offset of the data nor duplicates disturb them. Results are bitwise the same for every number of threads. Extra
    memory is O(N + K D) for the iterations; k-means++ packs a copy of X (up to 1 GiB) and keeps 3 + floor(ln K) numbers
    a row.

    Tensors on a GPU stay there, and so do the arrays that come back. An iteration copies the centroids to it and their
    sums to the host, which it waits for; seeding waits once. Centroids that are equally near to a row up to the
    round-off of the expansion may be taken for one another there.

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

    def _generator_of(self, data: Data) -> np.random.RandomState:
        return check_random_state(self.random_state)

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
        k = self._check_clusters(data.total)
        init, starts = self._check_init(data, k)
        max_iter, tol = self._check_max_iter(), data.tolerance(self._check_tol())
        generator = self._generator_of(data)
        best: Fit | None = None
        for _ in range(starts):
            centers = self._start(data, k, init, generator)
            if self.verbose:
                print("Initialization complete")
            own = lloyd(data, centers, max_iter, tol, bool(self.verbose))
            if best is None or own.inertia < best.inertia:
                best = own
        assert best is not None  # starts >= 1
        distinct = data.distinct(best.labels, k)
        if distinct < k:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters ({k}). "
                "Possibly due to duplicate points in X.",
                convergence_warning(),
                stacklevel=2,
            )
        self._keep(data, best)
        return self
