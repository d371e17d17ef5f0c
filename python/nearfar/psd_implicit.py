"""Is the Gram matrix of a kernel positive semi-definite, when it is too large to store?

A "no" needs one vector; a "yes" needs a lower bound of the smallest eigenvalue, which no Ritz value is. So three things
run, the cheapest first:

1. Principal Gram matrices of 64 points, and the diagonal that a pivoted Cholesky factorisation leaves: a negative
   eigenvalue or entry is a witness, re-evaluated in float64 and summed in twice its precision.
2. Lanczos on K: its smallest Ritz value sharpens the witness, its largest scales the noise floor.
3. Lanczos on ``E = K - L L^T``, in the same fused products, with the pivoted Cholesky factor L. Whatever L is,

       lambda_min(K) >= lambda_min(E),

   since L L^T is positive semi-definite; and E is small where K is nearly of low rank. Lanczos misses an end of the
   spectrum of E by e times its spread with a probability that is known (`lanczos.missed_part`), so the bound is
   ``e |E|``, not ``e |K|``: below the noise floor after 20 products where on K alone thousands would be needed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .implicit import ImplicitGram
from .lanczos import BlockLanczos, missed_part
from .quadratic_form import evaluation_error, quadratic_form

Float64 = NDArray[np.float64]

COLUMNS = 4  # random starts of each Lanczos process; all of them share one fused product
PASSES = 64  # fused products at most: minutes at 50000 points
EVERY = 4  # products between looks at the Ritz values
RANK = 512  # of the deflation
MISS = 1e-3  # probability that the stated bound is wrong


class Found(NamedTuple):
    """What the report holds, by its names."""

    verdict: str
    min_eigenvalue: float  # smallest Rayleigh quotient seen: never below the smallest eigenvalue
    error_bound: float  # which is not below min_eigenvalue - error_bound, but for miss_probability
    max_eigenvalue: float
    noise_floor: float
    rank: int
    witness: Any
    witness_value: float | None
    asymmetry: float
    method: str
    matvecs: int
    miss_probability: float


class _Witness(NamedTuple):
    value: float  # c^T K c of entries in float64
    error: float  # what their round-off can be
    support: NDArray[np.int64]
    vector: Float64
    high: float  # largest eigenvalue seen beside it


def judge(
    gram: ImplicitGram, noise: float, noise64: float, tol: float | None, seed: int, sub: tuple[int, int]
) -> Found:
    """The verdict. `noise` times the largest eigenvalue is the floor where no `tol` is given; `sub` is how many
    principal Gram matrices of how many points.
    """
    from .low_rank import greedy

    random = np.random.default_rng(seed)
    double = gram.double()
    best = _subsample(double, random, noise64, *sub)
    asymmetry = _asymmetry(gram, random)
    if tol is not None and best.value < -tol - best.error:
        return _disproved(best, gram.n, tol, best.high, asymmetry, 0)
    deflation = greedy(gram, min(RANK, gram.n // 8), 1e-7)
    if deflation.indefinite:
        best = min(best, _schur_witness(double, deflation, noise64), key=lambda witness: witness.value)
    factor = deflation.factor
    passes = min(PASSES, gram.n // COLUMNS - 1)
    whole, rest = (BlockLanczos(random.standard_normal((gram.n, COLUMNS)), passes) for _ in range(2))
    low = bound = math.inf
    high = floor = 0.0
    rank = 0
    for done in range(1, passes + 1):
        product = gram.matmul(np.concatenate([whole.block, rest.block], 1)).astype(np.float64)
        whole.extend(product[:, :COLUMNS])
        rest.extend(product[:, COLUMNS:] - factor.T @ (factor @ rest.block.astype(gram.dtype)))
        if done % EVERY and done < passes:
            continue
        values, errors, coefficients = whole.ritz()
        left = rest.ritz()[0]
        low, high = float(values[0]), float(values[-1])
        norm = max(high, -low)
        floor = noise * norm if tol is None else tol
        rank = int(np.count_nonzero(values > floor))
        matvecs = 2 * COLUMNS * done
        if best.value < -1.05 * floor - best.error and errors[-1] <= 0.01 * norm:
            return _disproved(best, gram.n, floor, high, asymmetry, matvecs)._replace(rank=rank)
        if low < -2 * floor and (errors[0] <= -0.05 * low or done == passes):
            witness = _ritz_witness(double, whole.vectors(coefficients[:, :1])[:, 0], noise64 * norm)
            if witness.value < -floor - witness.error:
                found = _disproved(witness, gram.n, floor, high, asymmetry, matvecs + 1, "lanczos")
                error = _bound(low, left, values, gram.n, done) + noise * norm
                return found._replace(error_bound=error, rank=rank, miss_probability=MISS)
        bound = _bound(low, left, values, gram.n, done)
        known = bool(gram.kernel.is_mercer) and low >= -floor
        # A theorem needs no more products where those that are left would not decide either.
        hopeless = done >= passes // 4 and low - _bound(low, left, values, gram.n, passes) < -2 * floor
        if low - bound >= -floor or (known and hopeless):
            break
    if low - bound < -floor:
        verdict, method = ("psd_within_noise", "lanczos, structure") if known else ("undecided", "lanczos")
        return Found(
            verdict, low, bound + noise * norm, high, floor, rank, None, None, asymmetry, method, matvecs, MISS
        )
    verdict = "psd" if low - bound >= 0 else "psd_within_noise"
    return Found(verdict, low, bound + noise * norm, high, floor, rank, None, None, asymmetry, "lanczos", matvecs, MISS)


def _bound(low: float, left: Float64, values: Float64, n: int, passes: int) -> float:
    """How far below `low` the smallest eigenvalue of K can be, from what is left after deflation or from K itself."""
    part = missed_part(n, passes, COLUMNS, MISS / 4)  # four ends of two spectra
    deflated = left[0] - part * (left[-1] - left[0])
    plain = values[0] - part * (values[-1] - values[0])
    return max(0.0, low - float(max(deflated, plain)))


def _disproved(
    best: _Witness, n: int, floor: float, high: float, asymmetry: float, matvecs: int, method: str = "subsample"
) -> Found:
    witness = np.zeros(n)
    witness[best.support] = best.vector
    infinite = math.inf if method == "subsample" else 0.0
    return Found("not_psd", best.value, infinite, high, floor, 0, witness, best.value, asymmetry, method, matvecs, 0.0)


# ---- witnesses -------------------------------------------------------------------------------------------------------


def _subsample(double: ImplicitGram, random: Any, noise64: float, count: int, m: int) -> _Witness:
    """The most negative of some principal Gram matrices, of random points or of one point and those most similar."""
    n = double.n
    picks = [random.choice(n, m, replace=False) for _ in range(count // 2)]
    rows = np.abs(double.block(random.integers(n, size=count - len(picks))))
    picks.extend(np.argpartition(row, n - m)[n - m :] for row in rows)
    found = []
    for pick in picks:
        matrix = double.block(pick, pick)
        values, vectors = np.linalg.eigh(matrix)
        found.append((float(values[0]), pick, matrix, vectors[:, 0], float(values[-1])))
    _, pick, matrix, vector, _ = min(found, key=lambda entry: entry[0])
    return _witness(matrix, vector, pick, noise64, max(entry[-1] for entry in found))


def _schur_witness(double: ImplicitGram, deflation: Any, noise64: float) -> _Witness:
    """``c = e_j - K_pp^-1 K_pj`` gives ``c^T K c`` = the j-th diagonal entry that elimination of the pivots p left."""
    j = int(deflation.residual.argmin())
    support = np.append(deflation.pivots, j)
    corner = deflation.factor[:, deflation.pivots].astype(np.float64)
    vector = np.append(-np.linalg.solve(corner, deflation.factor[:, j].astype(np.float64)), 1.0)
    matrix = double.block(support, support)
    return _witness(matrix, vector / np.linalg.norm(vector), support, noise64, float(matrix.diagonal().max()))


def _witness(matrix: Float64, vector: Float64, support: Any, noise64: float, high: float) -> _Witness:
    norm = float(np.abs(matrix).sum(1).max())
    error = noise64 * norm + evaluation_error(len(matrix), norm)
    return _Witness(quadratic_form(matrix, vector), error, np.asarray(support), vector, high)


def _ritz_witness(double: ImplicitGram, vector: Float64, error: float) -> _Witness:
    """A Ritz vector, its quotient evaluated again by a product in float64."""
    vector = vector / np.linalg.norm(vector)
    value = math.fsum(vector * double.matmul(vector))
    return _Witness(value, error, np.arange(double.n), vector, math.nan)


def _asymmetry(gram: ImplicitGram, random: Any) -> float:
    """max |K_ij - K_ji| where the two are computed apart, on a sample."""
    rows, columns = random.integers(gram.n, size=(2, 256))
    return float(np.abs(gram.block(rows, columns) - gram.block(columns, rows).T).max())
