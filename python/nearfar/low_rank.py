"""Gram matrices of low rank: greedy pivoted Cholesky, Nystrom from landmarks, random Fourier features.

All three replace ``K`` by ``F F^T`` with few columns, so products cost O(N r). The first two are ``K_nm W W^T K_mn``
on some points, below K in the positive semi-definite order, so their error is a trace that is known, not estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import (
    Array,
    cast,
    check_matrix,
    check_points,
    check_seed,
    compute_dtype,
    empty,
    integer,
    is_torch,
    matrix_product,
    namespace,
    number,
    of_kind,
    rows_at,
    to_numpy,
)
from .implicit import ImplicitGram
from .kernels.families import Gaussian, Laplacian, Matern
from .kernels.named import resolve

__all__ = ["LowRank", "RandomFeatures", "nystrom", "pivoted_cholesky", "random_features"]

Numbers = NDArray[Any]

# A pivot, or an eigenvalue of the landmarks' Gram matrix, below this many eps of the largest is round-off.
NOISE = 10.0

# Rows of a kernel matrix that greedy elimination asks for together: of the next pivots, most are now among so many with
# the largest diagonal, and a dozen rows take little longer than one. 20000 x 32, rank 200: 30 calls in place of 200.
AHEAD = 12

# Angles of random features at a time: they and their float64 stay in the cache.
ANGLES = 1 << 16


@dataclass(frozen=True, eq=False)
class LowRank:
    """``K ~ factor factor^T`` at given points.

    Attributes
    ----------
    factor : array (N, r)
        Of the kind of the points, in the dtype that computes.
    error : float
        ``tr(K - factor factor^T)``: the nuclear norm of what is left, hence a bound of its spectral norm. Not
        negative; of the exact kernel up to round-off of about ``eps tr(K)``.
    landmarks : array (m, D)
        The points that were chosen.
    indices : int64 array (m,) or None
        Which they are, where they are of the set.
    """

    factor: Array
    error: float
    landmarks: Array = field(repr=False)
    indices: NDArray[np.int64] | None = field(repr=False)
    _kernel: Any = field(repr=False)
    _map: Numbers = field(repr=False)

    @property
    def rank(self) -> int:
        """Columns of the factor."""
        return int(self.factor.shape[1])

    def matmul(self, v: Array) -> Array:
        """``factor (factor^T v)`` for v (N, R) or (N,)."""
        v = cast(v, compute_dtype(v))
        return matrix_product(self.factor, matrix_product(self.factor.T, v))

    def transform(self, y: Array) -> Array:
        """Features (M, r) of other points: ``transform(y) transform(z)^T ~ k(y, z)``; the factor for the points."""
        gram = ImplicitGram(self._kernel, self.landmarks)
        return of_kind(gram.matmul(self._map, cast(y, compute_dtype(y))), y)


@dataclass(frozen=True)
class Greedy:
    """A partial pivoted Cholesky factorisation, rows of `factor` being its columns."""

    factor: Numbers  # (r, n)
    pivots: NDArray[np.int64]
    residual: NDArray[np.float64]  # diagonal of what is left
    indefinite: bool  # an entry of it is negative beyond round-off: K is not positive semi-definite


def greedy(gram: ImplicitGram, rank: int, tol: float) -> Greedy:
    """Eliminate the largest diagonal entry that is left, until its trace is `tol` of the whole, or round-off."""
    residual = gram.diagonal().astype(np.float64)
    total, largest = residual.sum(), float(np.abs(residual).max(initial=0.0))
    noise = NOISE * float(np.finfo(gram.dtype).eps) * largest
    factor, pivots = np.empty((rank, gram.n), gram.dtype), np.empty(rank, np.int64)
    rows: dict[int, Numbers] = {}
    k = 0
    while k < rank:
        p = int(residual.argmax())
        if residual.min() < -noise or residual[p] <= noise or residual.sum() <= tol * total:
            break
        if p not in rows:
            likely = np.argpartition(residual, -min(AHEAD, rank - k))[-min(AHEAD, rank - k) :]
            wanted = np.union1d(likely, p)
            rows = dict(zip(wanted.tolist(), gram.block(wanted), strict=True))
        row = rows[p] - factor[:k, p] @ factor[:k]
        row /= math.sqrt(residual[p])
        row[pivots[:k]] = 0  # exactly so in exact arithmetic
        row[p] = math.sqrt(residual[p])
        residual -= row.astype(np.float64) ** 2
        residual[p] = 0
        factor[k], pivots[k] = row, p
        k += 1
    return Greedy(factor[:k], pivots[:k], residual, bool(residual.min(initial=0.0) < -noise))


def pivoted_cholesky(kernel: Any, x: Array, rank: int, tol: float = 1e-6) -> LowRank:
    r"""A greedy low-rank factor of a Gram matrix that is never formed.

    .. math:: K \approx L L^T, \quad \operatorname{tr}(K - L L^T) \le \text{tol} \operatorname{tr}(K)
              \text{ or } L \text{ has rank columns}

    Parameters
    ----------
    kernel : kernel or str
        Mercer: of `nearfar.kernels`, or a name of `nearfar.gram` with its default parameters.
    x : array (N, D)
    rank : int
        At most this many columns.
    tol : float
        Stop when the trace of what is left is this part of the trace of K. Below round-off it stops in any case.

    Returns
    -------
    LowRank
        With `factor`, `error` (the trace that is left), `landmarks` (the pivots), `matmul`, `transform`. No gradient.

    Raises
    ------
    ValueError
        A negative diagonal appears, which proves that the kernel is not positive semi-definite at these points.

    Notes
    -----
    Two to six times ``rank N`` entries of the kernel, O(N rank^2) arithmetic, O(N rank) memory. Every step eliminates
    the point whose diagonal is left largest, so the pivots are far apart. Harbrecht, Peters and Schneider, On the
    low-rank approximation by the pivoted Cholesky decomposition, 2012: the trace decays as fast as the eigenvalues, if
    these decay exponentially.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.linspace(0, 1, 200)[:, None]
    >>> low = nf.pivoted_cholesky(nf.kernels.Gaussian(0.5), x, rank=50, tol=1e-8)
    >>> low.rank < 12, low.error <= 1e-8 * 200
    (True, True)
    """
    most, tol = _count(rank, "rank"), number(tol, "tol")
    if not 0 <= tol < 1:
        raise ValueError(f"tol: expected a number from 0 to 1, got {tol}")
    gram = ImplicitGram(resolve(kernel, x), x)
    found = greedy(gram, min(most, gram.n), tol)
    if not np.isfinite(found.residual).all():
        raise ValueError("x: expected finite kernel values, got NaN or inf on the diagonal")
    if found.indefinite:
        raise ValueError(f"kernel: {gram.kernel!r} is not positive semi-definite at x; ask nearfar.psd_report")
    corner = found.factor[:, found.pivots].T.astype(np.float64)  # lower triangular: L = K_np corner^-T
    mapped = np.linalg.inv(corner).T if len(found.pivots) else corner
    factor = np.ascontiguousarray(found.factor.T)
    left = max(float(found.residual.sum()), 0.0)
    return LowRank(of_kind(factor, x), left, rows_at(gram.x, found.pivots), found.pivots, gram.kernel, mapped)


def nystrom(kernel: Any, x: Array, landmarks: Any, *, seed: int = 0) -> LowRank:
    r"""The Nystrom approximation of a Gram matrix from some points.

    .. math:: K \approx K_{nm} K_{mm}^{+} K_{mn}

    Parameters
    ----------
    kernel : kernel or str
        As for `pivoted_cholesky`.
    x : array (N, D)
    landmarks : int, integer array (m,), or array (m, D)
        So many random rows of x, which rows of x, or points of one's own (centroids, say).
    seed : int
        For random rows.

    Returns
    -------
    LowRank
        As for `pivoted_cholesky`; `rank` is at most m: directions of K_mm below round-off are left out.

    Raises
    ------
    ValueError
        K_mm has a negative eigenvalue beyond round-off.

    Notes
    -----
    One kernel call of N x m, O(N m^2 + m^3) arithmetic: for the same number of columns faster than pivoted Cholesky,
    which chooses better points. Williams and Seeger, 2001. Of points on a GPU the entries of the kernel are computed
    there, here as in `pivoted_cholesky`, and the factor on the host.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.linspace(0, 1, 200)[:, None]
    >>> nf.nystrom(nf.kernels.Gaussian(0.5), x, 20).error < 1e-6
    True
    """
    gram = ImplicitGram(resolve(kernel, x), x)
    indices: NDArray[np.int64] | None = None
    if getattr(landmarks, "ndim", 0) == 2:
        check_points(x=x, landmarks=landmarks)
        if landmarks.shape[1] != x.shape[1]:
            raise ValueError(f"landmarks: expected {x.shape[1]} columns to match x, got {tuple(landmarks.shape)}")
        points = cast(landmarks.detach() if is_torch(landmarks) else landmarks, gram.dtype.name)
    else:
        if getattr(landmarks, "ndim", 0) == 1:
            indices = to_numpy(landmarks)
            if indices.dtype.kind not in "iu":
                raise TypeError(f"landmarks: expected integers, got {indices.dtype}")
            indices = indices.astype(np.int64)
            if indices.min(initial=0) < 0 or indices.max(initial=-1) >= gram.n:
                raise ValueError(
                    f"landmarks: expected rows 0 to {gram.n - 1} of x, got {indices.min()} to {indices.max()}"
                )
        else:
            m = min(_count(landmarks, "landmarks"), gram.n)
            indices = np.sort(np.random.default_rng(check_seed(seed)).choice(gram.n, m, replace=False))
        points = rows_at(gram.x, indices)
    values, vectors = np.linalg.eigh(ImplicitGram(gram.kernel, points).dense().astype(np.float64))
    noise = NOISE * float(np.finfo(gram.dtype).eps) * float(np.abs(values).max(initial=0.0))
    if values.min(initial=0.0) < -noise:
        raise ValueError(f"kernel: {gram.kernel!r} is not positive semi-definite at the landmarks")
    keep = values > noise
    mapped = vectors[:, keep] / np.sqrt(values[keep])
    factor = ImplicitGram(gram.kernel, points).matmul(mapped, gram.x)
    left = float(gram.diagonal().sum(dtype=np.float64) - np.einsum("ij,ij->", factor, factor, dtype=np.float64))
    return LowRank(of_kind(factor, x), max(left, 0.0), points, indices, gram.kernel, mapped)


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """``k(x, y) ~ transform(x) transform(y)^T``, made by `random_features`.

    Attributes
    ----------
    kernel : kernel
    frequencies : array (D, n_features / 2)
        Drawn from the spectral density of the kernel, float64.
    """

    kernel: Any
    frequencies: NDArray[np.float64] = field(repr=False)

    def transform(self, x: Array) -> Array:
        """Features (N, n_features): cosines, then sines, of ``x frequencies``, over the root of their number.

        Differentiable in x. Angles are computed in float64, so that points far from the origin keep their digits.
        """
        check_points(x=x)
        check_matrix(x, "x")
        if x.shape[1] != len(self.frequencies):
            raise ValueError(f"x: expected {len(self.frequencies)} columns, got shape {tuple(x.shape)}")
        dtype, half = compute_dtype(x), self.frequencies.shape[1]
        frequencies, scale = of_kind(self.frequencies, x), 1 / math.sqrt(half)
        if is_torch(x):
            import torch

            angle = _angle(cast(x, "float64") @ frequencies, dtype)
            return scale * torch.cat([angle.cos(), angle.sin()], 1)
        functions, features = namespace(x), empty(x, (x.shape[0], 2 * half))
        step = max(1, ANGLES // half)
        for begin in range(0, x.shape[0], step):
            block = features[begin : begin + step]
            angle = _angle(cast(x[begin : begin + step], "float64") @ frequencies, dtype)
            functions.cos(angle, out=block[:, :half])
            functions.sin(angle, out=block[:, half:])
            block *= scale
        return features

    def matmul(self, x: Array, y: Array | None, v: Array) -> Array:
        """An approximation of ``kernel.matmul(x, y, v)``, O((N + M) n_features)."""
        own = self.transform(x)
        other = own if y is None else self.transform(y)
        return matrix_product(own, matrix_product(other.T, cast(v, compute_dtype(x))))

    def error(self, x: Array, *, probes: int = 32, seed: int = 0) -> float:
        """The Frobenius norm of ``k(x, x) - transform(x) transform(x)^T``, estimated.

        ``E |A v|^2 = |A|_F^2`` for random signs v (Hutchinson): its relative standard deviation is at most
        ``1 / sqrt(2 probes)``. One fused product. (The trace of the difference is 0 whatever the features.)
        """
        gram = ImplicitGram(self.kernel, x)
        signs = np.random.default_rng(check_seed(seed)).choice([-1.0, 1.0], (gram.n, _count(probes, "probes")))
        features = to_numpy(self.transform(gram.x))
        wrong = gram.matmul(signs) - features @ (features.T @ signs)
        return math.sqrt(float((wrong**2).sum(dtype=np.float64)) / signs.shape[1])


def _angle(angle: Array, dtype: str) -> Array:
    """From float64 to the dtype whose cosine is taken; to float32 between -pi and pi, where it has digits for it."""
    if dtype == "float64":
        return angle
    turns = ((angle.detach() if is_torch(angle) else angle) / (2 * math.pi)).round()
    return cast(angle - 2 * math.pi * turns, dtype)


def random_features(kernel: Any, dim: int, n_features: int, *, seed: int = 0) -> RandomFeatures:
    r"""Random Fourier features of a shift-invariant kernel.

    .. math:: k(x, y) = \mathbb E_\omega \cos \omega^T (x - y) \approx \frac{2}{F} \sum_{f \le F / 2}
              (\cos \omega_f^T x \cos \omega_f^T y + \sin \omega_f^T x \sin \omega_f^T y)

    Parameters
    ----------
    kernel : Gaussian, Laplacian or Matern
        Or the name of one. The frequencies are normal, Cauchy, or Student t with 2 nu degrees of freedom.
    dim : int
        D, columns of the points.
    n_features : int
        F, even: a cosine and a sine each.
    seed : int

    Returns
    -------
    RandomFeatures
        With `transform`, `matmul` and `error`.

    Notes
    -----
    An entry errs by about ``1 / sqrt(F)``, whatever D. Cosine and sine of one frequency keep the diagonal exact, and
    vary less than cosines with random phases (Sutherland and Schneider, On the error of random Fourier features, 2015).
    Rahimi and Recht, Random features for large-scale kernel machines, 2007.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.random.default_rng(0).standard_normal((100, 3))
    >>> features = nf.random_features(nf.kernels.Gaussian(2.0), 3, 4000)
    >>> features.error(x) / 100 < 0.02  # root mean square of an entry
    True
    """
    d, f = _count(dim, "dim"), _count(n_features, "n_features")
    if f % 2:
        raise ValueError(f"n_features: expected an even number, got {f}")
    resolved = resolve(kernel, np.empty((1, d)))
    if not isinstance(resolved, (Gaussian, Laplacian, Matern)):
        raise TypeError(f"kernel: expected Gaussian, Laplacian or Matern, got {resolved!r}")
    random = np.random.default_rng(check_seed(seed))
    scale = resolved.lengthscale
    scale = to_numpy(scale) if is_torch(scale) else scale
    lengthscale = np.broadcast_to(np.asarray(scale, np.float64).reshape(-1, 1), (d, 1))
    if isinstance(resolved, Laplacian):
        frequencies = random.standard_cauchy((d, f // 2))
    else:
        frequencies = random.standard_normal((d, f // 2))
        if isinstance(resolved, Matern):
            freedom = 2 * resolved.nu
            frequencies /= np.sqrt(random.chisquare(freedom, f // 2) / freedom)
    return RandomFeatures(resolved, frequencies / lengthscale)


def _count(value: Any, name: str) -> int:
    result = integer(value, name)
    if result < 1:
        raise ValueError(f"{name}: expected at least 1, got {result}")
    return result
