"""``c^T K c`` in twice the precision of float64: the evidence of "not positive semi-definite"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def _two_product(a: Float64, b: Any) -> tuple[Float64, Float64]:
    """a b = product + error exactly (Dekker 1971, Veltkamp's splitting)."""

    def split(value: Any) -> tuple[Any, Any]:
        scaled = 134217729.0 * value
        upper = scaled - (scaled - value)
        return upper, value - upper

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def quadratic_form(matrix: NDArray[Any], c: Float64) -> float:
    """c^T K c of the stored entries, correct to 2^-53 relative and `evaluation_error` absolute (algorithm Dot2).

    The matrix is scaled by a power of two, which is exact, so that splitting does not overflow.
    """
    _, exponent = math.frexp(float(np.abs(matrix).max()))
    total, error = np.zeros(len(c)), np.zeros(len(c))
    for row, weight in zip(matrix, c, strict=True):
        if weight == 0.0:
            continue
        product, lost = _two_product(np.ldexp(row.astype(np.float64), -exponent), weight)
        sum_ = total + product
        part = sum_ - total
        error += lost + ((total - (sum_ - part)) + (product - part))  # Knuth's two-sum
        total = sum_
    product, lost = _two_product(total, c)
    return math.ldexp(math.fsum([*product, *lost, *(error * c)]), exponent)


def evaluation_error(n: int, norm: float) -> float:
    """Bound of what twice the precision of float64 leaves, gamma_n^2 |c|^T |K| |c|, four times over.

    Without it, tol=0 disproves the constant kernel: (sum of c)^2 is 0 for its eigenvectors, and the sum ends at -1e-29.
    """
    return n * n * 2.0**-104 * norm
