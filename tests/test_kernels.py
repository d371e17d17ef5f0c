"""The Gaussian kernel: its Gram matrix, and products with it that never store the matrix."""

import numpy as np
import pytest
import torch
from generators import GRADIENT, STEP, assert_gradient, layouts, numpy_of, of_kind, points, rng
from references import KINDS, clusters, same_bits, squares, wide

import nearfar as nf

EPS = {"float16": 2e-7, "bfloat16": 2e-7, "float32": 2e-7, "float64": 4e-16}


def gaussian(x, y=None, lengthscale=1.0):
    """exp(-|x - y|^2 / 2 l^2) from the differences, one precision up."""
    x = wide(x) / lengthscale
    return np.exp(-squares(x, x if y is None else wide(y) / lengthscale) / 2)


def tolerance(d, dtype):
    """The most that an error of the squared distance, relative to itself, moves exp(-r / 2)."""
    return EPS[dtype] * (4 + np.sqrt(d))


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("d", [1, 3, 16, 17, 40])
def test_dense_and_product(kind, dtype, d):
    scale = np.sqrt(d)
    kernel = nf.kernels.Gaussian(scale)
    bound = tolerance(d, dtype)
    for n, m in ((1, 1), (3, 2000), (130, 49), (300, 241), (2100, 13)):
        x, y = (of_kind(kind, points(size, d, seed=seed), dtype) for seed, size in enumerate((n, m)))
        expected = gaussian(x, y, scale)
        dense = kernel(x, y)
        assert type(dense) is type(x)
        assert str(dense.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
        assert np.abs(numpy_of(dense) - expected).max() < bound
        for r in (1, 2, 4, 5, 13):
            v = of_kind(kind, rng(m, r).standard_normal((m, r)), dtype)
            product = kernel.matmul(x, y, v)
            assert product.dtype == dense.dtype
            # Terms are summed in the order of the columns: their rounding grows with the square root of their number.
            sums = expected @ np.abs(wide(v))
            assert np.all(
                np.abs(numpy_of(product) - expected @ wide(v)) <= (bound + EPS[dtype] * np.sqrt(m)) * sums + bound
            )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "m", "r"), [(1, 3000, 1), (6, 2100, 2), (12, 1025, 1), (12, 1025, 2), (5, 6, 3)])
def test_gradient_of_few_rows(n, m, r, dtype):
    """They change places with the columns."""
    kernel = nf.kernels.Gaussian(3.0) + 0.5 * nf.kernels.Linear(1.0) * nf.kernels.Matern(4.0)
    arrays = points(n, 5), points(m, 5, seed=1), rng(2).standard_normal((m, r))
    leaves, doubles = ([torch.from_numpy(a.astype(t)).requires_grad_() for a in arrays] for t in (dtype, "float64"))
    upstream = torch.from_numpy(rng(3).standard_normal((n, r)))
    product, dense = kernel.matmul(*leaves), kernel(*doubles[:2]) @ doubles[2]
    sums = (kernel(*doubles[:2]).abs() @ doubles[2].abs()).detach()
    assert ((product - dense).abs() <= 20 * EPS[dtype] * sums).all()
    expected = torch.autograd.grad((dense * upstream).sum(), doubles)
    for actual, wanted in zip(torch.autograd.grad((product * upstream).sum(), leaves), expected, strict=True):
        assert_gradient(actual, wanted, GRADIENT[dtype], STEP[dtype])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_shapes(kind, dtype):
    x = of_kind(kind, rng(1).standard_normal((2, 3, 6, 4)), dtype)
    y = of_kind(kind, rng(2).standard_normal((3, 7, 4)), dtype)
    v = of_kind(kind, rng(3).standard_normal((6, 2)), dtype)
    w = of_kind(kind, rng(4).standard_normal((2, 1, 7, 5)), dtype)
    kernel = nf.kernels.Gaussian(0.7)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for out, expected in (
        (kernel(x, y), gaussian(x, y, 0.7)),
        (kernel.matmul(x, None, v), gaussian(x, None, 0.7) @ wide(v)),
        (kernel.matmul(x, x, v), gaussian(x, None, 0.7) @ wide(v)),
        (kernel.matmul(x, y, w), gaussian(x, y, 0.7) @ wide(w)),
        (kernel.matmul(x, y, w[0, 0, :, 0]), gaussian(x, y, 0.7) @ wide(w)[0, 0, :, 0]),
        (kernel.matmul(x[0, 0], None, v[:, 0]), gaussian(x[0, 0], None, 0.7) @ wide(v)[:, 0]),
        (kernel.diag(x), np.ones((2, 3, 6))),
    ):
        assert out.shape == expected.shape
        assert np.allclose(numpy_of(out), expected.astype(float), **close)
    assert kernel.diag(x).dtype == kernel(x).dtype


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_empty(kind):
    empty, x = of_kind(kind, np.empty((0, 4))), of_kind(kind, points(5, 4))
    kernel = nf.kernels.Gaussian(2.0)
    assert kernel(empty).shape == (0, 0)
    assert kernel(x, empty).shape == (5, 0)
    assert kernel.diag(empty).shape == (0,)
    assert kernel.matmul(empty, x, x).shape == (0, 4)
    assert kernel.matmul(x, empty, of_kind(kind, np.empty((0, 2)))).shape == (5, 2)
    assert not numpy_of(kernel.matmul(x, empty, of_kind(kind, np.empty((0, 2))))).any()
    assert kernel.matmul(x, x, x[:, :0]).shape == (5, 0)


def test_names():
    assert nf.kernels.RBF is nf.kernels.SquaredExponential is nf.kernels.Gaussian
    assert repr(nf.kernels.RBF(0.7)) == "Gaussian(lengthscale=0.7)"
    x, y = points(6, 4, "float32"), points(5, 4, "float32", seed=1)
    one = nf.kernels.Gaussian()(x, y)
    for kernel, params in (
        ("gaussian", {}),
        ("gaussian", {"lengthscale": 1.0}),
        ("rbf", {"gamma": 0.5}),
        ("rbf", {"lengthscale": 1}),
        (nf.kernels.Gaussian(), {}),
        (nf.kernels.Gaussian(np.ones(4)), {}),
        (nf.kernels.Gaussian(np.float32(1)), {}),
    ):
        assert np.allclose(nf.gram(x, y, kernel, **params), one, rtol=1e-6)
    assert np.allclose(nf.gram(x, kernel="rbf"), gaussian(x, None, np.sqrt(2)), rtol=1e-6)  # gamma = 1 / 4


def test_one_length_scale_a_dimension():
    x, y, v = points(20, 3), points(30, 3, seed=1), points(30, 2, seed=2)
    scale = np.array([0.5, 1.0, 3.0])
    kernel = nf.kernels.Gaussian(scale)
    assert np.allclose(kernel(x, y), gaussian(x, y, scale).astype(float), rtol=1e-12)
    assert np.allclose(kernel.matmul(x, y, v), (gaussian(x, y, scale) @ v).astype(float), rtol=1e-12)
    assert np.allclose(kernel(x[None], y).squeeze(0), kernel(x, y), rtol=1e-12)
    assert torch.allclose(kernel(torch.from_numpy(x)), torch.from_numpy(kernel(x)))
    assert torch.allclose(
        nf.kernels.Gaussian(torch.from_numpy(scale))(torch.from_numpy(x)), torch.from_numpy(kernel(x))
    )


def test_sklearn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = points(50, 7), points(40, 7, seed=1)
    for gamma in (None, 0.01, 0.3, 5.0):
        assert np.allclose(nf.gram(x, y, "rbf", gamma=gamma), pairwise.rbf_kernel(x, y, gamma=gamma), rtol=1e-10)
        assert np.allclose(nf.gram(x, None, "rbf", gamma=gamma), pairwise.rbf_kernel(x, gamma=gamma), rtol=1e-10)


# ---- what a Gram matrix is -------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 5, 40])
def test_limits_and_symmetry(d):
    for dtype in ("float16", "float32", "float64"):
        x = points(150, d, dtype)
        apart = gaussian(x, None, 1e-10)  # halves coincide here and there
        for lengthscale in (1e-10, 1e-15):
            assert np.array_equal(nf.gram(x, lengthscale=lengthscale), apart)
        assert dtype == "float16" or np.array_equal(apart, np.eye(150))
        for lengthscale in (1e5, 1e30):
            assert np.allclose(nf.gram(x, lengthscale=lengthscale), 1, rtol=0, atol=1e-6)
        for lengthscale in (1.0, 0.37, 3.0):
            k = nf.gram(x, lengthscale=lengthscale)
            assert same_bits(k, np.ascontiguousarray(k.T))
            assert np.all(k.diagonal() == 1)
            assert np.all((k >= 0) & (k <= 1))


@pytest.mark.isa
@pytest.mark.parametrize(("d", "offset", "lengthscale"), [(3, 10, 1.0), (3, 10, 3.0), (20, 10, 3.0), (3, 1000, 0.7)])
def test_float32_gram_is_semi_definite_to_noise(d, offset, lengthscale):
    x = (points(500, d) + offset).astype("float32")
    values = np.linalg.eigvalsh(nf.gram(x, lengthscale=lengthscale).astype(np.float64))
    assert values[0] > -np.finfo(np.float32).eps * values[-1]


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 16, 17, 128])
def test_near_points_far_from_the_origin(d):
    """Offset 100, spread and length scale about 1e-3."""
    x, y = ((100 + 1e-3 * points(n, d)).astype("float32") for n in (150, 170))
    v = points(170, 2, "float32")
    scale = 1.3e-3 * np.sqrt(d)
    for lengthscale in (scale, np.full(d, scale)):
        kernel = nf.kernels.Gaussian(lengthscale)
        expected = gaussian(x, y, scale)
        assert np.abs(kernel(x, y) - expected).max() < 1e-6
        assert np.abs(kernel.matmul(x, y, v) - expected @ v).max() < 1e-6 * np.abs(v).sum()
        tensor = nf.kernels.Gaussian(torch.as_tensor(lengthscale))(torch.from_numpy(x), torch.from_numpy(y))
        assert np.abs(tensor.numpy() - expected).max() < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 17, 128])
def test_tight_clusters_far_apart(d):
    """At the median distance as length scale (kernels.md, section 7.2) and at 1, where rows are taken as they are."""
    x = clusters(600, d).astype("float32")
    for scale in (np.sqrt(np.median(squares(wide(x), wide(x))) / 2), 1.0):
        assert np.abs(nf.gram(x, lengthscale=scale) - gaussian(x, None, scale)).max() < 1e-6


# One length scale for every coordinate divides the points.
DIFFERENCES = "division by the length scales rounds the rows before their differences are taken"
ARD = [False, pytest.param(True, marks=pytest.mark.xfail(strict=True, reason=DIFFERENCES))]


@pytest.mark.parametrize("ard", ARD)
@pytest.mark.parametrize("d", [3, 17, 128])
def test_length_scale_of_tight_clusters(d, ard):
    x = clusters(600, d).astype("float32")
    scale = 1.3e-2 * np.sqrt(d)
    values = nf.gram(x, lengthscale=np.full(d, scale) if ard else scale)
    assert np.abs(values - gaussian(x, None, scale)).max() < 1e-6


@pytest.mark.parametrize("d", [3, 64])
def test_far_points_are_zeros(d):
    """exp of a large negative number would be denormal, and every operation that meets one costs a hundred cycles."""
    x, v = points(1500, d, "float32"), np.ones((1500, 1), np.float32)
    kernel = nf.kernels.Gaussian(1.0)
    far = nf.gram(1000 * x[:200])
    assert np.array_equal(far, np.eye(200, dtype=np.float32))
    assert not kernel.matmul(1000 * x, 1000 * x + np.float32(1e6), v).any()
    for scale in (3, 8, 11, 13, 15, 100):  # d^2 / 2 around 87 to 104 at some of them, whatever d
        values = kernel(np.float32(scale / np.sqrt(d)) * x)
        assert np.all((values == 0) | (values >= np.finfo(np.float32).tiny))


@pytest.mark.isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [3, 40])
def test_bad_rows_touch_only_their_own_results(bad, d):
    x, y, v = points(53, d, "float32"), points(70, d, "float32", seed=1), points(70, 3, "float32")
    for kernel in (nf.kernels.Gaussian(), nf.kernels.Gaussian(np.sqrt(d))):
        dirty = x.copy()
        dirty[[0, 31, 40], [0, 1, d - 1]] = bad
        good = np.setdiff1d(np.arange(53), [0, 31, 40])
        clean = kernel(x[good], y)
        assert np.allclose(kernel(dirty, y)[good], clean, rtol=1e-5, atol=1e-7)
        assert np.allclose(kernel.matmul(dirty, y, v)[good], clean @ v, rtol=1e-4, atol=1e-5)
        assert np.allclose(kernel(y, dirty)[:, good], clean.T, rtol=1e-5, atol=1e-7)
        if np.isnan(bad):
            assert np.isnan(kernel(dirty, y)[[0, 31, 40]]).all()
            assert np.isnan(kernel.matmul(dirty, y, v)[[0, 31, 40]]).all()
        torn = v.copy()
        torn[5, 1] = bad
        kept = kernel.matmul(x, y, torn)[:, [0, 2]]
        assert np.isfinite(kept).all()


def test_layouts():
    x, y, v = points(34, 6, "float32"), points(50, 6, "float32", seed=1), points(50, 5, "float32", seed=2)
    kernel = nf.kernels.Gaussian()
    expected = kernel.matmul(x, y, v)
    for name in layouts(x):
        parts = (layouts(z)[name] for z in (x, y, v))
        assert same_bits(kernel.matmul(*parts), expected), name
        assert same_bits(kernel(layouts(x)[name], y), kernel(x, y)), name


# ---- gradients -------------------------------------------------------------------------------------------------------


def torch_gaussian(x, y, lengthscale):
    return torch.exp(-((x[..., :, None, :] - y[..., None, :, :]) / lengthscale).square().sum(-1) / 2)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("ard", [False, True])
def test_gradients(dtype, d, ard):
    n, m = 130, 61
    base = np.sqrt(d) * (np.linspace(0.8, 1.2, d) if ard else 1.1)
    for r in (1, 5) if d < 40 else (5,):
        x, y, v = (
            of_kind("torch", points(*shape, seed=seed), dtype) for seed, shape in enumerate([(n, d), (m, d), (m, r)])
        )
        scale = torch.tensor(base, dtype=torch.float64 if dtype == "float64" else torch.float32)
        upstream = torch.from_numpy(rng(d).standard_normal((n, r)))
        weights = torch.from_numpy(rng(d, 1).standard_normal((n, m)))
        for f, reference in (
            (
                lambda x, y, v, s: (nf.kernels.Gaussian(s).matmul(x, y, v) * upstream).sum(),  # noqa: B023
                lambda x, y, v, s: (torch_gaussian(x, y, s) @ v * upstream).sum(),  # noqa: B023
            ),
            (
                lambda x, y, v, s: (nf.kernels.Gaussian(s)(x, y) * weights).sum() + 0 * v.sum(),  # noqa: B023
                lambda x, y, v, s: (torch_gaussian(x, y, s) * weights).sum() + 0 * v.sum(),  # noqa: B023
            ),
            (
                lambda x, y, v, s: (nf.kernels.Gaussian(s).matmul(y, None, v) * upstream[:m]).sum() + 0 * x.sum(),  # noqa: B023
                lambda x, y, v, s: (torch_gaussian(y, y, s) @ v * upstream[:m]).sum() + 0 * x.sum(),  # noqa: B023
            ),
        ):
            own = [t.clone().requires_grad_() for t in (x, y, v, scale)]
            other = [t.double().clone().requires_grad_() for t in (x, y, v, scale)]
            actual = torch.autograd.grad(f(*own), own)
            expected = torch.autograd.grad(reference(*other), other)
            for a, e, t in zip(actual, expected, own, strict=True):
                assert a.dtype == t.dtype
                assert_gradient(a, e, GRADIENT[dtype], STEP[dtype] if t is not own[3] else 0.0)


def test_gradients_far_from_the_origin():
    """The gradient of the length scale is a sum over rows times coordinates: without a centre the offset cancels in it."""
    x, y, v = (torch.from_numpy(points(n, d)).float() for n, d in ((120, 5), (90, 5), (90, 2)))
    x, y = x + 100, y + 100
    for base in (1.7, np.linspace(1, 2, 5)):
        scale = torch.tensor(base, dtype=torch.float32)
        own = [t.clone().requires_grad_() for t in (x, y, v, scale)]
        other = [t.double().clone().requires_grad_() for t in (x, y, v, scale)]
        actual = torch.autograd.grad(nf.kernels.Gaussian(own[3]).matmul(*own[:3]).square().sum(), own)
        expected = torch.autograd.grad((torch_gaussian(*other[:2], other[3]) @ other[2]).square().sum(), other)
        for a, e in zip(actual, expected, strict=True):
            assert_gradient(a, e, GRADIENT["float32"])


@pytest.mark.parametrize(
    ("d", "ard"),
    [
        (40, False),
        pytest.param(40, True, marks=pytest.mark.xfail(strict=True, reason=DIFFERENCES)),
        pytest.param(3, True, marks=pytest.mark.xfail(strict=True, reason=DIFFERENCES)),
        # Up to 16 dimensions gradients take differences of rows that have been centred, which rounds some of them.
        pytest.param(3, False, marks=pytest.mark.xfail(strict=True, reason="the common centre rounds the rows")),
    ],
)
def test_gradients_of_tight_clusters(d, ard):
    x = torch.from_numpy(clusters(200, d).astype("float32"))
    v = torch.from_numpy(points(200, 1, "float32"))
    scale = 1e-2 * np.sqrt(d)
    own, other = x.clone().requires_grad_(), x.double().clone().requires_grad_()
    kernel = nf.kernels.Gaussian(np.full(d, scale) if ard else scale)
    (actual,) = torch.autograd.grad(kernel.matmul(own, None, v).sum(), own)
    (expected,) = torch.autograd.grad((torch_gaussian(other, other, scale) @ v.double()).sum(), other)
    assert_gradient(actual, expected, GRADIENT["float32"])


def test_second_derivatives():
    x, y, v = (torch.from_numpy(points(n, d)) for n, d in ((7, 3), (5, 3), (5, 2)))
    scale = torch.tensor(1.7, dtype=torch.float64)
    arguments = [t.clone().requires_grad_() for t in (x, y, v, scale)]
    torch.autograd.gradcheck(lambda x, y, v, s: nf.kernels.Gaussian(s).matmul(x, y, v), arguments)
    torch.autograd.gradgradcheck(lambda x, y, v, s: nf.kernels.Gaussian(s).matmul(x, y, v), arguments)
    torch.autograd.gradgradcheck(lambda x, s: nf.kernels.Gaussian(s)(x), [arguments[0], arguments[3]])


# ---- threads, bad input ----------------------------------------------------------------------------------------------


def test_threads_change_no_bit(threads):
    for n, m, d, r in ((5, 3000, 20, 1), (700, 300, 3, 2), (300, 700, 40, 6)):
        x, y, v = (torch.from_numpy(points(*s, "float32")) for s in ((n, d), (m, d), (m, r)))
        kernel = nf.kernels.Gaussian(2.0)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            own = [t.clone().requires_grad_() for t in (x, y, v)]
            product = kernel.matmul(*own)
            results.append([kernel(x), kernel(x, y), product, *torch.autograd.grad(product.square().sum(), own)])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [0, -1, 0.0, np.nan, np.inf, np.array([1.0, 0.0, 2.0]), np.ones((2, 3)), [1.0, -1.0]])
def test_lengthscale(bad):
    with pytest.raises(ValueError, match=r"^lengthscale: expected a positive number or \(d,\) of them, got"):
        nf.kernels.Gaussian(bad)
    with pytest.raises(ValueError, match=r"^lengthscale: "):
        nf.gram(points(4, 3), lengthscale=bad)


@pytest.mark.parametrize("bad", ["one", None, {}, 1j, "1", b"1", np.array(["1"])])
def test_lengthscale_that_is_no_number(bad):
    with pytest.raises(ValueError, match=r"^lengthscale: expected a positive number"):
        nf.kernels.Gaussian(bad)


def test_bad_input():
    x = points(5, 3, "float32")
    t = torch.from_numpy(x)
    kernel = nf.kernels.Gaussian(2.0)
    for call, error, message in (
        (lambda: nf.kernels.Gaussian(np.ones(2))(x), ValueError, "lengthscale: expected a number or shape (3,)"),
        (lambda: nf.kernels.Gaussian(torch.ones(2))(t), ValueError, "lengthscale: expected a number or shape (3,)"),
        (lambda: nf.kernels.Gaussian(torch.ones(()))(x), TypeError, "lengthscale: a torch.Tensor"),
        (lambda: nf.gram(x, kernel="unknown"), ValueError, "kernel: expected one of gaussian, rbf"),
        (lambda: nf.gram(x, kernel=None), TypeError, "kernel: expected a name or a kernel object, got NoneType"),
        (
            lambda: nf.gram(x, kernel=nf.kernels.Gaussian),
            TypeError,
            "kernel: expected a name or a kernel object, got the",
        ),
        (lambda: nf.gram(x, kernel=nf.kernels.Gaussian(), gamma=1), TypeError, "params: not with a kernel object"),
        (lambda: nf.gram(x, kernel="gaussian", gamma=1), TypeError, "params: "),
        (lambda: nf.gram(x, kernel="rbf", gamma=1, lengthscale=1), TypeError, "params: "),
        (lambda: nf.gram(x, kernel="rbf", gamma=-1), ValueError, "gamma: expected a positive number"),
        (lambda: nf.gram(x, kernel="rbf", gamma=0), ValueError, "gamma: "),
        (lambda: nf.gram(x, kernel="rbf", gamma=np.nan), ValueError, "gamma: "),
        (lambda: nf.gram(x, kernel="rbf", gamma=np.inf), ValueError, "gamma: "),
        (lambda: nf.gram(x, kernel="rbf", gamma="scale"), TypeError, "gamma: expected a number"),
        (lambda: nf.gram(x[0], kernel="rbf"), ValueError, "x: expected shape (..., n, d), got (3,)"),
        (lambda: nf.gram(x[0, 0, None].reshape(()), kernel="rbf"), ValueError, "x: expected shape"),
        (lambda: nf.gram(x[:, :0], kernel="rbf"), ValueError, "x: expected at least one column"),
        (lambda: nf.gram([[1.0]]), TypeError, "x: expected a NumPy"),
        (lambda: nf.gram(x.astype(int)), TypeError, "x: expected a floating dtype"),
        (lambda: kernel(x, t), TypeError, "y: expected a numpy array to match x, got torch"),
        (lambda: kernel(x, x[:, :2]), ValueError, "y: expected 3 columns"),
        (lambda: kernel.diag(x[0]), ValueError, "x: expected shape"),
        (lambda: kernel.matmul(x, x, x[:4]), ValueError, "v: expected 5 rows to match y, got shape (4, 3)"),
        (lambda: kernel.matmul(x, x, x[:4, 0]), ValueError, "v: expected 5 rows to match y, got shape (4,)"),
        (lambda: kernel.matmul(x, x, np.zeros((), np.float32)), ValueError, "v: expected 5 rows"),
        (lambda: kernel.matmul(x, x, np.ones((2, 5, 1), "float32")), ValueError, "v: expected batch dimensions"),
        (lambda: kernel.matmul(x[None], x, np.ones((2, 5, 1), "float32")), ValueError, "v: expected batch dimensions"),
        (lambda: kernel.matmul(x, x, x.astype(np.float64)), TypeError, "v: expected dtype float32 to match x"),
        (lambda: kernel.matmul(x, x, None), TypeError, "v: expected a NumPy"),
        (lambda: kernel.matmul(x, None, [1.0] * 5), TypeError, "v: expected a NumPy"),
        (lambda: kernel.matmul(x, None, t), TypeError, "v: expected a numpy array to match x"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)


def test_attributes_are_set_once():
    kernel = nf.kernels.Gaussian(2.0)
    with pytest.raises(AttributeError, match="^lengthscale: a kernel is an immutable value"):
        kernel.lengthscale = 3.0
    x = points(7, 3)
    assert same_bits(kernel(x), nf.kernels.Gaussian(2.0)(x))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_kept_program_is_that_of_any_points(kind):
    """A kernel that was called before gives what a new one does: other columns and dtype, a length scale changed since."""
    k, length = nf.kernels, of_kind(kind, np.ones(1), "float64")
    for make in (
        lambda: k.Gaussian(2.0) + 0.5 * k.Linear(1.0) ** 2,
        lambda: k.Polynomial(2),  # whose gamma is one over the columns
        lambda: k.RationalQuadratic(2.0, 3.0),
        lambda: k.Gaussian(2.0) * k.Cosine(),
        lambda: k.Gaussian(length) + k.Matern(0.5),
    ):
        kernel = make()
        for d, dtype in ((3, "float32"), (5, "float64"), (3, "float64")):
            length[:] = d
            x = of_kind(kind, points(7, d, seed=d), dtype)
            assert same_bits(kernel(x), make()(x))
