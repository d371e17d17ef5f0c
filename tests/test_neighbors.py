"""`knn` against a sort of exact distances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from generators import layouts, numpy_of, of_kind, points, rng
from references import KINDS, METRICS, allowed, distances, nearest, same_bits

import nearfar as nf


def exact(x, y):
    return ((x.astype(np.float64)[:, None] - y.astype(np.float64)) ** 2).sum(-1)


def order(square, k):
    """Indices of the k least, ties by lower index."""
    return np.argsort(square, axis=1, kind="stable")[:, :k]


def integers(n, d, seed=0, high=4):
    return np.random.default_rng(seed).integers(-high, high, (n, d)).astype(np.float32)


@pytest.mark.isa
@pytest.mark.parametrize("d", [1, 3, 16, 17, 64, 130])
@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize(("n", "m"), [(1, 11), (3, 4000), (130, 241), (700, 50)])
def test_integers_are_exact_and_ties_go_to_the_lower_index(d, k, n, m):
    x, y = integers(n, d), integers(m, d, seed=1)
    square = exact(x, y)
    distances, indices = nf.knn(x, y, k, metric="sqeuclidean")
    assert indices.dtype == np.int64
    assert np.array_equal(indices, order(square, k))
    assert np.array_equal(distances, np.take_along_axis(square, indices, 1))
    euclidean, same = nf.knn(x, y, k)
    assert np.array_equal(same, indices)
    assert np.allclose(euclidean, np.sqrt(distances))
    products, best = nf.knn(x, y, k, metric="dot")
    wanted = order(-(x.astype(np.float64) @ y.T.astype(np.float64)), k)
    assert np.array_equal(best, wanted)
    assert np.array_equal(products, np.take_along_axis(x @ y.T, wanted, 1))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_against_itself_without_itself(k):
    x = integers(10, 5)
    x[4] = x[2]
    square = exact(x, x)
    np.fill_diagonal(square, np.inf)
    assert np.array_equal(nf.knn(x, k=k)[1], order(square, k))
    assert np.array_equal(nf.knn(x, x, k, exclude_self=True)[1], order(square, k))
    assert np.array_equal(nf.knn(x, x, 1)[1][:, 0], [0, 1, 2, 3, 2, 5, 6, 7, 8, 9])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_random_points(dtype, metric):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((n, 48)).astype(dtype) for n in (300, 1000))
    wide = [z.astype(np.float64) for z in (x, y)]
    if metric == "cosine":
        wide = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in wide]
        value = 1 - wide[0] @ wide[1].T
    else:
        value = np.sqrt(exact(*wide))
    distances, indices = nf.knn(x, y, 7, metric=metric)
    assert np.allclose(distances, np.sort(value, 1)[:, :7], rtol=1e-5)
    assert np.allclose(np.take_along_axis(value, indices, 1), distances, rtol=1e-5)


def test_near_neighbours_in_tight_far_apart_clusters():
    rng = np.random.default_rng(0)
    x = (100 * rng.standard_normal((20, 64)).repeat(20, 0) + 1e-2 * rng.standard_normal((400, 64))).astype(np.float32)
    square = exact(x, x)
    np.fill_diagonal(square, np.inf)
    distances, _ = nf.knn(x, k=5, metric="sqeuclidean")
    assert np.allclose(distances, np.sort(square, 1)[:, :5], rtol=1e-4)


def test_nan():
    x, y = integers(40, 20), integers(60, 20, seed=1)
    x[3, 1] = y[5, 0] = np.nan
    distances, indices = nf.knn(x, y, 60)
    assert (indices[3] == -1).all()
    assert np.isnan(distances[3]).all()
    others = np.delete(indices, 3, 0)
    assert (others[:, -1] == -1).all()
    assert not (others == 5).any()


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.randn(30, 8, requires_grad=True)
    distances, indices = nf.knn(x, k=2)
    assert indices.dtype == torch.int64
    assert torch.equal(distances, nf.knn(x.detach(), k=2)[0])
    assert distances.requires_grad
    half = x.detach().bfloat16()
    assert torch.equal(nf.knn(half, k=2)[1], nf.knn(half.float(), k=2)[1])


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [3, 40])
def test_every_metric_every_dtype(metric, d):
    """The chosen columns have the least distances, and those are given exactly."""
    for kind, dtype in KINDS:
        x, y = (of_kind(kind, points(n, d, seed=seed), dtype) for seed, n in enumerate((70, 300)))
        expected = distances(x, y, metric)
        order = -expected if metric == "dot" else expected
        for k in (1, 2, 10, 300):
            values, indices = nf.knn(x, y, k, metric=metric)
            assert type(values) is type(indices) is type(x)
            assert str(indices.dtype).endswith("int64")
            assert str(values.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
            values, indices = numpy_of(values), np.asarray(indices)
            assert all(len(set(row)) == k for row in indices)
            sign = -1 if metric == "dot" else 1
            assert np.all(np.diff(sign * values, axis=1) >= 0)
            scale = 1e-5 if dtype != "float64" else 1e-13
            best = np.sort(order, 1)[:, :k]
            own = np.take_along_axis(order, indices, 1)
            assert np.allclose(own.astype(float), best.astype(float), rtol=scale, atol=scale)
            error = np.abs(values - sign * own)
            assert np.all(error <= np.take_along_axis(allowed(x, y, metric, expected), indices, 1))


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 17, 128])
def test_cosine_of_nearly_parallel_rows(d):
    """Angles down to 1e-3 are told apart: 1 - cos is there a few times the rounding of 1."""
    x = points(30, d, "float32")
    angles = 1e-3 * (1 + np.arange(12))
    across = points(30, d, seed=1)
    across -= x * (across * x).sum(1, keepdims=True) / (x.astype(float) ** 2).sum(1, keepdims=True)
    across *= np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(across, axis=1, keepdims=True)
    for i in range(30):
        y = (x[i] + np.tan(angles)[:, None] * across[i]) * rng(i).uniform(0.1, 10, (12, 1))
        y = np.concatenate([y, -y, across[i : i + 1]])[::-1].astype("float32")
        values, indices = nf.knn(x[i : i + 1], y, 12, metric="cosine")
        assert np.array_equal(indices[0], 24 - np.arange(12))
        assert np.allclose(values[0], distances(x[i : i + 1], y, "cosine")[0, indices[0]], rtol=2e-3, atol=0)
    assert np.all(nf.knn(x, 3 * x, 1, metric="cosine")[0] >= 0)


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**70])
def test_gradient_of_cosine_for_rows_of_any_norm(scale):
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(points(9, 5, "float32", seed=s)) for s in range(2))
    slopes = []
    for factor in (1.0, scale):
        own = (factor * x).requires_grad_()
        values, _ = nf.knn(own, factor * y, 3, metric="cosine")
        slopes.append(factor * torch.autograd.grad(values.sum(), own)[0])
    assert torch.linalg.norm(slopes[1] - slopes[0]) <= 1e-5 * torch.linalg.norm(slopes[0])


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 20])
@pytest.mark.parametrize("n", [1, 5, 200, 2100])
def test_all_columns_alike(d, n):
    """Ties across tiles, chunks and the parts that few queries are cut into: always the first k."""
    y = np.repeat(integers(1, d), 1500, 0)
    for k in (1, 2, 10):
        values, indices = nf.knn(integers(n, d, seed=2), y, k)
        assert np.array_equal(indices, np.broadcast_to(np.arange(k), (n, k)))
        assert np.array_equal(values[:, 0], values[:, -1])
    blocks = np.tile(integers(30, d, seed=1), (50, 1))  # every row fifty times, thirty apart
    _, indices = nf.knn(blocks[:30], blocks, 50)
    if d == 20:  # in two dimensions some of the thirty rows are equal too
        assert np.array_equal(indices, np.arange(30)[:, None] + 30 * np.arange(50))


@pytest.mark.isa
@pytest.mark.parametrize("d", [5, 24])
def test_few_queries_many_columns(d):
    """Columns are cut among tasks: the same answer as for each query in a long list of them."""
    y = points(5000, d, "float32")
    many = nf.knn(points(2500, d, "float32", seed=1), y, 7)
    for n in (1, 3, 129):
        few = nf.knn(points(2500, d, "float32", seed=1)[:n], y, 7)
        assert all(same_bits(a, b[:n].copy()) for a, b in zip(few, many, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_up_to_five_queries(metric, dtype):
    """Few are measured pair by pair: the same answer, ties, NaN and exclusion included, as among many."""
    x, y = integers(40, 19).astype(dtype), integers(5000, 19, seed=1).astype(dtype)
    x[1, 3] = y[7, 2] = y[4000, 18] = np.nan
    x[2] = y[3] = y[4500] = 0
    for k, exclude_self in ((1, False), (9, True)):
        many = nf.knn(x, y, k, metric=metric, exclude_self=exclude_self)
        for n in (1, 2, 4, 5):
            few = nf.knn(x[:n], np.asfortranarray(y), k, metric=metric, exclude_self=exclude_self)
            assert all(same_bits(a, b[:n].copy()) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_self_exclusion_is_by_position(metric):
    x = points(60, 6)
    y = points(60, 6, seed=1)
    full = distances(x, y, metric) * (-1 if metric == "dot" else 1)
    np.fill_diagonal(full, np.inf)
    assert np.array_equal(nf.knn(x, y, 5, metric=metric, exclude_self=True)[1], nearest(full, 5)[1])
    own = distances(x, None, metric) * (-1 if metric == "dot" else 1)
    assert np.array_equal(nf.knn(x, None, 5, metric=metric, exclude_self=False)[1], nearest(own, 5)[1])
    assert np.array_equal(nf.knn(x, x, 5, metric=metric)[1], nearest(own, 5)[1])
    np.fill_diagonal(own, np.inf)
    assert np.array_equal(nf.knn(x, k=59, metric=metric)[1], nearest(own, 59)[1])
    # Fewer references than queries: later queries have nobody to leave out.
    some = nf.knn(x, y[:7], 6, metric=metric, exclude_self=True)[1]
    assert np.array_equal(some, nearest(full[:, :7], 6)[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [3, 40])
def test_bad_rows(bad, metric, d):
    x, y = points(150, d, "float32"), points(400, d, "float32", seed=1)
    keep = np.setdiff1d(np.arange(400), [0, 17, 399])
    clean = nf.knn(np.delete(x, 3, 0), y[keep], 9, metric=metric)
    x[3, d - 1] = bad
    y[[0, 17, 399], 1] = bad
    for k in (1, 9):
        values, indices = nf.knn(x, y, k, metric=metric)
        assert indices.min() >= -1
        assert indices.max() < 400
        if np.isnan(bad):
            assert (indices[3] == -1).all()
            assert np.isnan(values[3]).all()
        # The dot product with an infinite row can be the largest of all; a distance to it is never the least.
        if np.isnan(bad) or metric in ("euclidean", "sqeuclidean"):
            assert np.array_equal(np.delete(indices, 3, 0), keep[clean[1][:, :k]])
            assert np.allclose(np.delete(values, 3, 0), clean[0][:, :k], rtol=1e-6)
    nobody = nf.knn(x, np.full_like(y, np.nan), 2, metric=metric)
    assert (nobody[1] == -1).all()
    assert np.isnan(nobody[0]).all()


def test_empty_queries():
    values, indices = nf.knn(np.empty((0, 4), np.float32), points(5, 4, "float32"), 3)
    assert values.shape == indices.shape == (0, 3)


def test_layouts():
    x, y = points(40, 20, "float32"), points(70, 20, "float32", seed=1)
    expected = nf.knn(x, y, 4)
    for name, left in layouts(x).items():
        for right in layouts(y).values():
            assert all(same_bits(a, b) for a, b in zip(nf.knn(left, right, 4), expected, strict=True)), name


@pytest.mark.parametrize("metric", METRICS)
def test_threads_change_no_bit(metric, threads):
    """Parts of the columns, of which threads have as many as they need, and rows of small integers, which tie."""
    shapes = (2, 5000, 20), (5, 3000, 20), (900, 300, 3), (300, 700, 40), (300, 5000, 40), (100, 4100, 20)
    for (n, m, d), ties in itertools.product(shapes, (False, True)):
        x, y = points(n, d, "float32"), points(m, d, "float32", seed=1)
        if ties:
            x, y = np.round(x), np.round(y)
            y[m // 2 :] = y[: m - m // 2]
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append([*nf.knn(x, y, 5, metric=metric), *nf.knn(x, k=min(4, n - 1), metric=metric)])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_faiss():
    faiss = pytest.importorskip("faiss")
    x, y = points(300, 32, "float32"), points(4000, 32, "float32", seed=1)
    for metric, index in (("sqeuclidean", faiss.IndexFlatL2(32)), ("dot", faiss.IndexFlatIP(32))):
        index.add(y)
        expected, order = index.search(x, 10)
        values, indices = nf.knn(x, y, 10, metric=metric)
        assert np.allclose(values, expected, rtol=1e-4, atol=1e-4)
        assert np.mean(indices == order) > 0.999  # FAISS expands the square: it may order near ties otherwise


def test_sklearn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = points(100, 10), points(500, 10, seed=1)
    expected, order = neighbors.NearestNeighbors(n_neighbors=6, algorithm="brute").fit(y).kneighbors(x)
    values, indices = nf.knn(x, y, 6)
    assert np.array_equal(indices, order)
    assert np.allclose(values, expected, rtol=1e-9)


def test_kinds_of_k():
    x = points(9, 3)
    expected = nf.knn(x, k=2)[1]
    for k in (np.int64(2), np.uint8(2), np.array(2)):
        assert np.array_equal(nf.knn(x, k=k)[1], expected)
    for k in (True, np.True_, 2.0, 2.5, "2", None, [2], np.array([1, 2]), float("nan"), float("inf")):
        with pytest.raises(TypeError, match=r"^k: expected an integer, got"):
            nf.knn(x, k=k)
    for k in (0, -1, 9, 10**30):
        with pytest.raises(ValueError, match=r"^k: expected 1 to 8 \(rows to choose from\), got"):
            nf.knn(x, k=k)
    for n in (0, 1):
        with pytest.raises(ValueError, match=r"^(k|query): expected"):
            nf.knn(x[:n])
    with pytest.raises(ValueError, match=r"^(k|reference): expected"):
        nf.knn(x, x[:0])


@pytest.mark.parametrize("place", ["query", "reference"])
def test_not_points(place):
    x = points(4, 3, "float32")
    for bad, error, message in (
        (x.tolist(), TypeError, "expected a NumPy, PyTorch or CuPy array, got list"),
        (x.astype(int), TypeError, "expected a floating dtype"),
        (x + 1j, TypeError, "expected a floating dtype"),
        (x > 0, TypeError, "expected a floating dtype"),
        (x.astype(">f4"), TypeError, "expected native byte order"),
        (x[0], ValueError, r"expected shape \(n, d\)"),
        (x[None], ValueError, r"expected shape \(n, d\)"),
        (x[:, :0], ValueError, "expected (at least one column|3 columns)"),
    ):
        with pytest.raises(error, match=f"^{place}: .*{message}"):
            nf.knn(**({"query": x, "reference": x} | {place: bad}))
    for bad, message in (
        (of_kind("torch", x), "expected a numpy array to match query, got torch"),
        (x.astype(np.float64), "expected dtype float32 to match query, got float64"),
    ):
        with pytest.raises(TypeError, match=f"^reference: {message}"):
            nf.knn(x, bad)
    for metric in ("l1", "", None, 3, ["dot"]):
        with pytest.raises(ValueError, match=r"^metric: expected one of euclidean, sqeuclidean, .*, mahalanobis, got"):
            nf.knn(x, metric=metric)


def test_bad_input():
    x = integers(5, 3)
    for call, error, message in (
        (lambda: nf.knn([[1.0]], k=1), TypeError, "^query: "),
        (lambda: nf.knn(x, k=5), ValueError, "^k: expected 1 to 4"),
        (lambda: nf.knn(x, x, 6), ValueError, "^k: expected 1 to 5"),
        (lambda: nf.knn(x, x, 0), ValueError, "^k: expected 1 to 5"),
        (lambda: nf.knn(x, x, 1.5), TypeError, "^k: expected an integer"),
        (lambda: nf.knn(x, x[:, :2], 1), ValueError, "^reference: expected 3 columns"),
        (lambda: nf.knn(x, x, 1, metric="l1"), ValueError, "^metric: "),
        (lambda: nf.knn(x[0], x, 1), ValueError, "^query: expected shape"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_gradient_has_the_same_bits_each_time():
    """Rows that are the neighbours of many add up in a fixed order."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(points(3000, 20, "float32")).requires_grad_()
    slopes = [torch.autograd.grad(nf.knn(x, k=3)[0].sum(), x)[0] for _ in range(5)]
    assert all(same_bits(slope, slopes[0]) for slope in slopes)
