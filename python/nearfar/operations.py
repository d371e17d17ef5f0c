"""The compiled operations on arrays without gradients tracking: allocate results, call the kernel.

Each function takes NumPy arrays or (detached) torch tensors and returns arrays of the same kind. Loss operations return
``(value, *gradients)``; gradients are those of the value for reduction 'mean' or 'sum', of ``<weights, value>`` for
'none', and None where they were not asked for. Values and gradients have the compute dtype (float32 for half
precisions); who hands gradients out rounds them to the dtype of what they belong to.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import Array, cast, compute_dtype, empty, namespace
from .backend import kernel, on_cuda

# Workspace for exp(scores) of a strip of 128 rows. Beyond it (more than 64 Ki columns in float32) scores are computed
# twice: four matrix products instead of three.
STRIP_BUDGET = 32 << 20

# The largest multiplier of dot products.
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


def _reduced(like: Array, rows: Array, total: float, reduction: str) -> Array:
    if reduction == "none":
        return rows
    n = rows.shape[0]
    value = empty(like, (), compute_dtype(like))
    value[...] = total if reduction == "sum" else (total / n if n else 0.0)
    return value


def _contiguous(array: Array) -> Array:
    return array.contiguous() if hasattr(array, "contiguous") else namespace(array).ascontiguousarray(array)


def _row_weights(weights: Array | None, x: Array, reduction: str) -> tuple[float, Array | None]:
    """The upstream gradient of every row: one number for all, or (unused number, array)."""
    if weights is not None:
        return 0.0, _contiguous(cast(weights, compute_dtype(x)))
    return (1.0 / max(x.shape[0], 1) if reduction == "mean" else 1.0), None


def _codes(ids: Array, columns: int) -> tuple[Array, Array | None]:
    """Integer ids as dense int32 codes of rows and columns; columns past the ids (queues) match nothing.

    On the GPU the ids themselves, of the rows: codes would have to be counted, and the stream waited for.
    """
    if on_cuda(ids):
        return _contiguous(cast(ids, "int64")), None
    _, codes = np.unique(np.asarray(ids), return_inverse=True)
    rows = np.ascontiguousarray(codes.reshape(-1), np.int32)
    return rows, np.concatenate([rows, np.full(columns - len(rows), -1, np.int32)])


def _multiplier(scale: Any, x: Array) -> Any:
    """A checked number; on the GPU an array stays there, and one that is not positive gives NaN."""
    if on_cuda(scale) and on_cuda(x):
        return cast(scale, "float64")
    scale = float(scale)
    if not 0 < scale <= LARGEST[compute_dtype(x)]:
        raise ValueError(f"temperature, logit_scale: expected a positive number, got logit_scale = {scale}")
    return scale


def softmax(
    weights: Array | None,
    x: Array,
    y: Array | None,
    positive: Array | None,
    paired: Array | None,
    scale: Any,
    ids: Array | None,
    mode: str,
    reduction: str,
    normalize: bool,
    in_sum: bool,
    shift: int,
    gradients: bool,
) -> tuple[Any, ...]:
    """Softmax over pairs: value and gradients of x, y, positive, paired and scale.

    ``y=None``: the columns are x itself. ``positive=None``: the positives are the first n columns, row ``i + shift``.
    """
    scale = _multiplier(scale, x)
    n, d = x.shape
    columns = x if y is None else y
    own_positive = positive is not None
    rows = empty(x, (n,))
    dx = dy = dpositive = dpaired = None
    if gradients:
        dx = empty(x, (n, d), zero=True)
        # NT-Xent: rows, columns and positives are one array, and so are their gradients.
        dy = dx if mode == "pairs" else empty(x, tuple(columns.shape), zero=True)
        dpositive = empty(x, (n, d), zero=True) if own_positive else dy[:n]
        dpaired = empty(x, tuple(paired.shape)) if paired is not None else None
    ids_x, ids_y = (None, None) if ids is None else _codes(ids, columns.shape[0])
    weight, weights = _row_weights(weights, x, reduction)
    total, dscale = kernel(x, "softmax")(
        mode,
        x,
        columns,
        positive if own_positive else columns[:n],
        shift,
        not own_positive,
        in_sum,
        None if paired is None else paired.reshape(-1, d),
        ids_x,
        ids_y,
        scale,
        normalize,
        weights,
        weight,
        rows,
        dx,
        dy,
        dpositive,
        None if dpaired is None else dpaired.reshape(-1, d),
        STRIP_BUDGET,
    )
    value = _reduced(x, rows, total, reduction)
    if not gradients:
        return value, None, None, None, None, None
    gscale = empty(x, (), "float64")
    gscale[...] = dscale
    dy = None if y is None or mode == "pairs" else dy
    return value, dx, dy, dpositive if own_positive else None, dpaired, gscale


def potential(x: Array, t: float, normalize: bool, gradients: bool) -> tuple[Any, ...]:
    """log mean over i < j of exp(-t |x_i - x_j|^2): value and gradient."""
    n = x.shape[0]
    dx = empty(x, tuple(x.shape), zero=True) if gradients else None
    log_sum = kernel(x, "potential")(x, t, normalize, dx)
    value = empty(x, ())
    value[...] = log_sum - math.log(n * (n - 1) / 2)
    return value, dx


def alignment(
    weights: Array | None, x: Array, y: Array, alpha: float, reduction: str, normalize: bool, gradients: bool
) -> tuple[Any, ...]:
    """|x_i - y_i|^alpha: value and gradients."""
    n = x.shape[0]
    rows = empty(x, (n,))
    dx, dy = (empty(x, tuple(x.shape)), empty(x, tuple(x.shape))) if gradients else (None, None)
    weight, weights = _row_weights(weights, x, reduction)
    total = kernel(x, "alignment")(x, y, alpha, normalize, weights, weight, rows, dx, dy)
    value = _reduced(x, rows, total, reduction)
    return value, dx, dy


def store(x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, out: Array | None = None) -> Array:
    """The matrix of a map, (b, n, m) or condensed (b, n (n - 1) / 2); ``y=None`` is x itself."""
    b, n, _ = x.shape
    columns = x if y is None else y
    shape = (b, n * (n - 1) // 2) if condensed else (b, n, columns.shape[1])
    if out is None:
        out = empty(x, shape)
    kernel(x, "store")(x, columns, map, normalize, y is None, condensed, out)
    return out


def store_grad(
    grad: Array, value: Array, x: Array, y: Array | None, map: str, normalize: bool, condensed: bool
) -> tuple[Any, ...]:
    """Gradients of ``<grad, store(x, y)>``; with ``y=None`` both roles of x are in the first."""
    columns = x if y is None else y
    dx, dy = empty(x, tuple(x.shape), zero=True), empty(x, tuple(columns.shape), zero=True)
    dtype = compute_dtype(x)
    grad = cast(grad, dtype)
    grad = _contiguous(grad)
    kernel(x, "store_grad")(x, columns, map, normalize, condensed, value, grad, dx, dy)
    if y is None:
        dx += dy
        return dx, None
    return dx, dy


def matmul(x: Array, y: Array | None, v: Array, map: str) -> Array:
    """K(x, y) v for (b, n, d), (b, m, d), (b, m, r)."""
    out = empty(x, (x.shape[0], x.shape[1], v.shape[2]))
    kernel(x, "matmul")(x, x if y is None else y, v, map, out)
    return out


def matmul_grad(grad: Array, x: Array, y: Array | None, v: Array, map: str) -> tuple[Any, ...]:
    """Gradients of ``<grad, K(x, y) v>`` with respect to x, y, v."""
    # The upstream gradient has the compute dtype and must not be rounded to a half, so the others are widened.
    dtype = compute_dtype(x)
    x, y, v, grad = (None if a is None else cast(a, dtype) for a in (x, y, v, grad))
    columns = x if y is None else y
    dx, dy = empty(x, tuple(x.shape), zero=True), empty(x, tuple(columns.shape), zero=True)
    kernel(x, "matmul_grad")(x, columns, v, grad, map, dx, dy)
    dv = matmul(columns, x, grad, map)  # radial and dot kernels are symmetric: K(x, y)^T = K(y, x)
    if y is None:
        dx += dy
        return dx, None, dv
    return dx, dy, dv


def select(x: Array, y: Array | None, map: str, normalize: bool, exclude_self: bool, k: int) -> tuple[Array, Array]:
    """The k best columns of every row: values and int64 indices, (b, n, k)."""
    value = empty(x, (x.shape[0], x.shape[1], k))
    index = empty(x, (x.shape[0], x.shape[1], k), "int64")
    columns = x if y is None else y
    kernel(x, "select")(x, columns, map, normalize, exclude_self, k, value, index)
    return value, index
