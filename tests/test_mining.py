"""mine_triplets: every definition against its inequality, counts, samples, ties, edge cases."""

import collections
import tracemalloc

import numpy as np
import pytest
import torch
from generators import of_kind, points, rng
from references import integers

import nearfar as nf
from nearfar.losses import mining as module

pytestmark = pytest.mark.isa

MINING = ("all", "hard", "semihard", "band")
minings = pytest.mark.parametrize("mining", MINING)


def distances(x, normalize=True):
    x = np.asarray(x, np.float64)
    if normalize:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.sqrt(((x[:, None] - x) ** 2).sum(-1))


def wanted(x, labels, mining, margin, normalize=True):
    """The definitions, triplet by triplet: a set."""
    d = distances(x, normalize)
    n, found = len(labels), set()
    for a in range(n):
        positives = [p for p in range(n) if labels[p] == labels[a] and p != a]
        negatives = [k for k in range(n) if labels[k] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            # min and max return the first: ties go to the lower index.
            found.add((a, max(positives, key=lambda p: d[a, p]), min(negatives, key=lambda k: d[a, k])))
            continue
        for p in positives:
            if mining == "semihard":
                farther = [k for k in negatives if d[a, k] > d[a, p]]
                chosen = min(farther, key=lambda k: d[a, k]) if farther else max(negatives, key=lambda k: d[a, k])
                found.add((a, p, chosen))
            else:
                found |= {(a, p, k) for k in negatives if mining == "all" or d[a, p] < d[a, k] < d[a, p] + margin}
    return found


def as_set(triplets):
    found = list(zip(*(index.tolist() for index in triplets), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


def batch(n, d, classes, seed=0):
    generator = rng(n, d, classes, seed)
    labels = generator.integers(0, classes, n)
    return generator.standard_normal((classes, d))[labels] + generator.standard_normal((n, d)), labels


@minings
@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 2, 2), (7, 5, 2), (40, 3, 5), (40, 20, 5), (50, 17, 30), (33, 4, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_definitions(mining, shape, normalize, kind):
    x, labels = batch(*shape)
    for margin in (0.1, 0.5, 100.0):
        own = nf.mine_triplets(
            of_kind(kind, x), of_kind(kind, labels), mining=mining, margin=margin, normalize=normalize
        )
        assert as_set(own) == wanted(x, labels, mining, margin, normalize)
        assert all(str(index.dtype).removeprefix("torch.") == "int64" for index in own)
        assert all(isinstance(index, torch.Tensor) == (kind == "torch") for index in own)
        anchor = np.asarray(own[0])
        assert np.all(np.diff(anchor) >= 0)
        if mining != "band":
            break


def test_inequalities():
    """What users confuse. Anchor 0, positive at distance 2; negatives at 1, 2.5, 2.9 and 5; margin 1."""
    x = np.array([0.0, 2.0, 1.0, 2.5, 2.9, 5.0])[:, None]
    labels = np.array([0, 0, 1, 2, 3, 4])

    def of_anchor(mining):
        a, p, n = nf.mine_triplets(x, labels, mining=mining, margin=1.0, normalize=False)
        assert np.all(p[a == 0] == 1)
        return n[a == 0].tolist()

    assert of_anchor("hard") == [2]  # nearer than the positive
    assert of_anchor("semihard") == [3]  # farther than the positive, and the closest of those
    assert of_anchor("band") == [3, 4]  # farther, by less than the margin: all of them
    assert of_anchor("all") == [2, 3, 4, 5]


@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("mining", ["hard", "semihard", "band"])
def test_ties_go_to_the_lower_index(mining, d):
    """Integer points: distances tie, and every arithmetic agrees on them."""
    x = integers(90, d, 0, 2) if d == 2 else integers(90, d, -1, 2)
    x[45:60] = x[:15]
    labels = rng(d).integers(0, 4, 90)
    own = nf.mine_triplets(x, labels, mining=mining, margin=1.5, normalize=False)
    assert as_set(own) == wanted(x, labels, mining, 1.5, normalize=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precisions(dtype):
    """Half precisions are widened, so near distances do not tie that differ."""
    x, labels = batch(60, 16, 5)
    x = torch.from_numpy(x).to(getattr(torch, dtype))
    for mining in MINING:
        own = nf.mine_triplets(x, torch.from_numpy(labels), mining=mining)
        same = nf.mine_triplets(x.float(), torch.from_numpy(labels), mining=mining)
        assert all(torch.equal(a, b) for a, b in zip(own, same, strict=True))


@minings
def test_no_gradient(mining):
    x, labels = (torch.from_numpy(a) for a in batch(20, 4, 3))
    plain = nf.mine_triplets(x, labels, mining=mining)
    own = nf.mine_triplets(x.requires_grad_(), labels, mining=mining)
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
    assert not any(index.requires_grad for index in own)


@minings
@pytest.mark.parametrize("labels", [[], [3], [5, 5, 5], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("most", [None, 0, 4])
def test_no_triplets(mining, labels, most, kind):
    labels = of_kind(kind, np.array(labels, int))
    own = nf.mine_triplets(of_kind(kind, points(len(labels), 3)), labels, mining=mining, max_triplets=most)
    assert all(tuple(index.shape) == (0,) for index in own)


@pytest.mark.parametrize("mining", ["hard", "semihard", "band"])
def test_equal_embeddings(mining):
    """Everything at distance 0: the lowest indices; none is farther than another."""
    x, labels = np.ones((12, 20)), np.arange(12) % 3
    own = nf.mine_triplets(x, labels, mining=mining, margin=1.0)
    assert as_set(own) == wanted(x, labels, mining, 1.0)
    assert len(own[0]) == {"hard": 12, "semihard": 36, "band": 0}[mining]


@pytest.mark.parametrize("mining", ["hard", "semihard", "band"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows(mining, bad):
    """Rows with NaN are in no triplet; the others are mined as without them."""
    x, labels = batch(60, 20, 4)
    x[[7, 30], 3] = bad
    good = np.delete(np.arange(60), [7, 30])
    own = nf.mine_triplets(x, labels, mining=mining)
    expected = nf.mine_triplets(x[good], labels[good], mining=mining)
    assert as_set(own) == as_set([good[index] for index in expected])


# ---- samples ---------------------------------------------------------------------------------------------------------


@minings
def test_samples_are_of_what_is_mined(mining, kind):
    x, labels = batch(50, 6, 4)
    x, labels = of_kind(kind, x), of_kind(kind, labels)
    every = as_set(nf.mine_triplets(x, labels, mining=mining))
    for most in (0, 1, 7, len(every) - 1, len(every), len(every) + 5):
        own = nf.mine_triplets(x, labels, mining=mining, max_triplets=most)
        assert as_set(own) <= every
        assert len(own[0]) == min(most, len(every))
        again = nf.mine_triplets(x, labels, mining=mining, max_triplets=most)
        assert all((a == b).all() for a, b in zip(own, again, strict=True))
    first, second = (as_set(nf.mine_triplets(x, labels, mining=mining, max_triplets=20, seed=seed)) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("mining", ["all", "band"])
def test_samples_are_uniform(mining):
    """Every triplet as often as any other, also those of anchors with few: chi-squared over all of them."""
    x, labels = batch(12, 3, 3, seed=2)
    every = sorted(as_set(nf.mine_triplets(x, labels, mining=mining, margin=0.6)))
    assert len(every) > 40
    seen = collections.Counter()
    draws, each = 400, 10
    for seed in range(draws):
        own = nf.mine_triplets(x, labels, mining=mining, margin=0.6, max_triplets=each, seed=seed)
        seen.update(as_set(own))
    expected = draws * each / len(every)
    spread = sum((seen[triplet] - expected) ** 2 for triplet in every) / expected
    degrees = len(every) - 1
    assert spread < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("mining", ["all", "band"])
def test_counts_beyond_32_bits(mining):
    """2.7e10 triplets; a thousand of them in memory for a thousand (and a block of distances)."""
    n = 6000 if mining == "all" else 1500
    x, labels = rng(5).standard_normal((n, 8)).astype(np.float32), np.arange(n) % 2
    tracemalloc.start()
    a, p, k = nf.mine_triplets(x, labels, mining=mining, margin=2.0, max_triplets=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(a) == 1000
    assert np.all((labels[a] == labels[p]) & (a != p) & (labels[a] != labels[k]))
    assert len(np.unique(a)) > 600  # spread over anchors, high ones too
    assert a.max() > 0.98 * n
    assert peak < (8 << 20 if mining == "all" else 24 << 20)
    if mining == "band":
        d = distances(x)
        assert np.all((d[a, p] < d[a, k] + 1e-6) & (d[a, k] < d[a, p] + 2 + 1e-6))


def test_blocks_of_anchors(monkeypatch):
    x, labels = batch(50, 6, 4)
    expected = nf.mine_triplets(x, labels, mining="band")
    monkeypatch.setattr(module, "_BLOCK", 7)
    own = nf.mine_triplets(x, labels, mining="band")
    assert all(np.array_equal(a, b) for a, b in zip(own, expected, strict=True))


# ---- what they are for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test_the_loss_of_what_is_mined_is_the_batch_loss(mining):
    x, labels = batch(60, 20, 6)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = nf.triplet_margin_loss(
        *(u[index] for index in nf.mine_triplets(x, labels, mining=mining)), margin=0.2, eps=0.0, reduction="none"
    )
    expected = rows[rows > 0].mean() if mining == "all" else rows.mean()
    assert nf.batch_triplet_loss(x, labels, mining=mining) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_metric_learning():
    """Its names for the same sets: "all" without a margin, "semihard" for the band, BatchHardMiner for hard."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances as pml_distances
    from pytorch_metric_learning import miners

    x, labels = (torch.from_numpy(a) for a in batch(40, 8, 4))
    distance = pml_distances.LpDistance()
    theirs = {
        "all": miners.TripletMarginMiner(1e6, "all", distance=distance),
        "band": miners.TripletMarginMiner(0.2, "semihard", distance=distance),
        "hard": miners.BatchHardMiner(distance=distance),
    }
    for mining, miner in theirs.items():
        assert as_set(nf.mine_triplets(x, labels, mining=mining)) == as_set(miner(x, labels)), mining


def test_any_integer_labels(kind):
    x, labels = batch(30, 4, 3)
    expected = as_set(nf.mine_triplets(x, labels, mining="all"))
    for dtype, values in (("int8", [-128, 0, 127]), ("uint64", [0, 2**63, 2**64 - 1]), ("int16", [-1, -2, 9])):
        own = of_kind(kind, np.array(values, dtype)[labels])
        assert as_set(nf.mine_triplets(of_kind(kind, x), own, mining="all")) == expected


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of forward mode
@pytest.mark.parametrize("mining", ["all", "hard", "semihard", "band"])
def test_inside_torch_func(mining):
    """Indices have no gradient, but what is mined may be part of what is differentiated."""
    x, labels = (torch.from_numpy(a) for a in batch(12, 4, 3))

    def loss(x):
        return nf.triplet_margin_loss(*(x[index] for index in nf.mine_triplets(x, labels, mining=mining)), margin=2.0)

    slope = torch.autograd.functional.jacobian(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), slope)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,))[1], (slope * x).sum())
    index = nf.mine_triplets(x, labels, mining=mining)[1]
    scaled = torch.func.vmap(lambda scale: scale * nf.mine_triplets(x, labels, mining=mining)[1])(torch.arange(3))
    assert torch.equal(scaled[2], 2 * index)


@pytest.mark.parametrize("mining", ["all", "hard", "semihard", "band"])
def test_vmap_is_refused_where_it_decides_how_many(mining):
    x, labels = torch.from_numpy(np.stack([X, X + 1])), torch.from_numpy(np.stack([LABELS, LABELS]))
    message = "expected values that can be looked at, got what torch.func.vmap maps over: they say how many triplets"
    with pytest.raises(ValueError, match=f"^labels: {message}"):
        torch.func.vmap(lambda own: nf.mine_triplets(x[0], own, mining=mining))(labels)
    mapped = torch.func.vmap(lambda own: nf.mine_triplets(own, labels[0], mining=mining), out_dims=None)
    if mining == "all":  # does not look at distances
        assert len(mapped(x)[0]) == 6 * 1 * 4
        return
    with pytest.raises(ValueError, match=f"^embeddings: {message}"):
        mapped(x)


X, LABELS = points(6, 4), np.array([0, 0, 1, 1, 2, 2])

BAD = {
    "mining": (dict(mining="easy"), ValueError, "mining: expected 'all', 'hard', 'semihard' or 'band', got 'easy'"),
    "margin": (dict(margin=-0.1), ValueError, "margin: expected a non-negative number, got -0.1"),
    "infinite": (dict(margin=np.inf), ValueError, "margin: expected a non-negative number"),
    "labels": (dict(labels=LABELS[:4]), ValueError, r"labels: expected shape \(6,\) to match embeddings"),
    "floats": (dict(labels=LABELS / 2), TypeError, "labels: expected an integer dtype"),
    "list": (dict(embeddings=X.tolist()), TypeError, "embeddings: expected a NumPy"),
    "row": (dict(embeddings=X[0]), ValueError, "embeddings: expected shape"),
    "most": (dict(max_triplets=-1), ValueError, "max_triplets: expected at least 0, got -1"),
    "part": (dict(max_triplets=1.5), TypeError, "max_triplets: expected an integer, got float"),
    "seed": (dict(seed="a"), TypeError, "seed: expected an integer, got str"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nf.mine_triplets(**({"embeddings": X, "labels": LABELS} | changed))
