"""Bounds on mutual information: definitions, closed forms, saturation, gradients."""

import math

import numpy as np
import pytest
import torch
from generators import numpy_of, of_kind, pairs

import nearfar as nf

pytestmark = pytest.mark.isa

ESTIMATORS = ("infonce", "nwj", "dv")


def definition(q, k, temperature, estimator, normalize=True):
    """Entry by entry in long double."""
    q, k = (np.asarray(a, np.longdouble) for a in (q, k))
    if normalize:
        q, k = (a / np.sqrt((a * a).sum(1, keepdims=True)) for a in (q, k))
    f = q @ k.T / temperature
    n = len(f)
    positive = np.diag(f)
    if estimator == "infonce":
        return float((positive - np.log(np.exp(f).mean(1))).mean())
    others = np.exp(f[~np.eye(n, dtype=bool)]).mean()
    return float(positive.mean() - (np.log(others) if estimator == "dv" else others / np.e))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 7), (31, 33), (127, 16), (129, 64), (300, 5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_definition(estimator, n, d, normalize, kind):
    q, k = pairs(n, d)
    q, k = q / 3, k / 3
    value = nf.mi_lower_bound(
        of_kind(kind, q), of_kind(kind, k), temperature=0.7, estimator=estimator, normalize=normalize
    )
    expected = definition(q, k, 0.7, estimator, normalize)
    assert abs(float(value) - expected) <= 1e-12 * (1 + abs(expected))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_low_precision_is_of_the_rounded_points(estimator, dtype):
    q, k = (of_kind("torch", a, dtype) for a in pairs(150, 24))
    value = nf.mi_lower_bound(q, k, temperature=0.3, estimator=estimator)
    expected = definition(numpy_of(q.double()), numpy_of(k.double()), 0.3, estimator)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected) <= 3e-6 * (1 + abs(expected))


def test_infonce_is_log_n_less_the_loss():
    q, k = pairs(64, 8)
    loss = nf.info_nce_loss(q, k, temperature=0.2)
    assert nf.mi_lower_bound(q, k, temperature=0.2) == math.log(64) - loss


@pytest.mark.parametrize("n", [2, 50, 4096])
def test_infonce_saturates_at_log_n_and_the_others_do_not(n):
    """Deterministic pairs on a circle: the information is infinite."""
    angles = 2 * np.pi * np.arange(n) / n
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert nf.mi_lower_bound(x, x, temperature=1e-8) == pytest.approx(math.log(n), rel=1e-9)
    assert nf.mi_lower_bound(x, x, temperature=1e-8, estimator="dv") > math.log(n)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_independent_by_construction(estimator):
    """All points alike: every critic is constant, so every bound is its value at a constant c = 1 / temperature."""
    x = np.ones((40, 3))
    expected = {"infonce": 0.0, "dv": 0.0, "nwj": 2 - math.exp(2 - 1)}[estimator]
    assert nf.mi_lower_bound(x, x, temperature=0.5, estimator=estimator) == pytest.approx(expected, abs=1e-12)


def gaussian_pairs(n, d, rho, seed=0):
    """Samples of correlated Gaussians, and features whose product is the log of their density ratio."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, d))
    y = rho * x + math.sqrt(1 - rho**2) * random.standard_normal((n, d))
    c = rho / (1 - rho**2)
    ones = np.ones((n, 1))
    half = -rho * c / 2
    constant = -d / 2 * math.log(1 - rho**2)
    left = np.hstack([c * x, half * (x * x).sum(1, keepdims=True) + constant, ones])
    right = np.hstack([y, ones, half * (y * y).sum(1, keepdims=True)])
    return left, right


@pytest.mark.parametrize(("d", "rho"), [(1, 0.5), (4, 0.6), (10, 0.5), (2, 0.95)])
def test_correlated_gaussians(d, rho):
    """I = -d/2 log(1 - rho^2), reached by the optimal critic where it is far below log N."""
    n = 4096
    q, k = gaussian_pairs(n, d, rho)
    truth = -d / 2 * math.log(1 - rho**2)
    values = {
        "infonce": nf.mi_lower_bound(q, k, temperature=1.0, normalize=False),
        "dv": nf.mi_lower_bound(q, k, temperature=1.0, estimator="dv", normalize=False),
        # Its best critic is the log ratio plus one.
        "nwj": nf.mi_lower_bound(
            np.hstack([q, np.ones((n, 1))]),
            np.hstack([k, np.ones((n, 1))]),
            temperature=1.0,
            estimator="nwj",
            normalize=False,
        ),
    }
    spread = math.sqrt(d * rho**2 / n)  # standard error of the mean of the positives' log ratios
    for name, value in values.items():
        assert abs(value - truth) < 5 * spread + 0.01, name


def test_high_information_bends_infonce_only():
    """I = 12.9 nats: InfoNCE stays under log N = 6.2."""
    q, k = gaussian_pairs(512, 20, 0.85)
    truth = -10 * math.log(1 - 0.85**2)
    value = nf.mi_lower_bound(q, k, temperature=1.0, normalize=False)
    assert math.log(512) - 0.3 < value <= math.log(512) < truth


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator):
    q, k = (of_kind("torch", a).requires_grad_() for a in pairs(7, 3))
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def bound(q, k, temperature):
        return nf.mi_lower_bound(q, k, temperature=temperature, estimator=estimator)

    torch.autograd.gradcheck(bound, (q, k, temperature))
    torch.autograd.gradgradcheck(bound, (q, k, temperature))


def test_maximising_it_recovers_the_pairs():
    """Gradient ascent on a linear encoder finds the coordinates that the views share."""
    x, y = (torch.from_numpy(a) for a in pairs(64, 10, noise=0.2))
    y[:, :5] = x[:, :5].flip(0)
    weight = torch.eye(10, 5, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([weight], 0.05)
    first = nf.mi_lower_bound(x @ weight, y @ weight, temperature=0.1).item()
    for _ in range(40):
        optimizer.zero_grad()
        (-nf.mi_lower_bound(x @ weight, y @ weight, temperature=0.1)).backward()
        optimizer.step()
    assert first < 0 < 2 < nf.mi_lower_bound(x @ weight, y @ weight, temperature=0.1).item()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_results_do_not_depend_on_threads(estimator, threads):
    q, k = pairs(300, 12, "float32")
    found = set()
    for n in (1, 2, 3, 7):
        threads(n)
        found.add(float(nf.mi_lower_bound(q, k, temperature=0.1, estimator=estimator)))
    assert len(found) == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_gives_nan_and_zero_rows_do_not(estimator):
    q, k = pairs(20, 4)
    q[3] = 0
    assert math.isfinite(nf.mi_lower_bound(q, k, temperature=0.5, estimator=estimator))
    q[5, 1] = np.nan
    assert math.isnan(nf.mi_lower_bound(q, k, temperature=0.5, estimator=estimator))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "estimator: expected 'infonce', 'nwj' or 'dv', got 'mine'", {"estimator": "mine"}),
        (ValueError, "temperature: expected a positive number, got 0.0", {"temperature": 0}),
        (TypeError, "temperature: expected a number, got NoneType", {"temperature": None}),
        (ValueError, r"key: expected shape \(5, 2\) to match query, got \(4, 2\)", {"key": np.ones((4, 2))}),
        (ValueError, "query: expected at least two rows, got 1", {"query": np.ones((1, 2)), "key": np.ones((1, 2))}),
        (TypeError, "query: expected a NumPy, PyTorch or CuPy array, got list", {"query": [[1.0]]}),
    ],
)
def test_bad_input(error, message, arguments):
    given = {"query": np.ones((5, 2)), "key": np.ones((5, 2)), "temperature": 1.0, **arguments}
    with pytest.raises(error, match=message):
        nf.mi_lower_bound(**given)
