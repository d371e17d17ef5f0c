"""Boxes around near columns must not change a bit of any search in few dimensions, whatever they rule out."""

import numpy as np
import pytest
from generators import rng
from references import same_bits

import nearfar as nf
from nearfar import operations

pytestmark = pytest.mark.isa

BY_DIFFERENCE = ("sqeuclidean", "cityblock", "chebyshev", "minkowski")


def uniform(n, d, seed):
    return rng(n, d, seed).random((n, d))


def grid(n, d, seed):
    return rng(n, d, seed).integers(0, 4, (n, d)).astype(float)


def clustered(n, d, seed):
    centres = 10 * rng(d).standard_normal((9, d))
    return centres[rng(n, seed).integers(0, 9, n)] + 0.01 * rng(n, d, seed).standard_normal((n, d))


def equal(n, d, seed):
    return np.full((n, d), 0.3)


def constant(n, d, seed):
    return np.concatenate([uniform(n, d, seed)[:, 1:], np.full((n, 1), 2.0)], axis=1)


def far(n, d, seed):
    """What all have in common is ten thousand times what tells them apart."""
    return 1e4 + uniform(n, d, seed)


def tiny(n, d, seed):
    """Squares are below the range of float32."""
    return 1e-22 * uniform(n, d, seed)


def huge(n, d, seed):
    """Most distances are infinite."""
    return np.where(uniform(n, d, seed) < 0.5, -1, 1) * (3 + 0.1 * uniform(n, d, seed + 2)) * 1e38


def bad(n, d, seed):
    x = uniform(n, d, seed)
    for value in (np.nan, np.inf, -np.inf):
        x[rng(n, seed).integers(0, n, 4), rng(d, seed).integers(0, d, 4)] = value
    return x


DATA = (uniform, grid, clustered, equal, constant, far, tiny, huge, bad)


@pytest.fixture
def check(monkeypatch):
    """That a search finds the same with every column scored and with columns ruled out."""

    def both(*args, search=nf.knn, **options):
        found = []
        for screening in ("never", "always"):
            monkeypatch.setattr(operations, "SCREENING", screening)
            found.append(search(*args, **options))
        assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
        return found[1]

    return both


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d", [1, 2, 3, 7, 16])
def test_same_bits(d, dtype, data, check):
    for n, m in ((5, 7), (300, 3), (700, 1000), (600, 2500)):
        x, y = data(n, d, 0).astype(dtype), data(m, d, 1).astype(dtype)
        for k in (1, 2, 10):
            check(x, y, min(k, m))
            check(x, y, min(k, m - 1), exclude_self=True)
        check(x, k=4, metric="sqeuclidean")


@pytest.mark.parametrize("metric", BY_DIFFERENCE)
@pytest.mark.parametrize("data", DATA)
def test_metrics(data, metric, check):
    for p in (1.5, 3.3, 40.0) if metric == "minkowski" else (2.0,):
        for dtype in ("float32", "float64"):
            check(data(500, 3, 0).astype(dtype), data(1500, 3, 1).astype(dtype), 5, metric=metric, p=p)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_k_of_the_order_of_the_columns(dtype, check):
    x = grid(300, 2, 0).astype(dtype)
    for k in (250, 299):
        check(x, k=k)
        check(uniform(400, 2, 1).astype(dtype), x, k)


def test_ties_go_to_the_lower_index(check):
    x, y = grid(600, 2, 0).astype("float32"), grid(3000, 2, 1).astype("float32")
    square = ((x[:, None] - y) ** 2).sum(-1)
    values, indices = check(x, y, 10, metric="sqeuclidean")
    assert np.array_equal(indices, np.argsort(square, axis=1, kind="stable")[:, :10])
    assert np.array_equal(values, np.take_along_axis(square, indices, 1))
    assert np.array_equal(check(x, np.repeat(x[:1], 2000, 0), 7)[1], np.tile(np.arange(7), (600, 1)))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_assignment(dtype, data, check):
    for n, m, d in ((600, 2500, 3), (1100, 900, 1)):
        check(data(n, d, 0).astype(dtype), data(m, d, 1).astype(dtype), search=nf.kmeans_assign)


def test_half_precision_and_layouts(check):
    x, y = uniform(600, 3, 0).astype("float16"), uniform(1200, 3, 1).astype("float16")
    expected = check(x, y, 3)
    for left, right in ((np.asfortranarray(x), y[::1]), (np.repeat(x, 2, 1)[:, ::2], np.asfortranarray(y))):
        assert all(same_bits(a, b) for a, b in zip(check(left, right, 3), expected, strict=True))


@pytest.mark.parametrize("data", [uniform, grid, bad])
def test_threads_change_no_bit(data, threads, check):
    """More rows than one thread puts in order alone."""
    x = data(9000, 2, 0).astype("float32")
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(check(x, k=5))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def sphere(n, d, seed):
    """As far from the centre as each other: boxes rule nothing out for rows around it."""
    x = rng(n, d, seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [1, 3])
def test_chosen_by_shape(k, dtype, threads, monkeypatch):
    """With nobody asking for it, given up where nothing is ruled out, and the answer of all ways."""
    assert operations.SCREENING == "automatic"
    around = 1e-3 * sphere(4500, 3, 1) * uniform(4500, 1, 2)
    mixed = np.concatenate([around[:2250], sphere(2250, 3, 3)])
    y = sphere(4500, 3, 0)
    cases = [(data(4500, 3, 0), None) for data in (uniform, equal, huge)] + [(around, y), (mixed, y)]
    for x, y in [(x.astype(dtype), None if y is None else y.astype(dtype)) for x, y in cases]:
        found = []
        for screening, count in (("automatic", 1), ("automatic", 3), ("always", 2), ("never", 1)):
            threads(count)
            monkeypatch.setattr(operations, "SCREENING", screening)
            found.append(nf.knn(x, y, k))
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))
