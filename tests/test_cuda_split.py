"""float32 scores on Hopper's tensor cores, three products of tf32, against float64. The path is taken where it is worth
it; here always. In emulation, which then is one of sm_90, tensor cores read the first 19 bits of a number, no more, and
cut sums off. Where this runs on, and why it shows what it shows: test_cuda.py.
"""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import torch
from test_cuda import DEVICE, EMULATED, tensor

import nearfar as nf
from nearfar import kernels as k

pytestmark = test_cuda.pytestmark
on_device, small_strips = test_cuda.on_device, test_cuda.small_strips

# Around tiles of 128; depths around steps of 32, and of direct differences.
SIZES = [(1, 1), (127, 129), (128, 128), (129, 1)]
DEPTHS = [1, 17, 31, 32, 33, 100]
by_shape = pytest.mark.parametrize(("n", "m"), SIZES)


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """Every score of float32 rows."""
    monkeypatch.setenv("NEARFAR_CUDA_SPLIT", "1")
    if EMULATED:
        monkeypatch.setenv("NEARFAR_EMULATE_ARCHITECTURE", "90")
    elif not test_cuda.on_hopper():
        pytest.skip("needs a Hopper GPU, or an emulated one")


def sets(n, m, d):
    return tensor(g.points(n, d), "float32"), tensor(g.points(m, d, seed=1), "float32")


def norms(x):
    return np.linalg.norm(g.numpy_of(x), axis=1)


def test_is_another_path(monkeypatch):
    x, y = sets(130, 140, 100)
    taken = nf.cdist(x, y)
    monkeypatch.setenv("NEARFAR_CUDA_SPLIT", "0")
    assert not references.same_bits(taken.cpu(), nf.cdist(x, y).cpu())


def test_where_tiles_fill_the_device(monkeypatch):
    if not EMULATED:
        pytest.skip("a GPU has more multiprocessors")
    for n, same in ((60, True), (260, False)):
        x, y = sets(n, n, 40)
        monkeypatch.setenv("NEARFAR_CUDA_SPLIT", "0")
        plain = nf.cdist(x, y)
        monkeypatch.delenv("NEARFAR_CUDA_SPLIT")
        assert references.same_bits(plain, nf.cdist(x, y)) == same


@by_shape
@pytest.mark.parametrize("d", DEPTHS)
def test_products(n, m, d):
    x, y = sets(n, m, d)
    error = np.abs(g.numpy_of(k.Linear(0.0)(x, y)) - g.numpy_of(x) @ g.numpy_of(y).T)
    assert np.all(error <= 2.0**-21 * np.outer(norms(x), norms(y)))


@by_shape
@pytest.mark.parametrize("metric", references.METRICS)
def test_distances(n, m, metric):
    for d in DEPTHS:
        x, y = sets(n, m, d)
        references.assert_distances(nf.cdist(x, y, metric).cpu(), x.cpu(), y.cpu(), metric)


def test_as_exact_as_float32_where_distances_cancel(monkeypatch):
    """Pairs around the bounds below which they are measured."""
    base, direction = g.points(140, 64), g.points(140, 64, seed=1)
    ratio = np.geomspace(1 / 1000, 1 / 20, 140)[:, None]  # of |x - y|^2 to |x|^2 + |y|^2
    moved = (
        base
        + direction * np.sqrt(2 * ratio) * (np.linalg.norm(base, axis=1) / np.linalg.norm(direction, axis=1))[:, None]
    )
    x, y = tensor(base, "float32"), tensor(moved, "float32")
    exact = references.distances(x.cpu(), y.cpu(), "sqeuclidean").astype(float)
    errors = []
    for path in ("1", "0"):
        monkeypatch.setenv("NEARFAR_CUDA_SPLIT", path)
        got = g.numpy_of(nf.cdist(x, y, "sqeuclidean"))
        errors.append(np.abs(got / exact - 1).max())
    assert errors[0] <= min(errors[1], 1e-4)


def test_one_set_is_symmetric():
    """Tiles that mirror each other, and those that mirror themselves."""
    x, _ = sets(300, 1, 70)
    for matrix in (nf.cdist(x), nf.cdist(x, None, "cosine"), k.Linear(0.0)(x)):
        assert references.same_bits(matrix.cpu(), matrix.T.contiguous().cpu())
    i, j = np.triu_indices(300, 1)
    assert torch.equal(nf.pdist(x), nf.cdist(x)[i, j])


def test_integers_are_exact():
    x, y = (tensor(references.integers(n, 40, seed=n), "float32") for n in (130, 129))
    np.testing.assert_array_equal(k.Linear(0.0)(x, y).cpu(), g.numpy_of(x) @ g.numpy_of(y).T)


def test_more_tiles_than_blocks():
    """A block takes several tiles, and steps of the next are on their way while it is in an epilogue."""
    x, y = sets(650, 390, 100)
    references.assert_distances(nf.cdist(x, y).cpu(), x.cpu(), y.cpu(), "euclidean")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_touches_its_own_results_only(bad):
    x, y = sets(140, 130, 40)
    plain = [nf.cdist(x, y), k.Linear(0.0)(x, y)]
    x[5, 3], y[129, 0] = bad, bad
    for before, matrix in zip(plain, (nf.cdist(x, y), k.Linear(0.0)(x, y)), strict=True):
        hurt = torch.zeros(matrix.shape, dtype=torch.bool, device=DEVICE)
        hurt[5], hurt[:, 129] = True, True
        assert not matrix[hurt].isfinite().any()
        if matrix is not plain[0]:
            g.assert_value(matrix[~hurt].cpu().numpy(), g.numpy_of(before[~hurt]), 1e-6, 1e-3)
    labels, _ = nf.kmeans_assign(x, y)
    assert labels[5] == -1
    assert not (labels == 129).any()


def test_numbers_at_the_ends_of_their_range():
    x = tensor(np.full((2, 20), 3.4028e38), "float32")
    y = tensor(np.full((3, 20), 1e-30), "float32")
    g.assert_value(k.Linear(0.0)(x, y), g.numpy_of(x) @ g.numpy_of(y).T, 2.0**-10)


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize("count", [1, 5])
def test_neighbours(metric, count):
    for n, m, d in ((129, 140, 33), (1, 127, 100), (140, 5, 31)):
        x, y = sets(n, m, d)
        distances, index = nf.knn(x, y, count, metric=metric)
        exact = references.distances(x.cpu(), y.cpu(), metric).astype(float)
        expected, _ = references.nearest(-exact if metric == "dot" else exact, count)
        found = np.take_along_axis(exact, index.cpu().numpy(), 1)
        g.assert_value(found, -expected if metric == "dot" else expected, 1e-5, 1e-2)
        g.assert_value(distances, found, 1e-5, 1e-2)


def test_ties_go_to_the_lower_index(small_strips):
    """Over tiles and over blocks of columns."""
    x = tensor(np.tile(references.integers(70, 20), (5, 1)), "float32")
    labels, _ = nf.kmeans_assign(x, x)
    exact = references.distances(x.cpu())
    np.testing.assert_array_equal(labels.cpu(), exact.argmin(1))


def test_tight_clusters_far_apart():
    x, y = (tensor(references.clusters(140, 24, seed=s), "float32") for s in (0, 1))
    references.assert_distances(nf.cdist(x, y).cpu(), x.cpu(), y.cpu(), "euclidean")
    labels, distances = nf.kmeans_assign(x, y)
    exact = references.distances(x.cpu(), y.cpu(), "sqeuclidean").astype(float)
    np.testing.assert_allclose(
        np.take_along_axis(exact, labels.cpu().numpy()[:, None], 1)[:, 0], exact.min(1), rtol=1e-5
    )
    np.testing.assert_allclose(distances.cpu(), exact.min(1), rtol=1e-5)


# ---- gradients, kernels, losses ----------------------------------------------------------------------------------


@by_shape
def test_gaussian_matmul(n, m):
    for d in (17, 33, 100):
        x, y = (z.requires_grad_() for z in sets(n, m, d))
        v = tensor(g.points(m, 6, seed=2), "float32")
        value = k.Gaussian(float(np.sqrt(2 * d))).matmul(x, y, v)
        wide = [z.detach().cpu().double().requires_grad_() for z in (x, y)]
        expected = torch.exp(-references.torch_distances(*wide, "sqeuclidean") / (4 * d)) @ v.cpu().double()
        g.assert_gradient(value, expected, 1e-5)
        upstream = tensor(g.points(n, 6, seed=3), "float32")
        grads = torch.autograd.grad((value * upstream).sum(), [x, y])
        for got, other in zip(
            grads, torch.autograd.grad((expected * upstream.cpu().double()).sum(), wide), strict=True
        ):
            g.assert_gradient(got, other, 1e-5, floor=1e-6)


@by_shape
@pytest.mark.parametrize("d", [17, 33, 100])
def test_losses(n, m, d):
    query, key = (tensor(z, "float32") for z in g.pairs(max(n, m), d))
    test_cuda.check(nf.info_nce_loss, ["query", "positive_key"], "float32", query=query, positive_key=key)


def test_a_strip_at_a_time(small_strips):
    query, key = (tensor(z, "float32") for z in g.pairs(270, 40))
    test_cuda.check(
        nf.clip_loss, ["image_features", "text_features"], "float32", image_features=query, text_features=key
    )


# ---- order -----------------------------------------------------------------------------------------------------------


def test_results_repeat_bit_for_bit(monkeypatch):
    """In emulation also with the threads in another order, and with copies that come as late as they may."""

    def run():
        x, y = (z.requires_grad_() for z in sets(300, 140, 40))
        found = [nf.cdist(x, y), k.Gaussian(8.0).matmul(x, y, y.detach()), nf.info_nce_loss(x[:140], y)]
        grads = [grad for value in found for grad in torch.autograd.grad(value.sum(), [x, y])]
        return [z.detach().cpu() for z in (*found, *grads, *nf.kmeans_assign(x, y), *nf.knn(x, y, 3))]

    plain = run()
    for seed in ("0", "6", "1234567"):
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", seed)
        for one, other in zip(plain, run(), strict=True):
            assert references.same_bits(one, other)
