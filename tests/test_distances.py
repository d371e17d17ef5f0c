"""cdist and pdist against float64."""

from __future__ import annotations

import numpy as np
import pytest

import nearfar as nf

METRICS = ["euclidean", "sqeuclidean", "cosine", "dot"]
SIZES = [1, 2, 12, 13, 31, 48, 49, 129, 241]


def reference(x, y, metric):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if metric == "dot":
        return x @ y.swapaxes(-1, -2)
    if metric == "cosine":
        norms = [np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y)]
        u, v = (np.divide(z, n, out=np.zeros_like(z), where=n > 0) for z, n in zip((x, y), norms, strict=True))
        return 1 - u @ v.swapaxes(-1, -2)
    square = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1)
    return square if metric == "sqeuclidean" else np.sqrt(square)


def points(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got, wanted, dtype):
    bound = 2e-6 if np.dtype(dtype) != np.float64 else 1e-13
    assert np.abs(got - wanted).max(initial=0) <= bound * max(1.0, np.abs(wanted).max(initial=0))


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 64, 300])
def test_values(metric, dtype, d):
    for n, m in zip(SIZES, reversed(SIZES), strict=True):
        x, y = points(n, d, dtype=dtype), points(m, d, dtype=dtype, seed=1)
        got = nf.cdist(x, y, metric)
        assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
        close(got, reference(x, y, metric), dtype)
        close(nf.cdist(x, metric=metric), reference(x, x, metric), dtype)
        close(nf.pdist(x, metric), reference(x, x, metric)[np.triu_indices(n, 1)], dtype)


@pytest.mark.parametrize("metric", METRICS)
def test_batches_broadcast(metric):
    x, y = points(2, 1, 5, 3), points(4, 7, 3, seed=1)
    close(nf.cdist(x, y, metric), reference(x, y, metric), np.float32)
    got = nf.pdist(points(3, 2, 6, 4), metric)
    assert got.shape == (3, 2, 15)
    assert nf.cdist(points(0, 5, 3), points(0, 2, 3, seed=1)).shape == (0, 5, 2)


def test_empty():
    assert nf.cdist(points(0, 3), points(4, 3)).shape == (0, 4)
    assert nf.cdist(points(4, 3), points(0, 3)).shape == (4, 0)
    assert nf.pdist(points(1, 3)).shape == (0,)
    assert nf.pdist(points(0, 3)).shape == (0,)


@pytest.mark.parametrize("d", [3, 40])
def test_strides(d):
    base = points(60, 2 * d)
    for view in (base[::2, :d], base[::-1, :d], base[:, ::2], base[:30, d - 1 :: -1], np.asfortranarray(base[:, :d])):
        close(nf.cdist(view), reference(view, view, "euclidean"), np.float32)
    zero = np.broadcast_to(base[:1, :d], (9, d))
    assert not nf.cdist(zero).any()
    frozen = base[:, :d].copy()
    frozen.flags.writeable = False
    close(nf.cdist(frozen, base[:5, :d]), reference(frozen, base[:5, :d], "euclidean"), np.float32)


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 16, 17, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_self_distances_are_symmetric_with_zero_diagonal(d, dtype):
    x = points(200, d, dtype=dtype) + 100
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        got = nf.cdist(x, metric=metric)
        assert np.array_equal(got, got.T)
        assert not got.diagonal().any()
        assert (got >= 0).all()
        assert not nf.cdist(x, x.copy(), metric).diagonal().any()


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 17, 128])
def test_close_points_far_from_the_origin_keep_their_digits(d):
    x = (100 + 1e-3 * points(300, d, dtype=np.float64)).astype(np.float32)
    wanted = reference(x, x, "euclidean")
    off = ~np.eye(300, dtype=bool)
    assert (np.abs(nf.cdist(x) - wanted)[off] / wanted[off]).max() < 1e-3


@pytest.mark.parametrize("d", [8, 128])
def test_tight_far_apart_clusters(d):
    centers = 30 * points(10, d, dtype=np.float64)
    x = (centers.repeat(30, 0) + 1e-2 * points(300, d, dtype=np.float64, seed=1)).astype(np.float32)
    wanted = reference(x, x, "sqeuclidean")
    off = ~np.eye(300, dtype=bool)
    assert (np.abs(nf.cdist(x, metric="sqeuclidean") - wanted)[off] / wanted[off]).max() < 2e-5


def test_torch_issue_42479():
    assert nf.cdist(np.float32([[512695.0]]), np.float32([[512804.0]])).item() == 109


def test_cosine_of_near_parallel_and_zero_rows():
    x = np.float32([[1, 0, 0], [1, 1e-3, 0], [0, 0, 0]])
    got = nf.cdist(x, metric="cosine")
    assert got[0, 1] == pytest.approx(1 - 1 / np.sqrt(1 + 1e-6), rel=1e-3)
    assert np.array_equal(got[2], [1, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("d", [4, 64])
def test_bad_rows_touch_only_their_own(bad, d):
    x, y = points(70, d), points(50, d, seed=1)
    wanted = nf.cdist(x, y)
    x[7, 1] = bad
    y[11, 2] = bad
    got = nf.cdist(x, y)
    good = np.ones_like(got, bool)
    good[7] = good[:, 11] = False
    assert np.isfinite(got[good]).all()
    # The centre moves by a finite amount; values do not.
    assert np.allclose(got[good], wanted[good], rtol=1e-5)
    assert not np.isfinite(got[~good]).any()


def test_out():
    x, y = points(5, 3), points(4, 3, seed=1)
    out = np.empty((5, 4), np.float32)
    assert nf.cdist(x, y, out=out) is out
    assert np.array_equal(out, nf.cdist(x, y))
    for wrong, error in (
        (np.empty((4, 5), np.float32), ValueError),
        (np.empty((5, 4)), TypeError),
        (np.empty((4, 5), np.float32).T, ValueError),
    ):
        with pytest.raises(error, match="^out: "):
            nf.cdist(x, y, out=wrong)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads):
    x, y = points(700, 33), points(500, 33, seed=1)
    try:
        nf.set_num_threads(1)
        one = nf.cdist(x, y), nf.cdist(x), nf.pdist(x, "cosine")
        nf.set_num_threads(threads)
        many = nf.cdist(x, y), nf.cdist(x), nf.pdist(x, "cosine")
    finally:
        nf.set_num_threads(None)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [5, 40])
def test_gradients(metric, d):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    x, y = (torch.tensor(10 + rng.standard_normal((n, d)), dtype=torch.float32) for n in (130, 245))
    y[:20] = x[:20] * (1 + 1e-6)  # all but coincident
    grad = torch.tensor(rng.standard_normal((130, 245)), dtype=torch.float32)
    own = [z.clone().requires_grad_() for z in (x, y)]
    nf.cdist(*own, metric).backward(grad)
    wide = [z.double().requires_grad_() for z in (x, y)]
    if metric == "dot":
        value = wide[0] @ wide[1].T
    elif metric == "cosine":
        value = 1 - torch.nn.functional.normalize(wide[0]) @ torch.nn.functional.normalize(wide[1]).T
    else:
        square = (wide[0][:, None] - wide[1]).square().sum(-1)
        value = square if metric == "sqeuclidean" else torch.where(square > 1e-20, square, 1).sqrt()
    value.backward(grad.double())
    for a, b in zip(own, wide, strict=True):
        # Directions of all but coincident pairs are lost in the rounding of the points themselves.
        rows = slice(20, None) if metric == "euclidean" else slice(None)
        assert (a.grad[rows].double() - b.grad[rows]).norm() < 1e-5 * b.grad[rows].norm()


def test_gradient_at_distance_zero_is_zero():
    torch = pytest.importorskip("torch")
    x = torch.ones(4, 3, requires_grad=True)
    nf.cdist(x, x.detach()).sum().backward()
    assert not x.grad.any()
    x.grad = None
    nf.pdist(x).sum().backward()
    assert not x.grad.any()


def test_agrees_with_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    x, y = points(40, 9, dtype=np.float64), points(30, 9, dtype=np.float64, seed=1)
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        assert np.allclose(nf.cdist(x, y, metric), distance.cdist(x, y, metric), rtol=1e-12, atol=1e-14)
        assert np.allclose(nf.pdist(x, metric), distance.pdist(x, metric), rtol=1e-12, atol=1e-14)


def test_bad_input():
    x = points(4, 3)
    for call, error, message in (
        (lambda: nf.cdist([[1.0]]), TypeError, "^x: expected a NumPy"),
        (lambda: nf.cdist(x.astype(int)), TypeError, "^x: expected a floating dtype"),
        (lambda: nf.cdist(x.astype(complex)), TypeError, "^x: expected a floating dtype"),
        (lambda: nf.cdist(x[0]), ValueError, "^x: expected shape"),
        (lambda: nf.cdist(x, x[:, :2]), ValueError, "^y: expected 3 columns"),
        (lambda: nf.cdist(x, x.astype(np.float64)), TypeError, "^y: expected dtype float32"),
        (lambda: nf.cdist(x, x, "manhattan"), ValueError, "^metric: expected one of"),
        (lambda: nf.cdist(x, p=1), ValueError, "^p: "),
        (lambda: nf.cdist(x, M=x), ValueError, "^M: "),
        (lambda: nf.cdist(x.astype(">f4")), TypeError, "^x: "),
        (lambda: nf.cdist(points(2, 4, 3), points(3, 4, 3)), ValueError, "^y: expected batch"),
    ):
        with pytest.raises(error, match=message):
            call()
