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


class _Matern(torch.autograd.Function):
    """exp(-t), (1 + t) exp(-t), (1 + t + t^2 / 3) exp(-t) of the square q = t^2, for twice nu = 1, 3, 5.

    The derivative by q of one is a multiple of the one before, so no square root is differentiated at 0. That of the
    first is -exp(-t) / (2 t), and 0 at 0.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, twice_nu: int) -> Tensor:
        ctx.save_for_backward(q)
        ctx.twice_nu = twice_nu
        t = q.sqrt()
        factor = {1: torch.ones_like(t), 3: 1 + t, 5: 1 + t + q / 3}[twice_nu]
        return factor * torch.exp(-t)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        (q,) = ctx.saved_tensors
        if ctx.twice_nu > 1:
            lower: Tensor = _Matern.apply(q, ctx.twice_nu - 2)  # type: ignore[no-untyped-call]
            return grad[0] * lower / (-2 if ctx.twice_nu == 3 else -6), None
        t = torch.where(q > 0, q, 1.0).sqrt()
        return grad[0] * torch.where(q > 0, torch.exp(-t) / (-2 * t), 0.0), None


# step -> f(operand, its parameters and those after them); csrc/pairwise/map.hpp has the formulas.
_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": lambda s, p: torch.exp(-p[0] * s / 2),
    "matern12": lambda s, p: _Matern.apply(p[0] * s, 1),  # type: ignore[no-untyped-call]
    "matern32": lambda s, p: _Matern.apply(3 * p[0] * s, 3),  # type: ignore[no-untyped-call]
    "matern52": lambda s, p: _Matern.apply(5 * p[0] * s, 5),  # type: ignore[no-untyped-call]
    "rational_quadratic": lambda s, p: torch.exp(-p[1] * torch.log1p(s * (p[0] / (2 * p[1])))),
    "laplacian": lambda s, p: torch.exp(-p[0] * s),
    "affine": lambda s, p: s * p[0] + p[1],
    "tanh": lambda s, p: torch.tanh(s),
    "scale": lambda s, p: s * p[0],
}


def apply_program(program: str, x: Tensor, y: Tensor, parameters: Tensor) -> Tensor:
    """The matrix of a kernel given as a program (`nearfar.kernels.program`)."""
    registers: list[Tensor] = []
    for line in program.split(";"):
        name, *operands = line.split()
        left, right = map(int, operands)
        if name in ("dot", "unit_dot", "sqeuclidean", "absolute"):
            a, b = (z[..., left : None if right < 0 else right] for z in (x, y))
            if name == "absolute":
                registers.append((a.unsqueeze(-2) - b.unsqueeze(-3)).abs().sum(-1))
            else:
                registers.append(apply_map(name.removeprefix("unit_"), a, b))
        elif name == "power":
            registers.append(registers[left] ** right)
        elif name in ("add", "multiply"):
            combine = torch.add if name == "add" else torch.mul
            registers.append(combine(registers[left], registers[right]))
        else:
            registers.append(_STEPS[name](registers[left], parameters[right:]))
    return registers[-1]


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
    row, column = torch.arange(n)[rows, None], torch.arange(n)
    return value[:, column > row]


def gram_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.gram`."""
    x, y, parameters = tensors
    return apply_program(config[0], x[:, rows], x if y is None else y, parameters)


def matmul_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.matmul`."""
    x, y, v, parameters = tensors
    product: Tensor = apply_program(config[0], x[:, rows], x if y is None else y, parameters) @ v
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
