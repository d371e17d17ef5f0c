"""The decoupled loss, on the CPU: against the dense float64 form, closed forms, other codes' formula, and its traps.

It can be negative and is the difference of two scores: its digits are those of the larger one, logit_scale or 1.
"""

import math

import numpy as np
import pytest
import torch
from generators import DEPTHS, SIZES, VALUE, assert_gradient, assert_value, compare, evaluate, of_kind, pairs, rng

import nearfar as nf

pytestmark = pytest.mark.isa

DTYPES = ["float32", "float64"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
ALL = ["z1", "z2", "logit_scale"]


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_every_number_of_rows(dtype, n):
    x, y = pairs(n, 19, dtype)
    compare(nf.dcl_loss, ALL, dtype, z1=x, z2=y, logit_scale=5.0, value_floor=5.0)


@dtypes
@pytest.mark.parametrize("d", DEPTHS)
def test_every_number_of_columns(dtype, d):
    x, y = pairs(35, d, dtype)
    compare(nf.dcl_loss, ALL, dtype, z1=x, z2=y, logit_scale=5.0, value_floor=5.0, floor=1.0 if d == 1 else 0.0)


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["temperature", "logit_scale"])
def test_options(dtype, reduction, normalize, name):
    x, y = (of_kind("torch", a, dtype) for a in pairs(45, 6))
    weights = of_kind("torch", rng(1).standard_normal(90), dtype) if reduction == "none" else None
    arguments = {"z1": x, "z2": y, "reduction": reduction, "normalize": normalize}
    arguments[name] = torch.tensor(0.8, dtype=torch.float64)
    compare(nf.dcl_loss, ["z1", "z2", name], dtype, weights=weights, **arguments, value_floor=4.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("tau", [0.001, 0.005, 0.01, 100.0])
def test_temperatures(dtype, tau):
    x, y = (of_kind("torch", a, dtype) for a in pairs(150, 24))
    scale = torch.tensor(1 / tau, dtype=torch.float64)
    compare(nf.dcl_loss, ALL, dtype, z1=x, z2=y, logit_scale=scale, value_floor=max(1 / tau, 1))


@dtypes
def test_many_chunks(dtype):
    x, y = pairs(700, 40, dtype)
    compare(nf.dcl_loss, ALL, dtype, z1=x, z2=y, logit_scale=10.0, value_floor=10.0)


def test_closed_forms(kind):
    x = of_kind(kind, np.linalg.qr(rng(1).standard_normal((16, 16)))[0])
    assert float(nf.dcl_loss(x, x, temperature=0.5)) == pytest.approx(1.4011973816621555, rel=1e-12)
    for tau in (0.001, 0.1, 1.0):
        value = float(nf.dcl_loss(x, x, temperature=tau))
        assert value == pytest.approx(math.log(30) - 1 / tau, rel=1e-12)  # negative: not clipped, not softplus
    same = of_kind(kind, np.ones((16, 5)))
    assert float(nf.dcl_loss(same, same)) == pytest.approx(math.log(30), rel=1e-12)
    assert nf.dcl_loss(x, x) == nf.dcl_loss(x, x, temperature=0.1)


def test_mask_does_not_leak_at_low_temperatures():
    """A mask that adds log(1e-45) = -103.6 to a score gives -100.7 here: the positive, at 200, shines through it."""
    x = np.eye(40)[:20]
    value = nf.dcl_loss(x, x, temperature=0.005)
    assert value == pytest.approx(math.log(38) - 200, rel=1e-12)


def decoupled(z1, z2, temperature):
    """The authors' one-way form: anchors of z1 against both views."""
    n = len(z1)
    cross = z1 @ z2.T / temperature
    scores = torch.cat([z1 @ z1.T / temperature, cross], 1)
    out = torch.eye(n, dtype=torch.bool).repeat(1, 2)
    return (torch.logsumexp(scores.masked_fill(out, -torch.inf), 1) - cross.diagonal()).mean()


def test_equals_the_authors_form_both_ways():
    x, y = (torch.nn.functional.normalize(torch.from_numpy(a)).requires_grad_() for a in pairs(30, 6))
    theirs = (decoupled(x, y, 0.2) + decoupled(y, x, 0.2)) / 2
    ours = nf.dcl_loss(x, y, temperature=0.2, normalize=False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for own, other in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True):
        assert_gradient(own, other.numpy(), 1e-12)
    rows = nf.dcl_loss(x, y, temperature=0.2, reduction="none")
    assert rows[:30].mean().item() == pytest.approx(decoupled(x, y, 0.2).item(), rel=1e-12)


def test_nt_xent_is_its_softplus():
    """log(e^s+ + rest) - s+ = softplus(log rest - s+): the two losses tell the same, anchor by anchor."""
    x, y = pairs(50, 7)
    rows = nf.dcl_loss(x, y, temperature=0.3, reduction="none")
    assert_value(nf.nt_xent_loss(x, y, temperature=0.3, reduction="none"), np.logaddexp(0, rows), 1e-12)
    # The pull of the positive is full, whatever the loss: that is what is decoupled.
    x = np.eye(64)
    _, slope = nf.value_and_grad(nf.dcl_loss, 3)(x, x, logit_scale=1000.0)
    assert slope == pytest.approx(-1, rel=1e-12)
    _, slope = nf.value_and_grad(nf.nt_xent_loss, 3)(x, x, logit_scale=1000.0)
    assert slope == 0


@dtypes
def test_one_item_has_no_negatives(dtype, kind):
    x, y = (of_kind(kind, a, dtype) for a in pairs(1, 5))
    value, grads = evaluate(nf.dcl_loss, ["z1", "z2"], z1=x, z2=y)
    assert value == 0
    assert all(np.array_equal(np.asarray(grad), np.zeros((1, 5))) for grad in grads)
    assert nf.dcl_loss(x[:0], y[:0]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_as_if_converted(dtype):
    x, y = (of_kind("torch", a, dtype) for a in pairs(130, 33))
    value, grads = evaluate(nf.dcl_loss, ["z1", "z2"], z1=x, z2=y)
    wide, wide_grads = evaluate(nf.dcl_loss, ["z1", "z2"], z1=x.float(), z2=y.float())
    assert value == wide
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert torch.equal(grad, wide_grad.to(x.dtype))


@dtypes
def test_bitwise_for_any_number_of_threads(dtype, threads):
    x, y = pairs(331, 70, dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        value, grads = evaluate(nf.dcl_loss, ALL, z1=x, z2=y, logit_scale=9.0)
        results.append((value, *grads))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_value_tolerance_is_that_of_the_scores():
    """Rows near 0 are differences of scores near 10: absolute error of their rounding, not relative."""
    x, y = pairs(100, 24, "float32")
    rows = nf.dcl_loss(x, y, reduction="none")
    exact = nf.dcl_loss(x.astype(float), y.astype(float), reduction="none")
    assert np.abs(exact).min() < 0.05
    assert_value(rows, exact, VALUE["float32"], floor=10.0)
