"""Threads and build information."""

from __future__ import annotations

import os
import sys
from typing import Any

from . import _core
from .arrays import integer

_num_threads: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that nearfar uses on the CPU.

    Results do not depend on it: they are bitwise the same for every number of threads.

    Parameters
    ----------
    n : int or None
        At least 1; None goes back to the default of `get_num_threads`.

    Examples
    --------
    >>> import nearfar as nf
    >>> nf.set_num_threads(1)
    >>> nf.get_num_threads()
    1
    >>> nf.set_num_threads(None)
    """
    global _num_threads
    if n is not None:
        n = integer(n, "n")
        if n < 1:
            raise ValueError(f"n: expected a positive integer or None, got {n}")
    _num_threads = n


def get_num_threads() -> int:
    """The number of threads that nearfar uses on the CPU.

    What `set_num_threads` said; else ``torch.get_num_threads()`` if torch is imported; else the environment variable
    OMP_NUM_THREADS; else what the affinity mask and the cgroup quota of the process allow.

    Examples
    --------
    >>> import nearfar as nf
    >>> nf.get_num_threads() >= 1
    True
    """
    if _num_threads is not None:
        return _num_threads
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    return int(_core.build_info()["available_cpus"])


def build_info() -> dict[str, Any]:
    """Version, instruction set, compiler and CUDA of this build.

    Returns
    -------
    dict
        version, isa (the level in use: v2, v3, v4, v4_vnni, v4_bf16 on x86-64, else generic; the variable NEARFAR_ISA
        overrides the choice before import), vector_bytes, threads, available_cpus, compiler, debug, cuda (the toolkit
        the CUDA part was compiled with, or None), cuda_devices (0 without a driver).

    Examples
    --------
    >>> import nearfar as nf
    >>> sorted(nf.build_info())[:3]
    ['available_cpus', 'compiler', 'cuda']
    """
    from . import __version__

    return {"version": __version__, "threads": get_num_threads(), **_core.build_info()}
