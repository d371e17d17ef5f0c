"""psd_report of a kernel whose Gram matrix is not stored, against LAPACK on the stored one."""

import math

import numpy as np
import pytest
import torch
from generators import points, rng

import nearfar as nf
from nearfar import psd, psd_implicit
from nearfar.lanczos import BlockLanczos, missed_part

pytestmark = pytest.mark.isa

k = nf.kernels


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setattr(psd, "DENSE_LIMIT", 100)


def exact(kernel, x):
    return np.linalg.eigvalsh(kernel(np.asarray(x, np.float64)))


def check(report, kernel, x):
    """Everything a report promises, from the stored matrix in float64."""
    values = exact(kernel, x)
    noise = 10 * 2.0**-23 * np.abs(values).max() if x.dtype == np.float32 else 1e-12 * np.abs(values).max()
    assert values[0] - noise <= report.min_eigenvalue
    assert report.min_eigenvalue - report.error_bound <= values[0] + noise
    assert report.max_eigenvalue <= values[-1] + noise
    assert report.rank <= np.count_nonzero(values > report.noise_floor - noise)
    assert report.is_psd == (report.verdict in ("psd", "psd_within_noise"))
    if report.verdict == "not_psd":
        c = report.witness
        assert np.linalg.norm(c) == pytest.approx(1, abs=1e-12)
        value = c @ kernel(np.asarray(x, np.float64)) @ c
        assert value == pytest.approx(report.witness_value, abs=1e-11 * np.abs(values).max())
        assert report.witness_value < -report.noise_floor
    else:
        assert values[0] >= -report.noise_floor - noise or report.verdict == "undecided"
        assert report.witness is None
        assert report.witness_value is None
    return values


def problem(seed):
    """Kernels that are Mercer, that are not, and that are not by little, on points in 1 to 20 dimensions."""
    random = rng(seed)
    d = int(random.integers(1, 21))
    x = (points(200, d, seed=seed) * random.uniform(0.3, 2)).astype(random.choice(["float32", "float64"]))
    scale = math.sqrt(d) * random.uniform(0.3, 3)
    kernels = (
        k.Gaussian(scale),
        k.Matern(scale, nu=0.5),
        k.Gaussian(scale) + (-random.uniform(0, 0.5)) * k.Gaussian(random.uniform(0.5, 2) * scale),
        k.Polynomial(3, coef0=random.uniform(-2, 1)),
        k.Sigmoid(coef0=random.uniform(-1, 1)),
        k.Linear(random.uniform(-1, 1)),
        k.Laplacian(scale) + (-1e-3) * k.Gaussian(scale),
    )
    return kernels[seed % len(kernels)], x


@pytest.mark.parametrize("seed", range(50))
def test_smallest_eigenvalue_is_within_its_bound(seed):
    kernel, x = problem(seed)
    report = nf.psd_report(kernel, x, seed=seed)
    values = check(report, kernel, x)
    assert math.isnan(report.jitter)
    if values[0] < -20 * report.noise_floor:
        assert report.verdict == "not_psd"
    if kernel.is_mercer:
        assert report.is_psd


def test_bound_decides_without_a_theorem():
    """A smooth kernel that is not known to be Mercer is, at these points: 1.5 k - 0.5 k."""
    x = points(1500, 2, "float32")
    kernel = 1.5 * k.Gaussian(2.0) + (-0.5) * k.Gaussian(2.0)
    assert kernel.is_mercer is None
    report = nf.psd_report(kernel, x)
    check(report, kernel, x)
    assert (report.is_psd, report.method) == (True, "lanczos")
    assert report.miss_probability == 1e-3
    assert 0 < report.matvecs <= 8 * psd_implicit.PASSES
    assert report.min_eigenvalue - report.error_bound > -3 * report.noise_floor


def test_undecided_and_tol():
    """Rough kernels leave a bound above the floor; a coarser floor decides."""
    x = points(600, 8, "float32")
    kernel = 1.5 * k.Matern(3.0, nu=0.5) + (-0.5) * k.Matern(3.0, nu=0.5)
    report = nf.psd_report(kernel, x)
    check(report, kernel, x)
    assert report.verdict == "undecided"
    assert not report.is_psd
    assert "undecided" in str(report)
    assert nf.psd_report(kernel, x, tol=1.05 * report.error_bound).is_psd
    mercer = nf.psd_report(k.Matern(3.0, nu=0.5), x)
    assert (mercer.verdict, mercer.method) == ("psd_within_noise", "lanczos, structure")


def test_subsample_disproves_before_any_product():
    x = points(400, 16)
    report = nf.psd_report(k.Sigmoid(), x, tol=1e-6)
    assert (report.verdict, report.method, report.matvecs) == ("not_psd", "subsample", 0)
    assert np.count_nonzero(report.witness) <= 64
    assert report.error_bound == math.inf
    check(report, k.Sigmoid(), x)


def test_violation_that_no_subsample_shows():
    """One direction of all points together: constant minus its mean."""
    x = points(800, 3)
    kernel = k.Gaussian(0.05) + (-0.01) * k.Gaussian(50.0)
    report = nf.psd_report(kernel, x)
    values = check(report, kernel, x)
    assert (report.verdict, report.method) == ("not_psd", "lanczos")
    assert report.min_eigenvalue == pytest.approx(values[0], rel=5e-2)


def test_kinds_seeds_and_dtypes():
    x = points(200, 3)
    one = nf.psd_report(k.Sigmoid(), x, seed=3)
    tensor = nf.psd_report(k.Sigmoid(coef0=torch.tensor(1.0, requires_grad=True)), torch.from_numpy(x), seed=3)
    assert isinstance(tensor.witness, torch.Tensor)
    assert np.allclose(tensor.witness.numpy(), one.witness)
    assert np.array_equal(nf.psd_report(k.Sigmoid(), x, seed=3).witness, one.witness)
    half = nf.psd_report(k.Gaussian(), x.astype("float16"))
    assert half.is_psd
    assert half.noise_floor == pytest.approx(10 * 2.0**-23 * half.max_eigenvalue)


def test_bad_points():
    x = points(150, 3)
    x[7, 1] = np.nan
    with pytest.raises(ValueError, match="^x: expected finite numbers"):
        nf.psd_report(k.Gaussian(), x)
    with pytest.raises(NotImplementedError, match="^x: 150 points"):
        nf.psd_report(lambda x: x @ x.T, points(150, 3))


# ---- Lanczos ---------------------------------------------------------------------------------------------------------


def test_lanczos_finds_both_ends_and_multiplicities():
    spectrum = np.concatenate([[-3.0, -3.0, -1.0], np.linspace(0, 1, 194), [7.0, 8.0, 8.0]])
    q = np.linalg.qr(rng(1).standard_normal((200, 200)))[0]
    matrix = (q * spectrum) @ q.T
    lanczos = BlockLanczos(rng(2).standard_normal((200, 3)), 20)
    for _ in range(20):
        lanczos.extend(matrix @ lanczos.block)
    values, errors, coefficients = lanczos.ritz()
    assert np.allclose(values[:3], [-3, -3, -1], atol=1e-9)
    assert np.allclose(values[-3:], [7, 8, 8], atol=1e-9)
    vectors = lanczos.vectors(coefficients)
    assert np.allclose(vectors.T @ vectors, np.eye(60), atol=1e-12)
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    assert np.allclose(residuals, errors, atol=1e-10)


def test_lanczos_of_a_space_that_is_exhausted():
    lanczos = BlockLanczos(rng(3).standard_normal((30, 2)), 10)
    for _ in range(10):
        lanczos.extend(2.0 * lanczos.block)
    values, errors, _ = lanczos.ritz()
    assert np.allclose(values, 2, atol=1e-12)
    assert np.all(errors < 1e-12)


def test_probability_to_miss():
    """Of many random starts, none misses by more than the bound at one in a hundred says."""
    n, passes = 200, 12
    diagonal = np.linspace(0, 1, n)[:, None] ** 0.25
    missed = 0
    for seed in range(100):
        lanczos = BlockLanczos(rng(seed).standard_normal((n, 1)), passes)
        for _ in range(passes):
            lanczos.extend(diagonal * lanczos.block)
        missed += lanczos.ritz()[0][0] > missed_part(n, passes, 1, 0.01)
    assert missed <= 1
    assert missed_part(n, 1, 1, 0.01) == math.inf
    assert missed_part(n, 60, 4, 0.01) < missed_part(n, 60, 1, 0.01) < missed_part(n, 30, 1, 0.01)
