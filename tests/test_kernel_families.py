"""Every family of kernels and kernels composed of them, against their formulas in float64; the Gaussian has more in
test_kernels.py.
"""

import numpy as np
import pytest
import torch
from generators import GRADIENT, STEP, assert_gradient, assert_value, numpy_of, of_kind, points, rng
from references import KINDS, same_bits, wide
from test_kernels import EPS

import nearfar as nf
from nearfar.kernels.named import by_name

k = nf.kernels

# ---- the formulas, in plain torch ------------------------------------------------------------------------------------


def squares(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def root(s):
    """The square root whose derivative at 0 is 0."""
    return torch.where(s > 0, torch.where(s > 0, s, 1.0).sqrt(), 0.0)


def matern(nu):
    def value(x, y, scale):
        t = root(2 * nu * squares(x / scale, y / scale))
        return {0.5: 1, 1.5: 1 + t, 2.5: 1 + t + t**2 / 3}[nu] * torch.exp(-t)

    return value


def cosine(x, y):
    unit = [z / torch.where((z == 0).all(-1, keepdim=True), 1.0, z.norm(dim=-1, keepdim=True)) for z in (x, y)]
    return unit[0] @ unit[1].mT


def gaussian(x, y, scale):
    return torch.exp(-squares(x / scale, y / scale) / 2)


def laplacian(x, y, scale):
    return torch.exp(-((x.unsqueeze(-2) - y.unsqueeze(-3)) / scale).abs().sum(-1))


def periodic(x, y, scale, period):
    sine = torch.sin(torch.pi * (x.unsqueeze(-2) - y.unsqueeze(-3)) / period) / scale
    return torch.exp(-2 * sine.square().sum(-1))


def rational_quadratic(x, y, scale, alpha):
    return torch.exp(-alpha * torch.log1p(squares(x / scale, y / scale) / (2 * alpha)))


# name -> (kernel of hyper-parameters, formula of points and hyper-parameters, their values at d dimensions)
FAMILIES = {
    "gaussian": (k.Gaussian, gaussian, lambda d: [d**0.5]),
    "laplacian": (k.Laplacian, laplacian, lambda d: [1.0 * d]),
    "laplacian ard": (k.Laplacian, laplacian, lambda d: [np.linspace(0.8, 1.5, d) * d]),
    "matern 1/2": (lambda s: k.Matern(s, 0.5), matern(0.5), lambda d: [d**0.5]),
    "matern 3/2": (lambda s: k.Matern(s, 1.5), matern(1.5), lambda d: [d**0.5]),
    "matern 5/2": (k.Matern, matern(2.5), lambda d: [d**0.5]),
    "matern 5/2 ard": (k.Matern, matern(2.5), lambda d: [np.linspace(0.8, 1.5, d) * d**0.5]),
    "rational quadratic": (k.RationalQuadratic, rational_quadratic, lambda d: [d**0.5, 1.0]),
    "rational quadratic 0.7": (k.RationalQuadratic, rational_quadratic, lambda d: [d**0.5, 0.7]),
    "periodic": (k.Periodic, periodic, lambda d: [d**0.5, 2.3]),
    "linear": (k.Linear, lambda x, y, b: x @ y.mT + b, lambda d: [0.5]),
    "polynomial": (
        lambda g, c: k.Polynomial(3, g, c), lambda x, y, g, c: (g * (x @ y.mT) + c) ** 3, lambda d: [1 / d, 0.5],
    ),
    "degree 1": (
        lambda g, c: k.Polynomial(1, g, c), lambda x, y, g, c: g * (x @ y.mT) + c, lambda d: [1 / d, 0.5],
    ),
    "sigmoid": (k.Sigmoid, lambda x, y, g, c: torch.tanh(g * (x @ y.mT) + c), lambda d: [1 / d, 0.5]),
    "cosine": (k.Cosine, cosine, lambda d: []),
    "one score": (
        lambda s, c: c * k.Gaussian(s) + k.Matern(s, 1.5) * k.RationalQuadratic(s) + k.Gaussian(s) ** 3,
        lambda x, y, s, c: (
            c * gaussian(x, y, s) + matern(1.5)(x, y, s) * rational_quadratic(x, y, s, 1.0) + gaussian(x, y, s) ** 3
        ),
        lambda d: [d**0.5, 0.3],
    ),
    "five scores": (
        lambda s, a, b: (
            k.Gaussian(s) * k.Linear(b) ** 2 + k.Cosine() * k.Laplacian(s) + k.Matern(a) + k.Gaussian(s) * k.Matern(a)
        ),
        lambda x, y, s, a, b: (
            gaussian(x, y, s) * (x @ y.mT + b) ** 2 + cosine(x, y) * laplacian(x, y, s)
            + matern(2.5)(x, y, a) * (1 + gaussian(x, y, s))
        ),
        lambda d: [1.0 * d, np.linspace(0.8, 1.5, d) * d**0.5, 0.5],
    ),
}  # fmt: skip


def reference(name, x, y, values):
    """The Gram matrix in float64."""
    double = [torch.from_numpy(np.array(wide(z), np.float64)) for z in (x, y)]
    return FAMILIES[name][1](*double, *(torch.as_tensor(value, dtype=torch.float64) for value in values)).numpy()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("d", [1, 3, 17])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_and_product(name, d):
    make, _, defaults = FAMILIES[name]
    kernel = make(*defaults(d))
    for kind, dtype in KINDS:
        # Bending into circles rounds coordinates to the step of the dtype that computes.
        bound = EPS[dtype] * (6 + np.sqrt(d)) * (4 if name == "periodic" else 1)
        for n, m in ((1, 1), (3, 700), (130, 49)):
            x, y = (of_kind(kind, points(size, d, seed=seed), dtype) for seed, size in enumerate((n, m)))
            expected = reference(name, x, y, defaults(d))
            size = max(1.0, np.abs(expected).max())
            dense = kernel(x, y)
            assert type(dense) is type(x)
            assert str(dense.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
            assert np.abs(numpy_of(dense) - expected).max() < bound * size
            for r in (1, 2, 7):
                v = of_kind(kind, rng(m, r).standard_normal((m, r)), dtype)
                error = np.abs(numpy_of(kernel.matmul(x, y, v)) - expected @ wide(v).astype(float))
                limit = (bound + EPS[dtype] * np.sqrt(m)) * size * np.abs(wide(v)).sum(0).astype(float)
                assert np.all(error <= limit)


@pytest.mark.isa
@pytest.mark.parametrize("name", FAMILIES)
def test_one_set(name):
    """Exactly symmetric; ones on the diagonal of a normalised kernel; `diag` is the diagonal."""
    for d in (3, 40):
        kernel = FAMILIES[name][0](*FAMILIES[name][2](d))
        for dtype in ("float32", "float64"):
            x = points(131, d, dtype)
            x[7] = 0
            gram, diag = kernel(x), kernel.diag(x)
            assert same_bits(gram, np.ascontiguousarray(gram.T))
            assert diag.dtype == gram.dtype
            np.testing.assert_allclose(gram.diagonal(), diag, rtol=20 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)
            if isinstance(kernel, k.families._Stationary | k.Periodic):
                assert np.all(gram.diagonal() == 1)
            if name == "cosine":
                assert np.all(gram.diagonal() == (np.arange(131) != 7))
            product = kernel.matmul(x, None, x[:, :2])
            np.testing.assert_allclose(product, gram @ x[:, :2], rtol=1e-4, atol=2e-5 * np.abs(gram).max())
            x[5, -1] = np.nan
            assert np.array_equal(np.isnan(kernel.diag(x)), np.isnan(kernel(x).diagonal()))


SUMS_OF_SCORES = {
    "linear": (lambda: k.Linear(0.5), lambda x, y: x @ y.mT + 0.5),
    "two": (lambda: 2 * k.Linear() + 0.5 * k.Cosine(), lambda x, y: 2 * x @ y.mT + 0.5 * cosine(x, y)),
    "by coordinate": (
        lambda: k.AdditiveChiSquared() + k.Linear(),
        lambda x, y: x @ y.mT - ((x[:, None] - y) ** 2 / (x[:, None] + y)).sum(-1),
    ),
}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 7, 5), (33, 130, 40)])
@pytest.mark.parametrize("name", SUMS_OF_SCORES)
def test_gradients_of_sums_of_scores(name, shape, dtype):
    """Weights of pairs are the same whatever the scores are, which then nobody computes."""
    build, formula = SUMS_OF_SCORES[name]
    n, m, d = shape
    x, y = (abs(points(rows, d, seed=rows)).astype(dtype) + 1 for rows in (n, m))
    own = [torch.from_numpy(z).requires_grad_() for z in (x, y)]
    exact = [torch.from_numpy(z.astype("float64")).requires_grad_() for z in (x, y)]
    upstream, v = (torch.from_numpy(rng(3).standard_normal(size)) for size in ((n, m), (m, 2)))
    for ours, theirs in (
        (build()(*own), formula(*exact)),
        (build().matmul(*own, v.to(own[0].dtype)), formula(*exact) @ v),
    ):
        weights = upstream if ours.shape == upstream.shape else upstream[:, :1]
        found = torch.autograd.grad(ours, own, weights.to(ours.dtype).expand_as(ours))
        wanted = torch.autograd.grad(theirs, exact, weights.expand_as(theirs))
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).norm() <= 16 * EPS[dtype] * b.norm() + 16 * EPS[dtype] * d


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_shapes_and_empty_sets(kind):
    kernel = k.Matern(np.array([1.0, 2.0, 3.0, 4.0])) + k.Linear() * k.Laplacian(3.0)
    x, y = of_kind(kind, rng(1).standard_normal((2, 1, 6, 4))), of_kind(kind, rng(2).standard_normal((3, 7, 4)))
    v = of_kind(kind, rng(3).standard_normal((7, 2)))
    dense = kernel(x, y)
    assert dense.shape == (2, 3, 6, 7)
    for i in range(2):
        for j in range(3):
            assert np.allclose(numpy_of(dense[i, j]), numpy_of(kernel(x[i, 0], y[j])), rtol=1e-12)
    assert np.allclose(numpy_of(kernel.matmul(x, y, v)), numpy_of(dense @ v), rtol=1e-12)
    assert kernel.diag(x).shape == (2, 1, 6)
    none = y[0, :0]
    assert kernel(none).shape == (0, 0)
    assert kernel(y, none).shape == (3, 7, 0)
    assert kernel.matmul(none, y[0], v).shape == (0, 2)
    assert not numpy_of(kernel.matmul(y[0], none, v[:0])).any()


@pytest.mark.isa
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_cosine_of_rows_of_any_norm(size):
    """Squares leave the range of floats; norms do not."""
    x, y = points(37, 20), points(30, 20, seed=1)
    for dtype in ("float32", "float64"):
        factor = size if dtype == "float32" else size**10
        own = torch.from_numpy((factor * x).astype(dtype)).requires_grad_()
        other = torch.from_numpy(x).requires_grad_()
        gram, expected = k.Cosine()(own, torch.from_numpy(y.astype(dtype))), cosine(other, torch.from_numpy(y))
        assert torch.allclose(gram.double(), expected, rtol=0, atol=8 * EPS[dtype])
        actual, wanted = (torch.autograd.grad(g.square().sum(), z)[0] for g, z in ((gram, own), (expected, other)))
        assert torch.allclose(actual.double() * factor, wanted, rtol=0, atol=1e3 * EPS[dtype])


def test_gradients_of_zero_rows_by_cosines():
    """A zero row has no direction: its cosines are 0, with zero derivatives, and so are those of columns that are 0."""
    x, y, v = (torch.from_numpy(points(n, 5, seed=n)) for n in (9, 7, 7))
    x[2] = 0
    y[4, :3] = 0
    own = [t.clone().requires_grad_() for t in (x, y)]
    gram, product = k.Cosine()(*own), k.Cosine().matmul(*own, v)
    assert not gram[2].any()
    for dx in (torch.autograd.grad(z.sum(), own[0])[0] for z in (gram, product, k.Cosine()(own[0]))):
        assert dx.isfinite().all()
        assert not dx[2].any()
    # Of some columns, as where kernels of different points lie side by side.
    text = "unit_dot 1 3; unit_dot 0 -1; multiply 0 1"
    arrays = [t.clone().requires_grad_() for t in (x, y)]
    apply = nf.autograd.apply("gram", (*arrays, torch.zeros(0, dtype=torch.float64)), (text,))
    expected = k.Cosine()(own[0][:, 1:3], own[1][:, 1:3]) * k.Cosine()(*own)
    assert torch.allclose(apply, expected, rtol=1e-12, atol=1e-15)
    weights = torch.from_numpy(points(9, 7, seed=3))
    for a, e in zip(
        torch.autograd.grad((apply * weights).sum(), arrays),
        torch.autograd.grad((expected * weights).sum(), own),
        strict=True,
    ):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-14)
        assert a.isfinite().all()


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_bad_rows_touch_only_their_own_results(name, d):
    kernel = FAMILIES[name][0](*FAMILIES[name][2](d))
    x, y, v = points(53, d, "float32"), points(70, d, "float32", seed=1), points(70, 3, "float32")
    good = np.setdiff1d(np.arange(53), [0, 31])
    expected = kernel(x, y)
    for bad in (np.nan, np.inf):
        dirty = x.copy()
        dirty[[0, 31], [0, d - 1]] = bad
        with np.errstate(invalid="ignore"):
            dense, product = kernel(dirty, y), kernel.matmul(dirty, y, v)
        size = np.abs(expected).max()
        assert np.allclose(dense[good], expected[good], rtol=1e-4, atol=1e-5 * size)
        assert np.allclose(product[good], expected[good] @ v, rtol=1e-3, atol=1e-4 * size)
        if np.isnan(bad):
            assert np.isnan(dense[[0, 31]]).all()
            assert np.isnan(product[[0, 31]]).all()


@pytest.mark.isa
def test_float32_product_of_many_columns():
    """Within 1e-5 of float64, relative to |K| |v|, at a size where sums are long."""
    x, y, v = points(8, 20, "float32"), points(20000, 20, "float32", seed=1), points(20000, 1, "float32")
    for name in ("matern 5/2", "rational quadratic 0.7", "periodic", "one score", "polynomial", "laplacian"):
        make, _, defaults = FAMILIES[name]
        expected = reference(name, x, y, defaults(20))
        error = np.abs(make(*defaults(20)).matmul(x, y, v) - expected @ v.astype(float))
        assert np.all(error < 1e-5 * (np.abs(expected) @ np.abs(v)).max()), name


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("d", "offset"), [(3, 0.0), (3, 10.0), (20, 10.0)])
def test_low_precision_gram_is_semi_definite(dtype, d, offset):
    """Norms come from the rounded points, so rounding them is a perturbation of the points: any Mercer kernel's matrix
    stays semi-definite to the noise of float32. With norms of the points before rounding the Gaussian's least
    eigenvalue is -25 at d = 3, offset 10 (N = 2000).
    """
    x = torch.from_numpy(points(400, d) + offset).to(getattr(torch, dtype))
    for kernel in (
        k.Gaussian(), k.Laplacian(2.0), k.Matern(nu=0.5), k.Matern(nu=1.5), k.Matern(), k.RationalQuadratic(),
        k.Periodic(), k.Linear(), k.Polynomial(2), k.Cosine(), k.Gaussian() * k.Linear() + 0.5 * k.Matern() ** 2,
    ):  # fmt: skip
        values = np.linalg.eigvalsh(kernel(x).double().numpy())
        assert values[0] > -10 * np.finfo(np.float32).eps * values[-1], kernel


SYMMETRIC = (
    "gaussian", "laplacian", "matern 5/2 ard", "periodic", "linear", "cosine", "one score", "five scores",
)  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_product(name, threads):
    """From 1024 rows on, few columns times K(x, x) take half the pairs: each serves its row and its column."""
    for n, d, dtype in ((4096, 3, "float32"), (4097, 20, "float64"), (8209, 3, "float32")):
        kernel = FAMILIES[name][0](*FAMILIES[name][2](d))
        x, v = points(n, d, dtype), points(n, 1, dtype, seed=5)
        rows = np.r_[0:3, 126:130, 2043:2049, n - 3 : n]
        block = kernel(x[rows].astype("float64"), x.astype("float64"))
        results = []
        for count in (1, 2, 3, 7) if n == 4097 else (2,):
            threads(count)
            results.append(kernel.matmul(x, None, v))
        assert all(same_bits(results[0], other) for other in results[1:])
        error = np.abs(results[0][rows] - block @ v.astype("float64"))
        # As in test_dense_and_product, whose points have no common centre either.
        bound = EPS[dtype] * (6 + np.sqrt(d) + np.sqrt(n)) * (4 if name == "periodic" else 1)
        assert np.all(error <= bound * max(1.0, np.abs(block).max()) * np.abs(v).sum())
        assert np.allclose(
            results[0], kernel.matmul(x, x.copy(), v), rtol=0, atol=bound * np.abs(block).max() * np.abs(v).sum()
        )


def test_bad_rows_of_a_symmetric_product():
    """NaN in a point touches every sum that it enters with a weight; in a weight, every sum; infinity is far from all."""
    x, v = points(4100, 3, "float32"), points(4100, 1, "float32", seed=1)
    kernel = k.Matern()
    expected = kernel.matmul(x, None, v)
    dirty = x.copy()
    dirty[[5, 4099]] = np.inf
    clean = np.setdiff1d(np.arange(4100), [5, 4099])
    with np.errstate(invalid="ignore"):
        product = kernel.matmul(dirty, None, v)
    others = expected - kernel(x, x[[5, 4099]]) @ v[[5, 4099]]
    assert np.allclose(product[clean], others[clean], atol=1e-3)
    dirty[[5, 4099]] = np.nan
    assert np.isnan(kernel.matmul(dirty, None, v)).all()
    v[17] = np.nan
    assert np.isnan(kernel.matmul(x, None, v)).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


def parameter_floors(formula, x, y, v, *values):
    """The gradient of a parameter is a sum over all pairs, of any sign: rounding is measured by the terms' size."""
    floors = []
    for at in range(len(values)):

        def of_one(p, at=at):
            return formula(x.detach(), y.detach(), *values[:at], p, *values[at + 1 :])

        _, terms = torch.autograd.functional.jvp(of_one, values[at].detach(), torch.ones_like(values[at]))
        floors.append(float(terms.abs().sum()))
    return floors


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name, dtype):
    make, formula, defaults = FAMILIES[name]
    for d in (3, 17):
        n, m = 130, 61
        x, y, v = (
            of_kind("torch", points(*shape, seed=seed), dtype) for seed, shape in enumerate([(n, d), (m, d), (m, 2)])
        )
        upstream = torch.from_numpy(rng(d).standard_normal((n, 2)))
        weights = torch.from_numpy(rng(d, 1).standard_normal((n, m)))
        values = [torch.as_tensor(value, dtype=torch.float64) for value in defaults(d)]
        for f, reference in (
            (lambda x, y, v, *p: (make(*p).matmul(x, y, v) * upstream).sum(),  # noqa: B023
             lambda x, y, v, *p: (formula(x, y, *p) @ v * upstream).sum()),  # noqa: B023
            (lambda x, y, v, *p: (make(*p)(x, y) * weights).sum() + 0 * v.sum(),  # noqa: B023
             lambda x, y, v, *p: (formula(x, y, *p) * weights).sum() + 0 * v.sum()),  # noqa: B023
            (lambda x, y, v, *p: (make(*p)(y) * weights[:m]).sum() + 0 * x.sum() + 0 * v.sum(),  # noqa: B023
             lambda x, y, v, *p: (formula(y, y, *p) * weights[:m]).sum() + 0 * x.sum() + 0 * v.sum()),  # noqa: B023
        ):  # fmt: skip
            own = [t.clone().requires_grad_() for t in (x, y, v, *values)]
            other = [t.double().clone().requires_grad_() for t in (x, y, v, *values)]
            actual = torch.autograd.grad(f(*own), own)
            expected = torch.autograd.grad(reference(*other), other)
            floors = [0.0] * 3 + parameter_floors(formula, *other)
            for a, e, t, floor in zip(actual, expected, own, floors, strict=True):
                assert a.dtype == t.dtype
                assert_gradient(a, e, GRADIENT[dtype], STEP[dtype] if t.dtype == x.dtype else 0.0, floor)


def test_gradient_of_a_large_alpha():
    """d k / d alpha = k (u + log(1 - u)), u = z / (1 + z), cancels to the digits of u^2 where z = r / (2 alpha) is small."""
    x, y = (torch.from_numpy(points(n, 3)).float() for n in (60, 50))
    for alpha in (0.1, 3.0, 1e2, 1e4):
        own = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        (actual,) = torch.autograd.grad(k.RationalQuadratic(1.0, own)(x, y).sum(), own)
        z = squares(x.double(), y.double()) / (2 * alpha)
        u = z / (1 + z)
        series = -sum(u**p / p for p in range(2, 40))
        slope = torch.where(u < 0.5, series, u - torch.log1p(z))
        expected = (torch.exp(-alpha * torch.log1p(z)) * slope).sum()
        assert abs(actual - expected) < 1e-5 * abs(expected), alpha


@pytest.mark.parametrize("wanted", ["x", "y", "v", "s", "xy", "ys"])
def test_gradients_one_by_one(wanted):
    """Only what is asked for is computed; it is the same."""
    tensors = dict(zip("xyv", (torch.from_numpy(points(n, d)) for n, d in ((40, 5), (30, 5), (30, 2))), strict=True))
    tensors["s"] = torch.tensor(1.7, dtype=torch.float64)

    def gradients(names):
        own = {name: t.clone().requires_grad_(name in names) for name, t in tensors.items()}
        kernel = k.Matern(own["s"]) + k.Laplacian(own["s"])
        total = kernel.matmul(own["x"], own["y"], own["v"]).square().sum()
        if "v" not in names:
            total = total + kernel(own["x"], own["y"]).square().sum()
        total.backward()
        return {name: t.grad for name, t in own.items()}

    some, every = gradients(wanted), gradients("xys" + ("v" if "v" in wanted else ""))
    for name in "xyvs":
        assert (some[name] is not None) == (name in wanted)
        assert name not in wanted or torch.allclose(some[name], every[name], rtol=1e-12)


def leaves(*values):
    return [torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_() for value in values]


@pytest.mark.parametrize("name", FAMILIES)
def test_first_and_second_derivatives(name):
    make, _, defaults = FAMILIES[name]
    x, y, v = points(4, 2), points(3, 2, seed=1), points(3, 1, seed=2)
    p = leaves(*defaults(2))
    product = lambda x, y, v, *p: make(*p).matmul(x, y, v)  # noqa: E731
    assert torch.autograd.gradcheck(product, [*leaves(x, y, v), *p])
    assert torch.autograd.gradgradcheck(product, [*leaves(x, y, v), *p])
    assert torch.autograd.gradgradcheck(lambda x, *p: make(*p)(x), [*leaves(x), *p], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, y, *p: make(*p)(x, y), [*leaves(x, y), *p], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *p: make(*p).diag(x), [*leaves(x), *p], fast_mode=True)


@pytest.mark.parametrize("nu", [1.5, 2.5])
def test_second_derivative_of_coincident_points(nu):
    """d^2 k / dx dx^T = -3 I for nu = 3/2 and -5/3 I for 5/2 at distance 0, where square roots have no derivative."""
    (x,) = leaves(points(1, 3))
    y = x.detach().clone()
    hessian = torch.autograd.functional.hessian(lambda z: k.Matern(nu=nu)(z, y).sum(), x).reshape(3, 3)
    assert torch.allclose(hessian, -{1.5: 3, 2.5: 5 / 3}[nu] * torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", ["matern 1/2", "matern 5/2", "laplacian", "laplacian ard", "five scores"])
def test_gradients_of_equal_points_are_finite(name):
    make, _, defaults = FAMILIES[name]
    (x,) = leaves(np.repeat(points(5, 3), 3, axis=0))
    y = x.detach()[:4].clone()
    (dx,) = torch.autograd.grad(make(*defaults(3))(x, y).sum() + make(*defaults(3))(x).sum(), x)
    assert torch.isfinite(dx).all()
    if name != "five scores":  # one pair at distance 0 has gradient 0
        (dx,) = torch.autograd.grad(make(*defaults(3))(x[:1], y[:1]).sum(), x)
        assert not dx.any()


def powers(alpha):
    return lambda x, y, s: rational_quadratic(x, y, s, alpha)


def smooth_matern(nu):
    """The formula by its series at small distances, where the slope of (1 + t) exp(-t) cancels."""

    def value(x, y, scale):
        q = 2 * nu * squares(x / scale, y / scale)
        near = q < 1e-8
        t = root(torch.where(near, 0.0, q))
        far = {1.5: 1 + t, 2.5: 1 + t + t * t / 3}[nu] * torch.exp(-t)
        return torch.where(near, {1.5: 1 - q / 2 + q * root(q) / 3, 2.5: 1 - q / 6 + q * q / 24}[nu], far)

    return value


EXTREMES = {
    "gaussian": (k.Gaussian, gaussian),
    "laplacian": (k.Laplacian, laplacian),
    "matern 1/2": (lambda s: k.Matern(s, 0.5), matern(0.5)),
    "matern 3/2": (lambda s: k.Matern(s, 1.5), smooth_matern(1.5)),
    "matern 5/2": (k.Matern, smooth_matern(2.5)),
    "rational quadratic": (k.RationalQuadratic, powers(1.0)),
    "rational quadratic 0.1": (lambda s: k.RationalQuadratic(s, 0.1), powers(0.1)),  # falls so slowly that 1e-30 counts
    "rational quadratic 0.001": (lambda s: k.RationalQuadratic(s, 1e-3), powers(1e-3)),
    "periodic": (lambda s: k.Periodic(s, 2.5), lambda x, y, s: periodic(x, y, s, 2.5)),
    "two scores": (
        lambda s: k.Matern(s, 1.5) * k.Laplacian(s) + k.Linear() * k.Gaussian(s),
        lambda x, y, s: smooth_matern(1.5)(x, y, s) * laplacian(x, y, s) + x @ y.mT * gaussian(x, y, s),
    ),
}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_length_scales(name, size, dtype):
    """The identity and ones, or what slow tails leave; gradients too, beside points that coincide and large weights."""
    make, formula = EXTREMES[name]
    for d in (3, 20):
        x = torch.from_numpy(points(23, d, dtype))
        x[7] = x[2]
        v = torch.from_numpy(1e3 * points(23, 2, dtype))
        least = 1e3 * torch.finfo(x.dtype).tiny  # what underflows is 0
        for value in (size, size * np.linspace(1, 3, d)):
            scale = torch.tensor(value, dtype=torch.float64)
            own = [t.clone().requires_grad_() for t in (x, v, scale)]
            other = [t.double().clone().requires_grad_() for t in (x, v, scale)]
            gram, expected = make(own[2])(own[0]), formula(other[0], other[0], other[2])
            assert torch.allclose(gram.double(), expected, rtol=1e-5, atol=1e-5)
            if name != "two scores":
                assert (gram.diagonal() == 1).all()
            assert np.allclose(make(np.float64(value))(x.numpy()), gram.detach().numpy(), rtol=1e-6, atol=0)
            product = make(own[2]).matmul(own[0], None, own[1])
            assert torch.allclose(product.double(), expected @ other[1], rtol=1e-5, atol=1e-1)
            actual = torch.autograd.grad(product.sum() + gram.sum(), own)
            wanted = torch.autograd.grad((expected @ other[1]).sum() + expected.sum(), other)
            for a, e, floor in zip(actual, wanted, (least, least, least * max(1, 1 / size)), strict=True):
                assert ((a.double() - e).abs() <= 2e-4 * e.abs().max() + floor).all(), (value, a, e)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("name", EXTREMES)
def test_second_derivatives_at_extreme_length_scales(name, size, dtype):
    make, formula = EXTREMES[name]
    x, y = (torch.from_numpy(points(n, 3, dtype, seed=n)) for n in (5, 4))
    found = []
    for exact in (False, True):
        own = [(t.double() if exact else t).clone().requires_grad_() for t in (x, y)]
        scale = torch.tensor(size, dtype=torch.float64)
        gram = formula(*own, scale) if exact else make(scale)(*own)
        (slope,) = torch.autograd.grad(gram.square().sum(), own[0], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum() + slope.sum(), own))
    for a, e in zip(*found, strict=True):
        assert torch.allclose(a.double(), e, rtol=1e-3, atol=1e-3 * float(e.abs().max()) + 1e-30)


def test_learnable_parameters():
    """torch.nn.Parameter: a few steps of an optimiser find the kernel that made the matrix."""
    x = torch.from_numpy(points(40, 2))
    target = k.RationalQuadratic(1.5, 0.6)(x)
    log_scale, log_alpha = (torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.LBFGS([log_scale, log_alpha], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (k.RationalQuadratic(log_scale.exp(), log_alpha.exp())(x) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < 1e-8
    assert abs(log_scale.exp().item() - 1.5) < 1e-2
    assert abs(log_alpha.exp().item() - 0.6) < 1e-2


# ---- algebra, names --------------------------------------------------------------------------------------------------


def test_algebra():
    a, b = k.Gaussian(2.0), k.Linear(1.0)
    x = points(9, 3)
    for kernel, expected, text in (
        (a + b, a(x) + b(x), "Gaussian(lengthscale=2.0) + Linear(bias=1.0)"),
        (a * b, a(x) * b(x), "Gaussian(lengthscale=2.0) * Linear(bias=1.0)"),
        ((a + b) * b, (a(x) + b(x)) * b(x), "(Gaussian(lengthscale=2.0) + Linear(bias=1.0)) * Linear(bias=1.0)"),
        (2 * a, 2 * a(x), "2.0 * Gaussian(lengthscale=2.0)"),
        (a * np.float32(0.5), 0.5 * a(x), "0.5 * Gaussian(lengthscale=2.0)"),
        (np.float64(3) * (a + b), 3 * (a(x) + b(x)), "3.0 * (Gaussian(lengthscale=2.0) + Linear(bias=1.0))"),
        (b**3, b(x) ** 3, "Linear(bias=1.0) ** 3"),
        ((2 * b) ** np.int64(2), 4 * b(x) ** 2, "(2.0 * Linear(bias=1.0)) ** 2"),
        (b**1, b(x), "Linear(bias=1.0)"),
    ):
        assert repr(kernel) == text
        assert np.allclose(kernel(x), expected, rtol=1e-12)
        assert np.allclose(kernel.diag(x), expected.diagonal(), rtol=1e-12)
    t = torch.from_numpy(x)
    assert torch.allclose((torch.tensor(2.0) * a)(t), 2 * a(t))
    for bad in (
        lambda: a + 1,
        lambda: a * "2",
        lambda: a * True,
        lambda: a * np.ones(2),
        lambda: a**0.5,
        lambda: a**True,
    ):
        with pytest.raises((TypeError, ValueError)):
            bad()
    for bad in (0, -1):
        with pytest.raises(ValueError, match="^exponent: expected a positive integer, got"):
            a**bad


def test_equal_scores_are_shared():
    x = points(4, 3)
    for kernel, scores in (
        (k.Gaussian() + k.Matern(2.0) * k.RationalQuadratic(3.0, 0.5), 1),
        (k.Linear() + k.Polynomial(2) + k.Sigmoid(), 1),
        (k.Gaussian() + k.Linear() + k.Laplacian() + k.Laplacian(2.0) + k.Cosine() * k.Cosine(), 4),
        (k.Periodic(2.0, 3.0) + k.Periodic(2.0, 3.0), 1),
    ):
        text = kernel._program(x, None)[-1]
        assert (
            sum(line.split()[0] in ("dot", "unit_dot", "sqeuclidean", "absolute") for line in text.split(";")) == scores
        )


def test_too_large_a_kernel():
    kernel = k.Gaussian()
    for step in range(70):
        kernel = kernel * k.Gaussian(2.0 + step)
    with pytest.raises(ValueError, match="^kernel: expected at most 64 steps in one kernel, got 1"):
        kernel(points(3, 2))


def test_sklearn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    processes = pytest.importorskip("sklearn.gaussian_process.kernels")
    x, y = points(50, 7), points(40, 7, seed=1)
    for name, params in (
        ("linear", {}), ("poly", {}), ("polynomial", {"degree": 2, "gamma": 0.3, "coef0": 0.5}), ("rbf", {"gamma": 0.1}),
        ("laplacian", {}), ("laplacian", {"gamma": 0.2}), ("sigmoid", {}), ("sigmoid", {"gamma": 0.1, "coef0": -1.0}),
        ("cosine", {}),
    ):  # fmt: skip
        for other in (y, None):
            expected = pairwise.pairwise_kernels(x, other, metric=name, **params)
            assert np.allclose(nf.gram(x, other, name, **params), expected, rtol=1e-10, atol=1e-14), name
    for name, params, other in (
        ("matern", {"lengthscale": 2.0, "nu": 1.5}, processes.Matern(2.0, nu=1.5)),
        ("rational_quadratic", {"lengthscale": 2.0, "alpha": 0.7}, processes.RationalQuadratic(2.0, 0.7)),
        ("gaussian", {"lengthscale": np.arange(1.0, 8.0)}, processes.RBF(np.arange(1.0, 8.0))),
    ):
        assert np.allclose(nf.gram(x, y, name, **params), other(x, y), rtol=1e-10)
    one = processes.ExpSineSquared(1.3, 2.0)  # Mercer in one dimension only
    assert np.allclose(nf.gram(x[:, :1], kernel="periodic", lengthscale=1.3, period=2.0), one(x[:, :1]), rtol=1e-10)


def test_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    kernel = k.Gaussian(2.0) + 0.1 * k.Linear()
    for dtype in ("float16", "float32", "float64"):
        x = points(60, 3, dtype)
        gram = kernel(x)
        for own in (x, torch.from_numpy(x).requires_grad_()):
            op = kernel.operator(own)
            assert op.shape == (60, 60)
            assert op.dtype == gram.dtype
            v = rng(1).standard_normal((60, 3))
            assert np.allclose(op @ v[:, 0], gram @ v[:, 0], rtol=1e-4, atol=1e-5)
            assert np.allclose(op @ v, gram @ v, rtol=1e-4, atol=1e-5)
            assert np.allclose(op.T @ v[:, :1], gram @ v[:, :1], rtol=1e-4, atol=1e-5)
    top = linalg.eigsh(op, 1, return_eigenvectors=False)
    assert np.allclose(top, np.linalg.eigvalsh(gram)[-1])
    with pytest.raises(ValueError, match=r"^x: expected shape \(n, d\), got \(60,\)"):
        kernel.operator(x[:, 0])


def test_bad_parameters():
    x = points(5, 3)
    tensor = torch.from_numpy(x)
    for call, error, message in (
        (lambda: k.Matern(nu=2), ValueError, "nu: expected 0.5, 1.5 or 2.5, got 2"),
        (lambda: k.Matern(-1.0), ValueError, "lengthscale: expected a positive number"),
        (lambda: k.Laplacian(np.ones(2))(x), ValueError, "lengthscale: expected a number or shape (3,)"),
        (lambda: k.RationalQuadratic(alpha=0), ValueError, "alpha: expected a positive number, got 0"),
        (lambda: k.RationalQuadratic(alpha="1"), TypeError, "alpha: expected a positive number"),
        (lambda: k.RationalQuadratic(alpha=torch.ones(2)), ValueError, "alpha: expected a number, got a tensor"),
        (lambda: k.RationalQuadratic(alpha=torch.ones(()))(x), TypeError, "parameter: a torch.Tensor"),
        (lambda: k.Periodic(period=0), ValueError, "period: expected a positive number"),
        (lambda: k.Periodic(period=np.ones(2))(x), ValueError, "period: expected a number or shape (3,)"),
        (lambda: k.Gaussian(True), ValueError, "lengthscale: expected a positive number"),
        (lambda: k.Gaussian(torch.tensor(1j)), ValueError, "lengthscale: expected a positive number"),
        (lambda: torch.tensor(1j) * k.Gaussian(), TypeError, "factor: expected a real number, got complex64"),
        (lambda: k.Gaussian(torch.tensor(0.0))(tensor), ValueError, "lengthscale: expected a positive number"),
        (
            lambda: k.Matern(torch.tensor([1.0, -1.0, 1.0]))(tensor),
            ValueError,
            "lengthscale: expected a positive number",
        ),
        (lambda: k.Laplacian(torch.tensor(np.nan)).matmul(tensor, None, tensor), ValueError, "lengthscale: expected a"),
        (
            lambda: k.RationalQuadratic(alpha=torch.tensor(-1.0))(tensor),
            ValueError,
            "alpha: expected a positive number",
        ),
        (lambda: k.Periodic(period=torch.tensor(-1.0))(tensor), ValueError, "period: expected a positive number"),
        (lambda: k.Polynomial(gamma=torch.tensor(-1.0))(tensor), ValueError, "gamma: expected a positive number"),
        (lambda: k.Linear(np.nan), ValueError, "bias: expected a finite number, got nan"),
        (lambda: k.Polynomial(0), ValueError, "degree: expected a positive integer, got 0"),
        (lambda: k.Polynomial(1.5), TypeError, "degree: expected a positive integer, got 1.5"),
        (lambda: k.Polynomial(gamma=0.0), ValueError, "gamma: expected a positive number"),
        (lambda: k.Sigmoid(coef0=np.inf), ValueError, "coef0: expected a finite number"),
        (
            lambda: nf.gram(x, kernel="linear", gamma=1),
            TypeError,
            "params: expected bias with kernel='linear', got gamma",
        ),
        (lambda: nf.gram(x, kernel="cosine", bias=1), TypeError, "params: expected nothing with kernel='cosine'"),
        (lambda: nf.gram(x, kernel="chi3"), ValueError, "kernel: expected one of gaussian, rbf, laplacian, matern"),
        (lambda: nf.gram(-abs(x) - 1, kernel="chi2"), ValueError, "x: expected no negative numbers"),
        (lambda: nf.gram(abs(x), -abs(x) - 1, "additive_chi2"), ValueError, "y: expected no negative numbers"),
        (lambda: nf.gram(abs(x), kernel="chi2", gamma=0), ValueError, "gamma: expected a positive number, got 0"),
        (lambda: k.Matern().matmul(x, None, x[:2]), ValueError, "v: expected 5 rows to match y"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)


def test_threads_change_no_bit(threads):
    kernel = k.Matern(2.0) * k.Linear(0.5) + k.Laplacian(3.0)
    for n, m, d, r in ((5, 3000, 20, 1), (300, 700, 3, 6)):
        x, y, v = (torch.from_numpy(points(*s, "float32")) for s in ((n, d), (m, d), (m, r)))
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            own = [t.clone().requires_grad_() for t in (x, y, v)]
            scale = torch.tensor(0.7, requires_grad=True)
            product = (scale * kernel).matmul(*own)
            grads = torch.autograd.grad(product.square().sum() + (scale * kernel)(*own[:2]).sum(), [*own, scale])
            results.append([kernel(x), product.detach(), *grads])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# ---- kernels given as functions --------------------------------------------------------------------------------------

CUSTOM = k.Custom(lambda r: (1 + r) ** -1.5, lambda r: -1.5 * (1 + r) ** -2.5, is_mercer=True)
CUBE = k.Custom(lambda s: s**3, lambda s: 3 * s**2, "dot")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_custom(kind, monkeypatch):
    x, y, v = (of_kind(kind, points(n, d)) for n, d in ((40, 5), (30, 5), (30, 3)))
    expected = (1 + ((wide(x)[:, None] - wide(y)) ** 2).sum(-1)).astype(float) ** -1.5
    assert np.allclose(numpy_of(CUSTOM(x, y)), expected, rtol=1e-12)
    assert np.allclose(numpy_of(CUBE(x, y)), numpy_of(x @ y.T) ** 3, rtol=1e-12)
    for block in (1 << 22, 100, 1):
        monkeypatch.setattr(k.base, "_BLOCK", block)
        assert np.allclose(numpy_of(CUSTOM.matmul(x, y, v)), expected @ numpy_of(v), rtol=1e-12)
    composed, dense = 2.0 * CUSTOM + k.Gaussian() * CUBE**2, 2 * CUSTOM(x) + k.Gaussian()(x) * CUBE(x) ** 2
    assert np.allclose(numpy_of(composed(x)), numpy_of(dense), rtol=1e-12)
    assert np.allclose(numpy_of(composed.matmul(x, None, x)), numpy_of(dense @ x), rtol=1e-12)
    assert np.allclose(numpy_of(composed.diag(x)), numpy_of(dense).diagonal(), rtol=1e-12)
    assert composed.matmul(x[:0], y, v).shape == (0, 3)
    assert CUSTOM.matmul(x[None], y, v[:, 0]).shape == (1, 40)
    assert k.check_mercer(CUSTOM + CUSTOM * k.Linear()).verdict == "proved"
    assert CUBE.is_mercer is None


def test_derivatives_of_custom(monkeypatch):
    monkeypatch.setattr(k.base, "_BLOCK", 6)
    x, y, v = points(4, 2), points(3, 2, seed=1), points(3, 2, seed=2)
    scale = leaves(0.7)
    product = lambda x, y, v, c: (c * CUSTOM + k.Matern() * CUBE).matmul(x, y, v)  # noqa: E731
    assert torch.autograd.gradcheck(product, [*leaves(x, y, v), *scale])
    assert torch.autograd.gradgradcheck(product, [*leaves(x, y, v), *scale])
    assert torch.autograd.gradgradcheck(
        lambda x: (CUSTOM + CUBE)(x) + (CUSTOM + CUBE).diag(x), leaves(x), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_custom_in_half_precision(dtype, monkeypatch):
    """Columns are of every block of rows: their gradient is rounded once, not at every block."""
    monkeypatch.setattr(k.base, "_BLOCK", 30)
    halves = [torch.from_numpy(points(n, d)).to(dtype).requires_grad_() for n, d in ((200, 5), (30, 5), (30, 3))]
    exact = [a.detach().float().requires_grad_() for a in halves]
    own, expected = (torch.autograd.grad(CUSTOM.matmul(*arrays).sum(), arrays) for arrays in (halves, exact))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(own, expected, strict=True))


def test_bad_custom():
    f = lambda r: r  # noqa: E731
    for call, error, message in (
        (lambda: k.Custom(1, f), TypeError, "value: expected a function of an array, got int"),
        (lambda: k.Custom(f, None), TypeError, "derivative: expected a function of an array, got NoneType"),
        (lambda: k.Custom(f, f, "euclidean"), ValueError, "score: expected 'sqeuclidean' or 'dot', got 'euclidean'"),
        (lambda: k.Custom(f, f, is_mercer="yes"), ValueError, "is_mercer: expected True, False or None, got 'yes'"),
        (lambda: k.Custom(lambda r: r[0], f)(points(3, 2)), ValueError, "value: expected a result of shape (3, 3)"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)


# ---- chi-squared -----------------------------------------------------------------------------------------------------


def chi_squared(x, y):
    x, y = x.unsqueeze(-2), y.unsqueeze(-3)
    total = x + y
    return ((x - y) ** 2 / torch.where(total == 0, 1.0, total)).sum(-1)


def histograms(n, d, dtype="float64", seed=0):
    """Points that are not negative; a fifth of the numbers is 0, in both sets at once where d > 5."""
    x = np.abs(points(n, d, seed=seed))
    x[rng(n, d, seed).random((n, d)) < 0.2] = 0
    x[:, 5::7] = 0
    return x.astype(dtype)


def double(x):
    return torch.from_numpy(np.asarray(numpy_of(x)))


@pytest.mark.isa
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 3, 2), (130, 33, 17), (0, 5, 3), (5, 0, 3), (97, 500, 400)])
def test_chi_squared(n, m, d):
    for kind, dtype in KINDS:
        x, y = (of_kind(kind, histograms(size, d, seed=seed), dtype) for seed, size in enumerate((n, m)))
        v = of_kind(kind, points(m, 2, seed=2), dtype)
        sums = chi_squared(double(x), double(y)).numpy()
        bound = EPS[dtype] * (6 + np.sqrt(d))
        assert_value(nf.gram(x, y, "additive_chi2"), -sums, bound)
        expected = np.exp(-0.3 / d * sums)
        kernel = by_name("chi2", x, gamma=0.3 / d)
        assert_value(kernel(x, y), expected, 2 * bound)
        error = np.abs(numpy_of(kernel.matmul(x, y, v)) - expected @ numpy_of(v))
        assert np.all(error <= (bound + EPS[dtype] * np.sqrt(m)) * np.abs(numpy_of(v)).sum(0))
        own = numpy_of(kernel(x))
        assert np.array_equal(own, own.T)
        assert np.all(np.diagonal(own) == 1)


def test_chi_squared_of_batches_and_of_one_set():
    x, y = torch.from_numpy(histograms(14, 5).reshape(2, 7, 5)), torch.from_numpy(histograms(6, 5, seed=1))
    torch.testing.assert_close(nf.gram(x, y, "chi2"), torch.exp(-chi_squared(x, y)))
    x, v = histograms(4097, 3, "float32"), points(4097, 1, "float32")
    rows = [0, 127, 128, 2048, 4096]
    expected = np.exp(-chi_squared(double(x[rows]), double(x)).numpy()) @ v
    assert_value(by_name("chi2", x).matmul(x, None, v)[rows], expected, 1e-5, 1.0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_chi_squared_gradients_of_many_points(dtype):
    """By itself, and beside other scores; 0 where both coordinates are 0, as for scikit-learn's 0 / 0."""
    for kernel, formula in (
        (by_name("chi2", None, gamma=0.1), lambda x, y: torch.exp(-0.1 * chi_squared(x, y))),
        (
            k.Gaussian(3.0) * by_name("additive_chi2", None) + k.Laplacian(9.0),
            lambda x, y: laplacian(x, y, 9.0) - gaussian(x, y, 3.0) * chi_squared(x, y),
        ),
    ):
        x, y, v = (
            of_kind("torch", a, dtype).requires_grad_()
            for a in (histograms(131, 17), histograms(300, 17, seed=1), points(300, 3, seed=2))
        )
        wide = [a.detach().double().requires_grad_() for a in (x, y, v)]
        upstream = torch.from_numpy(points(131, 3, seed=3))
        grads = torch.autograd.grad((kernel.matmul(x, y, v) * upstream).sum(), (x, y, v))
        expected = torch.autograd.grad((formula(*wide[:2]) @ wide[2] * upstream).sum(), wide)
        for grad, other in zip(grads, expected, strict=True):
            assert_gradient(grad, other, GRADIENT[dtype], STEP.get(dtype, 0))
        assert torch.all(grads[0][:, 5] == 0)


def test_chi_squared_of_extreme_numbers():
    """Squares would leave the range; a row that is not finite touches no other."""
    for dtype, sizes in (("float32", (1e-36, 1e37)), ("float64", (1e-300, 1e307))):
        for size in sizes:
            x, y = (np.array(z, dtype) for z in ([[0, 1], [1, 0], [1, 1]], [[0, 0], [0, 2], [2, 0]]))
            expected = nf.gram(x, y, "additive_chi2") * np.array(size, dtype)
            np.testing.assert_allclose(nf.gram(x * size, y * size, "additive_chi2"), expected, rtol=1e-6)
    x = histograms(40, 3, "float32")
    bad = x.copy()
    bad[7, 1], bad[20, 2] = np.nan, np.inf
    good = np.setdiff1d(np.arange(40), [7, 20])
    matrix = nf.gram(bad, kernel="chi2")
    assert np.isnan(matrix[[7, 20]]).all()
    assert np.array_equal(matrix[np.ix_(good, good)], nf.gram(x, kernel="chi2")[np.ix_(good, good)])


def test_chi_squared_is_mercer():
    x = histograms(300, 8)
    kernel = by_name("chi2", x)
    assert nf.psd_report(kernel, x).verdict in ("psd", "psd_within_noise")
    assert nf.psd_report(by_name("additive_chi2", x), x).verdict == "not_psd"
    model = nf.KernelRidge(kernel, alpha=0.1).fit(x, x.sum(1))
    solved = np.linalg.solve(nf.gram(x, kernel=kernel) + 0.1 * np.eye(300), x.sum(1))
    np.testing.assert_allclose(model.predict(x), nf.gram(x, kernel=kernel) @ solved, rtol=1e-4)


def test_chi_squared_is_that_of_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = np.abs(points(40, 5)), np.abs(points(30, 5, seed=1))
    for name in ("chi2", "additive_chi2"):
        np.testing.assert_allclose(nf.gram(x, y, name), pairwise.pairwise_kernels(x, y, name), rtol=1e-10)


def test_chi_squared_gradients():
    x, y, v = (torch.from_numpy(np.abs(points(*s, seed=s[0]))).requires_grad_() for s in ((5, 3), (4, 3), (4, 2)))
    for name, params in (("chi2", {"gamma": 0.7}), ("additive_chi2", {})):
        matrix = lambda x, y, name=name, params=params: nf.gram(x, y, name, **params)  # noqa: E731
        assert torch.autograd.gradcheck(matrix, (x, y))
        assert torch.autograd.gradgradcheck(matrix, (x, y))
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    of_gamma = lambda gamma: k.ChiSquared(gamma).matmul(x.detach(), y.detach(), v.detach())  # noqa: E731
    assert torch.autograd.gradcheck(of_gamma, (gamma,))
    assert torch.autograd.gradgradcheck(of_gamma, (gamma,))
    kernel = by_name("chi2", x)
    assert torch.autograd.gradcheck(lambda x, y, v: kernel.matmul(x, y, v), (x, y, v))
    assert kernel.is_mercer
    assert by_name("additive_chi2", x).is_mercer is False
    np.testing.assert_allclose(kernel.diag(x).detach(), np.ones(5))
