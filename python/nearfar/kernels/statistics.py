"""Statistics of Gram matrices that never store one: MMD, HSIC, CKA.

MMD is a quadratic form, ``w^T K w`` with weights +1/n on one sample and -1/m on the other: one fused product, and many
relabellings of the points are many columns of it.

HSIC and CKA need ``sum_ij K'_ij L'_ij`` of two centred Gram matrices, which is no product with a vector: one fused pass
over pairs (csrc/cpu/ops/hsic.cpp, csrc/cuda/ops/hsic.cu), and one more for gradients. For kernels that are no program,
square tiles of both matrices are made, centred and multiplied, on and above the diagonal only: with the row sums (one
product with ones) the centred entries are ``K'_ij = K_ij - a_i - a_j``. Centring before multiplying keeps the digits
that ``tr(K L) - 2/n ... + ...`` of nearly constant Gram matrices cancels. Linear kernels need no pairs where the D x D
cross products are smaller.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import operations
from ..arrays import (
    Array,
    autograd,
    cast,
    check_matrix,
    check_points,
    check_seed,
    common_center,
    compute_dtype,
    concatenate,
    integer,
    is_torch,
    matrix_product,
    of_kind,
    scalar,
    to_numpy,
)
from .base import Kernel, checkpointed
from .families import Linear
from .named import resolve

# Rows and columns of a tile where there is no fused pass: two of 1 MB in float32 stay in the second-level cache, and a
# kernel call costs little.
TILE = 512
# Relabellings in one fused product: at 128 columns the kernel is a small part of it, and memory stays O(128 N).
COLUMNS = 128


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


def mmd(x: Array, y: Array, kernel: Any = "gaussian", unbiased: bool = True) -> Array:
    r"""The squared maximum mean discrepancy of two samples.

    .. math:: \mathrm{MMD}^2 = \frac{1}{n (n - 1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m (m - 1)} \sum_{i \ne j}
              k(y_i, y_j) - \frac{2}{n m} \sum_{ij} k(x_i, y_j)

    Parameters
    ----------
    x, y : array (N, D), (M, D)
        Of one kind and dtype.
    kernel : kernel or str
        Of `nearfar.kernels`, or a name of `nearfar.gram` with its default parameters.
    unbiased : bool
        True: the U-statistic above, which may be negative and needs two points of each. False: the V-statistic, with
        the diagonals and ``1 / n^2, 1 / m^2``; not negative for a Mercer kernel, up to round-off.

    Returns
    -------
    0-d array
        MMD squared, never its root: of a negative estimate it would be NaN. Differentiable for tensors, where
        `kernel.matmul` is. NaN where a point is.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or kinds that do not match; fewer points than the estimator needs.

    Notes
    -----
    One fused product with two columns; memory O((N + M) D). The weights +m and -n are integers, exact in float32, and
    the sum over pairs is accumulated with its signs, so that nothing large cancels. Gretton, Borgwardt, Rasch,
    Scholkopf and Smola, A kernel two-sample test, 2012 (equations 3 and 5).

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    >>> nf.mmd(x, y, nf.kernels.Linear(), unbiased=False)  # the squared distance of the means
    array(0.25)
    """
    z, n, m = _pooled(x, y, unbiased)
    groups = np.arange(n + m)[:, None] < n
    value = _discrepancies(resolve(kernel, z), z, groups, n, unbiased)[0]
    return _scalar(value, z)


@dataclass(frozen=True)
class MMDTest:
    """What `mmd_permutation_test` found.

    Attributes
    ----------
    statistic : float
        MMD squared.
    p_value : float
        ``(1 + #{null >= statistic}) / (1 + permutations)``.
    null : array (permutations,)
        The statistic of random relabellings of the pooled points, float64.
    """

    statistic: float
    p_value: float
    null: NDArray[np.float64] = field(repr=False)


def mmd_permutation_test(
    x: Array, y: Array, kernel: Any = "gaussian", *, permutations: int = 1000, unbiased: bool = True, seed: int = 0
) -> MMDTest:
    r"""Whether two samples come from one law: `mmd` against its values under random relabelling.

    Parameters
    ----------
    x, y : array (N, D), (M, D)
    kernel : kernel or str
        As for `mmd`. Choose it without regard to which point is whose, or the level is wrong.
    permutations : int
        At least 1.
    unbiased : bool
        As for `mmd`.
    seed : int
        Of the relabellings.

    Returns
    -------
    MMDTest
        Numbers; no gradient.

    Notes
    -----
    Exact level under exchangeability, whatever the number of permutations (Phipson and Smyth, 2010). A relabelling is
    one more column of the fused product, 128 at a time: a thousand of them cost about as much as eight evaluations of
    the kernel with 128 columns, and memory O(128 (N + M)).

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x, y = np.random.default_rng(0).standard_normal((2, 40, 3))
    >>> nf.mmd_permutation_test(x, y + 1, permutations=200).p_value < 0.01
    True
    """
    count = integer(permutations, "permutations")
    if count < 1:
        raise ValueError(f"permutations: expected at least 1, got {count}")
    z, n, m = _pooled(x, y, unbiased)
    z = z.detach() if is_torch(z) else z
    resolved = resolve(kernel, z)
    random = np.random.default_rng(check_seed(seed))
    values: list[NDArray[np.float64]] = []
    for begin in range(0, count + 1, COLUMNS):
        groups = np.zeros((n + m, min(COLUMNS, count + 1 - begin)), bool)
        for column in groups.T:
            column[random.permutation(n + m)[:n]] = True
        if begin == 0:
            groups[:, 0] = np.arange(n + m) < n
        found = _discrepancies(resolved, z, groups, n, unbiased)
        values.append(to_numpy(found))
    statistic, null = values[0][0], np.concatenate(values)[1:]
    # Relabellings that repeat the observed one differ from it by round-off, and are as extreme.
    slack = 8 * float(np.finfo(compute_dtype(z)).eps) * float(np.abs(null).max())
    p_value = (1 + np.count_nonzero(null >= statistic - slack)) / (1 + count)
    return MMDTest(float(statistic), math.nan if math.isnan(statistic) else float(p_value), null)


def _pooled(x: Array, y: Array, unbiased: bool) -> tuple[Array, int, int]:
    """Both samples as one, in the dtype that computes."""
    check_points(x=x, y=y)
    check_matrix(x, "x")
    check_matrix(y, "y")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y: expected {x.shape[1]} columns to match x, got shape {tuple(y.shape)}")
    least = 2 if unbiased else 1
    for name, points in (("x", x), ("y", y)):
        if points.shape[0] < least:
            raise ValueError(f"{name}: expected at least {least} rows with unbiased={unbiased}, got {points.shape[0]}")
    dtype = compute_dtype(x)
    return concatenate([cast(x, dtype), cast(y, dtype)]), int(x.shape[0]), int(y.shape[0])


def _discrepancies(kernel: Kernel, z: Array, groups: NDArray[np.bool_], n: int, unbiased: bool) -> Array:
    """The statistic of every column of `groups`, which says which n points are in the first sample; float64.

    T_u = T_b + (S_xx / n^2 - tr_x / n) / (n - 1) + the same of y: the V-statistic, and small corrections. All are sums
    over points, of K w, of K 1 and of the diagonal, with K (w + n 1) / (n + m) the sum over the first sample.
    """
    m = len(groups) - n
    first = groups.astype(np.float64)  # in double also where the compiler traces it
    second = 1.0 - first
    weights = first * m - second * n
    share = weights / float(n * m) ** 2
    if not unbiased:
        return (_like(share, z, "float64") * cast(kernel.matmul(z, None, _like(weights, z)), "float64")).sum(0)
    columns = np.concatenate([weights, np.ones((len(groups), 1))], 1)
    product = cast(kernel.matmul(z, None, _like(columns, z)), "float64")
    share += (first / (n * n * (n - 1)) - second / (m * m * (m - 1))) / (n + m)
    pairs = first / (n * (n - 1)) + second / (m * (m - 1))
    others = product[:, -1:] / (n + m) - cast(kernel._diag(z), "float64")[:, None]
    return (_like(share, z, "float64") * product[:, :-1] + _like(pairs, z, "float64") * others).sum(0)


def _like(values: NDArray[Any], z: Array, dtype: str | None = None) -> Array:
    """New NumPy values as an array of the kind of z, in the dtype that computes."""
    values = np.asarray(values, dtype or compute_dtype(z))
    if is_torch(z):  # without a copy, whose memory order the compiler does not trace
        return sys.modules["torch"].as_tensor(values, device=z.device)
    return of_kind(values, z)


def _scalar(value: Array, x: Array) -> Array:
    """A 0-d array in the dtype that computes."""
    return cast(value, compute_dtype(x)) if is_torch(x) else scalar(x, value, compute_dtype(x))


# ---- independence and alignment --------------------------------------------------------------------------------------


def hsic(x: Array, y: Array, kernel_x: Any = "gaussian", kernel_y: Any = "gaussian", unbiased: bool = False) -> Array:
    r"""The Hilbert-Schmidt independence criterion of paired samples.

    .. math:: \mathrm{HSIC}_b = \frac{\operatorname{tr}(K H L H)}{(n - 1)^2}, \quad
              \mathrm{HSIC}_u = \frac{1}{n (n - 3)} \Bigl[\operatorname{tr}(\tilde K \tilde L)
              + \frac{1^T \tilde K 1 \, 1^T \tilde L 1}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^T \tilde K \tilde L 1\Bigr]

    where ``H = I - 1 1^T / n``, and a tilde sets the diagonal to zero.

    Parameters
    ----------
    x, y : array (N, D), (N, E)
        Row i of one belongs to row i of the other.
    kernel_x, kernel_y : kernel or str
        Of `nearfar.kernels`, or a name of `nearfar.gram` with its default parameters.
    unbiased : bool
        False: HSIC_b, at least 2 rows. True: HSIC_u, which may be negative, at least 4 rows.

    Returns
    -------
    0-d array
        Differentiable for tensors, where the kernels are: matrices are computed again in the backward pass, not stored
        (for `Custom` kernels they are under ``torch.func``: O(N^2) memory).

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or kinds that do not match; too few rows.

    Notes
    -----
    Memory O(N (D + E)), time that of both Gram matrices; for two linear kernels with fewer columns than rows, of their
    cross products, O(N D E). HSIC_b: Gretton, Bousquet, Smola and Scholkopf, 2005; others divide by n^2. HSIC_u: Song,
    Smola, Gretton, Bedo and Borgwardt, Feature selection via dependence maximization, 2012.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> nf.hsic(x, x, "linear", "linear")  # the squared variance
    array(1.)
    """
    kernel_x, kernel_y = resolve(kernel_x, x, "kernel_x"), resolve(kernel_y, y, "kernel_y")
    x, y = _paired(x, y, unbiased)
    return _scalar(_centred_sums(x, y, kernel_x, kernel_y, unbiased, ("xy",))[0] / _norm(int(x.shape[0]), unbiased), x)


def cka(x: Array, y: Array, kernel: Any = "linear", unbiased: bool = False) -> Array:
    r"""Centred kernel alignment: how similar two representations of the same things are.

    .. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K) \, \mathrm{HSIC}(L, L)}}

    Parameters
    ----------
    x, y : array (N, D), (N, E)
        Row i of both is the same thing.
    kernel : kernel, str, or a pair of these
        For x and y. Radial kernels need a length scale that suits both, or one each: the pair.
    unbiased : bool
        Which `hsic`. The biased CKA of independent representations grows with D / N towards 1; the unbiased one is
        centred at 0 and may be negative.

    Returns
    -------
    0-d array
        1 for equal representations; at most 1. Unchanged by shifts, rotations and scaling with the linear kernel. 0
        where all rows of one representation are equal. Differentiable, as `hsic`.

    Raises
    ------
    ValueError, TypeError
        As `hsic`.

    Notes
    -----
    Kornblith, Norouzi, Lee and Hinton, Similarity of neural network representations revisited, 2019; unbiased: Nguyen,
    Raghu and Kornblith, 2021. Memory and time as `hsic`, one pass serving all three sums.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.random.default_rng(0).standard_normal((50, 4))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    >>> round(float(nf.cka(x, 3 * x @ rotation + 1)), 6)
    1.0
    """
    pair = kernel if isinstance(kernel, (tuple, list)) else (kernel, kernel)
    if len(pair) != 2:
        raise ValueError(f"kernel: expected one or a pair, got {len(pair)}")
    kernel_x, kernel_y = resolve(pair[0], x), resolve(pair[1], y)
    x, y = _paired(x, y, unbiased)
    xy, xx, yy = _centred_sums(x, y, kernel_x, kernel_y, unbiased, ("xy", "xx", "yy"))
    where = sys.modules["torch"].where if is_torch(xx) else np.where
    constant = (xx == 0) | (yy == 0)
    xx, yy = (where(constant, 1.0, z) for z in (xx, yy))
    return _scalar(where(constant, xy * 0, xy / (xx**0.5 * yy**0.5)), x)


def _paired(x: Array, y: Array, unbiased: bool) -> tuple[Array, Array]:
    check_points(x=x, y=y)
    check_matrix(x, "x")
    check_matrix(y, "y")
    n, least = int(x.shape[0]), 4 if unbiased else 2
    if y.shape[0] != n:
        raise ValueError(f"y: expected {n} rows to match x, got shape {tuple(y.shape)}")
    if n < least:
        raise ValueError(f"x: expected at least {least} rows with unbiased={unbiased}, got {n}")
    return cast(x, compute_dtype(x)), cast(y, compute_dtype(y))


def _norm(n: int, unbiased: bool) -> float:
    return float(n * (n - 3)) if unbiased else float(n - 1) ** 2


def _centred_sums(
    x: Array, y: Array, kernel_x: Kernel, kernel_y: Kernel, unbiased: bool, wanted: tuple[str, ...]
) -> list[Array]:
    """sum_ij K'_ij L'_ij for the pairs of kernels that are wanted ("xy", "xx", "yy"), float64."""
    # The centred Gram matrix of a linear kernel knows no offset, which would round its entries.
    x, y = (_centred(z) if type(kernel) is Linear else z for z, kernel in ((x, kernel_x), (y, kernel_y)))
    if type(kernel_x) is type(kernel_y) is Linear and max(x.shape[1], y.shape[1]) <= x.shape[0]:
        sides = {"x": x, "y": y}
        return [_linear_sum(sides[pair[0]], sides[pair[1]], unbiased) for pair in wanted]
    if kernel_x._compiles and kernel_y._compiles:
        values = _fused_sums(x, y, kernel_x, kernel_y, unbiased)
        return [values[("xy", "xx", "yy").index(pair)] for pair in wanted]
    return _tiled_sums(x, y, kernel_x, kernel_y, unbiased, wanted)


def _fused_sums(x: Array, y: Array, kernel_x: Kernel, kernel_y: Kernel, unbiased: bool) -> Array:
    x, _, parameters_x, program_x = kernel_x._program(x, None)
    y, _, parameters_y, program_y = kernel_y._program(y, None)
    arrays, config = (x, y, parameters_x, parameters_y), (program_x, program_y, not unbiased)
    if is_torch(x):
        return autograd().apply("hsic", arrays, config)
    return operations.hsic(*arrays, *config)


def _centred(x: Array) -> Array:
    """x without its mean; without a rounded one first, or an offset would round into the second."""
    x = x - common_center(x)
    return x - (x.sum(0) / x.shape[0])


def _linear_sum(x: Array, y: Array, unbiased: bool) -> Array:
    """The sum for linear kernels of centred points: ``|X^T Y|_F^2``, without the diagonal where unbiased.

    The rows of ``X X^T`` sum to 0, so those of the matrix with a zero diagonal sum to ``-|x_i|^2``.
    """
    total = (cast(matrix_product(x.T, y), "float64") ** 2).sum()
    if not unbiased:
        return total
    n = x.shape[0]
    a, b = (cast((z * z).sum(1), "float64") for z in (x, y))
    return total - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))


def _offsets(kernel: Kernel, x: Array, unbiased: bool) -> Array:
    """a_i such that K_ij - a_i - a_j is the centred entry: doubly, or U-centred where the diagonal is left out."""
    n = x.shape[0]
    sums = cast(kernel.matmul(x, None, _like(np.ones(n), x)), "float64")
    if unbiased:
        sums = sums - cast(kernel.diag(x), "float64")
        offsets = sums / (n - 2) - sums.sum() / (2 * (n - 1) * (n - 2))
    else:
        offsets = sums / n - sums.sum() / (2 * n**2)
    return cast(offsets, compute_dtype(x))


def _tiled_sums(
    x: Array, y: Array, kernel_x: Kernel, kernel_y: Kernel, unbiased: bool, wanted: tuple[str, ...]
) -> list[Array]:
    n = x.shape[0]
    pieces = {
        name: [(z[i : i + TILE], a[i : i + TILE]) for i in range(0, n, TILE)]
        for name, z, a in (("x", x, _offsets(kernel_x, x, unbiased)), ("y", y, _offsets(kernel_y, y, unbiased)))
    }
    kernels = {"x": kernel_x, "y": kernel_y}

    def products(same: bool, *points: Array) -> tuple[Array, ...]:
        """The sums of one tile; points and offsets of its rows and columns, for x and for y."""
        tiles = {}
        for side, (rows, a, columns, b) in {"x": points[:4], "y": points[4:]}.items():
            tile = kernels[side](rows, None if same else columns) - (a[:, None] + b)
            tiles[side] = _without_diagonal(tile) if unbiased and same else tile
        return tuple(_inner(tiles[pair[0]], tiles[pair[1]]) for pair in wanted)

    totals: list[Array] = [0.0 for _ in wanted]
    evaluate = checkpointed(products, x, y, *pieces["x"][0][1:], *pieces["y"][0][1:])
    for i in range(len(pieces["x"])):
        for j in range(i, len(pieces["x"])):
            parts = evaluate(i == j, *pieces["x"][i], *pieces["x"][j], *pieces["y"][i], *pieces["y"][j])
            totals = [t + (1 if i == j else 2) * part for t, part in zip(totals, parts, strict=True)]
    return totals


def _without_diagonal(tile: Array) -> Array:
    """The tile with a zero diagonal (a NaN stays)."""
    keep = 1 - np.eye(tile.shape[0])
    return tile * _like(keep, tile)


def _inner(a: Array, b: Array) -> Array:
    """sum_ij a_ij b_ij: rows in the dtype of the tiles, their sum in float64."""
    rows = (a * b).sum(1) if is_torch(a) else np.einsum("ij,ij->i", a, b)
    return cast(rows, "float64").sum()
