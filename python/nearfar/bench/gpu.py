"""``python -m nearfar bench --device cuda``: every operation on the GPU against what people write in torch.

Times are medians between CUDA events, after a warm-up, the L2 cache flushed before every call. Speed is counted in the
fewest flops that the operation can do, and set against the bfloat16 matrix-product rate measured in the same run.
Memory is what torch's allocator peaks at above what was there before the call. Errors are the largest relative one of
value and gradients, in norm, against float64 at 1024 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import nearfar as nf

from .. import backend
from .case import load

Step = Callable[[], Any]
Loss = Callable[..., Any]

CHUNK = 512  # rows at a time of the chunked peers
ITERATIONS = 5  # of k-means


@dataclass(frozen=True)
class Line:
    """One operation at one size; sizes are (rows, columns, depth)."""

    name: str
    dtype: str
    size: tuple[int, int, int]
    units: float  # floor: matrix products of this size
    ours: Loss
    dense: Loss | None
    chunked: Loss | None = None
    gradient: bool = True
    paired: bool = True  # the second set is another view of the first
    compiled: bool = False  # also against torch.compile, which takes half a minute

    @property
    def flops(self) -> float:
        """The fewest that the operation can do."""
        n, m, d = self.size
        return self.units * 2 * n * m * d


# ---- peers -----------------------------------------------------------------------------------------------------------


def _unit(x: Any) -> Any:
    return load("torch.nn.functional").normalize(x, dim=1)


def _info_nce(x: Any, y: Any) -> Any:
    torch, functional = load("torch"), load("torch.nn.functional")
    return functional.cross_entropy(_unit(x) @ _unit(y).T / 0.07, torch.arange(len(x), device=x.device))


def _clip(x: Any, y: Any) -> Any:
    torch, functional = load("torch"), load("torch.nn.functional")
    logits, target = _unit(x) @ _unit(y).T / 0.07, torch.arange(len(x), device=x.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def _nt_xent(x: Any, y: Any) -> Any:
    torch, functional = load("torch"), load("torch.nn.functional")
    z, n = _unit(torch.cat([x, y])), len(x)
    logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
    return functional.cross_entropy(logits, (torch.arange(2 * n, device=x.device) + n) % (2 * n))


def _siglip(x: Any, y: Any) -> Any:
    logits = 10 * _unit(x) @ _unit(y).T - 10
    return (load("torch.nn.functional").softplus(logits).sum() - logits.diagonal().sum()) / len(x)


def _classes(x: Any) -> Any:
    """Labels of 32 rows each."""
    return load("torch").arange(len(x), device=x.device) // 32


def _sup_con(x: Any, y: Any) -> Any:
    labels, u = _classes(x), _unit(x)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    logits = (u @ u.T / 0.1).fill_diagonal_(float("-inf"))
    return (logits.logsumexp(1) - logits.where(positive, 0).sum(1) / positive.sum(1)).mean()


def _uniformity(x: Any, y: Any) -> Any:
    u, n = _unit(x), len(x)
    potential = (4 * (u @ u.T) - 4).exp()
    return ((potential.sum() - potential.diagonal().sum()) / (n * (n - 1))).log()


def _chunked_info_nce(x: Any, y: Any) -> Any:
    """Rows by the chunk, scores computed again for the gradient: what one writes when N x N does not fit."""
    torch, functional, checkpoint = load("torch"), load("torch.nn.functional"), load("torch.utils.checkpoint")
    x, y = _unit(x), _unit(y)

    def part(rows: Any, columns: Any, begin: int) -> Any:
        target = torch.arange(begin, begin + len(rows), device=rows.device)
        return functional.cross_entropy(rows @ columns.T / 0.07, target, reduction="sum")

    parts = (
        checkpoint.checkpoint(part, x[begin : begin + CHUNK], y, begin, use_reentrant=False)
        for begin in range(0, len(x), CHUNK)
    )
    return sum(parts) / len(x)


def _gaussian(x: Any, y: Any) -> Any:
    torch = load("torch")
    return torch.cat([torch.exp(-torch.cdist(rows, y).square() / 2) @ y[:, :1] for rows in x.split(4096)])


def _matern(x: Any, y: Any) -> Any:
    torch = load("torch")
    parts = ((5**0.5 * torch.cdist(rows, y)) for rows in x.split(4096))
    return torch.cat([((1 + t + t * t / 3) * torch.exp(-t)) @ y[:, :1] for t in parts])


def _assign(x: Any, y: Any) -> Any:
    torch = load("torch")
    square = y.square().sum(1)
    return torch.cat([(square - 2 * rows @ y.T).argmin(1) for rows in x.split(65536)])


def _lloyd(x: Any, y: Any) -> Any:
    torch = load("torch")
    for _ in range(ITERATIONS):
        labels = _assign(x, y)
        sums = torch.zeros_like(y).index_add_(0, labels, x)
        counts = labels.bincount(minlength=len(y))[:, None]
        y = torch.where(counts > 0, sums / counts.clamp_min(1), y)
    return y


def _nearest(x: Any, y: Any) -> Any:
    torch = load("torch")
    return torch.cat([torch.cdist(rows, y).topk(10, largest=False)[1] for rows in x.split(4096)])


def lines(quick: bool) -> list[Line]:
    """What is measured, in order of importance."""
    n, middle, many, rows, centroids = (96, 64, 128, 256, 32) if quick else (32768, 8192, 65536, 10**6, 1024)
    wide, deep = (48, 64) if quick else (768, 512)

    def clip(x: Any, y: Any) -> Any:
        return nf.clip_loss(x, y)

    def uniformity(x: Any, y: Any) -> Any:
        return nf.uniformity(x)

    def matmul(kernel: Any) -> Loss:
        return lambda x, y: kernel.matmul(x, y, y[:, :1])

    return [
        Line("info_nce", "bfloat16", (n, n, deep), 3, nf.info_nce_loss, _info_nce, _chunked_info_nce),
        Line("info_nce", "bfloat16", (n, n, deep // 2), 3, nf.info_nce_loss, _info_nce, _chunked_info_nce),
        Line("clip", "bfloat16", (n, n, wide), 4, clip, _clip, compiled=True),
        Line("nt_xent", "bfloat16", (n, n, deep // 2), 2, lambda x, y: nf.nt_xent_loss(*x.chunk(2)),
             lambda x, y: _nt_xent(*x.chunk(2))),
        Line("siglip", "bfloat16", (n, n, deep // 2), 3, nf.siglip_loss, _siglip),
        Line("sup_con", "bfloat16", (n, n, deep // 2), 2, lambda x, y: nf.sup_con_loss(x, _classes(x)), _sup_con),
        Line("uniformity", "bfloat16", (n, n, deep // 2), 1.5, uniformity, _uniformity),
        Line("info_nce", "float32", (middle, middle, 128), 3, nf.info_nce_loss, _info_nce, _chunked_info_nce),
        Line("info_nce", "bfloat16", (min(n, 256), min(n, 256), 128), 3, nf.info_nce_loss, _info_nce),
        Line("cdist", "float32", (middle, middle, 128), 1, nf.cdist, lambda x, y: load("torch").cdist(x, y),
             gradient=False),
        Line("cdist_cityblock", "float32", (middle, middle, 128), 1, lambda x, y: nf.cdist(x, y, "cityblock"),
             lambda x, y: load("torch").cdist(x, y, p=1.0), gradient=False),
        Line("gaussian_matmul", "float32", (many, many, 64), 1, matmul(nf.kernels.Gaussian()), _gaussian,
             gradient=False),
        Line("matern_matmul", "float32", (many, many, 64), 1, matmul(nf.kernels.Matern()), _matern, gradient=False),
        Line("kmeans_assign", "float32", (rows, centroids, 128), 1, nf.kmeans_assign, _assign, gradient=False,
             paired=False),
        Line("kmeans", "float32", (rows, centroids, 128), ITERATIONS + 1,
             lambda x, y: nf.KMeans(len(y), init=y, max_iter=ITERATIONS, tol=0).fit(x).cluster_centers_, _lloyd,
             gradient=False, paired=False),
        Line("knn", "float32", (middle, many, 128), 1, lambda x, y: nf.knn(x, y, 10), _nearest, gradient=False,
             paired=False),
    ]  # fmt: skip


# ---- measuring -------------------------------------------------------------------------------------------------------


def make(line: Line, device: str, size: tuple[int, int, int] | None = None) -> list[Any]:
    """The two sets of a line."""
    torch = load("torch")
    n, m, d = size or line.size
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, device=device, generator=generator)
    y = torch.randn(m, d, device=device, generator=generator)
    if line.paired and n == m:
        y = y + x
    dtype = getattr(torch, line.dtype)
    return [z.to(dtype).requires_grad_(line.gradient) for z in (x, y)]


def step_of(loss: Loss, line: Line, leaves: list[Any]) -> Step:
    """One call, forward and backward where there are gradients; returns value and gradients."""
    torch = load("torch")

    def step() -> Any:
        value = loss(*leaves)
        if not line.gradient:
            return value
        return value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)

    return step


def seconds_of(step: Step, device: str, budget: float) -> float:
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


def error_of(line: Line, device: str) -> float | None:
    """Relative error of value and gradients against float64, at 1024 rows; None where the peer is another quantity."""
    torch = load("torch")
    if line.dense is None or not line.gradient:
        return None
    leaves = make(line, device, (min(line.size[0], 1024), min(line.size[1], 1024), line.size[2]))
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    got, wanted = step_of(line.ours, line, leaves)(), step_of(line.dense, line, wide)()
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a is not None:
            worst = max(worst, float((a.cpu().double() - b).norm() / torch.linalg.norm(b).clamp_min(1e-300)))
    return worst


def peers_of(line: Line) -> dict[str, Loss]:
    """torch as it stands, compiled, and in chunks."""
    peers: dict[str, Loss] = {}
    if line.dense is not None:
        peers["eager"] = line.dense
        if line.compiled:
            peers["compiled"] = load("torch").compile(line.dense)
    if line.chunked is not None:
        peers["chunked"] = line.chunked
    return peers


def measure(line: Line, device: str, budget: float, rate: float, compiled: bool) -> dict[str, Any]:
    """Everything of one line; a peer's failure is a finding, not the end of the run."""
    leaves = make(line, device)
    ours = step_of(line.ours, line, leaves)
    result: dict[str, Any] = {
        "name": line.name, "dtype": line.dtype, "size": list(line.size), "seconds": seconds_of(ours, device, budget),
        "extra_bytes": extra_bytes(ours, device), "error": error_of(line, device), "peers": {},
    }  # fmt: skip
    result["flops_per_second"] = line.flops / result["seconds"]
    result["of_matrix_product"] = result["flops_per_second"] / rate
    for name, loss in peers_of(line).items():
        if name == "compiled" and not compiled:
            continue
        peer: dict[str, Any] = {"seconds": None, "extra_bytes": None, "error": None}
        result["peers"][name] = peer
        try:
            step = step_of(loss, line, leaves)
            peer["seconds"] = seconds_of(step, device, budget)
            peer["extra_bytes"] = extra_bytes(step, device)
        except Exception as error:
            peer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
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
        if peer["seconds"] is None:
            text += f"\n{'':18s}{name}: {peer['error']}"
            continue
        own = "" if peer["extra_bytes"] is None else f", {peer['extra_bytes'] / 2**20:.1f} MiB"
        text += f"\n{'':18s}{name}: {peer['seconds'] / result['seconds']:.2f}x our time{own}"
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
    print(f"{name}; torch {torch.__version__}; bfloat16 matrix product {rate / 1e12:.1f} TFLOP/s", flush=True)
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
