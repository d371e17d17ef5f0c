"""Block Lanczos with full re-orthogonalisation: extreme eigenpairs of a symmetric operator from products with blocks.

After p products with blocks of b columns the basis spans ``{A^i V : i < p}``, which contains the Krylov space of every
single column, so b independent random starts are b independent tries. Products of a fused kernel cost little more with
b columns than with one. The projection T is block tridiagonal; its eigenpairs (theta, s) give Ritz pairs with

    || A z - theta z || = || B_p s_last ||,    z = Q s,

so some eigenvalue of A lies that close to theta, and the smallest theta is never below the smallest eigenvalue.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


class BlockLanczos:
    """Feed it ``A @ self.block`` by `extend`, up to `passes` times.

    Re-orthogonalisation against the whole basis, twice (Kahan's "twice is enough"), keeps the basis orthonormal to
    working precision, so no eigenvalue appears twice and none is a ghost. Memory n b (passes + 1) doubles.
    """

    def __init__(self, start: Float64, passes: int) -> None:
        n, b = start.shape
        self.b, self.passes, self.done = b, passes, 0
        self._basis = np.empty((n, b * (passes + 1)))
        self._basis[:, :b] = np.linalg.qr(start)[0]
        self._projection = np.zeros((b * passes, b * passes))
        self._last = np.zeros((b, b))

    @property
    def block(self) -> Float64:
        """What the next product is wanted of, (n, b)."""
        return self._basis[:, self.done * self.b : (self.done + 1) * self.b]

    def extend(self, product: Float64) -> None:
        """One step: `product` is ``A @ block``."""
        b, begin = self.b, self.done * self.b
        basis = self._basis[:, : begin + b]
        own = self.block.T @ product
        self._projection[begin : begin + b, begin : begin + b] = (own + own.T) / 2
        rest = product - basis @ (basis.T @ product)
        # Columns that depend on others leave round-off, which is not orthogonal to the basis: hence once more.
        following = np.linalg.qr(rest - basis @ (basis.T @ rest))[0]
        following = np.linalg.qr(following - basis @ (basis.T @ following))[0]
        self._last = following.T @ rest
        self._basis[:, begin + b : begin + 2 * b] = following
        self.done += 1
        if self.done < self.passes:
            self._projection[begin + b : begin + 2 * b, begin : begin + b] = self._last
            self._projection[begin : begin + b, begin + b : begin + 2 * b] = self._last.T

    def ritz(self) -> tuple[Float64, Float64, Float64]:
        """Ritz values, ascending; the norms of their residuals; coefficients of their vectors in the basis."""
        size = self.done * self.b
        values, coefficients = np.linalg.eigh(self._projection[:size, :size])
        return values, np.linalg.norm(self._last @ coefficients[-self.b :], axis=0), coefficients

    def vectors(self, coefficients: Float64) -> Float64:
        """Ritz vectors from columns of coefficients."""
        return np.asarray(self._basis[:, : self.done * self.b] @ coefficients)


def missed_part(n: int, passes: int, blocks: int, probability: float) -> float:
    """The e for which all of `blocks` random starts miss an extreme eigenvalue by more than ``e (spread of spectrum)``
    with at most this probability; infinite before it says anything.

    ``P(miss) <= (1.648 sqrt(n) exp(-sqrt(e) (2 passes - 1)))^blocks`` (Kuczynski and Wozniakowski, Estimating the
    largest eigenvalue by the power and Lanczos algorithms with a random start, 1992, theorem 3.2). The spread itself is
    known to the same e at either end.
    """
    root = (math.log(1.648 * math.sqrt(n)) - math.log(probability) / blocks) / (2 * passes - 1)
    part = root * root
    return part / (1 - 2 * part) if part < 0.5 else math.inf
