"""Mercer kernels: dense Gram matrices, and products with them that never store the matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import operations
from .arrays import Array, batched, cast, check_points, dtype_name, is_torch, number
from .distances import matrix, pair_shapes


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
            values = np.asarray(lengthscale, np.float64)
            good = values.ndim <= 1 and bool(np.all((values > 0) & np.isfinite(values)))
        if not good:
            raise ValueError(f"lengthscale: expected a positive number or (d,) of them, got {lengthscale!r}")

    def __repr__(self) -> str:
        return f"Gaussian(lengthscale={self.lengthscale!r})"

    def _scaled(self, x: Array, name: str) -> Array:
        """x / lengthscale, so that the engine knows the unit kernel only and gradients of the length scale are free."""
        check_points(**{name: x})
        scale = self.lengthscale
        shape = () if isinstance(scale, (int, float)) else tuple(scale.shape if is_torch(scale) else np.shape(scale))
        if shape not in ((), (1,)) and shape != (x.shape[-1],):
            raise ValueError(f"lengthscale: expected a number or shape ({x.shape[-1]},) to match {name}, got {shape}")
        if is_torch(x):
            import torch

            if not is_torch(scale):
                if not shape and scale == 1:
                    return x
                scale = torch.as_tensor(scale, dtype=torch.float64, device=x.device)
            wide = torch.promote_types(x.dtype, torch.float32)
            return x.to(wide) / scale.to(wide)
        if is_torch(scale):
            raise TypeError("lengthscale: a torch.Tensor, but the points are a NumPy array")
        if not shape and float(scale) == 1:
            return x
        wide_name = "float64" if x.dtype == np.float64 else "float32"
        return np.divide(x, np.asarray(scale, wide_name), dtype=wide_name)

    def _pair(self, x: Array, y: Array | None) -> tuple[Array, Array | None]:
        check_points(x=x, y=y)
        own = self._scaled(x, "x")
        return own, None if y is None or y is x else self._scaled(y, "y")

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
        batch, x3, y3 = pair_shapes(*self._pair(x, y))
        shape = (*batch, x3.shape[1], x3.shape[1] if y3 is None else y3.shape[1])
        return matrix(x3, y3, "gaussian", False, False).reshape(shape)

    def diag(self, x: Array) -> Array:
        """``k(x_i, x_i)``: ones, of shape (..., N)."""
        check_points(x=x)
        own = self._scaled(x, "x")[..., 0]
        return own * 0 + 1

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
        check_points(x=x, y=y, v=v)
        vector = v.ndim == 1
        if vector:
            v = v[:, None]
        batch, x3, y3 = pair_shapes(*self._pair(x, y))
        m = x3.shape[1] if y3 is None else y3.shape[1]
        if v.shape[-2] != m:
            raise ValueError(f"v: expected {m} rows to match y, got shape {tuple(v.shape)}")
        v3 = cast(batched(v, batch), dtype_name(x3))
        if is_torch(x3):
            from . import autograd

            out = autograd.apply("matmul", (x3, y3, v3), ("gaussian",))
        else:
            out = operations.matmul(x3, y3, v3, "gaussian")
        out = out.reshape(*batch, x3.shape[1], v.shape[-1])
        return out[..., 0] if vector else out


RBF = SquaredExponential = Gaussian

_NAMES = {"gaussian": Gaussian, "rbf": Gaussian}


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
        if params:
            raise TypeError(f"params: not with a kernel object, got {', '.join(params)}")
        return kernel(x, y)
    if kernel not in _NAMES:
        raise ValueError(f"kernel: expected one of {', '.join(_NAMES)}, got {kernel!r}")
    if kernel == "rbf" and "lengthscale" not in params:
        check_points(x=x)
        gamma = params.pop("gamma", None)
        gamma = 1 / x.shape[-1] if gamma is None else number(gamma, "gamma")
        if not gamma > 0:
            raise ValueError(f"gamma: expected a positive number, got {gamma}")
        params["lengthscale"] = 1 / math.sqrt(2 * gamma)
    return _NAMES[kernel](**params)(x, y)
