"""What each process of `test_distributed.py` runs: named checks, in one world. Not a test file itself."""

import contextlib
import os
import traceback
import warnings
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import nearfar as nf

D = 17
SIZES = {1: [23], 2: [37, 6], 3: [14, 0, 33]}  # rows of every rank: uneven, odd, none


class World:
    """A rank's part of arrays that all ranks can make."""

    def __init__(self, rank, size):
        self.rank, self.size, self.sizes = rank, size, SIZES[size]
        self.n = sum(self.sizes)
        first = sum(self.sizes[:rank])
        self.mine = slice(first, first + self.sizes[rank])

    def points(self, dtype=torch.float64, seed=0, d=D):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.n, d, generator=g, dtype=torch.float64)
        y = x + 0.5 * torch.randn(self.n, d, generator=g, dtype=torch.float64)
        return x.to(dtype), y.to(dtype)

    def queue(self, dtype=torch.float64):
        """4, 5, 6 ... rows of shared negatives of each rank, and which are this one's."""
        counts = [4 + rank for rank in range(self.size)]
        q = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        first = sum(counts[: self.rank])
        return q.to(dtype), slice(first, first + counts[self.rank])


LOSSES = {
    "info_nce": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, temperature=t, **k),
    "symmetric": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, temperature=t, symmetric=True, **k),
    "ids": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, temperature=t, ids=i, **k),
    "symmetric_ids": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, temperature=t, ids=i, symmetric=True, **k),
    "negatives": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, q, temperature=t, **k),
    "all_negatives": lambda m, x, y, q, i, t, **k: m.info_nce_loss(x, y, q, temperature=t, in_batch=True, ids=i, **k),
    "clip": lambda m, x, y, q, i, t, **k: m.clip_loss(x, y, 1 / t, **k),
    "nt_xent": lambda m, x, y, q, i, t, **k: m.nt_xent_loss(x, y, temperature=t, **k),
    "siglip": lambda m, x, y, q, i, t, **k: m.siglip_loss(x, y, 1 / t, t - 10, **k),
}
PLAIN = [{}, {"normalize": False, "reduction": "sum"}]


def reference(name, x, y, t):
    """Dense, in float64."""
    x, y = (torch.nn.functional.normalize(z.double()) for z in (x, y))
    n = len(x)
    if name == "siglip":
        z = 2 * torch.eye(n, dtype=torch.float64) - 1
        return -torch.nn.functional.logsigmoid(z * (x @ y.T / t + t - 10)).sum() / n
    if name == "nt_xent":
        z = torch.cat((x, y))
        s = (z @ z.T / t).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(s, torch.arange(2 * n).roll(n))
    s = x @ y.T / t
    loss = torch.nn.functional.cross_entropy(s, torch.arange(n))
    if name == "info_nce":
        return loss
    return (loss + torch.nn.functional.cross_entropy(s.T, torch.arange(n))) / 2


def close(got, want, tolerance, what):
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error = float((got - want).norm()) / max(float(want.norm()), 1e-300) if want.numel() else 0.0
    assert error <= tolerance, f"{what}: {error:.2e} off"


def same_everywhere(world, value):
    """Bitwise."""
    values = [None] * world.size
    dist.all_gather_object(values, value.detach().numpy().tobytes())
    assert len(set(values)) == 1, values


def raises(error, text, f):
    said = None
    try:
        f()
    except error as caught:
        said = str(caught)
    assert said is not None, f"no {error.__name__}"
    assert text in said, said


def compare(world, name, dtype, value_tolerance, gradient_tolerance, **options):
    """Against one process with all rows: gradients are size times its, those of scalars its."""
    x, y = world.points(dtype)
    q, part = world.queue(dtype)
    ids = torch.randint(0, world.n // 2, (world.n,), generator=torch.Generator().manual_seed(5))
    loss = LOSSES[name]

    def run(module, own, own_q):
        leaves = [z[own].clone().requires_grad_() for z in (x, y)] + [q[own_q].clone().requires_grad_()]
        t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        value = loss(module, *leaves, ids[own], t, **options)
        value.backward()
        return value, [leaf.grad for leaf in leaves], t.grad

    everything = slice(None)
    want, wanted, wanted_t = run(nf, everything, everything)
    got, grads, t_grad = run(nf.distributed, world.mine, part)
    assert got.dtype == want.dtype
    close(got, want, value_tolerance, f"{name} value")
    same_everywhere(world, got)
    close(t_grad, wanted_t, gradient_tolerance, f"{name} temperature")
    for own, whole, where, what in zip(grads, wanted, (world.mine, world.mine, part), "xyq", strict=True):
        if whole is None:
            assert own is None
            continue
        assert own.dtype == whole.dtype == dtype
        # Relative to the whole gradient: a rank's part may be small.
        share = (own.double() - world.size * whole[where].double()).norm() / (world.size * whole.double().norm())
        assert share <= gradient_tolerance, f"{name} gradient of {what}: {share:.2e} off"


def check_float64(world):
    for name in LOSSES:
        for options in PLAIN:
            compare(world, name, torch.float64, 1e-12, 1e-11, **options)


def check_float32(world):
    for name in LOSSES:
        compare(world, name, torch.float32, 1e-6, 1e-5)


def check_halves(world):
    for name in LOSSES:
        for dtype, eps in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            compare(world, name, dtype, 1e-6, 2 * eps)  # both are rounded to the dtype, at different magnitudes


def check_dense(world):
    x, y = world.points()
    for name in ("info_nce", "clip", "nt_xent", "siglip"):
        leaves = [z.clone().requires_grad_() for z in (x, y)]
        want = reference(name, *leaves, 0.2)
        want.backward()
        own = [z[world.mine].clone().requires_grad_() for z in (x, y)]
        got = LOSSES[name](nf.distributed, *own, None, None, 0.2)
        got.backward()
        close(got, want, 1e-12, name)
        for a, b in zip(own, leaves, strict=True):
            close(a.grad, world.size * b.grad[world.mine], 1e-10, f"{name} gradient")


def check_small_losses(world):
    """Positives stay apart: a loss of 1e-20 keeps its digits."""
    if 0 in world.sizes:
        return
    eye = torch.eye(world.n, dtype=torch.float64)
    want = (world.n - 1) * np.exp(-50.0)
    got = nf.distributed.info_nce_loss(eye[world.mine], eye[world.mine], temperature=0.02)
    assert abs(float(got) - want) <= 1e-12 * want, (float(got), want)


def check_none(world):
    x, y = world.points()
    for name, loss in LOSSES.items():
        q, part = world.queue()
        ids = torch.arange(world.n) // 2
        want = loss(nf, x, y, q, ids, 0.2, reduction="none")
        got = loss(nf.distributed, x[world.mine], y[world.mine], q[part], ids[world.mine], 0.2, reduction="none")
        if name == "nt_xent":
            want = want.reshape(2, -1)[:, world.mine].reshape(-1)
        else:
            want = want[world.mine]
        close(got, want, 1e-12, name)
    raises(
        NotImplementedError,
        "reduction: 'none'",
        lambda: nf.distributed.clip_loss(x[world.mine].clone().requires_grad_(), y[world.mine], reduction="none"),
    )


class Model(torch.nn.Module):
    """Two encoders and a scale."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(D, 5), torch.nn.Linear(D, 5)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.bias = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, x, y):
        return self.image(x), self.text(y), self.log_scale.exp(), self.bias * 1


def check_ddp(world):
    x, y = world.points(torch.float32)
    losses = {
        "clip": lambda m, u, v, s, b: m.clip_loss(u, v, s) + 0 * b,
        "siglip": lambda m, u, v, s, b: m.siglip_loss(u, v, s, b),
        "info_nce": lambda m, u, v, s, b: m.info_nce_loss(u, v, logit_scale=s) + 0 * b,
        "nt_xent": lambda m, u, v, s, b: m.nt_xent_loss(u, v, logit_scale=s) + 0 * b,
    }
    for name, loss in losses.items():
        models = []
        for wrapped in (False, True):
            torch.manual_seed(0)
            model = Model()
            step = torch.nn.parallel.DistributedDataParallel(model) if wrapped else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            rows, module = (world.mine, nf.distributed) if wrapped else (slice(None), nf)
            for _ in range(3):
                optimizer.zero_grad()
                loss(module, *step(x[rows], y[rows])).backward()
                optimizer.step()
            models.append(model)
        for (what, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            close(b, a, 2e-6, f"{name}: {what} after 3 steps")
            close(b.grad, a.grad, 5e-5, f"{name}: gradient of {what}")


def check_nothing(world):
    x = torch.zeros(0, D, requires_grad=True)
    for name, loss in LOSSES.items():
        if "negatives" not in name:
            value = loss(nf.distributed, x, x, None, torch.zeros(0, dtype=torch.int64), 0.2)
            assert value.item() == 0, (name, value)
            value.backward()
    one = torch.ones(int(world.rank == 0), D)
    assert float(nf.distributed.clip_loss(one, one)) == 0


def check_bad(world):
    """Nobody waits for the one that refuses."""
    x, y = (z[world.mine] for z in world.points())
    last = world.rank == world.size - 1
    wrong = y[:, :3] if last else y
    if last:
        raises(ValueError, "positive_key: expected shape", lambda: nf.distributed.info_nce_loss(x, wrong))
    else:
        text = f"rank {world.size - 1} has refused its arguments: ValueError: positive_key"
        raises(RuntimeError, text, lambda: nf.distributed.info_nce_loss(x, wrong))
    if world.size > 1:
        t = 0.1 if last else 0.2
        raises(ValueError, "temperature: expected the same", lambda: nf.distributed.info_nce_loss(x, y, temperature=t))
        raises(ValueError, "dtype: expected the same", lambda: nf.distributed.clip_loss(*(
            (x.float(), y.float()) if last else (x, y))))  # fmt: skip
    raises(TypeError, "query: expected a torch.Tensor", lambda: nf.distributed.info_nce_loss(x.numpy(), y.numpy()))
    own = torch.zeros(len(x), 2, D, dtype=x.dtype)
    raises(NotImplementedError, "negative_keys", lambda: nf.distributed.info_nce_loss(x, y, own))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nf.distributed.clip_loss(leaf, y), leaf, create_graph=True)
    raises(NotImplementedError, "no second derivative", lambda: grad.sum().backward())


def check_one_wants(world):
    """Gradients on one rank only: the others take part without being asked."""
    x, y = world.points()
    own = x[world.mine].clone().requires_grad_(world.rank == 0)
    value = nf.distributed.info_nce_loss(own, y[world.mine])
    assert value.requires_grad == (world.rank == 0)
    if world.rank == 0:
        whole = x.clone().requires_grad_()
        nf.info_nce_loss(whole, y).backward()
        value.backward()
        close(own.grad, world.size * whole.grad[world.mine], 1e-11, "gradient")


def check_traffic(world):
    """What is sent is O(n d) a step; nothing is as large as all rows, or as rows times columns."""
    n, d = 96, 8
    g = torch.Generator().manual_seed(world.rank)
    x, y = (torch.randn(n, d, generator=g, requires_grad=True) for _ in range(2))
    sent, gathered = [], []
    post, gather = dist.batch_isend_irecv, dist.all_gather
    dist.batch_isend_irecv = lambda ops: (
        sent.extend(op.tensor.numel() for op in ops if op.op is dist.isend),
        post(ops),
    )[1]
    dist.all_gather = lambda out, own, **k: (gathered.append(own.numel()), gather(out, own, **k))[1]
    try:
        nf.distributed.clip_loss(x, y).backward()
    finally:
        dist.batch_isend_irecv, dist.all_gather = post, gather
    assert max(sent, default=0) <= n * d
    assert max(gathered) <= 8
    # Keys twice, their gradient and log-sum-exps once, normalisers and weights once.
    assert sum(sent) == (world.size - 1) * (3 * n * d + 3 * n), (sum(sent), world.size)


def check_group(world):
    """A group of its own numbering."""
    ranks = list(range(world.size))[::-1][: max(world.size - 1, 1)]
    group = dist.new_group(ranks)
    if world.rank not in ranks:
        raises(ValueError, "group", lambda: nf.distributed.clip_loss(torch.ones(1, D), torch.ones(1, D), group=group))
        return
    x, y = (torch.randn(5 * len(ranks), D, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    y = y + torch.linspace(0, 1, D)
    at = dist.get_rank(group)
    rows = slice(5 * at, 5 * at + 5)
    close(nf.distributed.clip_loss(x[rows], y[rows], group=group), nf.clip_loss(x, y), 1e-6, "clip in a group")


def blobs(world, dtype=np.float64, d=4):
    rng = np.random.RandomState(0)
    n = 40 * world.n
    centers = 8 * rng.randn(5, d)
    x = (centers[rng.randint(5, size=n)] + rng.randn(n, d)).astype(dtype)
    weights = rng.randint(1, 4, n).astype(dtype)
    return x, weights, slice(40 * world.mine.start, 40 * world.mine.stop)


def check_kmeans(world):
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-4)):
        x, weights, mine = blobs(world, dtype)
        starts = [{"init": x[:5].copy()}, {"random_state": 3}, {"random_state": 4, "init": "random", "n_init": 2}]
        for options in (*starts, {"random_state": 1, "spherical": True}):
            for w in (None, weights):
                one = nf.KMeans(5, **options).fit(x, sample_weight=w)
                many = nf.distributed.KMeans(5, **options).fit(x[mine], sample_weight=None if w is None else w[mine])
                assert np.allclose(many.cluster_centers_, one.cluster_centers_, rtol=tolerance, atol=tolerance), options
                assert np.array_equal(many.labels_, one.labels_[mine]), options
                assert abs(many.inertia_ / one.inertia_ - 1) <= tolerance, options
                assert many.n_iter_ == one.n_iter_, options
                same_everywhere(world, torch.from_numpy(many.cluster_centers_))
                assert np.array_equal(many.predict(x[:7]), one.predict(x[:7]))
    torch_model = nf.distributed.KMeans(3, random_state=0).fit(torch.from_numpy(x[mine]))
    assert isinstance(torch_model.labels_, torch.Tensor)
    same_everywhere(world, torch_model.cluster_centers_)
    half = torch.from_numpy(x[mine]).bfloat16()
    start = torch.from_numpy(x[:3]).bfloat16()
    assert nf.distributed.KMeans(3, init=start).fit(half).cluster_centers_.dtype == torch.float32
    unseeded = nf.distributed.KMeans(3).fit(x[mine])  # rank 0's generator, for all
    same_everywhere(world, torch.from_numpy(unseeded.cluster_centers_))


def check_kmeans_empty(world):
    """Empty clusters, duplicates, NaN, too few rows."""
    x, _, mine = blobs(world)
    far = np.vstack([x[:4], np.full((1, x.shape[1]), 1e3)])  # nobody's centroid
    one, many = nf.KMeans(5, init=far).fit(x), nf.distributed.KMeans(5, init=far).fit(x[mine])
    assert np.allclose(one.cluster_centers_, many.cluster_centers_)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nf.distributed.KMeans(3, random_state=0).fit(np.ones((len(x[mine]), 2)))
    assert any("distinct clusters" in str(w.message) for w in caught)
    bad = x[mine].copy()
    if world.rank == 0:
        bad[0, 0] = np.nan
    raises(ValueError, "X: expected finite", lambda: nf.distributed.KMeans(2, random_state=0).fit(bad))
    raises(ValueError, "n_clusters", lambda: nf.distributed.KMeans(10**6).fit(x[mine]))
    if world.size > 1:
        seeds = lambda: nf.distributed.KMeans(2, random_state=world.rank).fit(x[mine])  # noqa: E731
        raises(ValueError, "random_state: expected the same", seeds)


def check_gram_matmul(world):
    x, y = world.points()
    v = torch.randn(world.n, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    kernel = nf.kernels.Gaussian(2.0) + nf.kernels.Linear()
    m = world.mine
    close(nf.distributed.gram_matmul(x[m], y[m], v[m], kernel), (kernel(x, y) @ v)[m], 1e-12, "sum")
    close(nf.distributed.gram_matmul(x[m], None, v[m, 0], lengthscale=3.0), (
        nf.gram(x, lengthscale=3.0) @ v[:, 0])[m], 1e-12, "vector")  # fmt: skip
    got = nf.distributed.gram_matmul(x[m].bfloat16(), y[m].bfloat16(), v[m].bfloat16())
    close(got, (nf.gram(x.bfloat16().float(), y.bfloat16().float()) @ v.bfloat16().float())[m], 1e-5, "bfloat16")
    raises(NotImplementedError, "no gradients", lambda: nf.distributed.gram_matmul(
        x[m].clone().requires_grad_(), None, v[m]))  # fmt: skip
    learnable = nf.kernels.Gaussian(torch.tensor(2.0, dtype=torch.float64, requires_grad=True))
    expected = NotImplementedError if len(x[m]) else RuntimeError  # a rank without rows hears of it from the others
    raises(expected, "no gradients", lambda: nf.distributed.gram_matmul(x[m], None, v[m], learnable))


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def run(rank, size, path, queue):
    """All checks in one world; (rank, name, traceback or None) to the queue."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    world = World(rank, size)
    for name, check in CHECKS.items():
        said = None
        try:
            check(world)
        except Exception:
            said = traceback.format_exc()
        queue.put((rank, name, said))
        if os.environ.get("NEARFAR_DEBUG") and said:
            print(said, flush=True)
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    dist.destroy_process_group()
