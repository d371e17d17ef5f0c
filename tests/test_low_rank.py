"""Pivoted Cholesky, Nystrom and random features against the stored Gram matrix in float64."""

import numpy as np
import pytest
import torch
from generators import numpy_of, of_kind, points, rng
from references import KINDS

import nearfar as nf

pytestmark = pytest.mark.isa

k = nf.kernels
EPS = {"float16": 2e-7, "bfloat16": 2e-7, "float32": 2e-7, "float64": 4e-16}


def check(low, kernel, x, dtype):
    """factor factor^T is below K, its error is the trace of the difference, products are its products."""
    factor, matrix = numpy_of(low.factor), kernel(numpy_of(x))
    left = matrix - factor @ factor.T
    trace = np.trace(matrix)
    assert low.factor.shape == (len(matrix), low.rank)
    assert type(low.factor) is type(x)
    assert low.error == pytest.approx(np.trace(left), abs=20 * EPS[dtype] * trace)
    assert np.linalg.eigvalsh(left)[0] > -20 * EPS[dtype] * trace
    assert np.linalg.norm(left, 2) <= low.error + 20 * EPS[dtype] * trace
    assert np.allclose(numpy_of(low.transform(x)), factor, atol=1e-7 if dtype == "float64" else 1e-3)
    v = rng(7).standard_normal((len(matrix), 3))
    kind = "torch" if isinstance(x, torch.Tensor) else "numpy"
    for own in (str(low.factor.dtype).removeprefix("torch."), dtype):
        v = of_kind(kind, v, own)
        product, v = low.matmul(v), numpy_of(v)
        assert product.dtype == low.factor.dtype
        assert np.allclose(numpy_of(product), factor @ (factor.T @ v), atol=200 * EPS[dtype] * trace)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_pivoted_cholesky(kind, dtype):
    x = of_kind(kind, points(150, 3), dtype)
    for kernel in (k.Gaussian(2.0), k.Linear(1.0) + k.Matern(3.0)):
        low = nf.pivoted_cholesky(kernel, x, 20, 0.0)
        check(low, kernel, x, dtype)
        assert low.rank == len(set(low.indices)) == 20
        assert np.array_equal(numpy_of(low.landmarks), numpy_of(x)[low.indices])
        fine = nf.pivoted_cholesky(kernel, x, 150, 1e-3)
        check(fine, kernel, x, dtype)
        trace = np.trace(kernel(numpy_of(x)))
        assert fine.error <= 1e-3 * trace
        shorter = nf.pivoted_cholesky(kernel, x, fine.rank - 1, 0.0)
        assert shorter.error > 1e-3 * trace  # it stopped at the first that suffices


def test_pivoted_cholesky_follows_the_definition():
    """The same pivots and factor as elimination on the stored matrix."""
    x, kernel = points(60, 2), k.Gaussian(1.5)
    low = nf.pivoted_cholesky(kernel, x, 12, 0.0)
    left = kernel(x)
    for column in range(12):
        p = int(np.diag(left).argmax())
        assert low.indices[column] == p
        vector = left[:, p] / np.sqrt(left[p, p])
        assert np.allclose(low.factor[:, column], vector, atol=1e-10)
        left = left - np.outer(vector, vector)
    assert np.allclose(low.transform(x), low.factor, atol=1e-8)


def test_low_rank_kernels_are_exact():
    x = points(80, 4)
    for low in (nf.pivoted_cholesky(k.Linear(), x, 50), nf.nystrom(k.Linear(), x, 30)):
        assert low.rank == 4
        assert low.error < 1e-12 * (x**2).sum()
        y = points(9, 4, seed=1)
        assert np.allclose(low.transform(y) @ low.factor.T, y @ x.T, atol=1e-10)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_nystrom(kind, dtype):
    x = of_kind(kind, points(150, 3), dtype)
    kernel = k.Gaussian(2.0)
    for landmarks in (25, np.arange(0, 150, 5), x[:30], 1000):
        low = nf.nystrom(kernel, x, landmarks, seed=1)
        check(low, kernel, x, dtype)
    chosen = numpy_of(kernel(x))[:, :10].astype(float)
    low = nf.nystrom(kernel, x, np.arange(10))
    expected = chosen @ np.linalg.solve(kernel(numpy_of(x)[:10]), chosen.T)
    assert np.allclose(
        numpy_of(low.factor) @ numpy_of(low.factor).T, expected, atol=1e-3 if EPS[dtype] > 1e-10 else 1e-9
    )


def test_greedy_pivots_are_better_than_random_ones():
    x, kernel = points(400, 2), k.Gaussian(1.0)
    greedy = nf.pivoted_cholesky(kernel, x, 40, 0.0).error
    assert all(greedy < nf.nystrom(kernel, x, 40, seed=seed).error for seed in range(5))


@pytest.mark.parametrize(
    "kernel",
    [
        k.Gaussian(1.5),
        k.Gaussian(np.array([1.0, 2.0, 5.0])),
        k.Laplacian(4.0),
        *(k.Matern(2.0, nu=nu) for nu in (0.5, 1.5, 2.5)),
    ],
    ids=repr,
)
def test_random_features(kernel):
    """Entries err by about 1 / sqrt(F), and no bias is left when many are averaged."""
    x, y = points(60, 3), points(40, 3, seed=1)
    features = nf.random_features(kernel, 3, 2000)
    own, other = features.transform(x), features.transform(y)
    assert own.shape == (60, 2000)
    assert np.abs(own @ other.T - kernel(x, y)).max() < 5 / np.sqrt(1000)
    assert np.allclose((own**2).sum(1), 1)
    many = np.mean(
        [(f := nf.random_features(kernel, 3, 2000, seed=s)).transform(x) @ f.transform(y).T for s in range(30)], 0
    )
    assert np.abs(many - kernel(x, y)).max() < 5 / np.sqrt(30 * 1000)
    v = rng(3).standard_normal((40, 2))
    assert np.allclose(features.matmul(x, y, v), own @ (other.T @ v))
    wrong = np.linalg.norm(own @ own.T - kernel(x))
    assert features.error(x, probes=400) == pytest.approx(wrong, rel=0.2)
    moved = features.transform((x + 1000).astype("float32"))
    assert np.abs(moved @ moved.T - kernel(x)).max() < 6 / np.sqrt(1000)


def test_random_features_of_tensors():
    features = nf.random_features("gaussian", 2, 100)
    x = torch.from_numpy(points(5, 2)).requires_grad_()
    assert torch.autograd.gradcheck(features.transform, (x,))
    assert np.allclose(features.transform(x).detach(), features.transform(points(5, 2)))
    assert features.error(x) > 0


def test_bad_input():
    x = points(20, 3)
    for function, error, message in (
        (
            lambda: nf.pivoted_cholesky(k.Sigmoid(coef0=-1.0), 3 * x, 20),
            ValueError,
            "^kernel: .* not positive semi-definite",
        ),
        (lambda: nf.nystrom(k.Sigmoid(coef0=-1.0), 3 * x, 20), ValueError, "^kernel: .* not positive semi-definite"),
        (lambda: nf.pivoted_cholesky(k.Gaussian(), x, 0), ValueError, "^rank: expected at least 1, got 0"),
        (
            lambda: nf.pivoted_cholesky(k.Gaussian(), x, 5, 2.0),
            ValueError,
            "^tol: expected a number from 0 to 1, got 2",
        ),
        (lambda: nf.pivoted_cholesky(k.Gaussian(), x[0], 5), ValueError, "^x: expected shape"),
        (lambda: nf.nystrom(k.Gaussian(), x, x[:, :2]), ValueError, "^landmarks: expected 3 columns"),
        (lambda: nf.nystrom(k.Gaussian(), x, np.ones(3)), TypeError, "^landmarks: expected integers, got float64"),
        (lambda: nf.nystrom(k.Gaussian(), x, np.array([0, 20])), ValueError, "^landmarks: expected rows 0 to 19 of x"),
        (lambda: nf.nystrom(k.Gaussian(), x, np.array([-1])), ValueError, "^landmarks: expected rows 0 to 19 of x"),
        (lambda: nf.random_features(k.Linear(), 3, 10), TypeError, "^kernel: expected Gaussian, Laplacian or Matern"),
        (lambda: nf.random_features(k.Gaussian(), 3, 9), ValueError, "^n_features: expected an even number, got 9"),
        (lambda: nf.random_features(k.Gaussian(), 3, 8).transform(x[:, :2]), ValueError, "^x: expected 3 columns"),
    ):
        with pytest.raises(error, match=message):
            function()
    x[3, 0] = np.nan
    with pytest.raises(ValueError, match="^x: expected finite kernel values"):
        nf.pivoted_cholesky(k.Gaussian(), x, 5)
