"""Time over the number of points: ours and every peer, as far as memory and patience reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import measure, memory
from .case import Case, Problem, Shape, Step

MOST_BYTES = 4 << 30  # that a peer may take during a call
MOST_SECONDS = 3.0  # that a call of a peer may take

Line = dict[str, Any]


def shapes(case: Case, *, quick: bool = False) -> list[Shape]:
    """The sizes of a case's sweep: its first shape with other n; two small ones for `--quick`."""
    shape = case.quick if quick else case.shapes[0]
    sizes = (shape["n"] // 2, shape["n"]) if quick else case.sweep
    return [{**shape, "n": n} for n in sizes] if case.sweep else []


def run(case: Case, sizes: list[Shape], threads: int, budget: float) -> dict[str, Any]:
    """Time everybody at every size, in turns.

    A peer is left out, with a note, from the size on at which its last one says that it would take more than
    `MOST_BYTES` or `MOST_SECONDS`: both grow no faster than the flops of the floor do.

    Parameters
    ----------
    case : Case
    sizes : list of Shape
        Rising.
    threads : int
        For everybody.
    budget : float
        Seconds for each size; at least three calls of everybody are made.

    Returns
    -------
    dict
        case, what, and points: shape, floor_flops and lines, which hold status, detail, seconds and extra_bytes by
        name, ours as `memory.OURS`.
    """
    points: list[dict[str, Any]] = []
    for shape in sizes:
        before = points[-1] if points else None
        points.append(_point(case, shape, before, threads, budget))
    return {"case": case.name, "what": case.what, "points": points}


def _point(case: Case, shape: Shape, before: dict[str, Any] | None, threads: int, budget: float) -> dict[str, Any]:
    problem, flops = case.problem(shape), case.flops(shape)
    steps: dict[str, Step] = {}
    lines: dict[str, Line] = {}
    for name, build in {memory.OURS: case.ours, **case.peers}.items():
        lines[name] = {"status": "ok", "detail": None, "seconds": None, "extra_bytes": None}
        if before is not None:
            lines[name].update(_verdict(name, before["lines"][name], flops / before["floor_flops"]))
        if lines[name]["status"] != "ok":
            continue
        try:
            steps[name] = _first_call(build, problem, threads, lines[name])
        except Exception as error:  # a peer's failure is a finding, not the end of the run
            if name == memory.OURS:
                raise
            missing = isinstance(error, ModuleNotFoundError)
            lines[name]["status"] = "not installed" if missing else "failed"
            lines[name]["detail"] = None if missing else f"{type(error).__name__}: {error}"
    with measure.thread_limit(threads):
        for name, times in measure.in_turns(steps, budget).items():
            lines[name]["seconds"] = times.to_dict()
    return {"shape": shape, "floor_flops": flops, "lines": lines}


def _verdict(name: str, last: Line, growth: float) -> Line:
    """Whether somebody goes on: status and detail."""
    if last["status"] != "ok" or name == memory.OURS:
        return {"status": last["status"], "detail": last["detail"]}
    size, seconds = growth * last["extra_bytes"], growth * last["seconds"]["min"]
    if size > MOST_BYTES:
        return {"status": "left out", "detail": f"would take {size / 2**30:.0f} GiB"}
    if seconds > MOST_SECONDS:
        return {"status": "left out", "detail": f"would take {seconds:.0f} s"}
    return {"status": "ok", "detail": None}


def _first_call(build: Callable[[Problem], Step], problem: Problem, threads: int, line: Line) -> Step:
    """Make the step and call it once: not timed, but it says what memory a call takes."""
    step = build(problem)
    with measure.thread_limit(threads):
        begin = memory.start_peak()
        result = step()
        line["extra_bytes"] = max(0, memory.peak() - begin)
        del result
    return step
