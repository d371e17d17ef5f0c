"""Mercer kernels: dense Gram matrices, and products with them that never store the matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import operations
from .arrays import (
    Array,
    batched,
    cast,
    check_points,
    common_center,
    compute_dtype,
    dtype_name,
    is_torch,
    kind_of,
    namespace,
    number,
)
from .distances import check_set, common_batch, matrix, pair_shapes


class Gaussian:
    """The Gaussian (RBF, squared-exponential) kernel.

    .. math:: k(x, y) = \\exp\\Bigl(-\\sum_d \\frac{(x_d - y_d)^2}{2 \\ell_d^2}\\Bigr)

    Parameters
    ----------
    lengthscale : positive number, or array (D,)
        One for all coordinates, or one each (automatic relevance determination). A tensor that requires a gradient is
        differentiated.

    Notes
    -----
    Strictly positive definite: the Gram matrix of distinct points has positive eigenvalues. It is the Gaussian
    potential of `nearfar.uniformity` with ``t = 1 / (2 lengthscale^2)``. scikit-learn's ``gamma`` is the same t.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> k = nf.kernels.Gaussian(lengthscale=2.0)
    >>> x = np.array([[0.0], [2.0]])
    >>> k(x).round(4)
    array([[1.    , 0.6065],
           [0.6065, 1.    ]])
    >>> k.matmul(x, x, np.ones((2, 1))).round(4)
    array([[1.6065],
           [1.6065]])
    """

    is_mercer = True

    def __init__(self, lengthscale: Any = 1.0) -> None:
        self.lengthscale = lengthscale
        if isinstance(lengthscale, (int, float)):  # apart, because the compiler does not trace the NumPy form
            good = 0 < lengthscale < math.inf
        elif is_torch(lengthscale):
            good = True
        else:
            values = np.asarray(lengthscale)
            good = values.ndim <= 1 and values.dtype.kind in "fiu" and bool(np.all((values > 0) & np.isfinite(values)))
        if not good:
            raise ValueError(f"lengthscale: expected a positive number or (d,) of them, got {lengthscale!r}")

    def __repr__(self) -> str:
        return f"Gaussian(lengthscale={self.lengthscale!r})"

    def _scale(self, x: Array, name: str) -> Any:
        """The length scale as an array of x's kind, in the dtype that computes; None where it is the number 1."""
        scale = self.lengthscale
        shape = () if isinstance(scale, (int, float)) else tuple(scale.shape if is_torch(scale) else np.shape(scale))
        if shape not in ((), (1,)) and shape != (x.shape[-1],):
            raise ValueError(f"lengthscale: expected a number or shape ({x.shape[-1]},) to match {name}, got {shape}")
        if is_torch(scale):
            if not is_torch(x):
                raise TypeError("lengthscale: a torch.Tensor, but the points are a NumPy array")
        elif not shape and scale == 1:
            return None
        dtype = compute_dtype(x)
        if is_torch(x):
            import torch

            return torch.as_tensor(scale, dtype=getattr(torch, dtype), device=x.device)
        return namespace(x).asarray(scale, dtype)

    def _points(self, x: Array, y: Array | None) -> tuple[tuple[int, ...], Array, Array | None]:
        """The batch and both sets over the length scale: the engine knows the unit kernel only, and gradients of the
        length scale are free. A common centre goes first, or division would round its digits into the differences.
        """
        batch, x, y = pair_shapes(x, y)
        scale = self._scale(x, "x")
        if scale is None:
            return batch, x, y
        center = common_center(x)
        dtype = compute_dtype(x)
        return batch, (cast(x, dtype) - center) / scale, None if y is None else (cast(y, dtype) - center) / scale

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The Gram matrix.

        Parameters
        ----------
        x : array (..., N, D)
        y : array (..., M, D), optional
            Default x: half the arithmetic, exactly symmetric, ones on the diagonal.

        Returns
        -------
        array (..., N, M)
            float32 for half precisions, else the inputs' dtype. Differentiable, first and second order.
        """
        batch, x3, y3 = self._points(x, y)
        shape = (*batch, x3.shape[1], x3.shape[1] if y3 is None else y3.shape[1])
        return matrix(x3, y3, "gaussian", False, False).reshape(shape)

    def diag(self, x: Array) -> Array:
        """``k(x_i, x_i)``: ones, of shape (..., N)."""
        batch, x3, _ = self._points(x, None)
        return (x3[..., 0] * 0 + 1).reshape(*batch, x3.shape[1])

    def matmul(self, x: Array, y: Array | None, v: Array) -> Array:
        """``k(x, y) @ v`` without the Gram matrix; memory O((N + M)(D + R)).

        Parameters
        ----------
        x : array (..., N, D)
        y : array (..., M, D) or None
            None is x.
        v : array (..., M, R) or (M,)

        Returns
        -------
        array (..., N, R) or (N,)
            Differentiable in x, y, v and the length scale, first and second order.
        """
        kind_of(v, "v")
        check_points(x=x, y=y, v=v)
        batch, x3, y3 = self._points(x, y)
        m, given = x3.shape[1] if y3 is None else y3.shape[1], tuple(v.shape)
        vector = v.ndim == 1
        if vector:
            v = v[:, None]
        if v.ndim < 2 or v.shape[-2] != m:
            raise ValueError(f"v: expected {m} rows to match y, got shape {given}")
        if common_batch(batch, v, "v") != batch:
            raise ValueError(f"v: expected batch dimensions to match {batch}, got {given[:-2]}")
        v3 = cast(batched(v, batch), dtype_name(x3))
        if is_torch(x3):
            from . import autograd

            out = autograd.apply("matmul", (x3, y3, v3), ("gaussian",))
        else:
            out = operations.matmul(x3, y3, v3, "gaussian")
        out = out.reshape(*batch, x3.shape[1], v.shape[-1])
        return out[..., 0] if vector else out


RBF = SquaredExponential = Gaussian

# name -> (kernel, the parameters that it takes, one of them at a time)
_NAMES = {"gaussian": (Gaussian, ("lengthscale",)), "rbf": (Gaussian, ("gamma", "lengthscale"))}


def gram(x: Array, y: Array | None = None, kernel: Any = "gaussian", **params: Any) -> Array:
    """The Gram matrix of a kernel: function form.

    Parameters
    ----------
    x : array (..., N, D)
    y : array (..., M, D), optional
        Default x.
    kernel : str or kernel
        "gaussian" (``lengthscale=``) or "rbf" (scikit-learn's name; ``gamma=``, default 1 / D, meaning
        ``lengthscale = 1 / sqrt(2 gamma)``), or a kernel object.
    **params
        Parameters of the named kernel.

    Returns
    -------
    array (..., N, M)

    Raises
    ------
    ValueError
        Unknown kernel.
    TypeError
        Parameters the kernel does not have.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.gram(np.array([[0.0], [1.0]]), lengthscale=1.0).round(4)
    array([[1.    , 0.6065],
           [0.6065, 1.    ]])
    """
    if not isinstance(kernel, str):
        if not callable(kernel):
            raise TypeError(f"kernel: expected a name or a kernel object, got {type(kernel).__name__}")
        if params:
            raise TypeError(f"params: not with a kernel object, got {', '.join(params)}")
        return kernel(x, y)
    if kernel not in _NAMES:
        raise ValueError(f"kernel: expected one of {', '.join(_NAMES)}, got {kernel!r}")
    make, known = _NAMES[kernel]
    if len(params) > 1 or not params.keys() <= set(known):
        raise TypeError(f"params: expected {' or '.join(known)} with kernel={kernel!r}, got {', '.join(params)}")
    if kernel == "rbf" and "lengthscale" not in params:
        check_points(x=x)
        check_set(x, "x")
        gamma = params.pop("gamma", None)
        gamma = 1 / x.shape[-1] if gamma is None else number(gamma, "gamma")
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma: expected a positive number, got {gamma}")
        params["lengthscale"] = 1 / math.sqrt(2 * gamma)
    return make(**params)(x, y)
