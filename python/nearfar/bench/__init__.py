"""``python -m nearfar bench``: every operation against what else is installed, paired in one run.

Ratios are of medians of interleaved calls, with the same number of threads; speed is counted in the fewest flops that
the operation can do and set against the multiply-add peak measured in the same run; errors are against float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import nearfar as nf

from ..cli import picture_file
from . import gpu, machine, measure, memory, report, sweep
from .case import Case, Shape, label, load
from .cases import CASES, select

__all__ = ["CASES", "add_arguments", "add_sweeps", "benchmark", "main", "run"]

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), help="of the lines with 16 bits on the GPU (default: bfloat16)"
    )
    parser.add_argument("--ops", metavar="A,B", help="only these operations; shell patterns (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether everything runs, not how fast")
    parser.add_argument("--threads", type=int, metavar="N", help="threads for everybody (default: nearfar's)")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for each pair (default: 4; quick: 0.2)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory (a process for each call)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE", help="draw ratios, and time over n (needs matplotlib)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from a command line; the exit status."""
    parser = argparse.ArgumentParser(prog="nearfar bench", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark from parsed options; the exit status."""
    if args.device == "cuda":
        for option, given in (("--threads", args.threads), ("--no-memory", args.no_memory), ("--plot", args.plot)):
            if given:
                print(f"nearfar bench: {option}: only on the CPU", file=sys.stderr)
                return 2
        return gpu.run(args)
    if args.dtype:
        print("nearfar bench: --dtype: only with --device cuda", file=sys.stderr)
        return 2
    try:
        cases = select(args.ops)
        if args.threads is not None and args.threads < 1:
            raise ValueError(f"threads: expected a positive number, got {args.threads}")
    except ValueError as error:
        print(f"nearfar bench: {error}", file=sys.stderr)
        return 2
    if args.plot is not None:
        load("matplotlib")  # where it is missing, say so before the work
    threads = nf.get_num_threads() if args.threads is None else args.threads
    budget = args.budget if args.budget is not None else 0.2 if args.quick else 4.0
    # The quick sizes are those that memory is warmed up with: nothing would be left to measure.
    result = benchmark(cases, threads, budget, quick=args.quick, with_memory=not (args.no_memory or args.quick))
    if args.plot is not None:
        add_sweeps(result, cases, threads, budget / 4)
    print(report.table(result), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        report.plot(result, args.plot)
    return 0


def benchmark(
    cases: list[Case], threads: int, budget: float, *, quick: bool = False, with_memory: bool = True
) -> dict[str, Any]:
    """Measure cases; what `--json` writes.

    Parameters
    ----------
    cases : list of Case
    threads : int
        For everybody.
    budget : float
        Seconds for each pair of ours and one peer; at least three pairs of calls are made.
    quick : bool
        The cases' quick sizes.
    with_memory : bool
        Measure peak memory of ours and of the first peer.

    Returns
    -------
    dict
        schema, machine, options, rates (FMA peak and write rates) and results: one for each case and size.
    """
    work = [(case, shape) for case in cases for shape in ((case.quick,) if quick else case.shapes)]
    peaks, writes = [machine.fma_peak(threads)], machine.write_rates(threads)
    results = []
    for done, (case, shape) in enumerate(work, 1):
        print(f"[{done}/{len(work)}] {case.name} {label(shape)}", file=sys.stderr, flush=True)
        others = machine.Others()
        results.append(_measure(case, shape, threads, budget, with_memory))
        results[-1]["others_processors"] = others.processors()
        peaks.append(machine.fma_peak(threads))
    again = machine.write_rates(threads)
    rates = {
        "fma_gflops": max(peaks),
        "fma_gflops_samples": peaks,
        "write_gbs": {pages: max(rate, again[pages]) for pages, rate in writes.items()},
    }
    for result in results:
        _rate(result, rates)
    return {
        "schema": SCHEMA,
        "machine": machine.describe(threads),
        "options": {"budget": budget, "quick": quick, "device": "cpu"},
        "rates": rates,
        "results": results,
    }


def add_sweeps(result: dict[str, Any], cases: list[Case], threads: int, budget: float) -> None:
    """Add ``sweeps`` to what `benchmark` returned: time over n for the cases that have one (`sweep.run`)."""
    result["sweeps"] = []
    for case in cases:
        sizes = sweep.shapes(case, quick=result["options"]["quick"])
        if not sizes:
            continue
        print(f"[over n] {case.name}", file=sys.stderr, flush=True)
        others = machine.Others()
        result["sweeps"].append(sweep.run(case, sizes, threads, budget))
        result["sweeps"][-1]["others_processors"] = others.processors()


def _measure(case: Case, shape: Shape, threads: int, budget: float, with_memory: bool) -> dict[str, Any]:
    """One case at one size: ours and every peer."""
    ours: dict[str, Any] = {"seconds": None, "error": None, "extra_bytes": None}
    result: dict[str, Any] = {
        "case": case.name,
        "what": case.what,
        "shape": shape,
        "floor_flops": case.flops(shape),
        "written_bytes": case.writes(shape) if case.writes is not None else None,
        "ours": ours,
        "peers": [],
    }
    if case.timed:
        _time(case, shape, threads, budget, result)
    else:
        result["peers"] = [_peer(name) for name in case.peers]
    if with_memory:
        ours["extra_bytes"] = memory.extra_bytes(case, shape, memory.OURS, threads)
        if result["peers"] and result["peers"][0]["status"] == "ok":
            _try_memory(result["peers"][0], case, shape, threads)
    return result


def _peer(name: str) -> dict[str, Any]:
    keys = ("seconds", "ours_seconds", "ratio", "error", "extra_bytes")
    return {"name": name, "status": "ok", "detail": None, **dict.fromkeys(keys)}


def _time(case: Case, shape: Shape, threads: int, budget: float, result: dict[str, Any]) -> None:
    """Fill in times and errors. Ours must work; a peer that does not is reported and left out."""
    problem, ours = case.problem(shape), result["ours"]
    reference = case.reference(problem)
    own = case.ours(problem)
    samples: list[float] = []
    with measure.thread_limit(threads):
        ours["error"] = case.error(problem, own(), reference)
    for name, build in case.peers.items():
        peer = _peer(name)
        result["peers"].append(peer)
        try:
            step = build(problem)
            with measure.thread_limit(threads):
                peer["error"] = case.error(problem, step(), reference)
                mine, theirs = measure.paired(own, step, budget)
        except ModuleNotFoundError:
            peer["status"] = "not installed"
            continue
        except Exception as error:  # a peer's failure is a finding, not the end of the run
            peer["status"], peer["detail"] = "failed", f"{type(error).__name__}: {error}"
            continue
        peer["seconds"], peer["ours_seconds"] = theirs.to_dict(), mine.to_dict()
        peer["ratio"] = theirs.median / mine.median
        samples += mine.samples
    if not samples:
        with measure.thread_limit(threads):
            samples = measure.alone(own, budget).samples
    ours["seconds"] = measure.Times(samples).to_dict()


def _try_memory(peer: dict[str, Any], case: Case, shape: Shape, threads: int) -> None:
    try:
        peer["extra_bytes"] = memory.extra_bytes(case, shape, peer["name"], threads)
    except RuntimeError as error:
        peer["detail"] = str(error)


def _rate(result: dict[str, Any], rates: dict[str, Any]) -> None:
    """Speed from times, against the best rates seen in the run: noise makes fractions smaller, not larger."""
    ours, seconds = result["ours"], result["ours"]["seconds"]
    ours.update(gflops=None, of_peak=None, of_write=None)
    if seconds is None:
        return
    ours["gflops"] = result["floor_flops"] / seconds["median"] / 1e9
    ours["of_peak"] = ours["gflops"] / rates["fma_gflops"]
    if result["written_bytes"] is not None:
        ours["of_write"] = result["written_bytes"] / seconds["median"] / 1e9 / max(rates["write_gbs"].values())
