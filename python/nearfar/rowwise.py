"""The triplet loss of paired rows, O(N D): NumPy formulas with their gradients, in float64 throughout.

For torch the same is made of torch's own operations (`nearfar.formulas.PLAIN`), which differentiates them. Returned is
``(value, *gradients)`` as by `nearfar.operations`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import compute_dtype

_Rows = NDArray[np.float64]


def unit(x: _Rows) -> tuple[_Rows, _Rows]:
    """Rows of unit norm (a zero row stays zero), and the inverse norms (n, 1); infinite of the smallest numbers."""
    _, exponent = np.frexp(np.abs(x).max(1, keepdims=True))
    x = np.ldexp(x, -exponent)  # exact; no square overflows
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    rows, inverse = (np.divide(z, norm, out=np.zeros_like(z), where=norm != 0) for z in (x, np.ones_like(norm)))
    with np.errstate(over="ignore"):
        return rows, np.ldexp(inverse, -exponent)


def _prepared(arrays: tuple[Any, ...], normalize: bool) -> tuple[list[_Rows], list[_Rows | None]]:
    wide = [np.asarray(a, np.float64) for a in arrays]
    if not normalize:
        return wide, [None] * len(wide)
    rows, inverses = zip(*map(unit, wide), strict=True)
    return list(rows), list(inverses)


def _result(
    like: Any, loss: _Rows, reduction: str, rows: list[_Rows], inverses: list[_Rows | None], grads: list[_Rows]
) -> tuple[Any, ...]:
    """Reduced value and gradients, through the normalisation, in the compute dtype."""
    dtype = compute_dtype(like)
    n = max(len(loss), 1)
    value = loss if reduction == "none" else loss.sum() / (n if reduction == "mean" else 1)
    made = []
    for u, inverse, grad in zip(rows, inverses, grads, strict=True):
        own = grad / n if reduction == "mean" else grad
        if inverse is not None:
            own = inverse * (own - u * (u * own).sum(1, keepdims=True))
        made.append(own.astype(dtype))
    return (np.asarray(value, dtype), *made)


def _norm(difference: _Rows, p: float) -> _Rows:
    size = np.abs(difference)
    # Powers leave the range of floats long before norms do.
    largest = size.max(1, initial=0.0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    norm: _Rows = largest if np.isinf(p) else scale * ((size / scale[:, None]) ** p).sum(1) ** (1 / p)
    return norm


def _norm_slope(difference: _Rows, norm: _Rows, p: float) -> _Rows:
    """d norm / d difference, 0 where the norm is; for p = inf shared evenly by the largest entries."""
    size, norm = np.abs(difference), norm[:, None]
    if np.isinf(p):
        largest = size == norm
        slope = largest / np.maximum(largest.sum(1, keepdims=True), 1)
    else:
        ratio = np.divide(size, norm, out=np.zeros_like(size), where=norm != 0)
        with np.errstate(divide="ignore"):
            slope = np.where(size > 0, ratio ** (p - 1), 0.0)
    slope = np.where(np.isnan(norm), np.nan, np.sign(difference) * slope * (norm != 0))
    return slope


@np.errstate(invalid="ignore")  # infinite entries: NaN out, as from the kernels
def triplet_margin(
    anchor: Any,
    positive: Any,
    negative: Any,
    margin: float,
    p: float,
    swap: bool,
    eps: float,
    reduction: str,
    normalize: bool,
    gradients: bool,
) -> tuple[Any, ...]:
    """`torch.nn.functional.triplet_margin_loss`."""
    rows, inverses = _prepared((anchor, positive, negative), normalize)
    a, b, c = rows
    near, far, other = a - b + eps, a - c + eps, b - c + eps
    d_near, d_far = _norm(near, p), _norm(far, p)
    share = np.ones_like(d_far)  # of the anchor's distance to the negative, against the positive's
    least = d_far
    if swap:
        d_other = _norm(other, p)
        share = np.where(d_far < d_other, 1.0, np.where(d_far == d_other, 0.5, 0.0))
        least = np.minimum(d_far, d_other)
    gap = margin + d_near - least
    loss = np.maximum(gap, 0.0)
    if not gradients:
        return _result(anchor, loss, reduction, [], [], [])
    active = np.where(np.isnan(gap), np.nan, gap >= 0)  # at 0 torch's slope is 1
    g_near = active[:, None] * _norm_slope(near, d_near, p)
    g_far = (active * share)[:, None] * _norm_slope(far, d_far, p)
    grads = [g_near - g_far, -g_near, g_far]
    if swap:
        g_other = (active * (1 - share))[:, None] * _norm_slope(other, d_other, p)
        grads[1] = grads[1] - g_other
        grads[2] = grads[2] + g_other
    return _result(anchor, loss, reduction, rows, inverses, grads)
