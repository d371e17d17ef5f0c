"""What errors are measured against: the same quantities in float64 NumPy, by blocks of rows so that they fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .case import Array

_BLOCK = 1024


def blocks(n: int) -> Iterator[slice]:
    """Rows 0..n in blocks."""
    return (slice(begin, min(begin + _BLOCK, n)) for begin in range(0, n, _BLOCK))


def square_distances(x: Array, y: Array) -> Array:
    """``|x_i - y_j|^2`` in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squared: Array = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)
    np.maximum(squared, 0, out=squared)
    return squared


def unit(x: Array) -> Array:
    """Rows of unit norm, in float64."""
    x = x.astype(np.float64)
    rows: Array = x / np.linalg.norm(x, axis=1, keepdims=True)
    return rows


def through_unit(x: Array, gradient: Array) -> Array:
    """The gradient of x from that of ``unit(x)``."""
    u = unit(x)
    tangent: Array = gradient - u * (u * gradient).sum(1, keepdims=True)
    tangent /= np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return tangent


def cross_entropy(
    x: Array, y: Array, positive: Array, scale: float, *, without_self: bool = False
) -> tuple[float, Array, Array]:
    """Mean over i of ``-s_ip + log sum_j exp(s_ij)``, ``s = scale x y^T``, ``p = positive[i]``: value and gradients."""
    n = len(x)
    value, dx, dy = 0.0, np.zeros_like(x), np.zeros_like(y)
    for rows in blocks(n):
        s = scale * (x[rows] @ y.T)
        own = np.arange(len(s))
        if without_self:
            s[own, rows.start + own] = -np.inf
        peak = s.max(1, keepdims=True)
        weights = np.exp(s - peak)
        total = weights.sum(1, keepdims=True)
        value += float((np.log(total[:, 0]) + peak[:, 0] - s[own, positive[rows]]).sum())
        weights /= total
        weights[own, positive[rows]] -= 1
        dx[rows] += weights @ y
        dy += weights.T @ x[rows]
    return value / n, dx * (scale / n), dy * (scale / n)


def log_potential(x: Array, t: float) -> tuple[float, Array]:
    """``log mean over i < j of exp(-t |x_i - x_j|^2)``: value and gradient."""
    n = len(x)
    total, dx = 0.0, np.zeros_like(x)
    for rows in blocks(n):
        w = np.exp(-t * square_distances(x[rows], x))
        w[np.arange(len(w)), rows.start + np.arange(len(w))] = 0
        total += float(w.sum()) / 2
        dx[rows] = -2 * t * (w.sum(1, keepdims=True) * x[rows] - w @ x)
    return float(np.log(total / (n * (n - 1) / 2))), dx / total
