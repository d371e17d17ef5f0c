"""Losses of classes, on the CPU: against the dense float64 form, closed forms, other libraries, and their traps."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from generators import (
    GRADIENT,
    STEP,
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

DTYPES = ["float32", "float64"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
SCALARS = ["embeddings", "logit_scale"]


def labels_of(n, classes, seed=0):
    """Unordered, unbalanced, any integers."""
    return rng(n, classes, seed).integers(0, classes, n) * 7 - 11


def clustered(n, d, labels, dtype="float64", noise=0.7):
    """Rows near the centre of their class: as in training."""
    _, codes = np.unique(labels, return_inverse=True)
    return (points(n, d, seed=9)[codes] + noise * points(n, d)).astype(dtype)


def sparse_mask(n, share=0.1, seed=0):
    """Not symmetric; with empty rows, rows of one positive, and a diagonal that must not matter."""
    mask = rng(n, seed).random((n, n)) < share
    mask[: n // 4] &= rng(n, seed + 1).random((n // 4, n)) < 0.05
    return mask


def both(labels):
    """The mask that says the same as labels."""
    return labels[:, None] == labels


# ---- against the dense form ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6, 7, 12, 13, 31, 33, 61, 127, 128, 129, 241, 253])
@pytest.mark.parametrize("classes", [1, 5, 1000])
def test_labels(dtype, n, classes):
    labels = labels_of(n, classes)
    x = clustered(n, 19, labels, dtype)
    compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, labels=labels, logit_scale=5.0, floor=5.0 if n < 3 else 0.0)


@dtypes
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 33, 128, 257, 385])
def test_columns(dtype, d):
    labels = labels_of(40, 6)
    x = clustered(40, d, labels, dtype)
    arguments = dict(embeddings=x, labels=labels, logit_scale=5.0)
    compare(nf.sup_con_loss, SCALARS, dtype, **arguments, floor=1.0 if d == 1 else 0.0)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 33, 64, 65, 129, 253])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
def test_mask(dtype, n, share):
    x = points(n, 19, dtype)
    arguments = dict(embeddings=x, positive_mask=sparse_mask(n, share), logit_scale=5.0)
    compare(nf.sup_con_loss, SCALARS, dtype, **arguments, floor=5.0 if n < 3 else 0.0)


@dtypes
@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 1, 4), (1, 2, 4), (1, 3, 4), (20, 1, 4), (20, 2, 4), (43, 3, 6)])
@pytest.mark.parametrize("what", ["labels", "mask", "views"])
def test_views(dtype, shape, what):
    n, views, d = shape
    x = points(n * views, d, dtype).reshape(shape)
    arguments = dict(embeddings=x, logit_scale=5.0)
    if what == "labels":
        arguments["labels"] = labels_of(n, 7)
    elif what == "mask":
        arguments["positive_mask"] = sparse_mask(n)
    compare(nf.sup_con_loss, SCALARS, dtype, **arguments, floor=5.0 if n * views < 4 else 0.0)


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["temperature", "logit_scale"])
@pytest.mark.parametrize("shape", [(45, 6), (15, 3, 6)])
def test_options(dtype, reduction, normalize, name, shape):
    labels, mask = torch.from_numpy(labels_of(shape[0], 9)), torch.from_numpy(sparse_mask(shape[0]))
    x = of_kind("torch", points(45, 6).reshape(shape), dtype)
    weights = of_kind("torch", rng(1).standard_normal(shape[:-1]), dtype) if reduction == "none" else None
    for which in ({"labels": labels}, {"positive_mask": mask}):
        arguments = dict(embeddings=x, reduction=reduction, normalize=normalize, **which)
        arguments[name] = torch.tensor(0.7, dtype=torch.float64)
        compare(nf.sup_con_loss, ["embeddings", name], dtype, weights=weights, **arguments, value_floor=1.0)


@dtypes
def test_many_chunks(dtype):
    labels = labels_of(700, 60)
    x = clustered(700, 40, labels, dtype)
    compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, labels=labels, logit_scale=1 / 0.07)
    compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, positive_mask=sparse_mask(700, 0.01), logit_scale=1 / 0.07)


def test_a_mask_of_labels_is_labels(kind):
    labels = labels_of(150, 20)
    x = clustered(150, 12, labels)
    one = evaluate(nf.sup_con_loss, SCALARS, embeddings=x, labels=labels, logit_scale=9.0)
    other = evaluate(nf.sup_con_loss, SCALARS, embeddings=x, positive_mask=both(labels), logit_scale=9.0)
    assert_value(one[0], other[0], 1e-13)
    assert_gradient(one[1][0], other[1][0], 1e-12)
    given = {"labels": of_kind(kind, labels)}, {"positive_mask": of_kind(kind, both(labels))}
    for which in given:
        rows = nf.sup_con_loss(of_kind(kind, x), reduction="none", **which)
        assert_value(
            rows, reference(nf.sup_con_loss, ["embeddings"], embeddings=x, labels=labels, reduction="none")[0], 1e-12
        )


def test_views_are_rows_of_their_item():
    x = points(60, 5).reshape(20, 3, 5)
    labels = labels_of(20, 6)
    for which, flat in (
        ({"labels": labels}, {"labels": np.repeat(labels, 3)}),
        ({}, {"labels": np.repeat(np.arange(20), 3)}),
        ({"positive_mask": sparse_mask(20)}, None),
    ):
        if flat is None:
            mask = which["positive_mask"] | np.eye(20, dtype=bool)
            flat = {"positive_mask": np.repeat(np.repeat(mask, 3, 0), 3, 1)}
        rows = nf.sup_con_loss(x, reduction="none", **which)
        assert rows.shape == (20, 3)
        assert_value(rows.reshape(-1), nf.sup_con_loss(x.reshape(-1, 5), reduction="none", **flat), 1e-13)
        assert nf.sup_con_loss(x, **which) == pytest.approx(nf.sup_con_loss(x.reshape(-1, 5), **flat), rel=1e-13)


# ---- classes of two are NT-Xent --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("tau", [0.001, 0.01, 0.05, 0.5])
def test_two_views_are_nt_xent(dtype, tau):
    """To rounding, also where the loss is tiny: the only positive is not absorbed by its own logarithm."""
    for x, y in (pairs(70, 24, dtype), (np.eye(40, dtype=dtype), np.eye(40, dtype=dtype))):
        n = len(x)
        both_views = np.concatenate([x, y])
        value, grads = evaluate(nf.nt_xent_loss, ["z1", "z2", "logit_scale"], z1=x, z2=y, logit_scale=1 / tau)
        labels = np.tile(np.arange(n), 2)
        for given in (
            {"embeddings": both_views, "labels": labels},
            {"embeddings": both_views, "positive_mask": both(labels)},
            {"embeddings": np.stack([x, y], 1)},
        ):
            own, (dz, dscale) = evaluate(nf.sup_con_loss, SCALARS, **given, logit_scale=1 / tau)
            dz = dz.swapaxes(0, 1).reshape(2 * n, -1) if dz.ndim == 3 else dz
            eps = float(np.finfo(dtype).eps)
            assert own == pytest.approx(value, rel=8 * eps)
            assert_gradient(dz, np.concatenate(grads[:2]), eps * max(8, 0.1 / tau), floor=1e-30)
            assert dscale == pytest.approx(grads[2], rel=100 * eps)


@dtypes
def test_one_sided_positives_keep_their_digits(dtype):
    """Row i names row j as its only positive, row j another: their pair is in j's denominator, and apart in i's."""
    n = 24
    x = np.repeat(np.eye(n // 3, dtype=dtype), 3, 0)  # i, j, k the same vector
    mask = np.zeros((n, n), bool)
    for i in range(0, n, 3):
        mask[i, i + 1] = mask[i + 1, i + 2] = True  # i -> j -> k, k has none
    for scale in (1.0, 30.0):
        compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, positive_mask=mask, logit_scale=scale, floor=1.0)
    x = points(n, 5, dtype)
    for scale in (1.0, 30.0, 1000.0):
        compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, positive_mask=mask, logit_scale=scale)
    # A chain without ties: a loss of e^-40 next to large ones.
    y = np.eye(6, dtype=dtype)[[0, 0, 1, 1, 2, 2]]
    chain = np.zeros((6, 6), bool)
    chain[0, 1] = chain[2, 3] = chain[3, 0] = True
    rows = nf.sup_con_loss(y, positive_mask=chain, logit_scale=40.0, reduction="none")
    assert_value(rows[:3:2], np.full(2, math.log1p(4 * math.exp(-40))), VALUE[dtype])
    assert rows[3] == pytest.approx(40 + math.log1p(4 * math.exp(-40)), rel=1e-6)
    assert np.array_equal(rows[[1, 4, 5]], [0, 0, 0])


# ---- closed forms and published values -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 2.0034447302225575), (0.1, 1.0987938718999266)])
def test_orthogonal_classes(tau, expected, kind):
    """C orthogonal classes of P equal vectors: log((P - 1) + (C - 1) P e^-1/tau). No factor tau / 0.07."""
    labels = np.repeat(np.arange(4), 4)
    x = np.linalg.qr(points(4, 4))[0][labels]
    value = nf.sup_con_loss(of_kind(kind, x), of_kind(kind, labels), temperature=tau)
    assert float(value) == pytest.approx(expected, rel=1e-12)
    # ... so that the gradient by the temperature has the sign of the formula's.
    _, slope = nf.value_and_grad(nf.sup_con_loss, 3)(x, labels, temperature=tau)
    weight = 12 * math.exp(-1 / tau) / (3 + 12 * math.exp(-1 / tau))
    assert slope == pytest.approx(weight / tau**2, rel=1e-11)
    assert slope > 0


def test_published_values():
    """optax's points: L_out is 10.672 with three of a class, which NT-Xent's 8.969 and L_in are not."""
    x = np.array([[-1.9540, 1.0780], [0.2380, -0.5703], [1.8745, -0.0195], [-0.6719, -1.9210]])
    value = nf.sup_con_loss(x, np.array([0, 0, 0, 1]), temperature=0.07)
    assert value == pytest.approx(10.672104379738704, rel=1e-12)
    value = nf.sup_con_loss(x, np.array([0, 0, 1, 1]), temperature=0.07)
    assert value == pytest.approx(14.010320041574158, rel=1e-12)


def sup_contrast(features, labels, temperature, base_temperature):
    """The authors' formula, views and all."""
    n, views, _ = features.shape
    z = torch.cat(torch.unbind(features, 1))
    s = z @ z.T / temperature
    mask = (labels[:, None] == labels).double().repeat(views, views)
    others = 1 - torch.eye(n * views, dtype=torch.float64)
    log_prob = s - torch.log((torch.exp(s) * others).sum(1, keepdim=True))
    mask = mask * others
    return (-(temperature / base_temperature) * (mask * log_prob).sum(1) / mask.sum(1)).mean()


def test_equals_sup_contrast_up_to_its_factor():
    x = torch.nn.functional.normalize(torch.from_numpy(points(60, 6).reshape(30, 2, 6)), dim=2).requires_grad_()
    labels = torch.from_numpy(labels_of(30, 5))
    theirs = sup_contrast(x, labels, 0.2, 0.2)
    ours = nf.sup_con_loss(x, labels, temperature=0.2, normalize=False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert_gradient(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0].numpy(), 1e-12)
    assert sup_contrast(x, labels, 0.2, 0.07).item() == pytest.approx(0.2 / 0.07 * ours.item(), rel=1e-12)


def test_equals_pytorch_metric_learning():
    pml = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, reducers

    assert pml.__version__
    labels = torch.from_numpy(labels_of(60, 8))
    x = torch.from_numpy(points(60, 6)).requires_grad_()
    for tau in (0.1, 0.5):
        theirs = losses.SupConLoss(temperature=tau, reducer=reducers.MeanReducer())(x, labels)
        ours = nf.sup_con_loss(x, labels, temperature=tau)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
        assert_gradient(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0].numpy(), 1e-10)


def test_mean_counts_anchors_of_zero_loss():
    """Where the libraries differ: an average over nonzero losses is larger; ours is over all that have a positive."""
    z = np.eye(8)[[0, 0, 1, 1, 2, 3]]
    labels = np.array([0, 0, 1, 1, 2, 2])
    rows = nf.sup_con_loss(z, labels, temperature=0.001, reduction="none")
    assert np.array_equal(rows[:4], np.zeros(4))
    assert nf.sup_con_loss(z, labels, temperature=0.001) == pytest.approx(rows.sum() / 6, rel=1e-12)


# ---- anchors without positives ---------------------------------------------------------------------------------------


def test_anchors_without_a_positive_are_skipped(kind):
    labels = np.concatenate([labels_of(30, 5), [100, 101, 102]])
    x = points(33, 7)
    own, given = of_kind(kind, x), of_kind(kind, labels)
    rows = np.asarray(nf.sup_con_loss(own, given, reduction="none"))
    assert np.array_equal(rows[30:], np.zeros(3))
    assert float(nf.sup_con_loss(own, given)) == pytest.approx(rows.sum() / 30, rel=1e-12)  # not / 33, not NaN
    # They are in the denominators all the same, and so have gradients.
    alone = nf.sup_con_loss(x[:30], labels[:30])
    assert float(nf.sup_con_loss(own, given)) > float(alone)
    _, grad = nf.value_and_grad(nf.sup_con_loss)(own, given)
    assert np.all(np.linalg.norm(np.asarray(grad)[30:], axis=1) > 0)


@dtypes
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_no_positives_at_all(dtype, n, kind):
    x = of_kind(kind, points(n, 4), dtype)
    for which in (
        {"labels": of_kind(kind, np.arange(n))},
        {"positive_mask": of_kind(kind, np.eye(n, dtype=bool))},
        {"positive_mask": of_kind(kind, np.zeros((n, n), bool))},
    ):
        value, (grad, slope) = evaluate(nf.sup_con_loss, ["embeddings", "logit_scale"], embeddings=x,
                                        logit_scale=of_kind(kind, np.array(3.0)) if kind == "torch" else 3.0, **which)  # fmt: skip
        assert value == 0
        assert slope == 0
        assert np.array_equal(np.asarray(grad), np.zeros((n, 4)))
        assert not np.any(np.asarray(nf.sup_con_loss(x, reduction="none", **which)))


def test_one_class():
    """No negatives: the positives are told from each other only."""
    x = points(50, 6)
    compare(nf.sup_con_loss, ["embeddings"], embeddings=x, labels=np.zeros(50, int), temperature=0.2)
    same = np.ones((50, 6))
    assert nf.sup_con_loss(same, np.zeros(50, int)) == pytest.approx(math.log(49), rel=1e-12)
    assert nf.sup_con_loss(same[:2], np.zeros(2, int)) == 0


# ---- the mask is the user's ------------------------------------------------------------------------------------------


def test_mask_of_any_memory(kind):
    n = 75
    mask, x = sparse_mask(n), points(n, 5)
    expected = evaluate(nf.sup_con_loss, SCALARS, embeddings=x, positive_mask=mask, logit_scale=4.0)
    wide = np.zeros((2 * n, 3 * n), bool)
    wide[::2, 1::3] = mask
    readonly = mask.copy()
    readonly.flags.writeable = False
    given = [np.asfortranarray(mask), wide[::2, 1::3], mask[::-1, ::-1].copy()[::-1, ::-1], readonly]
    if kind == "torch":
        given = [torch.from_numpy(mask), torch.from_numpy(mask.T.copy()).T, torch.from_numpy(wide)[::2, 1::3]]
    points_given = of_kind(kind, x)
    for own in given:
        before = np.asarray(own).copy()
        actual = evaluate(nf.sup_con_loss, ["embeddings"], embeddings=points_given, positive_mask=own, logit_scale=4.0)
        assert float(actual[0]) == float(expected[0])
        assert np.array_equal(np.asarray(actual[1][0]), expected[1][0])
        assert np.array_equal(np.asarray(own), before)
    one = np.broadcast_to(rng(0).random(n) < 0.2, (n, n))  # the same row for all, in n bytes
    compare(nf.sup_con_loss, ["embeddings"], embeddings=x, positive_mask=one, temperature=0.5)


def test_diagonal_of_the_mask_does_not_matter():
    x, mask = points(60, 5), sparse_mask(60)
    with_diagonal, without = mask.copy(), mask.copy()
    np.fill_diagonal(with_diagonal, True)
    np.fill_diagonal(without, False)
    results = [
        evaluate(nf.sup_con_loss, SCALARS, embeddings=x, positive_mask=m, logit_scale=4.0)
        for m in (mask, with_diagonal, without)
    ]
    for value, grads in results[1:]:
        assert value == results[0][0]
        assert np.array_equal(grads[0], results[0][1][0])


def test_mask_is_not_symmetrised():
    x, mask = points(60, 5), sparse_mask(60)
    rows = nf.sup_con_loss(x, positive_mask=mask, reduction="none")
    other = nf.sup_con_loss(x, positive_mask=mask.T, reduction="none")
    union = nf.sup_con_loss(x, positive_mask=mask | mask.T, reduction="none")
    assert np.abs(rows - other).max() > 0.1
    assert np.abs(rows - union).max() > 0.1


# ---- dtypes, layouts, extremes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_as_if_converted(dtype):
    labels = torch.from_numpy(labels_of(130, 12))
    x = of_kind("torch", points(130, 33), dtype)
    value, (grad,) = evaluate(nf.sup_con_loss, ["embeddings"], embeddings=x, labels=labels)
    wide, (wide_grad,) = evaluate(nf.sup_con_loss, ["embeddings"], embeddings=x.float(), labels=labels)
    assert value.dtype == torch.float32
    assert value == wide
    assert torch.equal(grad, wide_grad.to(x.dtype))
    compare(nf.sup_con_loss, ["embeddings"], dtype, embeddings=x, labels=labels)


@pytest.mark.parametrize("layout", ["fortran", "strided", "negative rows", "negative columns", "read-only"])
def test_layouts(layout):
    x, labels = points(50, 21), labels_of(50, 7)
    expected = evaluate(nf.sup_con_loss, SCALARS, embeddings=x, labels=labels, logit_scale=5.0)
    actual = evaluate(nf.sup_con_loss, SCALARS, embeddings=layouts(x)[layout], labels=labels, logit_scale=5.0)
    assert actual[0] == expected[0]
    assert np.array_equal(actual[1][0], expected[1][0])
    views = x.reshape(10, 5, 21)
    expected = nf.sup_con_loss(views, labels[:10])
    assert nf.sup_con_loss(layouts(views)[layout], labels[:10]) == expected


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint64", "int64"])
def test_labels_of_any_integer_type(dtype, kind):
    x, labels = points(50, 5), np.arange(50) % 7
    if kind == "torch" and dtype == "uint64":
        pytest.skip("torch computes little on uint64")
    value = nf.sup_con_loss(of_kind(kind, x), of_kind(kind, labels.astype(dtype)))
    assert float(value) == nf.sup_con_loss(x, labels)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tau", [0.001, 0.01, 100.0])
def test_temperatures(dtype, tau):
    """Finite and right where the authors' code gives NaN: its maximum is the score of a row with itself."""
    labels = torch.from_numpy(labels_of(150, 12))
    x = of_kind("torch", clustered(150, 128, labels.numpy()), dtype)
    for which in ({"labels": labels}, {"positive_mask": torch.from_numpy(sparse_mask(150))}):
        arguments = dict(embeddings=x, logit_scale=torch.tensor(1 / tau, dtype=torch.float64), **which)
        value, (grad, slope) = evaluate(nf.sup_con_loss, SCALARS, **arguments)
        expected, (expected_grad, expected_slope) = reference(nf.sup_con_loss, SCALARS, **arguments)
        assert_value(value, expected, VALUE[dtype])
        # A score of 1000 is known to 1000 steps of the computing type, and so is the logarithm of its weight.
        step = 2.0**-53 if dtype == "float64" else 2.0**-24
        allowed = max(GRADIENT[dtype], step / tau)
        assert_gradient(grad, expected_grad, allowed, STEP[dtype])
        assert_gradient(slope, expected_slope, allowed)


@dtypes
def test_zero_rows(dtype):
    labels = labels_of(50, 7)
    x = points(50, 7, dtype)
    x[[3, 8, 9]] = 0
    compare(nf.sup_con_loss, SCALARS, dtype, embeddings=x, labels=labels, logit_scale=3.0)
    _, (grad,) = evaluate(nf.sup_con_loss, ["embeddings"], embeddings=x, labels=labels)
    assert np.all(grad[[3, 8, 9]] == 0)


def test_bad_row():
    """A bad row is in every denominator: nothing is hidden. Where it is the upstream's business, rows keep apart."""
    labels, x = labels_of(40, 5), points(40, 9)
    x[7, 2] = np.nan
    assert np.all(np.isnan(nf.sup_con_loss(x, labels, reduction="none")))
    assert np.isnan(nf.sup_con_loss(x, labels))


# ---- how it is computed must not show --------------------------------------------------------------------------------


@dtypes
def test_bitwise_for_any_number_of_threads(dtype, threads):
    labels = labels_of(531, 40)
    x = points(531, 70, dtype)
    for which in ({"labels": labels}, {"labels": labels // 30}, {"positive_mask": sparse_mask(531)}):
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            value, grads = evaluate(nf.sup_con_loss, SCALARS, embeddings=x, logit_scale=9.0, **which)
            results.append((value, *grads))
            assert nf.sup_con_loss(x, logit_scale=9.0, **which) == value
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_permutation():
    labels, x = labels_of(61, 9), points(61, 8)
    order = rng(4).permutation(61)
    rows = nf.sup_con_loss(x, labels, reduction="none")
    assert_value(nf.sup_con_loss(x[order], labels[order], reduction="none"), rows[order], 1e-12)
    mask = sparse_mask(61)
    rows = nf.sup_con_loss(x, positive_mask=mask, reduction="none")
    permuted = nf.sup_con_loss(x[order], positive_mask=mask[order][:, order], reduction="none")
    assert_value(permuted, rows[order], 1e-12)


def test_memory_is_linear():
    """N = 8192, D = 128, value and gradient, 4 MiB itself: under 40 MiB, where one matrix of pairs has 256."""
    code = """
        import resource
        import numpy as np
        import nearfar as nf

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        generator = np.random.default_rng(0)
        x, labels = generator.standard_normal((8192, 128), np.float32), np.arange(8192) % 100
        step = nf.value_and_grad(nf.sup_con_loss)
        step(x[:256], labels[:256])
        before = peak()
        step(x, labels)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 40


# ---- bad input -------------------------------------------------------------------------------------------------------

X, LABELS = points(6, 4), np.arange(6) % 2


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "labels: needed for embeddings of shape (6, 4)", (X,)),
        (TypeError, "labels: expected an integer dtype, got float64", (X, LABELS.astype(float))),
        (TypeError, "labels: expected an integer dtype, got bool", (X, LABELS > 0)),
        (ValueError, "labels: expected shape (6,) to match embeddings, got (5,)", (X, LABELS[:5])),
        (ValueError, "labels: expected shape (6,) to match embeddings, got (6, 1)", (X, LABELS[:, None])),
        (TypeError, "labels: expected a NumPy, PyTorch or CuPy array, got list", (X, list(LABELS))),
        (TypeError, "labels: expected a numpy array to match embeddings, got torch", (X, torch.from_numpy(LABELS))),
        (ValueError, "embeddings: expected shape (n, d), got (4,)", (X[0], LABELS[:4])),
        (ValueError, "embeddings: expected shape (n, d), got (1, 1, 6, 4)", (X[None, None], LABELS[:1])),
        (ValueError, "embeddings: expected views and columns, got shape (6, 0, 4)", (X[:, None][:, :0],)),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error) as caught:
        nf.sup_con_loss(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("error", "message", "mask"),
    [
        (TypeError, "positive_mask: expected dtype bool, got uint8", np.eye(6, dtype=np.uint8)),
        (ValueError, "positive_mask: expected shape (6, 6) to match embeddings, got (6, 5)", np.zeros((6, 5), bool)),
        (TypeError, "positive_mask: expected a NumPy, PyTorch or CuPy array, got list", [[True]]),
        (TypeError, "positive_mask: expected a numpy array to match embeddings, got torch", torch.zeros(6, 6).bool()),
        (TypeError, "positive_mask: expected a plain array, got a masked one", np.ma.masked_array(np.eye(6) > 0)),
    ],
)
def test_bad_mask(error, message, mask):
    with pytest.raises(error) as caught:
        nf.sup_con_loss(X, positive_mask=mask)
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"^positive_mask: give labels or positive_mask, not both"):
        nf.sup_con_loss(X, LABELS, positive_mask=np.eye(6) > 0)


# ---- N-pairs ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", [0, 1, 2, 33, 129, 253])
@pytest.mark.parametrize("l2_reg", [0.0, 0.3])
def test_n_pairs(dtype, n, l2_reg):
    x, y = (a / 4 for a in pairs(n, 11, dtype))
    arguments = dict(anchor=x, positive=y, l2_reg=l2_reg)
    compare(nf.n_pairs_loss, ["anchor", "positive"], dtype, **arguments, floor=1.0 if n == 1 else 0.0)
    own = {"anchor": of_kind("torch", x), "positive": of_kind("torch", y), "l2_reg": l2_reg}
    for reduction in ("sum", "none"):
        weights = of_kind("torch", rng(2).standard_normal(n), dtype) if reduction == "none" else None
        floor = 1.0 if n == 1 else 0.0
        compare(
            nf.n_pairs_loss, ["anchor", "positive"], dtype, weights=weights, reduction=reduction, **own, floor=floor
        )


def test_n_pairs_is_logistic_for_two():
    """E17: with two pairs, softplus of the difference of two dot products; not normalised."""
    x, y = points(2, 5), points(2, 5, seed=1)
    s = x @ y.T
    expected = np.logaddexp(0, [s[0, 1] - s[0, 0], s[1, 0] - s[1, 1]])
    assert_value(nf.n_pairs_loss(x, y, reduction="none"), expected, 1e-12)
    assert nf.n_pairs_loss(x, y) != nf.n_pairs_loss(3 * x, y)


def test_n_pairs_equals_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, regularizers

    x, y = (torch.from_numpy(a).requires_grad_() for a in pairs(12, 5))
    for weight in (0.0, 0.02):
        penalty = regularizers.LpRegularizer(p=2, power=2)
        plain = distances.DotProductSimilarity(normalize_embeddings=False)  # not their default, but the paper's
        theirs = losses.NPairsLoss(distance=plain, embedding_regularizer=penalty, embedding_reg_weight=weight)
        chosen = torch.arange(12), torch.arange(12, 24), torch.arange(0), torch.arange(0)  # else pairs are drawn
        expected = theirs(torch.cat([x, y]), torch.arange(12).repeat(2), chosen)
        ours = nf.n_pairs_loss(x, y, l2_reg=weight)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)  # their constants are in float32
        for own, other in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
            assert_gradient(own, other.numpy(), 1e-6)


@pytest.mark.parametrize("l2_reg", [-1.0, math.nan, math.inf])
def test_n_pairs_bad_penalty(l2_reg):
    with pytest.raises(ValueError, match=r"^l2_reg: expected a non-negative number"):
        nf.n_pairs_loss(X, X, l2_reg=l2_reg)
