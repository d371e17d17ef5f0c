"""KernelRidge and KernelPCA against LAPACK on the stored matrix, and scikit-learn's own checks."""

import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from generators import points, rng
from references import same_bits

import nearfar as nf
from nearfar import kernel_methods

pytestmark = pytest.mark.isa

k = nf.kernels


def problem(n=300, d=4, targets=None, dtype="float64"):
    x = points(n, d).astype(dtype)
    y = np.sin(x @ rng(1).standard_normal((d, 2 if targets else 1))).astype(dtype)
    return x, y if targets else y[:, 0]


def solution(kernel, x, y, alpha):
    x = np.asarray(x, np.float64)
    return np.linalg.solve(kernel(x) + alpha * np.eye(len(x)), np.asarray(y, np.float64))


# ---- ridge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["nystrom", "pivoted_cholesky", None])
@pytest.mark.parametrize("targets", [None, 2])
def test_ridge_solves_the_system(preconditioner, targets):
    x, y = problem(targets=targets)
    kernel = k.Gaussian(2.0) + k.Linear()
    expected = solution(kernel, x, y, 0.1)
    model = nf.KernelRidge(kernel, 0.1, tol=1e-10, preconditioner=preconditioner).fit(x, y)
    assert model.dual_coef_.shape == y.shape
    assert np.allclose(model.dual_coef_, expected, atol=1e-7 * np.abs(expected).max())
    assert model.residuals_[-1] <= 2e-10
    assert len(model.residuals_) == model.n_iter_ + 2
    new = points(50, 4, seed=5)
    assert np.allclose(model.predict(new), kernel(new, x) @ expected, atol=1e-7)
    dense = nf.KernelRidge(kernel, 0.1, "cholesky").fit(x, y)
    assert np.allclose(dense.dual_coef_, expected, atol=1e-9 * np.abs(expected).max())
    assert dense.residuals_[-1] < 1e-12


def test_ridge_in_single_precision():
    x, y = problem(500, 3, dtype="float32")
    model = nf.KernelRidge(k.Gaussian(2.0), 1.0, tol=1e-4).fit(x, y)
    assert model.dual_coef_.dtype == model.predict(x).dtype == np.float32
    residual = y - (k.Gaussian(2.0)(x.astype(float)) + np.eye(500)) @ model.dual_coef_
    assert np.linalg.norm(residual) <= 2e-4 * np.linalg.norm(y)
    assert model.residuals_[-1] == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(y), abs=2e-5)


def test_preconditioner_saves_steps():
    x, y = problem(600, 2)
    steps = [
        nf.KernelRidge(k.Gaussian(1.0), 1e-3, preconditioner=p, tol=1e-6).fit(x, y).n_iter_
        for p in ("nystrom", "pivoted_cholesky", None)
    ]
    assert steps[1] < 15  # pivots are spread where random landmarks leave gaps
    assert steps[0] < steps[2] / 2


def test_ridge_matches_scikit_learn():
    from sklearn.kernel_ridge import KernelRidge

    x, y = problem(targets=2)
    ours = nf.KernelRidge("rbf", 0.5, tol=1e-10).fit(x, y)
    theirs = KernelRidge(kernel="rbf", alpha=0.5).fit(x, y)
    assert np.allclose(ours.dual_coef_, theirs.dual_coef_, atol=1e-7)
    weights = rng(3).uniform(0, 1, len(x))
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y), abs=1e-7)
    assert ours.score(x, y, weights) == pytest.approx(theirs.score(x, y, weights), abs=1e-7)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("preconditioner", ["nystrom", "pivoted_cholesky", None])
@pytest.mark.parametrize("targets", [None, 2])
def test_weighted_ridge(solver, preconditioner, targets):
    """gamma solves (S K S + alpha I) gamma = S y, S = sqrt(w): scikit-learn's numbers."""
    from sklearn.kernel_ridge import KernelRidge

    x, y = problem(targets=targets)
    weights = rng(3).uniform(0, 4, len(x)) ** 3
    weights[::7] = 0
    ours = nf.KernelRidge("rbf", 0.5, solver, tol=1e-11, preconditioner=preconditioner).fit(x, y, weights)
    theirs = KernelRidge(kernel="rbf", alpha=0.5).fit(x, y, weights)
    assert np.allclose(ours.dual_coef_, theirs.dual_coef_, atol=1e-7 * np.abs(theirs.dual_coef_).max())
    assert not ours.dual_coef_[::7].any()
    assert np.allclose(ours.predict(x[:9]), theirs.predict(x[:9]), atol=1e-7)
    root = np.sqrt(weights)
    weighted = nf.gram(x, kernel="rbf") * root * root[:, None] + 0.5 * np.eye(len(x))
    gamma = np.linalg.solve(weighted, (root * y.T).T)
    assert np.allclose(ours.dual_coef_, (root * gamma.T).T, atol=1e-7 * np.abs(gamma).max())
    assert ours.residuals_[-1] < 1e-10


def test_weights_are_repetitions():
    x, y = problem(120, 3)
    counts = rng(1).integers(0, 4, 120)
    once = nf.KernelRidge(k.Gaussian(1.0), 0.1, tol=1e-12).fit(x, y, counts)
    often = nf.KernelRidge(k.Gaussian(1.0), 0.1, tol=1e-12).fit(x.repeat(counts, 0), y.repeat(counts))
    assert np.allclose(once.predict(x), often.predict(x), atol=1e-9)
    plain = nf.KernelRidge(k.Gaussian(1.0), 0.1).fit(x, y)
    for same in (1, 1.0, np.ones(120), torch.ones(120), None):
        assert same_bits(nf.KernelRidge(k.Gaussian(1.0), 0.1).fit(x, y, same).dual_coef_, plain.dual_coef_)
    tensor = nf.KernelRidge(k.Gaussian(1.0), 0.1, tol=1e-12).fit(torch.from_numpy(x), torch.from_numpy(y), counts)
    assert np.allclose(tensor.dual_coef_.numpy(), once.dual_coef_)
    single = nf.KernelRidge(k.Gaussian(1.0), 0.1, tol=1e-5).fit(x.astype("f4"), y.astype("f4"), counts)
    assert single.dual_coef_.dtype == np.float32
    assert np.allclose(single.predict(x.astype("f4")), once.predict(x), atol=1e-3)


def test_preconditioner_knows_the_weights():
    x, y = problem(600, 2)
    weights = 10.0 ** rng(2).uniform(-3, 3, 600)
    steps = [
        nf.KernelRidge(k.Gaussian(1.0), 1e-2, preconditioner=p, tol=1e-6).fit(x, y, weights).n_iter_
        for p in ("pivoted_cholesky", None)
    ]
    assert steps[0] < 20
    assert steps[0] < steps[1] / 4


def test_bad_weights():
    x, y = problem(30)
    for weights, message in (
        (np.ones(9), r"expected shape \(30,\) to match X, got \(9,\)"),
        (np.ones((30, 1)), r"expected shape \(30,\) to match X"),
        (-np.ones(30), "expected finite numbers that are not negative"),
        (np.full(30, np.nan), "expected finite numbers"),
        (np.zeros(30), "expected a positive sum"),
    ):
        with pytest.raises(ValueError, match=f"^sample_weight: {message}"):
            nf.KernelRidge().fit(x, y, weights)


def test_ridge_of_tensors_and_zero_targets():
    x, y = problem(100)
    one = nf.KernelRidge(k.Gaussian(2.0)).fit(x, y)
    model = nf.KernelRidge(k.Gaussian(torch.tensor(2.0))).fit(torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(model.dual_coef_, torch.Tensor)
    assert torch.allclose(model.predict(torch.from_numpy(x)), torch.from_numpy(one.predict(x)))
    zero = nf.KernelRidge().fit(x, np.zeros(100))
    assert not zero.dual_coef_.any()
    assert zero.n_iter_ == 0


def test_ridge_warns(capsys):
    x, y = problem(400, 2)
    with pytest.warns(UserWarning, match="after 3 steps, wanted 1e-06"):
        model = nf.KernelRidge(k.Gaussian(1.0), 1e-4, max_iter=3, preconditioner=None, verbose=True).fit(x, y)
    assert model.n_iter_ == 3
    assert "step    3  residual" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="negative curvature: the kernel is not positive semi-definite"):
        nf.KernelRidge(k.Sigmoid(coef0=-1.0), 1e-3, preconditioner=None).fit(3 * x, y)
    with pytest.raises(ValueError, match="^alpha: .* is not positive definite"):
        nf.KernelRidge(k.Sigmoid(coef0=-1.0), 1e-3, "cholesky").fit(3 * x, y)
    with pytest.warns(UserWarning, match="float64 points may help"):  # float32 cannot: it stops, and says so
        nf.KernelRidge(k.Gaussian(30.0), 1e-7, tol=1e-9).fit(x.astype("float32"), y)


def test_ridge_memory_is_linear():
    x, y = problem(4000, 3, dtype="float32")
    tracemalloc.start()
    nf.KernelRidge(k.Gaussian(1.0), rank=50, tol=1e-3).fit(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # the matrix: 64 MB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "^alpha: expected a positive number"),
        ({"solver": "svd"}, "^solver: expected 'cg' or 'cholesky', got 'svd'"),
        ({"preconditioner": "none"}, "^preconditioner: expected one of nystrom, pivoted_cholesky, None"),
        ({"tol": 0}, "^tol: expected a positive number"),
        ({"tol": np.inf}, "^tol: expected a positive number, got inf"),
        ({"rank": 0}, "^rank: expected at least 1"),
        ({"kernel": "none"}, "^kernel: expected one of gaussian"),
    ],
)
def test_ridge_bad_input(options, message):
    x, y = problem(30)
    with pytest.raises(ValueError, match=message):
        nf.KernelRidge(**options).fit(x, y)
    with pytest.raises(ValueError, match=r"^y: expected shape \(30,\)"):
        nf.KernelRidge().fit(x, y[:9])


# ---- components ------------------------------------------------------------------------------------------------------


def centred(kernel, x):
    matrix = kernel(np.asarray(x, np.float64))
    return matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("dense", [False, True])
def test_components(dtype, tol, dense, monkeypatch):
    monkeypatch.setattr(kernel_methods, "DENSE_COMPONENTS", 1000 if dense else 10)
    x, kernel = points(280 if dense else 600, 3, dtype), k.Gaussian(1.5)
    values, vectors = np.linalg.eigh(centred(kernel, x))
    values, vectors = values[::-1][:6], vectors[:, ::-1][:, :6]
    pca = nf.KernelPCA(6, kernel, tol=1e-11).fit(x) if dtype == "float64" else nf.KernelPCA(6, kernel).fit(x)
    assert np.allclose(pca.eigenvalues_, values, atol=tol * values[0])
    assert np.allclose(np.abs((pca.eigenvectors_ * vectors).sum(0)), 1, atol=10 * tol)
    own = pca.transform(x)
    assert own.dtype == dtype
    assert np.allclose(own, pca.fit_transform(x), atol=20 * tol * np.sqrt(values[0]))
    new = points(40, 3, dtype, seed=4)
    full, cross = kernel(x.astype(float)), kernel(new.astype(float), x.astype(float))
    shifted = cross - full.mean(0) - cross.mean(1)[:, None] + full.mean()
    expected = shifted @ vectors / np.sqrt(values)
    assert np.allclose(np.abs(pca.transform(new)), np.abs(expected), atol=50 * tol * np.sqrt(values[0]))


def test_components_match_scikit_learn_and_pca():
    from sklearn.decomposition import PCA, KernelPCA

    x = points(90, 5)
    ours, theirs = nf.KernelPCA(4, "rbf"), KernelPCA(4, kernel="rbf")
    assert np.allclose(np.abs(ours.fit_transform(x)), np.abs(theirs.fit_transform(x)), atol=1e-8)
    assert np.allclose(np.abs(ours.transform(x[:7] + 1)), np.abs(theirs.transform(x[:7] + 1)), atol=1e-8)
    linear = nf.KernelPCA(3, "linear").fit(x + 100)
    assert np.allclose(np.abs(linear.transform(x + 100)), np.abs(PCA(3).fit_transform(x)), atol=1e-8)
    low = nf.KernelPCA(8, "linear").fit(x)  # five dimensions
    assert not low.eigenvalues_[5:].any()
    assert not low.transform(x)[:, 5:].any()


@pytest.mark.parametrize("n", [60, 700])
def test_linear_components_of_float32_far_from_the_origin(n):
    x = (points(n, 5) * [9, 5, 1, 1, 1] + 1e4).astype(np.float32)
    pca = nf.KernelPCA(2, "linear").fit(x)
    assert np.array_equal(pca.X_fit_, x)
    left = x.astype(float) - x.mean(0, dtype=float)
    _, sizes, axes = np.linalg.svd(left)
    assert np.allclose(pca.eigenvalues_, sizes[:2] ** 2, rtol=1e-4)
    expected = left @ axes[:2].T
    for components in (pca.transform(x), pca.fit_transform(x)):
        assert np.allclose(np.abs(components), np.abs(expected), atol=1e-3 * np.abs(expected).max())


def test_components_warn_and_refuse():
    x = points(700, 3)
    with pytest.warns(UserWarning, match="after 1 products"):
        nf.KernelPCA(2, k.Gaussian(0.3), max_iter=1).fit(x)
    for options, message in (({"n_components": 0}, "at least 1"), ({"n_components": 701}, "at most n_samples=700")):
        with pytest.raises(ValueError, match=f"^n_components: expected {message}"):
            nf.KernelPCA(**options).fit(x)


@pytest.mark.parametrize("fit", [
    lambda kernel, x: nf.KernelRidge(kernel, solver="cholesky").fit(x, x[:, 0]),
    lambda kernel, x: nf.KernelPCA(2, kernel).fit(x),
    lambda kernel, x: nf.nystrom(kernel, x, 10),
], ids=["ridge", "components", "nystrom"])  # fmt: skip
def test_stored_matrix_is_computed_by_half(fit):
    """Which is what a kernel does without a second set: exactly symmetric, in up to 1.7 times less time."""
    asked = []

    class Asked(k.Gaussian):
        def __call__(self, x, y=None):
            asked.append(y)
            return super().__call__(x, y)

    fit(Asked(2.0), points(40, 3))
    assert asked == [None]


@pytest.mark.parametrize("name", ["KernelRidge", "KernelPCA", "KMeans", "NCA"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_results_are_of_the_kind_of_the_points(name, dtype):
    """What one kind of array has fitted serves the other."""
    x = points(60, 3)
    x, tensor = x.astype(dtype), torch.from_numpy(x.astype(dtype))
    arguments = {"KernelRidge": (x[:, 0],), "NCA": (np.arange(60) % 3,)}.get(name, ())
    found = []
    for fitted in (x, tensor):
        model = getattr(nf, name)(**({"random_state": 0} if name != "NCA" else {"max_iter": 2})).fit(fitted, *arguments)
        answer = model.predict if hasattr(model, "predict") else model.transform
        assert type(answer(x)) is np.ndarray
        assert type(answer(tensor)) is torch.Tensor
        found += [answer(x), answer(tensor).numpy()]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3 if dtype == "float16" else 1e-9, atol=1e-4)


# ---- the interface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [nf.KernelRidge(), nf.KernelRidge(solver="cholesky"), nf.KernelPCA()], ids=repr)
def test_check_estimator(estimator):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None)
    assert not {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert len(results) > 30


def test_search_and_clone():
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    x, y = problem(90)
    search = GridSearchCV(nf.KernelRidge(k.Gaussian(2.0)), {"alpha": [1e-2, 1e4]}, cv=3).fit(x, y)
    assert search.best_params_ == {"alpha": 1e-2}
    assert is_regressor(nf.KernelRidge())
    assert clone(nf.KernelRidge(alpha=2.0)).get_params() == nf.KernelRidge(alpha=2.0).get_params()
    assert make_pipeline(nf.KernelPCA(3), nf.KernelRidge()).fit(x, y).predict(x).shape == (90,)
    assert "sklearn" not in repr(sys.modules["nearfar.kernel_methods"])
