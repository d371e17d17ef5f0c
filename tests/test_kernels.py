"""The Gaussian kernel: dense, and its product with a matrix."""

from __future__ import annotations

import numpy as np
import pytest

import nearfar as nf


def reference(x, y, lengthscale=1.0):
    x, y = (np.asarray(z, np.float64) / lengthscale for z in (x, y))
    return np.exp(-((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) / 2)


def points(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 3, 17, 40])
@pytest.mark.parametrize("r", [1, 2, 4, 5, 13])
def test_dense_and_product(dtype, d, r):
    bound = 3e-6 if dtype != np.float64 else 1e-13
    for n, m in ((1, 1), (7, 500), (130, 49), (300, 241)):
        x, y, v = points(n, d, dtype=dtype), points(m, d, dtype=dtype, seed=1), points(m, r, dtype=dtype, seed=2)
        scale = np.sqrt(d)
        kernel = nf.kernels.Gaussian(scale)
        wanted = reference(x, y, scale)
        assert np.abs(kernel(x, y) - wanted).max() < bound
        product = kernel.matmul(x, y, v)
        assert np.abs(product - wanted @ v.astype(np.float64)).max() < bound * np.abs(v).astype(np.float64).sum()


def test_shapes_and_names():
    x, v = points(2, 3, 6, 4), points(6, 2, seed=1)
    kernel = nf.kernels.RBF(0.7)
    assert nf.kernels.SquaredExponential is nf.kernels.Gaussian
    assert np.allclose(kernel.matmul(x, None, v), kernel(x) @ v, atol=1e-5)
    assert np.allclose(kernel.matmul(x[0, 0], None, v[:, 0]), kernel(x[0, 0]) @ v[:, 0], atol=1e-5)
    assert np.array_equal(kernel.diag(x), np.ones((2, 3, 6), np.float32))
    assert repr(kernel) == "Gaussian(lengthscale=0.7)"
    assert np.array_equal(nf.gram(x, kernel=kernel), kernel(x))
    assert kernel(points(0, 4)).shape == (0, 0)


def test_one_length_scale_a_dimension():
    x, y = points(20, 3), points(30, 3, seed=1)
    scale = np.array([0.5, 1.0, 3.0])
    assert np.allclose(nf.kernels.Gaussian(scale)(x, y), reference(x, y, scale), atol=1e-6)


def test_agrees_with_sklearn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = points(50, 7, dtype=np.float64), points(40, 7, dtype=np.float64, seed=1)
    assert np.allclose(nf.gram(x, y, "rbf"), pairwise.rbf_kernel(x, y), rtol=1e-12)
    assert np.allclose(nf.gram(x, y, "rbf", gamma=0.3), pairwise.rbf_kernel(x, y, gamma=0.3), rtol=1e-12)


def test_limits_and_symmetry():
    x = points(100, 5)
    assert np.array_equal(nf.gram(x, lengthscale=1e-3), np.eye(100, dtype=np.float32))
    assert np.allclose(nf.gram(x, lengthscale=1e4), 1)
    k = nf.gram(x)
    assert np.array_equal(k, k.T)
    assert np.array_equal(k.diagonal(), np.ones(100, np.float32))


@pytest.mark.parametrize("offset", [0, 10])
def test_float32_gram_is_semi_definite_to_noise(offset):
    x = points(500, 3) + np.float32(offset)
    values = np.linalg.eigvalsh(nf.gram(x).astype(np.float64))
    assert values[0] > -np.finfo(np.float32).eps * values[-1]


def test_far_points_underflow_to_zero():
    x = 100 * points(200, 64)
    k = nf.gram(x, lengthscale=1.0)
    assert np.array_equal(k, np.eye(200, dtype=np.float32))
    assert np.isfinite(nf.kernels.Gaussian().matmul(x, -x, np.ones((200, 1), np.float32))).all()


def test_gradients_of_the_product():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    made = [torch.tensor(rng.standard_normal(s), dtype=torch.float32) for s in ((140, 20), (250, 20), (250, 3))]
    scale = torch.tensor(4.0)
    grad = torch.tensor(rng.standard_normal((140, 3)), dtype=torch.float32)
    own = [t.clone().requires_grad_() for t in (*made, scale)]
    nf.kernels.Gaussian(own[3]).matmul(*own[:3]).backward(grad)
    wide = [t.double().requires_grad_() for t in (*made, scale)]
    x, y, v, s = wide
    (torch.exp(-((x[:, None] - y) / s).square().sum(-1) / 2) @ v).backward(grad.double())
    for a, b in zip(own, wide, strict=True):
        assert (a.grad.double() - b.grad).norm() < 1e-5 * b.grad.norm()


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_nothing(threads):
    x, v = points(600, 33), points(600, 2, seed=1)
    kernel = nf.kernels.Gaussian(5.0)
    try:
        nf.set_num_threads(1)
        one = kernel(x), kernel.matmul(x, None, v)
        nf.set_num_threads(threads)
        many = kernel(x), kernel.matmul(x, None, v)
    finally:
        nf.set_num_threads(None)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_bad_input():
    x = points(5, 3)
    for call, error, message in (
        (lambda: nf.kernels.Gaussian(0), ValueError, "^lengthscale: "),
        (lambda: nf.kernels.Gaussian(np.ones(2))(x), ValueError, "^lengthscale: "),
        (lambda: nf.gram(x, kernel="unknown"), ValueError, "^kernel: "),
        (lambda: nf.gram(x, kernel=nf.kernels.Gaussian(), gamma=1), TypeError, "^params: "),
        (lambda: nf.gram(x, kernel="rbf", gamma=-1), ValueError, "^gamma: "),
        (lambda: nf.gram([[1.0]]), TypeError, "^x: "),
        (lambda: nf.kernels.Gaussian().matmul(x, x, x[:4]), ValueError, "^v: expected 5 rows"),
        (lambda: nf.kernels.Gaussian().matmul(x, x, x.astype(np.float64)), TypeError, "^v: "),
    ):
        with pytest.raises(error, match=message):
            call()
