"""The CUDA kernels of losses by sigmoids and by label against float64 references: `test_cuda.py` says where they run."""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import test_ranking  # noqa: F401  its references
import torch
from test_cuda import DEVICE, DTYPES, EMULATED, check, gpu_only, pair, tensor

import nearfar as nf
from nearfar import backend

pytestmark = test_cuda.pytestmark
on_device = test_cuda.on_device
small_strips = test_cuda.small_strips

# One tile and less, one more than a tile, several; depths around the steps.
SHAPES = [(1, 3), (2, 5), (37, 16), (65, 33), (130, 70)]
VIEWS = ["z1", "z2"]
BOTH = ["image_features", "text_features"]


def classes(n, count, seed=0):
    """Labels as data has them: not in order, any numbers."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(-(2**40), 2**40, count)[generator.integers(0, count, n)]).to(DEVICE)


def labelled(n, d, dtype, count=5):
    """Points and their labels."""
    return {"embeddings": tensor(g.points(n, d), dtype), "labels": classes(n, count)}


def proxies(n, d, dtype, count=7):
    """Proxies, points and their classes; some classes may have no point."""
    own = torch.from_numpy(np.random.default_rng(1).integers(0, count, n)).to(DEVICE)
    points, centres = tensor(g.points(n, d), dtype), tensor(g.points(count, d, seed=1), dtype)
    return {"embeddings": points, "labels": own, "proxies": centres}


def both(n, d, dtype):
    """Two views as images and texts."""
    return dict(zip(BOTH, pair(n, d, dtype), strict=True))


def views(n, d, dtype):
    """Two views of the same items."""
    return dict(zip(VIEWS, pair(n, d, dtype), strict=True))


# ---- sigmoid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_siglip(n, d, dtype):
    check(nf.siglip_loss, BOTH, dtype, **both(n, d, dtype), logit_scale=5.0, logit_bias=-3.0)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 4.0])
def test_siglip_bias_and_scale(bias):
    wanted = [*BOTH, "logit_scale", "logit_bias"]
    scale, bias = (torch.tensor(z, dtype=torch.float64, device=DEVICE) for z in (10.0, bias))
    check(nf.siglip_loss, wanted, "float64", **both(70, 24, "float64"), logit_scale=scale, logit_bias=bias)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_siglip_reductions(reduction):
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64, device=DEVICE) if reduction == "none" else None
    check(nf.siglip_loss, BOTH, "float64", **both(40, 12, "float64"), reduction=reduction, weights=weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_siglip_in_blocks(dtype, small_strips):
    arguments = both(300, 20, dtype)
    check(nf.siglip_loss, BOTH, dtype, **arguments, logit_bias=-3.0)
    value, _ = g.reference(nf.siglip_loss, BOTH, **arguments, logit_bias=-3.0)
    g.assert_value(nf.siglip_loss(**arguments, logit_bias=-3.0), value, 1e-6)


def test_siglip_of_a_match_keeps_its_digits():
    x = torch.eye(4, device=DEVICE)
    value = nf.siglip_loss(x[:1], x[:1], 50.0, -10.0)
    g.assert_value(value, np.log1p(np.exp(-40.0)), 1e-6)


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias"])
def test_siglip_scale_or_bias_on_the_device_that_is_no_good_gives_nan(name):
    bad = torch.tensor(-torch.inf, device=DEVICE)
    assert nf.siglip_loss(**both(5, 4, "float32"), **{name: bad}).isnan()


# ---- log-sum-exps by label -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_hcl(n, d, dtype):
    check(nf.hcl_loss, VIEWS, dtype, **views(n, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_multi_similarity(n, d, dtype):
    check(nf.multi_similarity_loss, ["embeddings"], dtype, **labelled(n, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_circle(n, d, dtype):
    check(nf.circle_loss, ["embeddings"], dtype, **labelled(n, d, dtype), gamma=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_proxy_anchor(n, d, dtype):
    check(nf.proxy_anchor_loss, ["embeddings", "proxies"], dtype, **proxies(n, d, dtype))


@pytest.mark.parametrize("loss", [nf.hcl_loss, nf.multi_similarity_loss, nf.circle_loss, nf.proxy_anchor_loss])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_labelled_in_blocks(loss, dtype, small_strips):
    if loss is nf.hcl_loss:
        return check(loss, VIEWS, dtype, **views(150, 20, dtype))
    if loss is nf.proxy_anchor_loss:
        return check(loss, ["embeddings", "proxies"], dtype, **proxies(260, 20, dtype, count=140))
    return check(loss, ["embeddings"], dtype, **labelled(270, 20, dtype, count=20))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_hcl_hardness_and_temperature(beta):
    temperature = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    wanted = [*VIEWS, "temperature"]
    check(nf.hcl_loss, wanted, "float64", **views(35, 12, "float64"), beta=beta, tau_plus=0.1, temperature=temperature)


def test_rows_without_positives_or_negatives():
    x = tensor(g.points(70, 20), "float64")
    one, all_different = torch.zeros(70, dtype=torch.int64, device=DEVICE), torch.arange(70, device=DEVICE)
    for loss in (nf.multi_similarity_loss, nf.circle_loss):
        for labels in (one, all_different):
            check(loss, ["embeddings"], "float64", embeddings=x, labels=labels)
    assert nf.circle_loss(x, all_different, reduction="none").count_nonzero() == 0


def test_a_label_without_a_proxy_gives_nan():
    arguments = proxies(20, 8, "float32")
    arguments["labels"][3] = 7
    assert nf.proxy_anchor_loss(**arguments).isnan()


# ---- softmaxes with sets of positives, or none -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_sup_con(n, d, dtype):
    check(nf.sup_con_loss, ["embeddings"], dtype, **labelled(n, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_dcl(n, d, dtype):
    check(nf.dcl_loss, VIEWS, dtype, **views(n, d, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("temperature", [0.02, 0.1])  # below 1/30 exponentials have no common base
@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("which", ["labels", "mask", "views"])
def test_sup_con_views(which, v, temperature, dtype):
    x = tensor(g.points(50 * v, 12).reshape(50, v, 12), dtype)
    chosen = {}
    if which == "labels":
        chosen = {"labels": classes(50, 6)}
    elif which == "mask":
        mask = np.random.default_rng(0).random((50, 100)) < 0.1
        chosen = {"positive_mask": torch.from_numpy(mask).to(DEVICE)[:, ::2]}
    check(nf.sup_con_loss, ["embeddings"], dtype, embeddings=x, temperature=temperature, **chosen)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sup_con_reductions(reduction):
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64, device=DEVICE) if reduction == "none" else None
    check(nf.sup_con_loss, ["embeddings"], "float64", **labelled(40, 12, "float64"), reduction=reduction,
          weights=weights)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_sup_con_in_blocks(dtype, small_strips):
    check(nf.sup_con_loss, ["embeddings"], dtype, **labelled(270, 20, dtype, count=20))


def test_sup_con_temperature():
    temperature = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    wanted = ["embeddings", "temperature"]
    check(nf.sup_con_loss, wanted, "float64", **labelled(40, 12, "float64"), temperature=temperature)


def test_sup_con_without_positives():
    x = tensor(g.points(20, 8), "float32").requires_grad_()
    labels = torch.arange(20, device=DEVICE)
    loss = nf.sup_con_loss(x, labels)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert grad.count_nonzero() == 0
    labels[3] = 5  # one pair: its rows have losses, the others none
    assert nf.sup_con_loss(x, labels, reduction="none").nonzero().flatten().tolist() == [3, 5]
    check(nf.sup_con_loss, ["embeddings"], "float32", embeddings=x.detach(), labels=labels)


def test_sup_con_scores_that_overflow_without_their_normaliser():
    x = tensor(1 + 0.1 * g.points(20, 8), "float32")
    labels = torch.arange(20, device=DEVICE)
    labels[3] = 5
    arguments = {"embeddings": x, "labels": labels, "temperature": 0.01}
    value, (grad,) = g.evaluate(nf.sup_con_loss, ["embeddings"], **arguments)
    expected, (expected_grad,) = g.reference(nf.sup_con_loss, ["embeddings"], **arguments)
    g.assert_value(value, expected, 1e-5)  # scores of 100, rounded to float32
    g.assert_gradient(grad, expected_grad, 1e-4)


# ---- all of them -----------------------------------------------------------------------------------------------------

CALLS = {
    "siglip": (nf.siglip_loss, both, BOTH),
    "hcl": (nf.hcl_loss, views, VIEWS),
    "dcl": (nf.dcl_loss, views, VIEWS),
    "multi_similarity": (nf.multi_similarity_loss, labelled, ["embeddings"]),
    "circle": (nf.circle_loss, labelled, ["embeddings"]),
    "sup_con": (nf.sup_con_loss, labelled, ["embeddings"]),
    "proxy_anchor": (nf.proxy_anchor_loss, proxies, ["embeddings", "proxies"]),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_second_derivatives(name):
    loss, make, wanted = CALLS[name]
    arguments = make(4, 3, "float64")
    leaves = [arguments.pop(key).requires_grad_() for key in wanted]
    if name == "circle":  # weights held fixed: not the derivative of the gradient
        (first,) = torch.autograd.grad(loss(*leaves, **arguments), leaves, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaves)
        assert second.isfinite().all()
        return

    def of(*given):
        return loss(**dict(zip(wanted, given, strict=True)), **arguments)

    assert torch.autograd.gradcheck(of, leaves)
    assert torch.autograd.gradgradcheck(of, leaves)


@calls
def test_nan(name):
    loss, make, wanted = CALLS[name]
    arguments = make(67, 12, "float32")
    arguments[wanted[0]][3] = torch.nan
    if name == "proxy_anchor":
        assert loss(**arguments).isnan()
        return
    found = loss(**arguments, reduction="none").isnan()
    # Its own row; and all where every row is a column too.
    assert found.nonzero().flatten().tolist() == ([3] if name == "siglip" else list(range(len(found))))


@calls
def test_zero_rows_have_zero_gradients(name):
    loss, make, wanted = CALLS[name]
    arguments = make(20, 8, "float32")
    leaf = arguments[wanted[0]]
    leaf[3] = 0
    leaf.requires_grad_()
    (grad,) = torch.autograd.grad(loss(**arguments), leaf)
    assert not grad[3].any()
    assert grad.isfinite().all()


@calls
def test_empty(name):
    loss, make, wanted = CALLS[name]
    arguments = make(0, 4, "float32")
    value, grads = g.evaluate(loss, wanted, **arguments)
    assert value == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)


@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.nt_xent_loss, nf.hcl_loss, nf.sup_con_loss, nf.siglip_loss])
def test_gradients_of_numbers_of_an_empty_set_are_zero(loss, monkeypatch):
    """An empty array has no address, which does not mean that nobody wants its gradient."""
    empty = backend.empty
    monkeypatch.setattr(backend, "empty", lambda *args: empty(*args).fill_(7))
    x, labels = torch.empty(0, 4, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    names = ["logit_scale", "logit_bias"] if loss is nf.siglip_loss else ["logit_scale"]
    numbers = {name: torch.tensor(3.0, device=DEVICE, requires_grad=True) for name in names}
    value = loss(x, labels if loss is nf.sup_con_loss else x, **numbers)
    assert value == 0
    assert all(grad == 0 for grad in torch.autograd.grad(value, list(numbers.values())))


def results():
    """Every loss and its gradients."""
    found = []
    for loss, make, wanted in CALLS.values():
        value, grads = g.evaluate(loss, wanted, **make(130, 20, "bfloat16"))
        found += [value, *grads]
    return [z.cpu().float() for z in found]


def test_results_repeat_bit_for_bit():
    plain = results()
    for one, other in zip(plain, results(), strict=True):
        assert references.same_bits(one, other)


@pytest.mark.skipif(not EMULATED, reason="the order of threads can be chosen in emulation only")
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch):
    plain = results()
    monkeypatch.setenv("NEARFAR_EMULATE_ORDER", "1234567")
    for one, other in zip(plain, results(), strict=True):
        assert references.same_bits(one, other)


@gpu_only
@calls
def test_no_hidden_synchronisation(name):
    loss, make, wanted = CALLS[name]
    arguments = make(512, 64, "bfloat16")
    leaves = [arguments[key].requires_grad_() for key in wanted]
    torch.autograd.grad(loss(**arguments), leaves)
    with test_cuda.no_synchronisation():
        torch.autograd.grad(loss(**arguments), leaves)


@gpu_only
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
@calls
def test_graph_capture(name):
    loss, make, wanted = CALLS[name]
    arguments = make(300, 64, "bfloat16")
    leaves = [arguments[key].requires_grad_() for key in wanted]

    def run():
        value = loss(**arguments)
        return [value, *torch.autograd.grad(value, leaves)]

    def change():
        for leaf in leaves:
            leaf.mul_(torch.linspace(0.5, 1.5, leaf.shape[1], device="cuda"))

    test_cuda.assert_replays(run, change)


# ---- pairs of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_contrastive(dtype):
    """A function of the distances that alignment finds."""
    x, y = pair(37, 21, dtype)
    same = torch.arange(37, device=DEVICE) % 2
    check(nf.contrastive_loss, ["x1", "x2"], dtype, x1=x, x2=y, same=same, margin=1.5)


# ---- triplets --------------------------------------------------------------------------------------------------------

MININGS = ("hard", "semihard", "all")


def triplets(n, d, dtype, count=4):
    """Points near the centre of their class."""
    labels = classes(n, count)
    _, codes = torch.unique(labels, return_inverse=True)
    return {"embeddings": tensor(g.points(count, d, seed=9)[codes.cpu()] + g.points(n, d), dtype), "labels": labels}


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 3), (2, 5), (37, 16), (65, 33), (130, 70)])
def test_triplets(mining, n, d, dtype):
    check(nf.batch_triplet_loss, ["embeddings"], dtype, **triplets(n, d, dtype), mining=mining)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_triplet_options(mining, soft, squared):
    """A sum of an anchor is of differences of distances, which are of order 1."""
    options = {"mining": mining, "soft": soft, "squared": squared, "margin": 0.5, "normalize": False}
    arguments = {**triplets(70, 20, "float64"), **options, "value_floor": 1.0, "floor": 1e-3}
    weights = torch.linspace(-1, 1, 70, dtype=torch.float64, device=DEVICE)
    for reduction, upstream in (("sum", None), ("none", weights)):
        g.compare(nf.batch_triplet_loss, ["embeddings"], "float64", **arguments, reduction=reduction, weights=upstream)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_triplets_in_strips(mining, count, small_strips):
    """More rows than a block of threads takes at once; few large classes, and rows of their own."""
    check(nf.batch_triplet_loss, ["embeddings"], "float64", **triplets(300, 20, "float64", count), mining=mining)


@pytest.mark.parametrize("mining", MININGS)
def test_triplets_repeat_and_skip_bad_rows(mining):
    arguments = triplets(150, 20, "float32")
    x, labels = arguments["embeddings"], arguments["labels"]
    x[5, 1] = x[140, 0] = float("nan")
    good = [i for i in range(150) if i not in (5, 140)]
    options = {"mining": mining, "normalize": True}
    rows = nf.batch_triplet_loss(x, labels, reduction="none", **options)
    assert torch.isnan(rows[[5, 140]]).all()
    g.assert_value(rows[good], nf.batch_triplet_loss(x[good], labels[good], reduction="none", **options), 1e-6)
    assert references.same_bits(rows[good], nf.batch_triplet_loss(x, labels, reduction="none", **options)[good])
    first, second = (x.clone().requires_grad_() for _ in range(2))
    nf.batch_triplet_loss(first, labels, **options).backward()
    nf.batch_triplet_loss(second, labels, **options).backward()
    assert references.same_bits(first.grad, second.grad)
    assert torch.isnan(first.grad[[5, 140]]).all()
    assert torch.isfinite(first.grad[good]).all()


@pytest.mark.parametrize("mining", ["hard", "semihard", "all", "band"])
def test_mined_triplets(mining, monkeypatch):
    """The indices of the CPU's kernels, on the device."""
    arguments = triplets(40, 7, "float64")
    found = nf.mine_triplets(**arguments, mining=mining)
    assert all(index.device == arguments["embeddings"].device for index in found)
    monkeypatch.setattr(backend, "emulate", False)
    expected = nf.mine_triplets(*(z.cpu() for z in arguments.values()), mining=mining)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@gpu_only
@pytest.mark.parametrize("mining", MININGS)
def test_triplets_do_not_wait(mining):
    arguments = triplets(300, 40, "float32")
    x = arguments["embeddings"].requires_grad_()
    nf.batch_triplet_loss(x, arguments["labels"], mining=mining).backward()
    with test_cuda.no_synchronisation():
        nf.batch_triplet_loss(x, arguments["labels"], mining=mining).backward()
