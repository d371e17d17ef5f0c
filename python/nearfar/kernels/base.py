"""What every kernel can do: Gram matrices, products without them, algebra."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import operations
from ..arrays import (
    Array,
    autograd,
    batched,
    cast,
    check_points,
    compute_dtype,
    dtype_name,
    finite,
    is_concrete,
    is_torch,
    kind_of,
    matrix_product,
    of_kind,
    to_numpy,
    unbatched,
    widened,
)
from ..distances import common_batch, pair_shapes
from .program import Builder, Register

_BLOCK = 1 << 22  # pairs at a time where a kernel is no program


class Kernel:
    """A symmetric function of two points, ``k(x, y)``, made of scores of the pair and maps of these.

    Kernels are immutable values. With kernels `k`, `l`, a number `c` (or a tensor, which is differentiated) and a
    positive integer `n`, ``k + l``, ``k * l``, ``c * k`` and ``k ** n`` are kernels. However composed, a kernel is
    evaluated in one pass over the pairs; a score that several terms need is computed once.

    Hyper-parameters that are tensors are differentiated, first and second order, as are the points and `v`.
    """

    __array_ufunc__ = None  # a NumPy number times a kernel is a kernel, not an array of objects

    # Parameters and text of its program where they are those of any points, kept by the first call.
    _constant: tuple[np.ndarray[Any, Any], str] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Once: what is kept of a kernel, and of those made of it, stays true."""
        if name in self.__dict__ and name != "_constant":
            raise AttributeError(f"{name}: a kernel is an immutable value; make another one")
        object.__setattr__(self, name, value)

    # Whether it is a program for the engine; else (`Custom`) every node of the expression makes its matrix.
    _compiles = True

    @property
    def is_mercer(self) -> bool | None:
        """Whether every Gram matrix is positive semi-definite, in any dimension: True and False are proved, None is
        not known.
        """
        raise NotImplementedError

    @property
    def _vanishes(self) -> bool:
        """Whether k(x, y) = 0 for all points."""
        return False

    def _build(self, program: Builder) -> Register:
        raise NotImplementedError

    def _dense(self, x: Array, y: Array | None) -> Array:
        """The Gram matrix where it is no program."""
        raise NotImplementedError

    def _diag(self, x: Array) -> Array:
        """k(x_i, x_i) for points (..., n, d) in the dtype that computes."""
        raise NotImplementedError

    def _program(self, x: Array, y: Array | None) -> tuple[Array, Array | None, Array, str]:
        """What evaluates it on `batched` arrays: points, parameters and text."""
        concrete = is_concrete(x)  # else what is kept would be the compiler's
        if concrete and self._constant:
            parameters, text = self._constant
            return x, y, sys.modules["torch"].from_numpy(parameters) if is_torch(x) else parameters, text
        program = Builder(x, y)
        self._build(program)
        made = program.finish()
        if concrete:
            self._constant = program.constant()
        return made

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The Gram matrix.

        Parameters
        ----------
        x : array (..., N, D)
        y : array (..., M, D), optional
            Default x: half the arithmetic, exactly symmetric.

        Returns
        -------
        array (..., N, M)
            float32 for half precisions, else the inputs' dtype. Differentiable, first and second order.
        """
        if not self._compiles:
            return self._dense(x, y)
        batch, xs, ys = pair_shapes(x, y)
        xs, ys, parameters, text = self._program(xs, ys)
        if is_torch(xs):
            out = autograd().apply("gram", (xs, ys, parameters), (text,))
        else:
            out = operations.gram(xs, ys, parameters, text)
        return unbatched(out, batch)

    def diag(self, x: Array) -> Array:
        """``k(x_i, x_i)``, of shape (..., N), without the Gram matrix."""
        batch, xs, _ = pair_shapes(x, None)
        return unbatched(self._diag(cast(xs, compute_dtype(xs))), batch)

    def matmul(self, x: Array, y: Array | None, v: Array) -> Array:
        """``k(x, y) @ v`` without the Gram matrix; memory O((N + M)(D + R)).

        Parameters
        ----------
        x : array (..., N, D)
        y : array (..., M, D) or None
            None is x: with one column and 4096 points or more, half the arithmetic.
        v : array (..., M, R) or (M,)

        Returns
        -------
        array (..., N, R) or (N,)
            Differentiable in x, y, v and hyper-parameters, first and second order.
        """
        kind_of(v, "v")
        batch, xs, ys = pair_shapes(x, y, v=v)
        m, given = (xs if ys is None else ys).shape[-2], tuple(v.shape)
        vector = v.ndim == 1
        if vector:
            v = v[:, None]
        if v.ndim < 2 or v.shape[-2] != m:
            raise ValueError(f"v: expected {m} rows to match y, got shape {given}")
        if common_batch(batch, v, "v") != batch:
            raise ValueError(f"v: expected batch dimensions to match {batch}, got {given[:-2]}")
        if batch and tuple(v.shape[:-2]) != batch:
            xs, ys, v = widened(xs, ys, v)
        vs = batched(v, batch)
        out = (self._product if self._compiles else self._product_by_rows)(xs, ys, vs)
        out = unbatched(out, batch)
        return out[..., 0] if vector else out

    def _product(self, x: Array, y: Array | None, v: Array) -> Array:
        x, y, parameters, text = self._program(x, y)
        v = cast(v, dtype_name(x))
        if not is_torch(x):
            return operations.matmul(x, y, v, parameters, text)
        return autograd().apply("matmul", (x, y, v, parameters), (text,))

    def _product_by_rows(self, x: Array, y: Array | None, v: Array) -> Array:
        """The same where the kernel is no program: blocks of the matrix, made once more for gradients."""
        x, y, v = widened(x, y, v)  # columns and v are of every block
        columns = x if y is None else y
        v = cast(v, compute_dtype(v))
        rows = max(1, _BLOCK // max(1, columns.shape[-2]))

        def block(x: Array, columns: Array, v: Array) -> Array:
            return matrix_product(self(x, columns), v)

        # Always: hyper-parameters may require a gradient where the points do not.
        evaluate = _recomputed(block) if is_torch(x) else block
        return by_rows(lambda own: evaluate(own, columns, v), x, rows)

    def operator(self, x: Array) -> Any:
        """``k(x, x)`` as a `scipy.sparse.linalg.LinearOperator` of NumPy vectors: for `cg`, `eigsh`, `lobpcg`.

        Parameters
        ----------
        x : array (N, D)

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Of shape (N, N), symmetric; float32 for half precisions, else the points' dtype. Every product is a
            `matmul`. No gradient flows through it.

        Examples
        --------
        >>> import numpy as np, nearfar as nf
        >>> x = np.array([[0.0], [2.0]])
        >>> (nf.kernels.Gaussian(2.0).operator(x) @ np.ones(2)).round(4)
        array([1.6065, 1.6065])
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("nearfar.kernels: operator needs scipy: pip install scipy") from error
        check_points(x=x)
        if x.ndim != 2:
            raise ValueError(f"x: expected shape (n, d), got {tuple(x.shape)}")
        dtype = compute_dtype(x)
        points = cast(x.detach() if is_torch(x) else x, dtype)

        def product(v: Any) -> Any:
            v = np.ascontiguousarray(v, dtype)
            if not is_torch(points):
                return self.matmul(points, None, v)
            import torch

            with torch.no_grad():
                return to_numpy(self.matmul(points, None, of_kind(v, points)))

        n = x.shape[0]
        return LinearOperator(
            (n, n), matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=np.dtype(dtype)
        )

    # ---- algebra

    def __add__(self, other: Any) -> Kernel:
        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return Product(self, other)
        return Scaled(other, self) if _is_scalar(other) else NotImplemented

    def __rmul__(self, other: Any) -> Kernel:
        return Scaled(other, self) if _is_scalar(other) else NotImplemented

    def __pow__(self, exponent: Any) -> Kernel:
        try:
            n = operator.index(exponent) if not isinstance(exponent, bool) else 0
        except TypeError:
            raise TypeError(f"exponent: expected a positive integer, got {type(exponent).__name__}") from None
        if n < 1:
            raise ValueError(f"exponent: expected a positive integer, got {exponent}")
        return self if n == 1 else Power(self, n)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    return isinstance(value, (int, float, np.integer, np.floating)) or (
        (is_torch(value) or isinstance(value, np.ndarray)) and value.ndim == 0
    )


def by_rows(function: Callable[[Array], Array], x: Array, rows: int) -> Array:
    """A function of rows x (..., n, d), so many at a time."""
    if is_torch(x):
        import torch

        return torch.cat([function(own) for own in x.split(rows, -2)], -2)
    starts = range(0, max(1, x.shape[-2]), rows)
    return np.concatenate([function(x[..., begin : begin + rows, :]) for begin in starts], -2)


def checkpointed(function: Callable[..., Any], *arrays: Array) -> Callable[..., Any]:
    """The function; where torch records it, computed again in the backward pass instead of storing what that needs."""
    if not is_torch(arrays[0]):
        return function
    import torch

    recorded = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
    return _recomputed(function) if recorded else function


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    if torch._C._are_functorch_transforms_active():  # which have no hooks on what is saved: there it is stored
        return function
    return lambda *points: checkpoint(function, *points, use_reentrant=False)


def scalar(value: Any, name: str, positive: bool = False) -> Any:
    """A hyper-parameter that is one number: a float, or a tensor as it is, which may require a gradient."""
    if is_torch(value):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number, got a tensor of shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name}: expected a real number, got {dtype_name(value)}")
        return value
    wanted = "a positive number" if positive else "a finite number"
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {wanted}, got {value!r}") from None
    return finite(number, name, 0.0 if positive else -math.inf, strict=positive)


def plain(value: Any) -> float:
    """A scalar hyper-parameter as a number."""
    return float(value.detach() if is_torch(value) else value)


def _grouped(kernel: Kernel) -> str:
    return f"({kernel!r})" if isinstance(kernel, Sum) else repr(kernel)


class _Pair(Kernel):
    """Two kernels joined entry by entry."""

    _step = ""

    def __init__(self, left: Kernel, right: Kernel) -> None:
        self.left, self.right = left, right

    def _join(self, left: Array, right: Array) -> Array:
        raise NotImplementedError

    @property
    def is_mercer(self) -> bool | None:
        return True if self.left.is_mercer and self.right.is_mercer else None

    @property
    def _compiles(self) -> bool:  # type: ignore[override]
        return self.left._compiles and self.right._compiles

    def _build(self, program: Builder) -> Register:
        return program.step(self._step, self.left._build(program), self.right._build(program))

    def _dense(self, x: Array, y: Array | None) -> Array:
        return self._join(self.left(x, y), self.right(x, y))

    def _diag(self, x: Array) -> Array:
        return self._join(self.left._diag(x), self.right._diag(x))


class Sum(_Pair):
    """k + l. Mercer if both are."""

    _step = "add"

    def _join(self, left: Array, right: Array) -> Array:
        return left + right

    @property
    def _vanishes(self) -> bool:
        return self.left._vanishes and self.right._vanishes

    def __repr__(self) -> str:
        return f"{self.left!r} + {self.right!r}"


class Product(_Pair):
    """k l. Mercer if both are (Schur's product theorem)."""

    _step = "multiply"

    def _join(self, left: Array, right: Array) -> Array:
        return left * right

    @property
    def _vanishes(self) -> bool:
        return self.left._vanishes or self.right._vanishes

    def __repr__(self) -> str:
        return f"{_grouped(self.left)} * {_grouped(self.right)}"


class _Changed(Kernel):
    """One kernel changed entry by entry."""

    kernel: Kernel

    def _change(self, values: Array) -> Array:
        raise NotImplementedError

    @property
    def _compiles(self) -> bool:  # type: ignore[override]
        return self.kernel._compiles

    def _dense(self, x: Array, y: Array | None) -> Array:
        return self._change(self.kernel(x, y))

    def _diag(self, x: Array) -> Array:
        return self._change(self.kernel._diag(x))


class Scaled(_Changed):
    """c k. Mercer if c = 0, or if c > 0 and k is; for c < 0 not Mercer if k is, since some k(x, x) > 0."""

    def __init__(self, factor: Any, kernel: Kernel) -> None:
        self.factor, self.kernel = scalar(factor, "factor"), kernel

    def _change(self, values: Array) -> Array:
        return values * self.factor

    def _build(self, program: Builder) -> Register:
        return program.step("scale", self.kernel._build(program), program.parameters(self.factor))

    @property
    def is_mercer(self) -> bool | None:
        factor = plain(self.factor)
        if factor == 0:
            return True
        known = self.kernel.is_mercer
        if factor < 0:
            return True if self.kernel._vanishes else False if known else None
        return known

    @property
    def _vanishes(self) -> bool:
        return plain(self.factor) == 0 or self.kernel._vanishes

    def __repr__(self) -> str:
        return f"{self.factor!r} * {_grouped(self.kernel)}"


class Power(_Changed):
    """k^n, n >= 1. Mercer if k is."""

    def __init__(self, kernel: Kernel, exponent: int) -> None:
        self.kernel, self.exponent = kernel, exponent

    def _change(self, values: Array) -> Array:
        return values**self.exponent

    def _build(self, program: Builder) -> Register:
        return program.step("power", self.kernel._build(program), self.exponent)

    @property
    def is_mercer(self) -> bool | None:
        return True if self.kernel.is_mercer else None

    @property
    def _vanishes(self) -> bool:
        return self.kernel._vanishes

    def __repr__(self) -> str:
        composed = isinstance(self.kernel, (_Pair, _Changed))
        return f"({self.kernel!r}) ** {self.exponent}" if composed else f"{self.kernel!r} ** {self.exponent}"
