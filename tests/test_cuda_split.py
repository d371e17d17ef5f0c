"""float32 rows on Hopper's tensor cores against float64: scores by three products of tf32, and the products of weights
that a gradient is made of, by three of float16. The path is taken where it is worth
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


# ---- products of weights ---------------------------------------------------------------------------------------------


def linear_gradients(weights, x, y):
    """W Y and W^T X, and both in float64."""
    leaves = [tensor(z, "float32").requires_grad_() for z in (x, y)]
    w = tensor(weights, "float32")
    got = torch.autograd.grad((nf.cdist(*leaves, "dot") * w).sum(), leaves)
    wide = g.numpy_of(w).astype(float)
    return got, [wide @ g.numpy_of(leaves[1]).astype(float), wide.T @ g.numpy_of(leaves[0]).astype(float)]


def errors(*case):
    """Of both gradients' norms."""
    return [
        np.linalg.norm(g.numpy_of(got).astype(float) - expected) / np.linalg.norm(expected)
        for got, expected in zip(*linear_gradients(*case), strict=True)
    ]


@pytest.mark.parametrize(("n", "m"), [*SIZES, (131, 257), (61, 601)])
@pytest.mark.parametrize("d", [1, 17, 64, 66, 127, 128, 131, 260])
def test_products_of_weights(n, m, d):
    assert max(errors(g.points(n, m, seed=2), g.points(n, d), g.points(m, d, seed=1))) <= 3e-7


def wide_range(n, m, sigma, seed):
    return g.points(n, m, seed=seed) * np.exp(sigma * np.random.default_rng(seed).standard_normal((n, m)))


@pytest.mark.parametrize("case", ["weights", "rows", "coordinates", "tiny", "large"])
def test_numbers_of_many_sizes(case):
    """A power of two for every row, and for every 64 weights of a line: nothing is too faint for float16."""
    n, m, d = 140, 300, 40
    weights, x, y = g.points(n, m, seed=2), g.points(n, d), g.points(m, d, seed=1)
    if case == "weights":
        weights = wide_range(n, m, 8, 3)
    elif case == "rows":
        x, y = (z * np.exp(8 * np.random.default_rng(4).standard_normal((len(z), 1))) for z in (x, y))
    elif case == "coordinates":
        x, y = wide_range(n, d, 4, 3), wide_range(m, d, 4, 5)
    elif case == "tiny":
        weights, x, y = weights * 1e-20, x * 1e-12, y * 1e-12
    else:
        weights, x, y = weights * 1e15, x * 1e20, y * 1e20
    assert max(errors(weights, x, y)) <= 3e-7


def test_long_sums_are_not_cut_off(monkeypatch):
    """Numbers of one sign, where cutting off a long sum takes off most."""
    case = np.random.default_rng(0).random((8, 3000)) + 0.5, g.points(8, 20), np.abs(g.points(3000, 20, seed=1))
    found = errors(*case)
    monkeypatch.setenv("NEARFAR_CUDA_SPLIT", "0")
    plain = errors(*case)
    assert all(one <= max(other, 2e-7) for one, other in zip(found, plain, strict=True))
    assert found != plain


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_and_rows_that_are_not_finite(bad):
    x, y = (z.requires_grad_() for z in sets(140, 130, 40))
    weights = tensor(g.points(140, 130, seed=2), "float32")
    plain = torch.autograd.grad((nf.cdist(x, y, "dot") * weights).sum(), (x, y))
    weights[3, 5] = bad
    grads = torch.autograd.grad((nf.cdist(x, y, "dot") * weights).sum(), (x, y))
    for grad, before, row in zip(grads, plain, (3, 5), strict=True):
        others = torch.arange(len(grad), device=DEVICE) != row
        assert not grad[row].isfinite().any()
        assert references.same_bits(grad[others].cpu(), before[others].cpu())
    weights[3, 5] = 1
    with torch.no_grad():
        y[7, 2] = bad
    grad, _ = torch.autograd.grad((nf.cdist(x, y, "dot") * weights).sum(), (x, y))
    assert not grad[:, 2].isfinite().any()
    others = torch.arange(40, device=DEVICE) != 2
    assert grad[:, others].isfinite().all()


def test_integer_products_are_exact():
    n, m, d = 130, 257, 70
    got, expected = linear_gradients(
        *(references.integers(*shape, seed=sum(shape)) for shape in ((n, m), (n, d), (m, d)))
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.cpu(), other)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize(("n", "m", "d"), [(131, 257, 17), (300, 67, 66), (5, 129, 101)])
def test_gradients_of_distances(metric, n, m, d, small_strips):
    x, y = (z.requires_grad_() for z in sets(n, m, d))
    upstream = tensor(g.points(n, m, seed=2), "float32")
    grads = torch.autograd.grad((nf.cdist(x, y, metric) * upstream).sum(), (x, y))
    wide = [z.detach().cpu().double().requires_grad_() for z in (x, y)]
    expected = (references.torch_distances(*wide, metric) * upstream.cpu().double()).sum()
    for got, other in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        g.assert_gradient(got, other, 1e-5)


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


@pytest.mark.parametrize(("n", "d"), [(67, 19), (131, 66), (257, 131)])
def test_losses_of_two_views(n, d):
    x, y = (tensor(z, "float32") for z in g.pairs(n, d))
    test_cuda.check(nf.clip_loss, ["image_features", "text_features"], "float32", image_features=x, text_features=y)
    test_cuda.check(nf.nt_xent_loss, ["z1", "z2"], "float32", z1=x, z2=y)
    test_cuda.check(nf.siglip_loss, ["image_features", "text_features"], "float32", image_features=x, text_features=y)
    test_cuda.check(nf.uniformity, ["x"], "float32", x=x)


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
