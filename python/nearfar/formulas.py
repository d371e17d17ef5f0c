"""The operations as plain torch formulas, for a block of rows: what second derivatives are taken of.

``rows(tensors, config, rows) -> value of those rows``, with the inputs and the configuration of the operation of the
same name in `nearfar.operations` or `nearfar.loss_operations`. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arrays import is_concrete, matrix_product


def unit(x: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero, with zero derivatives."""
    # Scaled by their largest entry: no square overflows.
    x = x / x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    square = (x * x).sum(-1, keepdim=True)
    return x * square.masked_fill(square == 0, torch.inf).rsqrt()


def _root(square: Tensor) -> Tensor:
    """The square root, with zero derivatives at 0; NaN stays NaN."""
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def apply_map(map: str, x: Tensor, y: Tensor) -> Tensor:
    """The matrix of a map."""
    if map in ("dot", "one_minus_dot"):
        s: Tensor = matrix_product(x, y.mT)
        return s if map == "dot" else 1 - s
    if map.startswith(("cityblock", "chebyshev", "minkowski")):
        return coordinate_map(map, (x.unsqueeze(-2) - y.unsqueeze(-3)).abs())
    square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if map == "sqeuclidean":
        return square
    return _root(square)


class _Matern(torch.autograd.Function):
    """exp(-t), (1 + t) exp(-t), (1 + t + t^2 / 3) exp(-t) of the square q = t^2, for twice nu = 1, 3, 5.

    The derivative by q of one is a multiple of the one before, so no square root is differentiated at 0. That of the
    first is -exp(-t) / (2 t), and 0 at 0.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, twice_nu: int) -> Tensor:
        ctx.save_for_backward(q)
        ctx.twice_nu = twice_nu
        t = q.sqrt().clamp(max=1000)  # where exp(-t) is 0, t may be infinite
        factor = {1: torch.ones_like(t), 3: 1 + t, 5: 1 + t + t * t / 3}[twice_nu]
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
    "matern12": lambda s, p: _Matern.apply(p[0] * p[0] * s, 1),  # type: ignore[no-untyped-call]
    "matern32": lambda s, p: _Matern.apply(3 * p[0] * s, 3),  # type: ignore[no-untyped-call]
    "matern52": lambda s, p: _Matern.apply(5 * p[0] * s, 5),  # type: ignore[no-untyped-call]
    "rational_quadratic": lambda s, p: torch.exp(
        -p[1] * (torch.log1p(s * (p[0] / (2 * p[1]))) + torch.where(s > 0, p[2], 0.0))
    ),
    "laplacian": lambda s, p: torch.exp(-p[0] * s),
    "affine": lambda s, p: s * p[0] + p[1],
    "tanh": lambda s, p: torch.tanh(s),
    "scale": lambda s, p: s * p[0],
}


def _chi_squared(x: Tensor, y: Tensor) -> Tensor:
    total = x + y
    return (x - y) ** 2 / (total + (total == 0))  # where the difference is 0 too


_COORDINATE_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute": lambda x, y: (x - y).abs(),
    "chi_squared": _chi_squared,
}


def apply_program(program: str, x: Tensor, y: Tensor, parameters: Tensor) -> Tensor:
    """The matrix of a kernel given as a program (`nearfar.kernels.program`).

    Maps are in double precision: slopes of a tiny length scale, times each other, overflow float32.
    """
    registers: list[Tensor] = []
    most = torch.finfo(x.dtype).max / 16  # as `parameter_of` in csrc/pairwise/map.hpp
    parameters = parameters.clamp(-most, most)
    for line in program.split(";"):
        name, *operands = line.split()
        left, right = map(int, operands)
        if name in ("dot", "unit_dot", "sqeuclidean", *_COORDINATE_SCORES):
            a, b = (z[..., left : None if right < 0 else right] for z in (x, y))
            if name in _COORDINATE_SCORES:
                registers.append(_COORDINATE_SCORES[name](a.unsqueeze(-2), b.unsqueeze(-3)).sum(-1).double())
            elif name == "unit_dot":
                registers.append(apply_map("dot", unit(a), unit(b)).double())
            else:
                registers.append(apply_map(name, a, b).double())
        elif name == "power":
            registers.append(registers[left] ** right)
        elif name in ("add", "multiply"):
            combine = torch.add if name == "add" else torch.mul
            registers.append(combine(registers[left], registers[right]))
        else:
            registers.append(_STEPS[name](registers[left], parameters[right:]))
    return registers[-1].to(x.dtype)


def coordinate_map(map: str, difference: Tensor) -> Tensor:
    """A metric from |x_k - y_k|; where the difference or the distance is 0, so are all derivatives."""
    if map == "cityblock":
        return difference.sum(-1)
    if map == "chebyshev":
        # Every coordinate that attains the maximum has the whole slope, as in the kernel.
        most = difference.detach().amax(-1, keepdim=True)
        ties = difference == most
        return (difference - most).masked_fill(~ties, 0.0).sum(-1) + most.squeeze(-1)
    p = float(map.partition(":")[2])
    apart = difference > 0
    # Powers, and those of a derivative the more, leave the range of floats long before distances do.
    largest = difference.detach().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    powers = torch.where(apart, torch.where(apart, difference / largest, 1.0) ** p, 0.0).sum(-1)
    away = powers > 0
    return largest.squeeze(-1) * torch.where(away, torch.where(away, powers, 1.0) ** (1 / p), 0.0)


def softmax_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `loss_operations.softmax`."""
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


def labelled_lse_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `loss_operations.labelled_lse`; the slope of a map is a constant."""
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


def n_pairs_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `loss_operations.n_pairs`."""
    x, y = tensors
    l2_reg, reduction = config
    loss = softmax_rows((x, y, None, None, x.new_ones(()), None), ("rows", reduction, False, True, 0), rows)
    loss += l2_reg / 2 * (x[rows].square() + y[rows].square()).sum(-1)
    return loss


def sup_con_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Losses of `loss_operations.sup_con`: those of some items, with all their views."""
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
    """How many rows of `loss_operations.sup_con` have a positive."""
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
    """Losses of `loss_operations.sigmoid`."""
    x, y, scale, bias = tensors
    _, normalize = config
    x, y = (unit(z) if normalize else z for z in (x, y))
    logits = scale.to(x.dtype) * x[rows] @ y.T + bias.to(x.dtype)
    index = torch.arange(x.shape[0], device=x.device)
    sign = torch.where(index[rows, None] == index, 1.0, -1.0).to(x.dtype)
    # Not torch's softplus, which is x itself from 20 on.
    return -torch.nn.functional.logsigmoid(sign * logits).sum(1)


def chosen_pairs(map: str, normalize: bool, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The map for row i of x and the rows index[i] of y, (n, k); NaN where the index is -1."""
    same, dtype = y is x, torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)  # once for both roles: the sum of their gradients is rounded, not each
    x, y = (unit(z) if normalize else z for z in (x, x if same else y.to(dtype)))
    # An embedding is differentiated in a fixed order; an index adds rows in that in which threads come.
    chosen = torch.nn.functional.embedding(index.clamp_min(0), y)
    # A matrix of 1 x k entries for every row.
    values = apply_map(map, x.unsqueeze(1), chosen).squeeze(1)
    return values.masked_fill(index < 0, torch.nan)


def alignment_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Values of `loss_operations.alignment`."""
    alpha, _, normalize = config
    x, y = (unit(z[rows]) if normalize else z[rows] for z in tensors)
    square = (x - y).square().sum(-1)
    if alpha == 2:  # smooth, also at 0
        return square
    zero = square == 0
    return square.masked_fill(zero, 1.0).pow(alpha / 2).masked_fill(zero, 0.0)


def _euclidean(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Distances of paired rows, or their squares; slope 0 at distance 0."""
    square = (x - y).square().sum(-1)
    return square if squared else _root(square)


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
    value = apply_map(map, prepare(x)[..., rows, :], columns)
    if not condensed:
        return value
    n = x.shape[-2]
    index = torch.arange(n, device=x.device)
    return value[..., index > index[rows, None]]


def gram_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.gram`."""
    x, y, parameters = tensors
    return apply_program(config[0], x[..., rows, :], x if y is None else y, parameters)


def matmul_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Rows of `operations.matmul`."""
    x, y, v, parameters = tensors
    product: Tensor = apply_program(config[0], x[..., rows, :], x if y is None else y, parameters) @ v
    return product


def potential_rows(tensors: tuple[Any, ...], config: tuple[Any, ...], rows: slice) -> Tensor:
    """Exponents of `loss_operations.potential`: -t |x_i - x_j|^2 for j > i, else -inf."""
    (x,) = tensors
    t, normalize = config
    x = unit(x) if normalize else x
    n = x.shape[0]
    with torch.no_grad():
        center = x.mean(0)
    square = apply_map("sqeuclidean", (x - center)[rows], x - center)
    later = torch.arange(n, device=x.device) > torch.arange(n, device=x.device)[rows, None]
    return torch.where(later, -t * square, -torch.inf)


# ---- a loss of paired rows: torch differentiates it as it is ---------------------------------------------------------


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or loss.shape[0] == 0 else loss.mean()


def triplet_margin(tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Tensor:
    """`torch.nn.functional.triplet_margin_loss`, in at least float32."""
    margin, p, swap, eps, reduction, normalize = config
    anchor, positive, negative = tensors
    if anchor.dtype.itemsize < 4:
        anchor, positive, negative = anchor.float(), positive.float(), negative.float()
    if normalize:
        anchor, positive, negative = unit(anchor), unit(positive), unit(negative)
    if is_concrete(anchor) and anchor.shape[0] > 0:
        how = ("none", "mean", "sum").index(reduction)  # torch's numbers of them
        return torch.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, how)
    # Spelled out: torch's own has no vmap, and of nothing the mean NaN.
    distance = torch.nn.functional.pairwise_distance
    far = distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, distance(positive, negative, p, eps))
    return _reduced((margin + distance(anchor, positive, p, eps) - far).clamp_min(0), reduction)


PLAIN: dict[str, Callable[..., Tensor]] = {"triplet_margin": triplet_margin}
