"""The glue to PyTorch: autograd Functions around the operators of `nearfar.operators`.

Imported only when a torch tensor arrives. `_Forward` has `_Backward` for its backward, whose own backward is the second
derivative (`nearfar.second`). A loss computes its gradient in the forward pass when an input requires one, because for
a scalar the upstream gradient only scales it. Third derivatives raise.

Forward mode needs nothing more. Along vectors v the derivative of a number is <gradients, v>; of an array it is the
derivative of <gradients, v>, which is linear in the upstream gradient, by that gradient; of gradients, whose Jacobians
are symmetric, it is the derivative of <gradients, v>. The last two are second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function, forward_ad

from . import formulas, operations, operators
from .formulas import PLAIN
from .operators import OPERATIONS


def _split(args: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return args[:count], args[count:]


class _Positional(Function):
    """A Function of positional arguments: `apply` binds them to no signature, which costs as much as a small loss."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _transformed():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        alive = [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]  # what outlived its transform
        return super(Function, cls).apply(*alive)  # type: ignore[misc]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """A loop: an operation fills the machine by itself."""
        results = []
        for i in range(info.batch_size):
            own = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
            results.append(cls.apply(*own))
        single = isinstance(results[0], Tensor)
        columns = [[r] for r in zip(*([(r,) for r in results] if single else results), strict=True)]
        stacked = tuple(None if c[0][0] is None else torch.stack(c[0]) for c in columns)
        dims = tuple(None if s is None else 0 for s in stacked)
        return (stacked[0], 0) if single else (stacked, dims)


class _Forward(_Positional):
    """apply(name, wanted gradients, number of tensors, *tensors, *config) -> (value, *gradients of a loss)."""

    @staticmethod
    def forward(name: str, wanted: str, count: int, *args: Any) -> Any:
        tensors, config = _split(args, count)
        return tuple(OPERATIONS[name].forward(tensors, config, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, _, ctx.count = inputs[:3]
        tensors, ctx.config = _split(inputs[3:], ctx.count)
        if len(output) > 1:
            ctx.mark_non_differentiable(*(grad for grad in output[1:] if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        operation = OPERATIONS[ctx.name]
        rest = (None,) * (ctx.count - operation.count + len(ctx.config))
        if g is None:
            return (None,) * (3 + operation.count) + rest
        tensors, (value, *early) = _split(ctx.saved_tensors, ctx.count)
        needed = ctx.needs_input_grad[3 : 3 + operation.count]
        early = [grad if need else None for grad, need in zip(early, needed, strict=False)]
        # The graph of the gradient is built only for whoever differentiates it.
        function = _DualBackward if _forward_mode() else _Backward
        grads = (function.apply if _differentiated() else function.forward)(
            ctx.name, operations.numbers(needed), ctx.count, g, value, *early, *tensors, *ctx.config
        )
        # A scale may be a number on the CPU beside points on the GPU.
        own = [
            None if grad is None or not need else grad if grad.device == tensor.device else grad.to(tensor.device)
            for grad, need, tensor in zip(grads, needed, tensors, strict=False)
        ]
        return (None, None, None, *own, *rest)


def _is_scalar_loss(name: str, config: tuple[Any, ...]) -> bool:
    """Whether the forward pass has computed the gradient already."""
    return OPERATIONS[name].loss and "none" not in config


def _scale(grad: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * g`` rounded once, to `dtype`, in one kernel.

    Not differentiable, and no faster on the CPU: for the GPU, where nobody traces. One H100, 32768 x 512 to bfloat16:
    103 us in two kernels, 80 in one.
    """
    return torch.mul(grad, g, out=torch.empty_like(grad, dtype=dtype))


class _Backward(_Positional):
    """apply(name, wanted, number of tensors, upstream, *forward's output, *tensors, *config) -> the gradients."""

    @staticmethod
    def _parts(name: str, count: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        operation = OPERATIONS[name]
        outputs = 1 + (operation.count if operation.loss else 0)
        output, rest = _split(args, outputs)
        return (operation, output, *_split(rest, count))

    @staticmethod
    def forward(name: str, wanted: str, count: int, g: Tensor, *args: Any) -> Any:
        operation, output, tensors, config = _Backward._parts(name, count, args)
        # Rounded to the inputs' dtype only at last: a loss scaler's factor in g keeps float16 gradients from vanishing.
        if _is_scalar_loss(name, config):
            once = g.is_cuda and not (torch.compiler.is_compiling() or _differentiated())
            grads = tuple(
                grad if grad is None else _scale(grad, g, t.dtype) if once and grad.is_cuda else grad * g
                for grad, t in zip(output[1:], tensors, strict=False)
            )
        else:
            grads = operation.grad(g, output[0], tensors, config, wanted)
        # Asked first, because `to` takes microseconds to find that nothing is to be done.
        return tuple(
            v if v is None or v.dtype == t.dtype else v.to(t.dtype) for v, t in zip(grads, tensors, strict=False)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, _, ctx.count, g = inputs[:4]
        _, forward_output, tensors, ctx.config = _Backward._parts(ctx.name, ctx.count, inputs[4:])
        ctx.skip = len(forward_output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, forward_output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, *vectors: Any) -> Any:
        g, value, *tensors = ctx.saved_tensors
        count = OPERATIONS[ctx.name].count
        vectors = tuple(None if v is None or t is None else v for v, t in zip(vectors, tensors, strict=False))
        if all(v is None for v in vectors):
            return (None,) * (4 + ctx.skip + ctx.count + len(ctx.config))
        g_grad, *grads = _Second.apply(ctx.name, ctx.count, g, value, *tensors, *vectors, *ctx.config)
        rest = (None,) * (ctx.count - count + len(ctx.config))
        return (None, None, None, g_grad, *(None,) * ctx.skip, *grads, *rest)


class _Second(_Positional):
    """apply(name, number of tensors, upstream, value, *tensors, *vectors, *config) -> gradients of upstream, tensors.

    A Function of its own so that a third derivative meets a refusal, not a tensor without a graph.
    """

    @staticmethod
    def forward(name: str, count: int, g: Tensor, value: Tensor, *args: Any) -> Any:
        tensors, rest = _split(args, count)
        operation = OPERATIONS[name]
        vectors, config = _split(rest, operation.count)
        with torch.autocast(g.device.type, enabled=False):
            g_grad, grads = operation.second(operation.count, g, value, tensors, config, vectors)
        return (g_grad, *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise NotImplementedError(
            f"nearfar: {ctx.name} has no third derivative, and one in forward mode of an array has no derivative"
        )

    jvp = backward


def _forward_mode_again(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Torch calls `jvp` with forward mode off, also that of the transforms around the one at work: it is for these that
    it goes on here, with what was saved stripped of this one's tangents.
    """

    def strip(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else forward_ad.unpack_dual(tensor).primal

    def run(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, tuple(map(strip, ctx.saved_tensors)), *tangents)

    return run


class _DualForward(_Forward):
    """`_Forward` with a derivative in forward mode, a class of its own because the compiler refuses who has one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Forward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[3 : 3 + ctx.count], *output)

    @staticmethod
    @_forward_mode_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Any:
        operation = OPERATIONS[ctx.name]
        tensors, (value, *early) = _split(saved, ctx.count)
        vectors = tangents[3 : 3 + operation.count]
        if _is_scalar_loss(ctx.name, ctx.config):
            wanted, one = operations.numbers(v is not None for v in vectors), torch.ones_like(value)
            # Of the values of halves in float32, so that gradients are not rounded: the tangent is none.
            own, rest = _split(tensors, operation.count)
            own = tuple(None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in own)
            grads = _DualBackward.apply(ctx.name, wanted, ctx.count, one, value, *early, *own, *rest, *ctx.config)
            along = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True) if v is not None)
        else:
            g = torch.zeros_like(value)  # any, as what is asked for is a derivative by it
            along = _Second.apply(ctx.name, ctx.count, g, value, *tensors, *vectors, *ctx.config)[0]
        return (along.to(value), *(None for _ in early))


class _DualBackward(_Backward):
    """`_Backward` with a derivative in forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Backward.setup_context(ctx, inputs, output)
        ctx.wanted = inputs[1]
        ctx.save_for_forward(*inputs[3 : 4 + ctx.skip + ctx.count])

    @staticmethod
    @_forward_mode_again
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Any) -> Any:
        operation = OPERATIONS[ctx.name]
        g, *rest = saved
        grads = (None,) * operation.count
        if tangents[3] is not None:  # they are linear in the upstream gradient
            grads = _DualBackward.apply(ctx.name, ctx.wanted, ctx.count, tangents[3], *rest, *ctx.config)
        value, tensors = rest[0], rest[ctx.skip :]
        vectors = tangents[4 + ctx.skip :][: operation.count]
        if any(v is not None for v in vectors):
            _, *bends = _Second.apply(ctx.name, ctx.count, g, value, *tensors, *vectors, *ctx.config)
            grads = tuple(b if a is None else a + b for a, b in zip(grads, bends, strict=True))
        return grads


class _Select(_Positional):
    """apply(*arguments of `operations.select`) -> its values and indices, constants both, under torch.func."""

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, *config: Any) -> Any:
        return operators.select((x, y), *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return (None,) * ctx.count


class _Product(_Positional):
    """apply(a, b) -> ``a @ b``, of matrices in equal batches.

    A Function because a backward pass has the autocast of whoever asks for it, not that of the forward pass.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(a.device.type):  # the context takes longer than a small product
            return a @ b
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return product(upstream[0], b.mT) if need_a else None, product(a.mT, upstream[0]) if need_b else None

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        a, b = (
            z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
            for z, dim in zip(args, in_dims, strict=True)
        )
        return cls.apply(a, b), 0


# ---- what the public functions call ----------------------------------------------------------------------------------


def _forward_mode() -> bool:
    """Whether tensors may be dual ones. The compiler has its own way with those."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _transformed() -> bool:
    """Whether a torch.func transform is at work. The compiler traces those itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _differentiated() -> bool:
    """Whether somebody may differentiate what is computed now."""
    return torch.is_grad_enabled() or _transformed() or _forward_mode()


def _requires_grad(tensor: Any, transformed: bool) -> bool:
    """Also of a tensor that vmap maps over, which hides it."""
    while transformed and isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return isinstance(tensor, Tensor) and tensor.requires_grad


def is_variable(tensor: Tensor) -> bool:
    """Whether a derivative by it may be asked for.

    In forward mode by whatever a transform has wrapped: outer ones hide their tangents from inner ones.
    """
    if tensor.requires_grad or not _forward_mode():
        return tensor.requires_grad
    return torch._C._functorch.is_gradtrackingtensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


def _recorded(x: Tensor, y: Tensor | None, transformed: bool) -> bool:
    """Whether torch records what is computed of these points."""
    return torch.is_grad_enabled() and (_requires_grad(x, transformed) or _requires_grad(y, transformed))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their own dtype, and so are its derivatives: autocast would round them to a half."""
    if b.dim() == 1:
        return product(a, b[:, None])[:, 0]
    transformed = _transformed()
    if _forward_mode() or not (transformed or _recorded(a, b, transformed)):
        return _Product.forward(a, b)  # written out, which is what forward mode differentiates
    result: Tensor = _Product.apply(a, b)
    return result


def store_into(out: Tensor, x: Tensor, y: Tensor | None, map: str, normalize: bool, condensed: bool) -> None:
    """`operations.store` into memory of the caller, which nothing connects to a graph."""
    transformed = _transformed()
    if _recorded(x, y, transformed) or transformed or _forward_mode():
        raise ValueError("out: not for inputs that require a gradient")
    operations.store(operators.detached(x), operators.detached(y), map, normalize, condensed, out)


def select(map: str, normalize: bool, x: Tensor, y: Tensor | None, exclude_self: bool, k: int) -> tuple[Tensor, Tensor]:
    """`operations.select` of matrices, (n, k); the values connected to the graph if any input requires a gradient."""
    transformed = _transformed()
    tensors, config = (x.detach(), None if y is None else y.detach()), (map, normalize, exclude_self, k)
    value, index = _Select.apply(*tensors, *config) if transformed else operators.select(tensors, *config)
    if not _recorded(x, y, transformed) and not _forward_mode():
        return value, index
    # The kernel's values, which are the more accurate ones, with the formula's derivatives.
    slope = formulas.chosen_pairs(map, normalize, x, x if y is None else y, index)
    return value + (slope - slope.detach()), index


def apply(name: str, tensors: tuple[Any, ...], config: tuple[Any, ...]) -> Tensor:
    """The value of an operation, connected to the graph if any input requires a gradient."""
    if name in PLAIN:
        return PLAIN[name](tensors, config)
    operation = OPERATIONS[name]
    transformed, dual = _transformed(), _forward_mode()
    recorded = torch.is_grad_enabled()
    needed = [recorded and _requires_grad(t, transformed) for t in tensors[: operation.count]]
    if not any(needed) and not transformed and not dual:
        result: Tensor = operation.forward(tensors, config, "")[0]
        return result
    tensors = operators.as_tensors(tensors)
    if torch.compiler.is_compiling():  # which refuses one tensor in two places
        tensors = tuple(None if t is None else t.view_as(t) for t in tensors)
    if transformed or dual:  # a tensor may require a gradient at another level of the transforms than this one
        needed = [dual or any(needed)] * len(needed)
    wanted = operations.numbers(needed) if _is_scalar_loss(name, config) else ""
    value: Tensor = (_DualForward if dual else _Forward).apply(name, wanted, len(tensors), *tensors, *config)[0]
    return value
