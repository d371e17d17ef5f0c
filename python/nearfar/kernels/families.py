"""The kernels: each a score of a pair of points and a map of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import Array, cast, common_center, compute_dtype, is_torch
from .base import Kernel, plain, scalar
from .program import LEAST_SCALE, Builder, Register


def _check_lengthscale(value: Any) -> Any:
    if isinstance(value, bool):
        good = False
    elif isinstance(value, (int, float)):  # apart, because the compiler does not trace the NumPy form
        good = 0 < value < math.inf
    elif is_torch(value):
        good = value.ndim <= 1 and not value.is_complex()
    else:
        values = np.asarray(value)
        good = values.ndim <= 1 and values.dtype.kind in "fiu" and bool(np.all((values > 0) & np.isfinite(values)))
    if not good:
        raise ValueError(f"lengthscale: expected a positive number or (d,) of them, got {value!r}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return () if isinstance(value, (int, float)) else tuple(value.shape if is_torch(value) else np.shape(value))


def _number(value: Any, x: Array) -> Any:
    """A scalar hyper-parameter to compute with the points x; a tensor keeps its graph."""
    return value.reshape(()) if is_torch(value) and is_torch(x) else plain(value)


def _nothing(x: Array) -> Array:
    """0 of every point, NaN where a coordinate is none."""
    return (x * 0).sum(-1)


class _Stationary(Kernel):
    """A map of a distance over a length scale.

    One length scale is a parameter of the map, so the points are taken as they are and distances keep their digits.
    One for every coordinate is divided out of the points, after a common centre, or division would round its digits
    into the differences.
    """

    _distance = "sqeuclidean"
    _map = ""
    _power = 2  # of one over the length scale, in the map's parameter

    def __init__(self, lengthscale: Any = 1.0) -> None:
        self.lengthscale = _check_lengthscale(lengthscale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lengthscale={self.lengthscale!r})"

    @property
    def is_mercer(self) -> bool | None:
        return True

    def _diag(self, x: Array) -> Array:
        return 1 + _nothing(x)

    def _score(self, program: Builder) -> tuple[Register, Any]:
        """The distance, and what it must be multiplied by."""
        scale, shape = self.lengthscale, _shape(self.lengthscale)
        program.positive(scale, "lengthscale")
        if shape in ((), (1,)):
            return program.score(self._distance), self._inverse(program, scale)
        if shape != (program.d,):
            raise ValueError(f"lengthscale: expected a number or shape ({program.d},) to match x, got {shape}")
        unit, divisor = program.units(scale, "lengthscale")
        center = common_center(program.x)
        score = program.score(self._distance, ("over", program.key(scale)), lambda x: (x - center) / divisor)
        return score, self._inverse(program, unit)

    def _inverse(self, program: Builder, scale: Any) -> Any:
        """What a distance is multiplied by in the unit of one length scale."""

        def inverse() -> Any:
            if is_torch(scale):
                import torch

                value = program.array(scale, "lengthscale", "float64").reshape(())
                value = 1.0 / torch.where(value.abs() <= LEAST_SCALE, LEAST_SCALE, value)
            else:
                value = 1.0 / max(
                    float(scale if isinstance(scale, (int, float)) else np.reshape(scale, ())), LEAST_SCALE
                )
            return value * value if self._power == 2 else value

        return program.derived((self._power, program.key(scale)), inverse)

    def _build(self, program: Builder) -> Register:
        score, factor = self._score(program)
        return program.step(self._map, score, self._parameters(program, factor))

    def _parameters(self, program: Builder, factor: Any) -> int:
        """Those of the map, of which the factor of the distance is the first."""
        return program.parameters(factor)


class Gaussian(_Stationary):
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

    _map = "gaussian"


RBF = SquaredExponential = Gaussian


class Laplacian(_Stationary):
    """The Laplacian kernel, of the L1 distance.

    .. math:: k(x, y) = \\exp\\Bigl(-\\sum_d \\frac{|x_d - y_d|}{\\ell_d}\\Bigr)

    Parameters
    ----------
    lengthscale : positive number, or array (D,)
        As for `Gaussian`. scikit-learn's ``gamma`` is ``1 / lengthscale``.

    Notes
    -----
    L1, as in scikit-learn and cuML; some libraries call the exponential of the Euclidean distance Laplacian, which here
    is ``Matern(nu=0.5)``. Its derivative where two coordinates are equal is taken as 0. The L1 distance is no matrix
    product: every coordinate of every pair is visited, for the gradient too.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.Laplacian(2.0)(np.array([[0.0, 0.0], [1.0, -1.0]])).round(4)
    array([[1.    , 0.3679],
           [0.3679, 1.    ]])
    """

    _distance = "absolute"
    _map = "laplacian"
    _power = 1


class Matern(_Stationary):
    """Matern kernels: as smooth as `nu` says.

    With :math:`t = \\sqrt{2 \\nu \\sum_d (x_d - y_d)^2 / \\ell_d^2}`,

    .. math:: k_{1/2} = e^{-t}, \\quad k_{3/2} = (1 + t) e^{-t}, \\quad k_{5/2} = (1 + t + t^2 / 3) e^{-t}

    Parameters
    ----------
    lengthscale : positive number, or array (D,)
        As for `Gaussian`.
    nu : {0.5, 1.5, 2.5}
        Sample paths of the Gaussian process are differentiable 0, 1, 2 times.

    Notes
    -----
    Strictly positive definite. Derivatives are taken through the squared distance, so they are right where two points
    coincide; there ``nu=0.5`` has a cusp, whose derivative is taken as 0.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0]])
    >>> [float(nf.kernels.Matern(nu=nu)(x)[0, 1].round(4)) for nu in (0.5, 1.5, 2.5)]
    [0.3679, 0.4834, 0.524]
    """

    def __init__(self, lengthscale: Any = 1.0, nu: float = 2.5) -> None:
        super().__init__(lengthscale)
        if isinstance(nu, bool) or nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"nu: expected 0.5, 1.5 or 2.5, got {nu!r}")
        self.nu = float(nu)

    @property
    def _map(self) -> str:  # type: ignore[override]
        return f"matern{round(2 * self.nu)}2"

    @property
    def _power(self) -> int:  # type: ignore[override]
        return 1 if self.nu == 0.5 else 2

    def __repr__(self) -> str:
        return f"Matern(lengthscale={self.lengthscale!r}, nu={self.nu!r})"


class RationalQuadratic(_Stationary):
    """The rational quadratic kernel: Gaussians of many length scales.

    .. math:: k(x, y) = \\Bigl(1 + \\sum_d \\frac{(x_d - y_d)^2}{2 \\alpha \\ell_d^2}\\Bigr)^{-\\alpha}

    Parameters
    ----------
    lengthscale : positive number, or array (D,)
        As for `Gaussian`, which is the limit of large alpha.
    alpha : positive number
        A tensor is differentiated. At 1, the default, a pair costs a division; else a logarithm and an exponential.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.RationalQuadratic(alpha=2.0)(np.array([[0.0], [2.0]])).round(4)
    array([[1.  , 0.25],
           [0.25, 1.  ]])
    """

    _map = "rational_quadratic"

    def __init__(self, lengthscale: Any = 1.0, alpha: Any = 1.0) -> None:
        super().__init__(lengthscale)
        self.alpha = scalar(alpha, "alpha", positive=True)

    def _parameters(self, program: Builder, factor: Any) -> int:
        # In the dtype that computes, the factor takes two thirds of the exponents and leaves the rest to the distances.
        program.positive(self.alpha, "alpha")
        most = float(np.finfo(compute_dtype(program.x)).max) ** (2 / 3)

        def cut() -> tuple[Any, Any]:
            if not is_torch(factor):
                return min(float(factor), most), math.log(max(float(factor) / most, 1.0))
            return factor.clamp(max=most), (factor / most).clamp(min=1).log()

        within, beyond = program.derived(("cut", program.key(factor)), cut)
        return program.parameters(within, self.alpha, beyond)

    def __repr__(self) -> str:
        return f"RationalQuadratic(lengthscale={self.lengthscale!r}, alpha={self.alpha!r})"


class Periodic(Kernel):
    """The periodic (exp-sine-squared) kernel, a product over dimensions.

    .. math:: k(x, y) = \\exp\\Bigl(-2 \\sum_d \\frac{\\sin^2(\\pi (x_d - y_d) / p)}{\\ell_d^2}\\Bigr)

    Parameters
    ----------
    lengthscale : positive number, or array (D,)
    period : positive number, or array (D,)
        Both: a tensor that requires a gradient is differentiated.

    Notes
    -----
    Libraries that put the distance ``|x - y|`` into one sine have no Mercer kernel for D > 1 (scikit-learn's
    ``ExpSineSquared`` has Gram matrices with clearly negative eigenvalues); the product over dimensions, here, is one
    (MacKay, Introduction to Gaussian processes, 1998; Duvenaud, thesis, 2014). It is the Gaussian kernel of the points
    bent into circles, ``(cos(2 pi x_d / p), sin(2 pi x_d / p)) / l_d``, and computed as such: at the rate of a matrix
    product, with D twice as large.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.Periodic(period=2.0)(np.array([[0.0], [1.0], [2.0]])).round(4)
    array([[1.    , 0.1353, 1.    ],
           [0.1353, 1.    , 0.1353],
           [1.    , 0.1353, 1.    ]])
    """

    def __init__(self, lengthscale: Any = 1.0, period: Any = 1.0) -> None:
        self.lengthscale = _check_lengthscale(lengthscale)
        try:
            self.period = _check_lengthscale(period)
        except ValueError as error:
            raise ValueError(str(error).replace("lengthscale", "period")) from None

    is_mercer = True

    def _diag(self, x: Array) -> Array:
        return 1 + _nothing(x)

    def _build(self, program: Builder) -> Register:
        for name, value in (("lengthscale", self.lengthscale), ("period", self.period)):
            program.positive(value, name)
            if _shape(value) not in ((), (1,), (program.d,)):
                raise ValueError(f"{name}: expected a number or shape ({program.d},) to match x, got {_shape(value)}")
        dtype = compute_dtype(program.x)
        center = common_center(program.x)
        unit, scale = program.units(self.lengthscale, "lengthscale")
        # In double precision up to the angle, which many turns would round.
        period = program.array(self.period, "period", "float64")

        def bend(x: Array) -> Array:
            angle = (cast(x, "float64") - center) * (2 * math.pi / period)
            if is_torch(x):
                import torch

                return torch.cat([cast(torch.cos(angle), dtype) / scale, cast(torch.sin(angle), dtype) / scale], -1)
            return np.concatenate([np.cos(angle).astype(dtype) / scale, np.sin(angle).astype(dtype) / scale], -1)

        key = ("circle", program.key(self.lengthscale), program.key(self.period))
        factor = program.derived(("circle", program.key(unit)), lambda: 1.0 / (unit * unit))
        return program.step("gaussian", program.score("sqeuclidean", key, bend), program.parameters(factor))

    def __repr__(self) -> str:
        return f"Periodic(lengthscale={self.lengthscale!r}, period={self.period!r})"


class Linear(Kernel):
    """The linear kernel.

    .. math:: k(x, y) = \\langle x, y \\rangle + b

    Parameters
    ----------
    bias : number
        b; a tensor is differentiated. Mercer if it is not negative.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.Linear(bias=1.0)(np.array([[1.0, 2.0], [3.0, 0.0]]))
    array([[ 6.,  4.],
           [ 4., 10.]])
    """

    def __init__(self, bias: Any = 0.0) -> None:
        self.bias = scalar(bias, "bias")

    @property
    def is_mercer(self) -> bool | None:
        return plain(self.bias) >= 0  # else k(0, 0) < 0

    def _build(self, program: Builder) -> Register:
        score = program.score("dot")
        if isinstance(self.bias, float) and self.bias == 0:
            return score
        return program.step("affine", score, program.parameters(1.0, self.bias))

    def _diag(self, x: Array) -> Array:
        return (x * x).sum(-1) + _number(self.bias, x)

    def __repr__(self) -> str:
        return f"Linear(bias={self.bias!r})"


class _DotProduct(Kernel):
    """A map of ``gamma <x, y> + coef0``."""

    def __init__(self, gamma: Any, coef0: Any) -> None:
        self.gamma = None if gamma is None else scalar(gamma, "gamma", positive=True)
        self.coef0 = scalar(coef0, "coef0")

    def _inner(self, program: Builder) -> Register:
        gamma = 1 / program.d if self.gamma is None else self.gamma
        program.positive(gamma, "gamma")
        return program.step("affine", program.score("dot"), program.parameters(gamma, self.coef0))

    def _inner_diag(self, x: Array) -> Array:
        gamma = 1 / x.shape[-1] if self.gamma is None else _number(self.gamma, x)
        return (x * x).sum(-1) * gamma + _number(self.coef0, x)


class Polynomial(_DotProduct):
    """The polynomial kernel.

    .. math:: k(x, y) = (\\gamma \\langle x, y \\rangle + c)^p

    Parameters
    ----------
    degree : int
        p >= 1. (A power that is no integer is not a Mercer kernel.)
    gamma : positive number, optional
        Default 1 / D. A tensor is differentiated.
    coef0 : number
        c; a tensor is differentiated. Mercer if it is not negative: else some power of <x, y> has a negative
        coefficient.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.Polynomial(degree=2, gamma=1.0)(np.array([[1.0], [2.0]]))
    array([[ 4.,  9.],
           [ 9., 25.]])
    """

    def __init__(self, degree: int = 3, gamma: Any = None, coef0: Any = 1.0) -> None:
        super().__init__(gamma, coef0)
        if isinstance(degree, bool) or not isinstance(degree, (int, np.integer)):
            raise TypeError(f"degree: expected a positive integer, got {degree!r}")
        if degree < 1:
            raise ValueError(f"degree: expected a positive integer, got {degree}")
        self.degree = int(degree)

    @property
    def is_mercer(self) -> bool | None:
        return plain(self.coef0) >= 0

    def _build(self, program: Builder) -> Register:
        inner = self._inner(program)
        return inner if self.degree == 1 else program.step("power", inner, self.degree)

    def _diag(self, x: Array) -> Array:
        return self._inner_diag(x) ** self.degree

    def __repr__(self) -> str:
        return f"Polynomial(degree={self.degree}, gamma={self.gamma!r}, coef0={self.coef0!r})"


class Sigmoid(_DotProduct):
    """The hyperbolic tangent of an inner product, which is not a Mercer kernel.

    .. math:: k(x, y) = \\tanh(\\gamma \\langle x, y \\rangle + c)

    Parameters
    ----------
    gamma : positive number, optional
        Default 1 / D. A tensor is differentiated.
    coef0 : number
        c; a tensor is differentiated.

    Notes
    -----
    Not positive semi-definite for any gamma > 0 and c: the power series of tanh has negative coefficients. Whether a
    Gram matrix is, is a matter of the points: ask `nearfar.psd_report`.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> k = nf.kernels.Sigmoid(gamma=1.0, coef0=0.0)(np.array([[1.0], [10.0]]))
    >>> c = np.array([1.0, -0.9])
    >>> k.round(4), float((c @ k @ c).round(6))
    (array([[0.7616, 1.    ],
           [1.    , 1.    ]]), -0.228406)
    """

    is_mercer = False

    def __init__(self, gamma: Any = None, coef0: Any = 1.0) -> None:
        super().__init__(gamma, coef0)

    def _build(self, program: Builder) -> Register:
        return program.step("tanh", self._inner(program))

    def _diag(self, x: Array) -> Array:
        inner = self._inner_diag(x)
        return inner.tanh() if is_torch(inner) else np.tanh(inner)

    def __repr__(self) -> str:
        return f"Sigmoid(gamma={self.gamma!r}, coef0={self.coef0!r})"


class Cosine(Kernel):
    """The cosine of the angle between two points; 0 for a zero row.

    .. math:: k(x, y) = \\frac{\\langle x, y \\rangle}{\\|x\\| \\|y\\|}

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.Cosine()(np.array([[1.0, 0.0], [1.0, 1.0]])).round(4)
    array([[1.    , 0.7071],
           [0.7071, 1.    ]])
    """

    is_mercer = True

    def _build(self, program: Builder) -> Register:
        return program.score("unit_dot")

    def _diag(self, x: Array) -> Array:
        return cast((x != 0).any(-1), compute_dtype(x)) + _nothing(x)

    def __repr__(self) -> str:
        return "Cosine()"
