"""Timing in pairs, under one number of threads for everybody."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nearfar as nf

from .case import Step, load

LEAST_PAIRS = 3
MOST_PAIRS = 200


@dataclass(frozen=True)
class Times:
    """Seconds of every call."""

    samples: list[float]

    @property
    def median(self) -> float:
        """What ratios are made of."""
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        """What an undisturbed machine would give."""
        return min(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"median": self.median, "min": self.least, "samples": self.samples}


def paired(ours: Step, peer: Step, budget: float) -> tuple[Times, Times]:
    """Time ours, peer, ours, peer, ... for about `budget` seconds, after one call of each."""
    ours()
    peer()
    times = in_turns({"ours": ours, "peer": peer}, budget)
    return times["ours"], times["peer"]


def in_turns(steps: Mapping[str, Step], budget: float) -> dict[str, Times]:
    """Time steps one after the other, round by round, for about `budget` seconds.

    Interleaving makes a busy neighbour or a falling clock hit all alike. They leave caches as they leave them; the
    order changes from round to round.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    begin = time.perf_counter()
    # A garbage collection in the middle of a call would be charged to whoever runs.
    gc.collect()
    gc.disable()
    try:
        for done in range(1, MOST_PAIRS + 1):
            for name in order:
                samples[name].append(_seconds(steps[name]))
            order.reverse()
            if done >= LEAST_PAIRS and time.perf_counter() - begin > budget:
                break
    finally:
        gc.enable()
    return {name: Times(taken) for name, taken in samples.items()}


def alone(step: Step, budget: float) -> Times:
    """Time a step that has no peer installed."""
    return paired(step, lambda: (), budget)[0]


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - begin
    del result  # not in the time: a caller keeps it
    return seconds


@contextlib.contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """The same number of threads for nearfar and for every library that is imported by now."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ModuleNotFoundError):
            stack.enter_context(load("threadpoolctl").threadpool_limits(threads))
        torch, faiss = sys.modules.get("torch"), sys.modules.get("faiss")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        if faiss is not None:
            stack.callback(faiss.omp_set_num_threads, faiss.omp_get_max_threads())
            faiss.omp_set_num_threads(threads)
        stack.callback(nf.set_num_threads, None)
        nf.set_num_threads(threads)
        yield
