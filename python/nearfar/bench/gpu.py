"""``python -m nearfar bench --device cuda``: every operation on the GPU against torch and the libraries for it.

Times are medians between CUDA events, after a warm-up, the L2 cache flushed before every call. Speed is counted in the
fewest flops that the operation can do, and set against the bfloat16 matrix-product rate measured in the same run.
Memory is what torch's allocator peaks at above what was there before the call. Errors are the largest relative one of
value and gradients, in norm, against eager torch in float64 at about 1024 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import nearfar as nf

from .. import backend
from . import gpu_peers as peers
from .case import load
from .cases.kernels import lengthscale
from .gpu_peers import Compute

Step = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Line:
    """One operation at one size; sizes are (rows, columns, depth)."""

    name: str
    dtype: str
    size: tuple[int, int, int]
    units: float  # floor: matrix products of this size
    ours: Compute
    dense: Compute
    chunked: Compute | None = None
    libraries: Mapping[str, Compute] = field(default_factory=dict)  # by their names in `peers.LIBRARIES`
    gradients: int = 2  # the first so many sets get one
    search: bool = False  # the second set is searched; a tie may be decided otherwise, so no error in norm
    compiled: bool = False  # also against torch.compile, which takes half a minute

    @property
    def flops(self) -> float:
        """The fewest that the operation can do."""
        n, m, d = self.size
        return self.units * 2 * n * m * d


def lines(quick: bool) -> list[Line]:
    """What is measured, in order of importance."""
    n, middle, many, rows, centroids = (96, 64, 128, 256, 32) if quick else (32768, 8192, 65536, 10**6, 1024)
    wide, deep, points = (48, 64, 128) if quick else (768, 512, 200000)
    info_nce = (nf.info_nce_loss, peers.info_nce, peers.info_nce_chunked, {"Inf-CL": peers.info_nce_inf_cl})
    assign = (lambda x, y: nf.kmeans_assign(x, y)[0], peers.assign)

    def matmul(kernel: Any) -> Compute:
        return lambda x, y: kernel(lengthscale(x.shape[1])).matmul(x, y, y[:, :1])

    return [
        Line("info_nce", "bfloat16", (n, n, deep), 3, *info_nce),
        Line("info_nce", "bfloat16", (n, n, deep // 2), 3, *info_nce),
        Line("clip", "bfloat16", (n, n, wide), 4, lambda x, y: nf.clip_loss(x, y), peers.clip,
             libraries={"Inf-CL": peers.clip_inf_cl}, compiled=True),
        Line("nt_xent", "bfloat16", (n, n, deep // 2), 2, lambda x, y: nf.nt_xent_loss(*x.chunk(2)),
             lambda x, y: peers.nt_xent(*x.chunk(2))),
        Line("siglip", "bfloat16", (n, n, deep // 2), 3, nf.siglip_loss, peers.siglip),
        Line("sup_con", "bfloat16", (n, n, deep // 2), 2, lambda x, y: nf.sup_con_loss(x, peers.classes(x)),
             peers.sup_con),
        Line("uniformity", "bfloat16", (n, n, deep // 2), 1.5, lambda x, y: nf.uniformity(x), peers.uniformity),
        # Keys without a gradient: those of the batch, then a queue.
        Line("info_nce_queue", "bfloat16", (n, many, deep // 2), 2,
             lambda x, y: nf.info_nce_loss(x, y[: len(x)], y[len(x) :], in_batch=True), *info_nce[1:], gradients=1),
        Line("info_nce", "float32", (middle, middle, 128), 3, *info_nce),
        Line("info_nce", "bfloat16", (min(n, 256), min(n, 256), 128), 3, *info_nce),
        Line("cdist", "float32", (middle, middle, 128), 1, nf.cdist, lambda x, y: load("torch").cdist(x, y),
             gradients=0),
        Line("cdist_cityblock", "float32", (middle, middle, 128), 1, lambda x, y: nf.cdist(x, y, "cityblock"),
             lambda x, y: load("torch").cdist(x, y, p=1.0), gradients=0),
        Line("gaussian_matmul", "float32", (points, points, 64), 1, matmul(nf.kernels.Gaussian), peers.gaussian,
             libraries={"KeOps": peers.keops_matmul("gaussian")}, gradients=0),
        Line("matern_matmul", "float32", (points, points, 64), 1, matmul(nf.kernels.Matern), peers.matern,
             libraries={"KeOps": peers.keops_matmul("matern")}, gradients=0),
        Line("kmeans_assign", "float32", (rows, centroids, 128), 1, *assign,
             libraries={"KeOps": peers.assign_keops, "flash-kmeans": peers.assign_flash}, gradients=0, search=True),
        Line("kmeans_assign", "bfloat16", (rows, centroids, 128), 1, *assign,
             libraries={"flash-kmeans": peers.assign_flash}, gradients=0, search=True),
        Line("kmeans", "float32", (rows, centroids, 128), peers.ITERATIONS + 1,
             lambda x, y: nf.KMeans(len(y), init=y, max_iter=peers.ITERATIONS, tol=0).fit(x).cluster_centers_,
             peers.lloyd, libraries={"flash-kmeans": peers.lloyd_flash}, gradients=0, search=True),
        Line("knn", "float32", (middle, many, 128), 1, lambda x, y: nf.knn(x, y, peers.NEIGHBORS)[1], peers.nearest,
             libraries={"KeOps": peers.nearest_keops, "cuVS": peers.nearest_cuvs}, gradients=0, search=True),
    ]  # fmt: skip


# ---- measuring -------------------------------------------------------------------------------------------------------


def make(line: Line, device: str, size: tuple[int, int, int] | None = None) -> list[Any]:
    """The two sets of a line: the second begins with other views of the first's rows, unless it is searched."""
    torch = load("torch")
    n, m, d = size or line.size
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, device=device, generator=generator)
    y = torch.randn(m, d, device=device, generator=generator)
    if not line.search:
        y[:n] += x
    elif m < n:  # centroids are points, as k-means starts: none begins empty
        y = x[:m].clone()
    dtype = getattr(torch, line.dtype)
    return [z.to(dtype).requires_grad_(k < line.gradients) for k, z in enumerate((x, y))]


def step_of(compute: Compute, line: Line, sets: list[Any]) -> Step:
    """One call, forward and backward where there are gradients; returns value and gradients."""
    torch, leaves = load("torch"), sets[: line.gradients]

    def step() -> tuple[Any, ...]:
        value = compute(*sets)
        return (value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)) if leaves else (value,)

    return step


def seconds_of(step: Callable[[], Any], device: str, budget: float) -> float:
    """The median of calls for about `budget` seconds, at least five."""
    torch = load("torch")
    for _ in range(3):
        step()
    samples: list[float] = []
    if device == "cpu":  # emulation: whether everything runs, not how fast
        for _ in range(3):
            begin = time.perf_counter()
            step()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - begin < budget and len(samples) < 200):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        result = step()
        stop.record()
        stop.synchronize()
        del result
        samples.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(samples)


def extra_bytes(step: Step, device: str) -> int | None:
    """The allocator's peak during a call above what was there before; None where there is no such allocator."""
    torch = load("torch")
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def matrix_product_rate(device: str, budget: float, size: int) -> float:
    """FLOP/s of torch's bfloat16 matrix product."""
    torch = load("torch")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return float(2 * size**3 / seconds_of(lambda: a @ a, device, budget))


class Accuracy:
    """Errors of a line relative to float64, at about 1024 rows."""

    def __init__(self, line: Line, device: str) -> None:
        n, m, d = line.size
        part = max(1, n // 1024)
        self.line = line
        self.sets = make(line, device, (n // part, m // part, d))
        wide = [z.detach().cpu().double().requires_grad_(z.requires_grad) for z in self.sets]
        self.wanted = step_of(line.dense, line, wide)()

    def error(self, compute: Compute) -> float:
        """The largest of value and gradients."""
        got = step_of(compute, self.line, self.sets)()
        pairs = ((a.cpu().double(), b) for a, b in zip(got, self.wanted, strict=True) if a is not None)
        return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def peers_of(line: Line, compiled: bool) -> dict[str, Compute]:
    """torch as it stands, compiled, and in chunks; the libraries that are installed."""
    found = {"eager": line.dense}
    if line.compiled and compiled:
        found["compiled"] = load("torch").compile(line.dense)
    if line.chunked is not None:
        found["chunked"] = line.chunked
    return found | {name: compute for name, compute in line.libraries.items() if peers.installed(name)}


def measure(line: Line, device: str, budget: float, rate: float, compiled: bool) -> dict[str, Any]:
    """Everything of one line; a peer's failure is a finding, not the end of the run."""
    sets = make(line, device)
    accuracy = None if line.search else Accuracy(line, device)

    def measured(name: str, compute: Compute) -> dict[str, Any]:
        step = step_of(compute, line, sets)
        return {
            "seconds": seconds_of(step, device, budget),
            "extra_bytes": None if name in peers.OWN_ALLOCATOR else extra_bytes(step, device),
            # Of what is compiled it is that of eager torch, and another size would be compiled again.
            "error": None if accuracy is None or name == "compiled" else accuracy.error(compute),
        }

    result: dict[str, Any] = {
        "name": line.name, "dtype": line.dtype, "size": list(line.size), **measured("ours", line.ours), "peers": {},
    }  # fmt: skip
    result["flops_per_second"] = line.flops / result["seconds"]
    result["of_matrix_product"] = result["flops_per_second"] / rate
    for name, compute in peers_of(line, compiled).items():
        try:
            result["peers"][name] = measured(name, compute)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            result["peers"][name] = {"seconds": None, "extra_bytes": None, "error": None, "failed": message}
    return result


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    size = " x ".join(map(str, result["size"]))
    memory = "" if result["extra_bytes"] is None else f"{result['extra_bytes'] / 2**20:9.1f} MiB"
    error = "" if result["error"] is None else f"  error {result['error']:.1e}"
    text = (
        f"{result['name']:16s} {result['dtype']:9s} {size:22s} {result['seconds'] * 1e3:10.3f} ms "
        f"{result['flops_per_second'] / 1e12:7.1f} TFLOP/s {result['of_matrix_product']:6.1%}{memory}{error}"
    )
    for name, peer in result["peers"].items():
        text += f"\n{'':18s}{name}: "
        if "failed" in peer:
            text += peer["failed"]
            continue
        text += f"{peer['seconds'] / result['seconds']:.2f}x our time"
        text += "" if peer["extra_bytes"] is None else f", {peer['extra_bytes'] / 2**20:.1f} MiB"
        text += "" if peer["error"] is None else f", error {peer['error']:.1e}"
    return text


def run(args: argparse.Namespace) -> int:
    """The benchmark from parsed options; the exit status."""
    import fnmatch

    try:
        torch = load("torch")
    except ModuleNotFoundError:
        print("nearfar bench: --device cuda needs torch: pip install 'nearfar[torch]'", file=sys.stderr)
        return 2
    if not backend.emulate and (nf.build_info()["cuda"] is None or not torch.cuda.is_available()):
        print("nearfar bench: --device cuda needs a GPU and a build with CUDA", file=sys.stderr)
        return 2
    device = "cpu" if backend.emulate else "cuda"
    wanted = (args.ops or "*").split(",")
    chosen = [line for line in lines(args.quick) if any(fnmatch.fnmatch(line.name, pattern) for pattern in wanted)]
    if not chosen:
        print(f"nearfar bench: ops: no operation matches {args.ops!r}", file=sys.stderr)
        return 2
    if args.dtype:
        chosen = [replace(line, dtype=args.dtype) if line.dtype == "bfloat16" else line for line in chosen]
    budget = args.budget if args.budget is not None else 0.2 if args.quick else 1.0
    rate = matrix_product_rate(device, budget, 64 if args.quick else 8192)
    name = "emulation on the CPU: these are no speeds" if backend.emulate else torch.cuda.get_device_name()
    missing = [library for library in peers.LIBRARIES if not peers.installed(library)]
    print(
        f"{name}; torch {torch.__version__}; bfloat16 matrix product {rate / 1e12:.1f} TFLOP/s"
        + (f"; not installed: {', '.join(missing)}" if missing else ""),
        flush=True,
    )
    results = []
    for line in chosen:
        try:
            results.append(measure(line, device, budget, rate, compiled=not args.quick))
            print(row(results[-1]), flush=True)
        except Exception as error:
            print(f"{line.name} {line.dtype} {line.size}: {type(error).__name__}: {error}", flush=True)
            results.append({"name": line.name, "size": list(line.size), "failed": str(error)})
    if args.json is not None:
        args.json.write_text(json.dumps({"device": name, "matrix_product": rate, "results": results}, indent=1) + "\n")
    return int(any("failed" in result for result in results))
