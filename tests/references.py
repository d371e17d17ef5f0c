"""References for all-pairs operations: the definitions, entry by entry, in a precision above the one under test.

The allowed error of a distance is what the design promises (DESIGN, precision contract): squared distances come from
differences up to 16 dimensions and for near pairs, above that from an expansion about a common centre.
"""

import numpy as np
import torch
from generators import numpy_of

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
DTYPES = {"numpy": ("float16", "float32", "float64"), "torch": ("float16", "bfloat16", "float32", "float64")}
KINDS = [(kind, dtype) for kind, dtypes in DTYPES.items() for dtype in dtypes]

DIRECT = 16  # dimensions up to which squared distances come from differences
NEAR = 1 / 512  # squared distances below this part of both squared norms come from differences in any case


def wide(array):
    """The values, one precision up from the one that computes: float64, or long double for float64."""
    name = str(array.dtype).removeprefix("torch.")
    return numpy_of(array).astype(np.longdouble if name == "float64" else np.float64)


def step(array):
    """Rounding of the dtype that computes."""
    return np.finfo(np.float64 if str(array.dtype).removeprefix("torch.") == "float64" else np.float32).eps


def squares(x, y):
    """|x_i - y_j|^2, (..., n, m), from the differences."""
    if x.shape[-2] == 0:
        return (x[..., :, None, :] - y[..., None, :, :]).sum(-1)
    return np.stack([((y - x[..., i : i + 1, :]) ** 2).sum(-1) for i in range(x.shape[-2])], -2)


def unit(x):
    """Rows of unit norm; a zero row stays zero."""
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest > 0, largest, 1)
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


def distances(x, y=None, metric="euclidean"):
    """What `cdist` is defined to be; the diagonal of x against itself is 0."""
    same, x = y is None, wide(x)
    y = x if same else wide(y)
    if metric == "dot":
        return x @ np.swapaxes(y, -1, -2)
    if metric == "cosine":
        x, y = unit(x), unit(y)
        # A zero row is at distance 1; everything else is half the squared chord, which keeps its digits.
        zero = ~np.any(x, -1)[..., :, None] | ~np.any(y, -1)[..., None, :]
        result = np.where(zero, 1, squares(x, y) / 2)
    else:
        result = squares(x, y)
        result = np.sqrt(result) if metric == "euclidean" else result
    if same:
        result[..., np.arange(x.shape[-2]), np.arange(x.shape[-2])] = 0
    return result


def allowed(x, y, metric, expected):
    """The error that the precision contract leaves to every entry of `cdist`."""
    eps, x = step(x), wide(x)
    y = x if y is None else wide(y)
    d = x.shape[-1]
    grow = 4 + np.sqrt(d) / 2
    if metric == "dot":
        return (
            grow
            * eps
            * np.linalg.norm(x.astype(float), axis=-1)[..., :, None]
            * np.linalg.norm(y.astype(float), axis=-1)[..., None, :]
        )
    if metric == "cosine":
        near = 8 * eps * np.sqrt(2 * expected) + 8 * eps**2
        return np.where(expected < NEAR / 1.2, near, grow * eps)
    square = expected**2 if metric == "euclidean" else expected
    bound = grow * eps * square
    if d > DIRECT:
        center = y.mean(-2, keepdims=True) if y.shape[-2] else 0
        norms = ((x - center) ** 2).sum(-1)[..., :, None] + ((y - center) ** 2).sum(-1)[..., None, :]
        bound = bound + 2 * eps * np.where(square < NEAR / 2 * norms, 0, norms)
    if metric == "sqeuclidean":
        return bound
    return bound / (2 * np.where(expected > 0, expected, 1)) + eps * expected


def assert_distances(actual, x, y, metric):
    """`cdist(x, y)` against the definition, within the contract; exact where the distance is 0."""
    expected = distances(x, y, metric)
    actual = numpy_of(actual)
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - allowed(x, y, metric, expected)
    if excess.size and not np.all(excess <= 0):
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(f"{metric}: {actual[worst]!r} at {worst}, expected {float(expected[worst])!r}")


def torch_distances(x, y, metric):
    """The same as a formula that torch differentiates, with slope 0 at distance 0."""
    if metric in ("dot", "cosine"):
        if metric == "cosine":
            x, y = torch_unit(x), torch_unit(y)
        s = x @ y.mT
        return s if metric == "dot" else 1 - s
    square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    if metric == "sqeuclidean":
        return square
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def torch_unit(x):
    """Rows of unit norm; a zero row stays zero with zero derivatives."""
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(square > 0, x / torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def nearest(distances, k):
    """The k smallest of every row, ties by lower index: values and indices."""
    index = np.argsort(distances, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(distances, index, -1), index


def integers(n, d, low=-3, high=4, seed=0):
    """Integer-valued points: every sum of products is exact, so every result has one right value, bit for bit."""
    return np.random.default_rng([n, d, seed]).integers(low, high, (n, d)).astype(np.float64)


def clusters(n, d, count=10, far=10.0, spread=1e-2, seed=0):
    """Tight clusters far apart: what no expansion of the square gets right."""
    rng = np.random.default_rng([n, d, count, seed])
    return far * rng.standard_normal((count, d))[rng.integers(0, count, n)] + spread * rng.standard_normal((n, d))


def same_bits(a, b):
    """Equal bit for bit; NaN equals NaN."""
    a, b = (np.asarray(z.detach().cpu() if isinstance(z, torch.Tensor) else z) for z in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
