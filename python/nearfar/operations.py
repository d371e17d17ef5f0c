"""The compiled operations on arrays without gradients tracking: allocate results, call the kernel.

Each function takes NumPy arrays or (detached) torch tensors and returns arrays of the same kind. Loss operations return
``(value, *gradients)``; gradients are those of the value for reduction 'mean' or 'sum', of ``<weights, value>`` for
'none', and None where they were not asked for. Values and gradients have the compute dtype (float32 for half
precisions); who hands gradients out rounds them to the dtype of what they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import _core
from .arrays import Array, as_bytes, cast, codes_of, compute_dtype, empty, namespace, scalar
from .backend import kernel, on_cuda

# Workspace for exp(scores) of a strip of 128 rows, or of all pairs where columns have a normaliser too. Beyond it (more
# than 64 Ki columns in float32; of CLIP some 2800 rows, of NT-Xent 2 x 1900) scores are computed twice: four matrix
# products instead of three.
STRIP_BUDGET = 32 << 20

# Whether searches score columns with 8-bit integers first: "automatic" (where the CPU is faster at them), "always" or
# "never". Results are the same.
SCREENING = "automatic"

# Losses that compute a gradient only where it is wanted: constant keys, a queue or a frozen tower, save one of three
# products.
_SELECTIVE = ("softmax", "sigmoid")

# The largest multiplier of dot products.
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


def numbers(flags: Iterable[bool]) -> str:
    """Which of the inputs' gradients are wanted, as "02"."""
    return "".join(str(k) for k, flag in enumerate(flags) if flag)


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


def _contiguous(array: Array) -> Array:
    return array.contiguous() if hasattr(array, "contiguous") else namespace(array).ascontiguousarray(array)


def _row_weights(weights: Array | None, x: Array, reduction: str) -> tuple[float, Array | None]:
    """The upstream gradient of every row: one number for all, or (unused number, array)."""
    if weights is not None:
        return 0.0, _contiguous(cast(weights, compute_dtype(x)))
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
        return _contiguous(cast(ids, "int64")), None
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
            dy = empty(x, tuple(columns.shape), zero=True)
        if not own_positive:
            dpositive = dy if dy is None or len(dy) == n else dy[:n]
        elif "2" in wanted:
            dpositive = empty(x, (n, d), zero=True)
        dpaired = empty(x, tuple(paired.shape)) if paired is not None and "3" in wanted else None
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
    dx = empty(x, tuple(x.shape), zero=True)
    dy = dx if y is None else empty(x, tuple(y.shape), zero=True)
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
    rows = empty(x, tuple(x.shape[:-1]))
    dx = empty(x, tuple(x.shape), zero=True) if gradients else None
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
    dx = empty(x, tuple(x.shape), zero=True) if wanted else None
    dy = empty(y, tuple(y.shape), zero=True) if "1" in wanted else None
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
    dx = empty(x, tuple(x.shape), zero=True)
    dy = dx if y is None else empty(x, tuple(columns.shape), zero=True)
    grad = _contiguous(cast(grad, "float64"))
    dscale = _labelled_lse(x, y, scale, labels, maps, power, normalize, _contiguous(lse), grad, dx, dy)
    return dx, None if y is None else dy, scalar(x, dscale, "float64")


def exponential(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """exp of a contiguous NumPy array in place, by the kernels' own code: a sixth of NumPy's time with AVX2."""
    flat = x.reshape(-1)
    _core.vector_math("exp_flush", flat, flat)
    return x


def potential(x: Array, t: float, normalize: bool, gradients: bool) -> tuple[Any, ...]:
    """log mean over i < j of exp(-t |x_i - x_j|^2): value and gradient."""
    n = x.shape[0]
    dx = empty(x, tuple(x.shape), zero=True) if gradients else None
    log_sum = kernel(x, "potential")(x, t, normalize, dx)
    return scalar(x, log_sum - math.log(n * (n - 1) / 2), compute_dtype(x)), dx


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


def _metric(map: str) -> tuple[str, float]:
    """'minkowski:3.0' as name and power: an operator's map is one string."""
    name, _, power = map.partition(":")
    return name, float(power or 2)


def store(x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, out: Array | None = None) -> Array:
    """The matrix of a map, (b, n, m) or condensed (b, n (n - 1) / 2); ``y=None`` is x itself.

    As in all operations of pairs that follow, arrays may have no batch: (n, m) of (n, d) and (m, d).
    """
    *batch, n, _ = x.shape
    columns = x if y is None else y
    shape = (*batch, n * (n - 1) // 2) if condensed else (*batch, n, columns.shape[-2])
    if out is None:
        out = empty(x, shape)
    kernel(x, "store")(x, columns, *_metric(map), normalize, y is None, condensed, out)
    return out


def store_grad(
    grad: Array, value: Array, x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, wanted: str
) -> tuple[Any, ...]:
    """Gradients of ``<grad, store(x, y)>``, those that are `wanted` ("0", "1", "01") at least.

    With ``y=None`` both roles of x are in the first.
    """
    columns = x if y is None else y
    # The GPU's strip of weights has that of x with any other.
    dx = empty(x, tuple(x.shape), zero=True) if y is None or "0" in wanted or on_cuda(x) else None
    dy = empty(x, tuple(columns.shape), zero=True) if y is None or "1" in wanted else None
    dtype = compute_dtype(x)
    grad = cast(grad, dtype)
    grad = _contiguous(grad)
    kernel(x, "store_grad")(x, columns, *_metric(map), normalize, condensed, value, grad, dx, dy)
    return _both_roles(dx, dy, y)


def _pair_gradients(x: Array, y: Array | None, parameters: Array | None, wanted: str) -> tuple[Any, Any, Any]:
    """Zeros for the gradients of x ("0"), y ("1") and the parameters, unless None; None for those not wanted."""
    dx = empty(x, tuple(x.shape), zero=True) if "0" in wanted else None
    # Where y is x, both roles of it are computed, and added by `_both_roles`.
    columns, number = (x, "0") if y is None else (y, "1")
    dy = empty(x, tuple(columns.shape), zero=True) if number in wanted else None
    # Beside the points, also where the parameters are numbers on the CPU: whoever hands it out brings it there.
    return dx, dy, None if parameters is None else empty(x, tuple(parameters.shape), "float64", zero=True)


def _both_roles(dx: Array | None, dy: Array | None, y: Array | None) -> tuple[Any, Any]:
    if y is None and dx is not None:
        dx += dy
        return dx, None
    return dx, dy


def gram(x: Array, y: Array | None, parameters: Array, program: str) -> Array:
    """k(x, y) of a kernel given as a program (`nearfar.kernels.program`), (b, n, m)."""
    columns = x if y is None else y
    out = empty(x, (*x.shape[:-1], columns.shape[-2]))
    kernel(x, "gram")(x, columns, program, parameters, y is None, out)
    return out


def gram_grad(
    grad: Array, x: Array, y: Array | None, parameters: Array, program: str, wanted: str
) -> tuple[Any, Any, Any]:
    """Gradients of ``<grad, gram(x, y)>`` with respect to x, y and the parameters, those that are `wanted` ("012")."""
    dx, dy, dp = _pair_gradients(x, y, parameters if "2" in wanted else None, wanted)
    grad = _contiguous(cast(grad, compute_dtype(x)))
    kernel(x, "gram_grad")(x, x if y is None else y, program, parameters, grad, dx, dy, dp)
    return *_both_roles(dx, dy, y), dp


def matmul(x: Array, y: Array | None, v: Array, parameters: Array, program: str) -> Array:
    """K(x, y) v for (b, n, d), (b, m, d), (b, m, r) and a kernel given as a program."""
    out = empty(x, (*x.shape[:-1], v.shape[-1]))
    kernel(x, "matmul")(x, x if y is None else y, v, program, parameters, y is None, out)
    return out


def matmul_grad(
    grad: Array, x: Array, y: Array | None, v: Array, parameters: Array, program: str, wanted: str
) -> tuple[Any, ...]:
    """Gradients of ``<grad, K(x, y) v>`` with respect to x, y, v and the parameters, those `wanted` ("0123")."""
    # The upstream gradient has the compute dtype and must not be rounded to a half, so the others are widened.
    dtype = compute_dtype(x)
    x, y, v, grad = (None if a is None else cast(a, dtype) for a in (x, y, v, grad))
    columns = x if y is None else y
    dx, dy, dp = _pair_gradients(x, y, parameters if "3" in wanted else None, wanted)
    if dx is not None or dy is not None or dp is not None:
        kernel(x, "matmul_grad")(x, columns, v, grad, program, parameters, dx, dy, dp)
    dv = None
    if "2" in wanted:  # every score is symmetric: K(x, y)^T = K(y, x)
        dv = matmul(columns, None if y is None else x, grad, parameters, program)
    return *_both_roles(dx, dy, y), dv, dp


def hsic(x: Array, y: Array, parameters_x: Array, parameters_y: Array, *config: Any) -> Array:
    """Sums of K' L', K'^2, L'^2, then a and b, (3 + 2 n,), of the centred Gram matrices K'_ij = k(x_i, x_j) - a_i - a_j
    and L' of y; `config`: the programs of both kernels, and whether pairs i = j count.
    """
    values = empty(x, (3 + 2 * x.shape[0],), "float64")
    kernel(x, "hsic")(x, y, parameters_x, parameters_y, *config, values)
    return values


def hsic_grad(
    grad: Array, values: Array, x: Array, y: Array, parameters_x: Array, parameters_y: Array, *config: Any
) -> tuple[Any, ...]:
    """Gradients of ``<grad[:3], the sums of hsic>`` by x, y and both parameters, those `wanted` ("0123"), the last of
    `config`. To them a and b are constants.
    """
    arrays, (*programs, wanted) = (x, y, parameters_x, parameters_y), config
    # All beside the points, as in `_pair_gradients`.
    kinds = zip("0123", arrays, (None, None, "float64", "float64"), strict=True)
    out = [empty(x, tuple(own.shape), dtype, zero=True) if k in wanted else None for k, own, dtype in kinds]
    kernel(x, "hsic_grad")(*arrays, *programs, values, _contiguous(grad[:3]), *out)
    return tuple(out)


def select(x: Array, y: Array | None, map: str, normalize: bool, exclude_self: bool, k: int) -> tuple[Array, Array]:
    """The k best columns of every row: values and int64 indices, (b, n, k)."""
    shape = (*x.shape[:-1], k)
    value, index = empty(x, shape), empty(x, shape, "int64")
    columns = x if y is None else y
    kernel(x, "select")(x, columns, *_metric(map), normalize, exclude_self, k, value, index, SCREENING)
    return value, index
