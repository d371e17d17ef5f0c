"""One description of a differentiable call, evaluated for torch (autograd) or NumPy (`value_and_grad`).

A public function validates its arguments and plans a `Call`: which operation, on which arrays, and how the operation's
inputs are put together from the arguments. `run` launches it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from . import loss_operations, operations, rowwise, triplets
from .arrays import Array, autograd, cast, compute_dtype, concatenate, dtype_name, is_torch

P = ParamSpec("P")
R = TypeVar("R")

# Each takes (weights of the rows: none here, inputs, config, which gradients are wanted or whether).
_OPERATIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    "softmax": (loss_operations.softmax, True),
    "potential": (loss_operations.potential, False),
    "alignment": (loss_operations.alignment, True),
    "n_pairs": (loss_operations.n_pairs, True),
    "sup_con": (loss_operations.sup_con, True),
    "sigmoid": (loss_operations.sigmoid, True),
    "batch_triplet": (triplets.batch_triplet, True),
    "triplet_margin": (rowwise.triplet_margin, False),
}

# Operations of rows, which a tail makes a loss of: the rows, and (upstream, rows, *inputs, *config) -> gradients.
_ROWS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "labelled_lse": (loss_operations.labelled_lse, loss_operations.labelled_lse_grad),
    "alignment": (
        lambda x, y, alpha, how, unit: loss_operations.alignment(None, x, y, alpha, how, unit, False)[0],
        lambda slopes, _, x, y, alpha, how, unit: loss_operations.alignment(slopes, x, y, alpha, how, unit, True)[1:],
    ),
}


class Part(NamedTuple):
    """An input of an operation: the named arguments one below the other, or a function of one scalar argument.

    `slope` is d value / d argument for a scalar. Arrays without a name are constants.
    """

    names: tuple[str, ...]
    arrays: tuple[Any, ...]
    slope: float = 1.0

    def value(self) -> Any:
        if len(self.arrays) == 1:
            return self.arrays[0]
        return concatenate(self.arrays) if self.arrays else None


NOTHING = Part((), ())


@dataclass(frozen=True)
class Tail:
    """A loss as an O(N) function of an operation's rows and of its last part, a scale where that matters.

    Plain arithmetic: torch differentiates `value` by itself; `slopes` are its derivatives for NumPy, for scalar values.
    """

    value: Callable[[Any, Any], Any]
    slopes: Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Outcome:
    """A result as a function of a number: plain arithmetic; `slope` is its derivative, where it is not 1."""

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any] | None = None


class Call(NamedTuple):
    """``outcome(operation(parts, config))``; with a tail, the tail of that."""

    operation: str
    parts: tuple[Part, ...]
    config: tuple[Any, ...]
    scalar: bool = True  # the value is a number, so it has a gradient of its own
    extra: tuple[Any, ...] = ()  # inputs without gradients, after the parts
    tail: Tail | None = None
    outcome: Outcome | None = None


def _launch(call: Call, wanted: str) -> Any:
    """The value and the gradients of the parts, those that are wanted, by their numbers, at least."""
    tensors = (*map(Part.value, call.parts), *call.extra)
    if call.tail is not None:
        return _launch_rows(call, call.tail, tensors, bool(wanted))
    operation, weighted = _OPERATIONS[call.operation]
    told = loss_operations.told(call.operation, wanted)
    return operation(*((None,) if weighted else ()), *tensors, *call.config, told)


def _launch_rows(call: Call, tail: Tail, tensors: tuple[Any, ...], gradients: bool) -> Any:
    forward, backward = _ROWS[call.operation]
    last = tensors[len(call.parts) - 1]
    rows = forward(*tensors, *call.config)
    value = cast(np.asarray(tail.value(rows, last)), compute_dtype(tensors[0]))
    if not gradients:
        return (value,)
    slopes, last_slope = tail.slopes(rows, last)
    *grads, last_grad = backward(slopes, rows, *tensors, *call.config)
    return value, *grads, last_grad + last_slope


def run(call: Call) -> Array:
    """The value; for torch connected to the graph."""
    if is_torch(call.parts[0].arrays[0]):
        tensors = (*map(Part.value, call.parts), *call.extra)
        value = autograd().apply(call.operation, tensors, call.config)
        if call.tail is not None:
            value = cast(call.tail.value(value, tensors[len(call.parts) - 1]), compute_dtype(tensors[0]))
    else:
        value = _launch(call, "")[0]
        value = value[()] if value.ndim == 0 else value
    return value if call.outcome is None else call.outcome.value(value)


def differentiable(plan: Callable[P, Call]) -> Callable[P, Any]:
    """A public loss from its plan: calling it plans and launches; `value_and_grad` finds the plan."""

    @functools.wraps(plan)
    def function(*args: P.args, **kwargs: P.kwargs) -> Any:
        return run(plan(*args, **kwargs))

    function.__nearfar_plan__ = plan  # type: ignore[attr-defined]
    signature = inspect.signature(plan)
    function.__signature__ = signature.replace(return_annotation=Any)  # type: ignore[attr-defined]
    return function


def shows(**defaults: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """What ``help()`` and ``inspect.signature`` say of parameters whose own default, None, means not given."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorated


def value_and_grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., tuple[Any, Any]]:
    """A function that returns the value of a loss and its gradients.

    For NumPy (and CuPy) arrays, which have no autograd of their own; the loss and its gradients come from one fused
    pass. With torch tensors it uses autograd and works for any scalar function.

    Parameters
    ----------
    f : callable
        A loss of this package, with a scalar value (``reduction`` "mean" or "sum"); also a `functools.partial` of one.
    argnums : int or sequence of int
        Which positional parameters of `f` to differentiate by, also ones that are passed by keyword (``temperature``
        of `info_nce_loss` is its fourth parameter: 3).

    Returns
    -------
    callable
        ``(*args, **kwargs) -> (value, grads)``; `grads` is one array for an int, a tuple for a sequence.

    Raises
    ------
    TypeError
        If `f` is not a differentiable function of this package and the arguments are NumPy arrays.
    ValueError
        If the value is not a scalar, or a gradient is asked for an argument that has none.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> q, k = np.eye(4), np.eye(4)
    >>> value, (dq, dk) = nf.value_and_grad(nf.info_nce_loss, argnums=(0, 1))(q, k, temperature=1.0)
    >>> float(round(value, 6)), dq.shape, dk.shape
    (0.743668, (4, 4), (4, 4))
    """
    single = hasattr(argnums, "__index__")
    try:
        wanted = tuple(map(operator.index, (argnums,) if single else argnums))  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"argnums: expected an int or a sequence of ints, got {argnums!r}") from error

    @functools.wraps(f)
    def function(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if any(is_torch(a) for a in (*args, *kwargs.values())):
            value, grads = _torch_value_and_grad(f, wanted, args, kwargs)
        else:
            value, grads = _plan_value_and_grad(f, wanted, args, kwargs)
        return value, grads[0] if single else tuple(grads)

    return function


def _bound(f: Callable[..., Any], wanted: Sequence[int], args: Any, kwargs: Any) -> tuple[Any, list[str]]:
    signature = inspect.signature(getattr(f, "forward", f))  # of a module, whose own is that of any
    names = list(signature.parameters)
    for k in wanted:
        if not -len(names) <= k < len(names):
            raise ValueError(f"argnums: expected a parameter of {names}, got {k}")
    bound = signature.bind(*args, **kwargs)
    return bound, [names[k] for k in wanted]


def _torch_value_and_grad(f: Callable[..., Any], wanted: Sequence[int], args: Any, kwargs: Any) -> tuple[Any, Any]:
    import torch

    bound, names = _bound(f, wanted, args, kwargs)
    leaves = []
    for name in names:
        value = bound.arguments.get(name)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"argnums: {name} is not a floating tensor, so it has no gradient")
        bound.arguments[name] = value.detach().requires_grad_()
        leaves.append(bound.arguments[name])
    with torch.enable_grad():
        value = f(*bound.args, **bound.kwargs)
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        raise ValueError("f: expected a scalar value (reduction 'mean' or 'sum')")
    return value.detach(), torch.autograd.grad(value, leaves)


def _plan_of(f: Callable[..., Any]) -> Callable[..., Call] | None:
    """That of a loss, also with some arguments given."""
    if isinstance(f, functools.partial):
        plan = _plan_of(f.func)
        return plan and functools.partial(plan, *f.args, **f.keywords)
    return getattr(f, "__nearfar_plan__", None)


def _plan_value_and_grad(f: Callable[..., Any], wanted: Sequence[int], args: Any, kwargs: Any) -> tuple[Any, Any]:
    plan = _plan_of(f)
    if plan is None:
        name = getattr(f, "__name__", repr(f))
        raise TypeError(
            f"f: expected a differentiable function of nearfar for NumPy arguments, got {name}; other functions take "
            "torch tensors"
        )
    _, names = _bound(f, wanted, args, kwargs)
    call = plan(*args, **kwargs)
    if not call.scalar:
        raise ValueError("f: expected a scalar value (reduction 'mean' or 'sum')")
    wanted_parts = operations.numbers(not {*names}.isdisjoint(part.names) for part in call.parts)
    value, *gradients = _launch(call, wanted_parts)
    value = value[()]
    if call.outcome is not None:
        if call.outcome.slope is not None:
            slope = call.outcome.slope(value)
            gradients = [None if gradient is None else gradient * slope for gradient in gradients]
        value = call.outcome.value(value)
    found: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for part, gradient in zip(call.parts, gradients, strict=False):  # no gradients where none is wanted
        if gradient is None:
            continue
        begin = 0
        for name, array in zip(part.names, part.arrays, strict=False):
            if np.ndim(array) == 0:
                own: Any = gradient[()] * part.slope
            else:
                own = gradient[begin : begin + len(array)]
                begin += len(array)
                dtypes[name] = dtype_name(array)
            found[name] = found[name] + own if name in found else own
    for name in names:
        if name not in found:
            raise ValueError(f"argnums: {name} has no gradient in this call")
    # Rounded to a half precision last, where one argument is several parts.
    return value, [cast(found[name], dtypes[name]) if name in dtypes else found[name] for name in names]
