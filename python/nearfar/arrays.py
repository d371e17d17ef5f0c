"""What an array is: NumPy, PyTorch or CuPy; the same kind in and out; allocation of results.

Everything above this module is written once for all kinds; everything below it sees only borrowed memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core

Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray

FLOATS = ("float16", "bfloat16", "float32", "float64")

# The names of NumPy's dtypes that were asked for: it makes them anew each time, which takes as long as a few rows.
_NAMES: dict[Any, str] = {}


def kind_of(array: Array, name: str) -> str:
    """'numpy', 'torch' or 'cupy'; TypeError naming the argument for anything else."""
    if isinstance(array, np.ndarray):
        return "numpy"
    if is_torch(array):
        return "torch"
    if isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ())):
        return "cupy"
    raise TypeError(f"{name}: expected a NumPy, PyTorch or CuPy array, got {type(array).__name__}")


def dtype_name(array: Array) -> str:
    """'float32', 'bfloat16', ... whatever the kind."""
    dtype = array.dtype
    if not isinstance(dtype, np.dtype):
        return str(dtype).removeprefix("torch.")  # nor kept: the compiler would compile again when a name is added
    name = _NAMES.get(dtype)
    if name is None:
        name = _NAMES[dtype] = dtype.name
    return name


def device_name(array: Array) -> str:
    """'cpu' or 'cuda:0'."""
    if isinstance(array, (np.ndarray, np.generic)):
        return "cpu"
    return str(array.device) if hasattr(array.device, "type") else f"cuda:{array.device.id}"


def compute_dtype(array: Array) -> str:
    """What results are computed and returned in: float64 for float64, else float32."""
    return "float64" if dtype_name(array) == "float64" else "float32"


def check_points(**arrays: Array) -> str:
    """The kind of all arrays (None is skipped), which are floating and of one kind, device and dtype."""
    (first_name, first), *others = arrays.items()  # the first is never optional
    kind = kind_of(first, first_name)
    _check_memory(first, first_name, kind)
    _check_floating(first, first_name)
    for name, array in others:
        if array is None or array is first:
            continue
        if type(array) is not type(first) and kind_of(array, name) != kind:
            raise TypeError(f"{name}: expected a {kind} array to match {first_name}, got {kind_of(array, name)}")
        _check_memory(array, name, kind)
        if array.dtype != first.dtype:
            _check_floating(array, name)
            wanted, got = dtype_name(first), dtype_name(array)
            raise TypeError(f"{name}: expected dtype {wanted} to match {first_name}, got {got}")
        check_device(array, name, first, first_name)
    if kind == "torch" and not (first.is_cpu or first.is_cuda):
        raise NotImplementedError(
            f"{first_name}: expected an array on the CPU or a CUDA device, got {device_name(first)}"
        )
    return kind


def _check_memory(array: Array, name: str, kind: str) -> None:
    if kind == "numpy":
        check_memory(array, name)
    elif kind == "torch" and array.layout != sys.modules["torch"].strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {array.layout}")


def _check_floating(array: Array, name: str) -> None:
    if dtype_name(array) not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype ({', '.join(FLOATS)}), got {dtype_name(array)}")


def check_memory(array: Any, name: str) -> None:
    """What a NumPy array can be besides plain memory of the machine's own numbers."""
    # NumPy imports `np.ma` when it is first asked for; who has a masked array has done that.
    if type(array) is not np.ndarray and isinstance(array, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise TypeError(f"{name}: expected a plain array, got a masked one; pass .filled(value)")
    if not array.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {array.dtype.str}; pass a copy")
    if not array.flags.aligned:
        raise ValueError(f"{name}: expected aligned {array.dtype}, got misaligned data; pass a copy")


def check_matrix(array: Array, name: str) -> None:
    """Two dimensions and at least one column. Not None."""
    if getattr(array, "ndim", None) != 2:
        kind_of(array, name)
        raise ValueError(f"{name}: expected shape (n, d), got {tuple(array.shape)}")
    if array.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(array.shape)}")


def check_shape(array: Array, name: str, shape: tuple[int, ...], like: str) -> None:
    """Exactly this shape, which comes from argument `like`. Not None."""
    if getattr(array, "shape", None) != shape:
        kind_of(array, name)
        raise ValueError(f"{name}: expected shape {tuple(shape)} to match {like}, got {tuple(array.shape)}")


def check_device(array: Array, name: str, like: Array, like_name: str) -> None:
    """On the device of an array of its kind."""
    if not isinstance(array, np.ndarray) and array.device != like.device:
        raise ValueError(f"{name}: expected device {device_name(like)} to match {like_name}, got {device_name(array)}")


def integer(value: Any, name: str) -> int:
    """An integer, of Python's or NumPy's types; not a boolean."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_seed(value: Any, name: str = "seed") -> int:
    """An integer, at least 0."""
    seed = integer(value, name)
    if seed < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, got {seed}")
    return seed


def number(value: Any, name: str) -> float:
    """A real number (or 0-d array) as a float, for parameters that have no gradient."""
    if is_torch(value) and value.requires_grad:
        raise TypeError(f"{name}: expected a number, got a tensor that requires a gradient, which it does not have")
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError("float() would read the text, and True as 1")
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind == "c":
            raise TypeError("float() would leave out the imaginary part")
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from error


def finite(value: Any, name: str, least: float = -math.inf, *, strict: bool = False) -> float:
    """A finite number, at least (or, strict, more than) `least`."""
    result = number(value, name)
    # Not math.isfinite, which the compiler cannot trace where it takes a default for an input.
    if not -math.inf < result < math.inf or result < least or (strict and result == least):
        wanted = {-math.inf: "a finite"}.get(least, "a positive" if strict else "a non-negative")
        raise ValueError(f"{name}: expected {wanted} number, got {result}")
    return result


def is_installed(package: str) -> bool:
    """Whether a package can be imported; does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # a finder that refuses it
        return False
    except ValueError:  # a module that somebody made
        return True


def is_torch(array: Any) -> bool:
    """Whether this is a torch.Tensor; does not import torch, which another thread may be importing: no tensor yet."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def autograd() -> Any:
    """`nearfar.autograd`, imported when the first tensor arrives.

    Not relative, which takes as long as the launch of a kernel at each call. Nor looked up in `sys.modules`, whose
    content the compiler would make a condition.
    """
    import nearfar.autograd as module

    return module


def is_concrete(array: Array) -> bool:
    """Whether values can be looked at: not while a graph is compiled or a function transformed."""
    if not is_torch(array):
        return True
    import torch

    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def is_at_hand(array: Array) -> bool:
    """The same, and looking waits for no device."""
    return is_concrete(array) and not (is_torch(array) and array.device.type != "cpu")


def laid_bare(array: Array, name: str, why: str) -> Array:
    """A tensor without graph and without what `torch.func.grad` or `jvp` wrap it in, for `outside_transforms`.

    What `vmap` maps over is refused.
    """
    if not is_torch(array):
        return array
    import torch

    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(array):
        array = functorch.get_unwrapped(array)
    if functorch.is_batchedtensor(array):
        raise ValueError(f"{name}: expected values that can be looked at, got what torch.func.vmap maps over: {why}")
    with torch._C._DisableFuncTorch():
        return array.detach()


def outside_transforms(array: Array) -> Any:
    """A context in which tensors are themselves, also while torch.func transforms what is around it."""
    return sys.modules["torch"]._C._DisableFuncTorch() if is_torch(array) else contextlib.nullcontext()


def namespace(array: Array) -> Any:
    """The module of functions for a NumPy or CuPy array."""
    return np if isinstance(array, (np.ndarray, np.generic)) else sys.modules["cupy"]


def empty(like: Array, shape: Sequence[int], dtype: str | None = None, *, zero: bool = False) -> Array:
    """A new C-contiguous array of the kind and device of `like`, in its compute dtype unless told otherwise.

    Of at least one dimension; a number is a `scalar`.
    """
    dtype = dtype or compute_dtype(like)
    if is_torch(like):
        make = like.new_zeros if zero else like.new_empty
        # One by one: torch takes 1.3 us longer to read a tuple, and twice that for a `torch.Size`.
        return make(*shape, dtype=getattr(sys.modules["torch"], dtype))
    make = namespace(like)
    return (make.zeros if zero else make.empty)(tuple(shape), dtype)


def scalar(like: Array, value: Any, dtype: str) -> Array:
    """A number, or a 0-d array on the device of `like`, as a new 0-d array of the kind of `like`."""
    if is_torch(like):
        torch = sys.modules["torch"]
        own = getattr(torch, dtype)
        return value.to(own, copy=True) if is_torch(value) else like.new_full((), value, dtype=own)
    return namespace(like).asarray(value, dtype)


def cast(array: Array, dtype: str) -> Array:
    """The array in another dtype, itself where it has it already."""
    if is_torch(array):
        own = getattr(sys.modules["torch"], dtype)
        return array if array.dtype == own else array.to(own)
    if isinstance(array, np.ndarray):
        return np.asarray(array, dtype)  # nor a subclass: `*` of numpy.matrix is another product
    return array.astype(dtype, copy=False)


def widened(*arrays: Array) -> tuple[Any, ...]:
    """Tensors of a half precision on the CPU in the dtype that computes, any others as they are.

    For who uses one in several places: autograd adds up the gradients of these, and rounds the sum, not each of them.
    A GPU multiplies halves several times as fast, which is worth more there.
    """
    half = (is_torch(array) and array.dtype.itemsize < 4 and array.is_cpu for array in arrays)
    return tuple(cast(array, "float32") if wanted else array for array, wanted in zip(arrays, half, strict=True))


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """The values in memory of NumPy, halves as float32; shared where they can be."""
    if isinstance(array, np.ndarray):
        return cast(array, "float32") if dtype_name(array) in ("float16", "bfloat16") else np.asarray(array)
    if is_torch(array):
        array = array.detach()
        array = cast(array, compute_dtype(array)) if array.is_floating_point() else array
        return np.asarray(array.cpu())
    return np.asarray(array.get())


def of_kind(values: Any, like: Array) -> Array:
    """NumPy values, copied, as an array of the kind and on the device of `like`."""
    if is_torch(like):
        return sys.modules["torch"].from_numpy(np.array(values, order="C")).to(like.device)
    return namespace(like).asarray(values)


def rows_at(array: Array, index: Any) -> Array:
    """``array[index]`` where an index of NumPy goes to the device of the array."""
    return array[of_kind(index, array) if isinstance(index, np.ndarray) else index]


def as_bytes(mask: Array) -> Array:
    """A boolean array seen as uint8, without a copy."""
    return mask.view(sys.modules["torch"].uint8 if is_torch(mask) else np.uint8)


def matrix_product(a: Array, b: Array) -> Array:
    """``a @ b`` in their own dtype, also under autocast, which would round tensors to a half first; gradients too."""
    return autograd().product(a, b) if is_torch(a) else a @ b


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """One behind the other, along the first axis unless another is named."""
    if is_torch(arrays[0]):
        torch, own = sys.modules["torch"], list(arrays)
        if own[0].dtype.itemsize < 4:  # which torch refuses under autocast to the other half precision
            with torch.autocast(own[0].device.type, enabled=False):
                return torch.cat(own, axis)
        return torch.cat(own, axis)
    return namespace(arrays[0]).concatenate(arrays, axis)


def codes_of(labels: Array) -> tuple[np.ndarray[Any, Any], int]:
    """Integer labels as dense int32 codes, and how many there are."""
    values = np.asarray(labels)
    if values.dtype == np.uint64:
        values = values ^ np.uint64(1 << 63)  # as int64 in the same order
    values = np.array(values, np.int64).reshape(-1)
    codes = np.empty(values.size, np.int32)
    return codes, _core.dense_codes(values, codes)  # `np.unique` takes as long as a loss of 64 rows


def batched(array: Array, batch: tuple[int, ...]) -> Array:
    """(..., n, d) broadcast to `batch` and flattened to three dimensions; without a batch as it is."""
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # numpy.matrix keeps its two dimensions whatever one does
    if not batch:
        return array
    shape = (*batch, *array.shape[-2:])
    if array.shape != shape:
        array = array.expand(shape) if is_torch(array) else namespace(array).broadcast_to(array, shape)
    return array.reshape(math.prod(batch), *shape[-2:])


def unbatched(array: Array, batch: tuple[int, ...]) -> Array:
    """The first dimension of what was made of `batched` arrays as `batch` again."""
    return array.reshape(*batch, *array.shape[1:]) if batch else array


def common_center(x: Array) -> Array:
    """A point (d,) amid (..., n, d): the mean of the finite entries, the others counted as 0; no gradient."""
    dtype = compute_dtype(x)
    if is_torch(x):
        torch = sys.modules["torch"]
        flat = torch.nan_to_num(x.detach().reshape(-1, x.shape[-1]), nan=0.0, posinf=0.0, neginf=0.0)
        return cast(flat.sum(0, dtype=torch.float64) / max(flat.shape[0], 1), dtype)
    make = namespace(x)
    flat = make.where(make.isfinite(x), x, 0).reshape(-1, x.shape[-1])
    return cast(flat.sum(0, dtype=np.float64) / max(flat.shape[0], 1), dtype)


def unit_rows(x: Array) -> Array:
    """NumPy rows of unit norm, scaled by their largest entry first; a zero row stays zero."""
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest > 0, largest, np.ones_like(largest))
    square = (x * x).sum(-1, keepdims=True)
    rows: Array = x / np.sqrt(np.where(square > 0, square, np.ones_like(square)))
    return rows
