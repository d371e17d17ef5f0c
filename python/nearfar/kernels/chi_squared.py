"""The chi-squared kernels of histograms, which scikit-learn has by name."""

from __future__ import annotations

import numpy as np

from ..arrays import Array, cast, compute_dtype, finite, is_at_hand, is_torch
from ..distances import pair_shapes
from .base import Kernel, by_rows, checkpointed
from .program import Builder, Register

_BLOCK = 1 << 22  # coordinates of pairs at a time


class ChiSquared(Kernel):
    """``exp(-gamma s)``, or where gamma is None ``-s``, of ``s(x, y) = sum_k (x_k - y_k)^2 / (x_k + y_k)``.

    Of points that are not negative; 0 / 0 is 0 (Vedaldi and Zisserman, 2012). **The slow path**: s is not a score of
    the engine but plain NumPy or torch, some million coordinates of pairs at a time, computed once more for gradients.

    Raises
    ------
    ValueError
        gamma that is not positive; negative numbers among the points (not looked for on a GPU or while tracing).
    """

    _compiles = False

    def __init__(self, gamma: float | None = 1.0) -> None:
        self.gamma = None if gamma is None else finite(gamma, "gamma", 0.0, strict=True)

    @property
    def is_mercer(self) -> bool | None:
        """-s is positive semi-definite on vectors that sum to zero only, hence exp(-gamma s) is on all."""
        return self.gamma is not None

    def _build(self, program: Builder) -> Register:
        raise AssertionError("no program")

    def _dense(self, x: Array, y: Array | None) -> Array:
        batch, x3, y3 = pair_shapes(x, y)
        for name, points in (("x", x3), ("y", y3)):
            if points is not None and is_at_hand(points) and (points < 0).any():
                raise ValueError(f"{name}: expected no negative numbers with a chi-squared kernel")
        x3 = cast(x3, compute_dtype(x3))
        columns = x3 if y3 is None else cast(y3, compute_dtype(y3))
        rows = max(1, _BLOCK // max(1, columns.shape[1] * columns.shape[2]))
        sums = checkpointed(_sums, x3, columns)
        out = self._map(by_rows(lambda own: sums(own, columns), x3, rows))
        return out.reshape(*batch, *out.shape[1:])

    def _map(self, sums: Array) -> Array:
        if self.gamma is None:
            return -sums
        scaled = sums * -self.gamma
        return scaled.exp() if is_torch(scaled) else np.exp(scaled)

    def _diag(self, x: Array) -> Array:
        return self._map((x * 0).sum(-1))

    def __repr__(self) -> str:
        return f"ChiSquared(gamma={self.gamma!r})"


def _sums(x: Array, y: Array) -> Array:
    difference, total = x[:, :, None] - y[:, None], x[:, :, None] + y[:, None]
    total = total + (total == 0)  # their difference is 0 too
    return (difference * difference / total).sum(-1)
