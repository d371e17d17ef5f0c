"""The nearest columns of every row on CUDA: the answer is that of the measured values, whatever multiplied the rows.
Where this runs on, and why it shows what it shows: test_cuda.py.
"""

import os
import subprocess
import sys

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import torch
from test_cuda import DEVICE, EMULATED, tensor

import nearfar as nf
from nearfar import backend

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


def near_rows(d, dtype, *counts):
    """Distances of 1e-3 of the norms, on both sides of zero, so that no centre helps."""
    rng = np.random.default_rng(d)
    scale, sides = 2.0 ** -(np.arange(d) % 8), np.where(np.arange(max(counts)) % 2, 1.0, -1.0)[:, None]
    base = tensor(scale * (8 + rng.random(d)), "bfloat16").double().cpu().numpy()

    def rows(n):
        moves = rng.integers(-2, 3, (n, d)) * scale / 8
        return tensor(sides[:n] * (base + np.where(scale < 0.2, moves, 0)), dtype)

    return [rows(n) for n in counts]


@pytest.mark.parametrize("d", [17, 120])
def test_columns_that_differ_in_the_last_bits(d, dtype):
    check(*near_rows(d, dtype, 140, 200))


def cut_off_rows(metric, dtype, *counts):
    """Beside a coordinate whose product leaves no room for the others, which decide; on both sides of zero."""
    rng = np.random.default_rng(0)

    def rows(n, faint):
        signs = np.where(np.arange(n) % 2 * (metric != "dot"), -1.0, 1.0)[:, None]
        others = (1 + rng.integers(0, 8, (n, 99)) / 8) * np.where(rng.random((n, 1)) < faint, 0.5, 1) / 64
        return tensor(signs * np.concatenate([np.full((n, 1), 128.0), others], 1), dtype)

    return [rows(n, faint) for n, faint in zip(counts, (0, 0.9), strict=True)]


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_products_that_tensor_cores_cut_off(metric, dtype):
    x, y = cut_off_rows(metric, dtype, 130, 300)
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


# ---- several neighbours of 16-bit rows -------------------------------------------------------------------------------

halves = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def nearest(x, y, k, metric="sqeuclidean", exclude_self=False):
    """Indices that were found and those that should be, where no two values are the same: in double, then rounded."""
    given = None if exclude_self else y
    distances, index = nf.knn(x, given, k, metric=metric)
    exact = references.distances(x.cpu(), y.cpu(), metric).astype(float)
    values = (-exact if metric == "dot" else exact).astype(np.float32)
    if exclude_self:
        np.fill_diagonal(values, np.inf)
    expected, expected_index = references.nearest(np.where(np.isfinite(values), values, np.inf), k)
    index = index.cpu().numpy()
    found = np.take_along_axis(values, index, 1)
    np.testing.assert_allclose(found, expected, rtol=3 * np.finfo(np.float32).eps, atol=1e-7)
    np.testing.assert_allclose(distances.cpu().numpy(), -found if metric == "dot" else found, rtol=1e-6, atol=1e-7)
    assert all(len(set(row)) == k for row in index.tolist())
    return index, expected_index


# Tiles of 64 and 128, several and one of either; the most that one warp keeps; more, and few columns, go another way.
@halves
@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(5, 256, 17, 2), (257, 300, 40, 2), (3, 1411, 70, 11), (2, 4096, 20, 32), (2, 4224, 20, 33)]
)
def test_several_of_random_rows(n, m, d, k, metric, dtype):
    index, expected = nearest(tensor(g.points(n, d), dtype), tensor(g.points(m, d, seed=1), dtype), k, metric)
    np.testing.assert_array_equal(index, expected)


@halves
@pytest.mark.parametrize("k", [2, 32, 33, 40])
def test_several_of_few_columns(k, dtype):
    """Up to all of them."""
    index, expected = nearest(tensor(g.points(70, 20), dtype), tensor(g.points(40, 20, seed=1), dtype), min(k, 40))
    np.testing.assert_array_equal(index, expected)


@halves
@pytest.mark.parametrize("metric", references.METRICS)
def test_several_over_blocks_of_columns(metric, dtype, small_strips):
    x, y = tensor(g.points(9, 24), dtype), tensor(g.points(300, 24, seed=1), dtype)
    for query, exclude_self in ((x, False), (y, True)):
        index, expected = nearest(query, y, 2, metric, exclude_self)
        np.testing.assert_array_equal(index, expected)


@halves
@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize("strips", ["small", "large"])
def test_several_ties_go_to_the_lower_index(metric, strips, dtype, monkeypatch):
    """Every column 130 times, which is more than a warp keeps; sums of integers are exact."""
    if strips == "small":
        monkeypatch.setattr(backend, "STRIP_BYTES", 1)
    y = tensor(np.tile(references.integers(5, 20, 1, 4), (130, 1)), dtype)
    x = tensor(np.concatenate([references.integers(5, 20, 1, 4), references.integers(9, 20, -3, 4)]), dtype)
    index, expected = nearest(x, y, 5, metric)
    if metric != "cosine":  # rows that point the same way are ties up to rounding
        np.testing.assert_array_equal(index, expected)


@halves
@pytest.mark.parametrize("copies", [20, 33, 300])
def test_several_among_copies_of_one_column(copies, dtype):
    """As near as the k-th, behind k - 1 that are nearer: the first of the copies is the answer."""
    rng = np.random.default_rng(copies)
    y = 8 * g.points(700, 24, seed=1)
    places = np.sort(rng.permutation(700)[:copies])
    y[places] = g.points(1, 24, seed=5)
    x, y = tensor(np.concatenate([g.points(3, 24, seed=7) / 8, y[places[:1]]]), dtype), tensor(y, dtype)
    index, expected = nearest(x, y, 5)
    np.testing.assert_array_equal(index, expected)


@halves
def test_several_of_tight_clusters_far_apart(dtype):
    """More columns than a warp keeps that no sum of products can tell apart."""
    x, y = (tensor(references.clusters(n, 40, spread=s), dtype) for n, s in ((9, 2e-2), (700, 1e-2)))
    nearest(x, y, 5)


@halves
@pytest.mark.parametrize("d", [17, 120])
def test_several_that_differ_in_the_last_bits(d, dtype):
    x, y = near_rows(d, dtype, 9, 500)
    for k in (2, 3):
        nearest(x, y, k)


@halves
@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_several_by_products_that_tensor_cores_cut_off(metric, dtype):
    x, y = cut_off_rows(metric, dtype, 9, 700)
    nearest(x, y, 5, metric)


@halves
@pytest.mark.parametrize("far", [30.0, 1000.0])
def test_several_of_rows_far_from_zero(far, dtype):
    shift = np.where(np.arange(40) % 3, far, 0)
    x, y = (tensor(shift + g.points(n, 40, seed=n), dtype) for n in (30, 700))
    nearest(x, y, 5)
    x[3, 1] = -65000.0
    y[5, 1] = -64000.0
    nearest(x, y, 5)


@halves
@pytest.mark.parametrize("metric", ["sqeuclidean", "dot"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_several_beside_bad_rows(bad, metric, dtype):
    """Columns that are bad are nobody's neighbours, but for an infinite product."""
    x, y = tensor(g.points(20, 40), dtype), tensor(g.points(513, 40, seed=1), dtype)
    x[5, 3], y[512, 0], y[7] = bad, bad, bad
    distances, index = nf.knn(x, y, 4, metric=metric)
    keep = np.arange(20) != 5
    with np.errstate(invalid="ignore"):
        values = measured(x, y) if metric == "sqeuclidean" else -(g.numpy_of(x) @ g.numpy_of(y).T)
    possible = np.where(values < np.inf, values, np.inf).astype(np.float32)  # NaN is not
    _, expected_index = references.nearest(possible, 4)
    np.testing.assert_array_equal(index.cpu().numpy()[keep], expected_index[keep])
    if metric == "sqeuclidean" or np.isnan(bad):
        assert (index[5] == -1).all()
        assert distances[5].isnan().all()
    else:
        assert (distances[5] == torch.inf).all()


@halves
def test_several_where_too_few_can_be_chosen(dtype):
    x, y = tensor(g.points(3, 20), dtype), tensor(g.points(520, 20, seed=1), dtype)
    y[2:300], y[301:] = torch.nan, torch.inf
    distances, index = nf.knn(x, y, 4)
    exact = references.distances(x.cpu(), y.cpu()[[0, 1, 300]])
    np.testing.assert_array_equal(index[:, :3].cpu(), np.array([0, 1, 300])[exact.argsort(1)])
    assert (index[:, 3] == -1).all()
    assert distances[:, 3].isnan().all()


@halves
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_several_of_zero_rows(metric, dtype, small_strips):
    x, y = tensor(g.points(9, 33), dtype), tensor(g.points(700, 33, seed=1), dtype)
    x[3], y[200:290] = 0, 0
    index, expected = nearest(x, y, 5, metric)
    np.testing.assert_array_equal(index[3], expected[3])


@halves
def test_several_repeat_bit_for_bit(dtype, monkeypatch):
    x, y = (tensor(references.clusters(n, 40), dtype) for n in (130, 520))
    found = []
    for order in ("0", "1", "7") if EMULATED else "00":
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", order)
        found.append(nf.knn(x, y, 4))
    for other in found[1:]:
        assert all(references.same_bits(a.cpu(), b.cpu()) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("m", "k", "taken"), [(1024, 8, True), (1023, 8, False), (4400, 33, False)])
def test_who_takes_16_bits(m, k, taken):
    """Few columns and many neighbours are searched as float32."""
    code = f"""if True:
        import torch, nearfar as nf
        nf.backend.emulate = {EMULATED}
        nf.knn(*(torch.ones(n, 20, dtype=torch.bfloat16, device="{DEVICE}") for n in (1, {m})), {k})"""
    env = os.environ | {"NEARFAR_CUDA_PLAN": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert "keys" in run.stderr
    assert (("bfloat16: wgmma" if test_cuda.on_hopper() else "bfloat16: mma") in run.stderr) == taken
    assert ("float32: " in run.stderr) == (not taken)
