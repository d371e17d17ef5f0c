"""The operations as plain torch formulas, for a block of rows: what second derivatives are taken of.

``rows(tensors, config, rows) -> value of those rows``, with the inputs and the configuration of the operation of the
same name in `nearfar.operations`. Imports torch.
"""

from __future__ import annotations

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
        return torch.logsumexp(torch.cat(parts, 1), 1) - s_positive

    if mode == "both":
        return (losses(x[rows], columns) + losses(columns[rows], x)) / 2
    return losses(x[rows], columns)


def labelled_lse_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.labelled_lse`; the slope of a map is a constant."""
    x, y, scale, labels, maps = tensors
    power, normalize = config
    prepare = unit if normalize else (lambda z: z)
    own = prepare(x)
    s = scale.to(x.dtype) * own[rows] @ (own if y is None else prepare(y)).T
    index = torch.arange(x.shape[0], device=x.device)
    labels = labels.to(torch.int64)
    same = (labels if y is None else index)[rows, None] == labels
    wanted = index[rows, None] != index if y is None else torch.ones_like(same)

    def lse(constants: Tensor, members: Tensor, power: float = 1.0) -> Tensor:
        sign, q, r, shift = constants.to(s.dtype)
        slope = power * sign * (q * s + r).relu().detach()
        some = members.any(1)
        # A sum of nothing has no derivative; its value, -inf, is not wanted here.
        logits = (slope * (s - shift)).masked_fill(~members, -torch.inf).masked_fill(~some[:, None], 0.0)
        return torch.logsumexp(logits, 1).masked_fill(~some, 0.0)

    sums = [lse(maps[0], same & wanted), lse(maps[1], ~same & wanted)]
    if power is not None:
        sums.append(lse(maps[1], ~same & wanted, power))
    return torch.stack(sums, 1)


def alignment_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Values of `operations.alignment`."""
    alpha, _, normalize = config
    x, y = (unit(z[rows]) if normalize else z[rows] for z in tensors)
    square = (x - y).square().sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0) ** (alpha / 2), 0.0)


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
