"""`gram`: kernels by name, also by scikit-learn's names and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..arrays import Array, check_points, finite
from ..distances import check_set
from . import families
from .base import Kernel
from .chi_squared import AdditiveChiSquared, ChiSquared


def _gamma(x: Array, params: dict[str, Any]) -> float | None:
    """scikit-learn's gamma, default 1 / D; None where a length scale is given."""
    if "lengthscale" in params:
        return None
    gamma = params.pop("gamma", None)
    if gamma is None:
        check_points(x=x)
        check_set(x, "x")
        return float(1 / x.shape[-1])
    return finite(gamma, "gamma", 0.0, strict=True)


def _rbf(x: Array, **params: Any) -> Kernel:
    gamma = _gamma(x, params)
    return families.Gaussian(**params) if gamma is None else families.Gaussian(1 / math.sqrt(2 * gamma))


def _laplacian(x: Array, **params: Any) -> Kernel:
    gamma = _gamma(x, params)
    return families.Laplacian(**params) if gamma is None else families.Laplacian(1 / gamma)


def _of(make: Callable[..., Kernel]) -> Callable[..., Kernel]:
    return lambda x, **params: make(**params)


# name -> (kernel of the points and parameters, sets of parameters that go together)
_NAMES: dict[str, tuple[Callable[..., Kernel], tuple[frozenset[str], ...]]] = {
    name: (make, tuple(frozenset(one.split()) for one in parameters))
    for name, make, *parameters in (
        ("gaussian", _of(families.Gaussian), "lengthscale"),
        ("rbf", _rbf, "gamma", "lengthscale"),
        ("laplacian", _laplacian, "gamma", "lengthscale"),
        ("matern", _of(families.Matern), "lengthscale nu"),
        ("rational_quadratic", _of(families.RationalQuadratic), "lengthscale alpha"),
        ("periodic", _of(families.Periodic), "lengthscale period"),
        ("linear", _of(families.Linear), "bias"),
        ("poly", _of(families.Polynomial), "degree gamma coef0"),
        ("polynomial", _of(families.Polynomial), "degree gamma coef0"),
        ("sigmoid", _of(families.Sigmoid), "gamma coef0"),
        ("cosine", _of(families.Cosine), ""),
        ("chi2", _of(ChiSquared), "gamma"),
        ("additive_chi2", _of(AdditiveChiSquared), ""),
    )
}


def gram(x: Array, y: Array | None = None, kernel: Any = "gaussian", **params: Any) -> Array:
    """The Gram matrix of a kernel: function form.

    Parameters
    ----------
    x : array (..., N, D)
    y : array (..., M, D), optional
        Default x.
    kernel : str or kernel
        A kernel object (`nearfar.kernels`), any function of (x, y), or a name with the parameters of its class:
        "gaussian", "matern", "rational_quadratic", "periodic", "linear" or, named and parametrised as in scikit-learn's
        ``pairwise_kernels``, "rbf" (``gamma=``, default 1 / D, meaning ``lengthscale = 1 / sqrt(2 gamma)``),
        "laplacian" (``gamma=``, default 1 / D, meaning ``lengthscale = 1 / gamma``), "poly" or "polynomial"
        (``degree=``, ``gamma=``, ``coef0=``), "sigmoid" (``gamma=``, ``coef0=``), "cosine", "chi2"
        (``gamma=``, default 1), "additive_chi2". "rbf" and "laplacian" also take ``lengthscale=``. The chi-squared
        kernels take points without negative numbers.
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
    >>> nf.gram(np.array([[1.0], [2.0]]), kernel="poly", degree=2)
    array([[ 4.,  9.],
           [ 9., 25.]])
    """
    if not isinstance(kernel, str):
        if isinstance(kernel, type):
            raise TypeError(f"kernel: expected a name or a kernel object, got the class {kernel.__name__}")
        if not callable(kernel):
            raise TypeError(f"kernel: expected a name or a kernel object, got {type(kernel).__name__}")
        if params:
            raise TypeError(f"params: not with a kernel object, got {', '.join(params)}")
        return kernel(x, y)
    return by_name(kernel, x, **params)(x, y)


def by_name(kernel: str, x: Array, **params: Any) -> Kernel:
    """The kernel of a name and parameters of `gram`; some defaults depend on the points' columns."""
    if kernel not in _NAMES:
        raise ValueError(f"kernel: expected one of {', '.join(_NAMES)}, got {kernel!r}")
    make, choices = _NAMES[kernel]
    if not any(params.keys() <= choice for choice in choices):
        known = " or ".join(", ".join(sorted(choice)) or "nothing" for choice in choices)
        raise TypeError(f"params: expected {known} with kernel={kernel!r}, got {', '.join(params)}")
    return make(x, **params)


def resolve(kernel: Any, x: Array, name: str = "kernel") -> Kernel:
    """A kernel object as it is; a name of `gram` with its default parameters."""
    if isinstance(kernel, str):
        return by_name(kernel, x)
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{name}: expected a kernel of nearfar.kernels or a name, got {type(kernel).__name__}")
    return kernel
