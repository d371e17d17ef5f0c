"""`cdist` and `pdist` against their definitions."""

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from generators import DEPTHS, GRADIENT, STEP, assert_gradient, layouts, numpy_of, of_kind, points, rng
from references import (
    KINDS,
    METRICS,
    assert_distances,
    clusters,
    distances,
    integers,
    same_bits,
    squares,
    torch_distances,
    wide,
)

import nearfar as nf

SHAPES = [
    (0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (2, 3), (11, 13), (12, 12), (13, 11), (31, 33), (33, 31), (32, 32),
    (47, 49), (49, 47), (48, 48), (127, 129), (129, 127), (239, 241), (241, 239), (240, 240), (251, 253), (253, 251),
]  # fmt: skip


def condensed(matrix):
    """Entries i < j in SciPy's order."""
    i, j = np.triu_indices(matrix.shape[-1], 1)
    return matrix[..., i, j]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_depths(kind, dtype, metric):
    for d in DEPTHS:
        x, y = (of_kind(kind, points(n, d), dtype) for n in (13, 37))
        result = nf.cdist(x, y, metric)
        assert type(result) is type(x)
        assert str(result.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
        assert_distances(result, x, y, metric)
        assert_distances(nf.cdist(x, None, metric), x, None, metric)


@pytest.mark.isa
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("few", [1, 2, 3, 7, 8, 9, 12])
def test_fewest_rows(few, kind, dtype):
    """They meet the others' rows where these lie."""
    for d in (1, 2, 8, 20, 64):
        x, y = of_kind(kind, points(few, d), dtype), of_kind(kind, points(69, d, seed=1), dtype)
        for metric in METRICS:
            assert_distances(nf.cdist(x, y, metric), x, y, metric)
        assert_distances(nf.cdist(y, x), y, x, "euclidean")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_layouts_beside_few_rows(metric, dtype):
    for few, d in ((1, 3), (2, 16), (3, 20), (9, 64)):
        x, y = points(few, d, dtype), points(69, d, dtype, seed=1)
        expected = nf.cdist(x, y, metric)
        for layout in layouts(y).values():
            assert same_bits(nf.cdist(x, layout, metric), expected)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("few", [1, 3, 15, 48])
def test_few_rows_or_columns(few, dtype):
    """They are the tiles, the others the lanes, and of these no copy is kept."""
    for d in (3, 20):
        x, y = points(few, d, dtype), points(2100, d, dtype, seed=1)
        for metric in METRICS:
            assert_distances(nf.cdist(x, y, metric), x, y, metric)
            assert_distances(nf.cdist(y, x, metric), y, x, metric)
        leaves, doubles = ([torch.from_numpy(a.astype(t)).requires_grad_() for a in (x, y)] for t in (dtype, "float64"))
        weights = torch.from_numpy(rng(few).standard_normal((2100, few)))
        expected = torch.autograd.grad((torch_distances(*doubles[::-1], "euclidean") * weights).sum(), doubles)
        for own in (nf.cdist(*leaves[::-1]), nf.cdist(*leaves).T):
            for actual, wanted in zip(torch.autograd.grad((own * weights).sum(), leaves), expected, strict=True):
                assert_gradient(actual, wanted, GRADIENT[dtype], STEP[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d", [3, 16, 17, 20])
def test_shapes(shape, d):
    n, m = shape
    for dtype in ("float32", "float64"):
        x, y = points(n, d, dtype), points(m, d, dtype, seed=1)
        for metric in METRICS:
            assert_distances(nf.cdist(x, y, metric), x, y, metric)
            square = nf.cdist(x, metric=metric)
            assert_distances(square, x, None, metric)
            assert same_bits(nf.pdist(x, metric), condensed(square))


@pytest.mark.isa
@pytest.mark.parametrize(("n", "m"), [(1472, 1472), (1471, 1473), (1489, 1488), (15, 180000)])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_large_results(n, m, metric):
    """Beyond 8 MB and with aligned rows, results pass the caches by."""
    x, y = points(n, 7, "float32"), points(m, 7, "float32", seed=1)
    some = rng(n).integers(0, n, 40)
    result = nf.cdist(x, y, metric)
    assert_distances(result[some], x[some], y, metric)
    assert same_bits(np.ascontiguousarray(result[:, :1000]), nf.cdist(x, y[:1000], metric))
    offset = np.empty(n * m + 1, np.float32)[1:].reshape(n, m)
    assert same_bits(nf.cdist(x, y, metric, out=offset), result)
    if n < 1000:
        return
    square = nf.cdist(x, metric=metric)
    assert same_bits(square, np.ascontiguousarray(square.T))
    assert_distances(square[:40, :40], x[:40], None, metric)
    assert_distances(square[some], x[some], x, metric) if metric == "sqeuclidean" else None
    assert same_bits(nf.pdist(x, metric), condensed(square))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [5, 40])
def test_batches(kind, dtype, metric, d):
    generator = rng(d)
    make = lambda *shape: of_kind(kind, generator.standard_normal((*shape, d)), dtype)  # noqa: E731
    for left, right in [((4, 7), (4, 9)), ((2, 1, 7), (3, 9)), ((7,), (2, 3, 9)), ((2, 3, 7), (9,)), ((0, 7), (9,))]:
        x, y = make(*left), make(*right)
        assert_distances(nf.cdist(x, y, metric), x, y, metric)
        assert_distances(nf.cdist(x, metric=metric), x, None, metric)
        assert same_bits(nf.pdist(x, metric), condensed(nf.cdist(x, metric=metric)))
    # A batch of many small problems, where threads share out the batch.
    x, y = make(150, 3), make(150, 4)
    assert_distances(nf.cdist(x, y, metric), x, y, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [6, 33])
def test_layouts(metric, d):
    for dtype in ("float16", "float32", "float64"):
        x, y = points(34, d, dtype), points(50, d, dtype, seed=1)
        expected = nf.cdist(x, y, metric)
        for name, left in layouts(x).items():
            for right in layouts(y).values():
                assert same_bits(nf.cdist(left, right, metric), expected), name
            assert same_bits(nf.pdist(left, metric), nf.pdist(x, metric)), name


@pytest.mark.parametrize("metric", METRICS)
def test_torch_layouts(metric):
    x, y = torch.from_numpy(points(34, 20, "float32")), torch.from_numpy(points(50, 20, "float32", seed=1))
    expected = nf.cdist(x, y, metric)
    wide_x = torch.full((68, 60), torch.nan)
    wide_x[::2, 1::3] = x
    for own in (x.T.contiguous().T, wide_x[::2, 1::3], torch.stack([x, x])[1]):
        assert same_bits(nf.cdist(own, y, metric), expected)
    assert same_bits(nf.cdist(x.bfloat16().T.contiguous().T, None, metric), nf.cdist(x.bfloat16(), None, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_strides(metric):
    row, column = points(1, 20, "float32"), points(30, 1, "float32")
    for x in (np.broadcast_to(row, (30, 20)), np.broadcast_to(column, (30, 20))):
        y = points(14, 20, "float32")
        assert same_bits(nf.cdist(x, y, metric), nf.cdist(x.copy(), y, metric))
        assert same_bits(nf.cdist(y, x, metric), nf.cdist(y, x.copy(), metric))
        assert same_bits(nf.cdist(torch.from_numpy(row).expand(30, 20), metric=metric).numpy(),
                         nf.cdist(np.repeat(row, 30, 0), metric=metric))  # fmt: skip


def test_negated_and_conjugated_views():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    z = torch.complex(x, x).conj()
    assert z.imag.is_neg()
    assert same_bits(nf.cdist(z.imag), nf.cdist(z.imag.resolve_neg()))


def test_memory_that_cannot_be_read():
    x = points(5, 4, "float32")
    misaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    for bad, error, message in (
        (x.astype(x.dtype.newbyteorder()), TypeError, "expected native byte order"),
        (misaligned, ValueError, "expected aligned float32"),
        (np.ma.masked_array(x, x > 0), TypeError, "expected a plain array"),
    ):
        with pytest.raises(error, match=f"^x: {message}"):
            nf.cdist(bad, x)
        with pytest.raises(error, match=f"^y: {message}"):
            nf.cdist(x, bad)
        with pytest.raises(error, match=f"^x: {message}"):
            nf.pdist(bad)


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_out(kind, dtype):
    for shape in [(9, 20), (2, 3, 9, 20)]:
        x = of_kind(kind, rng(1).standard_normal(shape), dtype)
        expected = nf.cdist(x)
        out = of_kind(kind, np.full(expected.shape, np.nan), "float64" if dtype == "float64" else "float32")
        assert nf.cdist(x, out=out) is out
        assert same_bits(out, expected)
        assert nf.cdist(x, of_kind(kind, numpy_of(x), dtype), "sqeuclidean", out=out) is out
        assert_distances(out, x, None, "sqeuclidean")


def test_out_that_does_not_fit():
    x = points(4, 3, "float32")
    cases = [
        (np.empty((4, 5), np.float32), ValueError, r"out: expected shape \(4, 4\), got \(4, 5\)"),
        (np.empty((4, 4)), TypeError, "out: expected dtype float32, got float64"),
        (np.empty((4, 4), np.float32, "F"), ValueError, "out: expected a C-contiguous array"),
        (torch.empty(4, 4), TypeError, "out: expected a numpy array, got torch"),
        ([[0.0] * 4] * 4, TypeError, "out: expected a NumPy, PyTorch or CuPy array, got list"),
    ]
    for out, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            nf.cdist(x, out=out)
    readonly = np.empty((4, 4), np.float32)
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        nf.cdist(x, out=readonly)
    t = torch.from_numpy(x).requires_grad_()
    with pytest.raises(ValueError, match=r"^out: not for inputs that require a gradient"):
        nf.cdist(t, out=torch.empty(4, 4))
    expected = nf.cdist(t.detach(), out=torch.empty(4, 4))
    with torch.no_grad():
        assert same_bits(nf.cdist(t, out=torch.empty(4, 4)), expected)


def test_out_that_requires_a_gradient():
    with pytest.raises(ValueError, match=r"^out: "):
        nf.cdist(torch.randn(4, 3), out=torch.empty(4, 4, requires_grad=True))


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 16, 17, 128, 300])
def test_symmetric_and_zero_diagonal(metric, d):
    for dtype in ("float16", "float32", "float64"):
        for x in (points(131, d, dtype), (points(131, d) * 1e-2 + 50).astype(dtype), clusters(131, d).astype(dtype)):
            result = nf.cdist(x, metric=metric)
            assert same_bits(result, np.ascontiguousarray(result.T))
            if metric != "dot":
                assert not np.any(np.diagonal(result))
                assert np.all(result >= 0)
            # The same array given twice is the same question; a copy has the same answers up to rounding.
            assert same_bits(nf.cdist(x, x, metric), result)
            copied = nf.cdist(x, x.copy(), metric)
            if metric != "dot":
                assert np.all(copied >= 0)
            if metric in ("euclidean", "sqeuclidean"):
                assert not np.any(np.diagonal(copied))


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 16, 17, 64])
def test_integers_are_exact(d):
    for dtype in ("float16", "float32", "float64"):
        x, y = integers(77, d).astype(dtype), integers(101, d, seed=1).astype(dtype)
        for metric in ("sqeuclidean", "dot"):
            assert np.array_equal(nf.cdist(x, metric=metric), distances(x, None, metric))
        assert np.array_equal(nf.cdist(x, y, "dot"), distances(x, y, "dot"))
        if d <= 16:
            assert np.array_equal(nf.cdist(x, y, "sqeuclidean"), distances(x, y, "sqeuclidean"))


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 16, 17, 128])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_near_points_far_from_the_origin(d, metric):
    """Offset 100, spread 1e-3: torch's expansion returns noise here. Three digits are asked for, all are there."""
    x, y = ((100 + 1e-3 * points(n, d)).astype("float32") for n in (150, 170))
    for own, other in ((x, None), (x, y)):
        result, expected = nf.cdist(own, other, metric), distances(own, other, metric)
        positive = expected > 0
        assert np.max(np.abs(result - expected)[positive] / expected[positive]) < 1e-6
        assert not np.any(result[~positive])


@pytest.mark.isa
@pytest.mark.parametrize("d", [16, 17, 128])
def test_tight_clusters_far_apart(d):
    """kernels.md 7.2: the plain expansion has a relative error of 3e-3 at the 99th percentile, differences 2e-7."""
    x = clusters(1500, d).astype("float32")
    expected = squares(wide(x), wide(x))
    i, j = np.triu_indices(len(x), 1)
    error = np.abs(nf.cdist(x, metric="sqeuclidean") - expected)[i, j] / expected[i, j]
    within = expected[i, j] < 1
    assert np.quantile(error, 0.99) < 5e-7
    assert np.quantile(error[within], 0.99) < 5e-7
    assert error.max() < 1e-4


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 17, 128])
def test_centre_far_from_a_cluster(d):
    """Two clusters: the common centre lies in neither, so near pairs must be recomputed."""
    x = points(200, d, "float32") * np.float32(1e-3)
    x[::2] += 1000
    result, expected = nf.cdist(x, metric="sqeuclidean"), distances(x, None, "sqeuclidean")
    positive = expected > 0  # points of the cluster at 1000 can coincide after rounding
    assert np.max(np.abs(result - expected)[positive] / expected[positive]) < 1e-5
    assert not np.any(result[~positive])


@pytest.mark.isa
def test_cosine_of_nearly_parallel_rows():
    for d in (2, 3, 17, 128):
        x = points(60, d)
        for angle in (1e-1, 1e-2, 1e-3):
            y = x + angle * points(60, d, seed=1)
            for dtype, tolerance in (("float32", 2e-3), ("float64", 1e-11)):
                own, other = x.astype(dtype), (y * rng(0).uniform(0.1, 10, (60, 1))).astype(dtype)
                result, expected = (f(own, other, "cosine").diagonal() for f in (nf.cdist, distances))
                kept = expected > angle**2 / 20  # in two dimensions some pairs happen to be far closer than that
                assert kept.sum() > 20
                assert np.max(np.abs(result - expected)[kept] / expected[kept]) < tolerance


def test_zero_rows():
    for kind in ("numpy", "torch"):
        for d in (3, 40):
            x = points(9, d, "float32")
            x[[2, 5]] = 0
            own, other = of_kind(kind, x), of_kind(kind, points(4, d, "float32"))
            for metric in METRICS:
                assert_distances(nf.cdist(own, None, metric), own, None, metric)
                assert_distances(nf.cdist(own, other, metric), own, other, metric)
            cosine = numpy_of(nf.cdist(own, None, "cosine"))
            assert np.array_equal(cosine[2], np.arange(9) != 2)
            assert np.array_equal(
                cosine[2],
                numpy_of(nf.cdist(own[2:3], own.copy() if kind == "numpy" else own.clone(), "cosine"))[0]
                - (np.arange(9) == 2),
            )


def test_torch_issue_42479():
    x, y = torch.tensor([[512695.0]]), torch.tensor([[512804.0]])
    assert nf.cdist(x, y).item() == 109
    assert nf.cdist(x.expand(30, 1), y.expand(30, 1)).eq(109).all()
    assert nf.cdist(x.expand(30, 32), y.expand(30, 32), "sqeuclidean").eq(109**2 * 32).all()


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 16, 17, 128])
def test_magnitudes(d):
    for dtype, scales in (("float32", (1e-15, 1e-8, 1e8, 1e16)), ("float64", (1e-140, 1e-50, 1e50, 1e140))):
        for scale in scales:
            x, y = ((points(n, d) * scale).astype(dtype) for n in (20, 33))
            for metric in ("euclidean", "sqeuclidean"):
                result, expected = nf.cdist(x, y, metric), distances(x, y, metric)
                assert np.max(np.abs(result - expected) / expected) < (1e-5 if dtype == "float32" else 1e-13)
        for scale in (*scales, 1e-30, 1e30):
            x, y = ((points(n, d) * scale).astype(dtype) for n in (20, 33))
            assert_distances(nf.cdist(x, y, "cosine"), x, y, "cosine")


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [3, 17, 128])
def test_bad_rows_touch_only_their_own_results(metric, bad, d):
    for dtype in ("float16", "float32", "float64"):
        x, y = points(53, d, dtype), points(70, d, dtype, seed=1)
        dirty_x, dirty_y = x.copy(), y.copy()
        dirty_x[[0, 31, 40], [0, d // 2, d - 1]] = bad
        dirty_y[[5, 69]] = bad
        good_x, good_y = np.setdiff1d(np.arange(53), [0, 31, 40]), np.setdiff1d(np.arange(70), [5, 69])
        result = nf.cdist(dirty_x, dirty_y, metric)
        assert_distances(result[np.ix_(good_x, good_y)], x[good_x], y[good_y], metric)
        touched = np.ones_like(result, bool)
        touched[np.ix_(good_x, good_y)] = False
        if metric in ("euclidean", "sqeuclidean"):
            assert not np.isfinite(result[touched]).any()
        elif np.isnan(bad):
            assert np.isnan(result[touched]).all()
        square = nf.cdist(dirty_x, metric=metric)
        assert np.isfinite(square[np.ix_(good_x, good_x)]).all()
        if np.isnan(bad):
            assert np.isnan(square[[0, 31, 40]]).all()
            assert np.isnan(square[:, [0, 31, 40]]).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(f, arrays, weights):
    arrays = [a.detach().clone().requires_grad_() for a in arrays]
    return torch.autograd.grad((f(*arrays) * weights).sum(), arrays)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 40, 130])
def test_gradients(metric, dtype, d):
    for n, m in [(1, 1), (13, 37), (61, 50), (140, 33)]:
        x, y = (of_kind("torch", points(size, d, seed=seed), dtype) for seed, size in enumerate((n, m)))
        weights = torch.from_numpy(rng(n, m).standard_normal((n, m)))
        for arrays in ((x, y), (x,)):
            own = weights if len(arrays) == 2 else torch.from_numpy(rng(n).standard_normal((n, n)))
            other = arrays[-1]
            actual = gradients(lambda *a: nf.cdist(a[0], a[1] if len(a) > 1 else None, metric), arrays, own)
            expected = gradients(
                lambda *a: torch_distances(a[0], a[-1], metric), [a.double() for a in arrays], own
            )  # fmt: skip
            assert other.dtype == actual[-1].dtype
            # A cosine in one dimension, or of a row with itself, has slope 0: judge by the weights over the norms.
            least = min(float(z.double().norm(dim=1).min()) for z in arrays)
            floor = float(own.norm()) / least if metric == "cosine" and (d == 1 or own.numel() == 1) else 0.0
            for g, e in zip(actual, expected, strict=True):
                assert_gradient(g, e, GRADIENT[dtype], STEP[dtype], floor)


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_pdist(metric):
    for shape in [(2, 3), (33, 5), (3, 50, 20)]:
        x = torch.from_numpy(rng(*shape).standard_normal(shape)).float()
        i, j = torch.triu_indices(shape[-2], shape[-2], 1)
        weights = torch.from_numpy(rng(1).standard_normal((*shape[:-2], len(i))))
        (actual,) = gradients(lambda a: nf.pdist(a, metric), [x], weights)
        (expected,) = gradients(lambda a: torch_distances(a, a, metric)[..., i, j], [x.double()], weights)  # noqa: B023
        assert_gradient(actual, expected, GRADIENT["float32"])
        for few in (x[..., :1, :], x[..., :0, :], x[:0]):  # no pairs
            leaf = few.clone().requires_grad_()
            nf.pdist(leaf, metric).sum().backward()
            assert leaf.grad.shape == few.shape
            assert not leaf.grad.any()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_batches(metric):
    x, y = (torch.from_numpy(rng(s).standard_normal(shape)).float() for s, shape in ((1, (2, 1, 7, 5)), (2, (3, 9, 5))))
    weights = torch.from_numpy(rng(3).standard_normal((2, 3, 7, 9)))
    actual = gradients(lambda a, b: nf.cdist(a, b, metric), [x, y], weights)
    expected = gradients(lambda a, b: torch_distances(a, b, metric), [x.double(), y.double()], weights)
    for g, e in zip(actual, expected, strict=True):
        assert g.shape == e.shape
        assert_gradient(g, e, GRADIENT["float32"])


@pytest.mark.parametrize("d", [3, 40])
def test_gradient_at_distance_zero_is_zero(d):
    x = torch.from_numpy(points(1, d, "float32")).repeat(20, 1)
    for metric in ("euclidean", "sqeuclidean"):
        for arrays in ([x], [x, x.clone()]):
            for g in gradients(lambda *a: nf.cdist(*a, metric=metric), arrays, 1.0):  # noqa: B023
                assert not g.any()
        (g,) = gradients(lambda a: nf.pdist(a, metric), [x], 1.0)  # noqa: B023
        assert not g.any()
    x = torch.zeros(6, d)
    for metric in METRICS:
        for g in gradients(lambda *a: nf.cdist(*a, metric=metric), [x, x.clone()], 1.0):  # noqa: B023
            assert not g.any()


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("d", [3, 17, 128])
def test_gradients_of_near_points_far_from_the_origin(metric, d):
    x, y = (torch.from_numpy((100 + 1e-3 * points(n, d)).astype("float32")) for n in (90, 70))
    weights = torch.from_numpy(rng(d).standard_normal((90, 70)))
    actual = gradients(lambda a, b: nf.cdist(a, b, metric), [x, y], weights)
    expected = gradients(lambda a, b: torch_distances(a, b, metric), [x.double(), y.double()], weights)
    for g, e in zip(actual, expected, strict=True):
        assert_gradient(g, e, GRADIENT["float32"])


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("d", [3, 17, 128])
def test_gradients_of_tight_clusters(metric, d):
    """Weights on the near pairs only, as a neighbourhood loss has them."""
    x = torch.from_numpy(clusters(150, d).astype("float32"))
    near = torch.from_numpy(distances(x, None, "euclidean") < 1)
    weights = near * torch.from_numpy(rng(d).standard_normal((150, 150)))
    (actual,) = gradients(lambda a: nf.cdist(a, metric=metric), [x], weights)
    (expected,) = gradients(lambda a: torch_distances(a, a, metric), [x.double()], weights)
    assert_gradient(actual, expected, GRADIENT["float32"])


def test_only_what_is_asked_for():
    x, y = torch.randn(5, 3), torch.randn(6, 3)
    assert not nf.cdist(x, y).requires_grad
    y.requires_grad_()
    nf.cdist(x, y).sum().backward()
    assert x.grad is None
    assert y.grad.shape == y.shape
    with torch.no_grad():
        assert not nf.cdist(x, y).requires_grad


# ---- threads, peers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_threads_do_not_change_a_bit(metric, threads):
    for shape in [(257, 5), (301, 40), (4, 130, 20), (40, 9, 20)]:
        x = torch.from_numpy(rng(*shape).standard_normal(shape)).float()
        y = x.flip(-2).clone()
        weights = torch.from_numpy(rng(1).standard_normal((*shape[:-1], shape[-2]))).float()
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append([
                nf.cdist(x, y, metric),
                nf.cdist(x, None, metric),
                nf.pdist(x, metric),
                *gradients(lambda a, b: nf.cdist(a, b, metric), [x, y], weights),
                *gradients(lambda a: nf.cdist(a, None, metric), [x], weights),
            ])  # fmt: skip
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_scipy(metric):
    for d in (3, 50):
        x, y = points(60, d), points(41, d, seed=1)
        np.testing.assert_allclose(
            nf.cdist(x, y, metric), scipy.spatial.distance.cdist(x, y, metric), rtol=1e-12, atol=1e-14
        )
        np.testing.assert_allclose(nf.pdist(x, metric), scipy.spatial.distance.pdist(x, metric), rtol=1e-12, atol=1e-14)
        square = scipy.spatial.distance.squareform(nf.pdist(x, metric))
        assert same_bits(square, nf.cdist(x, metric=metric))


def test_torch_cdist_in_float64():
    x, y = torch.from_numpy(points(30, 20)), torch.from_numpy(points(31, 20, seed=1))
    torch.testing.assert_close(
        nf.cdist(x, y), torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(nf.pdist(x), torch.pdist(x), rtol=1e-12, atol=0)


# ---- bad input -------------------------------------------------------------------------------------------------------

X = points(4, 3, "float32")

NOT_POINTS = [
    ([[1.0, 2.0]], TypeError, "expected a NumPy, PyTorch or CuPy array, got list"),
    (((1.0, 2.0),), TypeError, "expected a NumPy, PyTorch or CuPy array, got tuple"),
    (3.0, TypeError, "expected a NumPy, PyTorch or CuPy array, got float"),
    (X.astype(np.int64), TypeError, "expected a floating dtype .*, got int64"),
    (X.astype(np.complex64), TypeError, "expected a floating dtype .*, got complex64"),
    (X > 0, TypeError, "expected a floating dtype .*, got bool"),
    (X.astype(object), TypeError, "expected a floating dtype .*, got object"),
    (X.astype(np.longdouble), TypeError, "expected a floating dtype .*, got (longdouble|float128)"),
    (X[0], ValueError, r"expected shape \(\.\.\., n, d\), got \(3,\)"),
    (np.float32(1) * X[0, 0].reshape(()), (ValueError, TypeError), "expected"),
    (X[:, :0], ValueError, r"expected at least one column, got shape \(4, 0\)"),
]


@pytest.mark.parametrize(("bad", "error", "message"), NOT_POINTS)
def test_not_points(bad, error, message):
    for f in (nf.cdist, nf.pdist):
        with pytest.raises(error, match=f"^x: {message}"):
            f(bad)
    if isinstance(bad, np.ndarray) and bad.dtype not in (object, np.longdouble):
        with pytest.raises(error, match=f"^x: {message}"):
            nf.cdist(torch.from_numpy(np.array(bad)))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([[1.0, 2.0, 3.0]], TypeError, "expected a NumPy, PyTorch or CuPy array, got list"),
        (torch.zeros(2, 3), TypeError, "expected a numpy array to match x, got torch"),
        (X.astype(np.float64), TypeError, "expected dtype float32 to match x, got float64"),
        (X.astype(np.float16), TypeError, "expected dtype float32 to match x, got float16"),
        (X.astype(np.int32), TypeError, "expected a floating dtype .*, got int32"),
        (X[:, :2], ValueError, r"expected 3 columns to match x, got shape \(4, 2\)"),
        (X[0], ValueError, r"expected shape \(\.\.\., n, d\), got \(3,\)"),
    ],
)
def test_pairs_that_do_not_match(y, error, message):
    with pytest.raises(error, match=f"^y: {message}"):
        nf.cdist(X, y)


def test_batches_that_do_not_match():
    with pytest.raises(ValueError, match=r"^y: expected batch dimensions to match \(2,\), got \(3,\)"):
        nf.cdist(np.zeros((2, 4, 3)), np.zeros((3, 4, 3)))


@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_second_derivative_of_minkowski_near_and_far(scale):
    """Powers of the differences, and more so those of a derivative, leave the range of float32 before distances do."""
    x, y = (torch.from_numpy(points(5, 3, "float32", seed=s)) for s in range(2))
    products = []
    for factor in (1.0, scale):
        own = (factor * x).requires_grad_()
        distance = nf.cdist(own, factor * y, "minkowski", p=3.5) / factor
        (slope,) = torch.autograd.grad(distance.square().sum(), own, create_graph=True)
        products.append(factor * torch.autograd.grad((slope * factor).square().sum(), own)[0])
    assert torch.linalg.norm(products[1] - products[0]) <= 1e-4 * torch.linalg.norm(products[0])


def test_metric():
    for f in (nf.cdist, nf.pdist):
        for metric in ("manhattan", "", "Euclidean", None, 3, ["euclidean"]):
            with pytest.raises((ValueError, TypeError), match=r"^metric: expected one of euclidean, sqeuclidean"):
                f(X, metric=metric)
    with pytest.raises(ValueError, match=r"^p: only for metric='minkowski'"):
        nf.cdist(X, p=1)
    with pytest.raises(ValueError, match=r"^M: only for metric='mahalanobis'"):
        nf.cdist(X, M=np.eye(3))
