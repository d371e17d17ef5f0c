"""Losses of a batch that is spread over processes, each with its own rows: the value and gradients of the whole batch.

A softmax takes two rounds. In the first, every block of keys meets every process's queries, which leaves log-sum-exps,
merged as they come. Positives never travel and are kept apart, so that small losses keep their digits, as on one
process. In the second round the normalisers are known, and each block gives its share of both gradients; that of the
keys travels behind them. The sigmoid loss has no normaliser: one round.

Gradients are computed with the value. `backward` only scales them, so it communicates nothing: neither can it wait for
a process that has no backward, nor cross the communication of DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import loss_operations
from ..arrays import compute_dtype, dtype_name, is_torch
from ..gradients import Call
from ..operators import as_tensors
from .ring import Ring, Tensors

Gradients = list[Any]


class _Whole(Function):
    """apply(compute, *tensors) -> value of the whole batch, with the gradients of the tensors that compute() gives."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[Tensor, Gradients]], *tensors: Tensor) -> Tensor:
        value, gradients = compute()
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *gradients)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        pairs = zip(saved[: ctx.count], saved[ctx.count :], ctx.needs_input_grad[1:], strict=True)
        again = torch.is_grad_enabled()

        def scaled(*args: Tensor) -> Any:
            return _Scaled.apply(*args) if again else _Scaled.forward(None, *args)  # type: ignore[no-untyped-call]

        return (None, *(scaled(g, grad, tensor) if need else None for tensor, grad, need in pairs))


class _Scaled(Function):
    """apply(upstream, gradient, tensor) -> gradient of the tensor, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, grad: Tensor, tensor: Tensor) -> Tensor:
        # Rounded to the input's dtype only now: a loss scaler's factor in g keeps float16 gradients from vanishing.
        return (grad * g).to(device=tensor.device, dtype=tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise NotImplementedError("nearfar.distributed: losses have no second derivative")


@dataclass(frozen=True)
class _Batch:
    """A loss as one process sees it: its own rows and what it knows of the others'."""

    ring: Ring
    x: Tensor
    scale: Any
    normalize: bool
    gradients: bool
    factor: float  # of gradients of rows: the size of the group, over the number of rows for a mean


def _unit(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows in the compute dtype, of norm one where asked for, and what they were multiplied by."""
    x = x.to(getattr(torch, compute_dtype(x)))
    if not normalize:
        return x, x.new_ones((x.shape[0], 1))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    inverse = torch.where(norm == 0, 0.0, 1 / norm).to(x.dtype)
    return x * inverse, inverse


class _Positives:
    """Scores of paired rows, and their share of gradients."""

    def __init__(self, batch: _Batch, a: Tensor, b: Tensor) -> None:
        self.normalize = batch.normalize
        (self.a, self.a_inverse), (self.b, self.b_inverse) = (_unit(z, batch.normalize) for z in (a, b))
        self.cosines = (self.a * self.b).sum(1, dtype=torch.float64)
        self.scale = torch.as_tensor(batch.scale, dtype=torch.float64, device=a.device)
        self.scores = self.scale * self.cosines

    def add(self, slopes: Tensor, da: Tensor, db: Tensor) -> Tensor:
        """Adds the gradients by the rows for the slopes by the scores; returns that by scale."""
        weights = (self.scale * slopes)[:, None].to(da.dtype)
        along = self.cosines[:, None].to(da.dtype) if self.normalize else 0.0
        da += weights * self.a_inverse * (self.b - along * self.a)
        db += weights * self.b_inverse * (self.a - along * self.b)
        return (slopes * self.cosines).sum()


# ---- softmax ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Rows that every process's queries meet, `y` here; `y` None: the queries themselves.

    `ids` of x and y: equal ones are left out, of all processes or, where `everywhere` is not set, of this one only.
    """

    y: Tensor | None
    sizes: list[int]
    ids: Tensor | None = None
    everywhere: bool = False

    def block(self, *more: Tensor) -> Tensors:
        own = (self.y, *([self.ids] if self.everywhere else ()))
        return (*own, *more)

    def open(self, own: bool, block: Tensors) -> tuple[Tensor, tuple[Any, Any], Tensors]:
        """A block's rows, the ids (of x and of these) that are compared, and what else has come with it."""
        y, *more = block
        ids = more.pop(0) if self.everywhere else self.ids
        return y, ((self.ids, ids) if own or self.everywhere else (None, None)), tuple(more)


def _shares(ring: Ring, source: int, n: int, m: int) -> tuple[slice, slice]:
    """Where pairs of processes meet once: which rows of x and of the block are this process's to multiply.

    All of them; but half way round a circle of even length both processes meet, and each takes half.
    """
    if 2 * ((source - ring.rank) % ring.size) != ring.size:
        return slice(n), slice(m)
    return (slice(n // 2), slice(m)) if ring.rank < source else (slice(n), slice(m // 2, m))


def _log_sum_exps(batch: _Batch, columns: _Columns, both: bool) -> tuple[Tensor, Tensor | None]:
    """Of the rows of x over all columns; and of the columns over everybody's x, for `both`."""
    ring, x = batch.ring, batch.x
    once = columns.y is None
    columns, both = (replace(columns, y=x), True) if once else (columns, both)
    rows = torch.full((x.shape[0],), -torch.inf, dtype=torch.float64, device=x.device)

    def work(source: int, block: Tensors) -> Tensors:
        y, ids, _ = columns.open(source == ring.rank, block)
        i, j = _shares(ring, source, len(x), len(y)) if once else (slice(None), slice(None))
        of_columns = rows.new_full((len(y),), -torch.inf)
        own_x, own_y = x[i], y[j]
        if len(own_x) and len(own_y):
            itself = once and source == ring.rank
            lse, lse_y = loss_operations.softmax_block(
                own_x, None if itself else own_y, batch.scale, *ids, batch.normalize, both
            )
            rows[i] = torch.logaddexp(rows[i], lse)
            if lse_y is not None:
                of_columns[j] = lse_y
        return (of_columns,) if both else ()

    steps = ring.size // 2 if once else None
    back = ring.visit(columns.block(), columns.sizes, work, torch.logaddexp, steps)
    if once:
        return torch.logaddexp(rows, *back), None
    return rows, back[0] if both else None


def _add_gradients(
    batch: _Batch, columns: _Columns, known: tuple[Tensor, Tensor], of_columns: tuple[Tensor, Tensor] | None, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds to dx; returns the gradient of the columns and of the scale. Known: normalisers and weights of rows of x."""
    ring, x = batch.ring, batch.x
    once = columns.y is None
    columns, travelling = (replace(columns, y=x), known) if once else (columns, of_columns)
    dscale = torch.zeros((), dtype=torch.float64, device=x.device)

    def work(source: int, block: Tensors) -> Tensors:
        y, ids, theirs = columns.open(source == ring.rank, block)
        i, j = _shares(ring, source, len(x), len(y)) if once else (slice(None), slice(None))
        dy = torch.zeros(y.shape, dtype=dx.dtype, device=x.device)
        if not (len(x[i]) and len(y[j])):
            return (dy,)
        itself = once and source == ring.rank
        other = None if itself or not theirs else (theirs[0][j], theirs[1][j])
        grad_x, grad_y, grad_scale = loss_operations.softmax_block_grad(
            x[i],
            None if itself else y[j],
            batch.scale,
            *ids,
            batch.normalize,
            (known[0][i], known[1][i]),
            other,
        )
        dx[i] += grad_x
        dscale.add_(grad_scale)
        if grad_y is not None:
            dy[j] = grad_y
        return (dy,)

    steps = ring.size // 2 if once else None
    (dy,) = ring.visit(columns.block(*(travelling or ())), columns.sizes, work, steps=steps)
    if once:
        dx += dy
    return dy, dscale


def _softmax(batch: _Batch, call: Call, counts: list[list[int]]) -> tuple[Tensor, Tensor | None, Gradients]:
    """Losses of the own anchors; this process's share of the gradient of scale; gradients of the rows."""
    mode = call.config[0]
    (ids,) = call.extra
    x, device = batch.x, batch.x.device
    n = x.shape[0]
    items = torch.arange(n, device=device)
    if mode == "pairs":
        z1, z2 = call.parts[0].arrays
        half = len(z1)
        item = torch.cat((items[:half], items[:half]))
        columns = [_Columns(None, [2 * own for own, *_ in counts], item)]
        positives = _Positives(batch, z1, z2)
    else:
        keys, *negatives = call.parts[1].arrays
        in_batch = not call.parts[2].arrays
        key = keys if in_batch else call.parts[2].arrays[0]
        positives = _Positives(batch, x, key)
        columns = []
        if in_batch:
            ids = None if ids is None else ids.to(torch.int64)
            columns.append(_Columns(keys, [own for own, *_ in counts], items if ids is None else ids, ids is not None))
        else:
            negatives = [keys, *negatives]
        columns += [_Columns(own, [m for _, m, _ in counts]) for own in negatives]
    both = mode == "both"
    scores = torch.cat((positives.scores, positives.scores)) if mode == "pairs" else positives.scores

    found = [_log_sum_exps(batch, own, both) for own in columns]
    lse = found[0][0]
    for other, _ in found[1:]:
        lse = torch.logaddexp(lse, other)
    normalisers = [lse, found[0][1]] if both else [lse]
    gaps = [own - scores for own in normalisers]  # type: ignore[operator]
    losses = torch.stack([torch.nn.functional.softplus(gap, threshold=40) for gap in gaps]).mean(0)
    if not batch.gradients:
        return losses, None, []

    slopes = [batch.factor / len(gaps) * torch.sigmoid(gap) for gap in gaps]
    known = (lse, slopes[0])
    of_columns = (normalisers[1], slopes[1]) if both else None
    dx = torch.zeros(x.shape, dtype=positives.a.dtype, device=device)
    dscale = torch.zeros((), dtype=torch.float64, device=device)
    grads = []
    for own in columns:
        dy, share = _add_gradients(batch, own, known, of_columns, dx)  # type: ignore[arg-type]
        grads.append(dy)
        dscale += share
    pull = -torch.stack(slopes).sum(0)
    if mode == "pairs":
        pull = pull[:half] + pull[half:]
        dscale += positives.add(pull, dx[:half], dx[half:])
        return losses, dscale, [dx[:half], dx[half:]]
    if not in_batch:
        grads.append(torch.zeros_like(dx))  # the positives come last, and have no columns
    dscale += positives.add(pull, dx, grads[0 if in_batch else -1])
    return losses, dscale, [dx, *grads]


# ---- sigmoid ---------------------------------------------------------------------------------------------------------


def _sigmoid(
    batch: _Batch, y: Tensor, bias: Any, counts: list[list[int]]
) -> tuple[Tensor, Tensor | None, Tensor | None, Gradients]:
    """Losses of the own rows; this process's shares of the gradients of scale and bias; gradients of the rows."""
    ring, x = batch.ring, batch.x
    n = x.shape[0]
    dtype = getattr(torch, compute_dtype(x))
    weights = torch.full((n,), batch.factor, dtype=dtype, device=x.device)
    losses = torch.zeros(n, dtype=torch.float64, device=x.device)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    scalars = torch.zeros(2, dtype=torch.float64, device=x.device)

    def work(source: int, block: Tensors) -> Tensors:
        (other,) = block
        grad_y: Any = torch.zeros(other.shape, dtype=dtype, device=x.device) if batch.gradients else None
        if n and len(other):
            wanted = "01" if batch.gradients else ""
            rows, *grads = loss_operations.sigmoid(
                weights, x, other, batch.scale, bias, "none", batch.normalize, wanted, source == ring.rank
            )
            losses.add_(rows)
            if batch.gradients:
                grad_x, grad_y, *own = grads
                dx.add_(grad_x)
                scalars.add_(torch.stack([s.to(x.device) for s in own]))
        return (grad_y,) if batch.gradients else ()

    back = ring.visit((y,), [own for own, *_ in counts], work)
    if not batch.gradients:
        return losses, None, None, []
    return losses, scalars[0], scalars[1], [dx, *back]


# ---- from the loss of one process to that of many --------------------------------------------------------------------


def _check(ring: Ring, name: str, plan: Callable[[], Call]) -> tuple[Call, list[int], dict[str, Any]]:
    """The call of one process; its rows, its other negatives and whether it wants gradients; what all must agree on."""
    call = plan()
    # Numbers of this process's own: they are compared, and stand beside the tensors that are exchanged.
    call = call._replace(parts=tuple(part._replace(arrays=as_tensors(part.arrays)) for part in call.parts))
    arrays = [array for part in call.parts for array in part.arrays]
    x = arrays[0]
    label = call.parts[0].names[0]
    if not is_torch(x):
        raise TypeError(f"{label}: expected a torch.Tensor, got a {type(x).__name__}; processes exchange tensors")
    ring.check_device(x, label)
    rows, columns, positive, *rest = call.parts
    numbers = call.parts[2:] if call.operation == "sigmoid" else call.parts[4:]
    negatives: list[Any] = []
    if call.operation == "softmax":
        if rest[0].arrays:
            raise NotImplementedError(
                "negative_keys: each query's own negatives, (n, m, d), meet no other rank; use nearfar.info_nce_loss"
            )
        negatives = [a for k, a in zip(columns.names, columns.arrays, strict=True) if k == "negative_keys"]
        loss_operations._multiplier(numbers[0].value().detach(), x)
    else:
        loss_operations._multiplier(numbers[0].value().detach(), x)
        loss_operations._offset(numbers[1].value().detach(), x)
    wants = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
    fixed = {p.names[0]: float(p.value()) for p in numbers if not p.value().requires_grad and not p.value().is_cuda}
    options = {
        "loss": name,
        **{"dtype": dtype_name(x), "columns": x.shape[1], "device": x.device.type, **fixed},
        **{"config": call.config if call.operation == "sigmoid" else call.config[:-1]},
        **{"negative_keys": len(negatives), "in_batch": not positive.arrays},
        **{"ids": bool(call.extra) and call.extra[0] is not None},
    }
    return call, [len(rows.arrays[0]), len(negatives[0]) if negatives else 0, int(wants)], options


def launch(group: Any, loss: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The value of a loss of one process for the rows of all, connected to the graph of this one's."""
    value: Tensor = _launch(group, loss, *args, **kwargs)
    return value


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _launch(group: Any, loss: Any, *args: Any, **kwargs: Any) -> Tensor:
    ring = Ring(group)
    name = loss.__name__
    call, counts = ring.meet(lambda: _check(ring, name, lambda: loss.__nearfar_plan__(*args, **kwargs)))
    gradients = any(wants for *_, wants in counts)
    reduction = next(option for option in call.config if option in ("mean", "sum", "none"))
    if reduction == "none" and gradients:
        raise NotImplementedError(
            "reduction: 'none' has no gradients here, because a loss of one rank has gradients on all; use 'mean' or "
            "'sum', or torch.no_grad()"
        )
    views = 2 if "pairs" in call.config else 1
    total = views * sum(own for own, *_ in counts)
    weight = 1 / max(total, 1) if reduction == "mean" else 1.0
    leaves = [array for part in call.parts for array in part.arrays]

    call = call._replace(parts=tuple(p._replace(arrays=tuple(a.detach() for a in p.arrays)) for p in call.parts))

    def compute() -> tuple[Tensor, Gradients]:
        x, scale = call.parts[0].value(), call.parts[2 if call.operation == "sigmoid" else 4].value()
        normalize = bool(call.config[1 if call.operation == "sigmoid" else 2])
        batch = _Batch(ring, x, scale, normalize, gradients, ring.size * weight)
        if call.operation == "sigmoid":
            y, bias = call.parts[1].value(), call.parts[3].value()
            losses, *shares, grads = _sigmoid(batch, y, bias, counts)
        else:
            losses, *shares, grads = _softmax(batch, call, counts)
        dtype = getattr(torch, compute_dtype(x))
        if reduction == "none":
            return losses.to(dtype), [None] * len(leaves)
        # Gradients of scalars are whole on every process: those that are averaged stay what they are.
        sums = ring.sum(torch.stack([losses.sum(), *(s / ring.size for s in shares if s is not None)]))
        value = (weight * sums[0]).to(dtype)
        return value, [*grads, *sums[1:]] if gradients else [None] * len(leaves)

    with torch.autocast(leaves[0].device.type, enabled=False):
        value: Tensor = _Whole.apply(compute, *leaves)  # type: ignore[no-untyped-call]
    return value
