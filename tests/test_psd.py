"""psd_report and is_psd: closed forms, what is not Mercer (with its proof), what is (with its round-off), bad input."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from nearfar import psd
from nearfar.psd import PSDReport, is_psd, psd_report

torch = pytest.importorskip("torch")

GOLDEN = (1 + math.sqrt(5)) / 2
EPS32, EPS64 = 2.0**-23, 2.0**-52


def distances(x):
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))


def line(*values):
    return np.array(values, dtype=np.float64)[:, None]


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def on_sphere(n, d, seed=0):
    x = normal(n, d, seed)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def polygon(n):
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def exact_form(K, c):
    """c^T K c in rational arithmetic: what the entries say, without any rounding."""
    weights = [Fraction(float(w)) for w in c]
    return float(sum(weights[i] * weights[j] * Fraction(float(K[i, j])) for i in range(len(K)) for j in range(len(K))))


def check_witness(K, report):
    """Everything that "not_psd" promises, recomputed from K alone."""
    c = np.asarray(report.witness)
    assert report.verdict == "not_psd"
    assert not report.is_psd
    assert c.dtype == np.float64
    assert c.shape == (len(K),)
    assert np.linalg.norm(c) == pytest.approx(1, abs=1e-14)
    assert report.witness_value < -report.noise_floor
    K = np.asarray(K, np.float64)
    assert c @ K @ c == pytest.approx(report.witness_value, rel=1e-6, abs=1e-13 * np.abs(K).sum(1).max())


def cholesky_works(K, shift):
    K = np.array(K)
    np.fill_diagonal(K, K.diagonal() + K.dtype.type(shift))
    try:
        return bool(np.isfinite(np.linalg.cholesky(K)).all())
    except np.linalg.LinAlgError:
        return False


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_golden_ratio():
    """[[1, 1], [1, 0]] has the eigenvalues phi and -1/phi."""
    K = np.array([[1.0, 1.0], [1.0, 0.0]])
    report = psd_report(K)
    check_witness(K, report)
    assert report.min_eigenvalue == pytest.approx(1 - GOLDEN, rel=1e-14)
    assert report.max_eigenvalue == pytest.approx(GOLDEN, rel=1e-14)
    assert report.witness_value == pytest.approx(1 - GOLDEN, rel=1e-14)
    assert report.noise_floor == pytest.approx(64 * EPS64 * GOLDEN)
    assert report.jitter == pytest.approx(GOLDEN - 1, rel=1e-12)
    assert (report.rank, report.asymmetry, report.method) == (1, 0.0, "eigh")
    assert (report.matvecs, report.miss_probability) == (0, 0.0)


def test_second_difference_matrix():
    """tridiag(-1, 2, -1): 2 - 2 cos(pi k / (n + 1)), positive definite; with a diagonal of 1, it is not."""
    n = 40
    K = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    report = psd_report(K)
    assert report.verdict == "psd"
    assert report.min_eigenvalue == pytest.approx(2 - 2 * math.cos(math.pi / (n + 1)), rel=1e-11)
    assert report.max_eigenvalue == pytest.approx(2 + 2 * math.cos(math.pi / (n + 1)), rel=1e-13)
    assert (report.rank, report.jitter, report.witness, report.witness_value) == (n, 0.0, None, None)
    shifted = psd_report(K - np.eye(n))
    check_witness(K - np.eye(n), shifted)
    assert shifted.min_eigenvalue == pytest.approx(1 - 2 * math.cos(math.pi / (n + 1)), rel=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_scale_changes_nothing(scale):
    K = scale * np.array([[1.0, 2.0], [2.0, 1.0]])
    report = psd_report(K)
    check_witness(
        K / scale,
        dataclasses.replace(
            report, **{name: getattr(report, name) / scale for name in ("witness_value", "noise_floor")}
        ),
    )
    assert report.min_eigenvalue == pytest.approx(-scale, rel=1e-14)
    assert report.jitter == pytest.approx(scale, rel=1e-12)
    assert is_psd(scale * np.array([[2.0, 1.0], [1.0, 2.0]]))


def test_matches_the_eigenvalues_of_a_known_spectrum():
    spectrum = np.array([-0.25, 0.0, 1e-3, 1.0, 7.0])
    q = np.linalg.qr(normal(5, 5))[0]
    K = (q * spectrum) @ q.T
    report = psd_report((K + K.T) / 2)
    assert report.min_eigenvalue == pytest.approx(-0.25)
    assert report.max_eigenvalue == pytest.approx(7.0)
    assert report.rank == 3
    assert abs(q[:, 0] @ report.witness) == pytest.approx(1)


def test_inverse_iteration_equals_all_eigenvectors():
    K = normal(120, 120)
    K = K + K.T
    values, vectors = np.linalg.eigh(K)
    report = psd_report(K)
    assert report.witness_value == pytest.approx(values[0], rel=1e-13)
    assert abs(vectors[:, 0] @ report.witness) == pytest.approx(1)


# ---- not Mercer: every one with its proof ----------------------------------------------------------------------------

ZOO = {
    "tanh(xy)": (line(1, 10), lambda x: np.tanh(x @ x.T), -0.126),
    "tanh(xy - 1)": (line(0), lambda x: np.tanh(x @ x.T - 1), math.tanh(-1)),
    "tanh(xy + 1)": (line(0, 0.5, 1, 1.5, 2, 3), lambda x: np.tanh(x @ x.T + 1), -0.087297),
    "sigmoid in 16 dimensions": (normal(100, 16), lambda x: np.tanh(x @ x.T / 16), -0.5),
    "exp(-d^2.1)": (line(0, 0.05, 0.1), lambda x: np.exp(-(distances(x) ** 2.1)), -0.00101467 / 6),
    "exp(-d^3)": (line(0, 0.3, 0.6), lambda x: np.exp(-(distances(x) ** 3)), -0.175419 / 6),
    "exp(-d^3) in 3 dimensions": (normal(100, 3), lambda x: np.exp(-(distances(x) ** 3)), -0.1),
    "exp(-d_inf) in 3 dimensions": (
        np.array([[1, 0, 0], [-1, 0, 0], [0, -1, -1], [0, -1, 1], [0, 1, -1]], dtype=np.float64),
        lambda x: (6 / 7) ** np.abs(x[:, None] - x[None]).max(-1),
        -6 / 7 / 30,
    ),
    "geodesic Gaussian, square, lambda 0.1": (
        polygon(4),
        lambda x: np.exp(-0.1 * np.arccos(np.clip(x @ x.T, -1, 1)) ** 2),
        -0.759918 / 4,
    ),
    "geodesic Gaussian, 20-gon, lambda 1": (
        polygon(20),
        lambda x: np.exp(-(np.arccos(np.clip(x @ x.T, -1, 1)) ** 2)),
        -8.0e-4 / 20,
    ),
    "geodesic Gaussian on the sphere": (  # -8e-7 of the largest eigenvalue: scikit-learn's tolerance accepts it
        on_sphere(150, 3),
        lambda x: np.exp(-(np.arccos(np.clip(x @ x.T, -1, 1)) ** 2)),
        -1e-5,
    ),
    "periodic in |x - y|, 2 dimensions": (
        normal(60, 2),
        lambda x: np.exp(-2 * np.sin(np.pi * distances(x)) ** 2),
        -1.0,
    ),
    "Epanechnikov": (line(0, 0.5, 1), lambda x: np.maximum(0, 1 - distances(x) ** 2), -1 / 17),
    "biweight": (0.22 * line(0, 1, 2, 3), lambda x: np.maximum(0, 1 - distances(x) ** 2) ** 2, -0.143884 / 232),
    "tophat": (0.51 * line(0, 1, 2), lambda x: (distances(x) < 1).astype(float), -82 / 198),
    "triangle in 2 dimensions": (
        np.stack(np.meshgrid(*[np.linspace(-1, 1, 15)] * 2), -1).reshape(-1, 2),
        lambda x: np.maximum(0, 1 - distances(x)),
        -0.01,
    ),
    "Gaussian cut at 3 sigma": (
        normal(150, 3),
        lambda x: np.where(distances(x) < 3, np.exp(-(distances(x) ** 2) / 2), 0),
        -1e-2,
    ),
    "multiquadric": (line(0, 1), lambda x: np.sqrt(1 + distances(x) ** 2), 1 - math.sqrt(2)),
    "max(0, cos)": (on_sphere(100, 8), lambda x: np.maximum(0, x @ x.T), -0.3),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_not_mercer_is_disproved(name, dtype):
    x, kernel, at_most = ZOO[name]
    K = kernel(x).astype(dtype)
    K = np.maximum(K, K.T)
    if name == "geodesic Gaussian on the sphere" and dtype == "float32":
        assert psd_report(K).verdict == "psd_within_noise"  # the violation is that of rounding to float32
        return
    report = psd_report(K)
    check_witness(K, report)
    assert not is_psd(K)
    assert report.min_eigenvalue <= at_most * (1 - 1e-5)
    if len(K) <= 60:
        assert exact_form(K, report.witness) == pytest.approx(report.witness_value, rel=1e-13)
    kernel_form = psd_report(lambda points: kernel(points).astype(dtype), x)
    assert kernel_form.verdict == "not_psd"


def test_witness_value_is_right_to_the_last_bits():
    """A value of -2^-60 next to entries of 1: plain float64 sums would return 0 or noise."""
    K = np.array([[1.0, 1.0], [1.0, 1.0 - 2.0**-52]])
    c = np.array([1.0, -1.0])
    assert psd.quadratic_form(K, c) == -(2.0**-52)
    x = normal(30, 2)
    K = x @ x.T
    K = (K + K.T) / 2
    for seed in range(20):
        c = np.linalg.qr(np.hstack([x, normal(30, 1, seed)]))[0][:, 2]  # in the null space up to round-off
        assert psd.quadratic_form(K, c) == pytest.approx(exact_form(K, c), rel=1e-9)


# ---- Mercer: accepted, in the arithmetic that made them --------------------------------------------------------------

MERCER = {
    "Gaussian": lambda x: np.exp(-(distances(x) ** 2) / 2),
    "Gaussian, long": lambda x: np.exp(-(distances(x) ** 2) / 2e4),
    "Laplacian": lambda x: np.exp(-distances(x)),
    "rational quadratic": lambda x: 1 / (1 + distances(x) ** 2 / 2),
    "linear": lambda x: x @ x.T,
    "cosine": lambda x: (lambda z: z @ z.T)(x / np.linalg.norm(x, axis=1, keepdims=True)),
    "cubic": lambda x: (x @ x.T + 1) ** 3,
    "constant": lambda x: np.ones((len(x), len(x)), x.dtype),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MERCER)
def test_mercer_is_accepted(name, dtype):
    x = normal(500 if name == "Gaussian" else 120, 4).astype(dtype)
    K = MERCER[name](x)
    assert K.dtype == dtype
    report = psd_report(K)
    assert report.verdict in ("psd", "psd_within_noise")
    assert report.is_psd
    assert is_psd(K)
    assert report.witness is None
    assert report.min_eigenvalue >= -report.noise_floor
    assert report.noise_floor == pytest.approx(
        {"float32": 10 * EPS32, "float64": 64 * EPS64}[dtype] * report.max_eigenvalue
    )
    expected_rank = {"linear": 4, "cosine": 4, "constant": 1, "cubic": 35}  # 35 monomials of degree 3 in 4 variables
    assert report.rank == expected_rank.get(name, report.rank)
    assert cholesky_works(K, report.jitter)
    assert psd_report(MERCER[name], x).min_eigenvalue == pytest.approx(report.min_eigenvalue, abs=report.noise_floor)


def test_constant_kernel_of_many_points():
    """The eigen-solver's own round-off is 13 eps lambda_max here, on a matrix without any: it must not count."""
    report = psd_report(np.ones((1000, 1000)))
    assert report.is_psd
    assert report.rank == 1
    assert psd_report(np.ones((1000, 1000)), tol=0).verdict != "not_psd"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_floor_is_that_of_its_own_dtype(dtype):
    x = torch.tensor(normal(200, 3))
    K = torch.exp(-(torch.cdist(x, x) ** 2) / 2).to(dtype)
    report = psd_report(K)
    assert report.verdict == "psd_within_noise"
    assert report.noise_floor == pytest.approx(10 * torch.finfo(dtype).eps * report.max_eigenvalue)
    assert psd_report(K.float()).verdict == "not_psd"  # as float32 entries they are wrong, and this is a proof
    assert cholesky_works(K.float().numpy(), report.jitter)


# ---- jitter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*MERCER, "exp(-d^3) in 3 dimensions", "Epanechnikov"])
def test_jitter_is_sufficient_and_nearly_least(name, dtype):
    K = MERCER[name](normal(150, 3)) if name in MERCER else ZOO[name][1](ZOO[name][0])
    K = K.astype(dtype)
    K = np.maximum(K, K.T)
    report = psd_report(K)
    assert cholesky_works(K, report.jitter)
    if report.jitter == 0.0:
        assert report.min_eigenvalue > 0
    else:
        assert not cholesky_works(K, 0.25 * report.jitter)  # nearer, rounding and the number of threads decide
    if report.verdict == "not_psd":
        eps = {"float32": EPS32, "float64": EPS64}[dtype]
        assert report.jitter == pytest.approx(-report.min_eigenvalue, abs=300 * eps * report.max_eigenvalue)


def test_jitter_scales_with_the_matrix():
    K = MERCER["Gaussian"](normal(300, 3)).astype(np.float32)
    one, big = psd_report(K).jitter, psd_report(2.0**20 * K).jitter
    assert one > 0
    assert big == pytest.approx(2.0**20 * one, rel=1e-6)


def test_jitter_of_singular_corners():
    assert psd_report(np.eye(3)).jitter == 0.0
    for K in (np.zeros((3, 3)), np.diag([1.0, 0.0])):
        jitter = psd_report(K).jitter
        assert 0 < jitter < 1e-300
        assert cholesky_works(K, jitter)
    assert psd_report(-np.ones((1, 1))).jitter == pytest.approx(1, rel=1e-12)
    assert psd_report(np.full((1, 1), np.finfo(np.float32).max, np.float32)).jitter == 0.0


# ---- asymmetry and tol -----------------------------------------------------------------------------------------------


def test_asymmetric_input_raises():
    K = np.eye(3)
    K[0, 2] = 1e-3
    for check in (is_psd, psd_report):
        with pytest.raises(ValueError, match=r"^K: .*symmetric.*0\.001"):
            check(K)
        with pytest.raises(ValueError, match=r"^K: "):
            check(K, tol=1e-4)
    assert is_psd(K, tol=1e-3)
    report = psd_report(K, tol=1e-3)
    assert report.asymmetry == 1e-3
    assert report.min_eigenvalue == pytest.approx(1 - 5e-4)  # of (K + K^T) / 2


@pytest.mark.parametrize(("dtype", "eps"), [("float32", EPS32), ("float64", EPS64)])
def test_asymmetry_of_round_off_is_reported(dtype, eps):
    K = np.eye(300, dtype=dtype)
    K[7, 280] = 4 * eps
    report = psd_report(K)
    assert report.verdict == "psd"
    assert report.asymmetry == 4 * eps
    assert is_psd(K)
    assert is_psd(K, tol=0)  # tol says how negative an eigenvalue may be; it does not forbid round-off in the halves
    K[7, 280] = 100 * eps
    with pytest.raises(ValueError, match="symmetric"):
        psd_report(K)


def test_witness_disproves_the_matrix_as_it_was_given():
    K = np.array([[1.0, 4.25], [3.75, 1.0]])
    report = psd_report(K, tol=0.5)
    assert report.asymmetry == 0.5
    assert report.witness @ K @ report.witness == pytest.approx(-3)
    assert report.witness_value == pytest.approx(-3)


def test_tol_is_the_noise_floor():
    K = np.diag([-0.01, 0.5, 3.0])
    assert psd_report(K).verdict == "not_psd"
    for tol, verdict, rank in [
        (0.0, "not_psd", 2),
        (0.009, "not_psd", 2),
        (0.01, "psd_within_noise", 2),
        (1, "psd_within_noise", 1),
    ]:
        report = psd_report(K, tol=tol)
        assert (report.verdict, report.noise_floor, report.rank) == (verdict, tol, rank)
        assert is_psd(K, tol) == report.is_psd
        assert (report.witness is None) == report.is_psd
    assert psd_report(K, tol=np.float32(0.5)).noise_floor == 0.5
    for tol in (-1.0, math.nan, math.inf):
        for check in (is_psd, psd_report):
            with pytest.raises(ValueError, match=r"^tol: "):
                check(K, tol=tol)
    with pytest.raises(TypeError, match=r"^tol: "):
        psd_report(K, tol="tight")


def test_undecided_when_no_vector_confirms_the_solver(monkeypatch):
    """As for ones(1000) at tol=0: the solver returns negative eigenvalues that are not there."""
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: np.array([-1e-13, 0.0, 3.0]))
    report = psd_report(np.ones((3, 3)), tol=0.0)
    assert (report.verdict, report.is_psd, report.witness, report.witness_value) == ("undecided", False, None, None)
    assert "undecided" in str(report)
    assert not is_psd(np.ones((3, 3)), tol=0.0)


def test_tol_zero_sees_below_the_noise_floor():
    """An eigenvalue of -2^-48, 8 eps lambda_max: round-off by default, a proof about the stored entries at tol=0."""
    K = np.array([[1.0, 1.0], [1.0, 1.0 - 2.0**-47]])
    assert psd_report(K).verdict == "psd_within_noise"
    report = psd_report(K, tol=0.0)
    assert report.verdict == "not_psd"
    assert exact_form(K, report.witness) == pytest.approx(report.witness_value, rel=1e-13)
    assert report.witness_value == pytest.approx(-(2.0**-48), rel=0.1)


# ---- large K: sub-samples first --------------------------------------------------------------------------------------


def test_large_matrix_is_disproved_by_a_sub_sample(monkeypatch):
    monkeypatch.setattr(psd, "DENSE_LIMIT", 300)
    x = normal(600, 3)
    K = np.exp(-(distances(x) ** 3))
    exact = np.linalg.eigvalsh(K)
    report = psd_report(K, seed=3)
    check_witness(K, report)
    assert report.method == "subsample"
    assert np.count_nonzero(report.witness) <= 64
    assert exact[0] <= report.min_eigenvalue == report.witness_value
    assert report.max_eigenvalue <= exact[-1]
    assert report.noise_floor >= 64 * EPS64 * exact[-1]
    assert report.rank <= np.count_nonzero(exact > report.noise_floor)
    assert cholesky_works(K, report.jitter)
    assert not cholesky_works(K, 0.9 * report.jitter)
    assert not is_psd(K)
    again = psd_report(K, seed=3)
    np.testing.assert_array_equal(again.witness, report.witness)
    assert not np.array_equal(psd_report(K, seed=4).witness, report.witness)
    assert "at most" in str(report)


def test_large_matrix_that_no_sub_sample_disproves(monkeypatch):
    monkeypatch.setattr(psd, "DENSE_LIMIT", 300)
    good = np.exp(-(distances(normal(400, 3)) ** 2) / 2).astype(np.float32)
    assert (psd_report(good).is_psd, psd_report(good).method) == (True, "eigh")
    hidden = np.eye(400)  # one bad pair of 400: every small sample may miss it, the solver may not
    hidden[10, 350] = hidden[350, 10] = 1.5
    report = psd_report(hidden)
    assert report.verdict == "not_psd"
    assert report.min_eigenvalue == pytest.approx(-0.5, abs=1e-12)


def test_violation_among_neighbours_is_found(monkeypatch):
    """Clusters far apart: the kernel goes wrong only within them."""
    monkeypatch.setattr(psd, "DENSE_LIMIT", 500)
    x = normal(600, 2) * 0.5 + 100.0 * (np.arange(600)[:, None] // 20)
    report = psd_report(np.exp(-(distances(x) ** 3)))
    assert (report.verdict, report.method) == ("not_psd", "subsample")


def test_kernel_beyond_the_limit_is_refused_before_it_is_evaluated():
    def kernel(x):
        raise AssertionError("evaluated")

    x = np.zeros((psd.DENSE_LIMIT + 1, 1), np.float32)
    with pytest.raises(NotImplementedError, match=rf"^x: .*{psd.DENSE_LIMIT}"):
        psd_report(kernel, x)


# ---- shapes, kinds, dtypes -------------------------------------------------------------------------------------------


def test_no_points():
    report = psd_report(np.zeros((0, 0)))
    assert (report.verdict, report.is_psd, report.rank, report.jitter) == ("psd", True, 0, 0.0)
    assert (report.min_eigenvalue, report.max_eigenvalue, report.noise_floor, report.asymmetry) == (0.0, 0.0, 0.0, 0.0)
    assert is_psd(np.zeros((0, 0), np.float32))


@pytest.mark.parametrize(("value", "verdict", "rank"), [(2.0, "psd", 1), (0.0, "psd", 0), (-3.0, "not_psd", 0)])
def test_one_point(value, verdict, rank):
    report = psd_report(np.array([[value]]))
    assert (report.verdict, report.rank) == (verdict, rank)
    assert report.min_eigenvalue == report.max_eigenvalue == value
    if verdict == "not_psd":
        assert (abs(report.witness[0]), report.witness_value) == (1.0, value)


def test_zero_and_negative_matrices():
    report = psd_report(np.zeros((5, 5)))
    assert (report.verdict, report.rank, report.noise_floor) == ("psd", 0, 0.0)
    report = psd_report(-np.ones((50, 50)))
    assert (report.verdict, report.rank) == ("not_psd", 0)
    assert report.min_eigenvalue == pytest.approx(-50)
    check_witness(-np.eye(4), psd_report(-np.eye(4)))


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 3)])
def test_wrong_shape(shape):
    for K in (np.zeros(shape), torch.zeros(shape)):
        for check in (is_psd, psd_report):
            with pytest.raises(ValueError, match=r"^K: .*square"):
                check(K)


@pytest.mark.parametrize(
    "K",
    [
        [[1.0, 0.0], [0.0, 1.0]],
        np.eye(2, dtype=int),
        np.eye(2, dtype=complex),
        np.eye(2, dtype=bool),
        torch.eye(2, dtype=torch.int64),
        torch.eye(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        None,
        3.0,
    ],
    ids=lambda K: f"{type(K).__name__}-{getattr(K, 'dtype', '')}-{getattr(K, 'layout', '')}",
)
def test_wrong_type(K):
    for check in (is_psd, psd_report):
        with pytest.raises(TypeError, match=r"^K: "):
            check(K)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value):
    K = np.eye(300)
    K[280, 3] = K[3, 280] = value
    for check in (is_psd, psd_report):
        with pytest.raises(ValueError, match=r"^K: .*finite.*K\[3, 280\]"):
            check(K)


def test_tensor_on_another_device():
    with pytest.raises(NotImplementedError, match=r"^K: .* got meta"):
        is_psd(torch.eye(3, device="meta"))


def test_kernel_form_arguments():
    def kernel(x):
        return x @ x.T

    x = normal(5, 2)
    assert psd_report(kernel, x).rank == 2
    assert psd_report(kernel, torch.tensor(x)).rank == 2
    with pytest.raises(TypeError, match=r"^x: "):
        psd_report(kernel)
    with pytest.raises(TypeError, match=r"^x: "):
        psd_report(kernel, x.tolist())
    with pytest.raises(TypeError, match=r"^x: "):
        psd_report(kernel, np.ones((5, 2), int))
    with pytest.raises(ValueError, match=r"^x: "):
        psd_report(kernel, x[0])
    with pytest.raises(TypeError, match=r"^x: "):
        psd_report(np.eye(5), x)
    with pytest.raises(ValueError, match=r"^K: .*kernel\(x\)"):
        psd_report(lambda x: x, x)
    with pytest.raises(TypeError, match=r"^K: "):
        psd_report(lambda x: (x @ x.T).tolist(), x)
    with pytest.raises(TypeError, match=r"^K: "):
        is_psd(kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_input(dtype):
    K = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=dtype, requires_grad=True)
    report = psd_report(K)
    assert isinstance(report.witness, torch.Tensor)
    assert report.witness.dtype == torch.float64
    check_witness(K.detach().double().numpy(), report)
    assert report.jitter == pytest.approx(1, rel=1e-4)
    assert is_psd(torch.eye(3, dtype=dtype))
    assert not is_psd(K)


def test_any_strides():
    base = normal(12, 12)
    K = base @ base.T
    K = (K + K.T) / 2 - 2 * np.eye(12)
    expected = psd_report(K)
    wide = np.zeros((24, 36))
    wide[::2, ::3] = K
    read_only = K.copy()
    read_only.flags.writeable = False
    for same in (
        np.asfortranarray(K),
        wide[::2, ::3],
        K[::-1, ::-1][::-1, ::-1],
        read_only,
    ):
        report = psd_report(same)
        assert report.min_eigenvalue == pytest.approx(expected.min_eigenvalue)
        assert report.jitter == pytest.approx(expected.jitter)
        np.testing.assert_allclose(np.abs(report.witness), np.abs(expected.witness))
    reversed_ = psd_report(torch.tensor(K).flip(0).flip(1))
    assert reversed_.min_eigenvalue == pytest.approx(expected.min_eigenvalue)
    assert psd_report(np.broadcast_to(np.float64(1.0), (6, 6))).rank == 1
    assert psd_report(torch.ones(()).expand(6, 6)).rank == 1


def test_input_is_left_alone():
    K = MERCER["Gaussian"](normal(50, 2)).astype(np.float32)
    before = K.copy()
    psd_report(K)
    is_psd(K)
    np.testing.assert_array_equal(K, before)


# ---- the report itself -----------------------------------------------------------------------------------------------


def test_report_fields():
    names = (
        "verdict is_psd min_eigenvalue max_eigenvalue noise_floor rank jitter witness witness_value asymmetry method "
        "matvecs miss_probability error_bound"
    )
    assert [field.name for field in dataclasses.fields(PSDReport)] == names.split()
    report = psd_report(np.eye(2))
    for name in ("min_eigenvalue", "max_eigenvalue", "noise_floor", "jitter", "asymmetry", "miss_probability"):
        assert type(getattr(report, name)) is float
    assert type(report.is_psd) is type(is_psd(np.eye(2))) is bool
    assert type(report.rank) is type(report.matvecs) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rank = 5


def test_report_reads():
    text = str(psd_report(np.array([[1.0, 2.0], [2.0, 1.0]])))
    assert text.startswith("not_psd: not positive semi-definite")
    assert "c^T K c = -1" in text
    assert "witness" not in str(psd_report(np.eye(2)))
