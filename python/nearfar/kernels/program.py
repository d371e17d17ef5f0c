"""From a kernel to a program: what the engine evaluates in one fused pass over the pairs.

A program is a text, ``"name left right; ..."``: first the scores of a pair, then steps on earlier registers (the scores
are the first registers, every step is one more; the last is the kernel's value).

=====================================  =====================================================================
``dot``, ``unit_dot``                   <x, y> of the columns [left, right) of the points (-1: all); of unit rows
``sqeuclidean``, ``absolute``           the squared distance; the L1 distance
``chi_squared``                         sum of (x_k - y_k)^2 / (x_k + y_k)
``gaussian``, ``matern12`` ...          a map of register `left` with parameters from number `right` on
``power``                               register `left` to the exponent `right`
``add``, ``multiply``                   of registers `left` and `right`
=====================================  =====================================================================

The formulas of the maps are in ``csrc/pairwise/map.hpp``, for second derivatives in `nearfar.formulas`. Equal scores
and equal steps are shared. Where scores are of different points (a length scale for every coordinate is divided out of
the points; a periodic kernel bends every coordinate into a circle), the point sets lie side by side as columns of one
array, so gradients of whatever prepared them are PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from ..arrays import Array, cast, compute_dtype, is_at_hand, is_torch

# As in csrc/pairwise/program.hpp.
MAX_SCORES, MAX_STEPS, MAX_PARAMETERS = 8, 64, 64

# Of a length scale: the square of its inverse, and the derivative of that, are finite in double precision.
LEAST_SCALE = 2.0**-330

Register = tuple[str, int]  # ("score", k) or ("step", k)


class Builder:
    """Collects the scores, steps and parameters of a kernel on given points."""

    def __init__(self, x: Array, y: Array | None) -> None:
        self._x, self._y = x, y
        self._looked = False
        self._sets: dict[Hashable, tuple[Array, Array | None]] = {}
        self._scores: dict[tuple[str, Hashable], int] = {}
        self._steps: dict[tuple[Any, ...], int] = {}
        self._parameters: dict[Hashable, int] = {}
        self._values: list[Any] = []
        self._derived: dict[Hashable, Any] = {}
        self._keep: list[Any] = []  # what keys name by its id

    @property
    def x(self) -> Array:
        """The points as given; the program is then of these."""
        self._looked = True
        return self._x

    @property
    def y(self) -> Array | None:
        """The others, None where they are x itself."""
        self._looked = True
        return self._y

    @property
    def d(self) -> int:
        """Columns of the points as given."""
        return int(self.x.shape[-1])

    def wide(self) -> tuple[Array, Array | None]:
        """Both sets in the dtype that computes; once, so that gradients are rounded to a half precision once."""

        def make() -> tuple[Array, Array | None]:
            dtype = compute_dtype(self.x)
            return cast(self.x, dtype), None if self.y is None else cast(self.y, dtype)

        pair: tuple[Array, Array | None] = self.derived("wide", make)
        return pair

    def key(self, value: Any) -> Hashable:
        """A name for a hyper-parameter: numbers by their value, arrays by identity."""
        if isinstance(value, (int, float)):
            return float(value)
        self._keep.append(value)
        return id(value)

    def score(self, kind: str, points: Hashable = None, prepare: Callable[[Array], Array] | None = None) -> Register:
        """A score of the points as given, or of ``prepare(points)``, which `points` names."""
        if points not in self._sets:
            if prepare is None:
                self._sets[points] = self._x, self._y
            else:
                x, y = self.wide()
                self._sets[points] = prepare(x), None if y is None else prepare(y)
        return "score", self._scores.setdefault((kind, points), len(self._scores))

    def step(self, name: str, left: Register, right: Register | int = 0) -> Register:
        """A step; `right` is a register, an exponent, or the number of its first parameter."""
        return "step", self._steps.setdefault((name, left, right), len(self._steps))

    def parameters(self, *values: Any) -> int:
        """The number of the first of these parameters, which are consecutive."""
        key = tuple(map(self.key, values))
        if key not in self._parameters:
            self._parameters[key] = len(self._values)
            self._values.extend(values)
        return self._parameters[key]

    def positive(self, value: Any, name: str) -> None:
        """Refuse a tensor of other numbers, where they can be looked at; NumPy's were when the kernel was made."""
        if is_torch(value) and is_at_hand(value):
            good = bool(((value > 0) & value.isfinite()).all())
            if not good:
                raise ValueError(f"{name}: expected a positive number or (d,) of them, got {value.detach()}")

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value made of a hyper-parameter, once: equal ones are then one parameter."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def array(self, value: Any, name: str, dtype: str) -> Array:
        """A hyper-parameter as an array of the points' kind."""
        if is_torch(self._x):
            import torch

            return torch.as_tensor(value, dtype=getattr(torch, dtype), device=self._x.device)
        if is_torch(value):
            raise TypeError(f"{name}: a torch.Tensor, but the points are a NumPy array")
        return np.asarray(value, dtype)

    def units(self, scale: Any, name: str) -> tuple[Any, Array]:
        """A unit near the least of the length scales, and what is left of each for the points to be divided by.

        The unit is a parameter of the map: points divided by a tiny length scale would overflow. It is a power of two,
        so no digit changes.
        """
        array = self.array(scale, name, "float64")

        def unit() -> Any:
            if is_torch(scale):
                import torch

                least = array.detach().abs().amin().clamp(min=LEAST_SCALE)
                return least / torch.frexp(least).mantissa
            number = max(float(scale if isinstance(scale, (int, float)) else np.min(scale)), LEAST_SCALE)
            return number / math.frexp(number)[0]

        one = self.derived(("unit", self.key(scale)), unit)
        return one, cast(array / one, compute_dtype(self.x))

    def finish(self) -> tuple[Array, Array | None, Array, str]:
        """Both point sets, the parameters (float64) and the text."""
        for made, most, what in (
            (self._scores, MAX_SCORES, "different scores"),
            (self._steps, MAX_STEPS, "steps"),
            (self._values, MAX_PARAMETERS, "parameters"),
        ):
            if len(made) > most:
                raise ValueError(f"kernel: expected at most {most} {what} in one kernel, got {len(made)}")
        x, y, columns = self._side_by_side()
        return x, y, self._vector(), self._text(columns)

    def constant(self) -> tuple[np.ndarray[Any, Any], str] | None:
        """Parameters and text where they are those of any points, as nobody has looked at points or at an array."""
        if self._looked or self._keep:
            return None
        return np.array(self._values, np.float64), self._text({None: (0, -1)})

    def _text(self, columns: dict[Hashable, tuple[int, int]]) -> str:
        lines = [f"{kind} {columns[points][0]} {columns[points][1]}" for kind, points in self._scores]
        lines += [f"{name} {self._number(left)} {self._number(right)}" for name, left, right in self._steps]
        return "; ".join(lines)

    def _number(self, operand: Register | int) -> int:
        """That of a register: steps come after the scores. An exponent or a parameter as it is."""
        if isinstance(operand, int):
            return operand
        kind, k = operand
        return k if kind == "score" else len(self._scores) + k

    def _side_by_side(self) -> tuple[Array, Array | None, dict[Hashable, tuple[int, int]]]:
        if len(self._sets) == 1:
            ((points, (x, y)),) = self._sets.items()
            return x, y, {points: (0, -1)}
        columns, begin = {}, 0
        for points, (own, _) in self._sets.items():
            columns[points] = (begin, begin + own.shape[-1])
            begin += own.shape[-1]
        if None in self._sets:
            self._sets[None] = self.wide()
        x_parts = [own for own, _ in self._sets.values()]
        y_parts = [other for _, other in self._sets.values() if other is not None]
        return _beside(x_parts), _beside(y_parts) if y_parts else None, columns

    def _vector(self) -> Array:
        if not is_torch(self._x):
            return np.array([float(self.array(value, "parameter", "float64")) for value in self._values], np.float64)
        import torch

        if all(isinstance(value, float) for value in self._values):
            # By way of NumPy: from a list it takes twice as long.
            return torch.from_numpy(np.array(self._values, np.float64))
        # On the GPU if one is, where kernels read them. A number is filled in there: a copy would be waited for.
        devices = [value.device for value in self._values if is_torch(value) and value.device.type != "cpu"]
        options: dict[str, Any] = {"dtype": torch.float64, "device": devices[0] if devices else "cpu"}
        return torch.stack(
            [
                torch.full((), v, **options) if isinstance(v, float) else torch.as_tensor(v, **options).reshape(())
                for v in self._values
            ]
        )


def _beside(parts: list[Array]) -> Array:
    if is_torch(parts[0]):
        import torch

        return torch.cat(parts, -1)
    return np.concatenate(parts, -1)
