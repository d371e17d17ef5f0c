"""Statistics of kernels, positive semi-definiteness, low-rank factors and kernel methods of points on the GPU, against
their definitions in float64 and the CPU path. Where this runs on, and why it shows what it shows: test_cuda.py.
"""

import dataclasses

import generators as g
import numpy as np
import pytest
import test_cuda
import test_statistics
import torch
from test_cuda import DEVICE, gpu_only, tensor
from test_cuda_points import assert_repeats, device_memory, on_cpu

import nearfar as nf
from nearfar import kernel_methods, psd
from nearfar.kernels import statistics

k = nf.kernels
pytestmark = [test_cuda.pytestmark, pytest.mark.usefixtures("device_memory")]
on_device, small_strips = test_cuda.on_device, test_cuda.small_strips
__all__ = ["device_memory"]

KERNELS = (k.Gaussian(2.0), k.Laplacian(5.0), k.Linear(0.5), 0.5 * k.Matern(3.0) + k.Polynomial(2), k.Cosine())
TOLERANCE = {"bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-11}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture
def dense(monkeypatch):
    """The Gram matrix of points on the device, in float64 by the CPU's kernel."""

    def matrix(kernel, x, y=None):
        x, y = (None if z is None else g.numpy_of(z) for z in (x, y))
        return on_cpu(monkeypatch, lambda: kernel(x, y))

    return matrix


def check_scalar(value, expected, dtype, tolerance):
    assert value.shape == ()
    assert value.device.type == DEVICE
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert float(value) == pytest.approx(expected, abs=tolerance)


def close(array, expected, tolerance):
    """A tensor on the device."""
    assert array.device.type == DEVICE
    np.testing.assert_allclose(g.numpy_of(array), expected, rtol=tolerance, atol=tolerance)


# ---- MMD, HSIC, CKA --------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_mmd(kernel, dtype, dense):
    for n, m in ((2, 2), (7, 3), (66, 37)):
        x, y = tensor(g.points(n, 5), dtype), tensor(g.points(m, 5, seed=1) + 0.3, dtype)
        own, other, cross = dense(kernel, x), dense(kernel, y), dense(kernel, x, y)
        for unbiased in (True, False):
            expected = own.mean() + other.mean() - 2 * cross.mean()
            if unbiased:
                inner = [(z.sum() - np.trace(z)) / (len(z) * (len(z) - 1)) for z in (own, other)]
                expected = sum(inner) - 2 * cross.mean()
            check_scalar(
                nf.mmd(x, y, kernel, unbiased), expected, dtype, TOLERANCE[dtype] * (own.mean() + other.mean())
            )


@by_dtype
def test_permutation_test(dtype, monkeypatch):
    monkeypatch.setattr(statistics, "COLUMNS", 4)
    x, y = tensor(g.points(23, 3), dtype), tensor(g.points(17, 3, seed=1), dtype)
    test = nf.mmd_permutation_test(x, y, KERNELS[0], permutations=9, seed=5)
    expected = on_cpu(
        monkeypatch, lambda: nf.mmd_permutation_test(x.cpu(), y.cpu(), KERNELS[0], permutations=9, seed=5)
    )
    np.testing.assert_allclose(test.null, expected.null, atol=TOLERANCE[dtype])
    assert test.statistic == pytest.approx(expected.statistic, abs=TOLERANCE[dtype])
    assert test.p_value == expected.p_value


@by_dtype
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [4, 37, 64, 65, 129])
def test_hsic_and_cka(n, dtype, unbiased, dense):
    x = tensor(g.points(n, 6), dtype)
    y = tensor(g.points(n, 6)[:, :3] ** 2 + g.points(n, 3, seed=1), dtype)
    for pair in zip(KERNELS, (*KERNELS[1:], KERNELS[0]), strict=True):
        own, other = dense(pair[0], x), dense(pair[1], y)
        scale = np.abs(own).max() * np.abs(other).max() / min(n / 4, 8)
        expected = test_statistics.dense_hsic(own, other, unbiased)
        check_scalar(nf.hsic(x, y, *pair, unbiased), expected, dtype, 3 * TOLERANCE[dtype] * scale)
        expected = test_statistics.dense_cka(own, other, unbiased)
        check_scalar(nf.cka(x, y, pair, unbiased), expected, dtype, 10 * TOLERANCE[dtype])
    own, other = (dense(k.Linear(), z) for z in (x, y))
    expected = test_statistics.dense_cka(own, other, unbiased)
    check_scalar(nf.cka(x, y, unbiased=unbiased), expected, dtype, 10 * TOLERANCE[dtype])
    check_scalar(nf.cka(x, torch.ones_like(y), unbiased=unbiased), 0, dtype, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 63, 64, 65, 128, 129])
def test_gradients_at_all_sizes(n, unbiased, dtype):
    test_statistics.check_gradients(max(n, 4) if unbiased else n, unbiased, dtype, DEVICE)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize("unbiased", [False, True])
def test_several_blocks(unbiased, dense):
    x, y = tensor(g.points(259, 20), "float32"), tensor(g.points(259, 2, seed=1), "float32")
    kernels = k.Gaussian(6.0), k.Laplacian(2.0) + k.Polynomial(2)
    expected = test_statistics.dense_cka(dense(kernels[0], x), dense(kernels[1], y), unbiased)
    check_scalar(nf.cka(x, y, kernels, unbiased), expected, "float32", 1e-5)
    test_statistics.check_gradients(130, unbiased, "float32", DEVICE)


def test_nearly_constant_kernels_keep_digits(dense):
    """Every entry is 1 to some digits, and the few columns that are looked at first are of one class, or of each."""
    for group in (np.arange(300) % 3, np.arange(300) // 150):
        x, y = (g.points(300, d, seed=d) + group[:, None] for d in (5, 2))
        for scale, tolerance in ((1e3, 1e-9), (30.0, 1e-11)):
            for unbiased in (False, True):
                own, other = (tensor(z, "float64") for z in (x, y))
                kernel = k.Gaussian(scale)
                expected = test_statistics.dense_cka(*(1 - dense(kernel, z) for z in (own, other)), unbiased)
                value = nf.cka(own, other, kernel, unbiased)
                check_scalar(value, expected, "float64", tolerance)


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients(unbiased, monkeypatch):
    leaves = [tensor(z, "float64").requires_grad_() for z in (g.points(13, 3), g.points(13, 2, seed=1), 1.3)]

    def gradients(x, y, scale):
        kernels = k.Gaussian(scale), k.Matern(2.0)
        value = nf.cka(x, y, kernels, unbiased) + nf.hsic(x, y, *kernels, unbiased) + nf.cka(x, y, unbiased=unbiased)
        return torch.autograd.grad(value + nf.mmd(x[:, :2], y, kernels[0], unbiased), (x, y, scale))

    wide = [leaf.detach().cpu().as_subclass(torch.Tensor).requires_grad_() for leaf in leaves]
    expected = on_cpu(monkeypatch, lambda: gradients(*wide))
    for grad, other in zip(gradients(*leaves), expected, strict=True):
        assert grad.device.type == DEVICE
        g.assert_gradient(grad, other, 1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_second_derivatives(unbiased):
    leaves = [tensor(z, "float64").requires_grad_() for z in (g.points(6, 3), g.points(6, 2, seed=1), 1.3)]

    def value(x, y, scale):
        kernels = k.Gaussian(scale), k.Matern(2.0)
        return nf.cka(x, y, kernels, unbiased) + nf.hsic(x, y, *kernels, unbiased)

    assert torch.autograd.gradcheck(value, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, leaves, fast_mode=True)


def test_kernels_that_are_no_program(monkeypatch):
    """They take tiles, which agree with the fused pass."""
    monkeypatch.setattr(statistics, "TILE", 16)
    custom = k.Custom(lambda r: torch.exp(-r / 8), lambda r: -torch.exp(-r / 8) / 8)
    x, y = tensor(g.points(50, 3), "float64"), tensor(g.points(50, 2, seed=1), "float64")
    for unbiased in (False, True):
        fused = nf.cka(x, y, k.Gaussian(2.0), unbiased)
        close(nf.cka(x, y, (custom, k.Gaussian(2.0)), unbiased), float(fused), 1e-10)


def test_statistics_repeat_bit_for_bit(monkeypatch):
    def run():
        x, y = (tensor(g.points(70, 3, seed=s), "float32").requires_grad_() for s in range(2))
        values = [
            nf.mmd(x, y, k.Gaussian(2.0)),
            nf.hsic(x, y, "laplacian"),
            nf.cka(x, y, "gaussian", True),
            nf.cka(x, y),
        ]
        return [z.detach() for z in (*values, *torch.autograd.grad(sum(values), (x, y)))]

    assert_repeats(monkeypatch, run)


@gpu_only
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
def test_no_hidden_synchronisation_and_graph_capture():
    x, y = (tensor(g.points(300, 20, seed=s), "float32").requires_grad_() for s in range(2))
    scale = torch.tensor(3.0, device="cuda", requires_grad=True)

    def both():
        value = nf.cka(x, y, (k.Gaussian(scale), k.Matern(2.0) * k.Polynomial(2))) + nf.hsic(x, y, unbiased=True)
        return [value, *torch.autograd.grad(value, [x, y, scale])]

    def change():
        scale.fill_(1.5)
        x.mul_(0.9)

    test_cuda.assert_replays(both, change)
    with test_cuda.no_synchronisation():
        both()


def test_bad_rows_and_bad_input():
    x, y = tensor(g.points(9, 3), "float32"), tensor(g.points(9, 3, seed=1), "float32")
    with pytest.raises(ValueError, match=r"^y: expected 3 columns to match x, got shape \(9, 2\)"):
        nf.mmd(x, y[:, :2])
    with pytest.raises(ValueError, match=r"^y: expected 9 rows to match x, got shape \(4, 3\)"):
        nf.hsic(x, y[:4])
    with pytest.raises(ValueError, match="^x: expected at least 4 rows with unbiased=True, got 3"):
        nf.cka(x[:3], y[:3], unbiased=True)
    x[2, 1] = torch.nan
    leaf = x.clone().requires_grad_()
    nf.cka(leaf, y, "gaussian").backward()
    assert leaf.grad.isnan().all()
    for value in (nf.mmd(x, y), nf.hsic(x, y), nf.cka(x, y), nf.cka(x, y, "gaussian", True)):
        assert value.isnan()
    assert np.isnan(nf.mmd_permutation_test(x, y, permutations=2).p_value)


# ---- positive semi-definite ------------------------------------------------------------------------------------------


def same_report(report, expected, tolerance=1e-9):
    for field in dataclasses.fields(report):
        own, other = getattr(report, field.name), getattr(expected, field.name)
        if field.name == "witness" and other is not None:
            close(own.abs(), np.abs(g.numpy_of(other)), 1e-6)
        elif isinstance(other, float) and field.name not in ("asymmetry", "jitter"):
            assert own == pytest.approx(other, rel=1e-6, abs=tolerance * abs(expected.max_eigenvalue)), field.name
        elif not isinstance(other, float):
            assert own == other, field.name


@by_dtype
def test_reports_of_matrices(dtype, monkeypatch):
    points = g.points(30, 4)
    for matrix in (points @ points.T, points @ points.T - np.eye(30), np.eye(30)):
        given = tensor(matrix, dtype)
        expected = on_cpu(monkeypatch, lambda m=given: nf.psd_report(m.cpu()))
        same_report(nf.psd_report(given), expected)
        assert nf.is_psd(given) == expected.is_psd
    with pytest.raises(ValueError, match="^K: expected finite"):
        nf.is_psd(tensor(np.full((3, 3), np.nan), dtype))


@pytest.mark.parametrize("kernel", [k.Gaussian(2.0), k.Sigmoid(1.0, -1.0)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reports_of_kernels(kernel, dtype, monkeypatch):
    x = tensor(g.points(40, 3), dtype)
    report = nf.psd_report(kernel, x)
    expected = on_cpu(monkeypatch, lambda: nf.psd_report(kernel, x.cpu()))
    assert report.verdict == expected.verdict
    assert report.min_eigenvalue == pytest.approx(expected.min_eigenvalue, abs=2e-5 * expected.max_eigenvalue)
    if report.witness is not None:
        assert report.witness.device.type == DEVICE


@pytest.mark.parametrize(
    ("kernel", "verdict"), [(k.Gaussian(2.0), "psd_within_noise"), (k.Sigmoid(1.0, -1.0), "not_psd")], ids=repr
)
def test_reports_of_kernels_that_are_not_stored(kernel, verdict, monkeypatch, dense):
    monkeypatch.setattr(psd, "DENSE_LIMIT", 100)
    x = tensor(g.points(130, 3), "float64")
    report = nf.psd_report(kernel, x)
    values = np.linalg.eigvalsh(dense(kernel, x))
    noise = 1e-12 * np.abs(values).max()
    assert report.verdict == verdict
    assert values[0] - noise <= report.min_eigenvalue
    assert report.min_eigenvalue - report.error_bound <= values[0] + noise
    if verdict == "not_psd":
        witness = g.numpy_of(report.witness)
        assert report.witness.device.type == DEVICE
        assert witness @ dense(kernel, x) @ witness == pytest.approx(report.witness_value, abs=1e-9)
    x[3, 0] = torch.nan
    with pytest.raises(ValueError, match="^x: expected finite numbers, got NaN or inf"):
        nf.psd_report(kernel, x)


def test_check_mercer():
    x = tensor([[0.0], [0.5], [1.0], [1.5], [2.0], [3.0]], "float64")
    report = k.check_mercer(k.Sigmoid(gamma=1.0), x)
    assert report.verdict == "disproved"
    assert report.report.witness.device.type == DEVICE
    minus_distance = k.check_mercer(lambda z: -(z - z.T).abs(), x, conditional=True)
    assert minus_distance.verdict == "undecided"


# ---- low rank --------------------------------------------------------------------------------------------------------


def check_low_rank(low, kernel, x, dense, dtype):
    """factor factor^T is below K; its error is the trace of the difference; products, features of other points."""
    factor, matrix = g.numpy_of(low.factor), dense(kernel, x)
    left, trace = matrix - factor @ factor.T, np.trace(matrix)
    eps = 4e-16 if dtype == "float64" else 2e-7
    for array in (low.factor, low.landmarks):
        assert array.device.type == DEVICE
        assert array.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert low.error == pytest.approx(np.trace(left), abs=20 * eps * trace)
    assert np.linalg.eigvalsh(left)[0] > -20 * eps * trace
    v = tensor(g.rng(7).standard_normal((len(matrix), 2)), str(low.factor.dtype).removeprefix("torch."))
    close(low.matmul(v), factor @ (factor.T @ g.numpy_of(v)), 200 * eps * trace)
    close(low.transform(x), factor, 1e-4 if dtype != "float64" else 1e-7)


@by_dtype
def test_pivoted_cholesky(dtype, dense, monkeypatch):
    x = tensor(g.points(50, 3), dtype)
    for kernel in (k.Gaussian(2.0), k.Linear(1.0) + k.Matern(3.0)):
        low = nf.pivoted_cholesky(kernel, x, 8, 0.0)
        check_low_rank(low, kernel, x, dense, dtype)
        expected = on_cpu(monkeypatch, lambda f=kernel: nf.pivoted_cholesky(f, x.cpu(), 8, 0.0))
        np.testing.assert_array_equal(low.indices, expected.indices)
    with pytest.raises(ValueError, match="^kernel: .* is not positive semi-definite at x"):
        nf.pivoted_cholesky(k.Sigmoid(1.0, -1.0), x, 8)


@by_dtype
def test_nystrom(dtype, dense):
    x = tensor(g.points(50, 3), dtype)
    kernel = k.Gaussian(2.0)
    rows = np.array([1, 5, 20])
    for landmarks in (12, rows, torch.from_numpy(rows).to(DEVICE), x[:6]):
        low = nf.nystrom(kernel, x, landmarks)
        check_low_rank(low, kernel, x, dense, dtype)
    np.testing.assert_array_equal(nf.nystrom(kernel, x, torch.from_numpy(rows).to(DEVICE)).indices, rows)


@by_dtype
def test_random_features(dtype, dense):
    x, y = tensor(g.points(20, 3), dtype), tensor(g.points(15, 3, seed=1), dtype)
    scale = tensor(2.0, "float64")
    features = nf.random_features(k.Gaussian(scale), 3, 4000)
    own, other = features.transform(x), features.transform(y)
    assert own.device.type == DEVICE
    assert own.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    close(own @ other.T, dense(k.Gaussian(2.0), x, y), 0.1)
    v = y[:, :2].contiguous()
    close(features.matmul(x, y, v), g.numpy_of(own @ other.T) @ g.numpy_of(v), 1e-4)
    exact = np.linalg.norm(dense(k.Gaussian(2.0), x) - g.numpy_of(own) @ g.numpy_of(own).T)
    assert features.error(x, probes=200) == pytest.approx(exact, rel=0.2)
    leaf = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(nf.random_features(k.Matern(2.0), 3, 4).transform, leaf)


# ---- kernel methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["nystrom", "pivoted_cholesky", None])
@pytest.mark.parametrize("targets", [1, 2])
def test_ridge(preconditioner, targets, dense):
    x = tensor(g.points(60, 3), "float64")
    y = torch.sin(x @ tensor(g.rng(1).standard_normal((3, targets)), "float64"))
    y = y[:, 0] if targets == 1 else y
    kernel = k.Gaussian(2.0) + k.Linear()
    expected = np.linalg.solve(dense(kernel, x) + 0.1 * np.eye(60), g.numpy_of(y))
    model = nf.KernelRidge(kernel, 0.1, tol=1e-10, preconditioner=preconditioner, rank=20).fit(x, y)
    close(model.dual_coef_, expected, 1e-7 * np.abs(expected).max())
    new = tensor(g.points(9, 3, seed=5), "float64")
    close(model.predict(new), dense(kernel, new, x) @ expected, 1e-7)
    direct = nf.KernelRidge(kernel, 0.1, "cholesky").fit(x, y)
    close(direct.dual_coef_, expected, 1e-9 * np.abs(expected).max())
    weights = tensor(g.rng(2).uniform(1, 2, 60), "float64")
    assert model.score(x, y, weights) == pytest.approx(direct.score(x, y, g.numpy_of(weights)), abs=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ridge_in_single_precision(dtype):
    x = tensor(g.points(60, 3), dtype)
    y = x[:, 0].float().sin()
    model = nf.KernelRidge(k.Gaussian(2.0), 1.0, tol=1e-4).fit(x, y)
    assert model.dual_coef_.dtype == model.predict(x).dtype == torch.float32
    assert model.dual_coef_.device.type == model.X_fit_.device.type == DEVICE
    assert model.residuals_[-1] <= 2e-4


@pytest.mark.parametrize("limit", [512, 4])
def test_principal_components(limit, dense, monkeypatch):
    monkeypatch.setattr(kernel_methods, "DENSE_COMPONENTS", limit)
    x = tensor(g.points(130, 5) * [9, 5, 1, 1, 1], "float64")
    pca = nf.KernelPCA(2, "linear").fit(x)
    wide = g.numpy_of(x)
    close(pca.eigenvalues_, np.linalg.svd(wide - wide.mean(0))[1][:2] ** 2, 1e-5)
    close(pca.fit_transform(x), g.numpy_of(pca.transform(x)), 1e-6)
    assert pca.eigenvectors_.device.type == DEVICE
    assert (pca.n_iter_ == 1) == (limit == 512)


def test_kernel_methods_refuse_bad_points():
    x = tensor(g.points(20, 3), "float32")
    x[4, 1] = torch.inf
    for model in (nf.KernelRidge(), nf.KernelPCA()):
        with pytest.raises(ValueError, match="^X: expected finite numbers, got NaN or inf"):
            model.fit(x, x[:, 0])
    with pytest.raises(ValueError, match="^y: expected finite numbers, got NaN or inf"):
        nf.KernelRidge().fit(x[:4], x[1:5, 1])


def test_operator(dense):
    pytest.importorskip("scipy")
    x = tensor(g.points(20, 3), "float64")
    v = g.rng(0).standard_normal(20)
    np.testing.assert_allclose(k.Gaussian(2.0).operator(x) @ v, dense(k.Gaussian(2.0), x) @ v, atol=1e-12)
