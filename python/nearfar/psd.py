"""Is a Gram matrix positive semi-definite? An answer with its evidence.

A symmetric function k is a Mercer kernel when every Gram matrix ``K_ij = k(x_i, x_j)`` has ``c^T K c >= 0`` for all
real c (Murphy, Probabilistic Machine Learning, chapter 17, "Mercer kernel"). A computed Gram matrix is K + E, where E
is the round-off of the arithmetic that made it, so a true Mercer kernel shows slightly negative eigenvalues, and yes or
no is not enough: SciPy and scikit-learn disagree by five orders of magnitude on what "slightly" is. So the report says
by how much, compares it with what round-off can do, and proves a "no" with a vector.

How large E can be: if every entry carries m roundings, ``|E_ij| <= m (eps / 2) |K_ij|``, hence

    ||E||_2 <= || |E| ||_2 <= m (eps / 2) || |K| ||_2 = m (eps / 2) lambda_max    (the last step for K_ij >= 0),

whatever the number of points. ``NOISE = 10`` is m = 20. Measured with true Mercer kernels, 1000 to 2000 points,
|lambda_min| / (eps lambda_max): 0.14 (Gaussian, cosine) to 0.8 (linear, 768 terms a product) in float32. In float64 the
eigen-solver rounds as coarsely as K was made, and K is not the only source: 2 to 3.3 for linear and cosine, 9 to 40
for the constant kernel, whose Gram matrix is exact, as the LAPACK at hand will have it. So the constant is 64 there.
The common worst-case choice ``n eps lambda_max`` would be a hundred times looser than need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, check_points, check_seed, dtype_name, finite, is_torch, of_kind, to_numpy
from .quadratic_form import evaluation_error, quadratic_form

__all__ = ["DENSE_LIMIT", "PSDReport", "is_psd", "psd_report"]

Float64 = NDArray[np.float64]

# Up to here a symmetric eigen-solver is run at once: 4096 points are 134 MB a copy in float64 and up to a minute of
# work. A larger K is first searched for a disproof that takes milliseconds; the matrix of a kernel is not stored.
DENSE_LIMIT = 4096

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
NOISE = {"float16": 10.0, "bfloat16": 10.0, "float32": 10.0, "float64": 64.0}

# Principal Gram matrices tried on a large K: half of random points (violations at long range), half of one point and
# those most similar to it (violations at short range). 64 points disprove every non-Mercer kernel tried so far at
# n = 3000 to 8000 except those whose violation is itself of the order of the noise.
SUBSAMPLES = 32
SUBSAMPLE_SIZE = 64


@dataclass(frozen=True, eq=False)
class PSDReport:
    """What `psd_report` found. Frozen; compared by identity, since it may hold an array.

    Attributes
    ----------
    verdict : str
        ``"psd"``: no negative eigenvalue. ``"psd_within_noise"``: a negative eigenvalue, not below ``-noise_floor``.
        ``"not_psd"``: below, and `witness` proves it. ``"undecided"``: neither. Dense, the eigen-solver gives a value
        below ``-noise_floor`` that no vector confirms, since `tol` is smaller than what float64 can resolve;
        matrix-free, ``min_eigenvalue - error_bound`` is below it and ``min_eigenvalue`` is not.
    is_psd : bool
        True for ``"psd"`` and ``"psd_within_noise"``.
    min_eigenvalue, max_eigenvalue : float
        Of ``(K + K^T) / 2``. With a method other than ``"eigh"`` bounds: the minimum from above, the maximum from below
        (Cauchy interlacing). 0 for a matrix of no points.
    noise_floor : float
        `tol` if given, else ``c eps(dtype of K) max |eigenvalue|``, c = 10 (64 in float64); the largest modulus is
        `max_eigenvalue` unless K is mostly negative. With method ``"subsample"`` the modulus is bounded from above by
        the largest row sum of ``|K|``, so that the disproof holds.
    rank : int
        Number of eigenvalues above `noise_floor`; with a method other than ``"eigh"`` a lower bound.
    jitter : float
        The least shift t for which Cholesky factorisation of ``K + t I`` succeeds in the dtype of K (float32 for
        half precisions); 0 if it does without. Found by attempts with `numpy.linalg.cholesky`; another library's rounds
        otherwise and may need ``eps(dtype) max |eigenvalue|`` more. NaN where K is not stored.
    witness : array or None
        For ``"not_psd"``: a unit vector c (float64, of the kind of K) with ``c^T K c = witness_value``.
    witness_value : float or None
        ``c^T K c`` of the stored entries, summed in twice the precision of float64; less than ``-noise_floor``.
    asymmetry : float
        ``max |K - K^T|``.
    method : str
        ``"eigh"``, ``"subsample"``, ``"lanczos"``; ``"lanczos, structure"`` where Lanczos found nothing negative, its
        bound does not decide, and the kernel is Mercer by theorem (`is_mercer`).
    matvecs, miss_probability : int, float
        Products of K with a vector that a matrix-free method used, and the probability that `error_bound` is wrong,
        over its random starts; 0 for a dense one.
    error_bound : float
        The smallest eigenvalue is not below ``min_eigenvalue - error_bound``. Dense: the round-off of the eigen-solver.
        Infinite with method ``"subsample"``.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.psd_report(np.eye(3)).verdict
    'psd'
    """

    verdict: str
    is_psd: bool
    min_eigenvalue: float
    max_eigenvalue: float
    noise_floor: float
    rank: int
    jitter: float
    witness: Array | None
    witness_value: float | None
    asymmetry: float
    method: str
    matvecs: int
    miss_probability: float
    error_bound: float

    def __str__(self) -> str:
        meaning = {
            "psd": "positive semi-definite",
            "psd_within_noise": "positive semi-definite within round-off",
            "not_psd": "not positive semi-definite, proved by a witness",
            "undecided": "neither proved nor disproved to the noise floor",
        }
        at_least, at_most = ("", "") if self.method == "eigh" else ("at least ", "at most ")
        lines = [
            f"{self.verdict}: {meaning[self.verdict]}",
            f"  min eigenvalue  {at_most}{self.min_eigenvalue:.6g}, by at most {self.error_bound:.3g}",
            f"  max eigenvalue  {at_least}{self.max_eigenvalue:.6g}",
            f"  noise floor     {self.noise_floor:.3g}",
            f"  rank            {at_least}{self.rank}",
            f"  jitter          {'unknown' if math.isnan(self.jitter) else format(self.jitter, '.3g')}",
            f"  asymmetry       {self.asymmetry:.3g}",
        ]
        if self.witness_value is not None:
            lines.append(f"  witness         c^T K c = {self.witness_value:.6g}")
        randomised = f", {self.matvecs} products, miss probability {self.miss_probability:.2g}" if self.matvecs else ""
        return "\n".join([*lines, f"  method          {self.method}{randomised}"])


def psd_report(
    K: Array | Callable[[Array], Array], x: Array | None = None, *, tol: float | None = None, seed: int = 0
) -> PSDReport:
    r"""Whether a Gram matrix is positive semi-definite, with the evidence.

    .. math:: \lambda_{\min}(K) = \min_{\|c\| = 1} c^T K c \;\ge\; -\text{noise\_floor}

    Parameters
    ----------
    K : array (n, n) or callable
        A matrix, or a kernel: then ``kernel(x)`` is evaluated and judged.
    x : array (n, d), optional
        The points, for a kernel. Beyond ``nearfar.psd.DENSE_LIMIT`` (4096) of them the matrix is not stored; this needs
        a kernel of `nearfar.kernels`.
    tol : float, optional
        The noise floor, in units of K. Default: what round-off in the dtype of K can produce,
        ``10 eps max|eigenvalue|`` (64 eps in float64, where the eigen-solver's own round-off counts). Give it when K
        was made by coarser arithmetic than its dtype says: TF32 or bfloat16 products inside a float32 Gram matrix leave
        eigenvalues down to minus hundreds of ``eps lambda_max``.
    seed : int
        For the sub-samples and random starts of a K larger than the limit.

    Returns
    -------
    PSDReport
        Numbers; no gradient flows to K.

    Raises
    ------
    ValueError
        K not a square matrix, or with NaN or infinite entries (no statement about it is true), or asymmetric.
        `tol` negative, infinite or NaN.
    TypeError
        K neither a floating array nor a kernel; `x` missing for a kernel or given with a matrix.
    NotImplementedError
        More than 4096 points for a function that is no kernel of `nearfar.kernels`; an array that is not in CPU memory.

    Notes
    -----
    **Asymmetry.** The quadratic form sees only ``(K + K^T) / 2``, so what is judged is that. This is right when the two
    halves differ by round-off, up to ``10 eps max|K_ij|`` (64 in float64; measured: at most 1.25), and an answer to
    another question when they differ by more: then this function raises as `is_psd` does, unless ``tol`` is at least
    the asymmetry. A rule relative to the eigenvalues would let errors of 1e-3 in entries of size 1 pass at n = 1000 in
    float32.

    **Disproof and proof.** "not_psd" is rigorous for the stored entries: c^T K c is summed in twice the precision of
    float64 (Ogita, Rump and Oishi, Accurate sum and dot product, 2005), and no "no" rests on the eigen-solver's word
    alone. "psd" is exact up to the solver's round-off, a few ``2^-52 lambda_max``.

    **Large K.** Above the limit, principal sub-matrices of 64 points are tried first. The eigenvector of a negative
    eigenvalue, padded by zeros, is a witness for K. If none is found, the eigen-solver runs, at its price of n^3; for a
    kernel, block Lanczos on the fused product, O(n) memory, at most 40 products with 8 columns. Smallest Ritz values
    bound the smallest eigenvalue from above only; from below it is bounded, but for `miss_probability`, by Lanczos on
    what a pivoted Cholesky factor leaves of K (`nearfar.psd_implicit` says how). That decides for kernels that are
    smooth on the scale of the points. Else a Mercer kernel is accepted by its theorem, and the method says so. Of
    points on a GPU the products run there, and all else on the host, where a matrix K is copied to.

    **Jitter.** That Cholesky succeeds proves little about semi-definiteness: it is certain to fail only when the least
    eigenvalue of K, scaled to unit diagonal, is below about ``-n^2 eps / 2`` (Higham, Accuracy and Stability of
    Numerical Algorithms, theorem 10.7): no information for large n in float32. So it decides nothing here; but the
    shift that it needs is reported, because a solver needs it, and a fixed one such as 1e-6 is not it: it must scale
    with ``eps lambda_max``. Its excess over ``-lambda_min`` is resolved to 5 %, and the value returned has been tried.
    Near it success is a matter of rounding: measured with OpenBLAS on singular matrices, one attempt in six fails at
    1.1 times the shift, a few succeed at half, and the number of threads changes which. Double it for a margin.

    Examples
    --------
    >>> import numpy as np
    >>> import nearfar as nf
    >>> report = nf.psd_report(np.array([[1.0, 1.0], [1.0, 0.0]]))
    >>> report.verdict, round(report.min_eigenvalue, 6)  # minus the inverse of the golden ratio
    ('not_psd', -0.618034)
    >>> c = report.witness
    >>> bool(c @ np.array([[1.0, 1.0], [1.0, 0.0]]) @ c < 0)
    True

    The Epanechnikov function is a density, not a Mercer kernel: c = (2, -3, 2) gives c^T K c = -1 on three points.

    >>> x = np.array([[0.0], [0.5], [1.0]])
    >>> nf.psd_report(lambda x: np.maximum(0.0, 1 - (x - x.T) ** 2), x).is_psd
    False

    The constant kernel is Mercer, with a singular Gram matrix:

    >>> report = nf.psd_report(np.ones((3, 3), np.float32))
    >>> report.is_psd, report.rank
    (True, 1)
    """
    floor, seed = None if tol is None else finite(tol, "tol", 0.0), check_seed(seed)
    if x is not None and _is_large(K, x):
        return _implicit_report(K, x, floor, seed)
    given = _evaluate(K, x)
    matrix, dtype = _to_numpy(given, "K")
    survey = _survey(matrix, dtype, floor)
    found = _judge(matrix, dtype, survey, floor, seed)
    witness = found.witness
    if witness is not None:
        witness = of_kind(witness, given)
    return PSDReport(
        verdict=found.verdict,
        is_psd=found.verdict.startswith("psd"),
        min_eigenvalue=found.low,
        max_eigenvalue=found.high,
        noise_floor=found.floor,
        rank=found.rank,
        jitter=_jitter(matrix, found.low, max(-found.low, found.high)),
        witness=witness,
        witness_value=found.value,
        asymmetry=survey.asymmetry,
        method=found.method,
        matvecs=0,
        miss_probability=0.0,
        error_bound=NOISE["float64"] * EPS["float64"] * max(-found.low, found.high)
        if found.method == "eigh"
        else math.inf,
    )


def _is_large(K: Any, x: Array) -> bool:
    """Whether this is a kernel of this package at more points than are stored."""
    from .kernels.base import Kernel

    return isinstance(K, Kernel) and getattr(x, "ndim", 0) == 2 and x.shape[0] > DENSE_LIMIT


def _implicit_report(kernel: Any, x: Array, tol: float | None, seed: int) -> PSDReport:
    points, _ = _to_numpy(x, "x")
    if not np.isfinite(points).all():
        raise ValueError("x: expected finite numbers, got NaN or inf")
    from . import psd_implicit
    from .implicit import ImplicitGram

    gram = ImplicitGram(kernel, x)
    dtype = gram.dtype.name
    found = psd_implicit.judge(
        gram, NOISE[dtype] * EPS[dtype], NOISE["float64"] * EPS["float64"], tol, seed, (SUBSAMPLES, SUBSAMPLE_SIZE)
    )
    if found.witness is not None:
        found = found._replace(witness=of_kind(found.witness, x))
    return PSDReport(is_psd=found.verdict.startswith("psd"), jitter=math.nan, **found._asdict())


def is_psd(K: Array, tol: float | None = None) -> bool:
    """Whether a symmetric matrix is positive semi-definite up to round-off: ``psd_report(K, tol=tol).is_psd``, cheaper.

    Parameters
    ----------
    K : array (n, n)
        Floating, symmetric up to round-off.
    tol : float, optional
        Eigenvalues down to ``-tol`` are accepted. Default: the noise floor of `psd_report`.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        K not square, not finite, or asymmetric by more than round-off and by more than `tol`.

    Examples
    --------
    >>> import numpy as np
    >>> import nearfar as nf
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> nf.is_psd(np.exp(-np.abs(x - x.T)))
    True
    >>> nf.is_psd(np.array([[1.0, 2.0], [2.0, 1.0]]))  # eigenvalues 3 and -1
    False
    """
    floor = None if tol is None else finite(tol, "tol", 0.0)
    matrix, dtype = _to_numpy(K, "K")
    return _judge(matrix, dtype, _survey(matrix, dtype, floor), floor, 0).verdict.startswith("psd")


# ---- what comes in ---------------------------------------------------------------------------------------------------


def _evaluate(K: Array | Callable[[Array], Array], x: Array | None) -> Array:
    """The matrix itself, or kernel(x)."""
    if not callable(K):
        if x is not None:
            raise TypeError(f"x: expected None with a matrix K, got {type(x).__name__}")
        return K
    if x is None:
        raise TypeError("x: expected the points at which to evaluate the kernel, got None")
    _to_numpy(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (n, d), got {tuple(x.shape)}")
    n = x.shape[0]
    if n > DENSE_LIMIT:
        raise NotImplementedError(
            f"x: {n} points, but a kernel is evaluated densely, up to nearfar.psd.DENSE_LIMIT = {DENSE_LIMIT} points; "
            "pass fewer points, or the matrix kernel(x) itself"
        )
    matrix = K(x)
    if getattr(matrix, "shape", (n, n)) != (n, n):
        raise ValueError(f"K: expected kernel(x) of shape {(n, n)} to match x, got {tuple(matrix.shape)}")
    return matrix


def _to_numpy(array: Array, name: str) -> tuple[NDArray[Any], str]:
    """A float32 or float64 view (a copy only of halves, which float32 holds exactly, and from the GPU), and the name of
    its own dtype.
    """
    check_points(**{name: array})
    return to_numpy(array.resolve_neg() if is_torch(array) else array), dtype_name(array)


class _Survey(NamedTuple):
    asymmetry: float  # max |K - K^T|
    norm: float  # max_i sum_j |K_ij|, an upper bound of |eigenvalue|


def _survey(matrix: NDArray[Any], dtype: str, tol: float | None) -> _Survey:
    """Check that the matrix is square, finite and symmetric, in blocks of rows, without a copy of it."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"K: expected a square matrix (n, n), got shape {matrix.shape}")
    asymmetry = largest = norm = 0.0
    for start in range(0, len(matrix), 256):
        rows = matrix[start : start + 256].astype(np.float64)
        finite = np.isfinite(rows)
        if not finite.all():
            i, j = np.argwhere(~finite)[0]
            raise ValueError(f"K: expected finite entries, got K[{start + i}, {j}] = {rows[i, j]}")
        with np.errstate(over="ignore"):
            asymmetry = max(asymmetry, float(np.abs(rows - matrix[:, start : start + 256].T).max()))
            norm = max(norm, float(np.abs(rows).sum(axis=1).max()))
        largest = max(largest, float(np.abs(rows).max()))
    rounding = NOISE[dtype] * EPS[dtype] * largest
    if asymmetry > max(rounding, tol or 0.0):
        raise ValueError(
            f"K: expected a symmetric matrix, got max |K - K^T| = {asymmetry:.3g} where round-off explains "
            f"{rounding:.3g}; symmetrise it, or pass a tol that admits this"
        )
    return _Survey(asymmetry, norm)


# ---- the verdict -----------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    verdict: str
    low: float
    high: float
    floor: float
    rank: int
    witness: Float64 | None
    value: float | None
    method: str


def _judge(matrix: NDArray[Any], dtype: str, survey: _Survey, tol: float | None, seed: int) -> _Found:
    noise = NOISE[dtype] * EPS[dtype]
    if len(matrix) > DENSE_LIMIT:
        found = _subsample(matrix, survey.norm, noise * survey.norm if tol is None else tol, seed)
        if found is not None:
            return found
    symmetric = _symmetric(matrix)
    values = np.linalg.eigvalsh(symmetric)
    low, high = (float(values[0]), float(values[-1])) if values.size else (0.0, 0.0)
    norm = max(-low, high)
    floor = noise * norm if tol is None else tol
    rank = int(np.count_nonzero(values > floor))
    if low >= -floor:
        return _Found("psd" if low >= 0 else "psd_within_noise", low, high, floor, rank, None, None, "eigh")
    witness = _lowest_vector(symmetric, low, norm)
    value = quadratic_form(matrix, witness)
    if value < -floor - evaluation_error(len(matrix), survey.norm):
        return _Found("not_psd", low, high, floor, rank, witness, value, "eigh")
    return _Found("undecided", low, high, floor, rank, None, None, "eigh")


def _subsample(matrix: NDArray[Any], norm: float, floor: float, seed: int) -> _Found | None:
    """The most negative of some principal sub-matrices, if it lies below the floor."""
    n = len(matrix)
    m = min(SUBSAMPLE_SIZE, n)
    random = np.random.default_rng(seed)
    far = [random.choice(n, m, replace=False) for _ in range(SUBSAMPLES // 2)]
    near = [np.argpartition(np.abs(matrix[i]), n - m)[n - m :] for i in random.integers(n, size=SUBSAMPLES // 2)]
    picks = np.stack(far + near)
    grams = _symmetric(matrix[picks[:, :, None], picks[:, None, :]])
    values = np.linalg.eigvalsh(grams)
    best = int(values[:, 0].argmin())
    if values[best, 0] >= -floor:
        return None
    small = np.linalg.eigh(grams[best])[1][:, 0]
    value = quadratic_form(matrix[np.ix_(picks[best], picks[best])], small)
    if value >= -floor - evaluation_error(m, norm):
        return None
    witness = np.zeros(n)
    witness[picks[best]] = small
    rank = int(np.count_nonzero(values > floor, axis=1).max())
    return _Found("not_psd", value, float(values.max()), floor, rank, witness, value, "subsample")


def _symmetric(matrix: NDArray[Any]) -> Float64:
    """(K + K^T) / 2 in float64, over the last two axes; halves first, so that nothing overflows."""
    half = 0.5 * matrix.astype(np.float64)
    return np.asarray(half + np.swapaxes(half, -1, -2))


def _lowest_vector(symmetric: Float64, low: float, norm: float) -> Float64:
    """Unit eigenvector of the smallest eigenvalue, by inverse iteration.

    All eigenvectors would cost three times the eigenvalues again (18 s against 7 s at n = 2000); two solves take a
    fraction of a second. The shift lies below the eigenvalue by what the solver may have erred.
    """
    shifted = symmetric / norm - (low / norm - 32 * EPS["float64"]) * np.eye(len(symmetric))
    vector = np.random.default_rng(0).standard_normal(len(symmetric))
    try:
        for _ in range(2):
            vector = np.asarray(np.linalg.solve(shifted, vector), np.float64)
            vector /= np.abs(vector).max()
            vector /= np.linalg.norm(vector)
    except np.linalg.LinAlgError:  # exactly singular
        vector = np.asarray(np.linalg.eigh(symmetric)[1][:, 0], np.float64)
    return vector


# ---- Cholesky --------------------------------------------------------------------------------------------------------


def _jitter(matrix: NDArray[Any], low: float, norm: float) -> float:
    """Least t such that numpy.linalg.cholesky(K + t I) succeeds in the matrix's dtype, by attempts; 0 if K itself does.

    t = base + excess. A shift of ``base`` leaves an eigenvalue of -64 eps norm (nothing to gain below); the excess is
    sought on a logarithmic scale, outwards from eps norm, then bisected to 5 %.
    """
    dtype = matrix.dtype.type
    limits = np.finfo(dtype)
    work, diagonal = matrix.copy(), matrix.diagonal()

    def succeeds(shift: float) -> bool:
        np.fill_diagonal(work, diagonal + dtype(shift))
        try:
            return bool(np.isfinite(np.linalg.cholesky(work).diagonal()).all())
        except np.linalg.LinAlgError:
            return False

    with np.errstate(over="ignore", invalid="ignore"):
        if succeeds(0.0):
            return 0.0
        tiny, eps = float(limits.tiny), float(limits.eps)
        base = max(0.0, -low - 64 * eps * norm)
        good = bad = max(eps * norm, tiny)
        step = 2.0
        if succeeds(base + good):
            while succeeds(base + (bad := max(good / step, tiny))):
                good, step = bad, step * step
                if good == tiny:
                    return float(dtype(base + tiny))
        else:
            while not succeeds(base + (good := step * bad)):
                bad = good
                if base + good > limits.max:
                    return math.inf
        while good > 1.05 * bad:
            middle = math.sqrt(good) * math.sqrt(bad)
            good, bad = (middle, bad) if succeeds(base + middle) else (good, middle)
    return float(dtype(base + good))
