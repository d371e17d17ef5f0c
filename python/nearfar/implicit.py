"""A kernel's Gram matrix at given points, as linear algebra in NumPy sees it: never stored.

Factorisations and eigen-solvers are written once for this: products with columns, single rows, the diagonal, as NumPy
arrays, whatever kind the points are and wherever they lie: for points on the GPU products and entries are computed
there, and copied. No gradient flows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, cast, check_matrix, check_points, compute_dtype, is_torch, of_kind, rows_at, to_numpy

__all__ = ["ImplicitGram"]

Numbers = NDArray[Any]


class ImplicitGram:
    """``k(x, x)`` of shape (n, n).

    Parameters
    ----------
    kernel : kernel
        With ``kernel(x, y)``, ``diag`` and ``matmul``.
    x : array (n, D)
    """

    def __init__(self, kernel: Any, x: Array) -> None:
        check_points(x=x)
        check_matrix(x, "x")
        self.kernel, self.dtype = kernel, np.dtype(compute_dtype(x))
        self.x = cast(x.detach() if is_torch(x) else x, self.dtype.name)
        self.n = int(x.shape[0])

    def double(self) -> ImplicitGram:
        """The same at the same points in float64."""
        return ImplicitGram(self.kernel, cast(self.x, "float64"))

    def diagonal(self) -> Numbers:
        with _no_gradient(self.x):
            return np.array(to_numpy(self.kernel.diag(self.x)))

    def block(self, rows: Any, columns: Any = None) -> Numbers:
        """Entries of some rows and some or all columns; symmetric to the bit where both are the same object."""
        with _no_gradient(self.x):
            own = rows_at(self.x, rows)
            other = self.x if columns is None else None if columns is rows else rows_at(self.x, columns)
            return to_numpy(self.kernel(own, other))

    def dense(self) -> Numbers:
        """All entries, of which half are computed: a new matrix, symmetric to the bit."""
        every = slice(None)
        return self.block(every, every)

    def matmul(self, v: Numbers, x: Array | None = None) -> Numbers:
        """``k(x, self.x) @ v`` for v (n, r) or (n,); x defaults to the points themselves."""
        values = of_kind(np.ascontiguousarray(v, self.dtype), self.x)
        with _no_gradient(self.x):
            if x is None:
                return to_numpy(self.kernel.matmul(self.x, None, values))
            return to_numpy(self.kernel.matmul(x, self.x, values))

    def stored(self) -> Callable[[Numbers], Numbers]:
        """``k(x, x) @ v`` of a matrix made once: of a few points, multiplied many times."""
        matrix = self.dense()
        return lambda v: np.asarray(matrix @ v.astype(self.dtype))


def _no_gradient(x: Array) -> Any:
    if not is_torch(x):
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
