"""The chi-squared kernels of histograms."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array, is_at_hand, is_torch
from .base import Kernel, scalar
from .program import Builder, Register


class _OfHistograms(Kernel):
    """A map of ``sum_d (x_d - y_d)^2 / (x_d + y_d)`` for points that are not negative."""

    def _score(self, program: Builder) -> Register:
        for name, points in (("x", program.x), ("y", program.y)):
            if points is not None and is_at_hand(points) and (points < 0).any():
                raise ValueError(f"{name}: expected no negative numbers with a chi-squared kernel")
        return program.score("chi_squared")

    def _diag(self, x: Array) -> Array:
        return (x * 0).sum(-1)  # a NaN stays


class AdditiveChiSquared(_OfHistograms):
    """The additive chi-squared kernel of histograms.

    .. math:: k(x, y) = -\\sum_d \\frac{(x_d - y_d)^2}{x_d + y_d}

    Points must not be negative; 0 / 0 is 0, and so is its derivative.

    Raises
    ------
    ValueError
        Negative numbers among the points (not looked for on a GPU or while tracing).

    Notes
    -----
    Not Mercer: positive semi-definite on vectors that sum to zero only, as is ``-|x - y|^2``. scikit-learn's
    ``additive_chi2_kernel``.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.AdditiveChiSquared()(np.array([[1.0, 0.0], [0.0, 3.0]]))
    array([[-0., -4.],
           [-4., -0.]])
    """

    @property
    def is_mercer(self) -> bool | None:
        return False

    def _build(self, program: Builder) -> Register:
        return program.step("scale", self._score(program), program.parameters(-1.0))

    def __repr__(self) -> str:
        return "AdditiveChiSquared()"


class ChiSquared(_OfHistograms):
    """The exponential chi-squared kernel of histograms.

    .. math:: k(x, y) = \\exp\\Bigl(-\\gamma \\sum_d \\frac{(x_d - y_d)^2}{x_d + y_d}\\Bigr)

    Points must not be negative; 0 / 0 is 0, and so is its derivative.

    Parameters
    ----------
    gamma : positive number
        A tensor is differentiated.

    Raises
    ------
    ValueError
        `gamma` that is not positive; negative numbers among the points (not looked for on a GPU or while tracing).

    Notes
    -----
    No matrix product: every coordinate of every pair costs a division, and two more for a gradient. Mercer; Zhang,
    Marszalek, Lazebnik and Schmid, Local features and kernels for classification of texture and object categories,
    2007, and Vedaldi and Zisserman, Efficient additive kernels via explicit feature maps, 2012. scikit-learn's
    ``chi2_kernel``.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kernels.ChiSquared(gamma=0.5)(np.array([[1.0, 0.0], [0.0, 3.0]])).round(4)
    array([[1.    , 0.1353],
           [0.1353, 1.    ]])
    """

    def __init__(self, gamma: Any = 1.0) -> None:
        self.gamma = scalar(gamma, "gamma", positive=True)

    @property
    def is_mercer(self) -> bool | None:
        return True

    def _build(self, program: Builder) -> Register:
        program.positive(self.gamma, "gamma")
        return program.step("laplacian", self._score(program), program.parameters(self.gamma))

    def _diag(self, x: Array) -> Array:
        zero = super()._diag(x)
        return zero.exp() if is_torch(zero) else np.exp(zero)

    def __repr__(self) -> str:
        return f"ChiSquared(gamma={self.gamma!r})"
