"""Pairwise distances: `cdist` and `pdist`, and what a metric is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import operations
from .arrays import (
    Array,
    autograd,
    batched,
    cast,
    check_points,
    common_center,
    compute_dtype,
    concatenate,
    dtype_name,
    is_torch,
    kind_of,
    laid_bare,
    number,
    of_kind,
    outside_transforms,
    to_numpy,
    unbatched,
    widened,
)

EXACT = {1.0: "cityblock", 2.0: "euclidean", math.inf: "chebyshev"}  # powers with a map of their own


class Metric(NamedTuple):
    """The engine's name of a map, whether rows are brought to unit norm, and a factor L that rows are multiplied by."""

    map: str
    normalize: bool
    factor: Array | None = None

    def points(self, x: Array, y: Array | None) -> tuple[Array, Array | None]:
        """The points between which the map is: x and y, or their images L (x - c) about a common centre c."""
        if self.factor is None:
            return x, y
        # By the engine, and both sets together: equal rows have equal images, so distance 0. BLAS does not promise
        # that, and the engine sums in another order where rows are few.
        rows = cast(x if y is None else concatenate([x, y], -2), compute_dtype(x)) - common_center(x)
        image = matrix(rows, batched(self.factor, tuple(x.shape[:-2])), "dot", False, False)
        return (image, None) if y is None else (image[..., : x.shape[-2], :], image[..., x.shape[-2] :, :])


# The metrics by their names; a Mahalanobis metric has a factor besides.
METRICS = {
    "euclidean": Metric("euclidean", False),
    "sqeuclidean": Metric("sqeuclidean", False),
    "cosine": Metric("one_minus_dot", True),
    "dot": Metric("dot", False),
    "cityblock": Metric("cityblock", False),
    "chebyshev": Metric("chebyshev", False),
    "minkowski": Metric("minkowski", False),
    "mahalanobis": Metric("euclidean", False),
}


def metric_of(metric: str, p: Any = 2.0, M: Any = None, like: Array | None = None) -> Metric:
    """A metric by name; `like` has the kind, dtype and columns that M must match."""
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    p = number(p, "p")
    if metric == "minkowski":
        if not p > 0:
            raise ValueError(f"p: expected a positive number or inf, got {p}")
        return Metric(EXACT.get(p, f"minkowski:{p!r}"), False)
    if p != 2:
        raise ValueError(f"p: only for metric='minkowski', got p={p} with metric={metric!r}")
    if metric == "mahalanobis":
        return METRICS[metric]._replace(factor=mahalanobis_factor(M, like))
    if M is not None:
        raise ValueError(f"M: only for metric='mahalanobis', got metric={metric!r}")
    return METRICS[metric]


def mahalanobis_factor(M: Any, like: Array) -> Array:
    """L with M = L^T L, of the kind and compute dtype of `like`."""
    if M is None:
        raise ValueError("M: expected a positive semi-definite matrix or ('factor', L) for metric='mahalanobis'")
    dtype, columns, kind = compute_dtype(like), like.shape[-1], kind_of(like, "x")
    given = isinstance(M, tuple)
    if given and (len(M) != 2 or M[0] != "factor"):
        raise ValueError("M: expected a matrix or ('factor', L), got another tuple")
    array = M[1] if given else M
    if kind_of(array, "M") != kind:
        raise TypeError(f"M: expected a {kind} array to match x, got {kind_of(array, 'M')}")
    if not dtype_name(array).startswith(("float", "bfloat", "int", "uint")):
        raise TypeError(f"M: expected real numbers, got {dtype_name(array)}")
    if array.ndim != 2 or array.shape[1] != columns or (not given and array.shape[0] != columns):
        shape = f"(r, {columns})" if given else f"({columns}, {columns})"
        raise ValueError(f"M: expected shape {shape} to match x, got {tuple(array.shape)}")
    if given:
        return cast(array, dtype)
    bare = laid_bare(array, "M", "it must be positive semi-definite")
    with outside_transforms(bare):
        wide = to_numpy(cast(bare, "float64"))
    size = float(np.abs(wide).max(initial=0.0))
    rounding = 8 * float(np.finfo(dtype).eps) * columns * size
    if not np.isfinite(size) or np.abs(wide - wide.T).max(initial=0.0) > rounding:
        raise ValueError("M: expected a finite symmetric matrix")
    values, vectors = np.linalg.eigh((wide + wide.T) / 2)
    if values[0] < -rounding:
        raise ValueError(f"M: expected a positive semi-definite matrix, got an eigenvalue {values[0]:.6g}")
    if is_torch(array) and autograd().is_variable(array):
        if values[0] <= rounding:
            raise ValueError(
                "M: expected a positive definite matrix, since it has derivatives, got an eigenvalue "
                f"{values[0]:.3g}; pass ('factor', L) with M = L^T L"
            )
        import torch

        double = cast(array, "float64")
        return cast(torch.linalg.cholesky((double + double.T) / 2).T, dtype)
    return of_kind((np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T).astype(dtype), array)


def check_set(array: Array, name: str) -> None:
    """Shape (..., n, d) with at least one column."""
    if array.ndim < 2:
        raise ValueError(f"{name}: expected shape (..., n, d), got {tuple(array.shape)}")
    if array.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(array.shape)}")


def common_batch(batch: tuple[int, ...], array: Array, name: str) -> tuple[int, ...]:
    """The shape that `batch` and the leading dimensions of an array (..., n, d) broadcast to."""
    if array.ndim == 2:
        return batch
    own = tuple(array.shape[:-2])
    if own == batch:
        return batch
    try:
        return np.broadcast_shapes(batch, own)
    except ValueError as error:
        raise ValueError(f"{name}: expected batch dimensions to match {batch}, got {own}") from error


def pair_shapes(x: Array, y: Array | None, **others: Array) -> tuple[tuple[int, ...], Array, Array | None]:
    """The broadcast batch shape, and both sets with one dimension for it, or none (y None where it is x itself).

    Others must match in kind, device and dtype only.
    """
    check_points(x=x, y=y, **others)
    check_set(x, "x")
    batch = tuple(x.shape[:-2])
    if y is None or y is x:
        return batch, batched(x, batch), None
    if y.ndim < 2:
        raise ValueError(f"y: expected shape (..., n, d), got {tuple(y.shape)}")
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(f"y: expected {x.shape[-1]} columns to match x, got shape {tuple(y.shape)}")
    batch = common_batch(batch, y, "y")
    if batch and (x.shape[:-2] != batch or y.shape[:-2] != batch):  # a set that is repeated
        x, y = widened(x, y)
    return batch, batched(x, batch), batched(y, batch)


def matrix(x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, out: Array | None = None) -> Array:
    """The matrix of a map for `batched` arrays; for torch connected to the graph."""
    if not is_torch(x):
        return operations.store(x, y, map, normalize, condensed, out)
    if out is not None:
        autograd().store_into(out, x, y, map, normalize, condensed)
        return out
    return autograd().apply("store", (x, y), (map, normalize, condensed))


def cdist(
    x: Array,
    y: Array | None = None,
    metric: str = "euclidean",
    *,
    p: float = 2.0,
    M: Any = None,
    out: Array | None = None,
) -> Array:
    r"""The distance of every row of `x` to every row of `y`.

    Parameters
    ----------
    x : array (..., N, D)
    y : array (..., M, D), optional
        Leading dimensions broadcast. Without it, or if it is `x` itself: x against x, with half the arithmetic, an
        exactly symmetric result and an exactly zero diagonal.
    metric : {"euclidean", "sqeuclidean", "cosine", "dot", "cityblock", "chebyshev", "minkowski", "mahalanobis"}
        "cosine" is 1 - cos, "dot" the plain dot product, "cityblock" ``sum |x_k - y_k|``, "chebyshev"
        ``max |x_k - y_k|``, "minkowski" ``(sum |x_k - y_k|^p)^(1/p)``, "mahalanobis" ``sqrt((x - y)^T M (x - y))``.
    p : float
        Of the Minkowski metric, positive; 1, 2 and inf are "cityblock", "euclidean" and "chebyshev". Below 1 it is no
        metric. The sum of powers must be within the range of the compute dtype.
    M : array (D, D) or ("factor", array (R, D)), optional
        Of the Mahalanobis metric: positive semi-definite, or L with ``M = L^T L``. Either may require a gradient, the
        matrix where it is positive definite: its gradient is ``sum_ij g_ij z z^T / (2 d_ij)``, ``z = x_i - y_j``,
        symmetric; first and second order.
    out : array (..., N, M), optional
        C-contiguous, of the result's dtype, and not overlapping the inputs; is filled and returned. Not for inputs that
        require a gradient while torch records, nor inside `torch.func` and forward mode.

    Returns
    -------
    array (..., N, M)
        float32 for half precisions, else the inputs' dtype.

    Raises
    ------
    ValueError, TypeError
        Unknown metric; shapes, dtypes or kinds that do not match; M that is not positive semi-definite.

    Notes
    -----
    Squared distances are never negative. Up to 16 dimensions they are computed from differences; above, from
    ``|x|^2 + |y|^2 - 2<x, y>`` on points shifted to a common centre, where pairs closer than about 1/22 of their norms
    are computed again from their differences: nearby points far from the origin keep their relative accuracy.
    "mahalanobis" is the Euclidean distance of the rows of ``(x - c) L^T``, c a common centre. NaN in a row touches that
    row and its column only. Differentiable (first and second order); the gradient at distance 0 is 0, as is that of
    ``|x_k - y_k|`` at 0, and every coordinate that attains a Chebyshev distance has the whole slope: the conventions of
    `torch.cdist`. A zero row has cosine distance 1 to every other row, and 0 to itself.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.cdist(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [1.0, 0.0]]))
    array([[5., 1.]])
    """
    batch, xs, ys = pair_shapes(x, y)
    chosen = metric_of(metric, p, M, x)
    map, normalize, _ = chosen
    xs, ys = chosen.points(xs, ys)
    if out is None:
        return unbatched(matrix(xs, ys, map, normalize, False), batch)
    shape = (*batch, xs.shape[-2], (xs if ys is None else ys).shape[-2])
    check_out(out, shape, x)
    matrix(xs, ys, map, normalize, False, batched(out, batch))
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


def pdist(x: Array, metric: str = "euclidean", *, p: float = 2.0, M: Any = None) -> Array:
    """The distances of all pairs i < j of rows, condensed in SciPy's order.

    Parameters
    ----------
    x : array (..., N, D)
    metric, p, M
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
    batch, xs, _ = pair_shapes(x, None)
    chosen = metric_of(metric, p, M, x)
    xs, _ = chosen.points(xs, None)
    return unbatched(matrix(xs, None, chosen.map, chosen.normalize, True), batch)
