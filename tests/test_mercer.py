"""Which functions are Mercer kernels: the table of published results, each with its points and witness."""

import numpy as np
import pytest
import torch
from generators import points

import nearfar as nf

k = nf.kernels


def column(*values):
    return np.array(values, dtype=np.float64)[:, None]


def grid(values, d):
    return np.stack(np.meshgrid(*[values] * d, indexing="ij"), -1).reshape(-1, d)


def distances(x, p=2.0):
    difference = np.abs(x[:, None] - x)
    return difference.max(-1) if p == np.inf else (difference**p).sum(-1) ** (1 / p)


def circle(n):
    """The angles of a regular n-gon on the circle."""
    return column(*(2 * np.pi * np.arange(n) / n))


def geodesic_gaussian(rate):
    def gram(angles):
        difference = np.abs(angles - angles.T) % (2 * np.pi)
        return np.exp(-rate * np.minimum(difference, 2 * np.pi - difference) ** 2)

    return gram


def of_distance(f):
    return lambda x: f(distances(x))


def norm_exponential(p, rate=1.0):
    return lambda x: np.exp(-rate * distances(x, p))


def alternating(n):
    return (-1.0) ** np.arange(n)


K23 = np.array([[1, 0, 0], [-1, 0, 0], [0, -1, -1], [0, -1, 1], [0, 1, -1]], dtype=np.float64)
LINE = column(*np.arange(-10.0, 10.5, 0.5))
SPHERE = np.random.default_rng(0).standard_normal((300, 8))
SPHERE /= np.linalg.norm(SPHERE, axis=1, keepdims=True)
HIGH = np.random.default_rng(1).standard_normal((400, 16))

# (function, points, witness c, c^T K c)
WITNESSED = {
    "tanh(xy)": (k.Sigmoid(1.0, 0.0), column(1, 10), (1, -0.9), -0.228406),
    "tanh(xy - 1)": (k.Sigmoid(1.0, -1.0), column(0), (1,), -0.761594),
    "exp(-r^2.1)": (of_distance(lambda r: np.exp(-(r**2.1))), column(0, 0.05, 0.1), (1, -2, 1), -0.00101467),
    "exp(-r^3)": (of_distance(lambda r: np.exp(-(r**3))), column(0, 0.3, 0.6), (1, -2, 1), -0.175419),
    "exp(-max norm)": (
        norm_exponential(np.inf, np.log(7 / 6)), K23, (3, 3, -2, -2, -2), -6 / 7,
    ),
    "geodesic Gaussian 0.1": (geodesic_gaussian(0.1), circle(4), alternating(4), -0.759918),
    "geodesic Gaussian 0.5": (geodesic_gaussian(0.5), circle(12), alternating(12), -0.0606),
    "geodesic Gaussian 1": (geodesic_gaussian(1.0), circle(20), alternating(20), -8.0e-4),
    "Epanechnikov": (of_distance(lambda r: np.maximum(1 - r**2, 0)), column(0, 0.5, 1), (2, -3, 2), -1),
    "biweight": (
        of_distance(lambda r: np.maximum(1 - r**2, 0) ** 2), 0.22 * column(0, 1, 2, 3), (-4, 10, -10, 4), -0.143884,
    ),
    "triweight": (
        of_distance(lambda r: np.maximum(1 - r**2, 0) ** 3), 0.23 * column(0, 1, 2, 3, 4), (2, -7, 10, -7, 2), -0.242622,
    ),
    "tricube": (
        of_distance(lambda r: np.maximum(1 - r**3, 0) ** 3), 0.15 * column(0, 1, 2), (1, -2, 1), -0.0769384,
    ),
    "cosine window": (
        of_distance(lambda r: np.cos(np.pi * np.minimum(r, 1) / 2)), 0.34 * column(0, 1, 2, 3), (-4, 10, -10, 4),
        -0.786542,
    ),
    "tophat": (of_distance(lambda r: (r < 1).astype(float)), 0.51 * column(0, 1, 2), (-7, 10, -7), -82),
}  # fmt: skip

# (function, points, least eigenvalue or None)
INDEFINITE = {
    "tanh(xy + 1)": (k.Sigmoid(1.0, 1.0), column(0, 0.5, 1, 1.5, 2, 3), -0.087297),
    "exp(-p norm), p = 3": (norm_exponential(3, 0.01), grid(np.arange(-2.0, 3), 3), -6.5e-3),
    "exp(-p norm), p = 4": (norm_exponential(4, 0.01), grid(np.arange(-1.0, 2), 3), -3.1e-3),
    "exp(-p norm), p = 6": (norm_exponential(6, 0.01), grid(np.arange(-1.0, 2), 3), -7.0e-3),
    "exp(-p norm), p = 8": (norm_exponential(8, 0.01), grid(np.arange(-1.0, 2), 3), -8.8e-3),
    "triangle, plane": (of_distance(lambda r: np.maximum(1 - r, 0)), grid(np.linspace(0, 3, 15), 2), None),
    "1 / (1 + r^3)": (of_distance(lambda r: 1 / (1 + r**3)), LINE, None),
    "1 / (1 + r^4)": (of_distance(lambda r: 1 / (1 + r**4)), LINE, None),
    "sinc, 16 dimensions": (of_distance(lambda r: np.sinc(r / np.pi)), HIGH, None),
    "(xy - 1)^2": (k.Polynomial(2, 1.0, -1.0), column(-2, -1, 0, 1, 2), -20),
    "(1 + xy)^1.5": (lambda x: (1 + x @ x.T) ** 1.5, column(*np.linspace(0, 0.95, 8)), -1.045e-4),
    "max(0, cos)": (lambda x: np.maximum(x @ x.T, 0), SPHERE, None),
    "|cos|": (lambda x: np.abs(x @ x.T), SPHERE, None),
    "[cos > 0.5]": (lambda x: (x @ x.T > 0.5).astype(float), SPHERE, None),
    "exp-sine-squared of |x - y|, plane": (
        of_distance(lambda r: np.exp(-2 * np.sin(np.pi * r) ** 2)), points(60, 2), None,
    ),
}  # fmt: skip

# Only conditionally positive definite.
CONDITIONAL = {
    "multiquadric": of_distance(lambda r: -np.sqrt(1 + r**2)),
    "-r": of_distance(lambda r: -r),
    "-log(1 + r^2)": of_distance(lambda r: -np.log1p(r**2)),
    "-r^2": k.Linear() + -1.0 * k.Linear(1.0),
}

MERCER = {
    "exp(-3 norm), plane": (norm_exponential(3), grid(np.arange(11.0) / 2, 2)),
    "exp(-max norm), plane": (norm_exponential(np.inf), grid(np.arange(11.0) / 2, 2)),
    "triangle, line": (of_distance(lambda r: np.maximum(1 - r, 0)), column(*np.linspace(0, 3, 60))),
    "exp(-r^1.5)": (of_distance(lambda r: np.exp(-(r**1.5))), points(150, 3)),
    "exp(cos / 0.1)": (lambda x: np.exp(x @ x.T / 0.1), SPHERE),
    "1 - arccos / pi": (lambda x: 1 - np.arccos(np.clip(x @ x.T, -1, 1)) / np.pi, SPHERE[:100]),
    "geodesic Laplacian": (lambda x: np.exp(-np.arccos(np.clip(x @ x.T, -1, 1))), SPHERE[:100]),
    "sinc, plane": (of_distance(lambda r: np.sinc(r / np.pi)), grid(np.arange(-5.0, 6), 2)),
}


@pytest.mark.parametrize("name", WITNESSED)
def test_published_witnesses(name):
    kernel, x, c, value = WITNESSED[name]
    c = np.array(c, dtype=np.float64)
    assert c @ kernel(x) @ c == pytest.approx(value, rel=2e-5 if abs(value) > 0.1 or "r^2.1" in name else 0.01)
    report = k.check_mercer(kernel, x)
    assert (report.verdict, report.is_mercer) == ("disproved", False)
    found = report.report.witness
    assert found @ kernel(x) @ found == pytest.approx(report.report.witness_value, rel=1e-6)
    assert report.report.witness_value <= value / (c @ c) * (1 - 1e-9)


@pytest.mark.parametrize("name", INDEFINITE)
def test_published_violations(name):
    kernel, x, value = INDEFINITE[name]
    report = k.check_mercer(kernel, x)
    assert report.verdict == "disproved"
    assert report.points is x
    if value is not None:
        assert report.report.min_eigenvalue == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("name", MERCER)
def test_mercer_functions_survive(name):
    kernel, x = MERCER[name]
    assert k.check_mercer(kernel, x).verdict == "undecided"
    assert nf.is_psd(kernel(x))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditionally_positive_definite(name):
    for x in (LINE, points(50, 3)):
        assert k.check_mercer(CONDITIONAL[name], x).verdict == "disproved"
        assert k.check_mercer(CONDITIONAL[name], x, conditional=True).verdict == "undecided"


def test_not_even_conditionally():
    report = k.check_mercer(WITNESSED["exp(-r^3)"][0], LINE, conditional=True)
    assert report.verdict == "disproved"
    c = report.report.witness
    assert abs(c.sum()) < 1e-6
    assert c @ WITNESSED["exp(-r^3)"][0](LINE) @ c == pytest.approx(report.report.witness_value, rel=1e-6)


FAMILIES = [
    k.Gaussian(), k.Laplacian(2.0), k.Matern(nu=0.5), k.Matern(nu=1.5), k.Matern(), k.RationalQuadratic(),
    k.RationalQuadratic(alpha=0.3), k.Periodic(), k.Linear(), k.Linear(2.0), k.Polynomial(), k.Polynomial(coef0=0.0),
    k.Cosine(),
]  # fmt: skip


@pytest.mark.parametrize("kernel", FAMILIES, ids=repr)
def test_families_that_are_mercer(kernel):
    """As stated, as proved, and as the Gram matrices have it."""
    assert kernel.is_mercer is True
    assert k.check_mercer(kernel).verdict == "proved"
    for d in (1, 2, 7):
        for dtype in ("float32", "float64"):
            assert nf.psd_report(kernel(points(150, d, dtype))).is_psd


def test_structure():
    good, bad = k.Gaussian(), k.Sigmoid()
    for kernel, known in (
        (good + good, True), (good * k.Linear(), True), (good**3, True), (2 * good, True), (0 * bad, True),
        (-1 * good, False), (2 * bad, False), (-1 * (0 * good), True), (-1 * (0 * good + 0 * bad), True),
        (good + bad, None), (good * bad, None), (bad**2, None), (-1 * bad, None), (bad, False),
        (k.Linear(-1.0), False), (k.Polynomial(2, coef0=-1.0), False),
        (k.Linear(torch.tensor(1.0, requires_grad=True)), True), (torch.tensor(-1.0) * good, False),
    ):  # fmt: skip
        assert kernel.is_mercer is known, kernel
        assert (k.check_mercer(kernel).verdict == "proved") == (known is True)
    for kernel in (k.Sigmoid(torch.tensor(1.0)), torch.tensor(-1.0) * good):
        assert k.check_mercer(kernel).report.witness_value < 0
    assert str(k.check_mercer(good * good)) == "proved: a product of Mercer kernels (Schur)"


@pytest.mark.parametrize(
    "kernel",
    [k.Sigmoid(), k.Linear(-1.0), -1 * k.Matern(), *(WITNESSED[n][0] for n in ("biweight", "tophat", "exp(-r^3)"))],
)
def test_default_points_find_violations(kernel):
    report = k.check_mercer(kernel)
    assert report.verdict == "disproved"
    c = report.report.witness
    assert c @ kernel(report.points) @ c < 0


def test_a_function_of_two_points_is_refused():
    with pytest.raises(TypeError, match="^kernel: expected a function from points"):
        k.check_mercer(lambda x, y: x @ y.T)


def test_no_violation_on_these_points():
    x = column(1.0)
    assert "known not to be" in k.check_mercer(k.Sigmoid(), x).reason
    report = k.check_mercer(k.Sigmoid() + k.Gaussian(), x)
    assert (report.verdict, report.is_mercer, report.report) == ("undecided", None, None)
    assert str(report) == "undecided: no violation in 1 Gram matrix"


def test_dimension_of_a_kernel():
    """Default points of another dimension than the kernel's are left out."""
    assert k.check_mercer(k.Sigmoid() + k.Gaussian(np.ones(3))).verdict in ("disproved", "undecided")


def test_torch():
    x = torch.from_numpy(WITNESSED["tanh(xy)"][1])
    report = k.check_mercer(k.Sigmoid(torch.tensor(1.0, requires_grad=True), 0.0), x)
    assert report.verdict == "disproved"
    assert isinstance(report.report.witness, torch.Tensor)


def test_bad_input():
    x = points(5, 2)
    for call, error, message in (
        (lambda: k.check_mercer(3), TypeError, "kernel: expected a kernel or a function of points, got int"),
        (lambda: k.check_mercer(k.Sigmoid(), [[1.0]]), TypeError, "x: expected a NumPy"),
        (lambda: k.check_mercer(k.Sigmoid(), x[0]), ValueError, "x: expected shape (n, d), got (2,)"),
        (lambda: k.check_mercer(lambda x: x, x), ValueError, "kernel: expected kernel(x) of shape (5, 5), got (5, 2)"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)
