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
    index = torch.arange(n, device=x.device)
    return value[:, index > index[rows, None]]


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
