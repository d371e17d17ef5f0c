"""Losses of bfloat16 rows that are multiplied two numbers at a time (csrc/cpu/halves.hpp), where a CPU has AVX512-BF16.

Values are those of the same rows in float32, to rounding. Gradients are those of weights rounded to bfloat16, and are
returned in bfloat16. Elsewhere, and for problems smaller than these, both are those of float32: the same tests hold.
"""

import functools

import numpy as np
import pytest
import torch

import nearfar as nf

pytestmark = pytest.mark.isa

ROUNDING = 2.0**-9  # of a number to bfloat16, at most


def labels_of(x):
    return torch.arange(len(x)) % 50


def sup_con(x, y, **options):
    return nf.sup_con_loss(torch.stack([x, y], 1), labels_of(x), **options)


def siglip(x, y, **options):
    return nf.siglip_loss(x, y, torch.tensor(10.0), torch.tensor(-10.0), **options)


def multi_similarity(x, y, **options):
    return nf.multi_similarity_loss(torch.cat([x, y]), torch.cat([labels_of(x), labels_of(y)]), **options)


LOSSES = {
    "info_nce": nf.info_nce_loss,
    "clip": nf.clip_loss,
    "nt_xent": nf.nt_xent_loss,
    "dcl": nf.dcl_loss,
    "sup_con": sup_con,
    "siglip": siglip,
    "hcl": nf.hcl_loss,
    "multi_similarity": multi_similarity,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# 2^24 products and a few.
SHAPES = [(1024, 16), (1021, 18), (773, 31), (725, 33), (601, 64), (257, 257), (181, 513), (150, 771)]
every_shape = pytest.mark.parametrize(("n", "d"), SHAPES)


def points(n, d, seed=0, spread=1.0, offset=0.3):
    """Two matched sets in bfloat16, in a cone as embeddings are."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng) * spread + offset
    return x.bfloat16(), (x + 0.7 * torch.randn(n, d, generator=rng)).bfloat16()


def evaluate(loss, x, y, dtype=None, **options):
    """Value and both gradients; of the same rows in `dtype`."""
    x, y = (a.detach().to(dtype or a.dtype).requires_grad_() for a in (x, y))
    value = loss(x, y, **options)
    return value.item(), torch.autograd.grad(value, (x, y))


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@every_loss
@every_shape
def test_values_are_those_of_float32(loss, n, d):
    x, y = points(n, d)
    expected = float(loss(x.double(), y.double()))
    assert float(loss(x, y)) == pytest.approx(expected, rel=1e-6)


@every_loss
@every_shape
def test_gradients(loss, n, d):
    """Two roundings: of the weights, of the result. The value is that without a gradient."""
    x, y = points(n, d)
    value, grads = evaluate(loss, x, y)
    expected, expected_grads = evaluate(loss, x, y, torch.float64)
    assert value == pytest.approx(expected, rel=1e-6)
    assert value == pytest.approx(float(loss(x, y)), rel=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert error(grad, wanted) < 2**0.5 * ROUNDING


@every_loss
def test_rows_as_given(loss):
    """Not normalised: dot products of the rows as they are."""
    if loss in (multi_similarity,):
        pytest.skip("its logits are meant for unit rows")
    x, y = points(601, 64, spread=0.125, offset=0.05)
    value, grads = evaluate(loss, x, y, normalize=False)
    expected, expected_grads = evaluate(loss, x, y, torch.float64, normalize=False)
    assert value == pytest.approx(expected, rel=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted) < 2**0.5 * ROUNDING


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("name", ["info_nce", "clip", "nt_xent"])
def test_temperatures(name, temperature):
    x, y = points(725, 33)
    options = {"logit_scale": 1 / temperature} if name == "clip" else {"temperature": temperature}
    value, grads = evaluate(LOSSES[name], x, y, **options)
    expected, expected_grads = evaluate(LOSSES[name], x, y, torch.float64, **options)
    # A score's rounding is that of 1 / temperature, and a small loss is moved by as much of itself.
    assert value == pytest.approx(expected, rel=1e-6 + 1e-7 / temperature)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted) < 2**0.5 * ROUNDING


@every_loss
def test_rows_of_any_norm(loss):
    """A row counts by its direction, also where its squares leave the range of numbers."""
    x, y = points(601, 64)
    powers = torch.tensor([2.0**-90, 2.0**-40, 1.0, 2.0**40, 2.0**90]).repeat(121)[:601, None]
    value, grads = evaluate(loss, x, y)
    scaled, scaled_grads = evaluate(loss, (x * powers).bfloat16(), (y * powers.flip(0)).bfloat16())
    assert scaled == pytest.approx(value, rel=1e-6)
    for grad, other, power in zip(grads, scaled_grads, (powers, powers.flip(0)), strict=True):
        assert error(other.double() * power, grad.double()) < ROUNDING


def test_zero_rows():
    x, y = points(601, 64)
    x[5], y[7] = 0, 0
    value, grads = evaluate(nf.clip_loss, x, y)
    expected, expected_grads = evaluate(nf.clip_loss, x.float(), y.float())
    assert value == pytest.approx(expected, rel=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted.double()) < 2**0.5 * ROUNDING


@every_loss
@pytest.mark.parametrize("normalize", [True, False])
def test_narrow_cone(loss, normalize):
    """Rows that are nearly equal: what rounding takes from all of their weights must not be all that is left."""
    if loss is multi_similarity and not normalize:
        pytest.skip("its logits are meant for unit rows")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(601, 64, generator=rng) + 20
    y = x + 0.7 * torch.randn(601, 64, generator=rng)
    x, y = (torch.nn.functional.normalize(a).bfloat16() for a in (x, y))
    options = {} if normalize else {"normalize": False}
    _, grads = evaluate(loss, x, y, **options)
    _, expected = evaluate(loss, x, y, torch.float64, **options)
    for grad, wanted in zip(grads, expected, strict=True):
        assert error(grad, wanted) < 2**0.5 * ROUNDING


def test_what_else_has_a_gradient():
    """Scale, bias, and sets of different sizes."""
    x, y = points(601, 64)
    keys = points(1301, 64, seed=1)[0]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        a, b, c = (z.detach().to(dtype).requires_grad_() for z in (x, y, keys))
        scale, bias = (torch.tensor(s, dtype=wide, requires_grad=True) for s in (10.0, -10.0))
        one = torch.autograd.grad(nf.siglip_loss(a, b, scale, bias), (scale, bias))
        two = torch.autograd.grad(nf.clip_loss(a, b, logit_scale=scale), scale)
        three = torch.autograd.grad(nf.info_nce_loss(a, b, c, ids=torch.arange(601) // 2, in_batch=True), (a, b, c))
        results.append((*one, *two, *three))
    for index, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert error(actual, expected) < (1e-3 if index < 3 else 2**0.5 * ROUNDING)


def test_rows_too_long_to_normalize():
    """Norms whose inverse is no normal number: such a row counts as zero, and touches nobody else."""
    x, y = points(601, 64)
    expected = nf.info_nce_loss(x.float(), y.float(), reduction="none")
    y[7] = torch.where(torch.arange(64) % 2 == 0, 3e38, -3e38)
    rows = nf.info_nce_loss(x, y, reduction="none")
    wide = nf.info_nce_loss(x.float(), y.float(), reduction="none")
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(rows, wide, rtol=1e-5, atol=1e-6)
    assert not torch.equal(rows, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_touches_its_own_rows(bad):
    x, y = points(601, 64)
    x[5, 3] = bad
    rows = nf.info_nce_loss(x, y, reduction="none")
    assert torch.isnan(rows).nonzero().flatten().tolist() == [5]
    x.requires_grad_()
    (grad,) = torch.autograd.grad(nf.info_nce_loss(x, y, reduction="none"), x, torch.ones(601))
    assert torch.isnan(grad).any(1).nonzero().flatten().tolist() == [5]


def test_layouts():
    """Rows of other strides have the bits of the rows laid out."""
    x, y = points(601, 64)
    expected, expected_grads = evaluate(nf.clip_loss, x, y)
    for a, b in (
        (x.T.contiguous().T, y.T.contiguous().T),
        (torch.stack([x, x], 2)[:, :, 0], torch.stack([y, y], 1)[:, 0]),
    ):
        assert not a.is_contiguous()
        value, grads = evaluate(nf.clip_loss, a, b)
        assert value == expected
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@every_loss
def test_bits_do_not_depend_on_threads(loss, threads):
    x, y = points(773, 31)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(evaluate(loss, x, y))
    for value, grads in results[1:]:
        assert value == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_more_columns_than_a_strip_keeps(monkeypatch):
    """Scores are computed twice where a strip of them is too large to keep."""
    x, y = points(300, 33)
    keys = points(4001, 33, seed=1)[0]
    loss = functools.partial(nf.info_nce_loss, negative_keys=keys)
    expected, expected_grads = evaluate(loss, x, y)
    monkeypatch.setattr("nearfar.loss_operations.STRIP_BUDGET", 0)
    value, grads = evaluate(loss, x, y)
    assert value == expected
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted.double()) < 2**0.5 * ROUNDING
