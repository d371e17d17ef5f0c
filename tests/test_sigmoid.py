"""The sigmoid loss, on the CPU: against the dense float64 form, closed forms, open_clip's formula, and its traps."""

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

pytestmark = pytest.mark.isa

DTYPES = ["float32", "float64"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
ALL = ["image_features", "text_features", "logit_scale", "logit_bias"]


def call(x, y, scale=10.0, bias=-10.0, **options):
    return {"image_features": x, "text_features": y, "logit_scale": scale, "logit_bias": bias, **options}


# ---- against the dense form ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_every_number_of_rows(dtype, n):
    x, y = pairs(n, 19, dtype)
    compare(nf.siglip_loss, ALL, dtype, **call(x, y, 5.0, -3.0))


@dtypes
@pytest.mark.parametrize("d", DEPTHS)
def test_every_number_of_columns(dtype, d):
    x, y = pairs(35, d, dtype)
    compare(nf.siglip_loss, ALL, dtype, **call(x, y, 5.0, -3.0), floor=1.0 if d == 1 else 0.0)


@dtypes
def test_many_chunks(dtype):
    x, y = pairs(700, 40, dtype)
    compare(nf.siglip_loss, ALL, dtype, **call(x, y))


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_options(dtype, reduction, normalize):
    x, y = (of_kind("torch", a, dtype) for a in pairs(145, 6))
    scalars = (torch.tensor(v, dtype=torch.float64) for v in (1.5, -0.7))
    weights = of_kind("torch", rng(1).standard_normal(145), dtype) if reduction == "none" else None
    arguments = call(x, y, *scalars, reduction=reduction, normalize=normalize)
    compare(nf.siglip_loss, ALL, dtype, weights=weights, **arguments)


@dtypes
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("bias", [-300.0, -10.0, 0.0, 10.0, 300.0])
def test_scales_and_biases(dtype, scale, bias):
    """No overflow and no lost digits, wherever on the sigmoid the logits lie."""
    x, y = pairs(150, 24, dtype)
    value, grads = evaluate(nf.siglip_loss, ALL, **call(x, y, scale, bias))
    expected, expected_grads = reference(nf.siglip_loss, ALL, **call(x, y, scale, bias))
    # A logit is known to steps of its own size, and so is the logarithm of what is left of it.
    step = 2.0**-24 if dtype == "float32" else 2.0**-53
    known = step * (scale + abs(bias))
    assert_value(value, expected, max(VALUE[dtype], known))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_gradient(grad, expected_grad, max(GRADIENT[dtype], 4 * known), floor=1e-37 if dtype == "float32" else 0)


def test_defaults_and_reductions(kind):
    x, y = (of_kind(kind, a) for a in pairs(33, 5))
    value = nf.siglip_loss(x, y)
    assert value == nf.siglip_loss(x, y, 10.0, -10.0)
    rows = numpy_of(nf.siglip_loss(x, y, reduction="none"))
    assert rows.shape == (33,)
    assert float(value) == pytest.approx(rows.sum() / 33, rel=1e-14)  # by N rows, not N^2 pairs
    assert float(nf.siglip_loss(x, y, reduction="sum")) == pytest.approx(rows.sum(), rel=1e-14)
    empty = of_kind(kind, np.zeros((0, 5)))
    assert nf.siglip_loss(empty, empty) == 0


# ---- closed forms ----------------------------------------------------------------------------------------------------


def softplus(x):
    return np.logaddexp(0, x)


def test_orthonormal(kind):
    x = of_kind(kind, np.linalg.qr(points(16, 16))[0])
    assert float(nf.siglip_loss(x, x)) == pytest.approx(0.6938281640481982, rel=1e-12)


@pytest.mark.parametrize(("n", "expected"), [(1024, 10.046488472798071)])
def test_at_initialisation(n, expected):
    """All cosines 0: what the bias of -10 is for. With bias 0 it would be N log 2."""
    for dtype in DTYPES:
        x = np.zeros((n, 2), dtype)
        y = x.copy()
        x[:, 0] = y[:, 1] = 1
        rows = nf.siglip_loss(x, y, reduction="none")
        assert_value(
            rows, np.full(n, expected), VALUE[dtype]
        )  # equal terms round alike, yet every row keeps its digits
        assert nf.siglip_loss(x, y, 10.0, 0.0) == pytest.approx(n * math.log(2), rel=1e-6)


@dtypes
def test_good_matches_keep_their_digits(dtype):
    """softplus(-l) of a match is tiny; softplus(l) - l, the form for chunks, would give 0 or noise."""
    for scale in (20.0, 60.0):
        x = np.eye(3, dtype=dtype)[:1]
        value, grads = evaluate(nf.siglip_loss, ALL, **call(x, x, scale, 1.0))
        assert value == pytest.approx(math.log1p(math.exp(-scale - 1)), rel=max(VALUE[dtype], scale * 2.0**-23))
        assert grads[3] == pytest.approx(-1 / (1 + math.exp(scale + 1)), rel=max(GRADIENT[dtype], scale * 2.0**-23))


def open_clip(x, y, scale, bias):
    """open_clip's SigLipLoss._loss on features of unit norm."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), dtype=logits.dtype) - torch.ones_like(logits)
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(x)


def test_equals_open_clip():
    x, y = (torch.nn.functional.normalize(torch.from_numpy(a)).requires_grad_() for a in pairs(40, 8))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (12.0, -9.0))
    leaves = (x, y, scale, bias)
    theirs, ours = open_clip(*leaves), nf.siglip_loss(*leaves, normalize=False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for own, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert_gradient(own, other.numpy(), 1e-12)


def test_not_shift_invariant():
    """The bias is a parameter, not a constant of a softmax."""
    x, y = pairs(20, 5)
    _, slope = nf.value_and_grad(nf.siglip_loss, 3)(x, y)
    h = 1e-5
    up, down = nf.siglip_loss(x, y, 10.0, -10 + h), nf.siglip_loss(x, y, 10.0, -10 - h)
    assert slope == pytest.approx((up - down) / (2 * h), rel=1e-8)
    assert abs(slope) > 1e-3


def test_symmetric_in_its_sets():
    x, y = pairs(61, 8)
    assert nf.siglip_loss(x, y) == pytest.approx(nf.siglip_loss(y, x), rel=1e-13)
    order = rng(4).permutation(61)
    rows = nf.siglip_loss(x, y, reduction="none")
    assert_value(nf.siglip_loss(x[order], y[order], reduction="none"), rows[order], 1e-12)


# ---- dtypes, layouts, bad rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_as_if_converted(dtype):
    x, y = (of_kind("torch", a, dtype) for a in pairs(130, 33))
    value, grads = evaluate(nf.siglip_loss, ALL[:2], **call(x, y))
    wide, wide_grads = evaluate(nf.siglip_loss, ALL[:2], **call(x.float(), y.float()))
    assert value.dtype == torch.float32
    assert value == wide
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert torch.equal(grad, wide_grad.to(x.dtype))
    compare(nf.siglip_loss, ALL[:2], dtype, **call(x, y))


@pytest.mark.parametrize("layout", ["fortran", "strided", "negative rows", "negative columns", "read-only"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layouts(layout, dtype):
    x, y = pairs(50, 21, dtype)
    expected = evaluate(nf.siglip_loss, ALL, **call(x, y))
    actual = evaluate(nf.siglip_loss, ALL, **call(layouts(x)[layout], layouts(y)[layout]))
    assert actual[0] == expected[0]
    for grad, other in zip(actual[1], expected[1], strict=True):
        assert np.array_equal(grad, other)


def test_one_array_in_both_places():
    x = torch.from_numpy(points(50, 7)).requires_grad_()
    nf.siglip_loss(x, x).backward()
    _, grads = reference(nf.siglip_loss, ALL[:2], **call(x.detach(), x.detach()))
    assert_gradient(x.grad, grads[0] + grads[1], 1e-12)


@dtypes
def test_zero_rows(dtype):
    x, y = pairs(50, 7, dtype)
    x[3] = y[[3, 8]] = 0
    compare(nf.siglip_loss, ALL, dtype, **call(x, y))
    _, grads = evaluate(nf.siglip_loss, ALL[:2], **call(x, y))
    assert np.all(grads[0][3] == 0)
    assert np.all(grads[1][[3, 8]] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows(bad):
    """A bad image touches its own row only; a bad text is a pair of every image."""
    x, y = pairs(140, 9)
    good = nf.siglip_loss(x, y, reduction="none")
    x[131, 4] = bad
    rows = nf.siglip_loss(x, y, reduction="none")
    assert np.isnan(rows[131])
    assert np.array_equal(np.delete(rows, 131), np.delete(good, 131))
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, y)]
    nf.siglip_loss(*leaves, reduction="none")[:131].sum().backward()
    assert torch.isfinite(leaves[0].grad[:131]).all()
    assert np.all(np.isnan(nf.siglip_loss(y, x, reduction="none")))


# ---- how it is computed must not show --------------------------------------------------------------------------------


@dtypes
def test_bitwise_for_any_number_of_threads(dtype, threads):
    x, y = pairs(531, 70, dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        value, grads = evaluate(nf.siglip_loss, ALL, **call(x, y))
        results.append((value, *grads))
        assert nf.siglip_loss(x, y) == value
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear():
    """N = 8192, D = 128, value and both gradients, 8 MiB themselves: under 40 MiB, where one matrix of pairs has 256."""
    code = """
        import resource
        import numpy as np
        import nearfar as nf

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        generator = np.random.default_rng(0)
        x, y = (generator.standard_normal((8192, 128), np.float32) for _ in range(2))
        nf.value_and_grad(nf.siglip_loss, (0, 1))(x[:256], y[:256])
        before = peak()
        nf.value_and_grad(nf.siglip_loss, (0, 1))(x, y)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 40


# ---- bad input -------------------------------------------------------------------------------------------------------

X, Y = pairs(6, 4)


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_bad_bias(bias):
    for given in (bias, np.array(bias)):
        with pytest.raises(ValueError, match=r"^logit_bias: expected a finite number, got"):
            nf.siglip_loss(X, Y, 10.0, given)
    with pytest.raises(ValueError, match=r"^logit_bias: expected a finite number, got"):
        nf.siglip_loss(torch.from_numpy(X), torch.from_numpy(Y), 10.0, torch.tensor(bias))


@pytest.mark.parametrize(
    ("error", "message", "bias"),
    [
        (TypeError, "logit_bias: expected a number, got str", "1"),
        (TypeError, "logit_bias: expected a number, got NoneType", None),
        (ValueError, "logit_bias: expected a number or a 0-d array, got shape (6,)", X[:, 0]),
        (TypeError, "logit_bias: expected a number or a NumPy 0-d array", torch.tensor(1.0)),
    ],
)
def test_wrong_bias(error, message, bias):
    with pytest.raises(error) as caught:
        nf.siglip_loss(X, Y, 10.0, bias)
    assert str(caught.value).startswith(message)


# ---- the module ------------------------------------------------------------------------------------------------------


def test_module_is_the_function():
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    assert nf.SigLipLoss()(x, y) == nf.siglip_loss(x, y)
    assert nf.SigLipLoss(5.0, -2.0, normalize=False, reduction="sum")(x, y) == nf.siglip_loss(
        x, y, 5.0, -2.0, normalize=False, reduction="sum"
    )
    assert nf.SigLipLoss()(x, y, 20.0, -3.0) == nf.siglip_loss(x, y, 20.0, -3.0)  # as open_clip calls it
    assert list(nf.SigLipLoss().parameters()) == []
    assert repr(nf.SigLipLoss()) == "SigLipLoss(logit_scale=10.0, logit_bias=-10.0, learnable_temperature=False)"
    assert repr(nf.SigLipLoss(learnable_temperature=True)).endswith("logit_bias=-10.0, learnable_temperature=True)")
    with pytest.raises(ValueError, match=r"^logit_scale: expected a positive number"):
        nf.SigLipLoss(0.0)


def test_learned_scale_and_bias():
    x, y = (torch.from_numpy(a).float() for a in pairs(64, 8))
    loss = nf.SigLipLoss(learnable_temperature=True)
    assert sorted(name for name, _ in loss.named_parameters()) == ["log_logit_scale", "logit_bias"]
    assert loss.log_logit_scale.item() == pytest.approx(math.log(10), rel=1e-6)
    assert loss.logit_bias.item() == -10
    loss(x, y).backward()
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    nf.siglip_loss(x, y, scale, bias).backward()
    assert loss.log_logit_scale.grad.item() == pytest.approx(10 * scale.grad.item(), rel=1e-5)
    assert loss.logit_bias.grad.item() == pytest.approx(bias.grad.item(), rel=1e-5)
    # At most ln 100 in forward, as open_clip's trainer clamps it.
    with torch.no_grad():
        loss.log_logit_scale.fill_(9.0)
    assert loss(x, y).item() == pytest.approx(nf.siglip_loss(x, y, 100.0).item(), rel=1e-5)
    other = nf.SigLipLoss(learnable_temperature=True)
    other.load_state_dict(loss.state_dict())
    assert other.log_logit_scale.item() == 9.0
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    with torch.no_grad():
        other.log_logit_scale.fill_(math.log(10))
    first = other(x, y).item()
    for _ in range(10):
        optimizer.zero_grad()
        other(x, y).backward()
        optimizer.step()
    assert other(x, y).item() < first
