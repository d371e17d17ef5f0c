"""The compiled losses, as `nearfar.operations` has the other operations.

They return ``(value, *gradients)``; gradients are those of the value for reduction 'mean' or 'sum', of
``<weights, value>`` for 'none', and None where they were not asked for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import Array, as_bytes, cast, codes_of, compute_dtype, empty, scalar
from .backend import kernel, on_cuda
from .operations import contiguous

# Workspace for exp(scores) of a strip of 128 rows, or of all pairs where columns have a normaliser too. Beyond it (more
# than 64 Ki columns in float32; of CLIP some 2800 rows, of NT-Xent 2 x 1900) scores are computed twice: four matrix
# products instead of three.
STRIP_BUDGET = 32 << 20

# Losses that compute a gradient only where it is wanted: constant keys, a queue or a frozen tower, save one of three
# products.
_SELECTIVE = ("softmax", "sigmoid")

# The largest multiplier of dot products.
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


def told(name: str, wanted: str) -> str | bool:
    """The last argument of a loss: which gradients are wanted or, where it computes all or none, whether any is."""
    return wanted if name in _SELECTIVE else bool(wanted)


def _reduced(like: Array, rows: Array, total: Any, reduction: str, anchors: Any = None) -> Array:
    """The value of a loss; the mean is over `anchors`, or all rows. Without any the total is 0."""
    if reduction == "none":
        return rows
    n = rows.shape[0] if anchors is None else anchors
    total = total if reduction == "sum" else total / (n.clip(1) if hasattr(n, "clip") else max(n, 1))
    return scalar(like, total, compute_dtype(like))


def _row_weights(weights: Array | None, x: Array, reduction: str) -> tuple[float, Array | None]:
    """The upstream gradient of every row: one number for all, or (unused number, array)."""
    if weights is not None:
        return 0.0, contiguous(cast(weights, compute_dtype(x)))
    return (1.0 / max(x.shape[0], 1) if reduction == "mean" else 1.0), None


def _multiplier(scale: Any, like: Array) -> Any:
    """The multiplier of dot products, checked; on the GPU an array stays there, and one not positive gives NaN."""
    if on_cuda(scale) and on_cuda(like):
        return cast(scale, "float64")
    multiplier = float(scale)
    if not 0 < multiplier <= LARGEST[compute_dtype(like)]:
        raise ValueError(f"temperature, logit_scale: expected a positive number, got logit_scale = {multiplier}")
    return multiplier


def _offset(bias: Any, like: Array) -> Any:
    """The bias of logits, checked; on the GPU an array stays there, and one not finite gives NaN."""
    if on_cuda(bias) and on_cuda(like):
        return cast(bias, "float64")
    offset = float(bias)
    if not math.isfinite(offset):
        raise ValueError(f"logit_bias: expected a finite number, got {offset}")
    return offset


def _codes(ids: Array, columns: int) -> tuple[Array, Array | None]:
    """Integer ids as dense int32 codes of rows and columns; columns past the ids (queues) match nothing.

    On the GPU the ids themselves, of the rows: codes would have to be counted, and the stream waited for.
    """
    if on_cuda(ids):
        return contiguous(cast(ids, "int64")), None
    rows, _ = codes_of(ids)
    return rows, rows if columns == len(rows) else np.concatenate([rows, np.full(columns - len(rows), -1, np.int32)])


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
    wanted: str,
) -> tuple[Any, ...]:
    """Softmax over pairs: value and gradients of x, y, positive, paired and scale.

    ``y=None``: the columns are x itself. ``positive=None``: the positives are the first n columns, row ``i + shift``.
    `wanted`: the gradients by their numbers, "0" to "4"; with any of them come those of x and scale.
    """
    scale = _multiplier(scale, x)
    n, d = x.shape
    columns = x if y is None else y
    own_positive = positive is not None
    rows = empty(x, (n,))
    dx = dy = dpositive = dpaired = None
    if wanted:
        dx = empty(x, (n, d), zero=True)
        # NT-Xent: rows, columns and positives are one array, and so are their gradients.
        if mode == "pairs":
            dy = dx
        elif "1" in wanted:
            dy = empty(x, columns.shape, zero=True)
        if not own_positive:
            dpositive = dy if dy is None or len(dy) == n else dy[:n]
        elif "2" in wanted:
            dpositive = empty(x, (n, d), zero=True)
        dpaired = empty(x, paired.shape) if paired is not None and "3" in wanted else None
    ids_x, ids_y = (None, None) if ids is None else _codes(ids, columns.shape[0])
    weight, weights = _row_weights(weights, x, reduction)
    total, dscale = kernel(x, "softmax")(
        mode,
        x,
        columns,
        positive if own_positive else columns if len(columns) == n else columns[:n],
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
    if not wanted:
        return value, None, None, None, None, None
    dy = None if y is None or mode == "pairs" else dy
    return value, dx, dy, dpositive if own_positive else None, dpaired, scalar(x, dscale, "float64")


def _block_ids(ids_x: Array | None, ids_y: Array | None) -> tuple[Array | None, Array | None]:
    if ids_x is None or on_cuda(ids_x):
        return ids_x, ids_y
    codes, _ = codes_of(np.concatenate([np.asarray(ids_x), np.asarray(ids_y)]))
    return codes[: len(ids_x)], codes[len(ids_x) :]


def softmax_block(
    x: Array, y: Array | None, scale: Any, ids_x: Array | None, ids_y: Array | None, normalize: bool, columns: bool
) -> tuple[Array, Array | None]:
    """Log-sum-exps (n,) over the columns of a block and, where asked for, (m,) over its rows, in float64.

    int64 ids: pairs of equal ones are left out. ``y=None``: the columns are x itself, without the row; no `columns`.
    """
    lse = empty(x, (x.shape[0],), "float64")
    of_columns = empty(x, (y.shape[0],), "float64") if columns and y is not None else None
    launch = kernel(x, "softmax_block")
    ids = _block_ids(ids_x, ids_y)
    both = (x, x if y is None else y, y is None)
    launch(*both, *ids, _multiplier(scale, x), normalize, lse, of_columns, None, None, None, None)
    return lse, of_columns


def softmax_block_grad(
    x: Array,
    y: Array | None,
    scale: Any,
    ids_x: Array | None,
    ids_y: Array | None,
    normalize: bool,
    rows: tuple[Array, Array],
    columns: tuple[Array, Array] | None,
) -> tuple[Array, Array | None, Array]:
    """Gradients of x, y and scale, the weight of a pair being u_i exp(s_ij - a_i) + v_j exp(s_ij - b_j).

    `rows` (a, u) and `columns` (b, v), or None, are the normalisers, over all blocks, and their weights, in float64.
    """
    dx = empty(x, x.shape, zero=True)
    dy = dx if y is None else empty(x, y.shape, zero=True)
    launch = kernel(x, "softmax_block")
    ids = _block_ids(ids_x, ids_y)
    (a, u), (b, v) = rows, columns or (None, None)
    both = (x, x if y is None else y, y is None)
    dscale = launch(*both, *ids, _multiplier(scale, x), normalize, a, b, u, v, dx, dy)
    return dx, None if y is None else dy, scalar(x, dscale, "float64")


def n_pairs(
    weights: Array | None, x: Array, y: Array, l2_reg: float, reduction: str, gradients: bool
) -> tuple[Any, ...]:
    """Softmax over dot products plus l2_reg times half the squared norms of a pair: value, gradients of x and y."""
    wanted = "01" if gradients else ""
    value, dx, dy, *_ = softmax(weights, x, y, None, None, 1.0, None, "rows", reduction, False, True, 0, wanted)
    if l2_reg:
        weight, weights = _row_weights(weights, x, reduction)
        x, y = cast(x, compute_dtype(x)), cast(y, compute_dtype(x))
        penalty = ((x * x).sum(1) + (y * y).sum(1)) * (l2_reg / 2)
        value += penalty if reduction == "none" else weight * penalty.sum()
        if gradients:
            factor = l2_reg * (weight if weights is None else weights[:, None])
            dx += factor * x
            dy += factor * y
    return value, dx, dy


def sup_con(
    weights: Array | None,
    x: Array,
    scale: Any,
    labels: Array | None,
    positive_mask: Array | None,
    reduction: str,
    normalize: bool,
    gradients: bool,
) -> tuple[Any, ...]:
    """Supervised contrastive loss of (n, d), or (n, v, d) for v views: value, gradients of x and scale.

    Positives: the rows of a label, or what the mask of items says; without both, the views of an item.
    """
    launch = kernel(x, "sup_con")
    d = x.shape[-1]
    views = x.shape[1] if x.ndim == 3 else 1
    rows = empty(x, x.shape[:-1])
    dx = empty(x, x.shape, zero=True) if gradients else None
    classes = None
    if on_cuda(x):  # which counts no classes, and takes the labels of items
        classes = None if labels is None else _codes(labels, 0)[0]
    elif positive_mask is None:
        classes = np.repeat(codes_of(np.arange(len(x)) if labels is None else labels)[0], views)
    _, weights = _row_weights(weights, x, reduction)
    total, dscale, anchors = launch(
        x.reshape(-1, d),
        classes,
        None if positive_mask is None else as_bytes(positive_mask),
        views,
        _multiplier(scale, x),
        normalize,
        None if weights is None else weights.reshape(-1),
        reduction == "mean",
        rows.reshape(-1),
        None if dx is None else dx.reshape(-1, d),
    )
    value = _reduced(x, rows, total, reduction, anchors)
    return value, dx, scalar(x, dscale, "float64") if gradients else None


def sigmoid(
    weights: Array | None,
    x: Array,
    y: Array,
    scale: Any,
    bias: Any,
    reduction: str,
    normalize: bool,
    wanted: str,
    matched: bool = True,
) -> tuple[Any, ...]:
    """Sigmoid loss over pairs: value and gradients of x, y, scale and bias; `wanted` as in `softmax`, "0" to "3".

    Not `matched`: y may have any number of rows, and none of them is the match of a row of x.
    """
    n = x.shape[0]
    bias = _offset(bias, x)
    rows = empty(x, (n,))
    dx = empty(x, x.shape, zero=True) if wanted else None
    dy = empty(y, y.shape, zero=True) if "1" in wanted else None
    weight, weights = _row_weights(weights, x, reduction)
    scale = _multiplier(scale, x)
    total, *scalars = kernel(x, "sigmoid")(x, y, matched, scale, bias, normalize, weights, weight, rows, dx, dy)
    value = _reduced(x, rows, total, reduction)
    return value, dx, dy, *(scalar(x, g, "float64") if wanted else None for g in scalars)


def _labels(labels: Array, x: Array, y: Array | None) -> tuple[Array | None, Array]:
    """int32 codes of the labels of rows and columns; with a y, the label of a row is its number.

    On the GPU the labels as they are; for rows that are numbered None. One out of range makes the result NaN there.
    """
    if y is None:
        return (_codes(labels, x.shape[0])[0],) * 2
    if on_cuda(x):
        return None, _codes(labels, 0)[0]
    codes, classes = np.asarray(labels), x.shape[0]
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < classes:
        raise ValueError(f"labels: expected values in [0, {classes}), got {codes.min()} to {codes.max()}")
    return np.arange(classes, dtype=np.int32), np.ascontiguousarray(codes, np.int32)


def _labelled_lse(
    x: Array,
    y: Array | None,
    scale: Any,
    labels: Array,
    maps: Array,
    power: float | None,
    normalize: bool,
    *out: Any,
) -> float:
    launch = kernel(x, "labelled_lse")
    columns, codes = (x if y is None else y), _labels(labels, x, y)
    multiplier, constants = _multiplier(scale, x), np.asarray(maps).reshape(-1).tolist()
    dscale: float = launch(x, columns, y is None, *codes, multiplier, normalize, constants, power, *out)
    return dscale


def labelled_lse(
    x: Array, y: Array | None, scale: Any, labels: Array, maps: Array, power: float | None, normalize: bool
) -> Array:
    """Log-sum-exps over the columns of a row's label, over the others, and of those with `power`: (n, 2 or 3) float64.

    ``y=None``: the columns are x itself, without the row. Else the labels are those of y, and the label of a row of x
    is its number. ``maps`` (2, 4): sign, q, r, shift of each map of scores (`ScoreMap` in csrc/cpu/ops.hpp).
    """
    lse = empty(x, (x.shape[0], 2 if power is None else 3), "float64")
    _labelled_lse(x, y, scale, labels, maps, power, normalize, lse, None, None, None)
    return lse


def labelled_lse_grad(
    grad: Array,
    lse: Array,
    x: Array,
    y: Array | None,
    scale: Any,
    labels: Array,
    maps: Array,
    power: float | None,
    normalize: bool,
) -> tuple[Any, ...]:
    """Gradients of ``<grad, lse>`` with respect to x, y and scale."""
    columns = x if y is None else y
    dx = empty(x, x.shape, zero=True)
    dy = dx if y is None else empty(x, columns.shape, zero=True)
    grad = contiguous(cast(grad, "float64"))
    dscale = _labelled_lse(x, y, scale, labels, maps, power, normalize, contiguous(lse), grad, dx, dy)
    return dx, None if y is None else dy, scalar(x, dscale, "float64")


def potential(x: Array, t: float, normalize: bool, gradients: bool) -> tuple[Any, ...]:
    """log mean over i < j of exp(-t |x_i - x_j|^2): value and gradient."""
    n = x.shape[0]
    dx = empty(x, x.shape, zero=True) if gradients else None
    log_sum = kernel(x, "potential")(x, t, normalize, dx)
    return scalar(x, log_sum - math.log(n * (n - 1) / 2), compute_dtype(x)), dx


def alignment(
    weights: Array | None, x: Array, y: Array, alpha: float, reduction: str, normalize: bool, gradients: bool
) -> tuple[Any, ...]:
    """|x_i - y_i|^alpha: value and gradients."""
    n = x.shape[0]
    rows = empty(x, (n,))
    dx, dy = (empty(x, x.shape), empty(x, x.shape)) if gradients else (None, None)
    weight, weights = _row_weights(weights, x, reduction)
    total = kernel(x, "alignment")(x, y, alpha, normalize, weights, weight, rows, dx, dy)
    value = _reduced(x, rows, total, reduction)
    return value, dx, dy
