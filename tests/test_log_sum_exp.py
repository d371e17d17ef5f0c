"""HCL, multi-similarity, circle and proxy anchor: against dense float64 forms, closed forms and published code."""

import math

import numpy as np
import pytest
import torch
from generators import (
    GRADIENT,
    SIZES,
    STEP,
    VALUE,
    assert_gradient,
    assert_value,
    by_label,
    circle,
    circle_weights,
    compare,
    evaluate,
    hcl,
    layouts,
    multi_similarity,
    numpy_of,
    of_kind,
    pairs,
    points,
    reference,
    rng,
    unit,
)

import nearfar as nf

pytestmark = pytest.mark.isa

LABELLED = [nf.multi_similarity_loss, nf.circle_loss]
labelled = pytest.mark.parametrize("f", LABELLED, ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
DTYPES = [("numpy", d) for d in ("float16", "float32", "float64")] + [("torch", d) for d in ("float16", "bfloat16")]


def classes(n, count=5, seed=0):
    return rng(n, count, seed).integers(0, max(count, 1), n)


def clustered(n, d, labels, dtype="float64", noise=0.6, seed=0):
    """Points near the centres of their classes, as in training."""
    centres = points(int(labels.max(initial=0)) + 1, d, seed=seed + 77)
    return (centres[labels] + noise * points(n, d, seed=seed)).astype(dtype)


def problem(f, n=70, d=9, dtype="float64", count=5):
    """Arguments of a loss, and which of them have a gradient."""
    if f is nf.hcl_loss:
        return dict(zip(("z1", "z2"), pairs(n, d, dtype), strict=True)), ["z1", "z2"]
    labels = classes(n, count)
    arguments = {"embeddings": clustered(n, d, labels, dtype), "labels": labels}
    if f is nf.proxy_anchor_loss:
        arguments["proxies"] = points(count, d, dtype, seed=5)
    return arguments, [name for name in arguments if name != "labels"]


ALL = [nf.hcl_loss, *LABELLED, nf.proxy_anchor_loss]
all_losses = pytest.mark.parametrize("f", ALL, ids=lambda f: f.__name__)


# ---- definitions -----------------------------------------------------------------------------------------------------


@all_losses
@dtypes
def test_sizes(f, dtype):
    """Around tiles, panels, strips and chunks."""
    for n in SIZES:
        arguments, wanted = problem(f, n, 5 + n % 13, dtype, count=7)
        # A step in a similarity is gamma = 80 steps in circle's logits, of which two large ones may cancel.
        compare(f, wanted, dtype, value_floor=10.0 if f is nf.circle_loss else 1.0, floor=0.05, **arguments)


@all_losses
@pytest.mark.parametrize("d", [1, 2, 7, 16, 33, 129, 257])
def test_depths(f, d):
    arguments, wanted = problem(f, 60, d)
    compare(f, wanted, floor=0.1, **arguments)


@all_losses
@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_dtypes(f, kind, dtype):
    """Half precisions as if converted exactly to float32; results in float32, gradients in the inputs' dtype."""
    arguments, wanted = problem(f, 133, 24, "float32")
    arguments = {k: of_kind(kind, a, dtype if k in wanted else None) for k, a in arguments.items()}
    compare(f, wanted, dtype, value_floor=1.0, **arguments)
    assert str(f(**arguments).dtype).endswith("float64" if dtype == "float64" else "float32")


@all_losses
@dtypes
@pytest.mark.parametrize("normalize", [True, False])
def test_parameters(f, dtype, normalize):
    """Both forms of the sums: with a common base, and (large or unbounded logits) without."""
    arguments, wanted = problem(f, 150, 12, dtype)
    if not normalize:
        arguments |= {name: (arguments[name] / 3).astype(dtype) for name in wanted}
    settings = {
        nf.hcl_loss: [{"beta": 0.0}, {"beta": 3.0, "tau_plus": 0.0}, {"tau_plus": 0.01, "temperature": 0.2}],
        nf.multi_similarity_loss: [{"alpha": 0.3, "beta": 5}, {"beta": 200.0, "base": -0.3}, {"alpha": 70, "base": 1}],
        nf.circle_loss: [{"m": 0.25, "gamma": 256}, {"gamma": 2.0}, {"m": -0.2}],
        nf.proxy_anchor_loss: [{"margin": -0.3}, {"alpha": 100.0}, {"alpha": 1e-3, "margin": 1}],
    }
    for setting in settings[f]:
        compare(f, wanted, dtype, value_floor=1.0, floor=0.05, normalize=normalize, **setting, **arguments)


@pytest.mark.parametrize("f", [nf.hcl_loss, *LABELLED], ids=lambda f: f.__name__)
def test_reductions(f, kind):
    arguments, wanted = problem(f, 60, 7)
    arguments["embeddings" if f in LABELLED else "z1"][3] *= 2
    arguments = {k: of_kind(kind, a) for k, a in arguments.items()}
    rows, expected = f(**arguments, reduction="none"), reference(f, wanted, reduction="none", **arguments)[0]
    assert_value(rows, expected, 1e-12, floor=1e-3)
    assert rows.shape == ((120,) if f is nf.hcl_loss else (60,))
    assert_value(f(**arguments, reduction="sum"), numpy_of(rows).sum(), 1e-13)
    compare(f, wanted, reduction="sum", **arguments)
    if kind == "torch":
        compare(f, wanted, weights=torch.from_numpy(points(len(rows), 1)[:, 0]), reduction="none", **arguments)


@all_losses
def test_layouts(f):
    arguments, wanted = problem(f, 37, 10)
    expected = evaluate(f, wanted, **arguments)
    for name in layouts(points(2, 2)):
        other = {k: layouts(a)[name] if k in wanted else a for k, a in arguments.items()}
        value, grads = evaluate(f, wanted, **other)
        assert value == expected[0]
        assert all(np.array_equal(a, b) for a, b in zip(grads, expected[1], strict=True))


@all_losses
def test_numpy_equals_torch(f):
    arguments, wanted = problem(f, 130, 11)
    value, grads = evaluate(f, wanted, **arguments)
    assert isinstance(value, np.float64)
    other, other_grads = evaluate(f, wanted, **{k: of_kind("torch", a) for k, a in arguments.items()})
    assert other.item() == pytest.approx(value, rel=1e-15)
    for a, b in zip(grads, other_grads, strict=True):
        assert_gradient(b, a, 1e-14)


@labelled
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_integer_dtype(f, dtype, kind):
    arguments, _ = problem(f, 60, 7)
    expected = f(**arguments)
    extremes = np.array([0, 1, np.iinfo(dtype).max, np.iinfo(dtype).max - 1, np.iinfo(dtype).min // 2 + 7], dtype)
    labels = of_kind(kind, extremes[arguments["labels"]])
    x = of_kind(kind, arguments["embeddings"])
    assert f(x, labels) == pytest.approx(expected, rel=1e-15)
    if kind == "torch":  # second derivatives go through a formula of their own
        x.requires_grad_()
        results = []
        for own in (labels, of_kind(kind, arguments["labels"])):
            (g,) = torch.autograd.grad(f(x, own), x, create_graph=True)
            results.append(torch.autograd.grad(g.square().sum(), x)[0])
        assert_gradient(results[0], results[1].numpy(), 1e-14)


@labelled
def test_order_does_not_matter(f):
    arguments, _ = problem(f, 61, 8)
    x, labels = arguments.values()
    order = rng(4).permutation(61)
    rows = f(x, labels, reduction="none")
    assert_value(f(x[order], labels[order], reduction="none"), rows[order], 1e-12, floor=1.0)
    # Names of classes mean nothing.
    assert np.array_equal(f(x, 1000 - 17 * labels, reduction="none"), rows)


# ---- HCL -------------------------------------------------------------------------------------------------------------


def authors_hcl(z1, z2, temperature, beta, tau_plus):
    """As published: exponentials, clamped; overflows at low temperatures."""
    out = torch.cat([unit(z1), unit(z2)])
    n = len(z1)
    index = torch.arange(2 * n)
    mask = (index[:, None] - index) % n != 0
    neg = torch.exp(out @ out.T / temperature).masked_select(mask).view(2 * n, -1)
    pos = torch.exp((out[:n] * out[n:]).sum(-1) / temperature).repeat(2)
    count = 2 * n - 2
    imp = (beta * neg.log()).exp()
    reweighted = (imp * neg).sum(-1) / imp.mean(-1)
    ng = torch.clamp((-tau_plus * count * pos + reweighted) / (1 - tau_plus), min=count * np.exp(-1 / temperature))
    return (-torch.log(pos / (pos + ng))).mean()


@pytest.mark.parametrize("noise", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
def test_hcl_is_the_authors_code(noise, beta, tau_plus):
    """With the bound of Ng reached by none, some and all anchors; a bound that is left out changes these values."""
    x, y = (torch.from_numpy(a).requires_grad_() for a in pairs(40, 6, noise=noise))
    for temperature in (0.1, 0.5, 2.0):
        value = nf.hcl_loss(x, y, temperature=temperature, beta=beta, tau_plus=tau_plus)
        expected = authors_hcl(x, y, temperature, beta, tau_plus)
        assert_value(value, expected.detach(), 1e-11, floor=1e-3)
        grads = torch.autograd.grad(value, (x, y))
        for own, other in zip(grads, torch.autograd.grad(expected, (x, y)), strict=True):
            assert_gradient(own, other.numpy(), 1e-10, floor=1e-5)


def test_hcl_bound_is_reached():
    """The case above is not empty: near views make the estimate negative, and the bound is what is left."""
    x, y = pairs(40, 6, noise=0.05)
    m, tau = 78, 0.2
    rows = nf.hcl_loss(x, y, temperature=tau, tau_plus=0.5, reduction="none")
    u, v = (unit(torch.from_numpy(a)).numpy() for a in (x, y))
    bound = np.log1p(m * np.exp(-1 / tau - np.tile((u * v).sum(1), 2) / tau))
    assert_value(rows, bound, 1e-12)
    # Then temperature comes in through the bound alone, and through the positive.
    compare(nf.hcl_loss, ["z1", "z2", "temperature"], z1=x, z2=y, temperature=tau, tau_plus=0.5)


@dtypes
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
def test_hcl_without_its_terms_is_nt_xent(dtype, temperature):
    x, y = pairs(150, 20, dtype)
    for reduction in ("none", "mean"):
        options = {"temperature": temperature, "reduction": reduction}
        own, other = nf.hcl_loss(x, y, beta=0, tau_plus=0, **options), nf.nt_xent_loss(x, y, **options)
        assert_value(own, other, 10 * VALUE[dtype], floor=1.0)
    grads, others = (
        nf.value_and_grad(f, (0, 1))(x, y, temperature=temperature, **more)[1]
        for f, more in ((nf.hcl_loss, {"beta": 0, "tau_plus": 0}), (nf.nt_xent_loss, {}))
    )
    for own, other in zip(grads, others, strict=True):
        assert_gradient(own, other, GRADIENT[dtype])


def test_hcl_closed_form():
    """Orthonormal pairs: s is 1/tau or 0, so R = M, whatever beta is."""
    n, tau, tau_plus = 16, 0.5, 0.01
    m = 2 * n - 2
    g = (m - tau_plus * m * math.exp(1 / tau)) / (1 - tau_plus)
    expected = math.log1p(g / math.exp(1 / tau))
    for beta in (0.0, 1.0, 7.5):
        value = nf.hcl_loss(np.eye(n), np.eye(n), temperature=tau, beta=beta, tau_plus=tau_plus)
        assert value == pytest.approx(expected, rel=1e-13)
    # All points equal: R = M e^(1/tau), and Ng = M e^(1/tau) too.
    one = np.ones((9, 3))
    assert nf.hcl_loss(one, one) == pytest.approx(math.log(17), rel=1e-13)


@pytest.mark.parametrize(("kind", "dtype"), [("torch", "float32"), ("torch", "bfloat16"), ("numpy", "float64")])
@pytest.mark.parametrize("tau", [0.001, 0.01, 100.0])
@pytest.mark.parametrize("noise", [0.7, 3.0])
def test_hcl_temperatures(kind, dtype, tau, noise):
    """No overflow where the authors' code has one, from e^89 on in float32.

    Half the gradient's digits go where the estimate of Ng nearly vanishes: tau_plus = 0 keeps away from there.
    """
    x, y = (of_kind(kind, a, dtype) for a in pairs(150, 24, noise=noise))
    for tau_plus in (0.0, 0.1):
        arguments = {"z1": x, "z2": y, "temperature": of_kind(kind, np.array(tau)) if kind == "torch" else tau}
        value, grads = evaluate(nf.hcl_loss, ["z1", "z2", "temperature"], tau_plus=tau_plus, **arguments)
        expected, others = reference(nf.hcl_loss, ["z1", "z2", "temperature"], tau_plus=tau_plus, **arguments)
        assert_value(value, expected, VALUE[dtype], floor=1.0)
        loose = 1 if tau_plus == 0 or dtype == "float64" else 10
        for own, other in list(zip(grads, others, strict=True))[:2]:
            assert np.all(np.isfinite(numpy_of(own)))
            assert_gradient(own, other, loose * GRADIENT[dtype], STEP[dtype])
        assert float(grads[2]) == pytest.approx(float(others[2]), rel=loose * GRADIENT[dtype], abs=1e-9 / tau)


def test_hcl_extremes():
    """One item has no negatives; no rows, no loss."""
    one = points(1, 4)
    assert nf.hcl_loss(one, -one) == 0
    value, (dx, dy, dt) = nf.value_and_grad(nf.hcl_loss, (0, 1, 2))(one, one, temperature=0.1)
    assert value == dt == 0
    assert not np.any(dx)
    assert not np.any(dy)
    x = torch.from_numpy(one).requires_grad_()
    nf.hcl_loss(x, x).backward()
    assert not x.grad.any()
    assert np.isnan(nf.hcl_loss(one * np.nan, one))
    assert nf.hcl_loss(one[:0], one[:0]) == 0
    assert nf.hcl_loss(one[:0], one[:0], reduction="none").shape == (0,)
    # Opposite views: the largest loss that unit rows can have.
    x = np.array([[1.0, 0.0]] * 3)
    tau = 0.001
    assert nf.hcl_loss(x, -x, temperature=tau, tau_plus=0, beta=0) == pytest.approx(2 / tau + math.log(2), rel=1e-13)


def test_hcl_one_share_is_refused():
    x, y = pairs(6, 4)
    for bad, message in ((1.0, "below 1"), (-0.1, "non-negative"), (math.nan, "non-negative")):
        with pytest.raises(ValueError, match=rf"^tau_plus: expected a .*{message}"):
            nf.hcl_loss(x, y, tau_plus=bad)
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^beta: expected a non-negative number"):
            nf.hcl_loss(x, y, beta=bad)
    with pytest.raises(TypeError, match=r"^beta: expected a number, got a tensor that requires a gradient"):
        nf.hcl_loss(*map(torch.from_numpy, (x, y)), beta=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hcl_learnable_temperature(dtype):
    x, y = (torch.from_numpy(a).float() for a in pairs(40, 6))
    loss = nf.HCLLoss(0.2, learnable_temperature=True)
    loss(x.to(dtype), y.to(dtype)).backward()
    arguments = {"z1": x.to(dtype), "z2": y.to(dtype), "logit_scale": 5.0}
    slope = reference(nf.hcl_loss, ["logit_scale"], **arguments)[1][0]
    # A difference of mean scores, which are of size one: what 1e-5 of it would be depends on the lanes of a sum.
    assert loss.log_logit_scale.grad.item() == pytest.approx(5 * slope, rel=1e-5, abs=1e-6)


# ---- by label --------------------------------------------------------------------------------------------------------


def test_multi_similarity_closed_form():
    """C orthogonal classes of P equal vectors: similarities are 1 and 0."""
    c, p, alpha, beta, base = 4, 3, 2.0, 50.0, 0.5
    x, labels = np.repeat(np.eye(c), p, 0), np.repeat(np.arange(c), p)
    pull = math.log1p((p - 1) * math.exp(-alpha * (1 - base))) / alpha
    push = math.log1p((c - 1) * p * math.exp(-beta * base)) / beta
    assert nf.multi_similarity_loss(x, labels) == pytest.approx(pull + push, rel=1e-13)
    # The one in the log is there: a single far negative costs almost nothing, and never less than nothing.
    far = nf.multi_similarity_loss(np.array([[1.0, 0], [-1, 0]]), np.arange(2), reduction="none")
    assert np.all(far >= 0)
    assert np.all(far < 1e-30)


def test_multi_similarity_mines_nothing():
    """Easy pairs count: the paper's mining would leave all of these out and make the loss 0."""
    x, labels = np.repeat(np.eye(4), 3, 0), np.repeat(np.arange(4), 3)
    _, grad = nf.value_and_grad(nf.multi_similarity_loss)(x + 0.01 * points(12, 4), labels)
    assert nf.multi_similarity_loss(x, labels) > 0.1
    assert np.linalg.norm(grad) > 1e-4


def test_mean_of_multi_similarity_is_over_all_anchors():
    """An anchor without positives has its negatives still."""
    x, labels = points(9, 4), np.array([0, 0, 0, 1, 2, 3, 4, 4, 5])
    rows = nf.multi_similarity_loss(x, labels, reduction="none")
    assert nf.multi_similarity_loss(x, labels) == pytest.approx(rows.mean(), rel=1e-14)
    assert np.all(rows > 0)


def test_circle_mean_is_over_anchors_with_a_positive():
    """Also those whose loss is 0 or tiny: a mean over non-zero losses only is another number."""
    x, labels = points(9, 4), np.array([0, 0, 0, 1, 2, 3, 4, 4, 5])
    rows = nf.circle_loss(x, labels, reduction="none")
    assert np.all(rows[[3, 4, 5, 8]] == 0)
    assert nf.circle_loss(x, labels) == pytest.approx(rows.sum() / 5, rel=1e-14)
    # Separated classes at a large scale: every loss underflows in float32, and the mean is 0, not NaN.
    x, labels = np.repeat(np.eye(4, dtype="float32"), 3, 0), np.repeat(np.arange(4), 3)
    assert nf.circle_loss(x, labels, gamma=1000) == 0


def test_circle_closed_form():
    """Orthogonal classes of equal vectors: alpha_p = m and alpha_n = m, both logits -gamma m^2."""
    c, p, m, gamma = 4, 3, 0.4, 8.0
    x, labels = np.repeat(np.eye(c), p, 0), np.repeat(np.arange(c), p)
    expected = math.log1p((p - 1) * (c - 1) * p * math.exp(-2 * gamma * m * m))
    assert nf.circle_loss(x, labels, gamma=gamma) == pytest.approx(expected, rel=1e-13)


def frozen_circle(x, labels):
    """Circle loss as a function of the points with the weights of these points kept."""
    weights = circle_weights(by_label(x.detach(), labels, True)[0], 0.4)
    return lambda z: circle(z, labels, gamma=4, weights=weights)


def test_circle_weights_are_constants():
    """The gradient of the formula with frozen weights, not of the whole; the same of second derivatives."""
    x, labels = torch.from_numpy(points(9, 3)).requires_grad_(), torch.arange(9) % 3
    value = nf.circle_loss(x, labels, gamma=4)
    (own,) = torch.autograd.grad(value, x, create_graph=True)
    frozen = frozen_circle(x, labels)
    assert_gradient(own, torch.autograd.functional.jacobian(frozen, x).numpy(), 1e-12)
    # Frozen weights are honest derivatives: finite differences of the frozen function agree, of the whole they do not.
    direction = torch.from_numpy(points(9, 3, seed=3))
    h = 1e-6
    slope = (own * direction).sum().item()
    with torch.no_grad():
        finite = (frozen(x + h * direction) - frozen(x - h * direction)) / (2 * h)
        whole = [nf.circle_loss(x + s * h * direction, labels, gamma=4) for s in (1, -1)]
    assert finite.item() == pytest.approx(slope, rel=1e-6)
    assert abs((whole[0] - whole[1]).item() / (2 * h) - slope) > 1e-2 * abs(slope)
    (second,) = torch.autograd.grad((own * direction).sum(), x)
    hessian = torch.autograd.functional.hessian(frozen, x)
    assert_gradient(second, torch.einsum("ijkl,ij->kl", hessian, direction).numpy(), 1e-11)


@dtypes
def test_proxies_are_anchors(dtype):
    """Sums over the batch for each proxy; absent classes count among the negatives' mean only."""
    arguments, wanted = problem(nf.proxy_anchor_loss, 140, 12, dtype, count=5)
    arguments["proxies"] = points(8, 12, dtype)
    compare(nf.proxy_anchor_loss, wanted, dtype, **arguments)
    x, p = np.eye(4), np.eye(4)[:3]
    labels, a, d = np.array([0, 0, 1, 1]), 32.0, 0.1
    pull = (math.log(1 + math.exp(-a * (1 - d)) + math.exp(a * d)) + math.log(1 + math.exp(a * d) * 2)) / 2
    two, on = math.log1p(2 * math.exp(a * d)), math.exp(a * (1 + d))
    push = (two + math.log(1 + on + math.exp(a * d)) + math.log(1 + on + 3 * math.exp(a * d))) / 3
    # Proxy 1 meets row 1, a wrong one, and proxy 2 row 2.
    assert nf.proxy_anchor_loss(x, labels, p) == pytest.approx(pull + push, rel=1e-12)


@all_losses
def test_large_logits(f):
    """Where exponentials overflow: float32, sharp, not normalised."""
    arguments, wanted = problem(f, 100, 8, "float32")
    sharp = {
        nf.hcl_loss: {"temperature": 1e-3, "tau_plus": 0},
        nf.multi_similarity_loss: {"alpha": 500, "beta": 1000},
        nf.circle_loss: {"gamma": 2000},
        nf.proxy_anchor_loss: {"alpha": 1000},
    }[f]
    value, grads = evaluate(f, wanted, **sharp, **arguments)
    assert_value(value, reference(f, wanted, **sharp, **arguments)[0], 1e-6, floor=1.0)
    assert all(np.all(np.isfinite(g)) for g in grads)
    wide = arguments | {name: 30 * arguments[name] for name in wanted}
    value, grads = evaluate(f, wanted, normalize=False, **wide)
    assert_value(value, reference(f, wanted, normalize=False, **wide)[0], 1e-6)
    assert all(np.all(np.isfinite(g)) for g in grads)


# ---- edges -----------------------------------------------------------------------------------------------------------


@labelled
def test_one_class_and_no_positives(f):
    x = points(20, 5)
    for labels in (np.zeros(20, int), np.arange(20)):
        compare(f, ["embeddings"], floor=1e-3, value_floor=1.0, embeddings=x, labels=labels)
    if f is nf.circle_loss:  # an anchor that lacks either has loss 0 and no gradient
        for labels in (np.zeros(20, int), np.arange(20)):
            value, grad = nf.value_and_grad(f)(x, labels)
            assert value == 0
            assert not np.any(grad)
    else:
        one = nf.multi_similarity_loss(x, np.zeros(20, int), reduction="none")
        s = unit(torch.from_numpy(x)).numpy()
        s = np.delete(np.exp(-2 * (s @ s.T - 0.5)).ravel(), np.arange(20) * 21).reshape(20, 19)
        assert_value(one, np.log1p(s.sum(1)) / 2, 1e-13)


@labelled
def test_one_row_and_none(f, kind):
    for n in (0, 1):
        x, labels = of_kind(kind, points(n, 4)), of_kind(kind, np.arange(n))
        for reduction in ("mean", "sum"):
            value, grad = nf.value_and_grad(f)(x, labels, reduction=reduction)
            assert value == 0
            assert grad.shape == (n, 4)
            assert not numpy_of(grad).any()
        assert np.array_equal(numpy_of(f(x, labels, reduction="none")), np.zeros(n))


def test_proxies_without_embeddings():
    x, p = np.zeros((0, 4)), points(3, 4)
    value, (dx, dp) = nf.value_and_grad(nf.proxy_anchor_loss, (0, 2))(x, np.zeros(0, int), p)
    assert value == 0
    assert dx.shape == (0, 4)
    assert not dp.any()
    # One class: no negatives at all.
    compare(
        nf.proxy_anchor_loss, ["embeddings", "proxies"], embeddings=points(9, 4), labels=np.zeros(9, int), proxies=p[:1]
    )


@all_losses
def test_zero_rows(f):
    """They stay zero and get no gradient."""
    arguments, wanted = problem(f, 50, 7)
    for k, name in enumerate(wanted):
        arguments[name][[1, 3 + k]] = 0
    compare(f, wanted, **arguments)
    _, grads = evaluate(f, wanted, **arguments)
    for k, grad in enumerate(grads):
        assert not grad[[1, 3 + k]].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows(bad):
    """A NaN touches what it enters: all losses of a set against itself, its own proxy alone where it is one."""
    x, labels = points(140, 9), np.arange(140) % 4
    x[131, 4] = bad
    for f in LABELLED:
        assert np.all(np.isnan(f(x, labels, reduction="none")))
    assert np.isnan(nf.hcl_loss(x, points(140, 9), reduction="none")).all()
    # An anchor without positives has circle loss 0 whatever its negatives are.
    labels[7] = 9
    rows = nf.circle_loss(x, labels, reduction="none")
    assert rows[7] == 0
    assert np.isnan(np.delete(rows, 7)).all()
    good, p = points(50, 9), points(4, 9)
    p[2, 0] = bad
    _, dp = nf.value_and_grad(nf.proxy_anchor_loss, 2)(good, labels[:50] % 4, p)
    assert np.isnan(dp[2]).all()
    assert np.isfinite(np.delete(dp, 2, 0)).all()


# ---- other libraries -------------------------------------------------------------------------------------------------


def peers():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, reducers

    return losses, reducers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["multi_similarity", "circle", "proxy"])
def test_pytorch_metric_learning(name):
    """The same values and gradients of anchors. Theirs average circle losses over those that are not exactly 0."""
    losses, reducers = peers()
    labels = torch.from_numpy(classes(80, 6))
    labels[5] = 40 if name != "proxy" else 5  # no positives
    x = torch.from_numpy(clustered(80, 9, labels.numpy())).requires_grad_()
    if name == "proxy":
        peer = losses.ProxyAnchorLoss(8, 9).double()
        leaves, own, other = (x, peer.proxies), nf.proxy_anchor_loss(x, labels, peer.proxies), peer(x, labels)
    elif name == "circle":
        peer = losses.CircleLoss(reducer=reducers.DoNothingReducer())
        rows = peer(x, labels)["loss"]["losses"].squeeze(1)
        leaves, own, other = (x,), nf.circle_loss(x, labels), rows.sum() / 79
        assert_value(nf.circle_loss(x, labels, reduction="none"), rows.detach(), 1e-9, floor=1e-6)
    else:
        leaves, own, other = (x,), nf.multi_similarity_loss(x, labels), losses.MultiSimilarityLoss()(x, labels)
    tolerance = 1e-8 if name == "circle" else 1e-11  # their softplus is x from 20 on
    assert own.item() == pytest.approx(other.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(other, leaves), strict=True):
        assert_gradient(a, b.numpy(), tolerance)


# ---- torch -----------------------------------------------------------------------------------------------------------


@all_losses
def test_function_transforms(f):
    arguments, wanted = problem(f, 12, 4)
    tensors = {k: of_kind("torch", a) for k, a in arguments.items()}
    expected = evaluate(f, wanted, **tensors)[1]
    fixed = {k: a for k, a in tensors.items() if k not in wanted}
    own = torch.func.grad(
        lambda *leaves: f(**dict(zip(wanted, leaves, strict=True)), **fixed), tuple(range(len(wanted)))
    )
    leaves = [tensors[name] for name in wanted]
    for a, b in zip(own(*leaves), expected, strict=True):
        assert_gradient(a, b.numpy(), 1e-13)
    stacked = [torch.stack([a, a.flip(1) + 0.1]) for a in leaves]
    mapped = torch.func.vmap(own)(*stacked)
    for k in (0, 1):
        for a, b in zip(mapped, own(*(s[k] for s in stacked)), strict=True):
            assert_gradient(a[k], b.numpy(), 1e-13)


@all_losses
def test_autocast(f):
    torch.manual_seed(0)
    net = torch.nn.Linear(9, 5)
    arguments, wanted = problem(f, 30, 9)
    inputs = {k: of_kind("torch", a, "float32" if k in wanted else None) for k, a in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = f(**{k: net(a) if k in wanted else a for k, a in inputs.items()})
        assert loss.dtype == torch.float32
        loss.backward()
    assert net.weight.grad.dtype == torch.float32
    exact = net.weight.grad.clone()
    net.zero_grad()
    f(**{k: net(a) if k in wanted else a for k, a in inputs.items()}).backward()
    assert torch.linalg.norm(exact - net.weight.grad) < 0.1 * torch.linalg.norm(net.weight.grad)


def test_second_derivatives_where_sums_are_empty():
    """No positives, no negatives, no others: 0, not NaN."""
    x = torch.from_numpy(points(6, 3)).requires_grad_()
    for labels in (torch.arange(6), torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, 1, 2, 2, 2])):
        for f in LABELLED:
            (g,) = torch.autograd.grad(f(x, labels), x, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), x)
            assert h.isfinite().all()
    p = torch.from_numpy(points(9, 3)).requires_grad_()
    value = nf.proxy_anchor_loss(x, torch.zeros(6, dtype=torch.int64), p, alpha=2)
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    assert all(h.isfinite().all() for h in torch.autograd.grad(g.square().sum(), (x, p)))


@pytest.mark.parametrize("f", [nf.hcl_loss, nf.multi_similarity_loss, nf.circle_loss], ids=lambda f: f.__name__)
def test_second_derivatives_are_dense_ones(f):
    arguments, wanted = problem(f, 23, 5)
    dense = {nf.hcl_loss: hcl, nf.multi_similarity_loss: multi_similarity, nf.circle_loss: circle}[f]
    results = []
    for function in (f, dense):
        own = {k: of_kind("torch", a) for k, a in arguments.items()}
        leaves = [own[name].requires_grad_() for name in wanted]
        g = torch.autograd.grad(function(**own), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(a.square().sum() for a in g), leaves))
    for a, b in zip(*results, strict=True):
        assert_gradient(a, b.numpy(), 1e-10)


def test_loss_scaler():
    """float16 gradients are rounded after the upstream factor, not before."""
    for f in ALL:
        arguments, wanted = problem(f, 60, 20)
        half = {k: of_kind("torch", a, "float16" if k in wanted else None) for k, a in arguments.items()}
        wide = {k: a.float() if k in wanted else a for k, a in half.items()}
        grads = []
        for own in (half, wide):
            leaves = [own[name].requires_grad_() for name in wanted]
            grads.append(torch.autograd.grad(f(**own) * 2**12, leaves))
        for own, other in zip(*grads, strict=True):
            assert torch.equal(own, other.half())


def test_modules():
    x, y = (torch.from_numpy(a).float() for a in pairs(30, 6))
    labels = torch.arange(30) % 5
    assert nf.HCLLoss(0.2, beta=2, tau_plus=0.05)(x, y) == nf.hcl_loss(x, y, temperature=0.2, beta=2, tau_plus=0.05)
    assert nf.HCLLoss()(x, y) == nf.hcl_loss(x, y)
    own = nf.MultiSimilarityLoss(1, 20, 0.3, reduction="none", normalize=False)(x, labels)
    settings = {"alpha": 1, "beta": 20, "base": 0.3, "reduction": "none", "normalize": False}
    assert torch.equal(own, nf.multi_similarity_loss(x, labels, **settings))
    assert torch.equal(
        nf.CircleLoss(0.25, 8, reduction="sum")(x, labels), nf.circle_loss(x, labels, m=0.25, gamma=8, reduction="sum")
    )
    loss = nf.ProxyAnchorLoss(5, 6, 0.2, 16)
    assert loss(x, labels) == nf.proxy_anchor_loss(x, labels, loss.proxies, margin=0.2, alpha=16)
    assert [n for n, _ in loss.named_parameters()] == ["proxies"]
    loss(x.bfloat16(), labels).backward()
    assert loss.proxies.grad.dtype == torch.float32
    assert repr(loss) == "ProxyAnchorLoss(num_classes=5, embedding_dim=6, margin=0.2, alpha=16)"
    assert repr(nf.CircleLoss()) == "CircleLoss(m=0.4, gamma=80)"
    assert repr(nf.MultiSimilarityLoss()) == "MultiSimilarityLoss(alpha=2, beta=50, base=0.5)"
    assert repr(nf.HCLLoss()) == "HCLLoss(temperature=0.5, learnable_temperature=False, beta=1.0, tau_plus=0.1)"


def test_proxies_learn():
    torch.manual_seed(0)
    labels = torch.from_numpy(classes(60, 4))
    x = torch.from_numpy(clustered(60, 6, labels.numpy(), "float32"))
    loss = nf.ProxyAnchorLoss(4, 6)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()
    near = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(loss.proxies.detach()).T
    assert (near.argmax(1) == labels).float().mean() > 0.9


# ---- bad input -------------------------------------------------------------------------------------------------------


def refuses(error, text):
    return pytest.raises(error, match=f"^{text}")


@pytest.mark.parametrize("f", [*LABELLED, nf.proxy_anchor_loss], ids=lambda f: f.__name__)
def test_bad_labels(f, kind):
    arguments, _ = problem(f, 6, 4)
    arguments = {k: of_kind(kind, a) for k, a in arguments.items()}
    other = {"numpy": "torch", "torch": "numpy"}[kind]
    for labels, error, text in (
        (of_kind(kind, np.zeros(6)), TypeError, r"labels: expected an integer dtype, got float64"),
        (of_kind(kind, np.zeros(6, bool)), TypeError, r"labels: expected an integer dtype, got bool"),
        (of_kind(kind, np.zeros(5, int)), ValueError, r"labels: expected shape \(6,\) to match embeddings, got \(5,\)"),
        (of_kind(kind, np.zeros((6, 1), int)), ValueError, r"labels: expected shape \(6,\) to match embeddings"),
        (
            of_kind(other, np.zeros(6, int)),
            TypeError,
            rf"labels: expected a {kind} array to match embeddings, got {other}",
        ),
        ([0] * 6, TypeError, r"labels: expected a NumPy, PyTorch or CuPy array, got list"),
        (None, TypeError, r"labels: expected a NumPy, PyTorch or CuPy array, got NoneType"),
    ):
        with refuses(error, text):
            f(**(arguments | {"labels": labels}))
    for bad in (of_kind(kind, np.zeros((6, 0))), of_kind(kind, np.zeros(6)), [[1.0]]):
        with refuses((TypeError, ValueError), "embeddings: expected"):
            f(**(arguments | {"embeddings": bad}))


def test_bad_proxies(kind):
    x, labels, p = (of_kind(kind, a) for a in (points(6, 4), np.arange(6) % 3, points(3, 4)))
    for bad, text in (
        (p[:, :3], r"proxies: expected shape \(3, 4\) to match embeddings, got \(3, 3\)"),
        (p[:0], r"proxies: expected at least one row"),
        (p[0], r"proxies: expected shape \(n, d\), got \(4,\)"),
        (p[:2], r"labels: expected values in \[0, 2\), got 0 to 2"),
    ):
        with refuses(ValueError, text):
            nf.proxy_anchor_loss(x, labels, bad)
    with refuses(ValueError, r"labels: expected values in \[0, 3\), got -1 to 1"):
        nf.proxy_anchor_loss(x, labels - 1, p)
    with refuses(TypeError, r"proxies: expected dtype float64 to match embeddings, got float32"):
        nf.proxy_anchor_loss(x, labels, of_kind(kind, points(3, 4), "float32"))
    for arguments in ((0, 4), (3, -1)):
        with refuses(ValueError, r"(num_classes|embedding_dim): expected a positive integer"):
            nf.ProxyAnchorLoss(*arguments)


@pytest.mark.parametrize(
    ("f", "name", "bad", "text"),
    [
        (nf.multi_similarity_loss, "alpha", 0, "expected a positive number, got 0.0"),
        (nf.multi_similarity_loss, "beta", -1, "expected a positive number"),
        (nf.multi_similarity_loss, "base", math.inf, "expected a finite number, got inf"),
        (nf.circle_loss, "gamma", math.nan, "expected a positive number"),
        (nf.circle_loss, "m", math.nan, "expected a finite number"),
        (nf.circle_loss, "reduction", "max", "expected 'mean', 'sum' or 'none'"),
        (nf.proxy_anchor_loss, "alpha", 0, "expected a positive number"),
        (nf.proxy_anchor_loss, "margin", -math.inf, "expected a finite number"),
        (nf.hcl_loss, "temperature", 0, "expected a positive number"),
    ],
)
def test_bad_parameters(f, name, bad, text):
    arguments, _ = problem(f, 6, 4)
    with refuses(ValueError, f"{name}: {text}"):
        f(**arguments, **{name: bad})


def test_no_gradient_of_labels():
    arguments, _ = problem(nf.circle_loss, 6, 4)
    with refuses(ValueError, "argnums: labels has no gradient"):
        nf.value_and_grad(nf.circle_loss, 1)(**arguments)
    with refuses(ValueError, "f: expected a scalar value"):
        nf.value_and_grad(nf.circle_loss)(**arguments, reduction="none")
