"""Metrics of coordinates (cityblock, chebyshev, minkowski) and mahalanobis: values, gradients, neighbours."""

import itertools

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from generators import GRADIENT, STEP, assert_gradient, layouts, numpy_of, of_kind, points, rng
from references import KINDS, integers, nearest, same_bits, step, wide

import nearfar as nf

CASES = [("cityblock", {}), ("chebyshev", {}), *(("minkowski", {"p": p}) for p in (0.5, 1.5, 3.0, 6.7))]
IDS = [f"{metric}{options.get('p', '')}" for metric, options in CASES]


def reference(x, y, metric, p=2.0):
    x, y = wide(x), wide(y)
    difference = np.abs(x[..., :, None, :] - y[..., None, :, :])
    if metric == "cityblock":
        return difference.sum(-1)
    if metric == "chebyshev":
        return difference.max(-1)
    return (difference**p).sum(-1) ** (type(difference.flat[0])(1) / p if difference.size else 1.0)


def assert_close(actual, x, y, metric, **options):
    expected = reference(x, y, metric, **options).astype(float)
    actual, d = numpy_of(actual), x.shape[-1]
    assert actual.shape == expected.shape
    # Sums of positive numbers; powers by logarithms lose as many ulp as the logarithm times p has digits.
    powers = 0 if metric != "minkowski" else 16 * options["p"] * (1 + 1 / options["p"] ** 2)
    tolerance = (2 + np.sqrt(d) + powers) * step(x)
    assert np.all(np.abs(actual - expected) <= tolerance * expected)


def torch_reference(x, y, metric, p=2.0):
    """torch.cdist in float64, whose conventions for ties and zeros are ours."""
    power = {"cityblock": 1.0, "chebyshev": torch.inf, "minkowski": p}[metric]
    return torch.cdist(x, y, power)


@pytest.mark.isa
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_values(kind, dtype, metric, options):
    for n, m, d in (
        (1, 1, 1),
        (0, 3, 2),
        (3, 0, 2),
        (13, 37, 7),
        (49, 33, 16),
        (33, 241, 17),
        (5, 7, 300),
        (3, 4, 641),
    ):
        x, y = of_kind(kind, points(n, d), dtype), of_kind(kind, points(m, d, seed=1), dtype)
        result = nf.cdist(x, y, metric, **options)
        assert type(result) is type(x)
        assert str(result.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
        assert_close(result, x, y, metric, **options)
        own = numpy_of(nf.cdist(x, metric=metric, **options))
        assert_close(own, x, x, metric, **options)
        assert np.array_equal(own, own.T)
        assert not own.diagonal().any()
        i, j = np.triu_indices(n, 1)
        assert np.array_equal(numpy_of(nf.pdist(x, metric, **options)), own[i, j])


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["cityblock", "chebyshev"])
def test_integers_are_exact(metric):
    for d in (1, 8, 100):
        x, y = integers(40, d).astype("float32"), integers(50, d, seed=1).astype("float32")
        assert np.array_equal(nf.cdist(x, y, metric), reference(x, y, metric))


def test_scipy_and_torch():
    x, y = points(40, 9), points(30, 9, seed=1)
    for metric, options in CASES:
        assert np.allclose(nf.cdist(x, y, metric, **options), scipy.spatial.distance.cdist(x, y, metric, **options))
        assert np.allclose(nf.pdist(x, metric, **options), scipy.spatial.distance.pdist(x, metric, **options))
        power = {"cityblock": 1.0, "chebyshev": np.inf}.get(metric, options.get("p"))
        assert np.allclose(nf.cdist(x, y, metric, **options), torch.cdist(*map(torch.from_numpy, (x, y)), power))
    for p, metric in ((1, "cityblock"), (2, "euclidean"), (np.inf, "chebyshev")):
        assert same_bits(nf.cdist(x, y, "minkowski", p=p), nf.cdist(x, y, metric))


@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_batches_layouts_and_out(metric, options):
    x, y = points(3 * 5, 6, "float32").reshape(3, 1, 5, 6), points(2 * 7, 6, "float32", seed=1).reshape(2, 7, 6)
    result = nf.cdist(x, y, metric, **options)
    assert result.shape == (3, 2, 5, 7)
    for b, c in itertools.product(range(3), range(2)):
        assert same_bits(result[b, c], nf.cdist(x[b, 0], y[c], metric, **options))
    for own in layouts(y[0]).values():
        assert same_bits(nf.cdist(x[0, 0], own, metric, **options), result[0, 0])
    out = np.empty((3, 2, 5, 7), np.float32)
    assert nf.cdist(x, y, metric, out=out, **options) is out
    assert same_bits(out, result)


@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_bad_rows_touch_only_their_own_results(metric, options):
    x, y = points(20, 5, "float32"), points(50, 5, "float32", seed=1)
    expected = nf.cdist(x, y, metric, **options)
    x[3, 2], y[7, 0] = np.nan, np.nan
    result = nf.cdist(x, y, metric, **options)
    assert np.isnan(result[3]).all()
    assert np.isnan(result[:, 7]).all()
    keep = np.ix_(np.delete(np.arange(20), 3), np.delete(np.arange(50), 7))
    assert same_bits(result[keep], expected[keep])
    a, b = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y).requires_grad_()
    nf.cdist(a, b, metric, **options).nansum().backward()
    assert np.isfinite(np.delete(a.grad.numpy(), 3, 0)).all()
    assert np.isfinite(np.delete(b.grad.numpy(), 7, 0)).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_gradients(metric, options, dtype):
    for n, m, d in ((1, 1, 1), (2, 3, 5), (17, 66, 16), (130, 129, 3), (35, 13, 70)):
        x, y = (of_kind("torch", points(k, d, seed=k), dtype).requires_grad_() for k in (n, m))
        upstream = torch.from_numpy(rng(n, m).standard_normal((n, m)))
        value = nf.cdist(x, y, metric, **options)
        got = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), (x, y))
        leaves = [z.detach().double().requires_grad_() for z in (x, y)]
        rounded = upstream.to(value.dtype).double()
        expected = torch.autograd.grad((torch_reference(*leaves, metric, **options) * rounded).sum(), leaves)
        tolerance = GRADIENT[dtype] * (10 if metric == "minkowski" else 1)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == x.dtype
            assert_gradient(a, b, tolerance, STEP[dtype])


@pytest.mark.parametrize("p", [20, 20.3])
def test_gradient_where_the_powers_are_below_the_range(p):
    """A distance of 0 between points that differ has slope 0, as in torch; the pairs beside it keep theirs."""
    x = torch.tensor([[0.0, 0.0], [1e-3, 2e-3], [0.5, 3.0]], requires_grad=True)
    y = torch.zeros(1, 2, requires_grad=True)
    distance = nf.cdist(x, y, "minkowski", p=p)
    assert distance[:2].flatten().tolist() == [0, 0]
    got = torch.autograd.grad(distance.sum(), (x, y))
    expected = torch.autograd.grad(torch.cdist(x, y, p=p).sum(), (x, y))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_gradients_of_pdist_and_of_one_set(metric, options):
    x = torch.from_numpy(points(37, 6)).requires_grad_()
    i, j = np.triu_indices(37, 1)
    weights = torch.from_numpy(rng(1).standard_normal(len(i)))
    full = torch.from_numpy(rng(2).standard_normal((37, 37)))
    leaf = x.detach().requires_grad_()
    matrix = torch_reference(leaf, leaf, metric, **options)
    (expected,) = torch.autograd.grad((matrix[i, j] * weights).sum(), leaf, retain_graph=True)
    (got,) = torch.autograd.grad((nf.pdist(x, metric, **options) * weights).sum(), x)
    assert_gradient(got, expected, 1e-11)
    (expected,) = torch.autograd.grad((matrix * full).sum(), leaf)
    (got,) = torch.autograd.grad((nf.cdist(x, metric=metric, **options) * full).sum(), x)
    assert_gradient(got, expected, 1e-11)


def test_conventions_at_ties_and_zeros():
    x = torch.tensor([[1.0, 2.0, 2.0], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 2.0, 2.0], [1.0, 0, 4.0]], dtype=torch.float64)
    for metric, options in CASES:
        own = x.detach().requires_grad_()
        nf.cdist(own, y, metric, **options).sum().backward()
        theirs = x.detach().requires_grad_()
        torch_reference(theirs, y, metric, **options).sum().backward()
        if options.get("p", 1) >= 1:
            assert torch.allclose(own.grad, theirs.grad, rtol=1e-12), metric
        assert torch.isfinite(own.grad).all()


@pytest.mark.parametrize(("metric", "options"), [*CASES, ("mahalanobis", {})], ids=[*IDS, "mahalanobis"])
def test_gradcheck(metric, options):
    x, y = (torch.from_numpy(points(n, 3, seed=n)).requires_grad_() for n in (4, 3))

    def distances(x, y):
        own = (
            {"M": torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))}
            if metric == "mahalanobis"
            else options
        )
        return nf.cdist(x, y, metric, **own)

    assert torch.autograd.gradcheck(distances, (x, y))
    assert torch.autograd.gradgradcheck(distances, (x, y), atol=1e-4)
    assert torch.autograd.gradgradcheck(
        lambda x: nf.pdist(x, metric, **options) if options else distances(x, x), (x,), atol=1e-4
    )


@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
def test_threads_do_not_change_a_bit(metric, options, threads):
    x, y = torch.from_numpy(points(150, 20, "float32")), torch.from_numpy(points(260, 20, "float32", seed=1))
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = nf.cdist(a, b, metric, **options)
        value.square().sum().backward()
        results.append((value, a.grad, b.grad, *nf.knn(x, y, 3, metric=metric, **options)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# ---- mahalanobis -----------------------------------------------------------------------------------------------------


def spd(d, seed=0):
    factor = points(d, d, seed=seed)
    return factor.T @ factor / d


@pytest.mark.isa
@pytest.mark.parametrize("d", [1, 3, 20])
def test_mahalanobis(d):
    x, y, m = points(40, d), points(30, d, seed=1), spd(d)
    expected = scipy.spatial.distance.cdist(x, y, "mahalanobis", VI=m)
    factor = np.linalg.cholesky(m).T
    for kind, dtype in KINDS:
        own = [of_kind(kind, a, dtype) for a in (x, y)]
        wide_dtype = "float64" if dtype == "float64" else "float32"
        matrix = of_kind(kind, m, wide_dtype)
        tolerance = 1e-10 if dtype == "float64" else 1e-4 if dtype == "float32" else 0.1
        for given in (matrix, ("factor", of_kind(kind, factor, wide_dtype))):
            result = nf.cdist(*own, "mahalanobis", M=given)
            assert type(result) is type(own[0])
            assert np.allclose(numpy_of(result), expected, rtol=tolerance, atol=tolerance)
    i, j = np.triu_indices(40, 1)
    assert np.allclose(nf.pdist(x, "mahalanobis", M=m), nf.cdist(x, metric="mahalanobis", M=m)[i, j])
    assert np.allclose(nf.cdist(x + 1e6, y + 1e6, "mahalanobis", M=m), expected, rtol=1e-6)
    found = nf.knn(x, y, 4, metric="mahalanobis", M=m)
    assert np.array_equal(found[1], nearest(expected, 4)[1])


def test_mahalanobis_of_a_projection():
    x, factor = points(10, 5), points(2, 5, seed=3)
    result = nf.cdist(x, metric="mahalanobis", M=("factor", factor))
    assert np.allclose(result, nf.cdist(x @ factor.T), atol=1e-12)
    assert np.allclose(result, nf.cdist(x, metric="mahalanobis", M=factor.T @ factor), atol=1e-6)
    leaf = torch.from_numpy(factor).requires_grad_()
    y = torch.from_numpy(points(4, 5, seed=1))
    assert torch.autograd.gradcheck(lambda f: nf.cdist(torch.from_numpy(x), y, "mahalanobis", M=("factor", f)), (leaf,))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "m"), [(1, 300), (3, 20), (9, 7), (13, 50), (40, 2)])
@pytest.mark.parametrize("rank", [2, 18, 70])
def test_mahalanobis_of_equal_rows(n, m, rank, dtype):
    """Exactly 0, however many rows are asked for: images of few rows sum in another order than those of many."""
    factor = rng(rank).standard_normal((rank, 70)).astype(dtype)
    x, y = points(n, 70, dtype), points(m, 70, dtype, seed=1)
    y[1] = x[0]
    assert nf.cdist(x, y, "mahalanobis", M=("factor", factor))[0, 1] == 0
    assert nf.cdist(x[None], np.stack([y, y]), "mahalanobis", M=("factor", factor))[1, 0, 1] == 0
    distances, index = nf.knn(x[:1], y, 1, metric="mahalanobis", M=("factor", factor))
    assert distances[0, 0] == 0
    assert index[0, 0] == 1


@pytest.mark.parametrize("d", [1, 3, 18])
@pytest.mark.parametrize("function", ["cdist", "pdist", "knn"])
def test_gradient_of_the_mahalanobis_matrix(function, d):
    """sum_ij g_ij z z^T / (2 d_ij), z = x_i - y_j; rows that coincide add nothing."""
    x, y, m = (torch.from_numpy(a) for a in (points(9, d), points(7, d, seed=1), spd(d) + np.eye(d)))
    x[4] = x[1]
    y[2] = x[3]

    def distances(x, y, m):
        if function == "pdist":
            return nf.pdist(x, "mahalanobis", M=m)
        return (
            nf.cdist(x, y, "mahalanobis", M=m) if function == "cdist" else nf.knn(x, y, 3, metric="mahalanobis", M=m)[0]
        )

    own = [t.clone().requires_grad_() for t in (x, y, m)]
    value = distances(*own)
    weights = torch.from_numpy(rng(d).standard_normal(value.shape))
    used = own if function != "pdist" else own[::2]
    actual = torch.autograd.grad((value * weights).sum(), used)
    other = [t.clone().requires_grad_() for t in (x, y, m)]
    z = other[0].unsqueeze(1) - (other[0] if function == "pdist" else other[1])
    square = torch.einsum("ijk,kl,ijl->ij", z, (other[2] + other[2].T) / 2, z)
    matrix = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
    if function == "pdist":
        matrix = matrix[tuple(torch.triu_indices(9, 9, 1))]
    elif function == "knn":
        matrix = matrix.sort(1).values[:, :3]
    expected = torch.autograd.grad((matrix * weights).sum(), other if function != "pdist" else other[::2])
    assert torch.allclose(value, matrix, rtol=1e-10, atol=1e-12)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-8, atol=1e-10)
    assert torch.allclose(actual[-1], actual[-1].T, rtol=1e-12, atol=1e-14)


def test_second_derivatives_of_mahalanobis():
    x, y, root = (torch.from_numpy(points(n, 3, seed=n)).requires_grad_() for n in (5, 4, 3))
    weights = torch.from_numpy(rng(1).standard_normal((5, 4)))

    def of_matrix(x, y, root):  # entries of a matrix that stays symmetric
        return nf.cdist(x, y, "mahalanobis", M=root @ root.T + torch.eye(3, dtype=x.dtype)) * weights

    def of_factor(x, y, root):
        return nf.cdist(x, y, "mahalanobis", M=("factor", root[:2])) * weights

    m, other = root.detach() @ root.detach().T, x.detach()
    leaf = m.clone().requires_grad_()
    (expected,) = torch.autograd.grad(nf.pdist(other, "mahalanobis", M=leaf).sum(), leaf)
    assert torch.allclose(torch.func.grad(lambda m: nf.pdist(other, "mahalanobis", M=m).sum())(m), expected)
    for f in (of_matrix, of_factor, lambda x, y, root: nf.pdist(x, "mahalanobis", M=root @ root.T)):
        assert torch.autograd.gradcheck(f, (x, y, root))
        assert torch.autograd.gradgradcheck(f, (x, y, root))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the first jvp
def test_forward_derivatives_by_the_mahalanobis_matrix():
    """Also nested ones and those of dual tensors; they were 0."""
    x, m, v = (torch.from_numpy(z) for z in (points(5, 3), spd(3) + np.eye(3), spd(3)))

    def f(m):
        return nf.pdist(x, "mahalanobis", M=m).square().sum().exp() ** 0.01

    jvp, grad = torch.func.jvp, torch.func.grad
    slope = grad(f)(m)
    torch.testing.assert_close(jvp(f, (m,), (v,))[1], (slope * v).sum())
    torch.testing.assert_close(torch.func.jacfwd(f)(m), slope)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(m, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (slope * v).sum())
    outer = jvp(lambda m: grad(lambda s: f(m) * s)(torch.ones_like(m[0, 0])), (m,), (v,))[
        1
    ]  # by what the inner one leaves alone
    torch.testing.assert_close(outer, (slope * v).sum())
    bend = grad(lambda m: (grad(f)(m) * v).sum())(m)
    torch.testing.assert_close(jvp(grad(f), (m,), (v,))[1], bend)
    constant = jvp(lambda x: nf.pdist(x, "mahalanobis", M=torch.diag(x[0] * 0) + m), (x,), (x,))[1]
    torch.testing.assert_close(constant, nf.pdist(x, "mahalanobis", M=m))


def test_vmap_over_a_mahalanobis_matrix_is_refused():
    """By name: its eigenvalues are looked at. Over its factor it works."""
    x, many = torch.from_numpy(points(5, 3)), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    with pytest.raises(ValueError, match=r"^M: expected values that can be looked at, got what torch.func.vmap maps"):
        torch.func.vmap(lambda m: nf.pdist(x, "mahalanobis", M=m))(many)
    values = torch.func.vmap(lambda f: nf.pdist(x, "mahalanobis", M=("factor", f)))(many)
    assert torch.equal(values[1], nf.pdist(x, "mahalanobis", M=("factor", many[0])))


def test_gradient_of_the_mahalanobis_matrix_in_low_precision():
    x, y, m = points(60, 5), points(50, 5, seed=1), spd(5) + np.eye(5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = (torch.from_numpy(z).to(dtype) for z in (x, y))
        leaf = torch.from_numpy(m).to(dtype).requires_grad_()
        exact = leaf.detach().double().requires_grad_()
        (actual,) = torch.autograd.grad(nf.cdist(a, b, "mahalanobis", M=leaf).square().sum(), leaf)
        (expected,) = torch.autograd.grad(
            nf.cdist(a.double(), b.double(), "mahalanobis", M=exact).square().sum(), exact
        )
        assert actual.dtype == leaf.dtype
        name = str(dtype).removeprefix("torch.")
        assert_gradient(actual, expected, GRADIENT[name], STEP[name])


def test_bad_parameters():
    x = points(4, 3)
    for options, error, message in (
        (dict(metric="mahalanobis"), ValueError, "^M: expected a positive semi-definite matrix or"),
        (
            dict(metric="mahalanobis", M=-np.eye(3)),
            ValueError,
            "^M: expected a positive semi-definite matrix, got an eigenvalue -1",
        ),
        (dict(metric="mahalanobis", M=np.triu(np.ones((3, 3)))), ValueError, "^M: expected a finite symmetric matrix"),
        (dict(metric="mahalanobis", M=np.full((3, 3), np.nan)), ValueError, "^M: expected a finite symmetric matrix"),
        (dict(metric="mahalanobis", M=np.eye(2)), ValueError, r"^M: expected shape \(3, 3\) to match x, got \(2, 2\)"),
        (
            dict(metric="mahalanobis", M=("factor", np.eye(2))),
            ValueError,
            r"^M: expected shape \(r, 3\) to match x, got \(2, 2\)",
        ),
        (dict(metric="mahalanobis", M=("root", np.eye(3))), ValueError, "^M: expected a matrix or"),
        (dict(metric="mahalanobis", M=torch.eye(3)), TypeError, "^M: expected a numpy array to match x, got torch"),
        (dict(metric="mahalanobis", M=np.eye(3) * 1j), TypeError, "^M: expected real numbers, got complex128"),
        (
            dict(metric="mahalanobis", M=("factor", np.array([["a"] * 3]))),
            TypeError,
            "^M: expected real numbers, got str",
        ),
        (dict(metric="euclidean", M=np.eye(3)), ValueError, "^M: only for metric='mahalanobis'"),
        (dict(metric="euclidean", p=3), ValueError, "^p: only for metric='minkowski'"),
        (dict(metric="minkowski", p=0), ValueError, "^p: expected a positive number or inf, got 0"),
        (dict(metric="minkowski", p=np.nan), ValueError, "^p: expected a positive number or inf, got nan"),
        (dict(metric="minkowski", p="2"), TypeError, "^p: expected a number"),
        (dict(metric="manhattan"), ValueError, "^metric: expected one of euclidean, .*, mahalanobis, got 'manhattan'"),
    ):
        for function in (nf.cdist, nf.pdist, nf.knn):
            with pytest.raises(error, match=message):
                function(x, **options)
    m = torch.eye(3, dtype=torch.float64, requires_grad=True)
    singular = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    assert nf.cdist(torch.from_numpy(x), metric="mahalanobis", M=singular.detach()).shape == (4, 4)
    with pytest.raises(ValueError, match="^M: expected a positive definite matrix, since it has derivatives, got an"):
        nf.cdist(torch.from_numpy(x), metric="mahalanobis", M=singular)
    with pytest.raises(ValueError, match="^out: not for inputs that require a gradient"):
        nf.cdist(torch.from_numpy(x), metric="mahalanobis", M=m, out=torch.empty(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="^out: not for inputs that require a gradient"):
        nf.cdist(torch.from_numpy(x), metric="mahalanobis", M=("factor", m), out=torch.empty(4, 4, dtype=torch.float64))


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize(("metric", "options"), CASES, ids=IDS)
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (5, 40, 40), (300, 50, 1), (60, 5000, 7), (3, 4096, 1)])
def test_neighbours(metric, options, n, m, k):
    for dtype in ("float32", "float64"):
        x, y = points(n, 6, dtype), points(m, 6, dtype, seed=1)
        distances, index = nf.knn(x, y, k, metric=metric, **options)
        matrix = nf.cdist(x, y, metric, **options)
        expected, where = nearest(matrix, k)
        assert np.allclose(distances, expected, rtol=1e-5 if dtype == "float32" else 1e-12)
        assert (index == where).mean() > 0.99
    x, y = integers(n, 5).astype("float32"), integers(m, 5, seed=1).astype("float32")
    distances, index = nf.knn(x, y, k, metric=metric, **options)
    assert np.array_equal(index, nearest(nf.cdist(x, y, metric, **options), k)[1]) or metric == "minkowski"


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "dot", "cityblock", "chebyshev"])
@pytest.mark.parametrize("n", [1, 100, 129, 2047])
def test_few_queries_and_many_references(metric, n):
    """By columns, a chunk packed at a time: the same answers as by rows."""
    x, y = integers(n, 20).astype("float32"), integers(5003, 20, seed=1).astype("float32")
    value, index = nf.knn(x, y, 5, metric=metric)
    expected, where = nf.knn(np.repeat(x, 2100 // n + 1, 0), y, 5, metric=metric)
    expected, where = (np.ascontiguousarray(a[:: 2100 // n + 1]) for a in (expected, where))
    if metric == "cosine":  # parallel rows are ties that rounding decides
        assert np.allclose(value, expected, atol=1e-6)
    else:
        assert same_bits(value, expected)
        assert same_bits(index, where)
    assert np.array_equal(
        nf.knn(y[:n], y, 1, metric=metric, exclude_self=True)[1][:, 0] != np.arange(n), np.ones(n, bool)
    )


def test_distances_of_neighbours_are_differentiable():
    x, y = (torch.from_numpy(points(n, 4, seed=n)).requires_grad_() for n in (6, 9))
    factor = ("factor", torch.from_numpy(points(3, 4)).requires_grad_())
    for metric, options in (
        *CASES, ("euclidean", {}), ("sqeuclidean", {}), ("cosine", {}), ("dot", {}), ("mahalanobis", {"M": factor}),
    ):  # fmt: skip
        value, index = nf.knn(x, y, 3, metric=metric, **options)
        assert not index.requires_grad
        expected, where = nf.knn(x.detach(), y.detach(), 3, metric=metric, **options)
        assert torch.equal(index, where)
        assert torch.allclose(value, expected, rtol=1e-12)
        weights = torch.from_numpy(rng(3).standard_normal((6, 3)))
        got = torch.autograd.grad((value * weights).sum(), (x, y))
        wanted = torch.autograd.grad((nf.cdist(x, y, metric, **options).gather(1, index) * weights).sum(), (x, y))
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    value, index = nf.knn(x, k=2)
    assert torch.autograd.gradcheck(lambda x: nf.knn(x, k=2)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: nf.knn(x, k=2)[0], (x,))
    with torch.no_grad():
        assert not nf.knn(x, y, 2)[0].requires_grad
    labels, away = nf.kmeans_assign(x, y)
    (got,) = torch.autograd.grad(away.sum(), x)
    assert torch.allclose(got, 2 * (x - y[labels]))
    bad = x.detach().clone()
    bad[2, 1] = torch.nan
    bad.requires_grad_()
    nf.knn(bad, y.detach(), 2)[0].nansum().backward()
    assert torch.isfinite(bad.grad[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("n", [127, 129])
@pytest.mark.parametrize("rank", [1, 15, 17])
def test_mahalanobis_distance_of_equal_rows_is_0(n, rank):
    """Whatever rows are computed beside them: a matrix product of a library rounds its last rows otherwise."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((10, 17))[random.integers(0, 10, n)])
    factor = torch.from_numpy(random.standard_normal((rank, 17)))
    leaf = x.clone().requires_grad_()
    equal = (x[:, None] == x[None]).all(-1)
    distances = nf.cdist(leaf, x.clone(), "mahalanobis", M=("factor", factor))
    assert not distances[equal].any()
    (distances * equal).sum().backward()
    assert not leaf.grad.any()
    _, index = nf.knn(x, x.clone(), 2, metric="mahalanobis", M=("factor", factor))
    assert (index[:, 0] < index[:, 1]).all()
