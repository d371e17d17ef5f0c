"""Triplets of a labelled batch, compiled: losses with their gradient, mined indices. As `loss_operations`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, cast, codes_of, compute_dtype, empty, of_kind, scalar, to_numpy
from .backend import kernel, on_cuda


def _launch(
    weights: Array | None,
    x: Array,
    labels: Array,
    config: tuple[Any, ...],
    gradients: bool,
    places: tuple[Array, Array] | None = None,
    begin: Array | None = None,
) -> tuple[Array, Array | None, Any, Any]:
    """Sums of the anchors, gradient, sum or mean, number of triplets; into `places` the triplets themselves."""
    launch = kernel(x, "triplet")
    mining, margin, squared, soft, reduction, normalize = config
    rows = empty(x, (x.shape[0],))
    dx = empty(x, x.shape, zero=True) if gradients else None
    upstream = None
    if weights is not None:
        upstream = empty(x, (x.shape[0],))
        upstream[...] = weights
    positive, negative = places or (None, None)
    if on_cuda(x):  # labels as they are: codes would have to be counted, and the stream waited for
        codes, classes, size = cast(labels, "int64").reshape(-1), None, begin
    else:
        codes, classes = codes_of(labels)
        size = 0 if positive is None else len(positive)
    loss = (mining, margin, squared, soft, normalize)
    total, count = launch(x, codes, classes, *loss, upstream, reduction == "mean", rows, dx, positive, negative, size)
    return rows, dx, total, count


def batch_triplet(weights: Array | None, x: Array, labels: Array, *config: Any) -> tuple[Any, ...]:
    """Triplet losses: value ("none": every anchor's sum) and gradient.

    `config` is mining, margin, squared, soft, reduction, normalize, and whether the gradient is wanted.
    """
    *config_of_loss, gradients = config
    rows, dx, total, _ = _launch(weights, x, labels, tuple(config_of_loss), gradients)
    if config[4] == "none":
        return rows, dx
    return scalar(x, total, compute_dtype(x)), dx


def mined(x: Array, labels: Array, mining: str, normalize: bool) -> tuple[NDArray[np.int64], ...]:
    """(anchor, positive, negative) of "hard" or "semihard", by anchor, then by positive; in memory of NumPy."""
    codes, classes = codes_of(to_numpy(labels))
    each = np.ones(len(codes), np.int64) if mining == "hard" else np.bincount(codes, minlength=classes)[codes] - 1
    anchor = np.repeat(np.arange(len(codes)), each)
    positive, negative = (of_kind(np.full(len(anchor), -1), x) for _ in range(2))
    begin = of_kind(np.cumsum(each) - each, x)
    _launch(None, x, labels, (mining, 0.0, True, False, "sum", normalize), False, (positive, negative), begin)
    found = to_numpy(positive), to_numpy(negative)
    kept = found[1] >= 0
    return anchor[kept], found[0][kept], found[1][kept]


def prepare(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """What a second derivative needs to know: the triplets, where they are few, and how many a mean is over."""
    x, labels = (t.detach() for t in tensors[:2])
    mining, normalize = config[0], config[-1]
    if mining != "all":
        found = mined(x, labels, mining, normalize)
        return tuple(of_kind(index, x) for index in found), max(len(found[0]), 1)
    return (), max(int(_launch(None, x, labels, config, False)[3]), 1)
