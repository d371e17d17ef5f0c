"""Kernels on the CUDA backend against their formulas in float64: every family, composed ones, gradients. Where this
runs on, and why it shows what it shows: test_cuda.py.
"""

import generators as g
import numpy as np
import pytest
import references
import test_cuda
import torch
from test_cuda import DEVICE, DTYPES, gpu_only, tensor
from test_kernel_families import EXTREMES, FAMILIES, chi_squared, cosine, gaussian, histograms, matern, periodic
from test_kernels import EPS

import nearfar as nf

k = nf.kernels
pytestmark = test_cuda.pytestmark
on_device, small_strips, tf32 = test_cuda.on_device, test_cuda.small_strips, test_cuda.tf32

KERNELS = dict(FAMILIES)
KERNELS["four scores"] = (
    lambda s, a, b: k.Gaussian(s) * k.Linear(b) ** 2 + k.Cosine() * k.Periodic(s, 2.0) + k.Matern(a) * k.Gaussian(s),
    lambda x, y, s, a, b: (
        gaussian(x, y, s) * (x @ y.mT + b) ** 2
        + cosine(x, y) * periodic(x, y, s, 2.0)
        + matern(2.5)(x, y, a) * gaussian(x, y, s)
    ),
    lambda d: [1.0 * d, np.linspace(0.8, 1.5, d) * d**0.5, 0.5],
)


def sets(n, m, d, dtype="float64"):
    return tensor(g.points(n, d), dtype), tensor(g.points(m, d, seed=1), dtype)


def leaves(*values):
    """Tensors on the device that require gradients, and the same in float64 on the CPU."""
    own = [(v if isinstance(v, torch.Tensor) else tensor(v, "float64")).detach().requires_grad_() for v in values]
    return own, [v.detach().cpu().double().requires_grad_() for v in own]


def assert_gradients(value, own, expected, wide, upstream, tolerance):
    """Of <upstream, value>; relative to the norm of all the points' or of the parameters' gradients."""
    grads = torch.autograd.grad((value * upstream).sum(), own)
    others = torch.autograd.grad((expected * upstream.cpu().double()).sum(), wide)
    for grad, other, leaf in zip(grads, others, own, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.device == leaf.device
        g.assert_gradient(grad, other, tolerance, floor=1e-3)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 66, 3), (65, 130, 40)])
@pytest.mark.parametrize("name", KERNELS)
def test_gram_and_product(name, n, m, d):
    make, formula, defaults = KERNELS[name]
    kernel = make(*defaults(d))
    for dtype in DTYPES:
        x, y = sets(n, m, d, dtype)
        wide = [torch.as_tensor(v, dtype=torch.float64) for v in (x.cpu().double(), y.cpu().double(), *defaults(d))]
        expected = formula(*wide).numpy()
        bound = EPS[dtype] * (6 + np.sqrt(d)) * (4 if name in ("periodic", "four scores") else 1)
        size = max(1.0, np.abs(expected).max())
        dense = kernel(x, y)
        assert dense.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert np.abs(g.numpy_of(dense) - expected).max() < bound * size
        for r in (1, 7):
            v = tensor(g.points(m, r, seed=r), dtype)
            error = np.abs(g.numpy_of(kernel.matmul(x, y, v)) - expected @ g.numpy_of(v))
            limit = (bound + EPS[dtype] * np.sqrt(m)) * size * np.abs(g.numpy_of(v)).sum(0)
            assert np.all(error <= limit)


@pytest.mark.parametrize("name", KERNELS)
def test_one_set(name):
    """Exactly symmetric, ones on the diagonal of a normalised kernel."""
    for d, dtype in ((3, "float32"), (40, "float32"), (20, "float64")):
        kernel = KERNELS[name][0](*KERNELS[name][2](d))
        points = g.points(67, d)
        points[7] = 0
        x = tensor(points, dtype)
        dense = kernel(x)
        assert references.same_bits(dense.cpu(), dense.T.contiguous().cpu())
        if isinstance(kernel, k.families._Stationary | k.Periodic):
            assert torch.all(dense.diagonal() == 1)
        if name == "cosine":
            np.testing.assert_array_equal(dense.diagonal().cpu(), np.arange(67) != 7)
        product = kernel.matmul(x, None, x[:, :2].contiguous())
        torch.testing.assert_close(product, dense @ x[:, :2], rtol=1e-4, atol=2e-5 * dense.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), [(5, 66, 3), (65, 130, 20)])
def test_chi_squared(n, m, d, dtype):
    """Of points that are not negative: by itself and beside other scores, with gradients."""
    by_name = k.named.by_name
    for kernel, formula in (
        (by_name("chi2", None, gamma=0.1), lambda x, y: torch.exp(-0.1 * chi_squared(x, y))),
        (
            k.Gaussian(3.0) * by_name("additive_chi2", None),
            lambda x, y: -gaussian(x, y, 3.0) * chi_squared(x, y),
        ),
    ):
        own, wide = leaves(tensor(histograms(n, d), dtype), tensor(histograms(m, d, seed=1), dtype))
        v = tensor(g.points(m, 3, seed=2), dtype)
        g.assert_value(kernel(*own), formula(*wide), EPS[dtype] * (6 + np.sqrt(d)) * 2, 1.0)
        grads = torch.autograd.grad(kernel.matmul(*own, v).sum(), own)
        expected = torch.autograd.grad((formula(*wide) @ v.cpu().double()).sum(), wide)
        for grad, other in zip(grads, expected, strict=True):
            g.assert_gradient(grad, other, g.GRADIENT[dtype], g.STEP.get(dtype, 0))
        assert references.same_bits(kernel(own[0]).cpu(), kernel(own[0]).T.contiguous().cpu())


def test_blocks_of_many_scores(small_strips):
    make, formula, defaults = KERNELS["four scores"]
    x, y = sets(150, 140, 20)
    v = tensor(g.points(140, 9, seed=2), "float64")
    expected = formula(x.cpu(), y.cpu(), *(torch.as_tensor(value) for value in defaults(20)))
    kernel = make(*defaults(20))
    g.assert_value(kernel(x, y), expected.numpy(), 1e-11, 1e-3)
    g.assert_gradient(kernel.matmul(x, y, v), expected @ v.cpu(), 1e-12)


@pytest.mark.parametrize("name", ["gaussian", "one score", "polynomial", "four scores"])
def test_bad_rows_touch_only_their_own_results(name):
    make, _, defaults = KERNELS[name]
    kernel, good = make(*defaults(20)), np.setdiff1d(np.arange(40), [0, 31])
    x, y = sets(40, 66, 20, "float32")
    v = y[:, :3].contiguous()
    dense, product = kernel(x, y), kernel.matmul(x, y, v)
    x[0, 3] = x[31, 19] = torch.nan
    dirty, dirty_product = kernel(x, y), kernel.matmul(x, y, v)
    if name == "four scores":  # the centre that is divided out sees other entries
        torch.testing.assert_close(dirty[good], dense[good], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(dirty[good], dense[good])
        assert torch.equal(dirty_product[good], product[good])
    assert dirty[[0, 31]].isnan().all()
    assert dirty_product[[0, 31]].isnan().all()


def test_zero_rows_by_cosines():
    """They have no direction: their cosines are 0, with zero derivatives, also of some columns beside other scores."""
    x, y = sets(40, 70, 20)
    x[3] = 0
    y[9, 2:7] = 0
    (x, y), wide = leaves(x, y)
    weights = tensor(g.points(40, 70, seed=3), "float64")

    def expected(columns):
        u, v = (z[:, columns] for z in wide)
        return cosine(u, v) * torch.outer(u.detach().any(1), v.detach().any(1))

    assert_gradients(k.Cosine()(x, y), [x, y], expected(slice(None)), wide, weights, 1e-11)
    text = "unit_dot 2 7; dot 0 -1; add 0 1"
    value = nf.autograd.apply("gram", (x, y, torch.zeros(0, dtype=torch.float64)), (text,))
    sums = expected(slice(2, 7)) + wide[0] @ wide[1].T
    g.assert_value(value, sums, 1e-11, 1e-3)
    assert_gradients(value, [x, y], sums, wide, weights, 1e-11)
    assert not torch.autograd.grad(k.Cosine().matmul(x, y, weights[0]).sum(), x)[0][3].any()


def test_batches_layouts_and_empty_sets():
    kernel = k.Matern(np.array([1.0, 2.0, 3.0, 4.0])) + k.Linear() * k.RationalQuadratic(3.0)
    x, y = tensor(g.points(12, 4).reshape(2, 1, 6, 4), "float64"), tensor(g.points(21, 4).reshape(3, 7, 4), "float64")
    v = tensor(g.points(7, 2, seed=3), "float64")
    dense = kernel(x, y)
    assert dense.shape == (2, 3, 6, 7)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(dense[i, j], kernel(x[i, 0], y[j]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel.matmul(x, y, v), dense @ v, rtol=1e-12, atol=1e-12)
    one = k.Matern()(y[0], y[1])
    wide = torch.full((14, 12), torch.nan, dtype=torch.float64, device=DEVICE)
    wide[::2, ::3] = y[0]
    assert torch.equal(k.Matern()(wide[::2, ::3], y[1].T.contiguous().T), one)
    none = y[0, :0]
    assert kernel(none).shape == (0, 0)
    assert kernel(y, none).shape == (3, 7, 0)
    assert kernel.matmul(none, y[0], v).shape == (0, 2)
    assert not kernel.matmul(y[0], none, v[:0]).any()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("name", EXTREMES)
def test_tiny_and_huge_length_scales(name, size):
    """Values and gradients, beside points that coincide and large weights."""
    make, formula = EXTREMES[name]
    for d, dtype in ((3, "float32"), (20, "float32"), (3, "float64")):
        points = g.points(9, d)
        points[7] = points[2]
        least = 1e3 * np.finfo(dtype).tiny  # what underflows is 0
        for value in (size, size * np.linspace(1, 3, d)):
            own, wide = leaves(tensor(points, dtype), tensor(1e3 * g.points(9, 2), dtype), value)
            gram, expected = make(own[2])(own[0]), formula(wide[0], wide[0], wide[2])
            torch.testing.assert_close(gram.cpu().double(), expected, rtol=1e-5, atol=1e-5)
            actual = torch.autograd.grad(make(own[2]).matmul(own[0], None, own[1]).sum(), own)
            wanted = torch.autograd.grad((expected @ wide[1]).sum(), wide)
            for a, e, floor in zip(actual, wanted, (least, least, least * max(1, 1 / size)), strict=True):
                assert ((a.cpu().double() - e).abs() <= 2e-4 * e.abs().max() + floor).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients(name, d):
    make, formula, defaults = KERNELS[name]
    x, y = sets(37, 66, d)
    own, wide = leaves(x, y, tensor(g.points(66, 3, seed=2), "float64"), *defaults(d))
    upstream = tensor(g.points(37, 66, seed=3), "float64")
    arguments, wide_arguments = [*own[:2], *own[3:]], [*wide[:2], *wide[3:]]
    assert_gradients(make(*own[3:])(*own[:2]), arguments, formula(*wide_arguments), wide_arguments, upstream, 1e-10)
    product = make(*own[3:]).matmul(*own[:3])
    assert_gradients(product, own, formula(*wide_arguments) @ wide[2], wide, upstream[:, :3], 1e-10)


@pytest.mark.parametrize("name", ["gaussian", "matern 5/2", "five scores", "cosine"])
def test_gradients_of_one_set_in_blocks(name, small_strips):
    make, formula, defaults = KERNELS[name]
    for dtype, tolerance in (("float32", 2e-5), ("float64", 1e-10)):
        own, wide = leaves(tensor(g.points(150, 20), dtype), tensor(g.points(150, 5, seed=2), dtype), *defaults(20))
        upstream = tensor(g.points(150, 150, seed=3), dtype)
        arguments, gram = [own[0], *own[2:]], lambda x, *p, f=formula: f(x, x, *p)
        expected = gram(wide[0], *wide[2:])
        assert_gradients(make(*own[2:])(own[0]), arguments, expected, [wide[0], *wide[2:]], upstream, tolerance)
        product = make(*own[2:]).matmul(own[0], None, own[1])
        expected = gram(wide[0], *wide[2:]) @ wide[1]
        assert_gradients(product, own, expected, wide, upstream[:, :5], tolerance)


@pytest.mark.parametrize("wanted", ["x", "y", "v", "p", "yp"])
@pytest.mark.parametrize("name", ["gaussian", "matern 3/2", "four scores"])
def test_only_what_is_wanted(name, wanted):
    make, formula, defaults = KERNELS[name]
    x, y = sets(20, 35, 7)
    own, wide = leaves(x, y, tensor(g.points(35, 2, seed=2), "float64"), *defaults(7))
    names = ["x", "y", "v", *["p"] * len(defaults(7))]
    for leaf, its in zip(own, names, strict=True):
        leaf.requires_grad_(its in wanted)
    asked = [at for at, its in enumerate(names) if its in wanted]
    expected = formula(*wide[:2], *wide[3:]) @ wide[2]
    value, upstream = make(*own[3:]).matmul(*own[:3]), tensor(g.points(20, 2, seed=3), "float64")
    assert_gradients(value, [own[at] for at in asked], expected, [wide[at] for at in asked], upstream, 1e-10)


@pytest.mark.parametrize("kernel", [k.Gaussian(0.02), k.Matern(0.02), k.Gaussian(0.02) + k.RationalQuadratic(0.02)])
def test_tight_clusters_far_apart(kernel):
    """Near pairs are measured, not subtracted."""
    own, wide = leaves(tensor(references.clusters(130, 24), "float32"), tensor(g.points(130, 2), "float32"))
    value = kernel.matmul(own[0], None, own[1])
    square = references.torch_distances(wide[0], wide[0], "sqeuclidean") / 0.02**2
    t = (5 * torch.where(square > 0, square, 1.0)).sqrt() * (square > 0)
    plain = torch.exp(-square / 2)
    expected = {"Gaussian": lambda: plain, "Matern": lambda: (1 + t + t * t / 3) * torch.exp(-t)}.get(
        type(kernel).__name__, lambda: plain + 1 / (1 + square / 2)
    )() @ wide[1]
    g.assert_gradient(value, expected, 1e-5)
    assert_gradients(value, own, expected, wide, tensor(g.points(130, 2, seed=3), "float32"), 1e-5)


def test_half_precision_gradients_are_rounded_once():
    x, y = (z.requires_grad_() for z in sets(40, 35, 20, "bfloat16"))
    value = k.Matern(4.0).matmul(x, y, y.detach()[:, :3])
    _, wide = leaves(x, y)
    expected = matern(2.5)(*wide, 4.0) @ wide[1].detach()[:, :3]
    grads = torch.autograd.grad(value.sum(), [x, y])
    for grad, other in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert grad.dtype == torch.bfloat16
        g.assert_gradient(grad, other, 1e-5, g.STEP["bfloat16"])


def test_second_derivatives():
    own, _ = leaves(*sets(4, 3, 2), tensor(g.points(3, 2), "float64"), 0.8, 0.5)
    product = lambda x, y, v, s, c: (c * k.Gaussian(s) + k.Linear() * k.Matern(s)).matmul(x, y, v)  # noqa: E731
    assert torch.autograd.gradgradcheck(product, own)


# ---- order, precision ----------------------------------------------------------------------------------------------


def results():
    found = []
    for name in ("gaussian", "matern 5/2", "four scores"):
        make, _, defaults = KERNELS[name]
        own, _ = leaves(*sets(140, 70, 20, "float32"), *defaults(20))
        for value in (make(*own[2:])(*own[:2]), make(*own[2:]).matmul(*own[:2], own[1][:, :6])):
            found += [value, *torch.autograd.grad(value.sum(), own)]
    return [z.detach().cpu() for z in found]


def test_results_repeat_bit_for_bit(monkeypatch):
    """Also where threads run in another order, which can be chosen in emulation only."""
    plain = results()
    for seed in ("0", "1234567"):
        monkeypatch.setenv("NEARFAR_EMULATE_ORDER", seed)
        for one, other in zip(plain, results(), strict=True):
            assert references.same_bits(one, other)


def test_reduced_precision_when_torch_allows_it(tf32):
    x, y = sets(130, 70, 40, "float32")
    for kernel, formula in (
        (k.Gaussian(5.0), gaussian(x.double(), y.double(), 5.0)),
        (k.Linear(0.0), x.double() @ y.double().T),
    ):
        expected = formula.double().cpu()
        error = (kernel(x, y).cpu().double() - expected).abs().max() / expected.abs().max()
        assert 1e-9 < error < 5e-3


# ---- what only a GPU shows -------------------------------------------------------------------------------------------


@gpu_only
def test_parameters_on_either_side():
    x, y = sets(50, 60, 20, "float32")
    values = []
    for device in ("cpu", "cuda"):
        scale, alpha, c = (torch.tensor(v, device=device, requires_grad=True) for v in (3.0, 0.7, 0.5))
        kernel = c * k.RationalQuadratic(scale, alpha) + k.Matern(scale) * k.Linear(2.0)
        value = kernel.matmul(x, y, y)
        grads = torch.autograd.grad(value.sum(), [scale, alpha, c])
        assert all(grad.device.type == device for grad in grads)
        values.append([value, *(grad.cpu() for grad in grads)])
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@gpu_only
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
def test_no_hidden_synchronisation_and_graph_capture():
    x, y = (z.requires_grad_() for z in sets(300, 200, 40, "float32"))
    scale = torch.tensor(3.0, device="cuda", requires_grad=True)

    def both():
        kernel = k.Matern(2.0) * k.Polynomial(3) + k.Gaussian(scale)
        value = kernel.matmul(x, y, y.detach()) + kernel(x).sum()
        return [value, *torch.autograd.grad(value.sum(), [x, y, scale])]

    def change():
        scale.fill_(1.5)
        x.mul_(0.9)

    test_cuda.assert_replays(both, change)
    with test_cuda.no_synchronisation():
        both()
