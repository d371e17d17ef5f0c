"""Batches of problems so small that they go together, one a lane, against each problem alone."""

import numpy as np
import pytest
import torch
from generators import layouts, numpy_of, of_kind, points
from references import same_bits

import nearfar as nf
from nearfar import kernels

SHAPES = [(1, 1, 1), (2, 3, 4), (4, 4, 2), (5, 7, 3), (8, 8, 4), (8, 5, 33), (16, 3, 8), (16, 16, 5)]
MAPS = {
    "euclidean": {},
    "sqeuclidean": {},
    "cosine": {},
    "dot": {},
    "cityblock": {},
    "chebyshev": {},
    "minkowski": {"p": 3.0},
    "minkowski, any p": {"p": 2.3},
    "minkowski, below 1": {"p": 0.7},
}
KERNELS = {
    "Gaussian": kernels.Gaussian(1.3),
    "Linear": kernels.Linear(),
    "Laplacian": kernels.Laplacian(1.1),
    "ChiSquared": kernels.ChiSquared(0.7),
    "Cosine": kernels.Cosine(),
    "several": 0.5 * kernels.Gaussian(1.3) + kernels.Cosine() * kernels.Matern(0.9, nu=1.5) + kernels.Laplacian(2.0),
}
TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-5}, "float64": {"rtol": 1e-11, "atol": 1e-12}}


def batch(count, n, d, dtype, seed=0):
    return points(count * n, d, dtype, seed=seed).reshape(count, n, d)


def metric_of(name):
    return {"metric": name.split(",")[0], **MAPS[name]}


def functions():
    for name in MAPS:
        yield name, lambda x, y, name=name: nf.cdist(x, y, **metric_of(name))
    for name, kernel in KERNELS.items():
        yield name, kernel


def close(actual, expected, dtype):
    np.testing.assert_allclose(numpy_of(actual), expected, **TOLERANCE[dtype])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype):
    n, m, d = shape
    for count in (2, 7, 16, 35):
        x, y = np.abs(batch(count, n, d, dtype)), np.abs(batch(count, m, d, dtype, seed=1))
        for _, function in functions():
            alone = [function(a, b) for a, b in zip(x.astype("float64"), y.astype("float64"), strict=True)]
            close(function(x, y), alone, dtype)
            alone = [function(a, None) for a in x.astype("float64")]
            own = function(x, None)
            close(own, alone, dtype)
            assert same_bits(own, np.ascontiguousarray(np.swapaxes(own, 1, 2)))


@pytest.mark.isa
@pytest.mark.parametrize("name", list(MAPS))
def test_condensed(name):
    for n, d in ((1, 3), (2, 1), (7, 5), (8, 4)):
        x = batch(21, n, d, "float32")
        full = nf.cdist(x, None, **metric_of(name))
        i, j = np.triu_indices(n, 1)
        assert same_bits(nf.pdist(x, **metric_of(name)), full[:, i, j])
        diagonal = full[:, np.arange(n), np.arange(n)]
        assert name == "dot" or np.all(diagonal == 0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype):
    n, m, d = shape
    count = 19
    for _, function in functions():
        for own in (False, True):
            x = torch.tensor(np.abs(batch(count, n, d, dtype)), requires_grad=True)
            y = None if own else torch.tensor(np.abs(batch(count, m, d, dtype, seed=1)), requires_grad=True)
            leaves = [x] if own else [x, y]
            value = function(x, y)
            upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
            found = torch.autograd.grad(value, leaves, upstream)
            wide = [z.detach().double().requires_grad_() for z in leaves]
            alone = torch.stack([function(*(z[k] for z in wide), *([None] if own else [])) for k in range(count)])
            for a, b in zip(found, torch.autograd.grad(alone, wide, upstream.double()), strict=True):
                scale = max(1.0, float(b.abs().max()))
                close(a / scale, numpy_of(b / scale), dtype)


@pytest.mark.isa
def test_gradients_of_condensed_pairs():
    for name in MAPS:
        x = torch.tensor(batch(19, 7, 3, "float64"), requires_grad=True)
        i, j = np.triu_indices(7, 1)
        upstream = torch.randn(19, len(i), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (found,) = torch.autograd.grad(nf.pdist(x, **metric_of(name)), x, upstream)
        full = torch.stack([nf.cdist(x[k], x[k] + 0, **metric_of(name)) for k in range(19)])
        (expected,) = torch.autograd.grad(full[:, i, j], x, upstream)
        close(found, numpy_of(expected), "float64")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [1, 3, 40])
def test_products(columns, dtype):
    for n, m, d in ((2, 3, 4), (8, 8, 4), (3, 7, 20)):
        length = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        kernel = kernels.Gaussian(length) + kernels.Laplacian(1.1)
        x, y, v = (
            torch.tensor(batch(21, rows, width, dtype, seed=seed), requires_grad=True)
            for seed, (rows, width) in enumerate(((n, d), (m, d), (m, columns)))
        )
        leaves = [x, y, v]
        value = kernel.matmul(x, y, v)
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
        found = torch.autograd.grad(value, [*leaves, length], upstream)
        wide = [z.detach().double().requires_grad_() for z in leaves]
        alone = torch.stack([kernel.matmul(*(z[k] for z in wide)) for k in range(21)])
        close(value, numpy_of(alone), dtype)
        for a, b in zip(found, torch.autograd.grad(alone, [*wide, length], upstream.double()), strict=True):
            scale = max(1.0, float(b.abs().max()))
            close(a / scale, numpy_of(b / scale), dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lanes_without_a_problem_weigh_nothing(dtype):
    """Also where the score of every problem beside them is infinite."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kernel = scale * kernels.Linear()
    for count in (9, 17):
        x = torch.ones(count, 2, 3, dtype=getattr(torch, dtype))
        x[count - 1] = torch.finfo(x.dtype).max
        for value in (kernel(x, None), kernel.matmul(x, None, torch.ones_like(x))):
            assert torch.autograd.grad(value, scale, torch.ones_like(value))[0] == np.inf


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype):
    x, y = (of_kind("torch", batch(21, 8, 4, "float32", seed=seed), dtype) for seed in (0, 1))
    for _, function in functions():
        x, y = x.abs(), y.abs()
        close(function(x, y), numpy_of(function(x.float(), y.float())), "float32")


@pytest.mark.isa
def test_layouts():
    x, y = batch(21, 8, 5, "float32"), batch(21, 6, 5, "float32", seed=1)
    expected = {name: function(x, y) for name, function in functions() if name != "ChiSquared"}
    repeated = np.broadcast_to(y[0], y.shape)
    for name, function in functions():
        if name == "ChiSquared":
            continue
        for turned in (
            np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
            np.asfortranarray(x),
            np.ascontiguousarray(x[::-1])[::-1],
            np.repeat(x, 2, 0)[::2],
            np.repeat(x, 2, 2)[:, :, ::2],
        ):
            assert same_bits(function(turned, y), expected[name])
        assert same_bits(function(x, repeated), function(x, repeated.copy()))


@pytest.mark.isa
def test_neighbours_change_nothing():
    """A problem has the same bits wherever it lies, and whatever lies beside it."""
    x, y = np.abs(batch(35, 8, 5, "float32")), np.abs(batch(35, 6, 5, "float32", seed=1))
    order = np.random.default_rng(0).permutation(35)[:19]
    for _, function in functions():
        expected = function(x, y)[order]
        a, b = x[order], y[order]
        assert same_bits(function(a, b), expected)
        a[4], b[7] = np.inf, np.nan
        others = np.delete(np.arange(19), (4, 7))
        assert same_bits(function(a, b)[others], expected[others])


@pytest.mark.isa
def test_threads_change_nothing():
    x, y = (torch.tensor(batch(1100, 8, 4, "float32", seed=seed), requires_grad=True) for seed in (0, 1))
    found = []
    before = nf.get_num_threads()
    try:
        for threads in (1, 2, 3):
            nf.set_num_threads(threads)
            for _, function in functions():
                value = function(x.abs(), y.abs())
                found.append((value, *torch.autograd.grad(value, [x, y], torch.ones_like(value))))
    finally:
        nf.set_num_threads(before)
    each = len(found) // 3
    for k in range(each):
        for again in (found[k + each], found[k + 2 * each]):
            assert all(same_bits(a, b) for a, b in zip(found[k], again, strict=True))


@pytest.mark.isa
def test_nan_and_zero_rows_stay_in_their_problem():
    x, y = batch(9, 5, 4, "float32"), batch(9, 6, 4, "float32", seed=1)
    x[3, 2, 1] = np.nan
    y[4, 0] = 0
    x[4, 1] = 0
    for name in MAPS:
        leaves = [torch.tensor(z, requires_grad=True) for z in (x, y)]
        value = nf.cdist(*leaves, **metric_of(name))
        gradients = torch.autograd.grad(value, leaves, torch.ones_like(value))
        missing = np.isnan(numpy_of(value))
        assert missing[3, 2].all()
        assert missing.sum() == 6
        assert name == "dot" or np.isnan(numpy_of(gradients[0])[3, 2]).any()
        for k in set(range(9)) - {3}:
            own = [z.detach()[k].requires_grad_() for z in leaves]
            alone = nf.cdist(*own, **metric_of(name))
            close(value[k].detach(), numpy_of(alone), "float32")
            for a, b in zip(gradients, torch.autograd.grad(alone, own, torch.ones_like(alone)), strict=True):
                close(a[k], numpy_of(b), "float32")


def test_layouts_of_one_problem_are_those_of_a_batch():
    for layout in layouts(points(8, 4, "float32")).values():
        both = np.stack([layout, layout])
        assert same_bits(*nf.cdist(both, both + 1))
