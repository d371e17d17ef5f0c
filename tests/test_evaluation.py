"""`evaluate` and its report: closed forms, scikit-learn's numbers, what is missing, the table and the picture."""

import builtins
import json
import math
import sys

import numpy as np
import pytest
from generators import of_kind, pairs, rng

import nearfar as nf
from nearfar import evaluation

pytestmark = pytest.mark.isa


def blobs(n=120, d=6, classes=4, spread=0.5):
    random = rng(n, d)
    labels = np.arange(n) % classes
    return 3 * random.standard_normal((classes, d))[labels] + spread * random.standard_normal((n, d)), labels


# ---- single quantities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 2, 7])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (65, 8), (200, 33)])
def test_uniformity_gap_is_the_squared_mmd(n, d, t, kind):
    x = rng(n, d).standard_normal((n, d))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    inner = np.exp(-t * ((unit[:, None] - unit[None]) ** 2).sum(-1))[~np.eye(n, dtype=bool)].mean()
    expected = inner - math.exp(nf.uniformity_of_sphere(d, t))
    assert float(nf.uniformity_gap(of_kind(kind, x), t=t)) == pytest.approx(expected, abs=1e-13)


def test_uniformity_gap_of_collapse_and_of_many_uniform_points():
    assert nf.uniformity_gap(np.ones((9, 3))) == pytest.approx(1 - math.exp(nf.uniformity_of_sphere(3)))
    uniform = rng(0).standard_normal((4000, 8))
    assert abs(nf.uniformity_gap(uniform)) < 1e-4


def test_uniformity_gap_is_differentiable():
    torch = pytest.importorskip("torch")
    x = of_kind("torch", rng(1).standard_normal((7, 3))).requires_grad_()
    torch.autograd.gradcheck(nf.uniformity_gap, x)
    torch.autograd.gradgradcheck(nf.uniformity_gap, x)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (1, 4), (4, 1)])
@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_of_equal_singular_values_is_the_rank(shape, rank):
    rank = min(rank, *shape)
    left, _ = np.linalg.qr(rng(0).standard_normal((shape[0], rank)))
    right, _ = np.linalg.qr(rng(1).standard_normal((shape[1], rank)))
    assert evaluation.effective_rank(5e-3 * left @ right.T) == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize("shape", [(40_000, 3), (60, 17), (17, 60)])
def test_effective_rank_is_the_entropy_of_singular_values(shape):
    x = rng(*shape).standard_normal(shape) * np.geomspace(1, 1e-3, shape[1])
    shares = np.linalg.svd(x, compute_uv=False)
    shares = shares / shares.sum()
    assert evaluation.effective_rank(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_anisotropy_is_the_mean_cosine(dtype):
    x = (rng(3).standard_normal((83, 9)) + 0.5).astype(dtype)
    x[4] = 0
    cosines = 1 - nf.cdist(x.astype(np.float64), metric="cosine")
    expected = cosines[~np.eye(83, dtype=bool)].mean()
    assert evaluation.anisotropy(x) == pytest.approx(expected, abs=1e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n", [7, 61, 700])
def test_silhouette_is_that_of_scikit_learn(n, classes):
    metrics = pytest.importorskip("sklearn.metrics")
    x, labels = blobs(n, 5, classes, spread=2)
    labels[0] = classes  # alone in its class
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert evaluation.silhouette(x, labels) == pytest.approx(metrics.silhouette_score(unit, labels), abs=1e-12)


def test_silhouette_of_a_sample(monkeypatch):
    x, labels = blobs(900)
    whole = evaluation.silhouette(x, labels)
    monkeypatch.setattr(evaluation, "SILHOUETTE_ROWS", 300)
    samples = [evaluation.silhouette(x, labels, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert samples == pytest.approx([whole] * 3, abs=0.05)


@pytest.mark.parametrize("n", [2, 3, 6, 150])
def test_knn_accuracy_leaves_the_row_out(n):
    x, labels = blobs(n, 4, 3, spread=3)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    right = 0
    for i in range(n):
        distances = np.square(unit - unit[i]).sum(1)
        distances[i] = np.inf
        nearest = labels[np.argsort(distances, kind="stable")[: min(5, n - 1)]]
        most = max(np.sum(nearest == c) for c in nearest)
        right += next(c for c in nearest if np.sum(nearest == c) == most) == labels[i]
    assert evaluation.knn_accuracy(x, labels) == right / n


def test_linear_probe_tests_on_rows_that_it_has_not_seen():
    pytest.importorskip("sklearn")
    random = rng(0)
    x, labels = random.standard_normal((300, 60)), random.integers(0, 3, 300)
    assert evaluation.linear_probe_accuracy(x, labels) < 0.5  # nothing to learn, though the training rows can be fitted
    x, labels = blobs(200)
    assert evaluation.linear_probe_accuracy(x, labels) > 0.95
    assert evaluation.linear_probe_accuracy(x, labels, seed=3) == evaluation.linear_probe_accuracy(x, labels, seed=3)


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_report_agrees_with_the_functions(kind, dtype):
    pytest.importorskip("sklearn")
    if kind == "numpy" and dtype == "bfloat16":
        pytest.skip("NumPy has none")
    x, labels = blobs()
    x, views = (of_kind(kind, a, dtype) for a in (x, x + 0.3 * rng(9).standard_normal(x.shape)))
    report = nf.evaluate(x, of_kind(kind, labels), views=views)
    close = dict(rel=1e-5, abs=1e-5)
    assert report.alignment == pytest.approx(float(nf.alignment(x, views)), **close)
    assert report.uniformity == pytest.approx(float(nf.uniformity(x)), **close)
    assert report.uniformity_optimum == nf.uniformity_of_sphere(6)
    assert report.uniformity_gap == pytest.approx(float(nf.uniformity_gap(x)), **close)
    bounds = [float(nf.mi_lower_bound(x, views, temperature=t)) for t in np.geomspace(0.001, 10, 60)]
    assert report.mi_lower_bound >= max(bounds) - 1e-3
    expected = float(nf.mi_lower_bound(x, views, temperature=report.mi_temperature))
    assert report.mi_lower_bound == pytest.approx(expected, **close)
    assert (report.rows, report.dim, report.classes, report.majority) == (120, 6, 4, 0.25)
    assert report.knn_accuracy > 0.9
    assert report.missing == {}


def test_views_of_each_item():
    """(N, V, D): the mean over pairs of views."""
    x, a = pairs(50, 4)
    b = x[::-1].copy()
    report = nf.evaluate(x, views=np.stack([x, a, b], 1))
    apart = [nf.evaluate(x, views=x), nf.evaluate(x, views=a)]
    assert apart[0].alignment == 0
    mean = np.mean([nf.alignment(x, a), nf.alignment(x, b), nf.alignment(a, b)])
    assert report.alignment == pytest.approx(mean, rel=1e-12)
    assert nf.evaluate(x, views=np.stack([x, a], 1)).alignment == apart[1].alignment
    assert nf.evaluate(x, views=(x, a, b)).to_dict() == report.to_dict()


def test_what_was_not_given_is_missing_and_says_why():
    report = nf.evaluate(rng(0).standard_normal((10, 3)))
    assert report.missing == {
        "alignment": "needs views",
        "mi_lower_bound": "needs views",
        "knn_accuracy": "needs labels",
        "linear_probe_accuracy": "needs labels",
        "silhouette": "needs labels",
    }
    assert all(getattr(report, name) is None for name in report.missing)
    assert report.classes is None
    assert "needs views" in str(report)


def test_labels_of_another_kind():
    """They are data of the host, and only NumPy has strings."""
    x, labels = blobs()
    report = nf.evaluate(x, labels)
    strings = np.array([*"abcd"])[labels]
    tensor = of_kind("torch", x)
    for points, others in ((tensor, labels), (tensor, strings), (x, of_kind("torch", labels))):
        assert nf.evaluate(points, others).to_dict() == report.to_dict()


@pytest.mark.parametrize("labels", [np.zeros(6, int), np.arange(6), np.array(list("aabbcc"))])
def test_labels_that_define_little(labels):
    report = nf.evaluate(rng(0).standard_normal((6, 3)), labels)
    assert 0 <= report.knn_accuracy <= 1
    assert report.missing["linear_probe_accuracy"] == "needs two classes, and one of at least 4 rows"
    assert (report.silhouette is None) == (len(set(labels)) == 1)


@pytest.mark.parametrize("n", [2, 3])
def test_few_and_degenerate_rows(n):
    for x in (np.zeros((n, 4)), np.ones((n, 4)), np.ones((n, 1)), np.eye(n, 5)):
        report = nf.evaluate(x, np.arange(n), views=x)
        numbers = [v for v in report.to_dict().values() if isinstance(v, float)]
        assert np.isfinite(numbers).all()
    assert nf.evaluate(np.zeros((n, 4))).effective_rank == 0
    assert nf.evaluate(np.ones((n, 4))).anisotropy == pytest.approx(1)


def test_reproducible_for_every_number_of_threads(threads):
    x, labels = blobs(400)
    found = []
    for n in (1, 2, 3, 7):
        threads(n)
        found.append(nf.evaluate(x, labels, views=x + 0.1).to_dict())
    assert all(f == found[0] for f in found)


def test_without_scikit_learn_the_probe_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    report = nf.evaluate(*blobs())
    assert report.linear_probe_accuracy is None
    assert report.missing["linear_probe_accuracy"].startswith("needs scikit-learn: pip install")
    assert report.knn_accuracy is not None


def test_table_with_and_without_rich(monkeypatch):
    pytest.importorskip("rich")
    report = nf.evaluate(*blobs())
    rich = str(report)
    monkeypatch.setattr(evaluation, "is_installed", lambda package: False)
    plain = str(report)
    for text in (rich, plain):
        assert "120 x 6 embeddings, 4 classes" in text
        assert f"{report.silhouette:.4f}" in text
        assert all(name in text for name in ("uniformity gap", "effective rank", "MI lower bound", "k-NN accuracy"))
        assert len(text.splitlines()) <= 13


def test_dictionary_is_json():
    report = nf.evaluate(*blobs(), views=blobs()[0])
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    x, labels = blobs()
    path = tmp_path / f"picture{suffix}"
    nf.evaluate(x, labels, views=x + 0.1).plot(path)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones((2, 1)),),
        (np.zeros((5, 3)), np.arange(5)),
        (np.eye(3), np.array(["a", "b", "a"])),
        (rng(0).standard_normal((40, 5)), np.arange(40)),
    ],
)
def test_picture_of_little(tmp_path, arguments):
    pytest.importorskip("matplotlib")
    nf.evaluate(*arguments).plot(tmp_path / "picture.png")


def test_picture_without_matplotlib(monkeypatch, tmp_path):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "nearfar.picture", raising=False)
    monkeypatch.delattr(nf, "picture", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ModuleNotFoundError, match=r"nearfar.Report.plot needs matplotlib: pip install 'nearfar\[plot\]'"
    ):
        nf.evaluate(np.eye(3)).plot(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "embeddings: expected a NumPy, PyTorch or CuPy array, got list", {"embeddings": [[1.0]]}),
        (TypeError, "embeddings: expected a floating dtype", {"embeddings": np.ones((3, 2), int)}),
        (ValueError, r"embeddings: expected shape \(n, d\), got \(3,\)", {"embeddings": np.ones(3)}),
        (ValueError, "embeddings: expected at least two rows, got 1", {"embeddings": np.ones((1, 3))}),
        (
            ValueError,
            "embeddings: expected finite numbers, got NaN or infinity in row 1",
            {"embeddings": np.array([[1.0], [np.inf]])},
        ),
        (ValueError, r"labels: expected shape \(4,\) to match embeddings, got \(3,\)", {"labels": np.arange(3)}),
        (TypeError, "labels: expected integers, booleans or strings, got float64", {"labels": np.ones(4)}),
        (TypeError, "labels: expected a NumPy, PyTorch or CuPy array, got list", {"labels": [0, 1, 0, 1]}),
        (ValueError, r"views: expected shape \(4, 2\) or \(4, V, 2\)", {"views": np.ones((4, 1, 2))}),
        (ValueError, "views: expected an array or at least two of them, got 1", {"views": [np.ones((4, 2))]}),
        (ValueError, r"views\[1\]: expected shape \(4, 2\)", {"views": (np.ones((4, 2)), np.ones((4, 3)))}),
        (TypeError, "views: expected dtype float64 to match embeddings", {"views": np.ones((4, 2), np.float32)}),
        (
            ValueError,
            "views: expected finite numbers, got NaN or infinity in row 0",
            {"views": np.full((4, 2), np.nan)},
        ),
        (TypeError, "seed: expected an integer, got float", {"seed": 0.5}),
    ],
)
def test_bad_input(error, message, arguments):
    with pytest.raises(error, match=message):
        nf.evaluate(**{"embeddings": np.ones((4, 2)), **arguments})
