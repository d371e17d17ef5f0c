"""Triplets of a labelled batch, compiled: losses with their gradient, mined indices. As `nearfar.operations`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, codes_of, empty
from .backend import kernel


def _launch(
    weights: Array | None,
    x: Array,
    labels: Array,
    config: tuple[Any, ...],
    gradients: bool,
    places: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[Array, Array | None, float, int]:
    """Sums of the anchors, gradient, sum, number of triplets; into `places` the triplets themselves."""
    launch = kernel(x, "triplet")
    mining, margin, squared, soft, reduction, normalize = config
    codes, classes = codes_of(labels)
    rows = empty(x, (x.shape[0],))
    dx = empty(x, tuple(x.shape)) if gradients else None
    upstream = None
    if weights is not None:
        upstream = empty(x, (x.shape[0],))
        upstream[...] = weights
    positive, negative = places or (None, None)
    total, count = launch(
        x,
        codes,
        classes,
        mining,
        margin,
        squared,
        soft,
        normalize,
        upstream,
        reduction == "mean",
        rows,
        dx,
        positive,
        negative,
        0 if positive is None else len(positive),
    )
    return rows, dx, total, count


def batch_triplet(weights: Array | None, x: Array, labels: Array, *config: Any) -> tuple[Any, ...]:
    """Triplet losses: value ("none": every anchor's sum) and gradient.

    `config` is mining, margin, squared, soft, reduction, normalize, and whether the gradient is wanted.
    """
    *config_of_loss, gradients = config
    rows, dx, total, count = _launch(weights, x, labels, tuple(config_of_loss), gradients)
    reduction = config[4]
    if reduction == "none":
        return rows, dx
    value = empty(x, ())
    value[...] = total / max(count, 1) if reduction == "mean" else total
    return value, dx


def mined(x: Array, labels: Array, mining: str, normalize: bool) -> tuple[NDArray[np.int64], ...]:
    """(anchor, positive, negative) of "hard" or "semihard", by anchor, then by positive."""
    codes, classes = codes_of(labels)
    each = np.ones(len(codes), np.int64) if mining == "hard" else np.bincount(codes, minlength=classes)[codes] - 1
    anchor = np.repeat(np.arange(len(codes)), each)
    positive, negative = np.full((2, len(anchor)), -1)
    _launch(None, x, labels, (mining, 0.0, True, False, "sum", normalize), False, (positive, negative))
    kept = negative >= 0
    return anchor[kept], positive[kept], negative[kept]


def prepare(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """What a second derivative needs to know: the triplets, where they are few, and how many a mean is over."""
    import torch

    x, labels = (t.detach() for t in tensors[:2])
    mining, normalize = config[0], config[-1]
    if mining != "all":
        found = mined(x, labels, mining, normalize)
        return tuple(map(torch.from_numpy, found)), max(len(found[0]), 1)
    return (), max(_launch(None, x, labels, config, False)[3], 1)
