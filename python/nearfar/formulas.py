"""The operations as plain torch formulas, for a block of rows: what second derivatives are taken of.

``rows(tensors, config, rows) -> value of those rows``, with the inputs and the configuration of the operation of the
same name in `nearfar.operations`. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero, with zero derivatives."""
    square = (x * x).sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)


def apply_map(map: str, x: Tensor, y: Tensor) -> Tensor:
    """The matrix of a map."""
    if map in ("dot", "one_minus_dot"):
        s = x @ y.mT
        return s if map == "dot" else 1 - s
    square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if map == "sqeuclidean":
        return square
    if map == "gaussian":
        return torch.exp(-square / 2)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def softmax_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `operations.softmax`."""
    x, y, positive, paired, scale, ids = tensors
    mode, _, normalize, in_sum, shift = config
    prepare = unit if normalize else (lambda z: z)
    scale = scale.to(x.dtype)
    x = prepare(x)
    columns = x if y is None else prepare(y)
    n = x.shape[0]
    index = torch.arange(n, device=x.device)[rows]
    positives = prepare(positive) if positive is not None else columns[:n]
    chosen = (index + shift) % n
    s_positive: Tensor = scale * (x[rows] * positives[chosen]).sum(-1)

    def losses(own: Tensor, others: Tensor) -> Tensor:
        s = scale * own @ others.T
        out = torch.zeros_like(s, dtype=torch.bool)
        column = torch.arange(others.shape[0], device=x.device)
        if positive is None:
            out = out | (column == chosen[:, None])
        if mode == "pairs":
            out = out | (column == index[:, None])
        if ids is not None:
            out[:, :n] |= ids[rows, None] == ids
        parts = [s.masked_fill(out, -torch.inf)]
        if in_sum:
            parts.append(s_positive[:, None])
        if paired is not None:
            parts.append(scale * (prepare(paired[rows]) * own[:, None]).sum(-1))
        s = torch.cat(parts, 1)
        empty = (s == -torch.inf).all(1)  # nothing to tell the positive from: 0
        loss = torch.logsumexp(torch.where(empty[:, None], 0.0, s), 1) - s_positive
        return torch.where(empty, 0.0, loss)

    if mode == "both":
        return (losses(x[rows], columns) + losses(columns[rows], x)) / 2
    return losses(x[rows], columns)


def n_pairs_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `operations.n_pairs`."""
    x, y = tensors
    l2_reg, reduction = config
    loss = softmax_rows((x, y, None, None, x.new_ones(()), None), ("rows", reduction, False, True, 0), rows)
    loss += l2_reg / 2 * (x[rows].square() + y[rows].square()).sum(-1)
    return loss


def sup_con_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `operations.sup_con`: those of some items, with all their views."""
    x, scale, labels, positive_mask = tensors
    _, normalize = config
    views = x.shape[1] if x.ndim == 3 else 1
    flat = x.reshape(-1, x.shape[-1])
    flat = unit(flat) if normalize else flat
    index = torch.arange(flat.shape[0], device=x.device)
    own = index.reshape(-1, views)[rows].reshape(-1, 1)
    if labels is not None:
        positive = labels[own // views] == labels[index // views]
    else:
        positive = own // views == index // views
        if positive_mask is not None:
            positive = positive | positive_mask[own // views, index // views]
    itself = own == index
    positive = positive & ~itself
    count = positive.sum(1)
    s = scale.to(x.dtype) * flat[own[:, 0]] @ flat.T
    mean = s.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    # Anchors without a positive keep themselves in the sum, so that it is not empty where nothing comes of it.
    loss = torch.logsumexp(s.masked_fill(itself & (count > 0)[:, None], -torch.inf), 1) - mean
    return torch.where(count > 0, loss, 0.0).reshape(x[rows].shape[:-1])


def sup_con_anchors(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> int:
    """How many rows of `operations.sup_con` have a positive."""
    x, _, labels, positive_mask = tensors
    if x.ndim == 3 and x.shape[1] > 1:
        return int(x.shape[0] * x.shape[1])
    if positive_mask is not None:
        return int((positive_mask.sum(1) > positive_mask.diagonal()).sum())
    if labels is None:
        return 0
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return int((counts[inverse] > 1).sum())


def sigmoid_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `operations.sigmoid`."""
    x, y, scale, bias = tensors
    _, normalize = config
    x, y = (unit(z) if normalize else z for z in (x, y))
    logits = scale.to(x.dtype) * x[rows] @ y.T + bias.to(x.dtype)
    index = torch.arange(x.shape[0], device=x.device)
    sign = torch.where(index[rows, None] == index, 1.0, -1.0).to(x.dtype)
    # Not torch's softplus, which is x itself from 20 on.
    return -torch.nn.functional.logsigmoid(sign * logits).sum(1)


def alignment_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Values of `operations.alignment`."""
    alpha, _, normalize = config
    x, y = (unit(z[rows]) if normalize else z[rows] for z in tensors)
    square = (x - y).square().sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0) ** (alpha / 2), 0.0)


def _euclidean(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Distances of paired rows, or their squares; slope 0 at distance 0."""
    square = (x - y).square().sum(-1)
    return square if squared else torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def _triplet_terms(positive: Tensor, negative: Tensor, margin: float, soft: bool) -> Tensor:
    gap = positive - negative
    return torch.logaddexp(gap, torch.zeros_like(gap)) if soft else torch.relu(gap + margin)


def batch_triplet_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Each anchor's sum in `triplets.batch_triplet`, on the triplets that were mined; for "all" an anchor at a time."""
    x, labels, *mined = tensors
    mining, margin, squared, soft, _, normalize = config
    u = unit(x) if normalize else x
    anchors = range(x.shape[0])[rows]
    if mining != "all":
        anchor, positive, negative = (index[(mined[0] >= anchors.start) & (mined[0] < anchors.stop)] for index in mined)
        own, near, far = (u.index_select(0, index) for index in (anchor, positive, negative))
        loss = _triplet_terms(_euclidean(own, near, squared), _euclidean(own, far, squared), margin, soft)
        return loss.new_zeros(len(anchors)).index_add(0, anchor - anchors.start, loss)
    sums = []
    for i in anchors:
        same = labels == labels[i]
        value = _euclidean(u[i], u, squared)
        terms = _triplet_terms(value[same, None], value[~same], margin, soft)
        own = _triplet_terms(value[i], value[~same], margin, soft)  # the anchor is not its own positive
        sums.append(terms.sum() - own.sum())
    return torch.stack(sums)


def store_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.store`; condensed: their pairs i < j."""
    x, y = tensors
    map, normalize, condensed = config
    prepare = unit if normalize else (lambda z: z)
    columns = prepare(x if y is None else y)
    value = apply_map(map, prepare(x)[:, rows], columns)
    if not condensed:
        return value
    n = x.shape[1]
    row, column = torch.arange(n)[rows, None], torch.arange(n)
    return value[:, column > row]


def matmul_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.matmul`."""
    x, y, v = tensors
    product: Tensor = apply_map(config[0], x[:, rows], x if y is None else y) @ v
    return product


def potential_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Exponents of `operations.potential`: -t |x_i - x_j|^2 for j > i, else -inf."""
    (x,) = tensors
    t, normalize = config
    x = unit(x) if normalize else x
    n = x.shape[0]
    with torch.no_grad():
        center = x.mean(0)
    square = apply_map("sqeuclidean", (x - center)[rows], x - center)
    later = torch.arange(n, device=x.device) > torch.arange(n, device=x.device)[rows, None]
    return torch.where(later, -t * square, -torch.inf)


# ---- losses of paired rows: torch differentiates them as they are ----------------------------------------------------


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or loss.shape[0] == 0 else loss.mean()


def contrastive(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Tensor:
    """`rowwise.contrastive`."""
    x1, x2, same = tensors
    margin, reduction, normalize = config
    x1, x2 = (unit(x.double()) if normalize else x.double() for x in (x1, x2))
    apart = torch.relu(margin - _euclidean(x1, x2, False)).square()
    loss = torch.where(same != 0, _euclidean(x1, x2, True), apart)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return _reduced(loss, reduction).to(dtype)


def triplet_margin(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Tensor:
    """`torch.nn.functional.triplet_margin_loss`, in at least float32; spelled out, because that has no vmap."""
    margin, p, swap, eps, reduction, normalize = config
    anchor, positive, negative = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    if normalize:
        anchor, positive, negative = unit(anchor), unit(positive), unit(negative)
    distance = torch.nn.functional.pairwise_distance
    far = distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, distance(positive, negative, p, eps))
    return _reduced((margin + distance(anchor, positive, p, eps) - far).clamp_min(0), reduction)


PLAIN: dict[str, Callable[..., Tensor]] = {"contrastive": contrastive, "triplet_margin": triplet_margin}
