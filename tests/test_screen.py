"""Screening with 8-bit integers must not change a bit of any search, whatever the CPU gains from it."""

import numpy as np
import pytest
from generators import points, rng

import nearfar as nf
from nearfar import operations

pytestmark = pytest.mark.isa

DEPTHS = (32, 33, 64, 131, 500)  # screening begins at 32


@pytest.fixture
def screened(monkeypatch):
    """f() with every column scored, and with columns screened first."""

    def both(f):
        results = []
        for screening in ("never", "always"):
            monkeypatch.setattr(operations, "SCREENING", screening)
            results.append(f())
        return results

    return both


def searches(x, y):
    """What searches of the rows of y for those of x find."""
    for metric in ("euclidean", "sqeuclidean", "dot", "cosine"):
        for k in (1, 3, 10):
            yield f"knn {metric} {k}", lambda metric=metric, k=k: nf.knn(x, y, k, metric=metric)
        yield f"self {metric}", lambda metric=metric: nf.knn(y, None, 1, metric=metric)
    for metric in ("sqeuclidean", "cosine"):
        yield f"assign {metric}", lambda metric=metric: nf.kmeans_assign(x, y, metric=metric)


def check(screened, x, y):
    for name, search in searches(x, y):
        full, few = screened(search)
        for a, b in zip(full, few, strict=True):
            assert np.array_equal(a, b, equal_nan=True), name


@pytest.mark.parametrize("d", DEPTHS)
@pytest.mark.parametrize(("n", "m"), [(1, 11), (17, 240), (130, 1031)])
def test_random_points(screened, d, n, m):
    check(screened, points(n, d, "float32"), points(m, d, "float32", seed=1))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_half_precision_points(screened, dtype):
    check(screened, points(90, 70, dtype), points(700, 70, dtype, seed=1))


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
def test_scales(screened, scale):
    """Up to where squares leave the range of float32."""
    check(screened, points(60, 64, "float32") * np.float32(scale), points(500, 64, "float32", 1) * np.float32(scale))


def test_columns_closer_than_8_bits_resolve(screened):
    """Columns that round to nearly the same integers: only float32 can tell them apart."""
    base = points(1, 96, "float32")
    for spread in (1e-3, 1e-5, 1e-7):
        y = base * (1 + spread * rng(3).standard_normal((600, 96))).astype("float32")
        check(screened, (base * (1 + spread * rng(4).standard_normal((270, 96)))).astype("float32"), y)


def test_more_columns_than_a_row_may_list(screened):
    y = np.repeat(points(3, 64, "float32"), 700, axis=0) * (1 + 1e-6 * rng(3).standard_normal((2100, 1)))
    y = y.astype("float32")
    check(screened, np.concatenate([y[::300], points(300, 64, "float32", 1)]), y)


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-15, 1e-9, 1e9, 1e15])
def test_rows_of_another_scale_than_columns(screened, scale):
    x, y = points(70, 64, "float32") * np.float32(scale), points(500, 64, "float32", seed=1)
    check(screened, x, y)
    check(screened, y[:70], np.concatenate([y[70:], x]))


def test_columns_of_very_different_norms(screened):
    """The bound of a chunk is that of its largest column."""
    y = points(600, 64, "float32") * np.float32(10) ** rng(3).integers(-9, 9, (600, 1)).astype("float32")
    check(screened, points(300, 64, "float32", 1), y)


def test_rows_with_one_entry(screened):
    """The largest integers: all of the norm in one coordinate."""
    y = np.concatenate([np.eye(64, dtype="float32"), -3 * np.eye(64, dtype="float32")])
    check(screened, y[::-1] * np.float32(1.5), np.repeat(y, 3, axis=0))


@pytest.mark.parametrize("d", [32, 64, 200])
def test_rows_of_equal_entries(screened, d):
    """The largest sums of 16 bits."""
    y = np.ones((300, d), np.float32)
    y[rng(2).random(y.shape) < 0.05] = -1
    check(screened, np.concatenate([y[:40], -y[40:80], np.ones((1, d), np.float32)]), y)


def test_ties_go_to_the_lower_index(screened):
    y = np.repeat(points(40, 64, "float32"), 12, axis=0)
    check(screened, y[::7].copy(), y)
    labels = screened(lambda: nf.kmeans_assign(y, y))[1][0]
    assert np.array_equal(labels, np.arange(480) // 12 * 12)


def test_clusters_far_apart(screened):
    centers = 1000 * points(9, 64)
    x = (centers[rng(1).integers(0, 9, 150)] + 1e-2 * points(150, 64, seed=2)).astype("float32")
    y = (centers[rng(5).integers(0, 9, 900)] + 1e-2 * points(900, 64, seed=3)).astype("float32")
    check(screened, x, y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_rows_that_no_bound_covers(screened, bad):
    x, y = points(100, 64, "float32"), points(600, 64, "float32", seed=1)
    x[[0, 31, 99], [0, 5, 63]] = bad
    y[[0, 239, 240, 599], [0, 5, 63, 9]] = bad
    check(screened, x, y)


def test_zero_rows(screened):
    x, y = points(50, 64, "float32"), points(400, 64, "float32", seed=1)
    x[3] = 0
    y[[0, 200]] = 0
    check(screened, x, y)
    check(screened, np.zeros((5, 64), np.float32), np.zeros((300, 64), np.float32))


@pytest.mark.parametrize(("n", "d", "k"), [(1000, 32, 3), (700, 65, 7), (300, 40, 250)])
def test_kmeans(screened, n, d, k):
    x = points(n, d, "float32")
    x[: n // 2] += 3

    def fit():
        model = nf.KMeans(k, random_state=0, n_init=1).fit(x)
        return model.labels_, model.cluster_centers_, np.array([model.inertia_, model.n_iter_])

    for a, b in zip(*screened(fit), strict=True):
        assert np.array_equal(a, b)


def test_threads_agree(screened, monkeypatch):
    monkeypatch.setattr(operations, "SCREENING", "always")
    x, y = points(300, 64, "float32"), points(2000, 64, "float32", seed=1)
    results = []
    before = nf.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            nf.set_num_threads(threads)
            results.append(nf.knn(x, y, 5))
    finally:
        nf.set_num_threads(before)
    for value, index in results[1:]:
        assert np.array_equal(value, results[0][0])
        assert np.array_equal(index, results[0][1])
