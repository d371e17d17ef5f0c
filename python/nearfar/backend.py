"""Whose kernels an array goes to, the CPU's or the GPU's: the one place where the device decides.

Kernels of the GPU run on the current stream of the caller's library, use memory that this library allocates, and never
wait: sums come back as arrays on the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from . import _core
from .arrays import Array, device_name, empty, is_torch
from .runtime import get_num_threads

# About the most that the weights of a strip of pairs take on the GPU.
STRIP_BYTES = 256 << 20

# A developer's build (NEARFAR_CUDA=EMULATE) runs the GPU's kernels on the CPU, a thousand times slower. Not for users.
emulate = os.environ.get("NEARFAR_EMULATE", "") == "1"

# Numbers that an operation returns.
_SUMS = {
    "softmax": 2,
    "softmax_block": 1,
    "sup_con": 3,
    "triplet": 2,
    "sigmoid": 3,
    "labelled_lse": 1,
    "potential": 1,
    "alignment": 1,
    "lloyd": 2,
}


def on_cuda(array: Any) -> bool:
    """Whether the GPU's kernels compute on this array; a number is on no device."""
    if emulate:
        return hasattr(array, "__dlpack__") and hasattr(array, "ndim") and not hasattr(array, "is_integer")
    if is_torch(array):
        return not array.is_cpu
    return hasattr(array, "device") and device_name(array) != "cpu"


def _stream(like: Array) -> int:
    if emulate:
        return 0
    if is_torch(like):
        return int(sys.modules["torch"].cuda.current_stream(like.device).cuda_stream)
    return int(sys.modules["cupy"].cuda.get_current_stream().ptr)


def _exact() -> bool:
    """float32 products keep float32 accuracy unless torch has been told otherwise; then they run as tf32."""
    torch = sys.modules.get("torch")
    return torch is None or torch.get_float32_matmul_precision() == "highest"


def kernel(like: Array, name: str) -> Callable[..., Any]:
    """The compiled operation of this name for the device of `like`; its last argument, where it runs, is filled in."""
    if not on_cuda(like):
        on_cpu = getattr(_core, name)
        return lambda *args: on_cpu(*args, get_num_threads())
    cuda = getattr(_core, "cuda", None)
    if cuda is None:
        raise NotImplementedError(
            f"{name}: the arrays are on {device_name(like)}, but this build has no CUDA part; "
            "build it with nvcc on PATH and NEARFAR_CUDA=ON"
        )
    if emulate != cuda.emulated:
        raise RuntimeError("NEARFAR_EMULATE=1 goes with a build of NEARFAR_CUDA=EMULATE, and only with it")
    on_gpu = getattr(cuda, name, None)
    if on_gpu is None:
        raise NotImplementedError(f"{name}: not implemented on CUDA; pass arrays on the CPU")
    where = (_stream(like), _exact(), STRIP_BYTES, lambda size: empty(like, (-(-size // 8),), "int64"))
    if name not in _SUMS:
        return lambda *args: on_gpu(*args, where)

    def with_sums(*args: Any) -> Any:
        sums = empty(like, (_SUMS[name],), "float64")
        on_gpu(*args, sums, where)
        return sums[0] if _SUMS[name] == 1 else tuple(sums[k] for k in range(_SUMS[name]))

    return with_sums
