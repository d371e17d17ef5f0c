"""Operations whose second set is the first: pairs i > j stand for both orders, in products and in gradients."""

import numpy as np
import pytest
import torch
from generators import GRADIENT, STEP, assert_gradient, of_kind, points, rng
from references import METRICS, same_bits
from test_distances import torch_distances
from test_kernel_families import EPS, FAMILIES, parameter_floors

import nearfar as nf

k = nf.kernels

# Around panels of 8, 16 and 32 rows, tiles of 4, 6 and 12 columns, chunks of 240, strips of 128.
SIZES = (1, 2, 7, 13, 33, 127, 129, 241, 300)


@pytest.mark.isa
@pytest.mark.parametrize("r", [2, 5, 12, 13, 16, 17, 33, 65])
@pytest.mark.parametrize(("n", "d", "dtype"), [(1024, 3, "float32"), (3001, 60, "float32"), (1111, 50, "float64")])
def test_product_of_several_columns(n, d, dtype, r, threads):
    x, v = points(n, d, dtype), points(n, r, dtype, seed=5)
    rows = np.r_[0:3, 126:130, 1010:1016, n - 13 : n]
    for name in ("gaussian", "linear", "five scores"):
        kernel = FAMILIES[name][0](*FAMILIES[name][2](d))
        block = kernel(x[rows].astype("float64"), x.astype("float64"))
        threads(1)
        product = kernel.matmul(x, None, v)
        threads(3)
        assert same_bits(product, kernel.matmul(x, None, v))
        error = np.abs(product[rows] - block @ v.astype("float64"))
        bound = EPS[dtype] * (6 + np.sqrt(d) + np.sqrt(n)) * max(1.0, np.abs(block).max())
        assert np.all(error <= bound * np.abs(v).sum(0)), name


def test_product_of_no_columns():
    x = torch.from_numpy(points(1100, 3)).requires_grad_()
    product = k.Gaussian().matmul(x, None, torch.empty(1100, 0, dtype=x.dtype))
    assert product.shape == (1100, 0)
    (gradient,) = torch.autograd.grad(product.sum(), x)
    assert not gradient.any()


def compare(f, reference, tensors, dtype, floors=()):
    """Gradients by all tensors against those of plain torch in float64."""
    own = [t.clone().requires_grad_() for t in tensors]
    other = [t.double().clone().requires_grad_() for t in tensors]
    actual = torch.autograd.grad(f(*own), own)
    expected = torch.autograd.grad(reference(*other), other)
    floors = (*floors, *[0.0] * (len(own) - len(floors)))
    for a, e, t, floor in zip(actual, expected, own, floors, strict=True):
        assert a.dtype == t.dtype
        assert_gradient(a, e, GRADIENT[dtype], STEP[dtype] if t.dtype == tensors[0].dtype else 0.0, floor)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_kernels(name, dtype):
    make, formula, defaults = FAMILIES[name]
    d = 3
    values = [torch.as_tensor(value, dtype=torch.float64) for value in defaults(d)]
    for n in SIZES[1:]:
        x, v = (of_kind("torch", points(n, width, seed=seed), dtype) for seed, width in enumerate((d, 2)))
        upstream, weights = (torch.from_numpy(rng(n, width).standard_normal((n, width))) for width in (2, n))
        floors = [0.0, 0.0, *parameter_floors(formula, x.double(), x.double(), v, *values)]
        if name == "cosine":  # of rows that are nearly parallel slopes cancel
            floors[0] = float(weights.norm()) / float(x.double().norm(dim=1).min())
        compare(
            lambda x, v, *p: (make(*p).matmul(x, None, v) * upstream).sum(),  # noqa: B023
            lambda x, v, *p: (formula(x, x, *p) @ v * upstream).sum(),  # noqa: B023
            [x, v, *values], dtype, floors,
        )  # fmt: skip
        compare(
            lambda x, v, *p: (make(*p)(x) * weights).sum() + 0 * v.sum(),  # noqa: B023
            lambda x, v, *p: (formula(x, x, *p) * weights).sum() + 0 * v.sum(),  # noqa: B023
            [x, v, *values], dtype, floors,
        )  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("metric", [*METRICS, "cityblock", "chebyshev"])
def test_gradients_of_distances(metric, d):
    for n in SIZES:
        x = torch.from_numpy(points(n, d)).float()
        weights = torch.from_numpy(rng(n).standard_normal((n, n)))
        floor = float(weights.norm()) / float(x.norm(dim=1).min()) if metric == "cosine" else 0.0
        if metric in METRICS:
            compare(
                lambda x: (nf.cdist(x, None, metric) * weights).sum(),  # noqa: B023
                lambda x: (torch_distances(x, x, metric) * weights).sum(),  # noqa: B023
                [x], "float32", [floor],
            )  # fmt: skip
        # A pair of `pdist` has the weights of both orders.
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        off = weights - weights.diag().diag()
        (nf.cdist(leaf, None, metric) * off).sum().backward()
        i, j = torch.triu_indices(n, n, 1)
        (nf.pdist(other, metric) * (weights + weights.T)[i, j]).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5 * float(1 + leaf.grad.abs().max()))


def test_gradients_of_batches():
    """Tiny problems go together, larger ones do not."""
    kernel = k.Gaussian(1.5) + k.Cosine() * k.Linear()
    for n in (1, 4, 9, 70):
        x, v = (
            torch.from_numpy(points(19 * n, 5)).reshape(19, n, 5),
            torch.from_numpy(points(19 * n, 2)).reshape(19, n, 2),
        )
        weights = torch.from_numpy(rng(n).standard_normal((19, n, n)))
        for f in (
            lambda x, v, w: (kernel(x) * w).sum(),
            lambda x, v, w: (kernel.matmul(x, None, v) ** 2).sum(),
            lambda x, v, w: (nf.cdist(x) * w).sum(),
            lambda x, v, w: (nf.cdist(x, metric="cosine") * w).sum(),
            lambda x, v, w: (nf.cdist(x, metric="cityblock") * w).sum(),
        ):
            (whole,) = torch.autograd.grad(f(leaf := x.clone().requires_grad_(), v, weights), leaf)
            for b in range(19):
                (own,) = torch.autograd.grad(f(leaf := x[b].clone().requires_grad_(), v[b], weights[b]), leaf)
                torch.testing.assert_close(whole[b], own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock"])
def test_upstream_gradients_of_a_point_against_itself(metric):
    """Its distance is 0 wherever it lies, so that what a logarithm or a root sends back there goes nowhere."""
    for shape in ((5, 3), (20, 5, 3), (70, 40)):
        x = torch.from_numpy(points(int(np.prod(shape[:-1])), shape[-1])).reshape(shape)
        gradients = []
        for own in (0.0, np.nan, np.inf):
            weights = torch.from_numpy(rng(3).standard_normal((*shape[:-1], shape[-2])))
            torch.diagonal(weights, dim1=-2, dim2=-1).fill_(own)
            gradients += torch.autograd.grad(nf.cdist(leaf := x.clone().requires_grad_(), None, metric), leaf, weights)
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[0], gradients[2])


def test_a_gradient_that_is_not_for_one_set():
    x, out = np.zeros((1, 3, 2)), np.zeros((1, 3, 2))
    square, parameters = np.zeros((1, 3, 3)), np.empty(0)
    store = ("sqeuclidean", 2.0, False, True, False, square, square)
    with pytest.raises(ValueError, match="dy: expected None, since y is x"):
        nf._core.store_grad(x, x, *store, out, out, 1)
    with pytest.raises(ValueError, match="dx: expected that of both, since y is x"):
        nf._core.store_grad(x, x, *store, None, None, 1)
    with pytest.raises(ValueError, match="y: expected the rows of x"):
        nf._core.store_grad(x, x[:, :2], *store, out, None, 1)
    with pytest.raises(ValueError, match="dy: expected None, since y is x"):
        nf._core.gram_grad(x, x, "dot 0 -1", parameters, True, square, out, out, None, 1)
