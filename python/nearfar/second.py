"""Second derivatives: a plain torch formula of the operation, a block of rows at a time, differentiated twice.

They are rare, so they get no kernel; memory is O(block * M), never O(N * M).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import formulas
from .operators import OPERATIONS

_BLOCK = 512  # rows at a time


def _blocks(n: int) -> Iterator[slice]:
    for begin in range(0, n, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, n))


def _twice(total: Tensor, leaves: list[Tensor], extra: list[Tensor], vectors: list[Tensor | None]) -> list[Tensor]:
    """Derivatives of ``<vectors, d total / d leaves>`` with respect to leaves and extra."""
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    along = sum(((f * v.to(f.dtype)).sum() for f, v in zip(first, vectors, strict=True) if v is not None), total * 0)
    return list(torch.autograd.grad(along, [*leaves, *extra], allow_unused=True, materialize_grads=True))


def _leaves(tensors: tuple[Any, ...], count: int) -> tuple[list[Any], list[int]]:
    """Detached inputs in at least float32, the differentiable ones requiring gradients; and where those are."""
    made: list[Any] = []
    where = []
    for k, tensor in enumerate(tensors):
        own = tensor
        if k < count and tensor is not None:
            own = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_()
            where.append(k)
        made.append(own)
    return made, where


def second(
    name: str, g: Tensor, value: Tensor, tensors: tuple[Any, ...], config: tuple[Any, ...], vectors: tuple[Any, ...]
) -> tuple[Tensor, list[Any]]:
    """Derivatives of ``<vectors, gradients>`` by the upstream gradient and the tensors, a block of rows at a time."""
    operation = OPERATIONS[name]
    x = tensors[0]
    rows_axis = 0 if operation.loss else x.dim() - 2
    terms = n = x.shape[rows_axis]
    if operation.prepare:
        extra, terms = operation.prepare(tensors, config)
        tensors = (*tensors, *extra)
    leaves, where = _leaves(tensors, operation.count)
    upstream = g.detach().to(torch.promote_types(g.dtype, torch.float32)).requires_grad_()
    own = [leaves[k] for k in where]
    along = [vectors[k] for k in where]
    totals = [torch.zeros_like(leaf) for leaf in own] + [torch.zeros_like(upstream)]
    offset = 0
    for rows in _blocks(n):
        with torch.enable_grad():
            part = operation.rows(tuple(leaves), config, rows)
            if not operation.loss:
                if value.dim() < x.dim():  # condensed
                    weights = upstream[..., offset : offset + part.shape[-1]]
                    offset += part.shape[-1]
                else:
                    weights = upstream[:, rows] if rows_axis else upstream[rows]
            elif "none" in config:
                weights = upstream[rows]
            else:
                weights = upstream / max(terms, 1) if "mean" in config else upstream
            pieces = _twice((part * weights).sum(), own, [upstream], along)
        for total, piece in zip(totals, pieces, strict=True):
            total += piece
    grads: list[Any] = [None] * operation.count
    for k, total in zip(where, totals, strict=False):
        grads[k] = total.to(tensors[k].dtype)
    return totals[-1].to(g.dtype), grads


def potential_second(
    name: str, g: Tensor, value: Tensor, tensors: tuple[Any, ...], config: tuple[Any, ...], vectors: tuple[Any, ...]
) -> tuple[Tensor, list[Any]]:
    """log Z: the second derivative is that of Z over Z, less the product of the first ones."""
    leaves, _ = _leaves(tensors, 1)
    x, v = leaves[0], vectors[0]
    n = x.shape[0]
    log_z = value.detach() + torch.log(torch.tensor(n * (n - 1) / 2, dtype=value.dtype))
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for rows in _blocks(n):
        with torch.enable_grad():
            z = torch.exp(formulas.potential_rows((x,), config, rows) - log_z).sum()
            (slope,) = torch.autograd.grad(z, x, create_graph=True)
            (bend,) = torch.autograd.grad((slope * v).sum(), x)
        first += slope.detach()
        second += bend
    along = (first * v).sum()
    return along.to(g.dtype), [(g * (second - first * along)).to(tensors[0].dtype)]
