"""The CUDA backend against float64 references on the CPU.

On a machine with a GPU and a build that has CUDA, everything runs on the GPU. In a developer's build of
NEARFAR_CUDA=EMULATE the same kernels run on the CPU, a fiber for every thread: that shows indices, masks, barriers and
fragment layouts to be right, and is no result of a GPU; NEARFAR_EMULATE_ARCHITECTURE=90 emulates a Hopper GPU, else it
is one of sm_80. Elsewhere everything here is skipped.
"""

import contextlib
import os
import warnings

import generators as g
import numpy as np
import pytest
import references
import torch

import nearfar as nf
from nearfar import _core, backend, loss_operations

CUDA = getattr(_core, "cuda", None)
EMULATED = CUDA is not None and CUDA.emulated
ON_GPU = CUDA is not None and not EMULATED and torch.cuda.is_available()
if CUDA is None:
    REASON = "this build has no CUDA part"
else:
    REASON = "no GPU here, and this build does not emulate one"
pytestmark = pytest.mark.skipif(not (ON_GPU or EMULATED), reason=REASON)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU, not an emulated one")

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Around tiles of 64 and 128; depths around steps of 8, 16, 32, the padding of 64 and direct differences up to 16.
SHAPES = [(1, 1), (2, 3), (37, 16), (64, 17), (65, 33), (128, 64), (130, 70)]


@pytest.fixture(autouse=True)
def on_device(monkeypatch, request):
    """The operations of this file go to the CUDA kernels.

    On a GPU a scale that is given as a number reaches them as one. In emulation it would count as on the device, which
    takes another path: only where a test's name says so.
    """
    monkeypatch.setattr(backend, "emulate", EMULATED)
    if EMULATED and "scale" not in request.node.name.partition("[")[0]:
        multiplier = loss_operations._multiplier
        monkeypatch.setattr(loss_operations, "_multiplier", lambda scale, like: multiplier(float(scale), like))


@pytest.fixture
def small_strips(monkeypatch):
    """Blocks of weights as small as they get, so that small shapes take several in both directions."""
    monkeypatch.setattr(backend, "STRIP_BYTES", 1)


@pytest.fixture
def tf32():
    """torch's permission to round float32 operands."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def tensor(array, dtype):
    """A tensor on the device under test."""
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype)).to(DEVICE)


def pair(n, d, dtype, seed=0):
    """Two views on the device."""
    return [tensor(x, dtype) for x in g.pairs(n, d, seed=seed)]


def on_hopper():
    """Whether kernels take what only sm_90a has; an emulation is told to by its environment."""
    if EMULATED:
        return os.environ.get("NEARFAR_EMULATE_ARCHITECTURE") == "90"
    return ON_GPU and torch.cuda.get_device_capability() == (9, 0)


def check(loss, wanted, dtype, **arguments):
    """A loss and its gradients at the contract's tolerances; Hopper rounds weights to the type of 16-bit rows."""
    rounded = {"bfloat16": 2.0**-10, "float16": 2.0**-12}
    tolerance = {"gradient": rounded[dtype]} if dtype in rounded and on_hopper() else {}
    g.compare(loss, wanted, dtype, value_floor=1e-3, floor=1e-3, **tolerance, **arguments)


@contextlib.contextmanager
def no_synchronisation():
    """Whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_replays(run, change):
    """A captured graph of `run`, replayed after `change` has been made to its inputs, has the bits of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        change()
    graph.replay()
    for one, other in zip(captured, run(), strict=True):
        assert torch.equal(one, other)


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_info_nce(n, d, dtype):
    query, key = pair(n, d, dtype)
    check(nf.info_nce_loss, ["query", "positive_key"], dtype, query=query, positive_key=key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_clip(n, d, dtype):
    image, text = pair(n, d, dtype)
    check(nf.clip_loss, ["image_features", "text_features"], dtype, image_features=image, text_features=text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_nt_xent(n, d, dtype):
    z1, z2 = pair(n, d, dtype)
    check(nf.nt_xent_loss, ["z1", "z2"], dtype, z1=z1, z2=z2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_negative_keys(own, in_batch, dtype):
    n, d = 45, 20
    query, key = pair(n, d, dtype)
    negatives = tensor(g.points(n * 3, d, seed=5).reshape((n, 3, d) if own else (n * 3, d)), dtype)
    wanted = ["query", "positive_key", "negative_keys"]
    check(nf.info_nce_loss, wanted, dtype, query=query, positive_key=key, negative_keys=negatives, in_batch=in_batch)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ids_leave_duplicates_out(symmetric):
    query, key = pair(67, 20, "float32")
    ids = torch.from_numpy(np.random.default_rng(0).integers(-(2**40), 2**40, 9)[np.arange(67) % 9]).to(DEVICE)
    wanted = ["query", "positive_key"]
    check(nf.info_nce_loss, wanted, "float32", query=query, positive_key=key, ids=ids, symmetric=symmetric)


@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_blocks_of_weights(loss, dtype, small_strips):
    x, y = pair(300, 40, dtype)
    names = list(g.inspect.signature(loss).parameters)[:2]
    check(loss, names, dtype, **dict(zip(names, (x, y), strict=True)))


def test_learnable_scale_stays_on_the_device():
    query, key = pair(50, 20, "float64")
    scale = torch.tensor(12.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    nf.clip_loss(query, key, scale).backward()
    (expected,) = g.reference(nf.clip_loss, ["logit_scale"], image_features=query, text_features=key, logit_scale=12.0)[
        1
    ]
    assert scale.grad.device == scale.device
    g.assert_value(scale.grad, expected, 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_info_nce_with_a_scale_on_the_device(dtype, small_strips):
    query, key = pair(300, 40, dtype)
    scale = torch.tensor(12.0, dtype=torch.float64, device=DEVICE)
    wanted = ["query", "positive_key", "logit_scale"]
    check(nf.info_nce_loss, wanted, dtype, query=query, positive_key=key, logit_scale=scale)


def test_a_scale_on_the_device_that_is_not_positive_gives_nan():
    query, key = pair(5, 4, "float32")
    assert nf.clip_loss(query, key, torch.tensor(-1.0, device=DEVICE)).isnan()


@pytest.mark.parametrize("temperature", [0.001, 0.01, 5.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_temperatures(temperature, normalize):
    query, key = pair(70, 24, "float32")
    value = nf.info_nce_loss(query, key, temperature=temperature, normalize=normalize)
    expected, _ = g.reference(
        nf.info_nce_loss, ["query"], query=query, positive_key=key, temperature=temperature, normalize=normalize
    )
    g.assert_value(value, expected, 1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction):
    query, key = pair(40, 12, "float64")
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64, device=DEVICE) if reduction == "none" else None
    wanted = ["query", "positive_key"]
    check(nf.info_nce_loss, wanted, "float64", query=query, positive_key=key, reduction=reduction, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_alignment(alpha, dtype):
    x, y = pair(37, 21, dtype)
    check(nf.alignment, ["x", "y"], dtype, x=x, y=y, alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "t"), [(2, 3, 2), (65, 16, 2), (130, 33, 2), (70, 20, 40)])
def test_uniformity(n, d, t, dtype):
    check(nf.uniformity, ["x"], dtype, x=tensor(g.points(n, d), dtype), t=t)


def test_uniformity_in_blocks_of_points_off_the_sphere(small_strips):
    check(nf.uniformity, ["x"], "float32", x=tensor(g.points(280, 20), "float32"), normalize=False)


def test_uniformity_takes_memory_for_its_points_alone(monkeypatch, small_strips):
    """The workspace, which is asked for before anything runs, has no room for a number of every tile."""
    sizes, empty = [], backend.empty

    def ask(like, shape, dtype):
        if dtype == "float64":
            return empty(like, shape, dtype)
        sizes.append(shape[0])
        raise MemoryError

    monkeypatch.setattr(backend, "empty", ask)
    for n in (1 << 17, 1 << 18):
        with pytest.raises(MemoryError):
            nf.uniformity(torch.zeros(n, 2, device=DEVICE))
    assert sizes[1] < 2.1 * sizes[0]


def test_nan_rows_touch_only_their_own_losses():
    query, key = pair(70, 20, "float32")
    query[3] = torch.nan
    loss = nf.info_nce_loss(query, key, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]


def test_zero_rows_have_zero_gradients():
    query, key = pair(20, 8, "float32")
    query[3] = 0
    query.requires_grad_()
    nf.info_nce_loss(query, key).backward()
    assert not query.grad[3].any()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("small", [1e-36, 1e-37, 3e-38])
def test_small_rows_have_a_direction(small, dtype):
    _, y = pair(20, 24, dtype)
    near = tensor(g.points(20, 24) * small, dtype)
    expected, _ = g.reference(nf.clip_loss, ["image_features"], image_features=near, text_features=y)
    g.assert_value(nf.clip_loss(near, y), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_rows_of_denormal_numbers_are_zero(dtype):
    x, y = pair(20, 24, dtype)
    x[3] = 5e-310 if dtype == "float64" else 1e-40
    zero = x.clone()
    zero[3] = 0
    x.requires_grad_()
    loss = nf.clip_loss(x, y)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(loss, nf.clip_loss(zero, y))
    assert not grad[3].any()
    assert grad.isfinite().all()


# ---- distances and kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 66, 3), (70, 130, 16), (129, 65, 40)])
def test_cdist(n, m, d, dtype, metric):
    x, y = tensor(g.points(n, d), dtype), tensor(g.points(m, d, seed=1), dtype)
    references.assert_distances(nf.cdist(x, y, metric), x.cpu(), y.cpu(), metric)
    references.assert_distances(nf.cdist(x, None, metric), x.cpu(), None, metric)


@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize("same", [False, True])
def test_cdist_gradient(metric, same):
    x, y = tensor(g.points(67, 20), "float32"), tensor(g.points(131, 20, seed=1), "float32")
    upstream = tensor(g.points(67, 67 if same else 131, seed=2), "float32")
    leaves = [x.requires_grad_()] if same else [x.requires_grad_(), y.requires_grad_()]
    grads = torch.autograd.grad((nf.cdist(x, None if same else y, metric) * upstream).sum(), leaves)
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    value = references.torch_distances(wide[0], wide[-1], metric)
    expected = torch.autograd.grad((value * upstream.cpu().double()).sum(), wide)
    for grad, other in zip(grads, expected, strict=True):
        g.assert_gradient(grad, other, 1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
def test_upstream_gradients_of_a_point_against_itself(metric):
    """As on the CPU, nothing comes of them."""
    x, upstream = tensor(g.points(67, 20), "float32").requires_grad_(), tensor(g.points(67, 67, seed=2), "float32")
    grads = []
    for own in (0.0, np.nan):
        upstream.fill_diagonal_(own)
        grads += torch.autograd.grad(nf.cdist(x, None, metric), x, upstream)
    assert torch.equal(*grads)


def test_gradients_between_tight_clusters_far_apart(small_strips):
    points = references.clusters(200, 24)
    x = tensor(points, "float32").requires_grad_()
    upstream = tensor(g.points(200, 200, seed=2), "float32")
    (grad,) = torch.autograd.grad((nf.cdist(x, None, "sqeuclidean") * upstream).sum(), x)
    wide = x.detach().cpu().double().requires_grad_()
    value = references.torch_distances(wide, wide, "sqeuclidean")
    (expected,) = torch.autograd.grad((value * upstream.cpu().double()).sum(), wide)
    g.assert_gradient(grad, expected, 1e-5)


@pytest.mark.parametrize("metric", references.METRICS)
def test_pdist(metric):
    x = tensor(g.points(83, 20), "float64")
    i, j = np.triu_indices(83, 1)
    g.assert_value(nf.pdist(x, metric), references.distances(x.cpu(), None, metric)[i, j].astype(float), 1e-9, 1e-6)


def test_pdist_gradient(small_strips):
    x = tensor(g.points(150, 20), "float64").requires_grad_()
    upstream = tensor(g.points(1, 150 * 149 // 2, seed=2)[0], "float64")
    (grad,) = torch.autograd.grad((nf.pdist(x) * upstream).sum(), x)
    wide = x.detach().cpu().requires_grad_()
    i, j = np.triu_indices(150, 1)
    value = (wide[i] - wide[j]).square().sum(1).sqrt()
    (expected,) = torch.autograd.grad((value * upstream.cpu()).sum(), wide)
    g.assert_gradient(grad, expected, 1e-11)


def test_batches():
    x, y = tensor(g.points(3 * 20, 7).reshape(3, 20, 7), "float32"), tensor(g.points(30, 7, seed=1), "float32")
    references.assert_distances(nf.cdist(x, y), x.cpu(), y.cpu(), "euclidean")


@pytest.mark.parametrize("columns", [1, 3, 70])
@pytest.mark.parametrize("d", [3, 40])
def test_gaussian_matmul(d, columns, small_strips):
    x, y = tensor(g.points(150, d), "float64"), tensor(g.points(140, d, seed=1), "float64")
    v = tensor(g.points(140, columns, seed=2), "float64")
    leaves = [z.requires_grad_() for z in (x, y, v)]
    upstream = tensor(g.points(150, columns, seed=3), "float64")
    value = nf.kernels.Gaussian(3.0).matmul(x, y, v)
    grads = torch.autograd.grad((value * upstream).sum(), leaves)
    wide = [leaf.detach().cpu().requires_grad_() for leaf in leaves]
    expected = torch.exp(-references.torch_distances(wide[0], wide[1], "sqeuclidean") / 18) @ wide[2]
    g.assert_gradient(value, expected, 1e-12)
    for grad, other in zip(grads, torch.autograd.grad((expected * upstream.cpu()).sum(), wide), strict=True):
        g.assert_gradient(grad, other, 1e-11)


def test_second_derivatives():
    x, y = (z.requires_grad_() for z in pair(6, 4, "float64"))
    assert torch.autograd.gradgradcheck(lambda a, b: nf.clip_loss(a, b, 3.0), (x, y))
    assert torch.autograd.gradgradcheck(nf.pdist, (x,))


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", references.METRICS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("k", [1, 32, 129])
def test_knn(k, dtype, metric):
    x, y = tensor(g.points(67, 20), dtype), tensor(g.points(129, 20, seed=1), dtype)
    distances, indices = nf.knn(x, y, k, metric=metric)
    exact = references.distances(x.cpu(), y.cpu(), metric).astype(float)
    expected, _ = references.nearest(-exact if metric == "dot" else exact, k)
    found = np.take_along_axis(exact, indices.cpu().numpy(), 1)
    g.assert_value(found, -expected if metric == "dot" else expected, 1e-5, 1e-2)
    g.assert_value(distances, found, 1e-5, 1e-2)


@pytest.mark.parametrize("k", [1, 7])
def test_knn_ties_go_to_the_lower_index(k, small_strips):
    x = tensor(references.integers(300, 2), "float32")
    distances, indices = nf.knn(x, k=k)
    exact = references.distances(x.cpu())
    exact[np.arange(300), np.arange(300)] = np.inf
    expected, expected_index = references.nearest(exact, k)
    np.testing.assert_array_equal(indices.cpu(), expected_index)
    g.assert_value(distances, expected.astype(float), 1e-6)


def test_kmeans_assign():
    x, centroids = tensor(g.points(300, 33), "float32"), tensor(g.points(70, 33, seed=1), "float32")
    x[5] = torch.nan
    labels, distances = nf.kmeans_assign(x, centroids)
    exact = references.distances(x.cpu(), centroids.cpu(), "sqeuclidean").astype(float)
    keep = np.arange(300) != 5
    np.testing.assert_array_equal(labels.cpu().numpy()[keep], exact.argmin(1)[keep])
    g.assert_value(distances.cpu().numpy()[keep], exact.min(1)[keep], 1e-5)
    assert labels[5] == -1
    assert distances[5].isnan()


CONSTANT_KEYS = {
    "info_nce": lambda x, y: nf.info_nce_loss(x, y),
    "own positives": lambda x, y: nf.info_nce_loss(x, y.detach(), y[:40], in_batch=False),
    "own negatives": lambda x, y: nf.info_nce_loss(x, y, y.flip(0)[:, None]),
    "clip": lambda x, y: nf.clip_loss(x, y),
    "siglip": lambda x, y: nf.siglip_loss(x, y),
    "cdist": lambda x, y: nf.cdist(x, y).sum(),
    "cosine": lambda x, y: nf.cdist(x, y, "cosine").square().sum(),
    "cityblock": lambda x, y: nf.cdist(x, y, "cityblock").sum(),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CONSTANT_KEYS)
def test_constant_keys(name, dtype):
    """Their gradient is not computed; the queries' keeps its bits."""
    query, key = (z.requires_grad_() for z in pair(150, 40, dtype))
    value = CONSTANT_KEYS[name](query, key)
    wanted, _ = torch.autograd.grad(value, [query, key])
    constant = CONSTANT_KEYS[name](query, key.detach())
    (own,) = torch.autograd.grad(constant, [query])
    assert torch.equal(constant, value)
    assert torch.equal(own, wanted)


# ---- layouts, precision, order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layouts(dtype):
    query, key = pair(40, 24, dtype)
    plain = nf.info_nce_loss(query, key)
    wide = torch.full((80, 72), torch.nan, dtype=query.dtype, device=DEVICE)
    wide[::2, 1::3] = query
    for other in (query.T.contiguous().T, wide[::2, 1::3]):
        assert torch.equal(nf.info_nce_loss(other, key), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 20, 1160])
def test_rows_that_are_whole_vectors_or_not(d, dtype):
    """Aligned and not, next to each other and not; rows that registers hold, and longer ones."""
    n = 3

    def moved(x, offset, pitch):
        memory = torch.full((offset + n * pitch,), torch.nan, dtype=x.dtype, device=DEVICE)
        rows = memory.as_strided(x.shape, (pitch, 1), offset)
        return rows.copy_(x)

    query, key = pair(n, d, dtype)
    negatives = tensor(g.points(n * 2, d, seed=5).reshape(n, 2, d), dtype)
    distances = nf.kmeans_assign(query, key)[1]
    for layouts in (((0, d), (0, d)), ((1, d), (0, d)), ((0, d), (0, d + 1)), ((8, d + 8), (16, d + 24))):
        x, y = (moved(z, *layout) for z, layout in zip((query, key), layouts, strict=True))
        rows = {"query": x, "positive_key": y, "negative_keys": negatives}
        check(nf.info_nce_loss, list(rows), dtype, **rows)
        g.assert_value(nf.kmeans_assign(x, y)[1], distances.cpu().numpy(), 1e-6)


def test_empty():
    x = torch.empty(0, 4, device=DEVICE)
    assert nf.info_nce_loss(x, x).item() == 0
    assert nf.cdist(x, x).shape == (0, 0)
    assert nf.kmeans_assign(x, torch.ones(2, 4, device=DEVICE))[0].shape == (0,)
    few = torch.ones(2, 4, device=DEVICE)
    for result in (lambda x: nf.pdist(x), lambda x: nf.cdist(x, few), lambda x: nf.cdist(few, x)):
        leaf = x.clone().requires_grad_()
        result(leaf).sum().backward()
        assert leaf.grad.shape == x.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reduced_precision_when_torch_allows_it(dtype, tf32):
    query, key = pair(130, 70, dtype)
    value, grads = g.evaluate(nf.info_nce_loss, ["query"], query=query, positive_key=key)
    expected, expected_grads = g.reference(nf.info_nce_loss, ["query"], query=query, positive_key=key)
    g.assert_value(value, expected, 1e-3)
    g.assert_gradient(grads[0], expected_grads[0], 1e-2)
    if dtype == "float32":
        assert abs(value.item() - expected) > 1e-9  # it was rounded


def results():
    """One result of every operation."""
    query, key = (z.requires_grad_() for z in pair(150, 40, "bfloat16"))
    x = tensor(g.points(150, 20), "float32").requires_grad_()
    found = []
    for loss in (nf.info_nce_loss(query, key), nf.clip_loss(query, key), nf.nt_xent_loss(query, key)):
        found += [loss, *torch.autograd.grad(loss, [query, key])]
    for value in (nf.uniformity(x), nf.cdist(x), nf.kernels.Gaussian().matmul(x, None, x)):
        found += [value, *torch.autograd.grad(value.sum(), [x])]
    found += nf.knn(x, k=4)
    return [z.detach().cpu() for z in found]


def test_results_repeat_bit_for_bit():
    for one, other in zip(results(), results(), strict=True):
        assert references.same_bits(one.float(), other.float())


@pytest.mark.skipif(not EMULATED, reason="the order of threads can be chosen in emulation only")
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch):
    plain = results()
    for seed in ("6", "7", "1234567"):  # copies come at once, or as late as they may: emulate_hopper.hpp
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", seed)
        for one, other in zip(plain, results(), strict=True):
            assert references.same_bits(one.float(), other.float())


def test_what_is_missing_is_told():
    with pytest.raises(NotImplementedError, match="no_such_operation: not implemented on CUDA"):
        backend.kernel(torch.ones(2, 2, device=DEVICE), "no_such_operation")


# ---- what only a GPU shows -------------------------------------------------------------------------------------------


@gpu_only
def test_mixed_devices_are_refused():
    x, y = torch.ones(4, 3), torch.ones(4, 3, device="cuda")
    with pytest.raises(ValueError, match="positive_key: expected device cpu to match query, got cuda:0"):
        nf.info_nce_loss(x, y)
    with pytest.raises(ValueError, match="y: expected device cuda:0 to match x, got cpu"):
        nf.cdist(y, x)


@gpu_only
def test_runs_on_the_current_stream():
    query, key = pair(4096, 128, "bfloat16")
    expected = nf.clip_loss(query, key)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads zeros
        late = torch.zeros_like(query)
        late.copy_(query)
        value = nf.clip_loss(late, key)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(value, expected)


@gpu_only
def test_no_hidden_synchronisation():
    query, key = (z.requires_grad_() for z in pair(512, 64, "bfloat16"))
    scale = torch.tensor(10.0, device="cuda", requires_grad=True)
    nf.clip_loss(query, key, scale).backward()
    with no_synchronisation():
        nf.clip_loss(query, key, scale).backward()
        nf.nt_xent_loss(query, key).backward()
        nf.uniformity(query).backward()
        nf.cdist(query, key).sum().backward()
        nf.knn(query.detach(), key.detach(), 3)


@gpu_only
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss, nf.nt_xent_loss])
def test_graph_capture(loss):
    query, key = (z.requires_grad_() for z in pair(300, 64, "bfloat16"))
    other, other_key = pair(300, 64, "bfloat16", seed=1)

    def run():
        value = loss(query, key)
        return [value, *torch.autograd.grad(value, [query, key])]

    def change():
        query.copy_(other)
        key.copy_(other_key)

    assert_replays(run, change)


@gpu_only
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own, inside torch.compile
def test_compiled():
    query, key = (z.requires_grad_() for z in pair(256, 64, "float32"))
    compiled = torch.compile(lambda a, b: nf.clip_loss(a, b) * 2, fullgraph=True)
    value = compiled(query, key)
    grads = torch.autograd.grad(value, [query, key])
    expected = torch.autograd.grad(nf.clip_loss(query, key) * 2, [query, key])
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


@gpu_only
def test_a_million_rows():
    n, d = 2**20, 256
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    torch.manual_seed(0)
    image = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    loss = nf.clip_loss(image, text, 10.0, reduction="none")
    rows = torch.tensor([0, 1, n // 2, n - 1], device="cuda")
    image, text = (torch.nn.functional.normalize(z.float(), dim=1) for z in (image, text))
    for i in rows.tolist():
        across, down = 10 * text @ image[i], 10 * image @ text[i]
        expected = (torch.logsumexp(across.double(), 0) + torch.logsumexp(down.double(), 0)) / 2 - across[i].double()
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-5, atol=1e-5)
