"""`KMeans` and `MiniBatchKMeans`: against scikit-learn, against plain NumPy, and by what k-means is."""

import itertools
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from generators import layouts, numpy_of, of_kind, points, rng
from references import KINDS, same_bits, wide

import nearfar as nf
from nearfar import clusters
from nearfar.lloyd import Data, Pass, means, relocate, unit

cluster = pytest.importorskip("sklearn.cluster")

SKLEARN_TOO = {  # expected of its own estimators: first centroids are drawn by position, so order and repetition count
    "check_sample_weight_equivalence_on_dense_data": "rows are drawn by position",
}


def blobs(n, d, k, dtype="float64", spread=0.3, seed=0):
    generator = rng(n, d, k, seed)
    centers = generator.standard_normal((k, d)) * 3
    return (centers[generator.integers(0, k, n)] + spread * generator.standard_normal((n, d))).astype(dtype)


def squares(x, centers):
    """(n, k), one precision up."""
    x, centers = wide(x), wide(centers)
    return ((x[:, None] - centers) ** 2).sum(-1)


def fitted(x, k=5, **options):
    return nf.KMeans(k, random_state=0, **options).fit(x)


# ---- the pass --------------------------------------------------------------------------------------------------------


def one_pass(x, centers, weights=None, normalize=False):
    return Data(x, weights, normalize).iterate(centers)


@pytest.mark.isa
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (127, 7), (129, 13), (700, 250), (2500, 3)])
def test_pass(n, k, d):
    x, weights = points(n, d), rng(n).uniform(0, 2, n)
    for dtype in ("float32", "float64"):
        own, w = x.astype(dtype), weights.astype(dtype)
        centers = points(k, d, dtype, seed=1)
        expected = squares(own, centers)
        for given in (None, w):
            step = one_pass(own, centers, given)
            tolerance = 1e-12 if dtype == "float64" else 1e-6
            labels = expected.argmin(1)
            assert np.all(
                np.take_along_axis(expected, step.labels[:, None], 1)[:, 0] <= expected.min(1) * (1 + tolerance)
            )
            assert (step.labels == labels).mean() > 0.99
            assert np.allclose(step.distances, expected.min(1).astype(float), rtol=10 * tolerance)
            one_hot = (step.labels[:, None] == np.arange(k)) * (1.0 if given is None else given[:, None].astype(float))
            assert np.allclose(step.counts, one_hot.sum(0), rtol=1e-13)
            assert np.allclose(step.sums, one_hot.T @ own.astype(float), rtol=1e-12, atol=1e-12)
            total = step.distances.astype(float) @ (np.ones(n) if given is None else given.astype(float))
            assert step.inertia == pytest.approx(total, rel=1e-12)
            assert step.changed == n


@pytest.mark.isa
@pytest.mark.parametrize("d", [2, 17, 40])
def test_ties_and_near_ties_are_settled_exactly(d):
    """Duplicated centroids, integer points, an offset: labels are those of the exact distances, ties by lower index."""
    generator = rng(d)
    for offset in (0, 1000):
        x = (generator.integers(-3, 4, (900, d)) + offset).astype("float32")
        centers = np.concatenate([x[:40], x[:40][::-1], x[100:110]])
        step = one_pass(x, centers)
        assert np.array_equal(step.labels, squares(x, centers).argmin(1))
        assert np.array_equal(step.distances, squares(x, centers).min(1))
    far = (blobs(600, d, 20, spread=1e-3) * 10 + 100).astype("float32")
    centers = far[::7].copy()
    assert np.array_equal(one_pass(far, centers).labels, squares(far, centers).argmin(1))


def test_pass_counts_changed_labels():
    x, centers = points(300, 5), points(9, 5, seed=1)
    labels = one_pass(x, centers).labels.copy()
    labels[[3, 200]] += 1
    assert Data(x, None, False).iterate(centers, labels).changed == 2
    assert Data(x, None, False).iterate(centers, labels).changed == 0


def test_sums_of_large_float32_data_keep_their_digits():
    x = np.full((1 << 20, 1), 16777217.0 / 2**24, np.float32) + np.float32(0.1)
    step = one_pass(x, x[:1].copy())
    assert step.sums[0, 0] == pytest.approx(float(x[0, 0]) * len(x), rel=1e-15)


def test_threads_change_no_bit(threads):
    for n, d, k in ((5000, 20, 30), (700, 3, 300), (3000, 70, 8)):
        x, weights = points(n, d, "float32"), rng(n).uniform(0.5, 2, n).astype("float32")
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            step = one_pass(x, x[:k].copy(), weights)
            chosen = clusters.seeding(x, False, weights, 3, rng(k).uniform(size=(k - 1, 4)))
            model = nf.KMeans(k, random_state=0, max_iter=5).fit(x, sample_weight=weights)
            results.append((*step[:4], np.array(step.inertia), chosen, model.cluster_centers_, model.labels_))
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# ---- first centroids -------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize(("n", "d", "k"), [(50, 1, 3), (40, 2, 12), (3000, 17, 25), (5000, 64, 130)])
def test_seeding_draws_what_sklearn_draws(n, d, k):
    x, weights = points(n, d), rng(n).uniform(0.1, 2, n)
    for dtype in ("float32", "float64"):
        for given in (None, weights.astype(dtype)):
            own = x.astype(dtype)
            chosen = Data(own, given, False).spread(k, np.random.RandomState(5))
            # scikit-learn on float64: its float32 sums are coarser than ours.
            _, expected = cluster.kmeans_plusplus(
                own.astype(float), k, random_state=5, sample_weight=None if given is None else given.astype(float)
            )
            assert np.array_equal(chosen, expected)


@pytest.mark.parametrize("trials", range(1, 15))
def test_seeding_is_greedy_at_any_number_of_trials(trials):
    n, k = 2100, 6
    x = points(n, 3)
    uniforms = rng(trials).uniform(size=(k - 1, trials))
    chosen = clusters.seeding(x, False, None, 7, uniforms)
    closest = squares(x, x[7:8])[:, 0].astype(float)
    assert chosen[0] == 7
    for step in range(k - 1):
        drawn = np.searchsorted(np.cumsum(closest), uniforms[step] * closest.sum())
        left = np.minimum(closest[:, None], squares(x, x[drawn]).astype(float))
        assert chosen[step + 1] == drawn[left.sum(0).argmin()]
        closest = left[:, left.sum(0).argmin()]


def test_seeding_of_duplicates_and_zero_weights():
    assert np.array_equal(clusters.seeding(np.ones((9, 3)), False, None, 2, np.full((3, 2), 0.5)), [2, 0, 0, 0])
    x, weights = points(200, 4), np.zeros(200)
    weights[::10] = 1
    assert not (Data(x, weights, False).spread(15, np.random.RandomState(0)) % 10).any()


# ---- KMeans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d", "k"), [(60, 1, 4), (500, 2, 8), (1500, 20, 30), (400, 70, 100)])
def test_is_sklearn_with_the_same_seed(n, d, k, dtype, weighted):
    x = (points(n, d) + 3 * rng(n).integers(0, 3, (n, 1))).astype(dtype)
    weights = rng(k).uniform(0.5, 2, n) if weighted else None
    ours = nf.KMeans(k, random_state=3).fit(x, sample_weight=weights)
    theirs = cluster.KMeans(k, random_state=3).fit(x, sample_weight=weights)
    assert ours.n_iter_ == theirs.n_iter_
    assert (ours.labels_ == theirs.labels_).mean() >= (1 if dtype == "float64" else 0.995)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-12 if dtype == "float64" else 1e-5)
    assert ours.cluster_centers_.dtype == dtype
    assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-12 if dtype == "float64" else 1e-3)
    assert np.allclose(ours.transform(x), theirs.transform(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_starts(init):
    x = blobs(400, 3, 9)
    ours = nf.KMeans(9, init=init, n_init=4, random_state=1).fit(x)
    theirs = cluster.KMeans(9, init=init, n_init=4, random_state=1).fit(x)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-12)
    single = [nf.KMeans(9, init=init, n_init=1, random_state=s).fit(x).inertia_ for s in range(3)]
    assert ours.inertia_ <= max(single)


def test_weights_in_half_precision():
    """Also of bfloat16, which NumPy does not have."""
    x, weights = blobs(200, 5, 3, "float32"), torch.from_numpy(rng(1).uniform(0.5, 2, 200))
    for dtype in (torch.float16, torch.bfloat16):
        own, expected = (
            nf.KMeans(3, random_state=0).fit(x, sample_weight=w) for w in (weights.to(dtype), weights.to(dtype).float())
        )
        assert own.inertia_ == expected.inertia_


def test_fixed_point():
    """Centroids are the means of their rows, labels the nearest centroids, the inertia theirs."""
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-12)):
        x, weights = blobs(800, 12, 6, dtype), rng(1).uniform(0.5, 2, 800)
        model = nf.KMeans(6, random_state=0, tol=0).fit(x, sample_weight=weights)
        distances = squares(x, model.cluster_centers_)
        assert np.array_equal(model.labels_, distances.argmin(1))
        assert model.inertia_ == pytest.approx(float(weights @ distances.min(1)), rel=tolerance)
        for k in range(6):
            own = model.labels_ == k
            mean = np.average(x[own].astype(float), axis=0, weights=weights[own])
            assert np.allclose(model.cluster_centers_[k], mean, rtol=tolerance, atol=tolerance)


def test_the_decoder_is_least_squares_and_the_inertia_a_frobenius_norm():
    x = blobs(300, 7, 5)
    model = fitted(x, tol=0)
    z = np.eye(5)[model.encode(x)]
    c = np.linalg.lstsq(z, x, rcond=None)[0]
    assert np.allclose(model.cluster_centers_, c, rtol=1e-12)
    assert np.allclose(model.reconstruct(x), z @ model.cluster_centers_)
    assert model.inertia_ == pytest.approx(np.linalg.norm(x - z @ c) ** 2, rel=1e-12)
    assert model.reconstruction_error(x) == model.inertia_ == -model.score(x)
    assert model.reconstruction_error(x, np.full(300, 2.0)) == pytest.approx(2 * model.inertia_)
    assert np.array_equal(model.decode(np.array([[0, 4]])), model.cluster_centers_[[[0, 4]]])


def test_objective_never_rises(capsys):
    nf.KMeans(20, random_state=0, verbose=1, tol=0).fit(points(2000, 6))
    lines = capsys.readouterr().out.splitlines()
    inertia = [float(line.split()[-1].rstrip(".")) for line in lines if line.startswith("Iteration")]
    assert len(inertia) > 5
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(inertia))
    assert "Initialization complete" in lines[0]
    assert "Converged" in lines[-1]


def test_weights_count_as_repetitions_from_the_same_start():
    x, repeats = points(100, 4), rng(0).integers(0, 4, 100)
    start = x[repeats > 0][:5]
    a = nf.KMeans(5, init=start, tol=0).fit(x, sample_weight=repeats)
    b = nf.KMeans(5, init=start, tol=0).fit(np.repeat(x, repeats, axis=0))
    c = nf.KMeans(5, init=start, tol=0).fit(x, sample_weight=repeats / 8)
    assert np.allclose(a.cluster_centers_, b.cluster_centers_, rtol=1e-12)
    assert np.allclose(a.cluster_centers_, c.cluster_centers_, rtol=1e-12)
    assert a.inertia_ == pytest.approx(b.inertia_) == pytest.approx(8 * c.inertia_)


def test_empty_clusters_take_the_farthest_rows():
    x = np.array([[0.0], [1.0], [2.0], [50.0]])
    start = np.array([[1.0], [100.0], [200.0]])
    data = Data(x, None, False)
    step = data.iterate(start)
    relocate(data, step, start)
    assert np.array_equal(np.sort(means(data, step, start).ravel()), [0.5, 2, 50]) or step.counts.all()
    theirs = cluster.KMeans(3, init=start, n_init=1).fit(x)
    ours = nf.KMeans(3, init=start).fit(x)
    assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_)
    assert len(set(ours.labels_.tolist())) == 3
    x = blobs(500, 3, 10)
    start = np.concatenate([x[:3], np.full((5, 3), 1e3)])
    ours, theirs = nf.KMeans(8, init=start).fit(x), cluster.KMeans(8, init=start, n_init=1).fit(x)
    assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_)
    assert np.bincount(ours.labels_, minlength=8).min() > 0


def test_fewer_distinct_rows_than_clusters():
    from sklearn.exceptions import ConvergenceWarning

    x = np.repeat(points(3, 20, "float32"), 10, axis=0)
    with pytest.warns(
        ConvergenceWarning, match=r"Number of distinct clusters \(3\) found smaller than n_clusters \(5\)"
    ):
        model = fitted(x)
    assert model.inertia_ == 0
    assert np.isfinite(model.cluster_centers_).all()
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        model = fitted(np.full((40, 2), 7.0))
    assert model.inertia_ == 0
    assert not model.labels_.any()
    assert np.array_equal(model.predict([[1.0, 1.0]]), [0])
    assert fitted(np.full((40, 2), 7.0), k=1).inertia_ == 0


def test_one_row_and_one_cluster():
    model = fitted(np.array([[3.0, 4.0]]), k=1)
    assert np.array_equal(model.cluster_centers_, [[3, 4]])
    x = points(200, 9)
    model = fitted(x, k=1)
    assert np.allclose(model.cluster_centers_[0], x.mean(0))
    assert model.inertia_ == pytest.approx(x.var(0).sum() * 200)
    model = fitted(x, k=200)
    assert model.inertia_ == 0
    assert sorted(model.labels_) == list(range(200))


def test_an_offset_changes_nothing():
    x = blobs(500, 20, 6, "float32", spread=0.01)
    near, far = fitted(x, k=6), fitted(x + np.float32(64), k=6)
    assert np.array_equal(near.labels_, far.labels_)
    assert np.allclose(near.cluster_centers_ + 64, far.cluster_centers_, atol=1e-5)


def test_spherical():
    x = blobs(600, 10, 5) * rng(3).uniform(0.1, 10, (600, 1))
    x[17] = 0
    model = fitted(x, spherical=True, tol=0)
    u = unit(x)
    assert np.allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1)
    cosine = u @ model.cluster_centers_.T
    keep = np.arange(600) != 17
    assert np.array_equal(model.labels_[keep], cosine.argmax(1)[keep])
    for k in range(5):
        total = u[model.labels_ == k].sum(0)
        assert np.allclose(model.cluster_centers_[k], total / np.linalg.norm(total), rtol=1e-9)
    assert model.inertia_ == pytest.approx(squares(u, model.cluster_centers_).min(1).sum(), rel=1e-12)
    assert model.inertia_ == pytest.approx((2 - 2 * cosine.max(1))[keep].sum() + 1, rel=1e-9)
    assert np.allclose(model.transform(x), 1 - cosine)
    same = fitted(x * 3, spherical=True, tol=0)
    assert np.array_equal(same.labels_, model.labels_)
    plain = fitted(u[keep], tol=0)
    assert model.inertia_ >= plain.inertia_  # means are not bound to the sphere


@pytest.mark.parametrize("scale", [2.0**-530, 2.0**520])
def test_spherical_of_rows_of_any_norm(scale):
    x = blobs(60, 4, 3)
    own, expected = (fitted(z, 3, spherical=True) for z in (x * scale, x))
    assert np.array_equal(own.labels_, expected.labels_)
    assert np.allclose(own.cluster_centers_, expected.cluster_centers_, rtol=1e-12, atol=0)


def test_kinds_and_dtypes():
    x = blobs(300, 12, 4)
    expected = fitted(x, k=4)
    for kind, dtype in KINDS:
        own = of_kind(kind, x, dtype)
        model = fitted(own, k=4)
        name = "float64" if dtype == "float64" else "float32"
        for array in (model.cluster_centers_, model.transform(own), model.reconstruct(own)):
            assert type(array) is type(own)
            assert str(array.dtype).removeprefix("torch.") == name
        for array in (model.labels_, model.predict(own), model.fit_predict(own)):
            assert type(array) is type(own)
            assert str(array.dtype).endswith("int64")
        # Blobs are apart, so the partition is the same whatever the rounding.
        pairs = np.unique(np.stack([expected.labels_, np.asarray(model.labels_)]), axis=1)
        assert pairs.shape[1] == 4
        assert np.isfinite(numpy_of(model.cluster_centers_)).all()
    assert isinstance(expected.predict(torch.from_numpy(x)), torch.Tensor)  # of the kind of its argument
    assert isinstance(fitted(torch.from_numpy(x), k=4).predict(x), np.ndarray)
    assert np.array_equal(expected.predict(x.astype("float32")), expected.labels_)
    tensor = torch.from_numpy(x).requires_grad_()
    assert not fitted(tensor, k=4).cluster_centers_.requires_grad


def test_layouts():
    x = points(200, 9, "float32")
    expected = fitted(x)
    for name, own in layouts(x).items():
        model = fitted(own)
        assert same_bits(model.cluster_centers_, expected.cluster_centers_), name
        assert same_bits(model.labels_, expected.labels_), name


def test_random_state():
    x = blobs(200, 3, 7)
    again = [nf.KMeans(7, random_state=np.random.RandomState(4)).fit(x).labels_ for _ in range(2)]
    assert np.array_equal(*again)
    assert np.array_equal(again[0], nf.KMeans(7, random_state=4).fit(x).labels_)
    np.random.seed(4)  # noqa: NPY002
    assert np.array_equal(again[0], nf.KMeans(7).fit(x).labels_)
    shared = np.random.RandomState(0)
    a, b = (nf.KMeans(7, init="random", n_init=1, max_iter=1, random_state=shared).fit(x) for _ in range(2))
    assert not np.array_equal(a.cluster_centers_, b.cluster_centers_)


def test_input_is_left_alone_and_copied_centroids():
    x = points(100, 4)
    start, before = x[:3].copy(), x.copy()
    model = nf.KMeans(3, init=start).fit(x)
    assert np.array_equal(x, before)
    assert np.array_equal(start, before[:3])
    assert not np.shares_memory(model.cluster_centers_, start)
    assert model.n_features_in_ == 4


# ---- MiniBatchKMeans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d", "k"), [(500, 2, 8), (2500, 20, 30)])
def test_minibatch_is_sklearn_with_the_same_seed(n, d, k, dtype, weighted):
    x = (points(n, d) + 3 * rng(n).integers(0, 3, (n, 1))).astype(dtype)
    weights = rng(k).uniform(0.5, 2, n) if weighted else None
    options = dict(random_state=3, batch_size=256, max_iter=20)
    ours = nf.MiniBatchKMeans(k, **options).fit(x, sample_weight=weights)
    theirs = cluster.MiniBatchKMeans(k, **options).fit(x, sample_weight=weights)
    assert (ours.n_steps_, ours.n_iter_) == (theirs.n_steps_, theirs.n_iter_)
    assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-10 if dtype == "float64" else 1e-3)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-10 if dtype == "float64" else 1e-4)
    assert (ours.labels_ == theirs.labels_).mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_partial_fit_is_sklearn(dtype):
    batches = [points(300, 6, dtype, seed=s) for s in range(8)]
    weights = [rng(s).uniform(0.5, 2, 300).astype(dtype) for s in range(8)]
    options = dict(random_state=0, reassignment_ratio=0.2)
    ours, theirs = nf.MiniBatchKMeans(25, **options), cluster.MiniBatchKMeans(25, **options)
    for x, w in zip(batches, weights, strict=True):
        ours.partial_fit(x, sample_weight=w)
        theirs.partial_fit(x, sample_weight=w)
        assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-11 if dtype == "float64" else 1e-4)
        assert ours.n_steps_ == theirs.n_steps_
    assert (ours.labels_ == theirs.labels_).mean() > 0.99
    with pytest.raises(ValueError, match="5 features, but MiniBatchKMeans is expecting 6"):
        ours.partial_fit(batches[0][:, :5])


def test_minibatch_options(capsys):
    x = blobs(600, 4, 5)
    model = nf.MiniBatchKMeans(5, random_state=0, batch_size=100, verbose=1, tol=1e-2).fit(x)
    out = capsys.readouterr().out
    assert "Init 1/1" in out
    assert "Minibatch step 1/" in out
    assert "Converged" in out
    assert (
        nf.MiniBatchKMeans(5, random_state=0, batch_size=100, max_no_improvement=None, max_iter=2).fit(x).n_steps_ == 12
    )
    assert model.inertia_ < 3 * fitted(x).inertia_
    own = torch.from_numpy(x)
    model = nf.MiniBatchKMeans(5, random_state=0, init="random").fit(own)
    assert isinstance(model.cluster_centers_, torch.Tensor)
    assert isinstance(model.partial_fit(own).predict(own), torch.Tensor)
    a = nf.MiniBatchKMeans(5, init=x[:5], max_iter=3, random_state=0, batch_size=50).fit(x)
    b = cluster.MiniBatchKMeans(5, init=x[:5], n_init=1, max_iter=3, random_state=0, batch_size=50).fit(x)
    assert np.allclose(a.cluster_centers_, b.cluster_centers_)


# ---- the interface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [nf.KMeans(), nf.KMeans(n_clusters=3, spherical=True), nf.MiniBatchKMeans()])
def test_check_estimator(estimator):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, expected_failed_checks=SKLEARN_TOO, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert len(results) > 30


def test_works_in_a_pipeline_and_a_search():
    from sklearn.base import clone, is_clusterer
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = blobs(150, 3, 4)
    pipeline = make_pipeline(StandardScaler(), nf.KMeans(4, random_state=0)).fit(x)
    assert pipeline.transform(x).shape == (150, 4)
    search = GridSearchCV(nf.KMeans(random_state=0), {"n_clusters": [2, 4]}, cv=3).fit(x)
    assert search.best_params_ == {"n_clusters": 4}
    assert is_clusterer(nf.KMeans())
    assert clone(nf.KMeans(3, tol=0.5)).get_params() == nf.KMeans(3, tol=0.5).get_params()


def test_repr_parameters_and_pickle():
    model = nf.KMeans(3, init=np.zeros((3, 2)), tol=0.1)
    assert repr(model) == "KMeans(n_clusters=3, init=array(3, 2), tol=0.1)"
    assert repr(nf.MiniBatchKMeans()) == "MiniBatchKMeans()"
    assert model.set_params(tol=0.2) is model
    assert model.get_params()["tol"] == 0.2
    with pytest.raises(ValueError, match="^speed: expected a parameter of KMeans"):
        model.set_params(speed=1)
    x = points(30, 2)
    again = pickle.loads(pickle.dumps(fitted(x)))
    assert np.array_equal(again.predict(x), fitted(x).labels_)


def test_no_sklearn(monkeypatch):
    """Without scikit-learn: no import of it, plain exceptions and warnings."""
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert fitted(points(30, 2)).labels_.shape == (30,)
    with pytest.raises(AttributeError, match="not fitted yet"):
        nf.KMeans().predict(points(3, 2))
    with pytest.warns(UserWarning, match="distinct clusters"):
        fitted(np.zeros((9, 2)))


@pytest.mark.parametrize("make", [nf.KMeans, nf.MiniBatchKMeans])
def test_bad_input(make):
    x = points(20, 3)
    for value, error, message in (
        (np.where(np.eye(20, 3) == 1, np.nan, x), ValueError, "expected finite numbers, got NaN or inf in row 0"),
        (np.where(np.eye(20, 3, -4) == 1, -np.inf, x), ValueError, "expected finite numbers, got NaN or inf in row 4"),
        (x.astype("float32") * np.float32(1e30), ValueError, "so large that its squared distances overflow"),
        (x[0], ValueError, r"expected shape \(n, d\), got \(3,\). Reshape your data"),
        (x[:0], ValueError, "expected at least one row"),
        (x[:, :0], ValueError, r"0 feature\(s\)"),
        (x + 1j, ValueError, "Complex data not supported"),
        (torch.ones(9, 2, dtype=torch.complex64), ValueError, "Complex data not supported, got complex64"),
    ):
        with pytest.raises(error, match=f"^X: .*{message}"):
            make(2).fit(value)
    model = make(2, random_state=0).fit(x)
    with pytest.raises(ValueError, match="^X: expected finite numbers, got NaN or inf in row 1"):
        model.predict(np.array([[0.0, 0, 0], [np.nan, 0, 0]]))
    with pytest.raises(ValueError, match="X has 2 features, but .* is expecting 3"):
        model.predict(x[:, :2])
    for name, value, error, message in (
        ("n_clusters", 0, ValueError, "expected at least 1, got 0"),
        ("n_clusters", 21, ValueError, "n_samples=20 should be >= n_clusters=21"),
        ("n_clusters", 2.5, TypeError, "expected an integer"),
        ("init", "best", ValueError, "expected 'k-means\\+\\+', 'random' or an array, got 'best'"),
        ("init", len, TypeError, "got a callable"),
        ("init", np.zeros((3, 3)), ValueError, r"expected shape \(2, 3\), got \(3, 3\)"),
        ("init", np.full((2, 3), np.nan), ValueError, "expected finite numbers"),
        ("n_init", 0, ValueError, "expected 'auto' or at least 1"),
        ("n_init", "many", TypeError, "expected an integer"),
        ("max_iter", 0, ValueError, "expected at least 1"),
        ("tol", -1.0, ValueError, "expected a non-negative number"),
        ("tol", np.nan, ValueError, "expected a non-negative number"),
        ("random_state", "seed", ValueError, "expected an int, a RandomState or None"),
        ("random_state", -1, ValueError, "expected an int, a RandomState or None"),
    ):
        with pytest.raises(error, match=f"^{name}: .*{message}"):
            make(**({"n_clusters": 2} | {name: value})).fit(x)
    for value, message in (
        (np.ones(19), r"expected shape \(20,\) to match X, got \(19,\)"),
        (-np.ones(20), "not negative"),
        (np.full(20, np.nan), "finite"),
        (np.zeros(20), "positive sum"),
    ):
        with pytest.raises(ValueError, match=f"^sample_weight: .*{message}"):
            make(2).fit(x, sample_weight=value)
    with pytest.raises(ValueError, match=r"^codes: expected 0 to 1, got -1 to 0"):
        model.decode(np.array([-1, 0]))
    with pytest.raises(TypeError, match="^codes: expected integers"):
        model.decode(np.array([0.0]))


def test_bad_batches():
    x = points(20, 3)
    for name, value, message in (
        ("batch_size", 0, "expected at least 1"),
        ("init_size", 0, "expected at least 1"),
        ("max_no_improvement", -1, "expected None or at least 0"),
        ("reassignment_ratio", -0.1, "expected a non-negative number"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            nf.MiniBatchKMeans(2, **{name: value}).fit(x)


def test_means_of_a_pass_keep_centroids_without_rows():
    data = Data(np.zeros((2, 2)), None, False)
    step = Pass(np.zeros(2, np.int64), np.zeros(2), np.array([[4.0, 2.0], [0, 0]]), np.array([2.0, 0]), 0.0, 0)
    assert np.array_equal(means(data, step, np.array([[9.0, 9], [5, 6]])), [[2, 1], [5, 6]])
