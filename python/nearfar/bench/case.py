"""What a benchmark line is: an operation, its shapes and floor, the data, ours, the peers, and a float64 reference."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nearfar as nf

Array = NDArray[Any]
Shape = dict[str, int]
Step = Callable[[], tuple[Any, ...]]  # one timed call; what it returns is compared with the reference

# Results of N x M entries are compared on this many rows: a float64 reference of all of them would not fit.
CHECKED_ROWS = 1024


@dataclass(frozen=True)
class Problem:
    """A shape and the arrays made for it."""

    shape: Shape
    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


Builder = Callable[[Problem], Step]


def as_numpy(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    """The default view: every output, whole."""
    return tuple(np.asarray(a) for a in result)


def first_rows(problem: Problem, result: tuple[Any, ...]) -> tuple[Array, ...]:
    """The view of matrices of all pairs: the first `CHECKED_ROWS` rows."""
    return tuple(np.asarray(a[:CHECKED_ROWS]) for a in result)


@dataclass(frozen=True)
class Case:
    """One operation of the benchmark.

    Parameters
    ----------
    name : str
        What `--ops` selects.
    what : str
        One line: what is computed, value or value and gradient.
    shapes : tuple of Shape
        Sizes by name, in the order in which they are printed.
    quick : Shape
        The size of `--quick`, of the tests, and of the warm-up before memory is measured.
    make : callable
        ``(shape, rng) -> {name: float32 array}``.
    ours : callable
        ``(problem) -> step``. Everything that a caller does once (building an index, making tensors that require a
        gradient) is done here; the step is what is timed.
    peers : mapping of str to callable
        The same for other libraries, imported inside. The first is the one whose memory is measured too.
    reference : callable
        ``(problem) -> arrays``: float64.
    flops : callable
        ``(shape) -> float``: the fewest flops that the operation can do; a unit is 2 N M D, one matrix product.
    writes : callable, optional
        ``(shape) -> float``: bytes of a result that is a matrix of all pairs.
    view : callable
        ``(problem, result) -> arrays`` that are compared with the reference, output by output.
    tolerance, peer_tolerance : float
        The errors that we and others may have at the quick size.
    timed : bool
        False: memory only.
    sweep : tuple of int
        Values of n, rising, at which the first shape is timed for a picture of time over n; empty: none.
    """

    name: str
    what: str
    shapes: tuple[Shape, ...]
    quick: Shape
    make: Callable[[Shape, np.random.Generator], dict[str, Array]]
    ours: Builder
    peers: Mapping[str, Builder]
    reference: Callable[[Problem], tuple[Array, ...]]
    flops: Callable[[Shape], float]
    writes: Callable[[Shape], float] | None = None
    view: Callable[[Problem, tuple[Any, ...]], tuple[Array, ...]] = field(default=as_numpy)
    tolerance: float = 1e-5
    peer_tolerance: float = 1e-5
    timed: bool = True
    sweep: tuple[int, ...] = ()

    def problem(self, shape: Shape) -> Problem:
        """Data for a shape: always the same."""
        return Problem(shape, self.make(shape, np.random.default_rng(0)))

    def error(self, problem: Problem, result: tuple[Any, ...], reference: tuple[Array, ...]) -> float:
        """The largest relative error of an output, in norm."""
        # A peer may return less than the reference holds (labels without distances): what it returns is compared.
        pairs = zip(self.view(problem, result), reference, strict=False)
        return max(relative_error(got, wanted) for got, wanted in pairs)


def relative_error(got: Array, wanted: Array) -> float:
    """``|got - wanted| / |wanted|`` in the Euclidean norm."""
    if got.shape != wanted.shape:
        raise ValueError(f"expected a result of shape {wanted.shape}, got {got.shape}")
    return float(np.linalg.norm((got - wanted).ravel()) / max(float(np.linalg.norm(wanted.ravel())), 1e-300))


def label(shape: Shape) -> str:
    """'8192 x 128'."""
    return " x ".join(str(size) for size in shape.values())


def load(module: str) -> Any:
    """Import a peer where it is used: the benchmark runs with whatever is installed."""
    return importlib.import_module(module)


def normal(*names: str) -> Callable[[Shape, np.random.Generator], dict[str, Array]]:
    """Arrays (n, d) of independent normal entries."""

    def make(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
        return {name: rng.standard_normal((shape["n"], shape["d"]), np.float32) for name in names}

    return make


def gradient_step(loss: Callable[..., Any], *arrays: Array) -> Step:
    """Forward and backward as a training loop does them: ``(value, *gradients)``."""
    leaves = [load("torch").from_numpy(a).requires_grad_() for a in arrays]

    def step() -> tuple[Any, ...]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves)
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves)

    return step


def our_gradient_step(loss: Callable[..., Any], *arrays: Array, **options: Any) -> Step:
    """The same for a loss of ours; without torch through `nearfar.value_and_grad`."""
    try:
        return gradient_step(functools.partial(loss, **options), *arrays)
    except ModuleNotFoundError:
        function = nf.value_and_grad(loss, argnums=tuple(range(len(arrays))))

        def step() -> tuple[Any, ...]:
            value, gradients = function(*arrays, **options)
            return value, *gradients

        return step
