"""Pairwise distances: `cdist` and `pdist`."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import operations
from .arrays import Array, batched, check_points, compute_dtype, dtype_name, is_torch, kind_of

# metric -> (map of the engine, rows are brought to unit norm first)
METRICS = {
    "euclidean": ("euclidean", False),
    "sqeuclidean": ("sqeuclidean", False),
    "cosine": ("one_minus_dot", True),
    "dot": ("dot", False),
}


def metric_of(metric: str) -> tuple[str, bool]:
    """The engine's name of a metric, and whether it is of unit rows."""
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric]


def check_set(array: Array, name: str) -> None:
    """Shape (..., n, d) with at least one column."""
    if array.ndim < 2:
        raise ValueError(f"{name}: expected shape (..., n, d), got {tuple(array.shape)}")
    if array.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(array.shape)}")


def common_batch(batch: tuple[int, ...], array: Array, name: str) -> tuple[int, ...]:
    """The shape that `batch` and the leading dimensions of an array (..., n, d) broadcast to."""
    own = tuple(array.shape[:-2])
    try:
        return np.broadcast_shapes(batch, own)
    except ValueError as error:
        raise ValueError(f"{name}: expected batch dimensions to match {batch}, got {own}") from error


def pair_shapes(x: Array, y: Array | None) -> tuple[tuple[int, ...], Array, Array | None]:
    """The broadcast batch shape, and both sets as three-dimensional arrays (y None where it is x itself)."""
    check_points(x=x, y=y)
    check_set(x, "x")
    batch = tuple(x.shape[:-2])
    if y is None or y is x:
        return batch, batched(x, batch), None
    if y.ndim < 2:
        raise ValueError(f"y: expected shape (..., n, d), got {tuple(y.shape)}")
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(f"y: expected {x.shape[-1]} columns to match x, got shape {tuple(y.shape)}")
    batch = common_batch(batch, y, "y")
    return batch, batched(x, batch), batched(y, batch)


def matrix(x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, out: Array | None = None) -> Array:
    """The matrix of a map for three-dimensional arrays; for torch connected to the graph."""
    if is_torch(x) and out is None:
        from . import autograd

        return autograd.apply("store", (x, y), (map, normalize, condensed))
    return operations.store(x, y, map, normalize, condensed, out)


def cdist(
    x: Array,
    y: Array | None = None,
    metric: str = "euclidean",
    *,
    p: float = 2.0,
    M: Any = None,
    out: Array | None = None,
) -> Array:
    """The distance of every row of `x` to every row of `y`.

    Parameters
    ----------
    x : array (..., N, D)
    y : array (..., M, D), optional
        Leading dimensions broadcast. Without it, or if it is `x` itself: x against x, with half the arithmetic, an
        exactly symmetric result and an exactly zero diagonal.
    metric : {"euclidean", "sqeuclidean", "cosine", "dot"}
        "cosine" is 1 - cos, "dot" the plain dot product.
    p : float
        For the Minkowski metric, which is not available yet; only 2 is accepted.
    M : optional
        For the Mahalanobis metric, which is not available yet; only None is accepted.
    out : array (..., N, M), optional
        C-contiguous, of the result's dtype; is filled and returned. Not for inputs that require a gradient.

    Returns
    -------
    array (..., N, M)
        float32 for half precisions, else the inputs' dtype.

    Raises
    ------
    ValueError, TypeError
        Unknown metric; shapes, dtypes or kinds that do not match.

    Notes
    -----
    Squared distances are never negative. Up to 16 dimensions they are computed from differences; above, from
    |x|^2 + |y|^2 - 2<x, y> on points shifted to a common centre, where pairs closer than about 1/22 of their norms are
    computed again from their differences: nearby points far from the origin keep their relative accuracy. NaN in a row
    touches that row and column only. Differentiable (first and second order); the gradient at distance 0 is 0. A zero
    row has cosine distance 1 to every other row, and 0 to itself.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.cdist(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [1.0, 0.0]]))
    array([[5., 1.]])
    """
    map, normalize = metric_of(metric)
    if p != 2:
        raise ValueError(f"p: only 2 is available with metric={metric!r}, got {p}")
    if M is not None:
        raise ValueError(f"M: only for metric='mahalanobis', which is not available yet, got metric={metric!r}")
    batch, x3, y3 = pair_shapes(x, y)
    shape = (*batch, x3.shape[1], x3.shape[1] if y3 is None else y3.shape[1])
    if out is None:
        return matrix(x3, y3, map, normalize, False).reshape(shape)
    check_out(out, shape, x)
    if is_torch(x) and (x.requires_grad or (y is not None and y.requires_grad)):
        raise ValueError("out: not for inputs that require a gradient")
    matrix(x3, y3, map, normalize, False, out.reshape(x3.shape[0], *shape[-2:]))
    return out


def check_out(out: Array, shape: tuple[int, ...], like: Array) -> None:
    """A C-contiguous array of this shape, of the kind and compute dtype of `like`."""
    if kind_of(out, "out") != kind_of(like, "x"):
        raise TypeError(f"out: expected a {kind_of(like, 'x')} array, got {kind_of(out, 'out')}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    if dtype_name(out) != compute_dtype(like):
        raise TypeError(f"out: expected dtype {compute_dtype(like)}, got {dtype_name(out)}")
    contiguous = out.is_contiguous() if is_torch(out) else out.flags.c_contiguous
    if not contiguous:
        raise ValueError("out: expected a C-contiguous array")


def pdist(x: Array, metric: str = "euclidean") -> Array:
    """The distances of all pairs i < j of rows, condensed in SciPy's order.

    Parameters
    ----------
    x : array (..., N, D)
    metric : {"euclidean", "sqeuclidean", "cosine", "dot"}
        As in `cdist`.

    Returns
    -------
    array (..., N (N - 1) / 2)
        Entry ``N i - i (i + 1) / 2 + j - i - 1`` belongs to rows i < j. Fewer than two rows: empty.

    Raises
    ------
    ValueError, TypeError
        As `cdist`.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.pdist(np.array([[0.0], [1.0], [3.0]]))
    array([1., 3., 2.])
    """
    map, normalize = metric_of(metric)
    batch, x3, _ = pair_shapes(x, None)
    n = x3.shape[1]
    return matrix(x3, None, map, normalize, True).reshape(*batch, n * (n - 1) // 2)
