"""A kernel's Gram matrix at given points, as linear algebra in NumPy sees it: never stored.

Factorisations and eigen-solvers are written once for this: products with columns, single rows, the diagonal, as NumPy
arrays, whatever kind the points are. No gradient flows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, cast, check_matrix, check_points, compute_dtype, is_torch

__all__ = ["ImplicitGram", "of_kind"]

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
            return np.array(_numpy(self.kernel.diag(self.x)))

    def block(self, rows: Any, columns: Any = None) -> Numbers:
        """Entries of some rows and some or all columns; symmetric to the bit where both are the same object."""
        with _no_gradient(self.x):
            own = self.x[rows]
            other = self.x if columns is None else None if columns is rows else self.x[columns]
            return _numpy(self.kernel(own, other))

    def matmul(self, v: Numbers, x: Array | None = None) -> Numbers:
        """``k(x, self.x) @ v`` for v (n, r) or (n,); x defaults to the points themselves."""
        values = of_kind(np.ascontiguousarray(v, self.dtype), self.x)
        with _no_gradient(self.x):
            if x is None:
                return _numpy(self.kernel.matmul(self.x, None, values))
            return _numpy(self.kernel.matmul(x, self.x, values))


def of_kind(values: Numbers, like: Array) -> Array:
    """NumPy values as an array of the kind of `like`."""
    if not is_torch(like):
        return values
    import torch

    return torch.from_numpy(np.array(values, order="C"))


def _numpy(array: Array) -> Numbers:
    """The values of a result, without its graph (hyper-parameters may require gradients)."""
    return np.asarray(array.detach() if is_torch(array) else array)


def _no_gradient(x: Array) -> Any:
    if not is_torch(x):
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
