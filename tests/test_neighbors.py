"""knn and kmeans_assign against a sort of exact distances."""

from __future__ import annotations

import numpy as np
import pytest

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
    labels, away = nf.kmeans_assign(x, y)
    assert labels[3] == -1
    assert np.isnan(away[3])
    assert (np.delete(labels, 3) >= 0).all()


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_nothing(threads):
    x = np.random.default_rng(0).standard_normal((900, 40)).astype(np.float32)
    try:
        nf.set_num_threads(1)
        one = nf.knn(x, k=6)
        nf.set_num_threads(threads)
        many = nf.knn(x, k=6)
    finally:
        nf.set_num_threads(None)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.randn(30, 8, requires_grad=True)
    distances, indices = nf.knn(x, k=2)
    assert indices.dtype == torch.int64
    assert not distances.requires_grad
    half = x.detach().bfloat16()
    assert torch.equal(nf.knn(half, k=2)[1], nf.knn(half.float(), k=2)[1])


@pytest.mark.parametrize("d", [2, 33])
def test_assign(d):
    x, centroids = integers(500, d), integers(37, d, seed=1)
    centroids[20] = centroids[3]
    labels, distances = nf.kmeans_assign(x, centroids)
    square = exact(x, centroids)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, square.argmin(1))
    assert np.array_equal(distances, square.min(1))
    assert not nf.kmeans_assign(x, x[:1])[0].any()
    cosine, away = nf.kmeans_assign(x + 5, centroids + 5.5, metric="cosine")
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x + 5.0, centroids + 5.5)]
    assert np.allclose(away, (1 - unit[0] @ unit[1].T).min(1), atol=1e-6)
    assert cosine.shape == (500,)


def test_agrees_with_sklearn_far_from_the_origin():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    x, centroids = (1000 + rng.standard_normal((n, 24)) for n in (400, 30))
    labels, _ = nf.kmeans_assign(x.astype(np.float32), centroids.astype(np.float32))
    wanted = metrics.pairwise_distances_argmin(
        x.astype(np.float32).astype(np.float64), centroids.astype(np.float32).astype(np.float64)
    )
    assert np.array_equal(labels, wanted)


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
        (lambda: nf.kmeans_assign(x, x[:0]), ValueError, "^centroids: expected at least one"),
        (lambda: nf.kmeans_assign(x, x[:, :2]), ValueError, "^centroids: expected 3 columns"),
        (lambda: nf.kmeans_assign(x, x, metric="dot"), ValueError, "^metric: "),
        (lambda: nf.kmeans_assign(x, x.astype(int)), TypeError, "^centroids: "),
    ):
        with pytest.raises(error, match=message):
            call()
