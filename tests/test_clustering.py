"""`kmeans_assign` against the least of exact distances."""

import numpy as np
import pytest
import torch
from generators import layouts, numpy_of, of_kind, points
from references import KINDS, clusters, distances, integers, same_bits

import nearfar as nf

METRICS = ("sqeuclidean", "cosine")


@pytest.mark.isa
@pytest.mark.parametrize("d", [1, 2, 16, 17, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2000), (50, 1), (500, 37), (129, 241), (2100, 12)])
def test_integers_are_exact_and_ties_go_to_the_lower_index(d, n, k):
    for dtype in ("float16", "float32", "float64"):
        x, centroids = integers(n, d).astype(dtype), integers(k, d, seed=1).astype(dtype)
        centroids[k // 2 :] = centroids[: k - k // 2]  # duplicates
        expected = distances(x, centroids, "sqeuclidean")
        labels, away = nf.kmeans_assign(x, centroids)
        assert labels.dtype == np.int64
        assert np.array_equal(labels, expected.argmin(1))
        assert np.array_equal(away, expected.min(1))


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 5, 48])
def test_every_dtype(metric, d):
    for kind, dtype in KINDS:
        x, centroids = (of_kind(kind, points(n, d, seed=seed), dtype) for seed, n in enumerate((400, 30)))
        labels, away = nf.kmeans_assign(x, centroids, metric=metric)
        assert type(labels) is type(away) is type(x)
        assert str(labels.dtype).endswith("int64")
        assert str(away.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
        expected = distances(x, centroids, metric)
        own = np.take_along_axis(expected, np.asarray(labels)[:, None], 1)[:, 0]
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        assert np.all(own <= expected.min(1) * (1 + tolerance) + tolerance)
        assert np.allclose(numpy_of(away), own.astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 17, 128])
def test_centroids_amid_tight_clusters_far_away(d):
    """Two centroids in every cluster, 1e-2 apart, all at an offset: labels are those of float64."""
    x = (clusters(800, d) + 100).astype("float32")
    centroids = x[::20].copy()
    labels, away = nf.kmeans_assign(x, centroids)
    expected = distances(x, centroids, "sqeuclidean")
    assert np.array_equal(labels, expected.argmin(1))
    assert np.allclose(away, expected.min(1).astype(float), rtol=1e-5, atol=0)
    assert not away[::20].any()


@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_sklearn(metric):
    metrics = pytest.importorskip("sklearn.metrics")
    for offset in (0, 1000):
        x, centroids = points(300, 24) + offset, points(20, 24, seed=1) + offset
        labels, _ = nf.kmeans_assign(x, centroids, metric=metric)
        assert np.array_equal(labels, metrics.pairwise_distances_argmin(x, centroids, metric=metric))
        labels, _ = nf.kmeans_assign(x.astype("float32"), centroids.astype("float32"))
        wide = (x.astype("float32").astype(float), centroids.astype("float32").astype(float))
        assert np.array_equal(labels, metrics.pairwise_distances_argmin(*wide))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [3, 40])
def test_bad_rows_touch_only_their_own_results(metric, bad, d):
    x, centroids = points(140, d, "float32"), points(25, d, "float32", seed=1)
    keep = np.delete(np.arange(25), [0, 24])
    clean = nf.kmeans_assign(np.delete(x, 7, 0), centroids[keep], metric=metric)
    x[7] = bad
    centroids[[0, 24]] = bad
    labels, away = nf.kmeans_assign(x, centroids, metric=metric)
    assert labels[7] == -1
    assert np.isnan(away[7])
    assert np.array_equal(np.delete(labels, 7), keep[clean[0]])
    assert np.allclose(np.delete(away, 7), clean[1], rtol=1e-6)
    labels, away = nf.kmeans_assign(x, np.full((2, d), np.nan, "float32"), metric=metric)
    assert (labels == -1).all()
    assert np.isnan(away).all()


def test_zero_rows():
    x = np.zeros((3, 5))
    labels, away = nf.kmeans_assign(x, points(4, 5), metric="cosine")
    assert not labels.any()
    assert np.array_equal(away, np.ones(3))


def test_shapes():
    labels, away = nf.kmeans_assign(np.empty((0, 3)), points(4, 3))
    assert labels.shape == away.shape == (0,)
    labels, away = nf.kmeans_assign(points(40, 3), points(1, 3))
    assert not labels.any()


def test_layouts():
    x, centroids = points(40, 20, "float32"), points(30, 20, "float32", seed=1)
    expected = nf.kmeans_assign(x, centroids)
    for name, left in layouts(x).items():
        for right in layouts(centroids).values():
            assert all(same_bits(a, b) for a, b in zip(nf.kmeans_assign(left, right), expected, strict=True)), name


def test_tensors_that_require_a_gradient():
    x, centroids = (of_kind("torch", points(n, 4)).requires_grad_() for n in (9, 3))
    labels, away = nf.kmeans_assign(x, centroids)
    assert not labels.requires_grad
    assert same_bits(away, nf.kmeans_assign(x.detach(), centroids.detach())[1])
    for metric in METRICS:
        assert torch.autograd.gradcheck(
            lambda x, c, metric=metric: nf.kmeans_assign(x, c, metric=metric)[1], (x, centroids)
        )


@pytest.mark.parametrize("metric", METRICS)
def test_threads_change_no_bit(metric, threads):
    for n, k, d in ((5, 3000, 20), (2000, 30, 3), (300, 700, 40)):
        x, centroids = points(n, d, "float32"), points(k, d, "float32", seed=1)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(nf.kmeans_assign(x, centroids, metric=metric))
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("place", ["x", "centroids"])
def test_bad_input(place):
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
        (None, TypeError, "expected a NumPy, PyTorch or CuPy array, got NoneType"),
    ):
        with pytest.raises(error, match=f"^{place}: .*{message}"):
            nf.kmeans_assign(**({"x": x, "centroids": x} | {place: bad}))
    for bad, error, message in (
        (of_kind("torch", x), TypeError, "expected a numpy array to match x, got torch"),
        (x.astype(np.float64), TypeError, "expected dtype float32 to match x, got float64"),
        (x[:, :2], ValueError, r"expected 3 columns to match x, got shape \(4, 2\)"),
        (x[:0], ValueError, "expected at least one row"),
    ):
        with pytest.raises(error, match=f"^centroids: {message}"):
            nf.kmeans_assign(x, bad)
    for metric in ("euclidean", "dot", "", None, ["cosine"]):
        with pytest.raises(ValueError, match=r"^metric: expected one of sqeuclidean, cosine, got"):
            nf.kmeans_assign(x, x, metric=metric)
