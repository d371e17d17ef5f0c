"""Is a function of two points a Mercer kernel? Proofs by structure, disproofs by witness."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, check_points, is_torch, to_numpy
from ..psd import EPS, NOISE, PSDReport, psd_report
from .base import Kernel, Power, Product, Scaled, Sum

Float64 = NDArray[np.float64]

_POINTS = 64  # of a random set: enough to disprove every function of EQUATIONS' table that random points disprove


@dataclass(frozen=True, eq=False)
class MercerReport:
    """What `check_mercer` found.

    Attributes
    ----------
    verdict : str
        ``"proved"``: by structure. ``"disproved"``: `report` has a witness. ``"undecided"``: neither.
    is_mercer : bool or None
        True, False, None accordingly.
    reason : str
        The proof, the violation, or what was tried.
    points : array or None
        Where the witness lives (n, d).
    report : PSDReport or None
        Of the Gram matrix of `points`, centred if `conditional`: ``report.witness`` is a unit vector c with
        ``c^T K c = report.witness_value < 0``.
    """

    verdict: str
    is_mercer: bool | None
    reason: str
    points: Array | None = None
    report: PSDReport | None = None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def check_mercer(
    kernel: Kernel | Callable[[Array], Array], x: Array | None = None, *, conditional: bool = False
) -> MercerReport:
    r"""Whether a kernel is a Mercer kernel: positive semi-definite on every set of points.

    .. math:: \sum_{ij} c_i c_j k(x_i, x_j) \ge 0 \quad \text{for all } x_i, c_i

    Kernels of this package whose families are known to be Mercer, their sums, products (Schur), multiples by
    c >= 0 and powers are proved so without data. Everything else is put to the test on point sets: a Gram matrix with a
    negative eigenvalue beyond round-off is a disproof, and comes with its witness. No number of Gram matrices proves a
    function Mercer, so what survives stays undecided.

    Parameters
    ----------
    kernel : kernel or callable
        A kernel object, or a function from points (n, d) to their Gram matrix (n, n).
    x : array (n, d), optional
        The points to try (at most 4096; give NumPy float64 for the sharpest test). Default: lines, grids, random and
        unit points in 1, 2, 3 and 16 dimensions, at three scales.
    conditional : bool
        Ask for conditionally positive definite only: for all c with sum 0. (-k is then conditionally negative
        definite, as energy distances need it.) The Gram matrix is projected, ``J K J`` with ``J = I - 1 1^T / n``.

    Returns
    -------
    MercerReport

    Raises
    ------
    ValueError, TypeError
        As `psd_report`; TypeError for a kernel that is not callable.

    Notes
    -----
    A kernel that is known not to be Mercer (`is_mercer` False) may still be positive semi-definite on the points tried:
    then the verdict is "disproved", by theory, without a witness.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> k = nf.kernels
    >>> print(k.check_mercer(k.Gaussian() + 2.0 * k.Linear() ** 2))
    proved: a sum of Mercer kernels
    >>> report = k.check_mercer(k.Sigmoid(gamma=1.0), np.array([[0.0], [0.5], [1.0], [1.5], [2.0], [3.0]]))
    >>> report.verdict, round(report.report.witness_value, 6)
    ('disproved', -0.087297)
    >>> minus_distance = lambda x: -np.abs(x - x.T)
    >>> points = np.arange(5.0)[:, None]
    >>> k.check_mercer(minus_distance, points).verdict, k.check_mercer(minus_distance, points, conditional=True).verdict
    ('disproved', 'undecided')
    """
    if not callable(kernel):
        raise TypeError(f"kernel: expected a kernel or a function of points, got {type(kernel).__name__}")
    known = kernel.is_mercer if isinstance(kernel, Kernel) else None
    if known:
        assert isinstance(kernel, Kernel)
        return MercerReport("proved", True, _proof(kernel))
    tried, refused = 0, None
    for points in _candidates() if x is None else (x,):
        if x is None and isinstance(kernel, Kernel) and _has_tensors(kernel):
            points = sys.modules["torch"].from_numpy(points)
        try:
            matrix = _gram_of(kernel, points)
        except (ValueError, TypeError) as error:
            if x is not None:
                raise
            refused = error
            continue  # a kernel of another dimension
        report = _judge(matrix, conditional)
        tried += 1
        if report is not None and report.verdict == "not_psd":
            n, d = points.shape
            condition = ", sum of c = 0" if conditional else ""
            reason = f"c^T K c = {report.witness_value:.6g} on {n} points in {d} dimensions{condition}"
            return MercerReport("disproved", False, reason, points, report)
    if not tried and refused is not None:  # not of points at all: a function of two of them, say
        raise TypeError(f"kernel: expected a function from points (n, d) to their Gram matrix, got: {refused}")
    if known is False and not conditional:
        return MercerReport("disproved", False, f"{kernel!r} is known not to be; no violation on the points tried")
    return MercerReport("undecided", None, f"no violation in {tried} Gram {'matrix' if tried == 1 else 'matrices'}")


def _proof(kernel: Kernel) -> str:
    if isinstance(kernel, Sum):
        return "a sum of Mercer kernels"
    if isinstance(kernel, Product):
        return "a product of Mercer kernels (Schur)"
    if isinstance(kernel, Power):
        return "a power of a Mercer kernel (Schur)"
    if isinstance(kernel, Scaled):
        return "a non-negative multiple of a Mercer kernel"
    return f"{kernel!r} is Mercer"


def _has_tensors(kernel: Kernel) -> bool:
    """Whether a hyper-parameter is a tensor, so that the points must be."""
    parts = vars(kernel).values()
    return any(is_torch(part) or (isinstance(part, Kernel) and _has_tensors(part)) for part in parts)


def _gram_of(kernel: Callable[[Array], Array], x: Array) -> Array:
    check_points(x=x)
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (n, d), got {tuple(x.shape)}")
    matrix = kernel(x)
    n = x.shape[0]
    if tuple(matrix.shape) != (n, n):
        raise ValueError(f"kernel: expected kernel(x) of shape {(n, n)}, got {tuple(matrix.shape)}")
    return matrix.detach() if is_torch(matrix) else matrix


def _judge(matrix: Array, conditional: bool) -> PSDReport | None:
    """The verdict on the Gram matrix, or on its projection; None where it is not finite."""
    dtype = "float32" if "float32" in str(matrix.dtype) else "float64"
    if not conditional:
        return psd_report(matrix) if np.isfinite(to_numpy(matrix)).all() else None
    wide = to_numpy(matrix).astype(np.float64)
    if not np.isfinite(wide).all():
        return None
    wide = (wide + wide.T) / 2
    centred = wide - wide.mean(0)
    centred -= centred.mean(1, keepdims=True)
    # What round-off in K left survives the projection, whose own eigenvalues may be much smaller than those of K.
    noise = NOISE[dtype] * EPS[dtype] * float(np.linalg.norm(wide, 2)) if len(wide) else 0.0
    return psd_report((centred + centred.T) / 2, tol=noise)


def _candidates() -> Iterator[Float64]:
    """Evenly spaced points on a line, which expose radial functions; random ones; points on the sphere."""
    random = np.random.default_rng(0)
    line = np.arange(12.0)[:, None]
    for scale in (0.1, 0.3, 1.0):
        yield scale * line
        yield scale * (line - 5.5)
    for d in (2, 3, 16):
        base = random.standard_normal((_POINTS, d))
        grid = np.stack(np.meshgrid(*[np.arange(-1.0, 2.0)] * min(d, 3), indexing="ij"), -1).reshape(-1, min(d, 3))
        for scale in (0.2, 1.0, 3.0):
            yield scale * base
            if d <= 3:
                yield scale * grid
        yield base / np.linalg.norm(base, axis=1, keepdims=True)
