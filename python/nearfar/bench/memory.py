"""Peak extra memory of one call, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .case import Case, Shape

OURS = "nearfar"


def extra_bytes(case: Case, shape: Shape, who: str, threads: int) -> int:
    """How far the resident memory of a fresh process rises during one call, results included.

    The process has already imported everything and made one call of the quick size, so that libraries, threads and
    their buffers are not counted; the arguments are there before.

    Parameters
    ----------
    case : Case
    shape : Shape
    who : str
        "nearfar" or the name of a peer.
    threads : int

    Raises
    ------
    RuntimeError
        If the process fails or is killed; the message ends with what it last said.
    """
    job = json.dumps({"case": case.name, "shape": shape, "who": who, "threads": threads})
    code = "import sys; from nearfar.bench.memory import child; child(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, job], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"memory of {who}: exit status {done.returncode}: {reason}")
    return int(done.stdout.strip().splitlines()[-1])


def child(job: str) -> None:
    """What the fresh process does: print the bytes."""
    from .cases import CASES
    from .measure import thread_limit

    wanted: dict[str, Any] = json.loads(job)
    case = next(case for case in CASES if case.name == wanted["case"])
    build = case.ours if wanted["who"] == OURS else case.peers[wanted["who"]]
    warm_up = build(case.problem(case.quick))
    step = build(case.problem(wanted["shape"]))
    with thread_limit(wanted["threads"]):
        warm_up()
        before = start_peak()
        result = step()
        print(peak() - before)
        del result


def start_peak() -> int:
    """Begin a new peak; what is resident now."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
        return _status("VmRSS")
    except OSError:  # not Linux: the peak so far, so that what is reported is a lower bound
        return peak()


def peak() -> int:
    """The most bytes that were resident since `start_peak`."""
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
