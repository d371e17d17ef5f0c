"""The nearest column of every row on CUDA: the answer is that of the measured values, whatever multiplied the rows.
Where this runs on, and why it shows what it shows: test_cuda.py.
"""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import torch
from test_cuda import tensor

import nearfar as nf

pytestmark = test_cuda.pytestmark
on_device, small_strips, tf32 = test_cuda.on_device, test_cuda.small_strips, test_cuda.tf32

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Rows, columns, depth: around tiles of 64 and 128 and pairs of them; depths past direct differences, around steps.
SHAPES = [(1, 1, 17), (127, 129, 64), (130, 385, 20), (5, 128, 200)]


@pytest.fixture(params=[*DTYPES, "3 x tf32"])
def dtype(request, monkeypatch):
    """What rows are; and float32 rows by plain sums or, on Hopper, by three products of tf32."""
    split = request.param not in DTYPES
    monkeypatch.setenv("NEARFAR_CUDA_SPLIT", "1" if split else "0")
    return "float32" if split else request.param


def measured(x, y):
    """Squared distances of the rows as given: in double, then rounded as the results are."""
    exact = ((g.numpy_of(x)[:, None] - g.numpy_of(y)[None]) ** 2).sum(-1)
    return exact if x.dtype == torch.float64 else exact.astype(np.float32)


def check(x, y):
    labels, away = nf.kmeans_assign(x, y)
    values = measured(x, y)
    expected = values.argmin(1)
    # Sums in another order may differ in their last bit, which decides between what is as near as that.
    found = np.take_along_axis(values, labels.cpu().numpy()[:, None], 1)[:, 0]
    np.testing.assert_allclose(found, values.min(1), rtol=3 * np.finfo(values.dtype).eps)
    g.assert_value(away.cpu().numpy(), found, 2.0**-8 if away.dtype == torch.bfloat16 else 1e-3, 0)
    return labels.cpu().numpy(), expected


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_random_rows(n, m, d, dtype):
    labels, expected = check(tensor(g.points(n, d), dtype), tensor(g.points(m, d, seed=1), dtype))
    np.testing.assert_array_equal(labels, expected)


def test_tight_clusters_far_apart(dtype):
    """Columns that no sum of products can tell apart are measured."""
    x, y = (tensor(references.clusters(n, 40, spread=s), dtype) for n, s in ((140, 2e-2), (150, 1e-2)))
    check(x, y)


@pytest.mark.parametrize("d", [17, 120])
def test_columns_that_differ_in_the_last_bits(d, dtype):
    """Distances of 1e-3 of the norms, on both sides of zero, so that no centre helps."""
    rng = np.random.default_rng(d)
    scale, sides = 2.0 ** -(np.arange(d) % 8), np.where(np.arange(200) % 2, 1.0, -1.0)[:, None]
    base = tensor(scale * (8 + rng.random(d)), "bfloat16").double().cpu().numpy()

    def rows(n):
        moves = rng.integers(-2, 3, (n, d)) * scale / 8
        return tensor(sides[:n] * (base + np.where(scale < 0.2, moves, 0)), dtype)

    x, y = rows(140), rows(200)
    check(x, y)


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_products_that_tensor_cores_cut_off(metric, dtype):
    """Beside a coordinate whose product leaves no room for the others, which decide; on both sides of zero."""
    rng = np.random.default_rng(0)

    def rows(n, faint):
        signs = np.where(np.arange(n) % 2 * (metric != "dot"), -1.0, 1.0)[:, None]
        others = (1 + rng.integers(0, 8, (n, 99)) / 8) * np.where(rng.random((n, 1)) < faint, 0.5, 1) / 64
        return tensor(signs * np.concatenate([np.full((n, 1), 128.0), others], 1), dtype)

    x, y = rows(130, 0), rows(300, 0.9)
    _, index = nf.knn(x, y, 1, metric=metric)
    values = -(g.numpy_of(x) @ g.numpy_of(y).T) if metric == "dot" else measured(x, y)
    values = values.astype(g.numpy_of(x).dtype if dtype == "float64" else np.float32)
    found = np.take_along_axis(values, index.cpu().numpy(), 1)[:, 0]
    np.testing.assert_allclose(found, values.min(1), rtol=3 * np.finfo(values.dtype).eps)


@pytest.mark.parametrize("far", [30.0, 1000.0])
def test_rows_far_from_zero(far, dtype):
    """Some of their coordinates; and one number that is so far from the others that 16 bits cannot hold it."""
    shift = np.where(np.arange(40) % 3, far, 0)
    x, y = (tensor(shift + g.points(n, 40, seed=n), dtype) for n in (100, 200))
    check(x, y)
    x[3, 1] = -65000.0
    y[5, 1] = -64000.0
    check(x, y)


@pytest.mark.parametrize(("metric", "d"), [("euclidean", 8), *((metric, 40) for metric in references.METRICS)])
def test_ties_go_to_the_lower_index(metric, d, dtype, small_strips):
    """Over tiles and over blocks of columns."""
    rows = np.tile(references.integers(70, d, 1, 4), (3, 1))
    x = tensor(rows, dtype)
    _, index = nf.knn(x, x, 1, metric=metric)
    exact = references.distances(x[:70].cpu(), x[:70].cpu(), metric).astype(float)
    exact = -exact if metric == "dot" else exact
    if metric == "cosine":  # rows that point the same way are ties as well
        np.testing.assert_allclose(np.take_along_axis(exact, index.cpu().numpy()[:70] % 70, 1), 0, atol=1e-6)
    else:
        np.testing.assert_array_equal(index.cpu()[:, 0], np.tile(exact.argmin(1), 3))


@pytest.mark.parametrize("metric", references.METRICS)
def test_itself_left_out(metric, dtype):
    x = tensor(g.points(131, 24), dtype)
    _, index = nf.knn(x, k=1, metric=metric)
    exact = references.distances(x.cpu(), x.cpu(), metric).astype(float)
    exact = -exact if metric == "dot" else exact
    np.fill_diagonal(exact, np.inf)
    found = np.take_along_axis(exact, index.cpu().numpy(), 1)[:, 0]
    np.testing.assert_allclose(found, exact.min(1), rtol=1e-6, atol=1e-9)
    assert not (index.cpu()[:, 0] == torch.arange(131)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_touches_its_own_results_only(bad, dtype):
    x, y = tensor(g.points(140, 40), dtype), tensor(g.points(130, 40, seed=1), dtype)
    x[5, 3], y[129, 0], y[7] = bad, bad, bad
    labels, away = nf.kmeans_assign(x, y)
    assert labels[5] == -1
    assert away[5].isnan()
    keep = np.arange(140) != 5
    values = measured(x[keep], y)
    np.testing.assert_array_equal(
        labels.cpu().numpy()[keep], np.nanargmin(np.where(np.isfinite(values), values, np.inf), 1)
    )


def test_nothing_to_choose(dtype):
    x, y = tensor(g.points(9, 20), dtype), tensor(np.full((3, 20), np.nan), dtype)
    labels, away = nf.kmeans_assign(x, y)
    assert (labels == -1).all()
    assert away.isnan().all()


@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_zero_rows(metric, dtype):
    x, y = tensor(g.points(20, 33), dtype), tensor(g.points(260, 33, seed=1), dtype)
    x[3], y[200] = 0, 0
    _, index = nf.knn(x, y, 1, metric=metric)
    exact = references.distances(x.cpu(), y.cpu(), metric).astype(float)
    exact = -exact if metric == "dot" else exact
    np.testing.assert_array_equal(index.cpu()[:, 0], exact.argmin(1))


def test_numbers_too_small_for_their_squares():
    x, y = (tensor(1e-22 * g.points(n, 20, seed=n), "float32") for n in (30, 40))
    labels, _ = nf.kmeans_assign(x, y)
    exact = ((g.numpy_of(x)[:, None] - g.numpy_of(y)[None]) ** 2).sum(-1)
    assert (labels >= 0).all()
    np.testing.assert_array_equal(labels.cpu(), exact.astype(np.float32).argmin(1))


def test_operands_rounded_to_tf32(tf32):
    x, y = (tensor(g.points(n, 40, seed=n), "float32") for n in (140, 300))
    labels, expected = check(x, y)
    np.testing.assert_array_equal(labels, expected)


def test_unit_rows(dtype):
    x, y = (tensor(g.points(n, 70, seed=n), dtype) for n in (130, 260))
    labels, away = nf.kmeans_assign(x, y, metric="cosine")
    exact = references.distances(x.cpu(), y.cpu(), "cosine")
    found = np.take_along_axis(exact, labels.cpu().numpy()[:, None], 1)[:, 0]
    np.testing.assert_allclose(found, exact.min(1), rtol=1e-6)
    g.assert_value(away.cpu().numpy(), found, 2.0**-8, 0)
