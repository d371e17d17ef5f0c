"""The compiled operations on arrays without gradients tracking: allocate results, call the kernel.

Each function takes NumPy arrays or (detached) torch tensors and returns arrays of the same kind. Values and gradients
have the compute dtype (float32 for half precisions); who hands gradients out rounds them to the dtype of what they
belong to. Here are matrices of pairs, products with them and searches; losses are in `nearfar.loss_operations`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import _core
from .arrays import Array, cast, compute_dtype, empty, namespace
from .backend import kernel, on_cuda

# Whether searches score columns with 8-bit integers first: "automatic" (where the CPU is faster at them), "always" or
# "never". Results are the same.
SCREENING = "automatic"


def numbers(flags: Iterable[bool]) -> str:
    """Which of the inputs' gradients are wanted, as "02"."""
    return "".join(str(k) for k, flag in enumerate(flags) if flag)


def contiguous(array: Array) -> Array:
    """The array, or a C-contiguous copy of one that is not."""
    return array.contiguous() if hasattr(array, "contiguous") else namespace(array).ascontiguousarray(array)


def exponential(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """exp of a contiguous NumPy array in place, by the kernels' own code: a sixth of NumPy's time with AVX2."""
    flat = x.reshape(-1)
    _core.vector_math("exp_flush", flat, flat)
    return x


def _metric(map: str) -> tuple[str, float]:
    """'minkowski:3.0' as name and power: an operator's map is one string."""
    name, _, power = map.partition(":")
    return name, float(power or 2)


def store(x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, out: Array | None = None) -> Array:
    """The matrix of a map, (b, n, m) or condensed (b, n (n - 1) / 2); ``y=None`` is x itself.

    As in all operations of pairs that follow, arrays may have no batch: (n, m) of (n, d) and (m, d).
    """
    *batch, n, _ = x.shape
    columns = x if y is None else y
    shape = (*batch, n * (n - 1) // 2) if condensed else (*batch, n, columns.shape[-2])
    if out is None:
        out = empty(x, shape)
    kernel(x, "store")(x, columns, *_metric(map), normalize, y is None, condensed, out)
    return out


def store_grad(
    grad: Array, value: Array, x: Array, y: Array | None, map: str, normalize: bool, condensed: bool, wanted: str
) -> tuple[Any, ...]:
    """Gradients of ``<grad, store(x, y)>``, those that are `wanted` ("0", "1", "01") at least.

    With ``y=None``, here and in what follows, both roles of x are in the first and the second is None.
    """
    columns = x if y is None else y
    # The GPU's strip of weights has that of x with any other.
    dx = empty(x, x.shape, zero=True) if y is None or "0" in wanted or on_cuda(x) else None
    dy = empty(x, columns.shape, zero=True) if y is not None and "1" in wanted else None
    dtype = compute_dtype(x)
    grad = cast(grad, dtype)
    grad = contiguous(grad)
    kernel(x, "store_grad")(x, columns, *_metric(map), normalize, y is None, condensed, value, grad, dx, dy)
    return dx, dy


def _pair_gradients(x: Array, y: Array | None, parameters: Array | None, wanted: str) -> tuple[Any, Any, Any]:
    """Zeros for the gradients of x ("0"), y ("1") and the parameters, unless None; None for those not wanted."""
    dx = empty(x, x.shape, zero=True) if "0" in wanted else None
    dy = empty(x, y.shape, zero=True) if y is not None and "1" in wanted else None
    # Beside the points, also where the parameters are numbers on the CPU: whoever hands it out brings it there.
    return dx, dy, None if parameters is None else empty(x, parameters.shape, "float64", zero=True)


def gram(x: Array, y: Array | None, parameters: Array, program: str) -> Array:
    """k(x, y) of a kernel given as a program (`nearfar.kernels.program`), (b, n, m)."""
    columns = x if y is None else y
    out = empty(x, (*x.shape[:-1], columns.shape[-2]))
    kernel(x, "gram")(x, columns, program, parameters, y is None, out)
    return out


def gram_grad(
    grad: Array, x: Array, y: Array | None, parameters: Array, program: str, wanted: str
) -> tuple[Any, Any, Any]:
    """Gradients of ``<grad, gram(x, y)>`` with respect to x, y and the parameters, those that are `wanted` ("012")."""
    dx, dy, dp = _pair_gradients(x, y, parameters if "2" in wanted else None, wanted)
    grad = contiguous(cast(grad, compute_dtype(x)))
    kernel(x, "gram_grad")(x, x if y is None else y, program, parameters, y is None, grad, dx, dy, dp)
    return dx, dy, dp


def matmul(x: Array, y: Array | None, v: Array, parameters: Array, program: str) -> Array:
    """K(x, y) v for (b, n, d), (b, m, d), (b, m, r) and a kernel given as a program."""
    out = empty(x, (*x.shape[:-1], v.shape[-1]))
    kernel(x, "matmul")(x, x if y is None else y, v, program, parameters, y is None, out)
    return out


def matmul_grad(
    grad: Array, x: Array, y: Array | None, v: Array, parameters: Array, program: str, wanted: str
) -> tuple[Any, ...]:
    """Gradients of ``<grad, K(x, y) v>`` with respect to x, y, v and the parameters, those `wanted` ("0123")."""
    # The upstream gradient has the compute dtype and must not be rounded to a half, so the others are widened.
    dtype = compute_dtype(x)
    x, y, v, grad = (None if a is None else cast(a, dtype) for a in (x, y, v, grad))
    columns = x if y is None else y
    dx, dy, dp = _pair_gradients(x, y, parameters if "3" in wanted else None, wanted)
    if dx is not None or dy is not None or dp is not None:
        kernel(x, "matmul_grad")(x, columns, v, grad, program, parameters, y is None, dx, dy, dp)
    dv = None
    if "2" in wanted:  # every score is symmetric: K(x, y)^T = K(y, x)
        dv = matmul(columns, None if y is None else x, grad, parameters, program)
    return dx, dy, dv, dp


def hsic(x: Array, y: Array, parameters_x: Array, parameters_y: Array, *config: Any) -> Array:
    """Sums of K' L', K'^2, L'^2, then a and b, (3 + 2 n,), of the centred Gram matrices K'_ij = k(x_i, x_j) - a_i - a_j
    and L' of y; `config`: the programs of both kernels, and whether pairs i = j count.
    """
    values = empty(x, (3 + 2 * x.shape[0],), "float64")
    kernel(x, "hsic")(x, y, parameters_x, parameters_y, *config, values)
    return values


def hsic_grad(
    grad: Array, values: Array, x: Array, y: Array, parameters_x: Array, parameters_y: Array, *config: Any
) -> tuple[Any, ...]:
    """Gradients of ``<grad[:3], the sums of hsic>`` by x, y and both parameters, those `wanted` ("0123"), the last of
    `config`. To them a and b are constants.
    """
    arrays, (*programs, wanted) = (x, y, parameters_x, parameters_y), config
    # All beside the points, as in `_pair_gradients`.
    kinds = zip("0123", arrays, (None, None, "float64", "float64"), strict=True)
    out = [empty(x, own.shape, dtype, zero=True) if k in wanted else None for k, own, dtype in kinds]
    kernel(x, "hsic_grad")(*arrays, *programs, values, contiguous(grad[:3]), *out)
    return tuple(out)


def select(x: Array, y: Array | None, map: str, normalize: bool, exclude_self: bool, k: int) -> tuple[Array, Array]:
    """The k best columns of every row: values and int64 indices, (b, n, k)."""
    shape = (*x.shape[:-1], k)
    value, index = empty(x, shape), empty(x, shape, "int64")
    columns = x if y is None else y
    kernel(x, "select")(x, columns, *_metric(map), normalize, exclude_self, k, value, index, SCREENING)
    return value, index
