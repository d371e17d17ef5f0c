"""``c^T K c`` in twice the precision of float64: the evidence of "not positive semi-definite"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_BLOCK = 64  # rows at a time, for NumPy's calls to be few and what they make to stay in the cache


def _two_product(a: Float64, b: Any) -> tuple[Float64, Float64]:
    """a b = product + error exactly (Dekker 1971, Veltkamp's splitting)."""

    def split(value: Any) -> tuple[Any, Any]:
        scaled = 134217729.0 * value
        upper = scaled - (scaled - value)
        return upper, value - upper

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _sum_of_rows(rows: Float64) -> tuple[Float64, Float64]:
    """The sum and its error (Knuth's two-sum), the last half onto the first until one is left; overwrites them."""
    error = np.zeros(rows.shape[1])
    while (half := len(rows) // 2) > 0:
        a, b = rows[:half], rows[-half:]
        total = a + b
        part = total - a
        error += ((a - (total - part)) + (b - part)).sum(0)
        rows[:half] = total
        rows = rows[:-half]
    return rows[0], error


def quadratic_form(matrix: NDArray[Any], c: Float64) -> float:
    """c^T K c of the stored entries, correct to 2^-53 relative and `evaluation_error` absolute (algorithm Dot2).

    The matrix is scaled by a power of two, which is exact, so that splitting does not overflow.
    """
    _, exponent = math.frexp(float(np.abs(matrix).max()))
    total, error = np.zeros(len(c)), np.zeros(len(c))
    for begin in range(0, len(c), _BLOCK):
        rows = np.ldexp(matrix[begin : begin + _BLOCK].astype(np.float64), -exponent)
        product, lost = _two_product(rows, c[begin : begin + _BLOCK, None])
        total, more = _sum_of_rows(np.vstack([total, product]))
        error += lost.sum(0) + more
    product, lost = _two_product(total, c)
    return math.ldexp(math.fsum([*product, *lost, *(error * c)]), exponent)


def evaluation_error(n: int, norm: float) -> float:
    """Bound of what twice the precision of float64 leaves, gamma_n^2 |c|^T |K| |c|, four times over.

    Without it, tol=0 disproves the constant kernel: (sum of c)^2 is 0 for its eigenvectors, and the sum ends at -1e-29.
    """
    return n * n * 2.0**-104 * norm
