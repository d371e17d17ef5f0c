"""The machine of a run: what it is, and the two rates that a kernel cannot exceed, measured in this process."""

from __future__ import annotations

import datetime
import importlib.metadata
import mmap
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import nearfar as nf

from .case import Array

_PACKAGES = ("numpy", "torch", "scikit-learn", "scipy", "faiss-cpu", "pykeops", "threadpoolctl")
_WRITTEN = 64 << 20  # the result of a 4096 x 4096 float32 matrix


def describe(threads: int) -> dict[str, Any]:
    """Processor, instruction set, threads, versions and date."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "system": platform.platform(),
        "threads": threads,
        "nearfar": nf.build_info(),
        "versions": versions,
        "cxxflags": os.environ.get("CXXFLAGS"),  # peers that compile their kernels when called take them from there
    }


def cpu_model() -> str:
    """The processor by name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def fma_peak(threads: int) -> float:
    """Float32 GFLOP/s of independent fused multiply-adds in registers, the best of a few short runs."""
    from .. import _core

    return max(float(_core.fma_peak(threads)) for _ in range(3))


def write_rates(threads: int) -> dict[str, float]:
    """GB/s at which threads fill fresh memory: what a function that returns a new matrix can reach at best.

    "huge" pages are what NumPy asks of the system for large arrays, "plain" ones what torch gets. Fresh pages are
    zeroed by the kernel before they are written, so both rates are far below that of memory already in use.
    """
    with ThreadPoolExecutor(threads) as pool:
        return {
            "huge": _write_rate(pool, threads, lambda: np.empty(_WRITTEN // 4, np.float32)),
            "plain": _write_rate(pool, threads, _plain_pages),
        }


class Others:
    """How many processors other processes keep busy, since this object was made.

    On a busy machine a library whose threads spin at barriers is slowed by far more than one whose threads sleep:
    ratios taken there say nothing.
    """

    def __init__(self) -> None:
        self._begin = self._read()

    def processors(self) -> float | None:
        """Their number, None where the system does not say."""
        begin, end = self._begin, self._read()
        if begin is None or end is None or end[0] <= begin[0]:
            return None
        return max(0.0, (end[1] - begin[1]) / (end[0] - begin[0]))

    @staticmethod
    def _read() -> tuple[float, float] | None:
        """The time, and the processor time of everybody else (stolen by the host included)."""
        try:
            with open("/proc/stat", encoding="ascii") as lines:
                ticks = [int(field) for field in lines.readline().split()[1:9]]
        except OSError:
            return None
        busy = sum(ticks) - ticks[3] - ticks[4]  # neither idle nor waiting for a disk
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _plain_pages() -> Array:
    return np.frombuffer(mmap.mmap(-1, _WRITTEN, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float32)


def _write_rate(pool: ThreadPoolExecutor, threads: int, make: Callable[[], Array]) -> float:
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        parts = np.array_split(make(), threads)
        list(pool.map(lambda part: part.fill(1), parts))
        seconds.append(time.perf_counter() - begin)
        del parts
    return _WRITTEN / min(seconds) / 1e9
