"""What the GPU benchmark is compared with: what people write in torch, and libraries where they are installed.

A peer is a function of the two sets, as ours is: it normalises rows itself, and gets them in the dtype of the line.
Inf-CL computes in float32; it and flash-kmeans multiply float32 as tf32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

from .case import load
from .cases.kernels import keops, keops_product, keops_squared_distances, lengthscale

Compute = Callable[[Any, Any], Any]

CHUNK = 512  # rows at a time of chunked losses
POINT_CHUNK = 2048  # and where each has a row of distances, of which several are alive
ITERATIONS = 5  # of k-means
NEIGHBORS = 10
TEMPERATURE = 0.07  # of InfoNCE and CLIP, as ours by default

# Library -> the module that must be importable.
LIBRARIES = {"Inf-CL": "inf_cl", "KeOps": "pykeops", "cuVS": "cuvs", "flash-kmeans": "flash_kmeans"}
OWN_ALLOCATOR = ("cuVS",)  # torch's does not see what these take


def installed(library: str) -> bool:
    """Whether there is something to import; what happens then is the peer's affair."""
    return importlib.util.find_spec(LIBRARIES[library]) is not None


# ---- losses ----------------------------------------------------------------------------------------------------------


def _unit(x: Any) -> Any:
    return load("torch.nn.functional").normalize(x, dim=1)


def info_nce(x: Any, y: Any) -> Any:
    """Row i of y is the positive of row i of x; rows beyond those of x are further negatives."""
    torch, functional = load("torch"), load("torch.nn.functional")
    return functional.cross_entropy(_unit(x) @ _unit(y).T / TEMPERATURE, torch.arange(len(x), device=x.device))


def info_nce_chunked(x: Any, y: Any) -> Any:
    """Rows by the chunk, scores computed again for the gradient: what one writes when N x N does not fit."""
    torch, functional, checkpoint = load("torch"), load("torch.nn.functional"), load("torch.utils.checkpoint")
    x, y = _unit(x), _unit(y)

    def part(rows: Any, columns: Any, begin: int) -> Any:
        target = torch.arange(begin, begin + len(rows), device=rows.device)
        return functional.cross_entropy(rows @ columns.T / TEMPERATURE, target, reduction="sum")

    parts = (
        checkpoint.checkpoint(part, x[begin : begin + CHUNK], y, begin, use_reentrant=False)
        for begin in range(0, len(x), CHUNK)
    )
    return sum(parts) / len(x)


def _inf_cl(u: Any, v: Any) -> Any:
    # A head is a block of columns, a power of two of them, since its kernels do not mask columns.
    head = math.gcd(u.shape[1], 256)
    return load("inf_cl").cal_flash_loss(u, v, scale=1 / TEMPERATURE, head_dim=head).mean()


def info_nce_inf_cl(x: Any, y: Any) -> Any:
    """Inf-CL's loss of a row, which computes in float32, so rows are normalised there too."""
    return _inf_cl(_unit(x.float()), _unit(y.float()))


def clip(x: Any, y: Any) -> Any:
    """Both directions from one matrix of scores."""
    torch, functional = load("torch"), load("torch.nn.functional")
    logits, target = _unit(x) @ _unit(y).T / TEMPERATURE, torch.arange(len(x), device=x.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def clip_inf_cl(x: Any, y: Any) -> Any:
    """Both directions, each a call."""
    u, v = _unit(x.float()), _unit(y.float())
    return (_inf_cl(u, v) + _inf_cl(v, u)) / 2


def nt_xent(x: Any, y: Any) -> Any:
    """Two views of a batch."""
    torch, functional = load("torch"), load("torch.nn.functional")
    z, n = _unit(torch.cat([x, y])), len(x)
    logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
    return functional.cross_entropy(logits, (torch.arange(2 * n, device=x.device) + n) % (2 * n))


def siglip(x: Any, y: Any) -> Any:
    """Scale 10, bias -10."""
    logits = 10 * _unit(x) @ _unit(y).T - 10
    return (load("torch.nn.functional").softplus(logits).sum() - logits.diagonal().sum()) / len(x)


def classes(x: Any) -> Any:
    """Labels of 32 rows each."""
    return load("torch").arange(len(x), device=x.device) // 32


def sup_con(x: Any, y: Any) -> Any:
    """Of the first set, with `classes`."""
    labels, u = classes(x), _unit(x)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    logits = (u @ u.T / 0.1).fill_diagonal_(float("-inf"))
    return (logits.logsumexp(1) - logits.where(positive, 0).sum(1) / positive.sum(1)).mean()


def uniformity(x: Any, y: Any) -> Any:
    """Of the first set."""
    u, n = _unit(x), len(x)
    potential = (4 * (u @ u.T) - 4).exp()
    return ((potential.sum() - potential.diagonal().sum()) / (n * (n - 1))).log()


# ---- kernels ---------------------------------------------------------------------------------------------------------


def gaussian(x: Any, y: Any) -> Any:
    """K(x, y) times the first column of y."""
    torch, scale = load("torch"), lengthscale(x.shape[1])
    distances = (torch.cdist(rows, y) / scale for rows in x.split(POINT_CHUNK))
    return torch.cat([torch.exp(-r.square() / 2) @ y[:, :1] for r in distances])


def matern(x: Any, y: Any) -> Any:
    """The same of smoothness 5/2."""
    torch, scale = load("torch"), 5**0.5 / lengthscale(x.shape[1])
    distances = (scale * torch.cdist(rows, y) for rows in x.split(POINT_CHUNK))
    return torch.cat([((1 + t + t * t / 3) * torch.exp(-t)) @ y[:, :1] for t in distances])


def keops_matmul(term: str) -> Compute:
    """The same by KeOps."""
    return lambda x, y: keops_product(keops("torch"), x, y, y[:, :1], lengthscale(x.shape[1]), (term,))


# ---- points ----------------------------------------------------------------------------------------------------------


def assign(x: Any, y: Any) -> Any:
    """The nearest row of y, by the expansion of the square."""
    torch = load("torch")
    square = y.square().sum(1)
    return torch.cat([(square - 2 * rows @ y.T).argmin(1) for rows in x.split(65536)])


def assign_keops(x: Any, y: Any) -> Any:
    """From the differences."""
    return keops_squared_distances(keops("torch"), x, y).argmin(dim=1)[:, 0]


def assign_flash(x: Any, y: Any) -> Any:
    """flash-kmeans wants the squares of the rows, which are part of the time."""
    torch = load("torch")
    square = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()
    return load("flash_kmeans.assign_euclid_triton").euclid_assign_triton(x[None], y[None], square[None])[0]


def lloyd(x: Any, y: Any) -> Any:
    """Centroids after `ITERATIONS` from those of y."""
    torch = load("torch")
    for _ in range(ITERATIONS):
        labels = assign(x, y)
        sums = torch.zeros_like(y).index_add_(0, labels, x)
        counts = labels.bincount(minlength=len(y))[:, None]
        y = torch.where(counts > 0, sums / counts.clamp_min(1), y)
    return y


def lloyd_flash(x: Any, y: Any) -> Any:
    """As many: it stops once centroids move by less than `tol`, and nothing is less than 0."""
    # From where it is defined: the package's own name is plain torch where its kernels cannot be imported.
    kmeans = load("flash_kmeans.kmeans_triton_impl").batch_kmeans_Euclid
    _, centroids, _ = kmeans(x[None], len(y), max_iters=ITERATIONS, tol=0.0, init_centroids=y[None])
    return centroids[0]


def nearest(x: Any, y: Any) -> Any:
    """The `NEIGHBORS` nearest rows of y, nearest first."""
    torch = load("torch")
    return torch.cat([torch.cdist(rows, y).topk(NEIGHBORS, largest=False)[1] for rows in x.split(4096)])


def nearest_keops(x: Any, y: Any) -> Any:
    """From the differences."""
    return keops_squared_distances(keops("torch"), x, y).argKmin(NEIGHBORS, dim=1)


@functools.cache
def _cuvs_resources() -> Any:
    return load("cuvs.common").Resources()


def nearest_cuvs(x: Any, y: Any) -> Any:
    """With the index, which holds the squares of the rows of y: ours computes them in every call too."""
    brute_force, resources = load("cuvs.neighbors.brute_force"), _cuvs_resources()
    index = brute_force.build(y, metric="sqeuclidean", resources=resources)
    _, neighbors = brute_force.search(index, x, NEIGHBORS, resources=resources)
    resources.sync()  # its stream is not torch's
    return neighbors
