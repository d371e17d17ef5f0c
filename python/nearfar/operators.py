"""The operators of torch.library, ``torch.ops.nearfar.*``, and what differentiates each operation.

Raw operators (define + impl + register_fake) are opaque to the compiler and have no gradients; `nearfar.autograd` puts
the autograd Functions around them. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import formulas, operations

_library = torch.library.Library("nearfar", "DEF")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator of both devices; absent tensors in the result become empty ones, for the schema."""
    name = schema.split("(", 1)[0]

    def implementation(*args: Any) -> Any:
        result = run(*map(_detached, args))
        if isinstance(result, Tensor):
            return result
        return tuple(torch.empty(0) if part is None else part for part in result)

    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
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
class Operation:
    """One operation: ``forward(tensors, config, gradients) -> (value, *gradients)`` and what differentiates it.

    `grad` computes gradients from the upstream one where the forward pass did not; `rows` is the plain formula.
    """

    forward: Callable[..., Any]
    grad: Callable[..., Any]
    rows: Callable[..., Tensor]
    count: int  # tensors that may require a gradient: the first `count` inputs
    loss: bool


def is_absent(grad: Tensor) -> bool:
    """An operator's way to return no gradient: an empty vector. Real ones are matrices or numbers."""
    return grad.dim() == 1 and grad.numel() == 0


def pad(grads: Any, count: int) -> tuple[Tensor | None, ...]:
    return tuple(None if is_absent(grad) else grad for grad in grads[:count])


def _softmax_grad(g: Tensor, value: Any, tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Any:
    return _softmax(g, *tensors, *config, True)[1:]


def _no_rows(*_: Any) -> Tensor:
    raise AssertionError("potential has a second derivative of its own")


OPERATIONS = {
    "softmax": Operation(
        lambda t, c, gradients: _softmax(None, *t, *c, gradients), _softmax_grad, formulas.softmax_rows, 5, True
    ),
    "potential": Operation(
        lambda t, c, gradients: _potential(*t, *c, gradients), _no_rows, formulas.potential_rows, 1, True
    ),
    "alignment": Operation(
        lambda t, c, gradients: _alignment(None, *t, *c, gradients),
        lambda g, value, t, c: _alignment(g, *t, *c, True)[1:],
        formulas.alignment_rows,
        2,
        True,
    ),
    "store": Operation(
        lambda t, c, gradients: (_store(*t, *c),),
        lambda g, value, t, c: _store_grad(g, value, *t, *c),
        formulas.store_rows,
        2,
        False,
    ),
    "matmul": Operation(
        lambda t, c, gradients: (_matmul(*t, *c),),
        lambda g, value, t, c: _matmul_grad(g, *t, *c),
        formulas.matmul_rows,
        3,
        False,
    ),
}
