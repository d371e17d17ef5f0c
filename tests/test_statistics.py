"""MMD, HSIC and CKA against their definitions on dense Gram matrices in float64."""

import tracemalloc

import numpy as np
import pytest
import torch
from generators import assert_gradient, layouts, numpy_of, of_kind, points, rng
from references import KINDS, same_bits

import nearfar as nf
from nearfar.kernels import statistics

pytestmark = pytest.mark.isa

KERNELS = (
    nf.kernels.Gaussian(2.0),
    nf.kernels.Laplacian(5.0),
    nf.kernels.Linear(0.5),
    0.5 * nf.kernels.Matern(3.0) + nf.kernels.Polynomial(2),
    nf.kernels.Cosine(),
)
TOLERANCE = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-11}


def dense_mmd(k, x, y, unbiased):
    kx, ky, cross = k(x), k(y), k(x, y).mean()
    n, m = len(x), len(y)
    if not unbiased:
        return kx.mean() + ky.mean() - 2 * cross
    return (kx.sum() - np.trace(kx)) / (n * (n - 1)) + (ky.sum() - np.trace(ky)) / (m * (m - 1)) - 2 * cross


def dense_hsic(k, L, unbiased):
    n = len(k)
    if not unbiased:
        center = np.eye(n) - 1 / n
        return np.trace(k @ center @ L @ center) / (n - 1) ** 2
    k, L, one = k - np.diag(np.diag(k)), L - np.diag(np.diag(L)), np.ones(n)
    product = (one @ k @ one) * (one @ L @ one)
    return (np.trace(k @ L) + product / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ L @ one)) / (n * (n - 3))


def dense_cka(k, L, unbiased):
    return dense_hsic(k, L, unbiased) / np.sqrt(dense_hsic(k, k, unbiased) * dense_hsic(L, L, unbiased))


# ---- MMD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_mmd(kind, dtype, kernel):
    for n, m in ((2, 2), (7, 3), (130, 241)):
        x, y = of_kind(kind, points(n, 5), dtype), of_kind(kind, points(m, 5, seed=1) + 0.3, dtype)
        scale = kernel(numpy_of(x)).mean() + kernel(numpy_of(y)).mean()
        for unbiased in (True, False):
            value = nf.mmd(x, y, kernel, unbiased)
            assert type(value) is type(x)
            assert value.shape == ()
            assert str(value.dtype).endswith("float64" if dtype == "float64" else "float32")
            expected = dense_mmd(kernel, numpy_of(x), numpy_of(y), unbiased)
            assert abs(float(value) - expected) < TOLERANCE[dtype] * scale


def test_mmd_of_equal_and_of_few():
    x = points(50, 3)
    assert abs(nf.mmd(x, x, KERNELS[0], unbiased=False)) < 1e-15
    assert nf.mmd(x[:1], x[1:2], nf.kernels.Linear(), unbiased=False) == pytest.approx(((x[0] - x[1]) ** 2).sum())
    with pytest.raises(ValueError, match=r"^y: expected at least 2 rows with unbiased=True, got 1"):
        nf.mmd(x, x[:1])
    with pytest.raises(ValueError, match=r"^x: expected at least 1 rows"):
        nf.mmd(x[:0], x, unbiased=False)


def test_mmd_is_the_uniformity_gap():
    """Two halves of one sample: the pooled Gaussian potential ties `mmd` to `uniformity`."""
    z = points(60, 4)
    x, y = z[:30], z[30:]
    kernel = nf.kernels.Gaussian(0.5)  # t = 2
    pooled, own, other = (np.exp(nf.uniformity(p, t=2, normalize=False)) for p in (z, x, y))
    cross = (pooled * 60 * 59 - (own + other) * 30 * 29) / (2 * 30 * 30)
    assert nf.mmd(x, y, kernel) == pytest.approx(own + other - 2 * cross, rel=1e-9)


def test_mmd_keeps_digits_far_from_the_origin():
    x, y = points(300, 3), points(200, 3, seed=1)
    expected = dense_mmd(KERNELS[0], x, y, True)
    for dtype, bound in (("float32", 2e-4), ("float64", 1e-9)):
        assert nf.mmd((x + 1000).astype(dtype), (y + 1000).astype(dtype), KERNELS[0]) == pytest.approx(
            expected, abs=bound
        )


def test_mmd_derivatives():
    x, y = (torch.from_numpy(points(n, 3, seed=n)).requires_grad_() for n in (6, 4))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for unbiased in (True, False):

        def value(x, y, scale, unbiased=unbiased):
            return nf.mmd(x, y, nf.kernels.Gaussian(scale) + nf.kernels.Linear(), unbiased)

        assert torch.autograd.gradcheck(value, (x, y, scale), fast_mode=True)
        assert torch.autograd.gradgradcheck(value, (x, y, scale), fast_mode=True)


def test_permutation_test_is_mmd_of_relabelled_points(monkeypatch):
    x, y = points(23, 3), points(17, 3, seed=1)
    kernel = KERNELS[0]
    for unbiased in (True, False):
        test = nf.mmd_permutation_test(x, y, kernel, permutations=9, unbiased=unbiased, seed=5)
        z, random = np.concatenate([x, y]), np.random.default_rng(5)
        expected = []
        for _ in range(10):
            first = np.zeros(40, bool)
            first[random.permutation(40)[:23]] = True
            expected.append(dense_mmd(kernel, z[first], z[~first], unbiased))
        assert test.statistic == pytest.approx(dense_mmd(kernel, x, y, unbiased))
        assert np.allclose(test.null, expected[1:], atol=1e-13)
        assert test.p_value == (1 + np.count_nonzero(test.null >= test.statistic)) / 10
        monkeypatch.setattr(statistics, "COLUMNS", 4)
        assert np.allclose(
            nf.mmd_permutation_test(x, y, kernel, permutations=9, unbiased=unbiased, seed=5).null, test.null
        )
        monkeypatch.undo()


def test_permutation_test_level_and_power():
    random = rng(1)
    p_values = [
        nf.mmd_permutation_test(*random.standard_normal((2, 30, 2)), permutations=99, seed=i).p_value
        for i in range(120)
    ]
    assert 0.35 < np.mean(np.array(p_values) <= 0.5) < 0.65
    assert np.mean(np.array(p_values) <= 0.05) < 0.12
    x, y = random.standard_normal((2, 100, 2)).astype("float32")
    assert nf.mmd_permutation_test(x, 1.5 * y, permutations=199).p_value <= 0.02
    assert nf.mmd_permutation_test(torch.from_numpy(x), torch.from_numpy(1.5 * y), permutations=199).p_value <= 0.02
    assert nf.mmd_permutation_test(x, x, permutations=19).p_value == 1
    with pytest.raises(ValueError, match="^permutations: expected at least 1, got 0"):
        nf.mmd_permutation_test(x, y, permutations=0)


# ---- HSIC and CKA ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "tiles"])
def path(request, monkeypatch):
    """The tiles are for kernels that are no program, and take any other as well."""
    if request.param == "tiles":
        monkeypatch.setattr(statistics, "_fused_sums", lambda *args: statistics._tiled_sums(*args, ("xy", "xx", "yy")))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_hsic_and_cka(kind, dtype, unbiased, monkeypatch):
    monkeypatch.setattr(statistics, "TILE", 64)
    for n in (4, 65, 130):
        x = of_kind(kind, points(n, 6), dtype)
        y = of_kind(kind, points(n, 6)[:, :3] ** 2 + points(n, 3, seed=1), dtype)
        for kernel_x, kernel_y in zip(KERNELS, (*KERNELS[1:], KERNELS[0]), strict=True):
            k, L = kernel_x(numpy_of(x)), kernel_y(numpy_of(y))
            scale = np.abs(k).max() * np.abs(L).max() / min(n / 4, 8)
            value = nf.hsic(x, y, kernel_x, kernel_y, unbiased)
            assert type(value) is type(x)
            assert str(value.dtype).endswith("float64" if dtype == "float64" else "float32")
            assert abs(float(value) - dense_hsic(k, L, unbiased)) < 3 * TOLERANCE[dtype] * scale
            value = nf.cka(x, y, (kernel_x, kernel_y), unbiased)
            assert float(value) == pytest.approx(dense_cka(k, L, unbiased), abs=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(40, 5, 3), (5, 5, 5), (6, 17, 3), (4, 1, 50)])
def test_linear_cka_by_cross_products_or_tiles(unbiased, shape):
    n, d, e = shape
    x, y = points(n, d) + 100, points(n, e, seed=1)
    k, L = (x - x.mean(0)) @ (x - x.mean(0)).T, y @ y.T
    assert nf.cka(x, y, unbiased=unbiased) == pytest.approx(dense_cka(k, L, unbiased), rel=1e-9, abs=1e-12)
    assert nf.cka(x.astype("f"), y.astype("f"), unbiased=unbiased) == pytest.approx(dense_cka(k, L, unbiased), abs=2e-4)
    assert nf.hsic(x, y, "linear", nf.kernels.Linear(3.0), unbiased) == pytest.approx(
        dense_hsic(k, L, unbiased), rel=1e-8, abs=1e-9
    )


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(30, 4), (20, 60)])
def test_linear_statistics_of_float32_far_from_the_origin(unbiased, shape):
    """Entries of a Gram matrix would round what is left of the points, by cross products or tiles."""
    x, y = (points(*shape, "float32", seed=s) + np.float32(1e4) for s in range(2))
    for f in (lambda a, b: nf.cka(a, b, unbiased=unbiased), lambda a, b: nf.hsic(a, b, "linear", "linear", unbiased)):
        assert f(x, y) == pytest.approx(f(x.astype(float), y.astype(float)), rel=1e-4, abs=1e-5)
    radial = [nf.hsic(z, y.astype(z.dtype), "linear", nf.kernels.Gaussian(8.0), unbiased) for z in (x, x.astype(float))]
    assert radial[0] == pytest.approx(radial[1], rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("path")
def test_cka_invariances():
    x, y = points(80, 6), points(80, 4, seed=1)
    rotation = np.linalg.qr(rng(2).standard_normal((6, 6)))[0]
    for kernel in ("linear", nf.kernels.Gaussian(3.0)):
        for unbiased in (False, True):
            one = nf.cka(x, y, kernel, unbiased)
            assert nf.cka(x @ rotation + 2, y - 1, kernel, unbiased) == pytest.approx(one, rel=1e-9)
            assert nf.cka(y, x, kernel, unbiased) == pytest.approx(one, rel=1e-12)
            assert nf.cka(x, x @ rotation, kernel, unbiased) == pytest.approx(1, rel=1e-12)
            order = rng(3).permutation(80)
            assert nf.cka(x[order], y[order], kernel, unbiased) == pytest.approx(one, rel=1e-9)
    assert nf.cka(x, 7 * y) == pytest.approx(nf.cka(x, y), rel=1e-12)


def test_unbiased_is_unbiased():
    """Independent samples: the mean of HSIC_u is 0 within its error, that of HSIC_b is far above."""
    random = rng(4)
    values = np.array(
        [[nf.hsic(x, y, unbiased=u) for u in (True, False)] for x, y in random.standard_normal((200, 2, 12, 2))]
    )
    error = values.std(0) / np.sqrt(200)
    assert abs(values[:, 0].mean()) < 4 * error[0]
    assert values[:, 1].mean() > 20 * error[1]
    assert (values[:, 0] < 0).any()


@pytest.mark.usefixtures("path")
def test_constant_representations_and_few_rows():
    x, constant = points(10, 3), np.ones((10, 2))
    for unbiased in (False, True):
        assert nf.cka(x, constant, unbiased=unbiased) == 0
        assert nf.cka(x, constant, "gaussian", unbiased) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="^x: expected at least 4 rows with unbiased=True, got 3"):
        nf.hsic(x[:3], x[:3], unbiased=True)
    with pytest.raises(ValueError, match="^x: expected at least 2 rows with unbiased=False, got 1"):
        nf.cka(x[:1], x[:1])


@pytest.mark.usefixtures("path")
def test_nan_and_layouts():
    x, y = points(40, 3), points(40, 2, seed=1)
    one = nf.cka(x, y, "gaussian"), nf.hsic(x, y), nf.mmd(x, y[:, :1] * np.ones(3))
    for name, layout in layouts(x).items():
        again = nf.cka(layout, y, "gaussian"), nf.hsic(layout, y), nf.mmd(layout, y[:, :1] * np.ones(3))
        assert np.allclose(one, again, rtol=1e-12), name
    bad = x.copy()
    bad[3, 1] = np.nan
    for value in (nf.cka(bad, y), nf.cka(bad, y, "gaussian"), nf.hsic(bad, y, unbiased=True), nf.mmd(bad, x)):
        assert np.isnan(value)
    assert np.isnan(nf.mmd_permutation_test(bad, x, permutations=3).p_value)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("unbiased", [False, True])
def test_derivatives(unbiased, monkeypatch):
    monkeypatch.setattr(statistics, "TILE", 3)
    x, y = (torch.from_numpy(points(5, d, seed=d)).requires_grad_() for d in (3, 2))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def value(x, y, scale):
        kernels = nf.kernels.Gaussian(scale), nf.kernels.Matern(2.0) + nf.kernels.Cosine()
        return nf.cka(x, y, kernels, unbiased) + nf.hsic(x, y, *kernels, unbiased)

    assert torch.autograd.gradcheck(value, (x, y, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (x, y, scale), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, y: nf.cka(x, y, "linear", unbiased), (x, y))


COMPOSED = nf.kernels.Gaussian([1.0, 2.0, 0.5]) * nf.kernels.Polynomial(2) + 0.3 * nf.kernels.Laplacian(4.0)
COMPOSED += nf.kernels.Cosine()


def check_gradients(n, unbiased, dtype, device="cpu"):
    """Against torch's own of the dense formula in float64; a kernel of several scores, one side constant or both not."""
    x, y = (torch.from_numpy(points(n, d, seed=d)).to(device).requires_grad_() for d in (3, 21))
    scale = torch.tensor(4.0, dtype=torch.float64, device=device, requires_grad=True)
    center = torch.eye(n, dtype=torch.float64, device=device) - 1 / n

    def centred(matrix):
        if not unbiased:
            return center @ matrix @ center
        matrix = matrix - torch.diag(matrix.diagonal())
        offsets = matrix.sum(1) / (n - 2) - matrix.sum() / (2 * (n - 1) * (n - 2))
        matrix = matrix - offsets[:, None] - offsets
        return matrix - torch.diag(matrix.diagonal())

    def dense(x, y, scale):
        k, L = centred(COMPOSED(x)), centred(nf.kernels.Gaussian(scale)(y))
        total = (k * L).sum() / (n * (n - 3) if unbiased else (n - 1) ** 2)
        return total + (k * L).sum() / ((k * k).sum() * (L * L).sum()).sqrt() if n > 5 else total

    def own(x, y, scale):
        kernels = COMPOSED, nf.kernels.Gaussian(scale)
        total = nf.hsic(x, y, *kernels, unbiased)
        return total + nf.cka(x, y, kernels, unbiased) if n > 5 else total

    narrow = [z.detach().to(getattr(torch, dtype)).requires_grad_() for z in (x, y)]
    expected = torch.autograd.grad(dense(x, y, scale), (x, y, scale))
    found = torch.autograd.grad(own(*narrow, scale), (*narrow, scale))
    for grad, other in zip(found, expected, strict=True):
        assert_gradient(grad, other, 2e-4 if dtype == "float32" else 1e-9, floor=0.1 if n < 6 else 0.0)
    constant = torch.autograd.grad(own(narrow[0], narrow[1].detach(), 4.0), narrow[0])[0]
    assert torch.equal(constant, found[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 31, 127, 128, 129, 241, 307])
def test_gradients_at_all_sizes(n, unbiased, dtype):
    check_gradients(max(n, 4) if unbiased else n, unbiased, dtype)


def test_structured_rows_keep_digits():
    """The few columns that a first centring looks at are all of one class, or of a far cluster, or equal."""
    for group in (np.arange(640) % 3, np.arange(640) // 320, np.arange(640) % 9 > 0, np.zeros(640)):
        x = 0.1 * points(640, 20) + 0.5 * group[:, None]
        y = x[:, :4] + points(640, 4, seed=1)
        for kernel in (nf.kernels.Gaussian(5.0), nf.kernels.Polynomial(3)):
            for unbiased in (False, True):
                expected = dense_cka(kernel(x), kernel(y), unbiased)
                assert nf.cka(x.astype("f"), y.astype("f"), kernel, unbiased) == pytest.approx(expected, abs=2e-5)
                assert nf.cka(x, y, kernel, unbiased) == pytest.approx(expected, abs=1e-11)


def test_tiles_of_kernels_that_are_no_program(monkeypatch):
    """The fused pass and the tiles agree."""
    monkeypatch.setattr(statistics, "TILE", 16)
    custom = nf.kernels.Custom(lambda r: np.exp(-r / 8), lambda r: -np.exp(-r / 8) / 8)
    x, y = points(50, 3), points(50, 2, seed=1)
    for unbiased in (False, True):
        fused = nf.cka(x, y, nf.kernels.Gaussian(2.0), unbiased)
        assert nf.cka(x, y, (custom, nf.kernels.Gaussian(2.0)), unbiased) == pytest.approx(fused, rel=1e-10)


@pytest.mark.usefixtures("path")
def test_gradients_do_not_store_the_tiles():
    """The backward pass of 3000 points in the memory of some tiles: the matrices are 72 MB each."""
    x = torch.from_numpy(points(3000, 4)).requires_grad_()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
        value = nf.cka(x, x.detach() ** 2, nf.kernels.Gaussian(2.0))
    value.backward()
    assert torch.isfinite(x.grad).all()
    assert max(stored) <= 4 * 3000


@pytest.mark.usefixtures("path")
def test_memory_is_linear():
    x, y = points(6000, 4, "float32"), points(6000, 4, "float32", seed=1)
    for function in (
        lambda: nf.hsic(x, y),
        lambda: nf.cka(x, y, "gaussian"),
        lambda: nf.cka(x, y),
        lambda: nf.mmd(x, y, "gaussian"),
    ):
        function()
        tracemalloc.start()
        function()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6  # one Gram matrix: 144 MB


@pytest.mark.usefixtures("path")
def test_bits_do_not_depend_on_threads(threads):
    x, y = points(1100, 3, "float32"), points(1100, 2, "float32", seed=1)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append((nf.mmd(x, x + 1, "gaussian"), nf.hsic(x, y), nf.cka(x, y, "gaussian", True)))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_matrix():
    """A subclass of arrays whose `*` is another product, and whose slices keep two dimensions."""
    x, y = points(12, 5), points(12, 7)
    for function in (
        lambda x, y: nf.mmd(x, y[:, :5]),
        lambda x, y: nf.mmd_permutation_test(x, y[:, :5], permutations=5).p_value,
        lambda x, y: nf.hsic(x, y, "linear", "linear"),
        lambda x, y: nf.hsic(x, y, "linear", "linear", unbiased=True),
        lambda x, y: nf.cka(x, y),
        lambda x, y: nf.cdist(x, x, "mahalanobis", M=x.T @ x).sum(),
        lambda x, y: nf.psd_report(x @ x.T - np.eye(12)).witness_value,
        lambda x, y: nf.evaluate(x, views=x + 1).effective_rank,
    ):
        assert function(np.asmatrix(x), np.asmatrix(y)) == pytest.approx(function(x, y), rel=1e-12)


def test_bad_input():
    x, y = points(5, 3), points(4, 3)
    for function, error, message in (
        (lambda: nf.mmd(x, y[:, :2]), ValueError, r"^y: expected 3 columns to match x, got shape \(4, 2\)"),
        (lambda: nf.mmd(x[0], y), ValueError, r"^x: expected shape \(n, d\), got \(3,\)"),
        (lambda: nf.mmd(x, y.astype("f")), TypeError, "^y: expected dtype float64 to match x, got float32"),
        (lambda: nf.mmd(x, y, "none"), ValueError, "^kernel: expected one of gaussian"),
        (lambda: nf.mmd(x, y, lambda x, y: x @ y.T), TypeError, "^kernel: expected a kernel of nearfar.kernels"),
        (lambda: nf.hsic(x, y), ValueError, r"^y: expected 5 rows to match x, got shape \(4, 3\)"),
        (lambda: nf.hsic(x, x, kernel_y=3), TypeError, "^kernel_y: expected a kernel of nearfar.kernels"),
        (lambda: nf.cka(x, x, ("linear",)), ValueError, "^kernel: expected one or a pair, got 1"),
        (lambda: nf.cka(list(x), x), TypeError, "^x: expected a NumPy, PyTorch or CuPy array, got list"),
    ):
        with pytest.raises(error, match=message):
            function()
