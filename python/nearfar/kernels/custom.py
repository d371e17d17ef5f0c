"""Kernels given as Python functions: the slow path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..arrays import Array, is_torch
from ..distances import cdist
from .base import Kernel
from .program import Builder, Register


class Custom(Kernel):
    """A kernel of the squared distance or the dot product, given as Python functions. **The slow path.**

    .. math:: k(x, y) = f(\\|x - y\\|^2) \\quad \\text{or} \\quad k(x, y) = f(\\langle x, y \\rangle)

    Parameters
    ----------
    value : callable
        f, entry by entry, of an array of scores of the points' kind (NumPy array or tensor) and of any shape.
    derivative : callable
        f' of the same. For second derivatives it must be made of torch operations.
    score : {"sqeuclidean", "dot"}
        What f is a function of.
    is_mercer : bool or None
        What you know of it; None: nothing. Taken as it is: `check_mercer` believes True, and tests the rest.

    Notes
    -----
    Scores come from the fused engine, f does not: `matmul` works through blocks of rows of about 4 million pairs, and
    writes and reads each several times, and computes them once more for gradients. So it is several times slower than a
    built-in kernel, as is every kernel that has such a term; memory stays O(block). At equal points the derivative by
    the points uses f' at 0, which must be finite.

    Examples
    --------
    The inverse multiquadric, which is Mercer:

    >>> import numpy as np, nearfar as nf
    >>> k = nf.kernels.Custom(lambda r: (1 + r) ** -0.5, lambda r: -0.5 * (1 + r) ** -1.5, is_mercer=True)
    >>> k(np.array([[0.0], [1.0]])).round(4)
    array([[1.    , 0.7071],
           [0.7071, 1.    ]])
    """

    _compiles = False

    def __init__(
        self,
        value: Callable[[Array], Array],
        derivative: Callable[[Array], Array],
        score: str = "sqeuclidean",
        is_mercer: bool | None = None,
    ) -> None:
        for name, function in (("value", value), ("derivative", derivative)):
            if not callable(function):
                raise TypeError(f"{name}: expected a function of an array, got {type(function).__name__}")
        if score not in ("sqeuclidean", "dot"):
            raise ValueError(f"score: expected 'sqeuclidean' or 'dot', got {score!r}")
        if is_mercer not in (True, False, None):
            raise ValueError(f"is_mercer: expected True, False or None, got {is_mercer!r}")
        self.value, self.derivative, self.score, self._known = value, derivative, score, is_mercer

    @property
    def is_mercer(self) -> bool | None:
        return self._known

    def _build(self, program: Builder) -> Register:
        raise AssertionError("a Python function is no program")

    def _dense(self, x: Array, y: Array | None) -> Array:
        return self._apply(cdist(x, y, self.score))

    def _diag(self, x: Array) -> Array:
        return self._apply((x * 0 if self.score == "sqeuclidean" else x * x).sum(-1))

    def _apply(self, scores: Array) -> Array:
        if is_torch(scores):
            result: Array = _differentiated().apply(scores, self.value, self.derivative)
        else:
            result = self.value(scores)
        if tuple(result.shape) != tuple(scores.shape):
            raise ValueError(f"value: expected a result of shape {tuple(scores.shape)}, got {tuple(result.shape)}")
        return result

    def __repr__(self) -> str:
        return f"Custom({self.value!r}, {self.derivative!r}, score={self.score!r}, is_mercer={self._known!r})"


@functools.cache
def _differentiated() -> Any:
    """The autograd Function of a value with its derivative."""
    import torch

    class Differentiated(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(scores: Any, value: Any, derivative: Any) -> Any:
            return value(scores)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            scores, _, ctx.derivative = inputs
            ctx.save_for_backward(scores)

        @staticmethod
        def backward(ctx: Any, *grad: Any) -> Any:
            (scores,) = ctx.saved_tensors
            return grad[0] * ctx.derivative(scores), None, None

    return Differentiated
