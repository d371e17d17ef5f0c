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

from . import formulas, loss_operations, operations, triplets
from .backend import on_cuda
from .second import Second, by_rows, hsic_second, potential_second

_library = torch.library.Library("nearfar", "DEF")


def detached(value: Any) -> Any:
    """A tensor as kernels read it, without a graph or a negation that is still to be done; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach() if value.requires_grad else value
    return value.resolve_neg() if value.is_neg() else value


_PLAIN = {Tensor, torch.nn.Parameter, float, type(None)}


def as_tensors(values: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Numbers among them as tensors, for who knows no others: an operator, the graph. Kernels read a number faster."""
    return tuple(torch.full((), v, dtype=torch.float64) if isinstance(v, float) else v for v in values)


def _traced(tensors: tuple[Any, ...]) -> bool:
    """Whether somebody looks at the operators that run: a compiler, a trace, a dispatch mode, a tensor's own class."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _is_absent(grad: Tensor) -> bool:
    """An operator's way to return no gradient: an empty vector. Real ones are matrices or numbers."""
    return grad.dim() == 1 and grad.numel() == 0


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator of both devices, whose absent results are empty tensors, for the schema: tensors come first.

    Returned is what calls it: where nobody looks, `run` without an operator's fixed cost. Absent results are None.
    """
    name = schema.split("(", 1)[0]

    def implementation(*args: Any) -> Any:
        result = run(*map(detached, args))
        if isinstance(result, Tensor):
            return result
        return tuple(torch.empty(0) if part is None else part for part in result)

    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"nearfar::{name}", fake, lib=_library)
    operator = getattr(torch.ops.nearfar, name).default

    def call(tensors: tuple[Any, ...], *config: Any) -> Any:
        if not _traced(tensors):
            return run(*map(detached, tensors), *config)
        result = operator(*as_tensors(tensors), *config)
        return result if isinstance(result, Tensor) else tuple(None if _is_absent(part) else part for part in result)

    return call


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _value_like(x: Tensor, reduction: str) -> Tensor:
    return x.new_empty(x.shape[:-1] if reduction == "none" else (), dtype=_compute(x))


def _grad_like(x: Tensor | None, wanted: bool) -> Tensor:
    return torch.empty(0) if x is None or not wanted else torch.empty(x.shape, dtype=_compute(x), device=x.device)


def _parameter_grad(x: Tensor, parameters: Tensor, wanted: bool) -> Tensor:
    """On the device of the points."""
    return torch.empty(parameters.shape, dtype=torch.float64, device=x.device) if wanted else torch.empty(0)


# ---- operators -------------------------------------------------------------------------------------------------------


def _number_like(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((), dtype=torch.float64) if wanted else torch.empty(0)


def _fake_softmax(
    weights: Any, x: Any, y: Any, positive: Any, paired: Any, scale: Any, ids: Any, mode: str, reduction: str,
    normalize: bool, in_sum: bool, shift: int, wanted: str,
) -> Any:  # fmt: skip
    return (
        _value_like(x, reduction),
        _grad_like(x, bool(wanted)),
        _grad_like(y if mode != "pairs" else None, "1" in wanted),
        _grad_like(positive, "2" in wanted),
        _grad_like(paired, "3" in wanted),
        _number_like(x, bool(wanted)),
    )


_softmax = _define(
    "softmax(Tensor? weights, Tensor x, Tensor? y, Tensor? positive, Tensor? paired, Tensor scale, Tensor? ids, "
    "str mode, str reduction, bool normalize, bool in_sum, SymInt shift, str wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    loss_operations.softmax,
    _fake_softmax,
)

_labelled_lse = _define(
    "labelled_lse(Tensor x, Tensor? y, Tensor scale, Tensor labels, Tensor maps, float? power, bool normalize) "
    "-> Tensor",
    loss_operations.labelled_lse,
    lambda x, y, scale, labels, maps, power, normalize: x.new_empty(
        (x.shape[0], 2 if power is None else 3), dtype=torch.float64
    ),
)

_labelled_lse_grad = _define(
    "labelled_lse_grad(Tensor grad, Tensor lse, Tensor x, Tensor? y, Tensor scale, Tensor labels, Tensor maps, "
    "float? power, bool normalize) -> (Tensor, Tensor, Tensor)",
    loss_operations.labelled_lse_grad,
    lambda grad, lse, x, y, scale, labels, maps, power, normalize: (
        _grad_like(x, True),
        _grad_like(y, True),
        x.new_empty((), dtype=torch.float64),
    ),
)

_n_pairs = _define(
    "n_pairs(Tensor? weights, Tensor x, Tensor y, float l2_reg, str reduction, bool gradients) "
    "-> (Tensor, Tensor, Tensor)",
    loss_operations.n_pairs,
    lambda weights, x, y, l2_reg, reduction, gradients: (
        _value_like(x, reduction),
        _grad_like(x, gradients),
        _grad_like(y, gradients),
    ),
)

_sup_con = _define(
    "sup_con(Tensor? weights, Tensor x, Tensor scale, Tensor? labels, Tensor? positive_mask, str reduction, "
    "bool normalize, bool gradients) -> (Tensor, Tensor, Tensor)",
    loss_operations.sup_con,
    lambda weights, x, scale, labels, positive_mask, reduction, normalize, gradients: (
        _value_like(x, reduction),
        _grad_like(x, gradients),
        _number_like(x, gradients),
    ),
)

_sigmoid = _define(
    "sigmoid(Tensor? weights, Tensor x, Tensor y, Tensor scale, Tensor bias, str reduction, bool normalize, "
    "str wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    loss_operations.sigmoid,
    lambda weights, x, y, scale, bias, reduction, normalize, wanted: (
        _value_like(x, reduction),
        _grad_like(x, bool(wanted)),
        _grad_like(y, "1" in wanted),
        _number_like(x, bool(wanted)),
        _number_like(x, bool(wanted)),
    ),
)

_potential = _define(
    "potential(Tensor x, float t, bool normalize, bool gradients) -> (Tensor, Tensor)",
    loss_operations.potential,
    lambda x, t, normalize, gradients: (_value_like(x, "mean"), _grad_like(x, gradients)),
)

_alignment = _define(
    "alignment(Tensor? weights, Tensor x, Tensor y, float alpha, str reduction, bool normalize, bool gradients) "
    "-> (Tensor, Tensor, Tensor)",
    loss_operations.alignment,
    lambda weights, x, y, alpha, reduction, normalize, gradients: (
        _value_like(x, reduction),
        _grad_like(x, gradients),
        _grad_like(y, gradients),
    ),
)

_batch_triplet = _define(
    "batch_triplet(Tensor? weights, Tensor x, Tensor labels, str mining, float margin, bool squared, bool soft, "
    "str reduction, bool normalize, bool gradients) -> (Tensor, Tensor)",
    triplets.batch_triplet,
    lambda weights, x, labels, mining, margin, squared, soft, reduction, normalize, gradients: (
        _value_like(x, reduction),
        _grad_like(x, gradients),
    ),
)


def _fake_store(x: Tensor, y: Tensor | None, map: str, normalize: bool, condensed: bool) -> Tensor:
    *batch, n, _ = x.shape
    m = n if y is None else y.shape[-2]
    return x.new_empty((*batch, n * (n - 1) // 2) if condensed else (*batch, n, m), dtype=_compute(x))


_store = _define(
    "store(Tensor x, Tensor? y, str map, bool normalize, bool condensed) -> Tensor", operations.store, _fake_store
)

_store_grad = _define(
    "store_grad(Tensor grad, Tensor value, Tensor x, Tensor? y, str map, bool normalize, bool condensed, str wanted) "
    "-> (Tensor, Tensor)",
    operations.store_grad,
    lambda grad, value, x, y, map, normalize, condensed, wanted: (
        _grad_like(x, y is None or "0" in wanted or on_cuda(x)),
        _grad_like(y, "1" in wanted),
    ),
)

select = _define(
    "select(Tensor x, Tensor? y, str map, bool normalize, bool exclude_self, SymInt k) -> (Tensor, Tensor)",
    operations.select,
    lambda x, y, map, normalize, exclude_self, k: (
        x.new_empty((*x.shape[:-1], k), dtype=_compute(x)),
        x.new_empty((*x.shape[:-1], k), dtype=torch.int64),
    ),
)

_gram = _define(
    "gram(Tensor x, Tensor? y, Tensor parameters, str program) -> Tensor",
    operations.gram,
    lambda x, y, parameters, program: _fake_store(x, y, program, False, False),
)

_gram_grad = _define(
    "gram_grad(Tensor grad, Tensor x, Tensor? y, Tensor parameters, str program, str wanted) "
    "-> (Tensor, Tensor, Tensor)",
    operations.gram_grad,
    lambda grad, x, y, parameters, program, wanted: (
        _grad_like(x, "0" in wanted),
        _grad_like(y, "1" in wanted),
        _parameter_grad(x, parameters, "2" in wanted),
    ),
)

_matmul = _define(
    "matmul(Tensor x, Tensor? y, Tensor v, Tensor parameters, str program) -> Tensor",
    operations.matmul,
    lambda x, y, v, parameters, program: x.new_empty((*x.shape[:-1], v.shape[-1]), dtype=_compute(x)),
)

_matmul_grad = _define(
    "matmul_grad(Tensor grad, Tensor x, Tensor? y, Tensor v, Tensor parameters, str program, str wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    operations.matmul_grad,
    lambda grad, x, y, v, parameters, program, wanted: (
        _grad_like(x, "0" in wanted),
        _grad_like(y, "1" in wanted),
        _grad_like(v, "2" in wanted),
        _parameter_grad(x, parameters, "3" in wanted),
    ),
)

_hsic = _define(
    "hsic(Tensor x, Tensor y, Tensor parameters_x, Tensor parameters_y, str program_x, str program_y, bool diagonal) "
    "-> Tensor",
    operations.hsic,
    lambda x, y, parameters_x, parameters_y, program_x, program_y, diagonal: x.new_empty(
        (3 + 2 * x.shape[0],), dtype=torch.float64
    ),
)

_hsic_grad = _define(
    "hsic_grad(Tensor grad, Tensor values, Tensor x, Tensor y, Tensor parameters_x, Tensor parameters_y, "
    "str program_x, str program_y, bool diagonal, str wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    operations.hsic_grad,
    lambda grad, values, x, y, parameters_x, parameters_y, program_x, program_y, diagonal, wanted: (
        _grad_like(x, "0" in wanted),
        _grad_like(y, "1" in wanted),
        _parameter_grad(x, parameters_x, "2" in wanted),
        _parameter_grad(x, parameters_y, "3" in wanted),
    ),
)


# ---- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One operation: ``forward(tensors, config, wanted) -> (value, *gradients)`` and what differentiates it.

    `wanted` are the numbers of the tensors whose gradients are, as "02"; others may come with them. ``grad(g, value,
    tensors, config, wanted)`` computes gradients from the upstream one where the forward pass did not, and `second` the
    derivatives of gradients.
    """

    forward: Callable[..., Any]
    grad: Callable[..., Any]
    second: Second
    count: int  # tensors that may require a gradient: the first `count` inputs
    loss: bool = False


def _loss(
    name: str, operator: Any, rows: Callable[..., Tensor], count: int, prepare: Callable[..., Any] | None = None
) -> Operation:
    """A loss whose operator takes the weights of its rows first and answers value and gradients."""
    return Operation(
        lambda t, c, wanted: operator((None, *t), *c, loss_operations.told(name, wanted)),
        lambda g, value, t, c, wanted: operator((g, *t), *c, loss_operations.told(name, wanted))[1:],
        by_rows(rows, True, prepare),
        count,
        True,
    )


def _computed_before(*_: Any) -> Any:
    raise AssertionError("the gradient of a number is computed in the forward pass")


OPERATIONS = {
    "softmax": _loss("softmax", _softmax, formulas.softmax_rows, 5),
    "labelled_lse": Operation(
        lambda t, c, wanted: (_labelled_lse(t, *c),),
        lambda g, value, t, c, wanted: _labelled_lse_grad((g, value, *t), *c),
        by_rows(formulas.labelled_lse_rows, False),
        3,
    ),
    "n_pairs": _loss("n_pairs", _n_pairs, formulas.n_pairs_rows, 2),
    "sup_con": _loss("sup_con", _sup_con, formulas.sup_con_rows, 2, lambda t, c: ((), formulas.sup_con_anchors(t, c))),
    "sigmoid": _loss("sigmoid", _sigmoid, formulas.sigmoid_rows, 4),
    "potential": Operation(
        lambda t, c, wanted: _potential(t, *c, bool(wanted)), _computed_before, potential_second, 1, True
    ),
    "alignment": _loss("alignment", _alignment, formulas.alignment_rows, 2),
    "batch_triplet": _loss("batch_triplet", _batch_triplet, formulas.batch_triplet_rows, 1, triplets.prepare),
    "store": Operation(
        lambda t, c, wanted: (_store(t, *c),),
        lambda g, value, t, c, wanted: _store_grad((g, value, *t), *c, wanted),
        by_rows(formulas.store_rows, False),
        2,
    ),
    "gram": Operation(
        lambda t, c, wanted: (_gram(t, *c),),
        lambda g, value, t, c, wanted: _gram_grad((g, *t), *c, wanted),
        by_rows(formulas.gram_rows, False),
        3,
    ),
    "matmul": Operation(
        lambda t, c, wanted: (_matmul(t, *c),),
        lambda g, value, t, c, wanted: _matmul_grad((g, *t), *c, wanted),
        by_rows(formulas.matmul_rows, False),
        4,
    ),
    "hsic": Operation(
        lambda t, c, wanted: (_hsic(t, *c),),
        lambda g, value, t, c, wanted: _hsic_grad((g, value, *t), *c, wanted),
        hsic_second,
        4,
    ),
}
