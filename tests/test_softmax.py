"""Losses over a softmax of negatives, on the CPU: every call against the dense float64 form, and the closed forms."""

import inspect
import itertools
import math
import subprocess
import sys
import textwrap

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
    numpy_of,
    of_kind,
    pairs,
    points,
    reference,
    rng,
)

import nearfar as nf
from nearfar import loss_operations

pytestmark = pytest.mark.isa

DTYPES = ["float32", "float64"]


def call(f, x, y, scale, **options):
    """The arguments of a two-view loss, with its temperature given as a multiplier."""
    first, second = {
        nf.info_nce_loss: ("query", "positive_key"),
        nf.clip_loss: ("image_features", "text_features"),
        nf.nt_xent_loss: ("z1", "z2"),
    }[f]
    return {first: x, second: y, "logit_scale": scale, **options}


TWO_VIEWS = [nf.info_nce_loss, nf.clip_loss, nf.nt_xent_loss]
two_views = pytest.mark.parametrize("f", TWO_VIEWS, ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


# ---- against the dense form: shapes ----------------------------------------------------------------------------------


@two_views
@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_every_number_of_rows(f, dtype, n):
    x, y = pairs(n, 19, dtype)
    arguments = call(f, x, y, 5.0)
    # One item has nothing but rounding for a gradient: it is judged against the terms that cancel.
    compare(f, list(arguments), dtype, **arguments, floor=5.0 if n == 1 else 0.0)


@two_views
@dtypes
@pytest.mark.parametrize("d", DEPTHS)
def test_every_number_of_columns(f, dtype, d):
    x, y = pairs(35, d, dtype)
    arguments = call(f, x, y, 5.0)
    # On a line unit rows are signs, and their gradient is 0.
    compare(f, list(arguments), dtype, **arguments, floor=1.0 if d == 1 else 0.0)


@dtypes
@pytest.mark.parametrize(
    ("n", "m"), [(1, 0), (1, 1), (7, 241), (33, 12), (129, 253), (2, 1021), (300, 1), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("in_batch", [False, True])
def test_shared_negatives(dtype, n, m, in_batch):
    x, y = pairs(n, 13, dtype)
    arguments = dict(query=x, positive_key=y, negative_keys=points(m, 13, dtype, 5), logit_scale=4.0, in_batch=in_batch)
    wanted = ["query", "positive_key", "negative_keys", "logit_scale"]
    compare(nf.info_nce_loss, wanted, dtype, **arguments, floor=4.0 if n * m == 0 or m == 1 else 0.0)


@dtypes
@pytest.mark.parametrize(("n", "m"), [(1, 0), (1, 1), (7, 241), (33, 12), (129, 3), (300, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("in_batch", [False, True])
def test_negatives_of_each_query(dtype, n, m, in_batch):
    x, y = pairs(n, 13, dtype)
    own = points(n * m, 13, dtype, 5).reshape(n, m, 13)
    arguments = dict(query=x, positive_key=y, negative_keys=own, logit_scale=4.0, in_batch=in_batch)
    wanted = ["query", "positive_key", "negative_keys", "logit_scale"]
    compare(nf.info_nce_loss, wanted, dtype, **arguments, floor=4.0 if n * m == 0 or m == 1 else 0.0)


@dtypes
def test_many_chunks(dtype):
    x, y = pairs(700, 40, dtype)
    for f in TWO_VIEWS:
        arguments = call(f, x, y, 1 / 0.07)
        compare(f, list(arguments), dtype, **arguments)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 33, 241])
def test_limit(dtype, n):
    x, y = pairs(n, 17, dtype)
    compare(nf.info_nce_limit, ["x", "y", "temperature"], dtype, x=x, y=y, temperature=0.3, value_floor=1.0)


# ---- against the dense form: options ---------------------------------------------------------------------------------


def combinations():
    """Every combination of options of `info_nce_loss` that is not refused."""
    for negatives, in_batch, ids, symmetric, reduction, normalize, name in itertools.product(
        (None, "shared", "own"), (None, True, False), (False, True), (False, True), ("mean", "sum", "none"),
        (True, False), ("temperature", "logit_scale"),
    ):  # fmt: skip
        own_batch = negatives is None if in_batch is None else in_batch
        refused = (symmetric and negatives) or (ids and not own_batch) or not (own_batch or negatives)
        if not refused:
            yield negatives, in_batch, ids, symmetric, reduction, normalize, name


def test_every_combination(kind):
    n, d = 37, 6
    for case, (negatives, in_batch, ids, symmetric, reduction, normalize, name) in enumerate(combinations()):
        if reduction == "none" and kind == "numpy":
            continue
        dtype = DTYPES[case % 2]
        x, y = (of_kind(kind, a / (1 if normalize else 2), dtype) for a in pairs(n, d, seed=case))
        own = {None: None, "shared": points(29, d), "own": points(n * 4, d).reshape(n, 4, d)}[negatives]
        own = of_kind(kind, own if own is None or normalize else own / 2, dtype)
        scalar = 3.0 if name == "logit_scale" else 0.4
        arguments = dict(
            query=x, positive_key=y, negative_keys=own, in_batch=in_batch, symmetric=symmetric, reduction=reduction,
            normalize=normalize, ids=of_kind(kind, rng(case).integers(0, 20, n)) if ids else None,
        )  # fmt: skip
        arguments[name] = scalar if kind == "numpy" else torch.tensor(scalar, dtype=torch.float64)
        weights = of_kind(kind, rng(case).standard_normal(n), dtype) if reduction == "none" else None
        wanted = ["query", "positive_key", name] + (["negative_keys"] if negatives else [])
        compare(nf.info_nce_loss, wanted, dtype, weights=weights, **arguments, value_floor=1.0)


def test_no_reduction_numpy():
    x, y = pairs(37, 6)
    for f in TWO_VIEWS:
        arguments = call(f, x, y, 3.0, reduction="none")
        assert_value(f(**arguments), dense(f, **arguments), 1e-12)


def dense(f, **arguments):
    """The value of the dense form."""
    return reference(f, list(arguments)[:1], **arguments)[0]


@pytest.mark.parametrize("f", [nf.clip_loss, nf.nt_xent_loss], ids=lambda f: f.__name__)
@dtypes
def test_two_views_options(f, dtype):
    for reduction, normalize in itertools.product(("mean", "sum", "none"), (True, False)):
        x, y = (of_kind("torch", a, dtype) for a in pairs(45, 6))
        arguments = call(f, x, y, torch.tensor(0.8, dtype=torch.float64), reduction=reduction, normalize=normalize)
        rows = 90 if f is nf.nt_xent_loss else 45
        weights = of_kind("torch", rng(1).standard_normal(rows), dtype) if reduction == "none" else None
        wanted = list(arguments)[:3]
        compare(f, wanted, dtype, weights=weights, **arguments, value_floor=1.0)


def test_ids_leave_out_duplicates():
    x, y = pairs(40, 5)
    ids = np.arange(40) // 2
    for dtype in ("int8", "int32", "int64", "uint8", "uint64"):
        given = (ids.astype(dtype) + np.array(100).astype(dtype)) if dtype != "int8" else ids.astype(dtype) - 50
        compare(nf.info_nce_loss, ["query", "positive_key"], query=x, positive_key=y, ids=given)
    unique = nf.info_nce_loss(x, y, ids=rng(0).permutation(40) - 20)
    assert unique == nf.info_nce_loss(x, y)
    assert nf.info_nce_loss(x, y, ids=np.zeros(40, int)) == 0  # nothing is left but the positive


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@two_views
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_as_if_converted(f, dtype):
    x, y = (of_kind("torch", a, dtype) for a in pairs(130, 33))
    half, wide = call(f, x, y, 5.0), call(f, x.float(), y.float(), 5.0)
    value, grads = evaluate(f, list(half)[:2], **half)
    wide_value, wide_grads = evaluate(f, list(half)[:2], **wide)
    assert value.dtype == torch.float32
    assert value == wide_value
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert grad.dtype == x.dtype
        assert torch.equal(grad, wide_grad.to(x.dtype))
    half["logit_scale"] = torch.tensor(5.0)
    compare(f, list(half), dtype, **half)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_negatives(dtype):
    x, y = (of_kind("torch", a, dtype) for a in pairs(40, 12))
    for own in (of_kind("torch", points(50, 12), dtype), of_kind("torch", points(80, 12).reshape(40, 2, 12), dtype)):
        arguments = dict(query=x, positive_key=y, negative_keys=own, temperature=0.2, in_batch=True)
        compare(nf.info_nce_loss, ["query", "positive_key", "negative_keys"], dtype, **arguments)


def test_numpy_half():
    x, y = pairs(40, 12, "float16")
    value = nf.info_nce_loss(x, y)
    assert value.dtype == np.float32
    assert value == nf.info_nce_loss(x.astype(np.float32), y.astype(np.float32))
    compare(nf.info_nce_loss, ["query", "positive_key"], "float16", query=x, positive_key=y)


@two_views
def test_result_type(f, kind):
    for dtype, expected in (("float16", "float32"), ("float32", "float32"), ("float64", "float64")):
        x, y = (of_kind(kind, a, dtype) for a in pairs(5, 4))
        value = f(x, y)
        assert str(value.dtype).removeprefix("torch.") == expected
        assert value.shape == ()
        assert isinstance(value, torch.Tensor if kind == "torch" else np.floating)
        rows = f(x, y, reduction="none")
        assert rows.shape == (10 if f is nf.nt_xent_loss else 5,)
        assert isinstance(rows, torch.Tensor if kind == "torch" else np.ndarray)


# ---- few queries against many keys, whose rows are read once ----------------------------------------------------------

FEW = (1, 2, 3, 7, 8, 9, 12, 13, 24, 25)  # and the first numbers that are not, per width of vectors


@dtypes
@pytest.mark.parametrize("n", FEW)
@pytest.mark.parametrize(("m", "d"), [(26, 3), (241, 8), (1021, 40)])
@pytest.mark.parametrize("normalize", [True, False])
def test_few_queries(dtype, n, m, d, normalize):
    x, y = pairs(n, d, dtype)
    arguments = dict(query=x, positive_key=y, negative_keys=points(m, d, dtype, 5), normalize=normalize)
    arguments["temperature"] = 0.2 if normalize else 2.0 * d**0.5
    compare(nf.info_nce_loss, ["query", "positive_key", "negative_keys", "temperature"], dtype, **arguments)
    compare(nf.info_nce_loss, ["query", "temperature"], dtype, **arguments)


@pytest.mark.parametrize("n", [2, 7, 9])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("wanted", [["query"], ["query", "positive_key", "negative_keys"]])
def test_few_queries_weighted(n, dtype, wanted):
    """With duplicates in the batch left out, and an upstream gradient of each query."""
    x, y, keys = (of_kind("torch", a, dtype) for a in (*pairs(n, 16), points(300, 16, seed=5)))
    arguments = dict(query=x, positive_key=y, negative_keys=keys, in_batch=True, reduction="none", temperature=0.2)
    arguments["ids"] = torch.arange(n) // 2
    compare(nf.info_nce_loss, wanted, dtype, weights=torch.linspace(-1, 2, n), **arguments)


@pytest.mark.parametrize("layout", ["fortran", "strided", "negative rows", "negative columns", "read-only"])
@pytest.mark.parametrize("normalize", [True, False])
def test_few_queries_layouts(layout, normalize):
    x, y = pairs(3, 16, "float32")
    keys = points(300, 16, "float32")
    arguments = dict(query=x, positive_key=y, normalize=normalize)
    wanted = ["query", "negative_keys"]
    expected = evaluate(nf.info_nce_loss, wanted, negative_keys=keys, **arguments)
    actual = evaluate(nf.info_nce_loss, wanted, negative_keys=layouts(keys)[layout], **arguments)
    assert actual[0] == expected[0]
    assert all(np.array_equal(a, b) for a, b in zip(actual[1], expected[1], strict=True))


@dtypes
@pytest.mark.parametrize("wanted", [["query"], ["query", "negative_keys"]])
def test_few_queries_bitwise(threads, monkeypatch, dtype, wanted):
    """For any number of threads; without room for weights, gradients of keys are rounded elsewhere."""
    x, y = pairs(5, 70, dtype)
    arguments = dict(query=x, positive_key=y, negative_keys=points(5000, 70, dtype))
    kept = []
    for budget in (loss_operations.STRIP_BUDGET, 0):
        monkeypatch.setattr(loss_operations, "STRIP_BUDGET", budget)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            value, grads = evaluate(nf.info_nce_loss, wanted, **arguments)
            results.append((value, *grads))
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
        kept.append(results[0])
    assert kept[0][0] == kept[1][0] == nf.info_nce_loss(**arguments)
    for grad, other in zip(kept[0][1:], kept[1][1:], strict=True):
        assert_gradient(other, grad, GRADIENT[dtype])


@dtypes
def test_few_queries_of_any_norm(dtype):
    """Squares of norms leave the range of numbers before norms do."""
    x, y = pairs(2, 24, dtype)
    keys = points(100, 24, dtype)
    keys[7] = 0
    loss, (grad,) = evaluate(nf.info_nce_loss, ["query"], query=x, positive_key=y, negative_keys=keys)
    small, large = (1e-30, 1e30) if dtype == "float32" else (1e-200, 1e200)
    keys[:50] *= np.asarray([small, large], dtype)[np.arange(50) % 2, None]
    value, (other,) = evaluate(nf.info_nce_loss, ["query"], query=x, positive_key=y, negative_keys=keys)
    assert_value(value, loss, VALUE[dtype])
    assert_gradient(other, grad, GRADIENT[dtype])


# ---- memory layouts --------------------------------------------------------------------------------------------------


@two_views
@pytest.mark.parametrize("layout", ["fortran", "strided", "negative rows", "negative columns", "read-only"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layouts(f, layout, dtype):
    x, y = pairs(50, 21, dtype)
    expected = evaluate(f, list(call(f, x, y, 5.0))[:2], **call(f, x, y, 5.0))
    for a, b in ((layouts(x)[layout], y), (x, layouts(y)[layout]), (layouts(x)[layout], layouts(y)[layout])):
        actual = evaluate(f, list(call(f, x, y, 5.0))[:2], **call(f, a, b, 5.0))
        assert actual[0] == expected[0]
        for grad, expected_grad in zip(actual[1], expected[1], strict=True):
            assert np.array_equal(grad, expected_grad)
            assert np.array_equal(a, x)  # inputs are as they were


@pytest.mark.parametrize("layout", ["fortran", "strided", "negative rows", "negative columns", "read-only"])
def test_layouts_of_negatives(layout):
    x, y = pairs(20, 7)
    for own in (points(31, 7), points(60, 7).reshape(20, 3, 7)):
        arguments = dict(query=x, positive_key=y, logit_scale=5.0)
        expected = evaluate(nf.info_nce_loss, ["query", "negative_keys"], negative_keys=own, **arguments)
        actual = evaluate(nf.info_nce_loss, ["query", "negative_keys"], negative_keys=layouts(own)[layout], **arguments)
        assert actual[0] == expected[0]
        assert np.array_equal(actual[1][1], expected[1][1])


def test_zero_stride():
    row = points(1, 9)
    x, y = np.broadcast_to(row, (30, 9)), np.broadcast_to(points(1, 9, seed=1), (30, 9))
    for f in TWO_VIEWS:
        compare(f, ["logit_scale"], **call(f, x, y, 3.0))
        compare(f, list(call(f, x, y, 3.0))[:2], **call(f, x, y, 3.0), floor=1.0)
    own = np.broadcast_to(points(3, 9), (30, 3, 9))
    compare(nf.info_nce_loss, ["query", "negative_keys"], query=x, positive_key=y, negative_keys=own, floor=1.0)


def test_torch_layouts():
    x, y = (of_kind("torch", a) for a in pairs(30, 8))
    expected = nf.info_nce_loss(x, y)
    for a in (x.T.contiguous().T, torch.stack([x, y], 2)[:, :, 0], x.repeat_interleave(3, 0)[::3]):
        leaf = a.detach().requires_grad_()
        value = nf.info_nce_loss(leaf, y)
        value.backward()
        assert value == expected
        assert_gradient(leaf.grad, reference(nf.info_nce_loss, ["query"], query=x, positive_key=y)[1][0], 1e-12)
    negative = torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], -1)).conj().imag
    assert negative.is_neg()
    assert nf.info_nce_loss(negative, y) == expected


def test_one_array_in_both_places():
    x = points(50, 7)
    for f in TWO_VIEWS:
        compare(f, list(call(f, x, x, 2.0))[:2], **call(f, x, x, 2.0))
    leaf = torch.from_numpy(x).requires_grad_()
    nf.info_nce_loss(leaf, leaf).backward()
    _, grads = reference(nf.info_nce_loss, ["query", "positive_key"], query=x, positive_key=x)
    assert_gradient(leaf.grad, grads[0] + grads[1], 1e-12)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 129])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_collapsed(n, tau):
    x = np.ones((n, 5))
    assert nf.info_nce_loss(x, x, temperature=tau) == pytest.approx(math.log(n), abs=1e-12)
    assert nf.clip_loss(x, x, 1 / tau) == pytest.approx(math.log(n), abs=1e-12)
    assert nf.nt_xent_loss(x, x, temperature=tau) == pytest.approx(math.log(2 * n - 1), abs=1e-12)
    assert nf.info_nce_loss(x, x, np.ones((77, 5)), temperature=tau) == pytest.approx(math.log(78), abs=1e-12)
    assert nf.info_nce_limit(x, x, tau) == pytest.approx(0, abs=1e-12)
    _value, (dx, dy) = nf.value_and_grad(nf.info_nce_loss, (0, 1))(x, x, temperature=tau)
    assert np.abs(dx).max() < 1e-13 / tau
    assert np.abs(dy).max() < 1e-13 / tau


@pytest.mark.parametrize(
    ("f", "tau", "expected"),
    [
        (nf.info_nce_loss, 1.0, 1.8745969781992118),
        (nf.info_nce_loss, 0.5, 1.1085722724612195),
        (nf.info_nce_loss, 0.1, 6.807671718742678e-4),
        (nf.clip_loss, 0.5, 1.1085722724612195),
        (nf.nt_xent_loss, 0.5, 1.6213780439239296),
    ],
)
def test_orthonormal(f, tau, expected, kind):
    x = of_kind(kind, np.linalg.qr(points(16, 16))[0])
    assert float(f(**call(f, x, x, 1 / tau))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 5, 65])
def test_simplex(n, tau):
    x = np.eye(n) - 1 / n
    expected = math.log1p((n - 1) * math.exp(-n / ((n - 1) * tau)))
    assert nf.info_nce_loss(x, x, temperature=tau) == pytest.approx(expected, rel=1e-12)
    # E29: it is the minimum over unit vectors, so the gradient there is 0 and nothing else is below.
    _, (dx, dy) = nf.value_and_grad(nf.info_nce_loss, (0, 1))(x, x, temperature=tau)
    assert np.abs(dx + dy).max() < 1e-14 / tau
    y = points(n, n)
    assert nf.info_nce_loss(y, y, temperature=tau) >= expected


def test_published_nt_xent():
    """optax's test of NT-Xent: pairs are rows of equal label."""
    x = np.array([[-1.9540, 1.0780], [0.2380, -0.5703], [1.8745, -0.0195], [-0.6719, -1.9210]])
    assert nf.nt_xent_loss(x[::2], x[1::2], temperature=0.07) == pytest.approx(14.010320041574158, rel=1e-12)
    x[0] = 0
    assert nf.nt_xent_loss(x[::2], x[1::2], temperature=0.07) == pytest.approx(9.288926990449815, rel=1e-12)


def test_two_negatives_is_logistic():
    """E17: with one negative the loss is softplus(s- - s+)."""
    x, y = pairs(20, 4)
    negatives = points(20, 4, seed=3)[:, None]
    s = 0.5 * (x * (negatives[:, 0] - y)).sum(1)
    loss = nf.info_nce_loss(x, y, negatives, logit_scale=0.5, normalize=False, reduction="none")
    assert_value(loss, np.logaddexp(0, s), 1e-12)


@two_views
@pytest.mark.parametrize("tau", [0.05, 0.01])
def test_small_losses_keep_their_digits(f, tau):
    """Orthonormal views: log(1 + c e^(-1/tau)) down to 1e-42; the positive is not absorbed by its own logarithm."""
    for dtype in DTYPES:
        x = np.eye(40, dtype=dtype)
        scale = 1 / tau
        c = 78 if f is nf.nt_xent_loss else 39
        rows = f(**call(f, x, x, scale, reduction="none")).astype(float)
        expected = math.log1p(c * math.exp(-scale))
        if expected > np.finfo(dtype).tiny:
            assert_value(rows, np.full_like(rows, expected), VALUE[dtype])
        value, grads = evaluate(f, list(call(f, x, x, scale)), **call(f, x, x, scale))
        if expected > np.finfo(dtype).tiny:
            assert value == pytest.approx(expected, rel=VALUE[dtype])
            # c / (e^(1/tau) + c) is the weight of all negatives together, whose cosine is 0.
            assert grads[2] == pytest.approx(-c / (math.exp(scale) + c), rel=GRADIENT[dtype])


def test_temperature_to_zero_and_infinity():
    """E22: tau L tends to a hinge on the hardest negative, tau (L - log N) to a difference of means."""
    x, y = (a / np.linalg.norm(a, axis=1)[:, None] for a in pairs(40, 6))
    s = x @ y.T
    hinge = np.maximum(s.max(1) - s.diagonal(), 0)
    assert_value(1e-5 * nf.info_nce_loss(x, y, temperature=1e-5, reduction="none"), hinge, 1e-12, floor=0.1)
    linear = s.mean(1) - s.diagonal()
    loss = nf.info_nce_loss(x, y, temperature=1e6, reduction="none")
    assert_value(1e6 * (loss - math.log(40)), linear, 1e-5, floor=0.1)


@pytest.mark.parametrize("d", [2, 8, 128])
def test_limit_of_uniform_points(d):
    """Aligned and uniform: -1/tau + log 0F1(; d/2; 1/(4 tau^2)), which is uniformity_of_sphere at t = 1/(2 tau)."""
    x = rng(d).standard_normal((2000, d))
    tau = 0.5
    # Less the term of i = j, which the finite mean has.
    value = nf.info_nce_limit(x, x, tau)
    assert value == pytest.approx(nf.uniformity_of_sphere(d, 1 / (2 * tau)), abs=0.02)


# ---- gradients as identities -----------------------------------------------------------------------------------------


def test_gradient_is_softmax_less_identity():
    """E22: dL/ds_ij = (p_ij - [i = j]) / N."""
    n = 60
    x, y = (a / 2 for a in pairs(n, 10))
    scale = 2.0
    s = scale * x @ y.T
    p = np.exp(s - np.logaddexp.reduce(s, axis=1)[:, None])
    g = (p - np.eye(n)) / n
    _value, (dx, dy, dscale) = nf.value_and_grad(nf.info_nce_loss, (0, 1, 4))(x, y, logit_scale=scale, normalize=False)
    assert_gradient(dx, scale * g @ y, 1e-12)
    assert_gradient(dy, scale * g.T @ x, 1e-12)
    assert dscale == pytest.approx((g * s).sum() / scale, rel=1e-12)


@two_views
def test_rotation_invariance(f):
    x, y = pairs(70, 12)
    rotation = np.linalg.qr(points(12, 12, seed=7))[0]
    value, grads = evaluate(f, list(call(f, x, y, 4.0))[:2], **call(f, x, y, 4.0))
    turned, turned_grads = evaluate(f, list(call(f, x, y, 4.0))[:2], **call(f, x @ rotation, y @ rotation, 4.0))
    assert turned == pytest.approx(value, rel=1e-13)
    for grad, turned_grad in zip(grads, turned_grads, strict=True):
        assert_gradient(turned_grad, grad @ rotation, 1e-12)


@two_views
@dtypes
def test_scale_invariance_and_tangency(f, dtype):
    x, y = pairs(70, 67, dtype)
    factors = np.logspace(-30, 30, 70).astype(dtype)[:, None]
    value, grads = evaluate(f, list(call(f, x, y, 4.0))[:2], **call(f, x, y, 4.0))
    scaled, scaled_grads = evaluate(f, list(call(f, x, y, 4.0))[:2], **call(f, factors * x, y, 4.0))
    assert_value(scaled, value, VALUE[dtype])
    assert_gradient(scaled_grads[0] * factors, grads[0], GRADIENT[dtype])
    along = np.abs((grads[0].astype(float) * x).sum(1)) / np.linalg.norm(x, axis=1)
    assert along.max() <= GRADIENT[dtype] * np.linalg.norm(grads[0])


def test_permutation():
    x, y = pairs(61, 8)
    order = rng(4).permutation(61)
    for f in TWO_VIEWS:
        rows = f(**call(f, x, y, 4.0, reduction="none"))
        permuted = f(**call(f, x[order], y[order], 4.0, reduction="none"))
        assert_value(permuted[:61], rows[:61][order], 1e-13, floor=1.0)


def test_shift_of_scores():
    """A constant added to all scores of a row changes nothing."""
    x, y = pairs(40, 5)
    longer = np.hstack([x, np.full((40, 1), 300.0)]), np.hstack([y, np.ones((40, 1))])
    value = nf.info_nce_loss(x, y, logit_scale=1.0, normalize=False)
    assert nf.info_nce_loss(*longer, logit_scale=1.0, normalize=False) == pytest.approx(value, rel=1e-12)


def test_clip_is_symmetric_info_nce():
    x, y = pairs(140, 9)
    for reduction in ("mean", "sum", "none"):
        one = nf.clip_loss(x, y, 3.0, reduction=reduction)
        other = nf.info_nce_loss(x, y, logit_scale=3.0, symmetric=True, reduction=reduction)
        assert np.array_equal(one, other)
        assert_value(one, nf.clip_loss(y, x, 3.0, reduction=reduction), 1e-13)


def test_shared_negatives_are_the_same_for_each_query():
    x, y = pairs(30, 9)
    negatives = points(17, 9)
    for in_batch in (False, True):
        shared = nf.info_nce_loss(x, y, negatives, in_batch=in_batch, reduction="none")
        each = nf.info_nce_loss(x, y, np.broadcast_to(negatives, (30, 17, 9)), in_batch=in_batch, reduction="none")
        assert_value(each, shared, 1e-12)


def test_defaults():
    x, y = pairs(20, 5)
    assert nf.info_nce_loss(x, y) == nf.info_nce_loss(x, y, temperature=0.07)
    assert nf.clip_loss(x, y) == nf.clip_loss(x, y, 1 / 0.07)
    assert nf.nt_xent_loss(x, y) == nf.nt_xent_loss(x, y, temperature=0.5)
    assert nf.info_nce_loss(x, y, temperature=0.5) == nf.info_nce_loss(x, y, logit_scale=2.0)


# ---- extremes --------------------------------------------------------------------------------------------------------


@two_views
@dtypes
@pytest.mark.parametrize("tau", [0.001, 0.01, 100.0])
def test_temperatures(f, dtype, tau):
    """The contract holds at any temperature: no overflow, no lost digits."""
    x, y = pairs(150, 24, dtype)
    arguments = call(f, x, y, 1 / tau)
    compare(f, list(arguments), dtype, **arguments)


@two_views
@dtypes
def test_saturated(f, dtype):
    """Views that agree, at a very low temperature: the loss is 0 to rounding, never negative or NaN."""
    x = np.eye(64, dtype=dtype)
    value, grads = evaluate(f, list(call(f, x, x, 1000.0)), **call(f, x, x, 1000.0))
    assert value == 0
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    assert all(np.abs(grad).max() < 1e-3 for grad in grads)


@dtypes
def test_wide_range_of_scores(dtype):
    """Scores from -1e4 to 1e4: no overflow, no underflow to log 0."""
    x, y = pairs(100, 8, dtype)
    x *= 30
    y *= 30
    value, grads = evaluate(
        nf.info_nce_loss, ["query", "positive_key"], query=x, positive_key=y, logit_scale=1.0, normalize=False
    )
    expected = dense(nf.info_nce_loss, query=x, positive_key=y, logit_scale=1.0, normalize=False)
    assert_value(value, expected, VALUE[dtype])
    assert all(np.all(np.isfinite(grad)) for grad in grads)


@two_views
@dtypes
def test_zero_rows(f, dtype):
    """A zero row stays zero and gets zero gradient; the others are as the definition says."""
    x, y = pairs(50, 7, dtype)
    x[3] = 0
    y[[3, 8]] = 0
    arguments = call(f, x, y, 3.0)
    compare(f, list(arguments), dtype, **arguments)
    _, grads = evaluate(f, list(arguments)[:2], **arguments)
    assert np.all(grads[0][3] == 0)
    assert np.all(grads[1][[3, 8]] == 0)
    z = np.zeros((5, 3), dtype)
    value, grads = evaluate(f, list(arguments)[:2], **call(f, z, z, 3.0))
    assert value == pytest.approx(math.log(9 if f is nf.nt_xent_loss else 5), rel=1e-6)
    assert all(np.all(grad == 0) for grad in grads)


@two_views
def test_zero_rows_not_normalised(f):
    x, y = pairs(50, 7)
    x[3] = y[8] = 0
    compare(f, list(call(f, x, y, 0.3)), **call(f, x, y, 0.3, normalize=False))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_bad_query_touches_its_own_row(bad, normalize, kind):
    x, y = pairs(140, 9)
    good = nf.info_nce_loss(x, y, reduction="none", normalize=normalize)
    x[131, 4] = bad
    for negatives in (None, points(40, 9), points(280, 9).reshape(140, 2, 9)):
        own, keys, others = (of_kind(kind, a) for a in (x, y, negatives))
        loss = numpy_of(nf.info_nce_loss(own, keys, others, in_batch=True, reduction="none", normalize=normalize))
        others_good = np.delete(loss, 131)
        assert np.all(np.isfinite(others_good))
        if normalize or np.isnan(bad):
            assert np.isnan(loss[131])
        if negatives is None:
            assert np.array_equal(others_good, np.delete(good, 131))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_key(bad):
    """A bad key is in every denominator of its batch, but only in its own row where keys are not shared."""
    x, y = pairs(40, 9)
    y[7, 2] = bad
    assert np.all(np.isnan(nf.info_nce_loss(x, y, reduction="none")))
    loss = nf.info_nce_loss(x, y, points(30, 9), reduction="none")
    assert np.array_equal(np.flatnonzero(np.isnan(loss)), [7])
    y[7, 2] = 0
    negatives = points(80, 9).reshape(40, 2, 9)
    negatives[11, 1, 3] = bad
    loss = nf.info_nce_loss(x, y, negatives, reduction="none")
    assert np.array_equal(np.flatnonzero(np.isnan(loss)), [11])
    ids = np.arange(40)
    ids[[5, 7]] = 100
    y[7] = bad  # left out of row 5's denominator, so row 5 does not see it
    loss = nf.info_nce_loss(x, y, ids=ids, reduction="none")
    assert np.array_equal(np.flatnonzero(~np.isnan(loss)), [5])


@pytest.mark.parametrize("f", [nf.clip_loss, nf.nt_xent_loss], ids=lambda f: f.__name__)
def test_bad_row_of_two_views(f):
    """The other direction's denominators hold every row, so all losses are NaN: nothing is hidden."""
    x, y = pairs(40, 9)
    x[7, 2] = np.nan
    assert np.all(np.isnan(f(x, y, reduction="none")))
    assert np.isnan(f(x, y))


def test_bad_rows_of_gradients():
    x, y = pairs(140, 9)
    x[131, 4] = np.nan
    negatives = points(30, 9)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, y)]
    loss = nf.info_nce_loss(*leaves, torch.from_numpy(negatives), reduction="none")
    loss[:131].sum().backward()
    for leaf in leaves:
        bad = torch.isnan(leaf.grad).any(1)
        assert not bad[:131].any()
        assert not bad[132:].any()


# ---- how it is computed must not show --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("with_negatives", [False, True])
def test_no_strip_budget(monkeypatch, dtype, with_negatives):
    """Scores computed twice instead of kept: the same result."""
    x, y = pairs(300, 40, dtype)
    arguments = dict(query=x, positive_key=y, logit_scale=9.0, ids=rng(0).integers(0, 200, 300), in_batch=True)
    wanted = ["query", "positive_key", "logit_scale"]
    if with_negatives:
        arguments["negative_keys"] = points(250, 40, dtype)
        wanted.append("negative_keys")
    value, grads = evaluate(nf.info_nce_loss, wanted, **arguments)
    monkeypatch.setattr(loss_operations, "STRIP_BUDGET", 0)
    again, grads_again = evaluate(nf.info_nce_loss, wanted, **arguments)
    assert again == value
    for grad, other in zip(grads, grads_again, strict=True):
        assert_gradient(other, grad, GRADIENT[dtype])
    compare(nf.info_nce_loss, wanted, dtype, **arguments)


@pytest.mark.isa
@dtypes
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("scale", "normalize"), [(9.0, True), (60.0, True), (0.5, False)])  # a common base, and none
def test_scores_kept_or_computed_twice(monkeypatch, dtype, n, scale, normalize):
    """The same bits, also of masked pairs, of classes, and where a row is NaN."""
    x, y = pairs(n, 19, dtype)
    ids = rng(0).integers(0, max(1, n // 3), n)
    broken = x.copy()
    broken[n // 2, 3] = np.nan
    calls = [
        (nf.clip_loss, ["image_features", "text_features"], {}, x, y),
        (nf.clip_loss, ["image_features", "text_features"], {}, broken, y),
        (nf.nt_xent_loss, ["z1", "z2"], {}, x, y),
        (nf.dcl_loss, ["z1", "z2"], {}, x, y),
        (nf.info_nce_loss, ["query", "positive_key"], dict(symmetric=True, ids=ids), x, y),
        (nf.sup_con_loss, ["embeddings"], dict(labels=ids), x),
    ]
    for f, leaves, more, *sets in calls:
        arguments = dict(zip(leaves, sets, strict=True), logit_scale=scale, normalize=normalize, **more)
        results = []
        for budget in (loss_operations.STRIP_BUDGET, 0):
            monkeypatch.setattr(loss_operations, "STRIP_BUDGET", budget)
            value, grads = evaluate(f, leaves, **arguments)
            results.append([np.asarray(part).tobytes() for part in (value, *grads)])
        monkeypatch.undo()
        assert results[0] == results[1], f.__name__


@two_views
@dtypes
def test_bitwise_for_any_number_of_threads(f, dtype, threads):
    x, y = pairs(531, 70, dtype)
    wanted = list(call(f, x, y, 9.0))
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        value, grads = evaluate(f, wanted, **call(f, x, y, 9.0))
        results.append((value, *grads))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bitwise_with_negatives(threads, monkeypatch):
    x, y = pairs(531, 30, "float32")
    for negatives in (points(777, 30, "float32"), points(531 * 3, 30, "float32").reshape(531, 3, 30)):
        for budget in (loss_operations.STRIP_BUDGET, 0):
            monkeypatch.setattr(loss_operations, "STRIP_BUDGET", budget)
            results = []
            for count in (1, 2, 3, 7):
                threads(count)
                arguments = dict(query=x, positive_key=y, negative_keys=negatives, in_batch=True)
                value, grads = evaluate(nf.info_nce_loss, ["query", "positive_key", "negative_keys"], **arguments)
                results.append((value, *grads))
            for other in results[1:]:
                assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
        monkeypatch.undo()


def test_value_does_not_depend_on_gradients():
    for f in TWO_VIEWS:
        x, y = pairs(300, 20, "float32")
        assert f(**call(f, x, y, 7.0)) == evaluate(f, list(call(f, x, y, 7.0)), **call(f, x, y, 7.0))[0]


TEMPERATURES = {nf.info_nce_loss: 0.07, nf.nt_xent_loss: 0.5, nf.dcl_loss: 0.1, nf.hcl_loss: 0.5, nf.sup_con_loss: 0.1}


@pytest.mark.parametrize("f", TEMPERATURES, ids=lambda f: f.__name__)
def test_default_temperature_is_what_the_signature_says(f):
    stated = inspect.signature(f).parameters["temperature"].default
    x, y = pairs(9, 4)
    arguments = (x, np.arange(9) % 3) if f is nf.sup_con_loss else (x, y)
    assert stated == TEMPERATURES[f]
    assert f(*arguments) == f(*arguments, temperature=stated)
    with pytest.raises(ValueError, match="^temperature: give temperature or logit_scale"):
        f(*arguments, temperature=stated, logit_scale=2.0)


def test_memory_is_linear():
    """N = 16384, D = 128, value and both gradients, 16 MiB themselves: under 64 MiB beyond the inputs."""
    code = """
        import resource
        import numpy as np
        import nearfar as nf

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        generator = np.random.default_rng(0)
        x, y = (generator.standard_normal((16384, 128), np.float32) for _ in range(2))
        nf.value_and_grad(nf.info_nce_loss, (0, 1))(x[:256], y[:256])
        before = peak()
        nf.value_and_grad(nf.info_nce_loss, (0, 1))(x, y)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 64
