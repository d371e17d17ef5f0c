"""Gradients of float16 rows before they are rounded to float16: `test_cuda.py` says where they run.

On Hopper weights are rounded to float16 before they meet the rows, under a power of two that their bound decides. Here
is what that costs: the float32 gradient against float64, where scores, factors and shapes make weights large or small.
"""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import torch
from test_cuda import DEVICE, EMULATED, on_hopper, pair, tensor
from test_cuda_losses import BOTH, VIEWS, classes, labelled, proxies

import nearfar as nf
from nearfar import backend, gradients, loss_operations

pytestmark = test_cuda.pytestmark
on_device = test_cuda.on_device
small_strips = test_cuda.small_strips

KEYS = ["query", "positive_key"]
# Of a gradient's norm. A weight is off by 2^-11 of itself at most on Hopper, 2e-4 in the root mean square, which is what
# remains where no exact terms of positives join them; elsewhere weights keep twice the digits, logits those of float32.
BOUND = 3e-4 if on_hopper() else 5e-5


def wide_gradients(loss, arguments):
    """The float32 gradients, by part of the call, and their names."""
    call = loss.__nearfar_plan__(**arguments)
    if call.tail is None:
        _, *grads = gradients._launch(call, "01234")
    else:
        tensors = (*(part.value() for part in call.parts), *call.extra)
        forward, backward = gradients._ROWS[call.operation]
        rows = forward(*tensors, *call.config).requires_grad_()
        (slopes,) = torch.autograd.grad(call.tail.value(rows, tensors[len(call.parts) - 1]).sum(), rows)
        grads = backward(slopes, rows.detach(), *tensors, *call.config)
    return [(part.names, grad) for part, grad in zip(call.parts, grads, strict=True)]


def error_of(grad, exact):
    """Relative to the norm."""
    return np.linalg.norm(g.numpy_of(grad).reshape(exact.shape) - exact) / np.linalg.norm(exact)


def check(loss, wanted, bound=BOUND, /, **arguments):
    """Gradients of rows within the bound of their norm, each part of the call by itself."""
    expected = dict(zip(wanted, g.reference(loss, wanted, **arguments)[1], strict=True))
    worst = 0.0
    for names, grad in wide_gradients(loss, arguments):
        if grad is None or not names or not set(names) <= set(wanted):
            continue
        assert grad.dtype == torch.float32
        exact = np.concatenate([expected[name].reshape(-1, grad.shape[-1]) for name in names])
        worst = max(worst, error_of(grad, exact))
    assert 0 < worst <= bound, f"error {worst:.3g} of the norm"


def keys(n, d, **options):
    """Arguments of a contrastive loss."""
    return dict(zip(KEYS, pair(n, d, "float16"), strict=True)) | options


def shifted(n, d, toward, dtype="float16"):
    """Queries on one side of the sphere; keys on the same (toward = 1) or on the other (-1)."""
    axis = np.zeros(d)
    axis[0] = 3 * np.sqrt(d)
    x, y = g.pairs(n, d)
    return tensor(x + axis, dtype), tensor(y + toward * axis, dtype)


# Depths around 64; one tile, one row more, several in both directions.
@pytest.mark.parametrize(("n", "d"), [(37, 16), (64, 64), (65, 33), (129, 65), (300, 130)])
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss, nf.nt_xent_loss, nf.dcl_loss, nf.siglip_loss])
def test_shapes(loss, n, d):
    names = {nf.info_nce_loss: KEYS, nf.clip_loss: BOTH, nf.siglip_loss: BOTH}.get(loss, VIEWS)
    check(loss, names, **dict(zip(names, pair(n, d, "float16"), strict=True)))


# Products of weights take tiles of 128 x 256 or 256 x 128 (plan.hpp), and both kinds of rows end in the middle of one.
@pytest.mark.parametrize(
    ("n", "d"), [(260, 300), (520, 100), (650, 388), pytest.param(4000, 1000, marks=test_cuda.gpu_only)]
)
def test_tiles_of_products(n, d):
    check(nf.info_nce_loss, KEYS, **keys(n, d))


def test_narrow_last_block(monkeypatch):
    """Fewer steps of the depth than the parts into which wider blocks of the same strip are cut."""
    x, y = tensor(g.points(100, 20, seed=1), "float16"), tensor(g.points(1100, 20, seed=2), "float16")

    def gradients_in(strip_bytes):
        monkeypatch.setattr(backend, "STRIP_BYTES", strip_bytes)
        return loss_operations.sigmoid(None, x, y, 3.0, -1.0, "sum", True, "01", False)[1:3]

    for grad, whole in zip(gradients_in(2 * 1024 * 1024), gradients_in(1 << 28), strict=True):
        assert error_of(grad, g.numpy_of(whole)) <= 1e-5


# A common base takes unit rows and a multiplier of at most 30; below 1 / 17 most rows are too faint under it.
@pytest.mark.parametrize("temperature", [0.01, 0.034, 0.05, 0.07, 0.1, 1.0, 10.0])
def test_temperatures(temperature):
    check(nf.info_nce_loss, KEYS, **keys(150, 40), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.034, 0.07, 0.5])
@pytest.mark.parametrize("loss", [nf.nt_xent_loss, nf.hcl_loss])
def test_temperatures_of_views(loss, temperature):
    check(loss, VIEWS, **dict(zip(VIEWS, pair(80, 40, "float16"), strict=True)), temperature=temperature)


@pytest.mark.parametrize("toward", [1, -1])
@pytest.mark.parametrize("temperature", [0.034, 0.07, 0.2])
def test_rows_far_below_the_common_base(temperature, toward):
    """All scores of a row near the multiplier, or near minus the multiplier: e^-60 of the base."""
    query, key = shifted(150, 40, toward)
    check(nf.info_nce_loss, KEYS, query=query, positive_key=key, temperature=temperature)


@pytest.mark.parametrize("strips", [1, 3])
def test_faint_rows_beside_bright_ones(strips, monkeypatch):
    """Queries on either side: a tile of rows that is stored once, one stored again, and one that holds both."""
    monkeypatch.setattr(backend, "STRIP_BYTES", 2 * 384 * 384 // strips)
    query, key = shifted(300, 40, 1)
    query[130:256] *= -1
    query[290] *= -1
    check(nf.info_nce_loss, KEYS, query=query, positive_key=key, temperature=0.05)


@pytest.mark.parametrize("in_sum", [True, False])
def test_many_keys(in_sum, small_strips):
    """Weights of 1 / M, and rows of own negatives that outweigh them."""
    query, key = pair(20, 20, "float16")
    many = tensor(g.points(3000, 20, seed=5), "float16")
    own = tensor(g.points(40, 20, seed=6).reshape(20, 2, 20), "float16")
    names = [*KEYS, "negative_keys"]
    for negatives in (many, own):
        check(nf.info_nce_loss, names, query=query, positive_key=key, negative_keys=negatives, in_batch=in_sum)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_learnable_scale(scale):
    image, text = pair(150, 40, "float16")
    scale = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
    check(nf.clip_loss, BOTH, image_features=image, text_features=text, logit_scale=scale)
    check(nf.info_nce_loss, KEYS, query=image, positive_key=text, logit_scale=scale)


def test_matches_that_leave_little_to_the_others():
    """Softmaxes of 1 - 1e-5 and more on the positive: the weights together are what is left."""
    x = g.points(150, 40)
    image, text = tensor(x, "float16"), tensor(x + 0.1 * g.points(150, 40, seed=3), "float16")
    check(nf.clip_loss, BOTH, image_features=image, text_features=text, logit_scale=40.0)
    check(nf.info_nce_loss, KEYS, query=image, positive_key=text, temperature=0.035)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_rows_that_are_not_normalised(size):
    """Norms that float16 only just holds, and scores of up to 1e7 in the last case: hard maxima."""
    x, y = g.pairs(150, 40)
    norms = np.linalg.norm(x, axis=1).max()
    query, key = tensor(x * (size / norms), "float16"), tensor(y * (size / norms), "float16")
    temperature = 1.0 if size < 1 else size**2 / 20
    check(nf.info_nce_loss, KEYS, query=query, positive_key=key, normalize=False, temperature=temperature)


def test_scores_up_to_a_billion():
    query, key = (z * 1000 for z in pair(70, 200, "float16"))
    arguments = {"query": query, "positive_key": key, "normalize": False, "temperature": 1.0}
    value, grads = g.evaluate(nf.info_nce_loss, KEYS, **arguments)
    expected, _ = g.reference(nf.info_nce_loss, KEYS, **arguments)
    g.assert_value(value, expected, 1e-5)
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss, nf.siglip_loss])
def test_loss_scalers(loss, reduction):
    """A factor on the loss is a factor on the gradient, to the bit: a power of two moves nothing else."""

    def grads(times):
        leaves = [z.requires_grad_() for z in pair(150, 40, "float16")]
        value = loss(*leaves, reduction=reduction)
        weights = torch.linspace(0.5, 1, len(value), device=DEVICE) if value.ndim else torch.ones((), device=DEVICE)
        value.backward(times * weights)
        return [leaf.grad.double() for leaf in leaves]

    factor = 2.0**16
    for plain, scaled in zip(grads(1.0), grads(factor), strict=True):
        inside = (scaled.abs() < 65504) & (plain.abs() > 2.0**-13)  # normal numbers both
        assert inside.any()
        assert torch.equal(plain[inside] * factor, scaled[inside])
        assert torch.isinf(scaled[plain.abs() * factor > 65536]).all()


def test_upstream_factors_of_rows():
    """Rows of which some count a million times as much as others, and negatively."""
    query, key = pair(150, 40, "float16")
    weights = torch.logspace(-3, 3, 150, device=DEVICE) * torch.tensor([1.0, -1.0], device=DEVICE).repeat(75)
    for loss, names in ((nf.info_nce_loss, KEYS), (nf.clip_loss, BOTH), (nf.siglip_loss, BOTH)):
        call = loss.__nearfar_plan__(query, key, reduction="none")
        operation, _ = gradients._OPERATIONS[call.operation]
        _, *grads = operation(weights, *(part.value() for part in call.parts), *call.extra, *call.config, "01")
        _, expected = g.reference(loss, names, weights, **dict(zip(names, (query, key), strict=True)), reduction="none")
        for grad, exact in zip(grads, expected, strict=False):
            assert 0 < error_of(grad, exact) <= BOUND


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (5.0, 0.0), (100.0, -12.0)])
def test_siglip(scale, bias):
    image, text = pair(150, 40, "float16")
    check(nf.siglip_loss, BOTH, image_features=image, text_features=text, logit_scale=scale, logit_bias=bias)


@pytest.mark.parametrize("loss", [nf.multi_similarity_loss, nf.circle_loss, nf.proxy_anchor_loss])
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_by_label(loss, normalize):
    """Slopes of circle's logits have no bound where rows are not normalised: these keep the older path."""
    if loss is nf.proxy_anchor_loss:
        names, arguments = ["embeddings", "proxies"], proxies(150, 40, "float16")
    else:
        names, arguments = ["embeddings"], labelled(150, 40, "float16")
    if not normalize:
        arguments |= {name: arguments[name] / 8 for name in names}
    check(loss, names, **arguments, normalize=normalize)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_hcl(beta):
    check(nf.hcl_loss, VIEWS, **dict(zip(VIEWS, pair(80, 40, "float16"), strict=True)), beta=beta, tau_plus=0.05)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("count", [2, 20, 149])
def test_sup_con(count, temperature):
    arguments = {"embeddings": tensor(g.points(150, 40), "float16"), "labels": classes(150, count)}
    check(nf.sup_con_loss, ["embeddings"], **arguments, temperature=temperature)


@pytest.mark.parametrize("t", [0.5, 2.0, 8.0, 12.0])
@pytest.mark.parametrize("n", [2, 5, 150])
def test_uniformity(n, t):
    """Above 9, and earlier for few rows, weights may be too faint: these are computed in float32."""
    check(nf.uniformity, ["x"], x=tensor(g.points(n, 40), "float16"), t=t)


def test_uniformity_of_opposite_rows():
    x = g.points(1, 40)
    check(nf.uniformity, ["x"], x=tensor(np.concatenate([x, 0.01 * g.points(1, 40, seed=2) - x]), "float16"), t=4.0)


def test_blocks_of_known_normalisers(small_strips):
    """What `nf.distributed` computes of a block, whose rows count as they may."""
    x, y = pair(300, 40, "float16")
    wide = [z.cpu().double().requires_grad_() for z in (x, y)]
    s = 14 * g.unit(wide[0]) @ g.unit(wide[1]).T
    rows, columns = torch.logsumexp(s, 1).detach() + 0.3, torch.logsumexp(s, 0).detach() + 5
    u, v = torch.logspace(-6, -2, 300).double(), torch.full((300,), 1e-4).double()
    total = (u[:, None] * torch.exp(s - rows[:, None]) + v * torch.exp(s - columns)).sum()
    expected = torch.autograd.grad(total, wide)
    of = [(z.to(DEVICE), w.to(DEVICE)) for z, w in ((rows, u), (columns, v))]
    found = loss_operations.softmax_block_grad(x, y, 14.0, None, None, True, *of)
    for grad, exact in zip(found, expected, strict=False):
        assert 0 < error_of(grad, exact.numpy()) <= BOUND


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.siglip_loss])
def test_bad_rows_touch_only_their_own(loss, value):
    query, key = pair(150, 40, "float16")
    good, _ = (z.clone() for z in (query, key))
    query[3, 5] = value
    bad = loss(query, key, reduction="none")
    rest = [i for i in range(150) if i != 3]
    assert references.same_bits(bad[rest], loss(good, key, reduction="none")[rest])
    leaf = query.clone().requires_grad_()
    loss(leaf, key).backward()
    assert torch.isfinite(leaf.grad[rest]).all()
    plain = good.clone().requires_grad_()
    loss(plain, key).backward()
    g.assert_gradient(leaf.grad[rest], g.numpy_of(plain.grad[rest]), 1e-3)


def test_upstream_gradients_that_are_infinite_are_not_hidden():
    """What a loss scaler that went too far must see."""
    leaves = [z.requires_grad_() for z in pair(40, 20, "float16")]
    weights = torch.ones(40, device=DEVICE)
    weights[3] = torch.inf
    nf.info_nce_loss(*leaves, reduction="none").backward(weights)
    assert not torch.isfinite(leaves[0].grad[3]).any()
    assert torch.isfinite(leaves[0].grad[:3]).all()


def results():
    """Value and gradients, also of rows that are stored twice."""
    found = []
    for temperature in (0.04, 0.1):
        value, grads = g.evaluate(nf.info_nce_loss, KEYS, **keys(270, 70), temperature=temperature)
        found += [value, *grads]
    return [z.detach().cpu().float() for z in found]


@pytest.mark.skipif(not EMULATED, reason="the order of threads can be chosen in emulation only")
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch, small_strips):
    plain = results()
    for seed in ("6", "7"):
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", seed)
        for one, other in zip(plain, results(), strict=True):
            assert references.same_bits(one, other)
