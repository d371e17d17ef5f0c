"""Alignment and uniformity on the hypersphere (Wang & Isola 2020)."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from ..arrays import Array, check_matrix, check_points, check_shape, finite, is_torch
from ..gradients import Call, Outcome, Part, differentiable
from .softmax import check_reduction


@differentiable
def alignment(x: Array, y: Array, *, alpha: float = 2, normalize: bool = True, reduction: str = "mean") -> Call:
    """How close positive pairs are: the mean of :math:`\\lVert x_i - y_i\\rVert^\\alpha`.

    Computed from the differences: the form 2 - 2<x, y> loses a quarter of the value at distance 1e-3 in float32.

    Parameters
    ----------
    x, y : array (N, D)
        Positive pairs.
    alpha : positive number
    normalize : bool
        Bring rows to unit norm first.
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    scalar or array (N,)
        No rows: 0. The gradient of a pair at distance 0 is 0, for every alpha.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or kinds that do not match; alpha not positive.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(nf.alignment(np.eye(2), np.eye(2)[::-1]))
    2.0
    """
    check_points(x=x, y=y)
    check_matrix(x, "x")
    check_shape(y, "y", x.shape, "x")
    check_reduction(reduction)
    alpha = finite(alpha, "alpha", 0.0, strict=True)
    parts = (Part(("x",), (x,)), Part(("y",), (y,)))
    return Call("alignment", parts, (alpha, reduction, normalize), scalar=reduction != "none")


@differentiable
def uniformity(x: Array, *, t: float = 2, normalize: bool = True) -> Call:
    """How evenly points cover the sphere: the log of their mean Gaussian potential.

    .. math:: \\log \\frac{2}{N(N-1)} \\sum_{i<j} e^{-t \\lVert x_i - x_j\\rVert^2}

    Never positive; 0 if all points coincide, and for many uniform points `uniformity_of_sphere`. Computed as a
    log-sum-exp, so it is never -inf. Each pair is computed once, value and gradient in one pass on the sphere.

    Parameters
    ----------
    x : array (N, D)
        N >= 2.
    t : positive number
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar

    Raises
    ------
    ValueError
        Fewer than two rows; t not positive.

    Notes
    -----
    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
    2020. A finite sample can be below the population's optimum, because i = j is left out.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])), 6))
    -8.0
    """
    return _uniformity(x, t, normalize)


def _uniformity(x: Array, t: float, normalize: bool) -> Call:
    check_points(x=x)
    check_matrix(x, "x")
    if x.shape[0] < 2:
        raise ValueError(f"x: expected at least two rows, got {x.shape[0]}")
    t = finite(t, "t", 0.0, strict=True)
    return Call("potential", (Part(("x",), (x,)),), (t, bool(normalize)))


def uniformity_of_sphere(dim: int, t: float = 2) -> float:
    """The uniformity of the uniform law on the unit sphere of R^dim: the least any law can have.

    .. math:: -2t + \\log {}_0F_1(; d/2; t^2)

    Parameters
    ----------
    dim : int
        Dimension of the surrounding space, at least 1.
    t : positive number

    Returns
    -------
    float

    Raises
    ------
    ValueError
        `dim` less than 1 or `t` not positive.

    Notes
    -----
    Wang & Isola 2020, appendix A. The hypergeometric series has positive terms and is summed as it stands, in logs: the
    usual form with a Bessel function underflows to -inf from dim = 512 on.

    Examples
    --------
    >>> import nearfar as nf
    >>> round(nf.uniformity_of_sphere(2), 6), round(nf.uniformity_of_sphere(128), 6)
    (-1.575027, -3.93753)
    """
    if isinstance(dim, bool) or not isinstance(dim, Real) or not 1 <= dim < math.inf or int(dim) != dim:
        raise ValueError(f"dim: expected a positive integer, got {dim!r}")
    t = finite(t, "t", 0.0, strict=True)
    # log of sum_k t^(2k) / ((d/2)_k k!), as a running log-sum-exp.
    log_term = log_sum = 0.0
    k = 0
    while True:
        log_term += 2 * math.log(t) - math.log(dim / 2 + k) - math.log(k + 1)
        k += 1
        high = max(log_term, log_sum)
        log_sum = high + math.log1p(math.exp(-abs(log_term - log_sum)))
        if log_term < log_sum - 40 and k > t:
            return -2 * t + log_sum


@differentiable
def uniformity_gap(x: Array, *, t: float = 2) -> Call:
    """How far points are from uniform on the sphere: the squared MMD to the uniform law.

    .. math:: e^{\\text{uniformity}(x)} - e^{\\text{optimum}}
              = \\mathrm{MMD}^2_{G_t}(x, \\sigma_{d-1}), \\qquad G_t(u, v) = e^{-t \\lVert u - v\\rVert^2}

    The potential of the uniform law is the same at every point of the sphere, so the cross term of the squared maximum
    mean discrepancy and the law's own term are both the optimum.

    Parameters
    ----------
    x : array (N, D)
        N >= 2. Rows are brought to unit norm.
    t : positive number

    Returns
    -------
    scalar
        1 less the optimum where all points coincide; unbiased, so around 0 on either side for points that are uniform.
        Differentiable as `uniformity` is.

    Raises
    ------
    ValueError, TypeError
        As `uniformity`.

    Notes
    -----
    Gretton et al.: A Kernel Two-Sample Test, 2012 (the unbiased estimator), with the exact law on one side.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> angles = 2 * np.pi * np.arange(1000) / 1000
    >>> circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    >>> float(abs(nf.uniformity_gap(circle)).round(2)), float(nf.uniformity_gap(np.ones((9, 2))).round(4))
    (0.0, 0.793)
    """
    call = _uniformity(x, t, True)
    least = uniformity_of_sphere(x.shape[1], t)

    def gap(spread: Any) -> Any:
        excess = spread - least
        return (excess.expm1() if is_torch(excess) else np.expm1(excess)) * math.exp(least)

    return call._replace(outcome=Outcome(gap, np.exp))
