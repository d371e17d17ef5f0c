"""Alignment and uniformity: dense float64 forms, the sphere's optimum, closed forms, close and far points."""

import itertools
import math

import numpy as np
import pytest
import torch
from generators import (
    DEPTHS,
    GRADIENT,
    SIZES,
    VALUE,
    assert_gradient,
    assert_value,
    compare,
    evaluate,
    layouts,
    of_kind,
    pairs,
    points,
    reference,
    rng,
)

import nearfar as nf

pytestmark = pytest.mark.isa

dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---- alignment -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_alignment_rows(dtype, n):
    x, y = pairs(n, 19, dtype)
    compare(nf.alignment, ["x", "y"], dtype, x=x, y=y)


@dtypes
@pytest.mark.parametrize("d", DEPTHS)
def test_alignment_columns(dtype, d):
    x, y = pairs(35, d, dtype)
    compare(nf.alignment, ["x", "y"], dtype, x=x, y=y, floor=1.0 if d == 1 else 0.0)


@dtypes
@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3, 4])
def test_alignment_options(dtype, alpha):
    for reduction, normalize in itertools.product(("mean", "sum", "none"), (True, False)):
        x, y = (of_kind("torch", a, dtype) for a in pairs(40, 6))
        weights = of_kind("torch", rng(2).standard_normal(40), dtype) if reduction == "none" else None
        arguments = dict(x=x, y=y, alpha=alpha, reduction=reduction, normalize=normalize)
        compare(nf.alignment, ["x", "y"], dtype, weights=weights, **arguments)
        if reduction != "none":
            compare(nf.alignment, ["x", "y"], dtype, **(arguments | {"x": x.numpy(), "y": y.numpy()}))
        else:
            rows = nf.alignment(**(arguments | {"x": x.numpy(), "y": y.numpy()}))
            assert np.array_equal(rows, nf.alignment(**arguments).numpy())


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("d", [3, 128])
def test_alignment_of_close_points(distance, d):
    """2 - 2 <x, y> would lose a quarter of the value at 1e-3 in float32; differences lose nothing."""
    x = unit(points(50, d))
    y = x + distance * unit(points(50, d, seed=1))
    x, y = x.astype(np.float32), y.astype(np.float32)
    compare(nf.alignment, ["x", "y"], "float32", x=x, y=y, normalize=False)
    compare(nf.alignment, ["x", "y"], "float32", x=x, y=y)


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 3])
def test_alignment_of_equal_points(alpha, kind):
    x = of_kind(kind, points(20, 5))
    value, grads = evaluate(nf.alignment, ["x", "y"], x=x, y=x, alpha=alpha)
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("alpha", "curvature"), [(1, 0), (2, 2), (3, 0), (4, 0)])
def test_alignment_curvature_of_equal_points(alpha, curvature):
    """That of |x - y|^2 at 0; a distance has none there."""
    x = torch.from_numpy(points(2, 3))
    hessian = torch.autograd.functional.hessian(
        lambda own: nf.alignment(own, x, alpha=alpha, reduction="sum", normalize=False), x
    )
    assert_gradient(hessian.reshape(6, 6), curvature * np.eye(6), 1e-12)


def test_alignment_closed_forms():
    x = np.eye(8)
    assert nf.alignment(x, -x) == 4
    assert nf.alignment(x, np.roll(x, 1, 0)) == pytest.approx(2, rel=1e-15)
    assert nf.alignment(x, -x, alpha=1) == 2
    assert nf.alignment(3 * x, x, normalize=False) == 4
    assert nf.alignment(3 * x, x) == 0
    assert nf.alignment(x, -x, reduction="sum") == 32
    a, b = (unit(z) for z in pairs(30, 6))
    assert nf.alignment(a, b) == pytest.approx(2 - 2 * (a * b).sum(1).mean(), rel=1e-13)  # E25


def test_alignment_zero_rows():
    x, y = pairs(20, 4)
    x[3] = y[5] = 0
    x[7] = y[7] = 0
    compare(nf.alignment, ["x", "y"], x=x, y=y)
    _, grads = evaluate(nf.alignment, ["x", "y"], x=x, y=y)
    assert np.all(grads[0][[3, 7]] == 0)
    assert np.all(grads[1][[5, 7]] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_alignment_bad_rows(bad):
    x, y = pairs(140, 4)
    good = nf.alignment(x, y, reduction="none")
    x[131, 2] = bad
    rows = nf.alignment(x, y, reduction="none")
    assert np.isnan(rows[131])
    assert np.array_equal(np.delete(rows, 131), np.delete(good, 131))
    _, grads = evaluate(nf.alignment, ["x", "y"], x=x, y=y)
    assert all(np.all(np.isfinite(np.delete(grad, 131, 0))) for grad in grads)


# ---- uniformity ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", [n for n in SIZES if n > 1])
def test_uniformity_rows(dtype, n):
    compare(nf.uniformity, ["x"], dtype, x=points(n, 19, dtype), value_floor=1.0)


@dtypes
@pytest.mark.parametrize("d", DEPTHS)
def test_uniformity_columns(dtype, d):
    compare(nf.uniformity, ["x"], dtype, x=points(35, d, dtype), floor=1.0 if d == 1 else 0.0)


@dtypes
@pytest.mark.parametrize("t", [0.01, 0.5, 2, 10, 15.1, 100])
@pytest.mark.parametrize("d", [3, 40])
def test_uniformity_options(dtype, t, d):
    x = points(90, d, dtype)
    compare(nf.uniformity, ["x"], dtype, x=x, t=t, value_floor=1.0)
    x = x / np.sqrt(np.asarray(t * d, dtype))
    compare(nf.uniformity, ["x"], dtype, x=x, t=t, normalize=False, value_floor=1.0)


@dtypes
def test_uniformity_layouts(dtype, kind):
    x = points(60, 21, dtype)
    expected, (grad,) = evaluate(nf.uniformity, ["x"], x=x)
    for layout in layouts(x).values():
        if kind == "torch":
            layout = torch.from_numpy(layout.copy(order="K"))
        value, (own,) = evaluate(nf.uniformity, ["x"], x=layout)
        assert value == expected
        assert np.array_equal(np.asarray(own), grad)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_as_if_converted(dtype):
    x, y = (of_kind("torch", a, dtype) for a in pairs(70, 20))
    for f, half in ((nf.uniformity, {"x": x}), (nf.alignment, {"x": x, "y": y})):
        value, grads = evaluate(f, list(half), **half)
        wide, wide_grads = evaluate(f, list(half), **{name: a.float() for name, a in half.items()})
        assert value.dtype == torch.float32
        assert value == wide
        assert all(torch.equal(a, b.to(x.dtype)) for a, b in zip(grads, wide_grads, strict=True))


@dtypes
@pytest.mark.parametrize("t", [0.5, 2.0, 60.0, 300.0])
def test_closed_forms(dtype, t):
    tolerance = VALUE[dtype]
    collapsed = np.ones((9, 4), dtype)
    assert nf.uniformity(collapsed, t=t) == pytest.approx(0, abs=tolerance)
    for n in (2, 5, 30):
        simplex = (np.eye(n) - 1 / n).astype(dtype)
        # E29: the least that n points can have.
        assert nf.uniformity(simplex, t=t) == pytest.approx(-2 * t * n / (n - 1), rel=tolerance)
    for d in (1, 3, 50):
        x = np.vstack([np.eye(d), -np.eye(d)]).astype(dtype)
        m = d * (2 * d - 1)
        log_terms = [math.log(d / m) - 4 * t] + ([math.log(2 * d * (d - 1) / m) - 2 * t] if d > 1 else [])
        assert nf.uniformity(x, t=t) == pytest.approx(np.logaddexp.reduce(log_terms), rel=tolerance)


def test_never_minus_infinity():
    x = np.vstack([np.eye(8), -np.eye(8)]).astype(np.float32)
    assert nf.uniformity(x, t=60) == pytest.approx(-120.069, abs=5e-4)
    two = np.array([[1.0, 0], [-1, 0]], np.float32)
    assert nf.uniformity(two, t=1000) == -4000
    # Norms near 80 in 64 dimensions: every exponential underflows, their log-sum-exp does not.
    far = 10 * rng(1).standard_normal((60, 64)).astype(np.float32)
    value, (grad,) = evaluate(nf.uniformity, ["x"], x=far, normalize=False)
    expected, (expected_grad,) = reference(nf.uniformity, ["x"], x=far, normalize=False)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert value < -10000
    assert np.all(np.isfinite(grad))
    assert_gradient(grad, expected_grad, 1e-2)  # weights are exponentials of 1e4, known to 1e-3 in float32
    assert_gradient(evaluate(nf.uniformity, ["x"], x=far.astype(float), normalize=False)[1][0], expected_grad, 1e-10)


def test_simplex_is_the_least():
    for n, d in ((5, 4), (20, 30), (33, 32)):
        bound = -2 * 2 * n / (n - 1)
        assert nf.uniformity(points(n, d)) >= bound
        assert nf.uniformity(np.eye(n) - 1 / n) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("distance", [1e-2, 1e-3])
@pytest.mark.parametrize("d", [3, 16, 17, 64])
def test_close_points_keep_their_accuracy(distance, d):
    """A cluster of diameter 1e-3: the value is -t d^2, so a relative error of it is one of the distances."""
    x = points(1, d) / np.linalg.norm(points(1, d)) + distance * unit(points(30, d, seed=2))
    x = x.astype(np.float32)
    value, (grad,) = evaluate(nf.uniformity, ["x"], x=x, t=1 / distance**2, normalize=False)
    expected, (expected_grad,) = reference(nf.uniformity, ["x"], x=x, t=1 / distance**2, normalize=False)
    assert_value(value, expected, 1e-6)
    assert_gradient(grad, expected_grad, 1e-5)


@pytest.mark.parametrize("d", [3, 64])
def test_offset_does_not_matter(d):
    x = points(80, d) / np.sqrt(d)
    x32 = (x + 1000).astype(np.float32)
    value, (grad,) = evaluate(nf.uniformity, ["x"], x=x32, normalize=False)
    expected, (expected_grad,) = reference(nf.uniformity, ["x"], x=x32, normalize=False)
    assert_value(value, expected, 1e-6)
    assert_gradient(grad, expected_grad, 1e-5)


def test_zero_rows():
    x = points(40, 6)
    x[[3, 9]] = 0
    compare(nf.uniformity, ["x"], x=x)
    assert np.all(evaluate(nf.uniformity, ["x"], x=x)[1][0][[3, 9]] == 0)
    assert nf.uniformity(np.zeros((5, 3))) == 0


@pytest.mark.parametrize("t", [2, 100])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan(t, normalize):
    x = points(40, 6)
    x[3, 2] = np.nan
    assert np.isnan(nf.uniformity(x, t=t, normalize=normalize))


@dtypes
def test_invariances(dtype):
    x = points(100, 12, dtype)
    value, (grad,) = evaluate(nf.uniformity, ["x"], x=x)
    rotation = np.linalg.qr(points(12, 12))[0].astype(dtype)
    turned, (turned_grad,) = evaluate(nf.uniformity, ["x"], x=x @ rotation)
    assert_value(turned, value, VALUE[dtype])
    assert_gradient(turned_grad, grad @ rotation, GRADIENT[dtype])
    order = rng(1).permutation(100)
    permuted, (permuted_grad,) = evaluate(nf.uniformity, ["x"], x=x[order])
    assert_value(permuted, value, VALUE[dtype])
    assert_gradient(permuted_grad, grad[order], GRADIENT[dtype])
    along = np.abs((grad.astype(float) * x).sum(1)) / np.linalg.norm(x, axis=1)
    assert along.max() <= GRADIENT[dtype] * np.linalg.norm(grad)


@dtypes
@pytest.mark.parametrize("t", [2, 40])
def test_bitwise_for_any_number_of_threads(dtype, t, threads):
    x, y = pairs(531, 70, dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        value, (grad,) = evaluate(nf.uniformity, ["x"], x=x, t=t)
        close, (close_grad, _) = evaluate(nf.alignment, ["x", "y"], x=x, y=y)
        results.append((value, grad, close, close_grad))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows(n, kind):
    with pytest.raises(ValueError, match=rf"^x: expected at least two rows, got {n}"):
        nf.uniformity(of_kind(kind, np.ones((n, 3))))


# ---- the optimum of the sphere ---------------------------------------------------------------------------------------

# d: t = 1, 2, 3
OPTIMUM = {
    2: (-1.176006459, -1.575027204, -1.791814875),
    3: (-1.404779808, -2.079777061, -2.484912794),
    4: (-1.535865526, -2.414909581, -2.982148556),
    8: (-1.755925239, -3.082527233, -4.097874553),
    16: (-1.875853896, -3.513036436, -4.936461929),
    32: (-1.937614361, -3.751805020, -5.446438770),
    64: (-1.968764778, -3.875235590, -5.719935487),
    128: (-1.984376877, -3.937530010, -5.859526688),
    256: (-1.992187737, -3.968753784, -5.929706648),
    512: (-1.996093780, -3.984375475, -5.964846154),
    1024: (-1.998046879, -3.992187559, -5.982422176),
}


@pytest.mark.parametrize("d", OPTIMUM)
def test_optimum(d):
    for t, expected in zip((1, 2, 3), OPTIMUM[d], strict=True):
        assert nf.uniformity_of_sphere(d, t) == pytest.approx(expected, abs=1e-9)
    assert nf.uniformity_of_sphere(d) == nf.uniformity_of_sphere(d, 2)


@pytest.mark.parametrize("t", [1e-6, 0.1, 2, 50, 1000])
def test_optimum_closed_forms(t):
    # d = 1: two points, half the pairs at distance 0. d = 3: an elementary integral.
    assert nf.uniformity_of_sphere(1, t) == pytest.approx(math.log(0.5) + math.log1p(math.exp(-4 * t)), rel=1e-9)
    assert nf.uniformity_of_sphere(3, t) == pytest.approx(math.log(-math.expm1(-4 * t) / (4 * t)), rel=1e-9)
    assert nf.uniformity_of_sphere(10**9, t) == pytest.approx(-2 * t, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 5, 64, 1000])
@pytest.mark.parametrize("t", [0.2, 2, 30])
def test_optimum_bessel(dim, t):
    """0F1 through SciPy's scaled Bessel function, where that does not underflow."""
    special = pytest.importorskip("scipy.special")
    order = dim / 2 - 1
    bessel = special.ive(order, 2 * t)
    if bessel > 1e-280:
        expected = math.lgamma(dim / 2) - order * math.log(t) + math.log(bessel)
        assert nf.uniformity_of_sphere(dim, t) == pytest.approx(expected, abs=1e-9 * max(1, dim))
    assert -2 * t <= nf.uniformity_of_sphere(dim, t) <= 0


@pytest.mark.parametrize("d", [2, 3, 8, 128])
def test_many_uniform_points_reach_it(d):
    x = rng(d).standard_normal((3000, d))
    assert nf.uniformity(x) == pytest.approx(nf.uniformity_of_sphere(d), abs=0.01)


@pytest.mark.parametrize("dim", [0, -3, 2.5, True, math.nan, math.inf, "3", None])
def test_optimum_bad_dimension(dim):
    with pytest.raises(ValueError, match=r"^dim: expected a positive integer"):
        nf.uniformity_of_sphere(dim)


@pytest.mark.parametrize("t", [0, -1, math.nan, math.inf])
def test_bad_t(t):
    with pytest.raises(ValueError, match=r"^t: expected a positive number"):
        nf.uniformity_of_sphere(3, t)
    with pytest.raises(ValueError, match=r"^t: expected a positive number"):
        nf.uniformity(np.eye(3), t=t)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"^alpha: expected a positive number"):
        nf.alignment(np.eye(3), np.eye(3), alpha=alpha)
