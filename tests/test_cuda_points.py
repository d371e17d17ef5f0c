"""Metrics of coordinates and k-means on the CUDA backend, against their definitions in float64 and the CPU path. Where
this runs on, and why it shows what it shows: test_cuda.py.
"""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import test_metrics
import torch
from test_cuda import DEVICE, DTYPES, EMULATED, gpu_only, tensor

import nearfar as nf
from nearfar import _core, backend, clusters

pytestmark = test_cuda.pytestmark
on_device, small_strips = test_cuda.on_device, test_cuda.small_strips

by_metric = pytest.mark.parametrize(("metric", "options"), test_metrics.CASES, ids=test_metrics.IDS)


class OnHost(torch.Tensor):
    """What `Tensor.cpu` gives below."""


@pytest.fixture
def device_memory(monkeypatch):
    """In emulation, tensors refuse what those of a GPU refuse: to become NumPy arrays before they are copied."""
    if not EMULATED:
        return
    array, numpy, cpu = torch.Tensor.__array__, torch.Tensor.numpy, torch.Tensor.cpu

    def refuse(tensor):
        if not isinstance(tensor, OnHost):
            raise TypeError("can't convert a tensor on the device to NumPy: use Tensor.cpu() first")
        return tensor

    monkeypatch.setattr(torch.Tensor, "__array__", lambda self, *args, **kw: array(refuse(self), *args, **kw))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self, **kw: numpy(refuse(self), **kw))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: cpu(self).as_subclass(OnHost))


def same(results, others):
    return all(references.same_bits(a.cpu(), b.cpu()) for a, b in zip(results, others, strict=True))


def assert_repeats(monkeypatch, run):
    """Bit for bit, in emulation also with the threads in another order."""
    plain = run()
    for seed in ("7", "1234567"):
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", seed)
        assert same(plain, run())


# ---- metrics of coordinates ------------------------------------------------------------------------------------------


@by_metric
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (0, 3, 2), (3, 0, 2), (13, 70, 7), (65, 33, 17)])
def test_values(n, m, d, metric, options):
    for dtype in DTYPES:
        x, y = tensor(g.points(n, d), dtype), tensor(g.points(m, d, seed=1), dtype)
        result = nf.cdist(x, y, metric, **options)
        assert result.device == x.device
        assert result.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        test_metrics.assert_close(result, x.cpu(), y.cpu(), metric, **options)
        own = nf.cdist(x, None, metric, **options)
        test_metrics.assert_close(own, x.cpu(), x.cpu(), metric, **options)
        assert torch.equal(own, own.T)
        assert not own.diagonal().any()
        i, j = np.triu_indices(n, 1)
        assert torch.equal(nf.pdist(x, metric, **options), own[i, j])


@pytest.mark.parametrize("metric", ["cityblock", "chebyshev"])
def test_integers_are_exact(metric):
    x, y = tensor(references.integers(40, 20), "float32"), tensor(references.integers(66, 20, seed=1), "float32")
    expected = test_metrics.reference(x.cpu(), y.cpu(), metric)
    np.testing.assert_array_equal(nf.cdist(x, y, metric).cpu(), expected)


@by_metric
def test_batches_layouts_and_out(metric, options):
    x, y = tensor(g.points(2 * 9, 4).reshape(2, 9, 4), "float32"), tensor(g.points(11, 4, seed=1), "float32")
    result = nf.cdist(x, y, metric, **options)
    for b in range(2):
        assert torch.equal(result[b], nf.cdist(x[b], y, metric, **options))
    wide = torch.full((22, 12), torch.nan, dtype=torch.float32, device=DEVICE)
    wide[::2, ::3] = y
    assert torch.equal(nf.cdist(x[0].T.contiguous().T, wide[::2, ::3], metric, **options), result[0])
    out = torch.empty_like(result)
    assert nf.cdist(x, y, metric, out=out, **options) is out
    assert torch.equal(out, result)


@by_metric
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_gradients(metric, options, dtype):
    for n, m, d in ((1, 1, 1), (17, 66, 5)):
        x, y = (tensor(g.points(rows, d, seed=rows), dtype).requires_grad_() for rows in (n, m))
        upstream = tensor(g.rng(n, m).standard_normal((n, m)), "float64" if dtype == "float64" else "float32")
        got = torch.autograd.grad((nf.cdist(x, y, metric, **options) * upstream).sum(), (x, y))
        leaves = [z.detach().cpu().double().requires_grad_() for z in (x, y)]
        value = test_metrics.torch_reference(*leaves, metric, **options)
        expected = torch.autograd.grad((value * upstream.cpu().double()).sum(), leaves)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == x.dtype
            assert a.device == x.device
            g.assert_gradient(a, b, g.GRADIENT[dtype] * (10 if metric == "minkowski" else 1), g.STEP[dtype])


@by_metric
def test_gradients_of_pdist_and_of_one_set(metric, options):
    x = tensor(g.points(37, 6), "float64").requires_grad_()
    i, j = np.triu_indices(37, 1)
    full = torch.from_numpy(g.rng(2).standard_normal((37, 37)))
    leaf = x.detach().cpu().requires_grad_()
    matrix = test_metrics.torch_reference(leaf, leaf, metric, **options)
    (expected,) = torch.autograd.grad((matrix[i, j] * full[i, j]).sum(), leaf, retain_graph=True)
    (got,) = torch.autograd.grad((nf.pdist(x, metric, **options) * full[i, j].to(DEVICE)).sum(), x)
    g.assert_gradient(got, expected, 1e-11)
    (expected,) = torch.autograd.grad((matrix * full).sum(), leaf)
    (got,) = torch.autograd.grad((nf.cdist(x, None, metric, **options) * full.to(DEVICE)).sum(), x)
    g.assert_gradient(got, expected, 1e-11)


@by_metric
def test_second_derivatives(metric, options):
    x, y = (tensor(g.points(n, 3, seed=n), "float64").requires_grad_() for n in (4, 3))
    assert torch.autograd.gradgradcheck(lambda a, b: nf.cdist(a, b, metric, **options), (x, y), atol=1e-4)


@by_metric
def test_bad_rows_touch_only_their_own_results(metric, options):
    x, y = tensor(g.points(20, 5), "float32"), tensor(g.points(50, 5, seed=1), "float32")
    expected = nf.cdist(x, y, metric, **options)
    x[3, 2], y[7, 0] = torch.nan, torch.nan
    a, b = x.requires_grad_(), y.requires_grad_()
    result = nf.cdist(a, b, metric, **options)
    assert result[3].isnan().all()
    assert result[:, 7].isnan().all()
    rows, columns = np.delete(np.arange(20), 3), np.delete(np.arange(50), 7)
    assert torch.equal(result[rows][:, columns], expected[rows][:, columns])
    result.nansum().backward()
    assert a.grad[rows].isfinite().all()
    assert b.grad[columns].isfinite().all()
    distances, index = nf.knn(x.detach(), y.detach(), 50, metric=metric, **options)
    assert (index[3] == -1).all()
    assert not (index == 7).any()
    assert ((index == -1) == distances.isnan()).all()


@by_metric
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (66, 50, 7), (5, 130, 130)])
def test_neighbours(metric, options, n, m, k):
    for dtype in ("bfloat16", "float32", "float64"):
        x, y = tensor(g.points(n, 6), dtype), tensor(g.points(m, 6, seed=1), dtype)
        distances, index = nf.knn(x, y, k, metric=metric, **options)
        exact = test_metrics.reference(x.cpu(), y.cpu(), metric, **options).astype(float)
        tolerance = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(distances.cpu(), np.sort(exact, 1)[:, :k], rtol=tolerance)
        found = np.take_along_axis(exact, index.cpu().numpy(), 1)
        np.testing.assert_allclose(found, np.sort(exact, 1)[:, :k], rtol=tolerance)


@pytest.mark.parametrize("metric", ["cityblock", "chebyshev"])
def test_ties_go_to_the_lower_index(metric, small_strips):
    x = tensor(references.integers(140, 2), "float32")
    _, index = nf.knn(x, k=3, metric=metric)
    exact = test_metrics.reference(x.cpu(), x.cpu(), metric)
    exact[np.arange(140), np.arange(140)] = np.inf
    np.testing.assert_array_equal(index.cpu(), references.nearest(exact, 3)[1])


@by_metric
def test_metrics_repeat_bit_for_bit(metric, options, monkeypatch):
    def run():
        x, y = (tensor(g.points(n, 7, seed=n), "float32").requires_grad_() for n in (70, 66))
        value = nf.cdist(x, y, metric, **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), (x, y)), *nf.knn(x.detach(), None, 3, metric=metric)]

    assert_repeats(monkeypatch, run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_mahalanobis(dtype):
    x, y, matrix = g.points(40, 5), g.points(30, 5, seed=1), test_metrics.spd(5)
    own = [tensor(z, dtype) for z in (x, y)]
    wide = [z.cpu().double().numpy() for z in own]
    difference = wide[0][:, None] - wide[1]
    square = np.einsum("ijk,kl,ijl->ij", difference, matrix, difference)
    compute = "float64" if dtype == "float64" else "float32"
    factor = np.linalg.cholesky(matrix).T
    for given in (tensor(matrix, compute), ("factor", tensor(factor, compute))):
        result = nf.cdist(*own, "mahalanobis", M=given)
        assert result.device == own[0].device
        g.assert_value(result, np.sqrt(square), 1e-10 if dtype == "float64" else 2e-5, 1e-2)
        distances, _ = nf.knn(*own, 3, metric="mahalanobis", M=given)
        g.assert_value(distances, np.sort(np.sqrt(square), 1)[:, :3], 1e-10 if dtype == "float64" else 2e-5, 1e-2)
    leaf = tensor(factor, "float64").requires_grad_()
    distances = nf.cdist(own[0].double(), own[1].double(), "mahalanobis", M=("factor", leaf))
    (grad,) = torch.autograd.grad(distances.sum(), leaf)
    other = leaf.detach().cpu().requires_grad_()
    expected = torch.cdist(*(torch.from_numpy(z) @ other.T for z in wide))
    g.assert_gradient(grad, torch.autograd.grad(expected.sum(), other)[0], 1e-9)


# ---- k-means: the two kernels ----------------------------------------------------------------------------------------


def groups(n, k, d, seed=0):
    """Separated, so that every algorithm agrees on them."""
    centers = 20 * g.rng(seed, 1).standard_normal((k, d))
    return centers[g.rng(seed, 2).integers(k, size=n)] + g.rng(seed, 3).standard_normal((n, d))


def iterate(x, centers, normalize=False, weights=None, labels=None, measure=True, sums=True):
    """One call of the kernel: inertia, changed, labels, distances, sums, counts."""
    n, (k, d) = len(x), centers.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    labels = torch.full((n,), -1, device=DEVICE) if labels is None else labels
    distances = torch.empty(n, dtype=compute, device=DEVICE) if measure else None
    found = (np.empty((k, d)), np.empty(k)) if sums else (None, None)
    centers = np.asarray(centers, str(compute).removeprefix("torch."))
    result = clusters.lloyd(x, centers, normalize, weights, labels, distances, *found)
    return *result, labels, distances, *found


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (67, 3, 5), (300, 66, 2), (131, 7, 40)])
def test_an_iteration(n, k, d, dtype, normalize):
    x, centers = tensor(g.points(n, d), dtype), g.points(k, d, seed=1)
    weights = g.rng(5).uniform(0.5, 2, n)
    own = tensor(weights, "float64" if dtype == "float64" else "float32")
    inertia, changed, labels, distances, sums, counts = iterate(x, centers, normalize, own)
    wide = [
        g.numpy_of(x).astype(float),
        np.asarray(centers, "float64" if dtype == "float64" else "float32").astype(float),
    ]
    points, centers = (references.unit(z) if normalize else z for z in wide)
    square = ((points[:, None] - centers) ** 2).sum(-1)
    found = labels.cpu().numpy()
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(distances.cpu(), square.min(1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(square[np.arange(n), found], square.min(1), rtol=tolerance, atol=tolerance)
    weights = own.cpu().double().numpy()
    np.testing.assert_allclose(inertia, (weights * square.min(1)).sum(), rtol=tolerance, atol=tolerance)
    assert changed == n
    one_hot = np.eye(k)[found] * weights[:, None]
    np.testing.assert_allclose(counts, one_hot.sum(0), rtol=1e-12, atol=1e-12)
    scale = 1e-12 if not normalize or dtype == "float64" else 1e-6  # unit rows are rounded
    np.testing.assert_allclose(sums, one_hot.T @ points, rtol=0, atol=scale * max(1, n / k))


def test_labels_that_stay_and_parts_that_are_not_wanted(small_strips):
    x, centers = tensor(g.points(300, 3), "float32"), g.points(5, 3, seed=1)
    inertia, _, labels, distances, sums, counts = iterate(x, centers)
    before = labels.clone()
    labels[7] = (labels[7] + 1) % 5
    again = iterate(x, centers, labels=labels, measure=False)
    assert again[1] == 1
    assert torch.equal(again[2], before)
    assert again[3] is None
    np.testing.assert_array_equal(again[4], sums)
    only = iterate(x, centers, sums=False)
    assert only[0] == inertia
    assert torch.equal(only[3], distances)
    assert counts.sum() == 300


def test_a_bad_row_is_nobodys(small_strips):
    x, centers = tensor(g.points(40, 3), "float32"), g.points(5, 3, seed=1)
    good = np.delete(np.arange(40), [4, 9])
    x[4, 1], x[9, 0] = torch.nan, torch.inf
    inertia, _, labels, distances, sums, counts = iterate(x, centers)
    assert np.isnan(inertia)
    assert labels[[4, 9]].tolist() == [-1, -1]
    assert distances[[4, 9]].isnan().all()
    expected = iterate(x[good], centers)
    assert torch.equal(labels[good], expected[2])
    np.testing.assert_array_equal(counts, expected[5])
    np.testing.assert_allclose(sums, expected[4], atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "d", "dtype"), [(1, 1, 2, "float32"), (40, 40, 3, "float64"), (2100, 5, 3, "float32")]
)
def test_seeding_draws_what_the_cpu_draws(n, k, d, dtype, weighted, normalize, monkeypatch):
    x = tensor(groups(n, max(1, k // 2), d), dtype)
    weights = g.rng(4).uniform(0.1, 2, n).astype(dtype) if weighted else None
    uniforms = g.rng(3).uniform(size=(k - 1, 3))
    there = None if weights is None else tensor(weights, dtype)
    chosen = clusters.seeding(x, normalize, there, n // 2, uniforms)
    monkeypatch.setattr(backend, "emulate", False)
    np.testing.assert_array_equal(chosen, clusters.seeding(x.cpu(), normalize, weights, n // 2, uniforms))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_k_means_repeats_bit_for_bit(dtype, monkeypatch):
    x = tensor(g.points(600, 5), dtype)

    def run():
        chosen = clusters.seeding(x, False, None, 3, g.rng(3).uniform(size=(3, 3)))
        inertia, _, labels, distances, sums, counts = iterate(x, g.points(4, 5, seed=1))
        return [labels, distances, *(torch.as_tensor(z) for z in (chosen, inertia, sums, counts))]

    assert_repeats(monkeypatch, run)


def test_duplicates_are_drawn_last():
    x = tensor(np.repeat(g.points(4, 3), 10, 0), "float32")
    chosen = clusters.seeding(x, False, None, 0, g.rng(0).uniform(size=(3, 4)))
    assert sorted(chosen // 10) == [0, 1, 2, 3]
    same_rows = clusters.seeding(torch.zeros_like(x), False, None, 5, g.rng(0).uniform(size=(3, 4)))
    assert same_rows[0] == 5


def test_bad_arguments_of_the_kernels():
    launch = backend.kernel(torch.ones(4, 2, device=DEVICE), "seeding")
    x, chosen = torch.ones(4, 2, device=DEVICE), torch.empty(2, dtype=torch.int64, device=DEVICE)
    uniforms = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="^first: expected a row of x"):
        launch(x, False, None, 4, uniforms, chosen)
    with pytest.raises(ValueError, match="^uniforms: expected at least one column"):
        launch(x, False, None, 0, uniforms[:, :0], chosen)
    with pytest.raises(ValueError, match=r"^chosen: expected shape \(2,\)"):
        launch(x, False, None, 0, uniforms, chosen[:1])
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for centers, message in ((np.ones((0, 2)), "at least one row"), (np.ones((2, 3)), r"shape \(2, 2\)")):
        with pytest.raises(ValueError, match=f"^centroids: expected {message}"):
            clusters.lloyd(x, centers.astype("float32"), False, None, labels, None, None, None)


# ---- the estimators --------------------------------------------------------------------------------------------------

copied_only_on_demand = pytest.mark.usefixtures("device_memory")


def on_cpu(monkeypatch, run):
    """The same by the CPU's kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "emulate", False)
        return run()


def assert_same_fit(own, other, tolerance=1e-5):
    for name in ("cluster_centers_", "labels_"):
        array = getattr(own, name)
        assert array.device.type == DEVICE, name
        torch.testing.assert_close(array.cpu(), getattr(other, name), rtol=tolerance, atol=tolerance)
    assert own.n_iter_ == other.n_iter_
    np.testing.assert_allclose(own.inertia_, other.inertia_, rtol=tolerance)


@copied_only_on_demand
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("spherical", [False, True])
def test_k_means_as_on_the_cpu(dtype, spherical, monkeypatch):
    points = torch.from_numpy(groups(150, 4, 3)).to(getattr(torch, dtype))
    weights = g.rng(1).uniform(0.5, 1.5, 150)

    def fit(x):
        return nf.KMeans(4, random_state=0, spherical=spherical).fit(x, sample_weight=weights)

    x, other = points.to(DEVICE), on_cpu(monkeypatch, lambda: fit(points))
    own = fit(x)
    assert_same_fit(own, other)
    fresh = tensor(groups(20, 4, 3, seed=1), dtype)
    for method in ("predict", "transform", "encode", "reconstruct"):
        result = getattr(own, method)(fresh)
        assert result.device.type == DEVICE
        expected = on_cpu(monkeypatch, lambda m=method: getattr(other, m)(fresh.cpu()))
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-4)
    for method in ("score", "reconstruction_error"):
        expected = on_cpu(monkeypatch, lambda m=method: getattr(other, m)(fresh.cpu()))
        np.testing.assert_allclose(getattr(own, method)(fresh), expected, rtol=1e-4)


@copied_only_on_demand
@pytest.mark.parametrize("init", ["random", "array"])
def test_other_starts(init, monkeypatch):
    points = torch.from_numpy(groups(90, 3, 2))
    start = points[:3] if init == "array" else init
    other = on_cpu(monkeypatch, lambda: nf.KMeans(3, init=start, n_init=1, random_state=1).fit(points))
    start = start.to(DEVICE) if init == "array" else start
    assert_same_fit(nf.KMeans(3, init=start, n_init=1, random_state=1).fit(points.to(DEVICE)), other, 1e-10)


@copied_only_on_demand
def test_empty_clusters_take_the_farthest_rows(monkeypatch):
    points = torch.from_numpy(groups(60, 4, 2))
    start = torch.full((4, 2), 1e3, dtype=torch.float64)
    start[0] = 0
    weights = np.ones(60)
    fit = lambda x: nf.KMeans(4, init=start, max_iter=3).fit(x, sample_weight=weights)  # noqa: E731
    other = on_cpu(monkeypatch, lambda: fit(points))
    own = fit(points.to(DEVICE))
    assert_same_fit(own, other, 1e-10)
    assert len(own.labels_.unique()) == 4


@copied_only_on_demand
def test_mini_batches_as_on_the_cpu(monkeypatch):
    points = torch.from_numpy(groups(200, 3, 2)).float()

    def fit(x):
        model = nf.MiniBatchKMeans(3, random_state=0, batch_size=60, max_iter=4, init_size=90)
        return model.fit(x)

    assert_same_fit(fit(points.to(DEVICE)), on_cpu(monkeypatch, lambda: fit(points)), 1e-4)

    def partial(x):
        model = nf.MiniBatchKMeans(3, random_state=0)
        for part in x.split(70):
            model.partial_fit(part)
        return model

    own, other = partial(points.to(DEVICE)), on_cpu(monkeypatch, lambda: partial(points))
    assert_same_fit(own, other, 1e-4)
    assert own.predict(points.to(DEVICE)).device.type == DEVICE


@copied_only_on_demand
def test_bad_input_is_refused_as_on_the_cpu():
    x = tensor(g.points(20, 3), "float32")
    model = nf.KMeans(2, random_state=0).fit(x)
    with pytest.raises(ValueError, match="^codes: expected 0 to 1, got -1 to 0"):
        model.decode(torch.tensor([0, -1], device=DEVICE))
    with pytest.raises(TypeError, match="^codes: expected integers, got float32"):
        model.decode(torch.zeros(2, device=DEVICE))
    x[4, 1] = torch.nan
    for method in (nf.KMeans(2).fit, nf.MiniBatchKMeans(2).fit, nf.MiniBatchKMeans(2).partial_fit, model.predict):
        with pytest.raises(ValueError, match="^X: expected finite numbers, got NaN or inf in row 4"):
            method(x)
    with pytest.raises(ValueError, match="^X: expected finite numbers, got NaN or inf in row 4"):
        model.transform(x)
    x[4, 1] = 1e30
    with pytest.raises(ValueError, match="^X: row 4 is so large that its squared distances overflow float32"):
        nf.KMeans(2).fit(x)


def test_the_kernels_are_in_the_build():
    assert {"lloyd", "seeding"} <= set(dir(_core.cuda))


# ---- what only a GPU shows -------------------------------------------------------------------------------------------


@gpu_only
def test_weights_and_starts_may_lie_on_the_cpu():
    points = groups(90, 3, 2)
    x, weights = tensor(points, "float32"), g.rng(0).uniform(1, 2, 90)
    models = [
        nf.KMeans(3, init=start, random_state=0).fit(x, sample_weight=w)
        for start, w in ((x[:3], tensor(weights, "float32")), (points[:3], weights))
    ]
    torch.testing.assert_close(models[0].cluster_centers_, models[1].cluster_centers_)


@gpu_only
@by_metric
def test_metrics_do_not_synchronise(metric, options):
    x, y = (tensor(g.points(n, 20), "float32").requires_grad_() for n in (300, 200))
    nf.cdist(x, y, metric, **options).sum().backward()
    with test_cuda.no_synchronisation():
        nf.cdist(x, y, metric, **options).sum().backward()
        nf.knn(x.detach(), y.detach(), 3, metric=metric, **options)


@gpu_only
def test_many_rows():
    n, k, d = 300_000, 300, 32
    x = torch.randn(n, d, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    centers = g.points(k, d, seed=1)
    inertia, changed, labels, distances, sums, counts = iterate(x, centers)
    wide = x.double()
    square = torch.cdist(wide, torch.from_numpy(centers.astype("float32")).to(DEVICE).double()).square()
    assert changed == n
    torch.testing.assert_close(distances.double(), square.amin(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(square.gather(1, labels[:, None])[:, 0], square.amin(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts, labels.bincount(minlength=k).cpu())
    expected = torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, labels, wide)
    np.testing.assert_allclose(sums, expected.cpu(), rtol=1e-9, atol=1e-9)
    assert inertia == pytest.approx(float(distances.double().sum()), rel=1e-9)
    chosen = clusters.seeding(x, False, None, 5, g.rng(0).uniform(size=(19, 4)))
    assert len(set(chosen.tolist())) == 20
