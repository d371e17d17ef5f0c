"""Second derivatives: a plain torch formula of the operation, a block of rows at a time, differentiated twice.

They are rare, so they get no kernel; memory is O(block * M), never O(N * M).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import formulas

# Derivatives of ``<vectors, gradients>`` by the upstream gradient and the tensors that may require one, of (number of
# those, upstream gradient, value, tensors, config, vectors).
Second = Callable[[int, Tensor, Tensor, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]], tuple[Tensor, list[Any]]]

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


def by_rows(rows: Callable[..., Tensor], loss: bool, prepare: Callable[..., Any] | None = None) -> Second:
    """That of a plain formula, ``rows(tensors, config, slice of rows)``, a block of rows at a time.

    The formula is also given the tensors that `prepare` made, beside what a mean divides by where that is not the
    number of rows.
    """

    def second(
        count: int,
        g: Tensor,
        value: Tensor,
        tensors: tuple[Any, ...],
        config: tuple[Any, ...],
        vectors: tuple[Any, ...],
    ) -> tuple[Tensor, list[Any]]:
        x = tensors[0]
        rows_axis = 0 if loss else x.dim() - 2
        terms = n = x.shape[rows_axis]
        if prepare:
            extra, terms = prepare(tensors, config)
            tensors = (*tensors, *extra)
        leaves, where = _leaves(tensors, count)
        upstream = g.detach().to(torch.promote_types(g.dtype, torch.float32)).requires_grad_()
        own = [leaves[k] for k in where]
        along = [vectors[k] for k in where]
        totals = [torch.zeros_like(leaf) for leaf in own] + [torch.zeros_like(upstream)]
        offset = 0
        for block in _blocks(n):
            with torch.enable_grad():
                part = rows(tuple(leaves), config, block)
                if not loss:
                    if value.dim() < x.dim():  # condensed
                        weights = upstream[..., offset : offset + part.shape[-1]]
                        offset += part.shape[-1]
                    else:
                        weights = upstream[:, block] if rows_axis else upstream[block]
                elif "none" in config:
                    weights = upstream[block]
                else:
                    weights = upstream / max(terms, 1) if "mean" in config else upstream
                pieces = _twice((part * weights).sum(), own, [upstream], along)
            for total, piece in zip(totals, pieces, strict=True):
                total += piece
        grads: list[Any] = [None] * count
        for k, total in zip(where, totals, strict=False):
            grads[k] = total.to(tensors[k].dtype)
        return totals[-1].to(g.dtype), grads

    return second


def potential_second(
    count: int, g: Tensor, value: Tensor, tensors: tuple[Any, ...], config: tuple[Any, ...], vectors: tuple[Any, ...]
) -> tuple[Tensor, list[Any]]:
    """log Z: the second derivative is that of Z over Z, less the product of the first ones."""
    leaves, _ = _leaves(tensors, count)
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


def hsic_second(
    count: int, g: Tensor, value: Tensor, tensors: tuple[Any, ...], config: tuple[Any, ...], vectors: tuple[Any, ...]
) -> tuple[Tensor, list[Any]]:
    """With K_v, L_v the derivatives of both matrices along the vectors and a prime for centred ones, <vectors,
    gradients> is ``<K_v, W> + <L_v, V>``, ``W = g0 L' + 2 g1 K'``, ``V = g0 K' + 2 g2 L'``. Centring is a projection:
    its derivative is ``<dK_v, W> + <dK, g0 L_v' + 2 g1 K_v'>`` and as much of L.
    """
    leaves, _ = _leaves(tensors, count)
    n, diagonal = tensors[0].shape[0], config[2]
    offsets = value[3:].reshape(2, n)
    own = [[leaves[side], leaves[2 + side]] for side in range(2)]
    along = [[vectors[side], vectors[2 + side]] for side in range(2)]
    index = torch.arange(n, device=value.device)

    def matrices(side: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows of the matrix and of its derivative along the vectors, zero where a pair does not count."""
        points, parameters = own[side]
        matrix = formulas.apply_program(config[side], points[rows], points, parameters)
        matrix = matrix if diagonal else matrix.masked_fill(index == index[rows, None], 0.0)
        weights = torch.zeros_like(matrix, requires_grad=True)
        slopes = torch.autograd.grad((matrix * weights).sum(), own[side], create_graph=True, materialize_grads=True)
        total = (weights * 0).sum()
        for slope, vector in zip(slopes, along[side], strict=True):
            total = total if vector is None else total + (slope * vector.to(slope.dtype)).sum()
        return matrix, torch.autograd.grad(total, weights, create_graph=True)[0]

    def centred(matrix: Tensor, offsets: Tensor, rows: slice) -> Tensor:
        matrix = matrix.detach() - offsets[rows, None] - offsets
        return matrix if diagonal else matrix.masked_fill(index == index[rows, None], 0.0)

    sums = torch.zeros_like(offsets)
    for rows in _blocks(n):
        with torch.enable_grad():
            for side in range(2):
                sums[side, rows] = matrices(side, rows)[1].detach().sum(1, dtype=sums.dtype)
    p, q = (n, n * n) if diagonal else (n - 2, (n - 1) * (n - 2))
    slope_offsets = sums / p - sums.sum(1, keepdim=True) / (2 * q)

    g_grad = torch.zeros_like(g)
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    weights = ((2 * g[1], g[0]), (g[0], 2 * g[2]))  # of K' and L', in what multiplies K and in what multiplies L
    for rows in _blocks(n):
        with torch.enable_grad():
            pairs = [matrices(side, rows) for side in range(2)]
            fixed = [centred(pairs[side][0], offsets[side], rows) for side in range(2)]
            slopes = [centred(pairs[side][1], slope_offsets[side], rows) for side in range(2)]
            total = value.new_zeros(())
            for (by_k, by_l), (matrix, slope) in zip(weights, pairs, strict=True):
                total = total + (slope * (by_k * fixed[0] + by_l * fixed[1])).sum()
                total = total + (matrix * (by_k * slopes[0] + by_l * slopes[1])).sum()
            pieces = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for whole, piece in zip(totals, pieces, strict=True):
            whole += piece
        g_grad[0] += (slopes[0] * fixed[1] + slopes[1] * fixed[0]).sum()
        g_grad[1] += 2 * (slopes[0] * fixed[0]).sum()
        g_grad[2] += 2 * (slopes[1] * fixed[1]).sum()
    return g_grad, [total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)]
