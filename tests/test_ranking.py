"""Ranking losses: against torch, dense float64 forms, pytorch-metric-learning; the traps that others fell into."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from generators import (
    GRADIENT,
    REFERENCES,
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
    unit,
)
from references import same_bits
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import nearfar as nf
from nearfar import second as second_derivatives

pytestmark = pytest.mark.isa

MINING = ("hard", "semihard", "all")
minings = pytest.mark.parametrize("mining", MINING)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


# ---- references ------------------------------------------------------------------------------------------------------


def root(square):
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def reduced(loss, reduction, count):
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(count, 1)


def contrastive(x1, x2, same, *, margin=1.0, reduction="mean", normalize=True):
    """Pair by pair."""
    x1, x2 = (unit(x1), unit(x2)) if normalize else (x1, x2)
    square = ((x1 - x2) ** 2).sum(1)
    loss = torch.where(same != 0, square, torch.relu(margin - root(square)) ** 2)
    return reduced(loss, reduction, len(loss))


def triplet_margin(anchor, positive, negative, *, reduction="mean", normalize=False, **options):
    """torch's own, with 0 for the mean of nothing."""
    rows = [unit(x) if normalize else x for x in (anchor, positive, negative)]
    loss = F.triplet_margin_loss(*rows, reduction="none", **options)
    return reduced(loss, reduction, len(loss))


def batch_triplet(
    embeddings, labels, *, margin=0.2, mining="hard", squared=False, soft=False, reduction="mean", normalize=True
):
    """Anchor by anchor, word by word; `labels` may come with the triplets themselves."""
    u = unit(embeddings) if normalize else embeddings
    square = ((u[:, None] - u) ** 2).sum(-1)
    d = square if squared else root(square)
    n, index = len(u), torch.arange(len(u))
    loss, count = [0 * u.sum()] * n, 0
    for i in range(n):
        same = labels == labels[i]
        positive, negative = d[i][same & (index != i)], d[i][~same]
        if len(positive) == 0 or len(negative) == 0:
            continue
        if mining == "hard":
            gap = positive.max() - negative.min()
        elif mining == "semihard":
            a, b = positive.detach().numpy(), negative.detach().numpy()
            farther = np.where(b > a[:, None], b, np.inf)
            chosen = np.where(np.isfinite(farther.min(1)), farther.argmin(1), b.argmax())
            gap = positive - negative[torch.from_numpy(chosen)]
        else:
            gap = positive[:, None] - negative
        terms = torch.logaddexp(gap, 0 * gap) if soft else torch.relu(gap + margin)
        loss[i] = terms.sum()
        count += int((terms > 0).sum()) if mining == "all" else terms.numel()
    return reduced(torch.stack(loss) if n else u.sum(1), reduction, count)


def on_triplets(x, triplets, margin=0.2):
    """The mean loss of given triplets, in float64, and its gradient."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    a, p, n = (unit(x)[torch.as_tensor(index)] for index in triplets)
    value = torch.relu(root(((a - p) ** 2).sum(1)) - root(((a - n) ** 2).sum(1)) + margin).mean()
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


REFERENCES.update(
    {
        nf.contrastive_loss: contrastive,
        nf.triplet_margin_loss: triplet_margin,
        nf.batch_triplet_loss: batch_triplet,
    }
)


def labelled(n, d, classes, dtype="float64", noise=1.0, seed=0):
    """Points around the means of their classes."""
    generator = rng(n, d, classes, seed)
    labels = generator.integers(0, classes, n)
    means = generator.standard_normal((classes, d))
    return (means[labels] + noise * generator.standard_normal((n, d))).astype(dtype), labels


# ---- contrastive_loss ------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 5), (31, 17), (130, 128)])
def test_contrastive(dtype, shape, kind):
    x, y = (of_kind(kind, a, dtype) for a in pairs(*shape))
    for same, normalize, reduction in itertools.product((bool, int, float), (True, False), ("mean", "sum")):
        labels = of_kind(kind, rng(*shape).integers(0, 2, shape[0]).astype(same))
        arguments = dict(x1=x, x2=y, same=labels, margin=1.3, normalize=normalize, reduction=reduction)
        compare(nf.contrastive_loss, ["x1", "x2"], dtype, floor=1e-3, **arguments)


def test_contrastive_none():
    x, y = (torch.from_numpy(a) for a in pairs(20, 4))
    same, weights = torch.arange(20) % 2, torch.from_numpy(rng(2).standard_normal(20))
    compare(nf.contrastive_loss, ["x1", "x2"], weights=weights, x1=x, x2=y, same=same, reduction="none")
    rows = nf.contrastive_loss(x.numpy(), y.numpy(), same.numpy(), reduction="none")
    assert_value(rows, nf.contrastive_loss(x, y, same, reduction="none"), VALUE["float64"])


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_contrastive_of_close_points(distance):
    x, y = points(40, 64), points(40, 64, seed=1)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    y = (x + distance * y / np.linalg.norm(y, axis=1, keepdims=True)).astype(np.float32)
    compare(nf.contrastive_loss, ["x1", "x2"], "float32", x1=x, x2=y, same=np.arange(40) % 2)


def test_contrastive_of_equal_points(kind):
    x = of_kind(kind, points(10, 3))
    for same, value in ((np.ones(10, bool), 0.0), (np.zeros(10, bool), 2.25)):
        own, grads = evaluate(nf.contrastive_loss, ["x1", "x2"], x1=x, x2=x, same=of_kind(kind, same), margin=1.5)
        assert own == value
        assert all((grad == 0).all() for grad in grads)


def test_contrastive_curvature_of_equal_points():
    """That of |x - y|^2; others have none where their distance has no derivative."""
    x = torch.from_numpy(points(2, 3))
    for same, curvature in ((torch.ones(2), 2.0), (torch.zeros(2), 0.0)):

        def loss(own, same=same):
            return nf.contrastive_loss(own, x, same, reduction="sum", normalize=False)

        hessian = torch.autograd.functional.hessian(loss, x).reshape(6, 6)
        assert_gradient(hessian, curvature * np.eye(6), 1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_contrastive_of_bad_rows(bad, kind):
    """NaN in, NaN out: also of a pair that is to be apart, whose loss ends at the margin."""
    x, y = points(4, 3), points(4, 3, seed=1)
    x[1:3, 0] = bad
    same = of_kind(kind, np.array([True, True, False, False]))
    rows = nf.contrastive_loss(of_kind(kind, x), of_kind(kind, y), same, reduction="none")
    assert np.isnan(np.asarray(rows)).tolist() == [False, True, True, False]


def test_contrastive_is_torch_and_numpy_alike():
    x, y = pairs(33, 7, "float32")
    same = np.arange(33) % 3 == 0
    own = evaluate(nf.contrastive_loss, ["x1", "x2"], x1=x, x2=y, same=same)
    torch_own = evaluate(
        nf.contrastive_loss, ["x1", "x2"], x1=torch.tensor(x), x2=torch.tensor(y), same=torch.tensor(same)
    )
    assert_value(own[0], torch_own[0], 1e-7)
    for a, b in zip(own[1], torch_own[1], strict=True):
        assert_gradient(a, b, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_paired_rows_of_any_norm(dtype, kind):
    """Unit rows have no scale, though squares of these leave the range of the dtype."""
    x, y, z = (points(6, 3, dtype, seed=s) for s in range(3))
    for scale in (2.0**-70, 2.0**70) if dtype == "float32" else (2.0**-510, 2.0**510):
        for f, names, options in (
            (nf.contrastive_loss, ("x1", "x2"), {"same": of_kind(kind, np.arange(6) % 2)}),
            (nf.triplet_margin_loss, ("anchor", "positive", "negative"), {"normalize": True}),
        ):
            results = []
            for factor in (1.0, scale):
                scaled = {
                    name: of_kind(kind, a * a.dtype.type(factor)) for name, a in zip(names, (x, y, z), strict=False)
                }
                value, grads = evaluate(f, list(names), **scaled, **options)
                results.append((value, [factor * np.asarray(g, float) for g in grads]))
            (value, grads), (expected, expected_grads) = results
            assert_value(value, expected, VALUE[dtype])
            for own, wanted in zip(grads, expected_grads, strict=True):
                assert_gradient(own, wanted, GRADIENT[dtype])


# ---- triplet_margin_loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("swap", [False, True])
def test_triplet_margin_is_torch(p, swap, kind):
    a, b = pairs(40, 6)
    c, _ = pairs(40, 6, seed=5)
    rows = dict(anchor=of_kind(kind, a), positive=of_kind(kind, b), negative=of_kind(kind, c))
    for reduction, normalize in itertools.product(("mean", "sum"), (False, True)):
        options = dict(margin=0.7, p=p, swap=swap, reduction=reduction, normalize=normalize)
        compare(nf.triplet_margin_loss, list(rows), **rows, **options)
    own = nf.triplet_margin_loss(**rows, margin=0.7, p=p, swap=swap, reduction="none")
    expected = F.triplet_margin_loss(*map(torch.as_tensor, (a, b, c)), margin=0.7, p=p, swap=swap, reduction="none")
    assert_value(own, expected, 1e-12, 1e-3)


def test_triplet_margin_of_the_smallest_numbers():
    """Rows of subnormal numbers have directions; their inverse norms, which are infinite, only their gradients need."""
    x = np.array([[1e-310, 0.0], [0.0, 3e-310]])
    rows = nf.triplet_margin_loss(x, x, x[::-1].copy(), margin=2.0, reduction="none", normalize=True, eps=0.0)
    assert rows.tolist() == [2 - math.sqrt(2)] * 2


def test_triplet_margin_has_torchs_bits():
    """Default arguments, float32: what torch computes, not something near."""
    a, b, c = (torch.from_numpy(points(50, 9, "float32", seed=s)) for s in range(3))
    for reduction in ("mean", "sum", "none"):
        own = nf.triplet_margin_loss(a, b, c, reduction=reduction)
        assert torch.equal(own, F.triplet_margin_loss(a, b, c, reduction=reduction))


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("swap", [False, True])
def test_triplet_margin_of_equal_points(p, eps, swap, kind):
    """Never NaN; the gradient is torch's, which is 0 at norm 0."""
    x = of_kind(kind, points(5, 4))
    rows = dict(anchor=x, positive=x, negative=x)
    value, grads = evaluate(nf.triplet_margin_loss, list(rows), **rows, p=p, eps=eps, swap=swap)
    assert value == pytest.approx(1, rel=1e-15)
    for grad in grads:
        assert np.isfinite(np.asarray(grad)).all()
        if eps == 0:
            assert (np.asarray(grad) == 0).all()
    compare(nf.triplet_margin_loss, list(rows), **rows, p=p, eps=eps, swap=swap, floor=1.0)


def test_triplet_margin_of_nothing(kind):
    x = of_kind(kind, np.zeros((0, 3)))
    value, grads = evaluate(nf.triplet_margin_loss, ["anchor"], anchor=x, positive=x, negative=x)
    assert value == 0
    assert grads[0].shape == (0, 3)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_triplet_margin_far_and_near(p, kind):
    """Powers overflow and underflow long before norms do."""
    for scale in (1e-160, 1e160):
        a, b, c = (of_kind(kind, scale * points(6, 3, seed=s)) for s in range(3))
        if kind == "torch" and scale > 1 and p == 2:
            continue  # torch's own norm
        value = nf.triplet_margin_loss(a, b, c, p=p, eps=0.0, margin=scale)
        assert 0 < value / scale < 10


# ---- batch_triplet_loss: against the dense form ----------------------------------------------------------------------


@minings
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6, 7, 12, 13, 31, 33, 61, 127, 128, 129, 239, 241, 257])
def test_rows(mining, n):
    x, labels = labelled(n, 19, max(n // 6, 2))
    kind = "numpy" if n % 2 else "torch"
    arguments = dict(embeddings=of_kind(kind, x), labels=of_kind(kind, labels), mining=mining)
    compare(nf.batch_triplet_loss, ["embeddings"], **arguments)


@minings
@pytest.mark.parametrize("d", [1, 2, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257])
def test_columns(mining, d):
    x, labels = labelled(70, d, 5)
    if d > 1:  # unit rows of one dimension are +-1: every distance is a tie
        compare(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining)
    compare(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining, normalize=False)


@minings
@pytest.mark.parametrize("classes", [2, 3, 30, 100])
def test_numbers_of_classes(mining, classes):
    """Few classes: many pairs, a product; many: pair by pair."""
    x, labels = labelled(200, 20, classes)
    compare(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining)


@minings
@pytest.mark.parametrize("classes", [2, 40])
def test_options(mining, classes, kind):
    x, labels = labelled(60, 18, classes)
    x, labels = of_kind(kind, x), of_kind(kind, labels)
    for squared, soft, normalize in itertools.product((False, True), repeat=3):
        margin, reduction = (0.0, "mean") if squared == normalize else (1.0, "sum")
        compare(
            nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining, squared=squared,
            soft=soft, normalize=normalize, margin=margin, reduction=reduction,
        )  # fmt: skip


@minings
def test_upstream_weights(mining):
    x, labels = (torch.from_numpy(a) for a in labelled(90, 18, 6))
    weights = torch.from_numpy(rng(7).standard_normal(90))
    for soft in (False, True):
        arguments = dict(embeddings=x, labels=labels, mining=mining, soft=soft, reduction="none")
        compare(nf.batch_triplet_loss, ["embeddings"], weights=weights, **arguments)


@pytest.mark.parametrize("mining", ["hard", "all"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [4, 60])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float32(mining, soft, classes, dtype):
    """Half precisions are computed in float32: no fill value overflows, near distances do not tie."""
    x, labels = labelled(200, 64, classes)
    x, labels = of_kind("torch", x, dtype), torch.from_numpy(labels)
    # With "all" no triplet at the kink of its hinge, where rounding decides about its slope: distances are at most 2.
    arguments = dict(embeddings=x, labels=labels, mining=mining, soft=soft, margin=3.0 if mining == "all" else 0.2)
    # The loss is a small difference of distances of order 1: its error is relative to the margin.
    compare(nf.batch_triplet_loss, ["embeddings"], dtype, value_floor=0.2, **arguments)
    assert nf.batch_triplet_loss(**arguments).dtype == torch.float32


@pytest.mark.parametrize("classes", [3, 60])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float32_semihard(classes, dtype):
    """Which negative is the closest beyond a positive depends on the last bit somewhere among many pairs, so: what was
    mined is right within rounding, and value and gradient are those of what was mined."""
    x, labels = labelled(300, 64, classes, dtype)
    a, p, n = nf.mine_triplets(x, labels, mining="semihard")
    wide = x.astype(np.float64)
    u = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    d = np.sqrt(((u[:, None] - u) ** 2).sum(-1))
    assert len(a) == sum(np.sum(labels == own) - 1 for own in labels)
    other = labels[a][:, None] != labels
    beyond = np.where(other & (d[a] > d[a, p][:, None] + 1e-6), d[a], np.inf).min(1)
    closest = np.where(np.isfinite(beyond), beyond, np.where(other, d[a], -1).max(1))
    assert np.all(d[a, n] <= closest + 1e-6)
    assert np.all((d[a, n] > d[a, p] - 1e-6) | ~np.isfinite(beyond))
    value, (grad,) = evaluate(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining="semihard")
    expected, expected_grad = on_triplets(wide, (a, p, n))
    assert_value(value, expected, VALUE[dtype], 0.2)
    assert_gradient(grad, expected_grad, GRADIENT[dtype], 2.0**-11 if dtype == "float16" else 0.0)


@minings
def test_clusters_far_from_the_origin(mining):
    """Tight clusters, not normalised: what an expansion of the square gets wrong."""
    generator = rng(3)
    labels = np.arange(120) % 6
    x = (10 * generator.standard_normal((6, 40)))[labels] + 1e-2 * generator.standard_normal((120, 40)) + 100
    x = x.astype(np.float32)
    value = nf.batch_triplet_loss(x, labels, mining=mining, margin=100.0, normalize=False)
    expected, _ = reference(
        nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining, margin=100.0, normalize=False
    )
    assert_value(value, expected, 3e-6 if mining == "all" else 1e-6)


def test_layouts():
    x, labels = labelled(40, 6, 5)
    expected = nf.value_and_grad(nf.batch_triplet_loss)(x, labels)
    for name, same in layouts(x).items():
        value, grad = nf.value_and_grad(nf.batch_triplet_loss)(same, labels)
        assert value == expected[0], name
        assert same_bits(grad, expected[1]), name


# ---- batch_triplet_loss: traps ---------------------------------------------------------------------------------------

NOTHING = {
    "no rows": np.zeros(0, int),
    "one row": np.zeros(1, int),
    "one class": np.zeros(9, int),
    "one row per class": np.arange(9),
}


@minings
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("labels", NOTHING.values(), ids=NOTHING)
def test_no_valid_triplet(mining, soft, labels, kind):
    """0 with zero gradient where others have 0/0. TensorFlow Addons has 2.414 for one class of two rows."""
    x = of_kind(kind, points(len(labels), 17))
    arguments = dict(embeddings=x, labels=of_kind(kind, labels), mining=mining, soft=soft)
    for reduction in ("mean", "sum"):
        value, (grad,) = evaluate(nf.batch_triplet_loss, ["embeddings"], **arguments, reduction=reduction)
        assert value == 0
        assert (grad == 0).all()
        assert grad.shape == x.shape
    rows = nf.batch_triplet_loss(**arguments, reduction="none")
    assert (rows == 0).all()
    assert rows.shape == (len(labels),)


@minings
def test_some_anchors_without_triplets(mining):
    """Lone rows are nobody's anchor and do not count in the mean."""
    x, labels = labelled(60, 18, 4)
    labels[:20] = 100 + np.arange(20)
    compare(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining)
    assert np.all(nf.batch_triplet_loss(x, labels, mining=mining, reduction="none")[:20] == 0)


@minings
def test_nothing_violates(mining):
    """Well separated classes: 0, where a mean over the positive losses would be 0/0."""
    labels = np.arange(40) % 4
    x = np.eye(4)[labels] + 1e-3 * points(40, 4)
    value, (grad,) = evaluate(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining)
    assert value == 0
    assert np.all(grad == 0)


@minings
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_collapsed(mining, d, dtype):
    """All embeddings equal: the margin, softly ln 2, with a gradient of 0 and no NaN."""
    x = np.full((50, d), 0.3, dtype)
    for labels in (np.arange(50) % 5, np.arange(50) % 2):
        for squared in (False, True):
            arguments = dict(embeddings=x, labels=labels, mining=mining, squared=squared)
            value, (grad,) = evaluate(nf.batch_triplet_loss, ["embeddings"], margin=0.25, **arguments)
            assert value == 0.25
            assert np.all(grad == 0)
            value, (grad,) = evaluate(nf.batch_triplet_loss, ["embeddings"], soft=True, **arguments)
            assert value == pytest.approx(math.log(2), rel=2e-7)
            assert np.all(grad == 0)


@minings
def test_duplicates(mining):
    """Equal rows in one class and in several: distance 0 is exact and its gradient is 0."""
    x, labels = labelled(30, 33, 3)
    x, labels = np.concatenate([x, x, x[:10]]), np.concatenate([labels, labels, labels[:10] + 1])
    value, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining, normalize=False)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))
    assert value == pytest.approx(
        float(batch_triplet(torch.tensor(x), torch.tensor(labels), mining=mining, normalize=False)), rel=1e-12
    )


@minings
def test_zero_rows(mining):
    x, labels = labelled(40, 20, 3)
    x[[3, 20]] = 0
    compare(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining=mining)
    _, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining)
    assert np.all(grad[[3, 20]] == 0)


@minings
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("d", [4, 20])
def test_bad_rows(mining, bad, normalize, d):
    """A row with NaN is nobody's positive or negative; its own sum and gradient are NaN, all others as without it."""
    x, labels = labelled(150, d, 9)
    good = np.delete(np.arange(150), [5, 140])
    x[5, 1] = x[140, 0] = bad
    rows = nf.batch_triplet_loss(x, labels, mining=mining, reduction="none", normalize=normalize)
    assert np.all(np.isnan(rows[[5, 140]]))
    expected = nf.batch_triplet_loss(x[good], labels[good], mining=mining, reduction="none", normalize=normalize)
    assert np.array_equal(rows[good], expected)
    value, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining, normalize=normalize)
    assert np.isnan(value)
    assert np.all(np.isnan(grad[[5, 140]]))
    _, expected = nf.value_and_grad(nf.batch_triplet_loss)(x[good], labels[good], mining=mining, normalize=normalize)
    assert np.array_equal(grad[good], expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_integers(dtype, kind):
    x, labels = labelled(40, 5, 4)
    expected = nf.batch_triplet_loss(x, labels, mining="semihard")
    info = np.iinfo(dtype)
    spread = np.array([info.min, 1, info.max - 1, info.max], dtype)[labels]
    own = torch.from_numpy(spread) if kind == "torch" else spread
    assert nf.batch_triplet_loss(of_kind(kind, x), own, mining="semihard") == expected


@minings
def test_order_of_rows_does_not_matter(mining):
    """Also of the classes: rows are grouped by class inside."""
    x, labels = labelled(100, 24, 7)
    order = rng(1).permutation(100)
    value, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining)
    other, other_grad = nf.value_and_grad(nf.batch_triplet_loss)(x[order], (9 - labels)[order], mining=mining)
    assert other == pytest.approx(value, rel=1e-12)
    assert_gradient(other_grad, grad[order], 1e-11)


@minings
def test_never_cubic(mining):
    """4e9 triplets at 2500 rows of two classes: far from memory or time for any enumeration, and from 32 bits."""
    x, labels = labelled(2500, 32, 2, "float32")
    value, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining)
    assert np.isfinite(value)
    assert np.linalg.norm(grad) > 0
    if mining != "all":
        return
    rows = nf.batch_triplet_loss(x, labels, mining="all", reduction="none")
    wide = x.astype(np.float64)
    u = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    for i in (0, 1234, 2499):  # some anchors, enumerated
        d = np.sqrt(((u - u[i]) ** 2).sum(1))
        same = labels == labels[i]
        positive, negative = d[same & (np.arange(2500) != i)], d[~same]
        losses = np.maximum(positive[:, None] - negative + 0.2, 0)
        assert rows[i] == pytest.approx(losses.sum(), abs=1e-6 * 0.2 * np.count_nonzero(losses))
    size = np.bincount(labels)
    count = int((size * (size - 1) * size[::-1]).sum())
    assert count > 2**31
    rows = nf.batch_triplet_loss(x, labels, mining="all", margin=10, reduction="none")  # every triplet has a loss
    mean = nf.batch_triplet_loss(x, labels, mining="all", margin=10)
    assert mean == pytest.approx(rows.astype(np.float64).sum() / count, rel=1e-6)


def test_hard_and_semihard_are_what_they_say():
    """On a line: anchor 0, positive at 1, negatives at 0.4, 1.5 and 3."""
    x = np.array([0.0, 1.0, 0.4, 1.5, 3.0])[:, None]
    labels = np.array([0, 0, 1, 1, 1])
    common = dict(margin=1.0, normalize=False, reduction="none")
    assert nf.batch_triplet_loss(x, labels, mining="hard", **common)[0] == pytest.approx(1 - 0.4 + 1)
    assert nf.batch_triplet_loss(x, labels, mining="semihard", **common)[0] == pytest.approx(1 - 1.5 + 1)
    assert nf.batch_triplet_loss(x, labels, mining="all", **common)[0] == pytest.approx(1.6 + 0.5)
    far = np.array([0, 0, 1, 1, 1]), np.array([[0.0], [9.0], [0.4], [1.5], [3.0]])
    # No negative is farther than 9: the farthest stands in.
    assert nf.batch_triplet_loss(far[1], far[0], mining="semihard", **common)[0] == pytest.approx(9 - 3 + 1)


# ---- pytorch-metric-learning -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("squared", [False, True])
def test_pytorch_metric_learning(squared):
    """Its batch-hard miner with a plain mean is "hard"; its loss without a miner is "all" (mean over positive losses).

    Its "semihard" is every triplet of a band, `mine_triplets(mining="band")`: another definition.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_metric_learning")
        from pytorch_metric_learning import distances, losses, miners, reducers

    x, labels = (torch.from_numpy(a) for a in labelled(60, 12, 5))
    x.requires_grad_()
    distance = distances.LpDistance(power=2 if squared else 1)
    hard = losses.TripletMarginLoss(margin=0.2, distance=distance, reducer=reducers.MeanReducer())
    theirs = hard(x, labels, miners.BatchHardMiner(distance=distance)(x, labels))
    every = losses.TripletMarginLoss(margin=0.2, distance=distance)(x, labels)
    for mining, expected in (("hard", theirs), ("all", every)):
        own = nf.batch_triplet_loss(x, labels, mining=mining, squared=squared)
        assert_value(own, expected, 1e-9)
        grads = [torch.autograd.grad(value, x)[0] for value in (own, expected)]
        assert_gradient(*grads, 1e-9)


# ---- torch -----------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2])
SAME = torch.tensor([1, 0, 0, 1, 0, 1, 0])


def leaf(seed=0, n=7, d=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()


CASES = {
    "contrastive": (lambda x, y: nf.contrastive_loss(x, y, SAME, margin=1.5), (leaf(), leaf(1))),
    "contrastive none": (
        lambda x, y: nf.contrastive_loss(x, y, SAME, margin=3.0, reduction="none", normalize=False),
        (leaf(), leaf(1)),
    ),
    "margin": (lambda a, p, n: nf.triplet_margin_loss(a, p, n), (leaf(), leaf(1), leaf(2))),
    "margin swap": (
        lambda a, p, n: nf.triplet_margin_loss(a, p, n, p=3, swap=True, normalize=True, reduction="none"),
        (leaf(), leaf(1), leaf(2)),
    ),
    **{
        f"{mining} {name}": (
            lambda x, mining=mining, options=options: nf.batch_triplet_loss(x, LABELS, mining=mining, **options),
            (leaf(3),),
        )
        for mining in MINING
        for name, options in {
            "mean": {},
            "none": {"reduction": "none", "margin": 0.5},
            "soft": {"soft": True},
            "squared": {"squared": True, "normalize": False, "reduction": "sum"},
        }.items()
    },
}
cases = pytest.mark.parametrize(("f", "arguments"), CASES.values(), ids=CASES)


@cases
def test_gradcheck(f, arguments):
    assert gradcheck(f, arguments)


@cases
def test_gradgradcheck(f, arguments):
    assert gradgradcheck(f, arguments, fast_mode=True)


def test_second_derivatives_of_a_larger_batch(monkeypatch):
    """Blocks of anchors add up, and equal those of the dense form."""
    monkeypatch.setattr(second_derivatives, "_BLOCK", 17)
    x, labels = (torch.from_numpy(a) for a in labelled(60, 9, 5))
    x.requires_grad_()
    v = torch.from_numpy(points(60, 9, seed=4))
    for mining in MINING:
        found = []
        for f in (nf.batch_triplet_loss, batch_triplet):
            (first,) = torch.autograd.grad(f(x, labels, mining=mining), x, create_graph=True)
            found.append(torch.autograd.grad((first * v).sum(), x)[0])
        assert_gradient(*found, 1e-11)


def test_third_derivatives_raise():
    f, (x,) = CASES["hard mean"]
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        second.sum().backward()


@cases
def test_func_grad(f, arguments):
    detached = tuple(a.detach() for a in arguments)
    grads = torch.func.grad(lambda *a: f(*a).sum(), argnums=tuple(range(len(arguments))))(*detached)
    expected = torch.autograd.grad(f(*arguments).sum(), arguments)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["contrastive", "margin swap", "hard mean", "semihard none", "all soft"])
def test_vmap(name):
    f, arguments = CASES[name]
    stacked = [torch.stack([a.detach(), 2 - a.detach()]) for a in arguments]
    both = torch.func.vmap(f)(*stacked)
    for k in range(2):
        torch.testing.assert_close(both[k], f(*(s[k] for s in stacked)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["contrastive", "margin", "hard", "semihard", "all"])
def test_compile(name):
    def f(x, y, labels):
        if name == "contrastive":
            return nf.contrastive_loss(x, y, labels % 2)
        if name == "margin":
            return nf.triplet_margin_loss(x, y, 2 * y, swap=True)
        return nf.batch_triplet_loss(x + y, labels, mining=name, margin=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 11):
        labels, found = torch.arange(n) % 3, []
        for function in (f, compiled):
            x, y = leaf(5, n), leaf(6, n)
            value = function(x, y, labels)
            found.append((value.detach(), *torch.autograd.grad(value, (x, y))))
        for own, expected in zip(*found, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["contrastive", "margin", *MINING])
def test_autocast(name):
    """bfloat16 features: float32 losses of just those features, gradients that reach the weights."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(8, 5), torch.randn(30, 8)
    labels = torch.arange(30) % 4

    def loss(a):
        if name == "contrastive":
            return nf.contrastive_loss(a, a.flip(0), labels % 2)
        if name == "margin":
            return nf.triplet_margin_loss(a, a.flip(0), a.roll(1, 0))
        return nf.batch_triplet_loss(a, labels, mining=name)

    with torch.autocast("cpu", torch.bfloat16):
        features = net(x)
        assert features.dtype == torch.bfloat16
        value = loss(features)
    assert value.dtype == torch.float32
    assert value == loss(features.detach())
    value.backward()
    assert net.weight.grad.dtype == torch.float32
    assert torch.isfinite(net.weight.grad).all()
    assert net.weight.grad.norm() > 0


def test_loss_scaler():
    """A float16 gradient of a mean over many triplets survives only if it is rounded after scaling."""
    x, labels = labelled(400, 16, 20)
    x, labels = torch.from_numpy(x).half().requires_grad_(), torch.from_numpy(labels)
    (1024 * nf.batch_triplet_loss(x, labels, mining="all")).backward()
    _, (expected,) = reference(nf.batch_triplet_loss, ["embeddings"], embeddings=x, labels=labels, mining="all")
    assert_gradient(x.grad.float() / 1024, expected, 1e-3)


@minings
@pytest.mark.parametrize("classes", [3, 150])
def test_bits_do_not_depend_on_the_number_of_threads(mining, classes, threads):
    x, labels = labelled(700, 70, classes, "float32")
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining))
        found[-1] = *found[-1], nf.batch_triplet_loss(x, labels, mining=mining, reduction="none")
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@minings
def test_numpy_is_torch(mining):
    x, labels = labelled(90, 20, 6, "float32")
    value, grad = nf.value_and_grad(nf.batch_triplet_loss)(x, labels, mining=mining)
    other, other_grad = nf.value_and_grad(nf.batch_triplet_loss)(torch.tensor(x), torch.tensor(labels), mining=mining)
    assert same_bits(value, other.numpy()[()])
    assert_gradient(grad, other_grad, 1e-7)
    assert isinstance(value, np.float32)


def test_training_orders_the_classes():
    """Gradient steps bring the classes apart: the loss goes to 0."""
    x, labels = (torch.from_numpy(a) for a in labelled(60, 8, 4))
    for mining in MINING:
        own = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([own], 0.1)
        for _ in range(100):
            optimizer.zero_grad()
            value = nf.batch_triplet_loss(own, labels, mining=mining)
            value.backward()
            optimizer.step()
        assert nf.batch_triplet_loss(own, labels, mining="hard") < 0.01, mining


# ---- modules, errors -------------------------------------------------------------------------------------------------


def test_modules_are_the_functions():
    x, y = (torch.from_numpy(a) for a in pairs(20, 5))
    same, labels = torch.arange(20) % 2, torch.arange(20) % 4
    assert nf.ContrastiveLoss()(x, y, same) == nf.contrastive_loss(x, y, same)
    assert nf.ContrastiveLoss(0.5, reduction="sum", normalize=False)(x, y, same) == nf.contrastive_loss(
        x, y, same, margin=0.5, reduction="sum", normalize=False
    )
    assert nf.TripletMarginLoss()(x, y, x + y) == torch.nn.TripletMarginLoss()(x, y, x + y)
    assert nf.TripletMarginLoss(0.5, 1, 1e-3, True)(x, y, x + y) == torch.nn.TripletMarginLoss(0.5, 1, 1e-3, True)(
        x, y, x + y
    )
    assert nf.TripletMarginLoss(normalize=True, reduction="sum")(x, y, x + y) == nf.triplet_margin_loss(
        x, y, x + y, normalize=True, reduction="sum"
    )
    assert nf.BatchTripletLoss()(x, labels) == nf.batch_triplet_loss(x, labels)
    options = dict(mining="all", squared=True, soft=True, reduction="sum", normalize=False)
    assert nf.BatchTripletLoss(0.1, **options)(x, labels) == nf.batch_triplet_loss(x, labels, margin=0.1, **options)
    assert repr(nf.BatchTripletLoss(0.5)) == "BatchTripletLoss(margin=0.5, mining=hard, squared=False, soft=False)"
    assert "swap=False" in repr(nf.TripletMarginLoss())
    assert repr(nf.ContrastiveLoss()) == "ContrastiveLoss(margin=1.0)"
    with pytest.raises(ValueError, match="^reduction: "):
        nf.BatchTripletLoss(reduction="max")
    with pytest.raises(ValueError, match="^margin: "):
        nf.ContrastiveLoss(-1)


X, Y = pairs(6, 4)
L = np.array([0, 0, 1, 1, 2, 2])

BAD = {
    "same missing": (lambda: nf.contrastive_loss(X, Y, [0] * 6), TypeError, "same: expected a NumPy"),
    "same kind": (
        lambda: nf.contrastive_loss(X, Y, torch.tensor(L)),
        TypeError,
        "same: expected a numpy array to match",
    ),
    "same shape": (lambda: nf.contrastive_loss(X, Y, L[:5]), ValueError, r"same: expected shape \(6,\) to match x1"),
    "same values": (lambda: nf.contrastive_loss(X, Y, L), ValueError, "same: expected 1 for pairs"),
    "same signs": (
        lambda: nf.contrastive_loss(torch.tensor(X), torch.tensor(Y), torch.tensor([1, -1, 1, 1, 1, 1])),
        ValueError,
        "same: expected 1 for pairs",
    ),
    "same text": (lambda: nf.contrastive_loss(X, Y, L.astype(str)), TypeError, "same: expected booleans"),
    "x2": (lambda: nf.contrastive_loss(X, Y[:5], L), ValueError, r"x2: expected shape \(6, 4\) to match x1"),
    "negative margin": (lambda: nf.contrastive_loss(X, Y, L > 0, margin=-1), ValueError, "margin: expected a non-neg"),
    "nan margin": (lambda: nf.batch_triplet_loss(X, L, margin=math.nan), ValueError, "margin: expected a non-neg"),
    "text margin": (lambda: nf.batch_triplet_loss(X, L, margin="1"), TypeError, "margin: expected a number"),
    "zero margin": (lambda: nf.triplet_margin_loss(X, X, Y, margin=0), ValueError, "margin: expected a positive"),
    "p": (lambda: nf.triplet_margin_loss(X, X, Y, p=0), ValueError, "p: expected a positive number"),
    "eps": (lambda: nf.triplet_margin_loss(X, X, Y, eps=-1), ValueError, "eps: expected a non-negative number"),
    "negative": (lambda: nf.triplet_margin_loss(X, X, Y[:3]), ValueError, "negative: expected shape"),
    "positive": (lambda: nf.triplet_margin_loss(X, X[:, :2], Y), ValueError, "positive: expected shape"),
    "dtype": (lambda: nf.triplet_margin_loss(X, X, Y.astype("f4")), TypeError, "negative: expected dtype"),
    "reduction": (lambda: nf.triplet_margin_loss(X, X, Y, reduction="max"), ValueError, "reduction: expected"),
    "mining": (lambda: nf.batch_triplet_loss(X, L, mining="band"), ValueError, "mining: expected 'hard', 'all' or"),
    "labels": (lambda: nf.batch_triplet_loss(X, L[:5]), ValueError, r"labels: expected shape \(6,\) to match embed"),
    "float labels": (lambda: nf.batch_triplet_loss(X, L * 1.0), TypeError, "labels: expected an integer dtype"),
    "label list": (lambda: nf.batch_triplet_loss(X, L.tolist()), TypeError, "labels: expected a NumPy"),
    "label kind": (lambda: nf.batch_triplet_loss(X, torch.tensor(L)), TypeError, "labels: expected a numpy array"),
    "embeddings": (lambda: nf.batch_triplet_loss(X[0], L), ValueError, "embeddings: expected shape"),
    "no columns": (lambda: nf.batch_triplet_loss(X[:, :0], L), ValueError, "embeddings: expected at least one column"),
    "integers": (lambda: nf.batch_triplet_loss(X.astype(int), L), TypeError, "embeddings: expected a floating"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
