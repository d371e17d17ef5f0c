"""The glue to PyTorch: operators of torch.library, one autograd Function outside them, and second derivatives.

Imported only when a torch tensor arrives. Each operation has

- raw operators ``torch.ops.nearfar.*`` (define + impl + register_fake): opaque to the compiler, no gradients;
- `_Forward`, whose backward is `_Backward`, whose own backward is the second derivative.

A loss computes its gradient in the forward pass when an input requires one, because for a scalar the upstream gradient
only scales it. Second derivatives are rare, so they get no kernel: a plain torch formula of the operation, a block of
rows at a time, is differentiated twice; memory is O(block * M), never O(N * M). Third derivatives raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import formulas, operations

_BLOCK = 512  # rows of a second derivative at a time

_library = torch.library.Library("nearfar", "DEF")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator of the CPU; absent tensors in the result become empty ones, which a schema can express."""
    name = schema.split("(", 1)[0]

    def implementation(*args: Any) -> Any:
        result = run(*map(_detached, args))
        if isinstance(result, Tensor):
            return result
        return tuple(torch.empty(0) if part is None else part for part in result)

    _library.define(schema)
    _library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"nearfar::{name}", fake, lib=_library)
    return getattr(torch.ops.nearfar, name).default


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _value_like(x: Tensor, reduction: str) -> Tensor:
    return x.new_empty((x.shape[0],) if reduction == "none" else (), dtype=_compute(x))


def _grad_like(x: Tensor | None, wanted: bool) -> Tensor:
    return torch.empty(0) if x is None or not wanted else torch.empty(x.shape, dtype=_compute(x), device=x.device)


# ---- operators -------------------------------------------------------------------------------------------------------


def _fake_softmax(
    weights: Any, x: Any, y: Any, positive: Any, paired: Any, scale: Any, ids: Any, mode: str, reduction: str,
    normalize: bool, in_sum: bool, shift: int, gradients: bool,
) -> Any:  # fmt: skip
    return (
        _value_like(x, reduction),
        _grad_like(x, gradients),
        _grad_like(y if mode != "pairs" else None, gradients),
        _grad_like(positive, gradients),
        _grad_like(paired, gradients),
        x.new_empty((), dtype=torch.float64) if gradients else torch.empty(0),
    )


_softmax = _define(
    "softmax(Tensor? weights, Tensor x, Tensor? y, Tensor? positive, Tensor? paired, Tensor scale, Tensor? ids, "
    "str mode, str reduction, bool normalize, bool in_sum, SymInt shift, bool gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    operations.softmax,
    _fake_softmax,
)

_potential = _define(
    "potential(Tensor x, float t, bool normalize, bool gradients) -> (Tensor, Tensor)",
    operations.potential,
    lambda x, t, normalize, gradients: (_value_like(x, "mean"), _grad_like(x, gradients)),
)

_alignment = _define(
    "alignment(Tensor? weights, Tensor x, Tensor y, float alpha, str reduction, bool normalize, bool gradients) "
    "-> (Tensor, Tensor, Tensor)",
    operations.alignment,
    lambda weights, x, y, alpha, reduction, normalize, gradients: (
        _value_like(x, reduction),
        _grad_like(x, gradients),
        _grad_like(y, gradients),
    ),
)


def _fake_store(x: Tensor, y: Tensor | None, map: str, normalize: bool, condensed: bool) -> Tensor:
    b, n, _ = x.shape
    m = n if y is None else y.shape[1]
    return x.new_empty((b, n * (n - 1) // 2) if condensed else (b, n, m), dtype=_compute(x))


_store = _define(
    "store(Tensor x, Tensor? y, str map, bool normalize, bool condensed) -> Tensor", operations.store, _fake_store
)

_store_grad = _define(
    "store_grad(Tensor grad, Tensor value, Tensor x, Tensor? y, str map, bool normalize, bool condensed) "
    "-> (Tensor, Tensor)",
    operations.store_grad,
    lambda grad, value, x, y, map, normalize, condensed: (_grad_like(x, True), _grad_like(y, True)),
)

_matmul = _define(
    "matmul(Tensor x, Tensor? y, Tensor v, str map) -> Tensor",
    operations.matmul,
    lambda x, y, v, map: x.new_empty((x.shape[0], x.shape[1], v.shape[2]), dtype=_compute(x)),
)

_matmul_grad = _define(
    "matmul_grad(Tensor grad, Tensor x, Tensor? y, Tensor v, str map) -> (Tensor, Tensor, Tensor)",
    operations.matmul_grad,
    lambda grad, x, y, v, map: (_grad_like(x, True), _grad_like(y, True), _grad_like(v, True)),
)


# ---- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    """One operation: ``forward(tensors, config, gradients) -> (value, *gradients)`` and what differentiates it.

    `grad` computes gradients from the upstream one where the forward pass did not; `rows` is the plain formula.
    """

    forward: Callable[..., Any]
    grad: Callable[..., Any]
    rows: Callable[..., Tensor]
    count: int  # tensors that may require a gradient: the first `count` inputs
    loss: bool


def _is_absent(grad: Tensor) -> bool:
    """An operator's way to return no gradient: an empty vector. Real ones are matrices or numbers."""
    return grad.dim() == 1 and grad.numel() == 0


def _pad(grads: Any, count: int) -> tuple[Tensor | None, ...]:
    return tuple(None if _is_absent(grad) else grad for grad in grads[:count])


def _softmax_grad(g: Tensor, value: Any, tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Any:
    return _softmax(g, *tensors, *config, True)[1:]


def _no_rows(*_: Any) -> Tensor:
    raise AssertionError("potential has a second derivative of its own")


_OPERATIONS = {
    "softmax": _Operation(
        lambda t, c, gradients: _softmax(None, *t, *c, gradients), _softmax_grad, formulas.softmax_rows, 5, True
    ),
    "potential": _Operation(
        lambda t, c, gradients: _potential(*t, *c, gradients), _no_rows, formulas.potential_rows, 1, True
    ),
    "alignment": _Operation(
        lambda t, c, gradients: _alignment(None, *t, *c, gradients),
        lambda g, value, t, c: _alignment(g, *t, *c, True)[1:],
        formulas.alignment_rows,
        2,
        True,
    ),
    "store": _Operation(
        lambda t, c, gradients: (_store(*t, *c),),
        lambda g, value, t, c: _store_grad(g, value, *t, *c),
        formulas.store_rows,
        2,
        False,
    ),
    "matmul": _Operation(
        lambda t, c, gradients: (_matmul(*t, *c),),
        lambda g, value, t, c: _matmul_grad(g, *t, *c),
        formulas.matmul_rows,
        3,
        False,
    ),
}


def _split(args: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return args[:count], args[count:]


def _loop_vmap(function: type[Function]) -> Callable[..., Any]:
    """vmap as a loop: an operation fills the machine by itself."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = []
        for i in range(info.batch_size):
            own = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
            results.append(function.apply(*own))
        single = isinstance(results[0], Tensor)
        columns = [[r] for r in zip(*([(r,) for r in results] if single else results), strict=True)]
        stacked = tuple(None if c[0][0] is None else torch.stack(c[0]) for c in columns)
        dims = tuple(None if s is None else 0 for s in stacked)
        return (stacked[0], 0) if single else (stacked, dims)

    return vmap


class _Forward(Function):
    """apply(name, gradients, number of tensors, *tensors, *config) -> (value, *gradients of a loss)."""

    @staticmethod
    def forward(name: str, gradients: bool, count: int, *args: Any) -> Any:
        tensors, config = _split(args, count)
        return tuple(_OPERATIONS[name].forward(tensors, config, gradients))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, _, ctx.count = inputs[:3]
        tensors, ctx.config = _split(inputs[3:], ctx.count)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream[:1]
        padding = (None,) * (3 + len(ctx.config) + ctx.count)
        if g is None:
            return padding
        operation = _OPERATIONS[ctx.name]
        tensors, output = _split(ctx.saved_tensors, ctx.count)
        # The graph of the gradient is built only for whoever differentiates it.
        backward = _Backward.apply if torch.is_grad_enabled() or _transformed() else _Backward.forward
        grads = backward(ctx.name, ctx.count, g, *output, *tensors, *ctx.config)
        needed = ctx.needs_input_grad[3 : 3 + operation.count]
        own = [grad if need else None for grad, need in zip(_pad(grads, operation.count), needed, strict=True)]
        return (None, None, None, *own, *(None,) * (ctx.count - operation.count + len(ctx.config)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _loop_vmap(_Forward)(info, in_dims, *args)


def _is_scalar_loss(name: str, config: tuple[Any, ...]) -> bool:
    """Whether the forward pass has computed the gradient already."""
    return _OPERATIONS[name].loss and "none" not in config


class _Backward(Function):
    """apply(name, number of tensors, upstream, *forward's output, *tensors, *config) -> gradients of the tensors."""

    @staticmethod
    def _parts(name: str, count: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        operation = _OPERATIONS[name]
        outputs = 1 + (operation.count if operation.loss else 0)
        output, rest = _split(args, outputs)
        return (operation, output, *_split(rest, count))

    @staticmethod
    def forward(name: str, count: int, g: Tensor, *args: Any) -> Any:
        operation, output, tensors, config = _Backward._parts(name, count, args)
        if _is_scalar_loss(name, config):
            grads = tuple(grad if _is_absent(grad) else grad * g for grad in output[1:])
        else:
            grads = operation.grad(g, output[0], tensors, config)
        # Rounded to the inputs' dtype only now: a loss scaler's factor in g keeps float16 gradients from vanishing.
        return tuple(v if _is_absent(v) else v.to(t.dtype) for v, t in zip(grads, tensors, strict=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.count, g = inputs[:3]
        _, forward_output, tensors, ctx.config = _Backward._parts(ctx.name, ctx.count, inputs[3:])
        ctx.skip = len(forward_output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, forward_output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, *vectors: Any) -> Any:
        g, value, *tensors = ctx.saved_tensors
        count = _OPERATIONS[ctx.name].count
        vectors = tuple(None if v is None or t is None else v for v, t in zip(vectors, tensors, strict=False))
        if all(v is None for v in vectors):
            return (None,) * (3 + ctx.skip + ctx.count + len(ctx.config))
        g_grad, *grads = _Second.apply(ctx.name, ctx.count, g, value, *tensors, *vectors, *ctx.config)  # type: ignore[no-untyped-call]
        rest = (None,) * (ctx.count - count + len(ctx.config))
        return (None, None, g_grad, *(None,) * ctx.skip, *_pad(tuple(grads), count), *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _loop_vmap(_Backward)(info, in_dims, *args)


class _Second(Function):
    """apply(name, number of tensors, upstream, value, *tensors, *vectors, *config) -> gradients of upstream, tensors.

    A Function of its own so that a third derivative meets a refusal, not a tensor without a graph.
    """

    @staticmethod
    def forward(name: str, count: int, g: Tensor, value: Tensor, *args: Any) -> Any:
        tensors, rest = _split(args, count)
        vectors, config = _split(rest, _OPERATIONS[name].count)
        second = _potential_second if name == "potential" else _second
        with torch.autocast(g.device.type, enabled=False):
            g_grad, grads = second(name, g, value, tensors, config, vectors)
        return (g_grad, *(torch.empty(0) if grad is None else grad for grad in grads))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise NotImplementedError(f"nearfar: {ctx.name} has no third derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _loop_vmap(_Second)(info, in_dims, *args)


# Function.apply binds its arguments to this signature at every call; finding it anew costs more than a small loss.
for _function in (_Forward, _Backward, _Second):
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


# ---- second derivatives ----------------------------------------------------------------------------------------------


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


def _second(
    name: str, g: Tensor, value: Tensor, tensors: tuple[Any, ...], config: tuple[Any, ...], vectors: tuple[Any, ...]
) -> tuple[Tensor, list[Any]]:
    operation = _OPERATIONS[name]
    leaves, where = _leaves(tensors, operation.count)
    x = leaves[0]
    rows_axis = 0 if operation.loss else 1
    n = x.shape[rows_axis]
    upstream = g.detach().to(torch.promote_types(g.dtype, torch.float32)).requires_grad_()
    own = [leaves[k] for k in where]
    along = [vectors[k] for k in where]
    totals = [torch.zeros_like(leaf) for leaf in own] + [torch.zeros_like(upstream)]
    offset = 0
    for rows in _blocks(n):
        with torch.enable_grad():
            part = operation.rows(tuple(leaves), config, rows)
            if not operation.loss:
                if value.dim() == 2:  # condensed
                    weights = upstream[:, offset : offset + part.shape[-1]]
                    offset += part.shape[-1]
                else:
                    weights = upstream[:, rows]
            elif "none" in config:
                weights = upstream[rows]
            else:
                weights = upstream / n if "mean" in config else upstream
            pieces = _twice((part * weights).sum(), own, [upstream], along)
        for total, piece in zip(totals, pieces, strict=True):
            total += piece
    grads: list[Any] = [None] * operation.count
    for k, total in zip(where, totals, strict=False):
        grads[k] = total.to(tensors[k].dtype)
    return totals[-1].to(g.dtype), grads


def _potential_second(
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


# ---- what the public functions call ----------------------------------------------------------------------------------


def _transformed() -> bool:
    """Whether a torch.func transform is at work. The compiler traces those itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _requires_grad(tensor: Tensor | None, transformed: bool) -> bool:
    """Also of a tensor that vmap maps over, which hides it."""
    while transformed and tensor is not None and torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor is not None and tensor.requires_grad


def apply(name: str, tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Tensor:
    """The value of an operation, connected to the graph if any input requires a gradient."""
    operation = _OPERATIONS[name]
    transformed = _transformed()
    gradients = torch.is_grad_enabled() and any(_requires_grad(t, transformed) for t in tensors[: operation.count])
    if not gradients and not transformed:
        result: Tensor = operation.forward(tensors, config, False)[0]
        return result
    if torch.compiler.is_compiling():  # which refuses one tensor in two places
        tensors = tuple(None if t is None else t.view_as(t) for t in tensors)
    early = gradients and _is_scalar_loss(name, config)
    value: Tensor = _Forward.apply(name, early, len(tensors), *tensors, *config)[0]  # type: ignore[no-untyped-call]
    return value
