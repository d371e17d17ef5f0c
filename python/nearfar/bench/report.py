"""How results are shown: a table of plain text, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import label
from .memory import OURS

Result = dict[str, Any]

_HEADER = (
    *("operation", "size", "ms", "least", "GFLOP/s", "of peak", "of write", "MiB", "error"),
    *("peer", "ms", "least", "MiB", "error", "ratio"),
)
_TEXT = ("operation", "size", "peer")  # columns aligned to the left

_QUIET = 0.1  # processors that others may use


def table(report: dict[str, Any]) -> str:
    """The whole report as aligned text: one line a peer, ours on the first of each size."""
    rates = report["rates"]
    versions = {name: version for name, version in report["machine"]["versions"].items() if version}
    isa = report["machine"]["nearfar"]["isa"]
    write = rates["write_gbs"]
    head = [
        f"{_title(report)}, {isa}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"FMA peak {_digits(rates['fma_gflops'])} GFLOP/s; fresh pages written at {write['huge']:.2f} GB/s (huge), "
        f"{write['plain']:.2f} GB/s (plain)",
    ]
    if (flags := report["machine"].get("cxxflags")) and _timed(report, "KeOps"):
        head.append(f"KeOps compiled with {flags}")
    head += _warnings(report)
    lines: list[tuple[str, ...]] = [_HEADER]
    for result in report["results"]:
        lines += _lines(result)
    notes = [
        f"{result['case']} {label(result['shape'])}, {peer['name']}: {peer['detail'].splitlines()[0]}"
        for result in report["results"]
        for peer in result["peers"]
        if peer["detail"]
    ]
    text = [*head, "", *_aligned(lines, _TEXT), *notes]
    for swept in report.get("sweeps", []):
        text += ["", f"{_over(swept)}, ms", *_aligned(_sweep_lines(swept, rates["fma_gflops"]))]
    return "\n".join(text) + "\n"


def _warnings(report: dict[str, Any]) -> list[str]:
    """What forbids to quote the run: small sizes, or other processes that took part. On the picture too."""
    quick = ["--quick: sizes too small to judge speed by"] if report["options"]["quick"] else []
    results = [*report["results"], *report.get("sweeps", [])]
    others, worst = max((r["others_processors"] or 0, r["case"]) for r in results)
    if others <= _QUIET:
        return quick
    return [*quick, f"NOT QUIET: others kept {others:.1f} processors busy during {worst}; do not quote these figures"]


def _timed(report: dict[str, Any], name: str) -> bool:
    """Whether the peer was measured, in a case or in a sweep."""
    peers = [(peer["name"], peer["status"]) for result in report["results"] for peer in result["peers"]]
    lines = [point["lines"] for swept in report.get("sweeps", []) for point in swept["points"]]
    return (name, "ok") in peers or any(name in own and own[name]["status"] == "ok" for own in lines)


def _title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"nearfar {machine['nearfar']['version']}, {machine['threads']} threads, {machine['cpu']}"


def _lines(result: Result) -> list[tuple[str, ...]]:
    """Ours beside the first peer, the other peers below."""
    ours = result["ours"]
    own: tuple[str, ...] = (
        result["case"],
        label(result["shape"]),
        _milli(ours["seconds"], "median"),
        _milli(ours["seconds"], "min"),
        _digits(ours["gflops"]),
        _percent(ours["of_peak"]),
        _percent(ours["of_write"]),
        _mebi(ours["extra_bytes"]),
        _error(ours["error"]),
    )
    lines = []
    for peer in result["peers"]:
        other = (
            peer["name"] if peer["status"] == "ok" else f"{peer['name']}: {peer['status']}",
            _milli(peer["seconds"], "median"),
            _milli(peer["seconds"], "min"),
            _mebi(peer["extra_bytes"]),
            _error(peer["error"]),
            "" if peer["ratio"] is None else f"{peer['ratio']:.2f}x",
        )
        lines.append((*own, *other))
        own = ("",) * len(own)
    return lines


def _aligned(lines: Sequence[tuple[str, ...]], left: Sequence[str] = ()) -> list[str]:
    """Columns under the first line, to the right but for those named."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(lines[0], line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def _over(swept: dict[str, Any]) -> str:
    """'knn over n, d = 128, k = 10'."""
    fixed = (f", {name} = {size}" for name, size in swept["points"][0]["shape"].items() if name != "n")
    return f"{swept['case']} over n{''.join(fixed)}"


def _floor(point: dict[str, Any], gflops: float) -> float:
    """Seconds that the flops of the floor would take at the peak."""
    return float(point["floor_flops"] / gflops / 1e9)


def _sweep_lines(swept: dict[str, Any], gflops: float) -> list[tuple[str, ...]]:
    """Medians of everybody at every size."""
    names = list(swept["points"][0]["lines"])
    lines = [("n", "floor", *names)]
    for point in swept["points"]:
        times = (_sweep_cell(point["lines"][name]) for name in names)
        lines.append((str(point["shape"]["n"]), _digits(1e3 * _floor(point, gflops)), *times))
    return lines


def _sweep_cell(line: dict[str, Any]) -> str:
    if line["status"] == "ok":
        return _milli(line["seconds"], "median")
    return str(line["detail"] if line["status"] == "left out" else line["status"])


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _milli(seconds: Result | None, which: str) -> str:
    return "" if seconds is None else _digits(1e3 * seconds[which])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _mebi(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _library(name: str) -> str:
    """'torch' of 'torch.cdist' and 'torch dense': one library has one colour."""
    return name.replace(".", " ").split()[0]


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Save one picture: how many times faster than each peer; beside it, where there are sweeps, time over n."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{result['case']}  {label(result['shape'])}", result["ours"], peer)
        for result in report["results"]
        for peer in result["peers"]
        if peer["ratio"] is not None
    ]
    sweeps = report.get("sweeps", [])
    names = [peer["name"] for _, _, peer in bars]
    names += [name for swept in sweeps for name in swept["points"][0]["lines"] if name != OURS]
    colours = {name: f"C{k % 10}" for k, name in enumerate(sorted(set(map(_library, names))))}
    height = max(0.22 * len(bars) + 1, 2.4 * len(sweeps), 2)
    figure = Figure(figsize=(13 if sweeps else 9, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join([_title(report), *_warnings(report)]), fontsize=9)
    parts: Any = figure.subfigures(1, 2, width_ratios=(2, 1)) if sweeps else (figure,)
    left, *right = parts
    _draw_ratios(left.add_subplot(), bars, colours)
    for part in right:
        for axes, swept in zip(part.subplots(len(sweeps), squeeze=False)[:, 0], sweeps, strict=True):
            _draw_sweep(axes, swept, report["rates"]["fma_gflops"], colours)
    figure.savefig(path, dpi=120)


def _draw_ratios(axes: Any, bars: Sequence[tuple[str, Result, Result]], colours: dict[str, str]) -> None:
    """A bar for every peer of every line, with the fraction of the floor beside it."""
    for row, (_, ours, peer) in enumerate(bars):
        ratio = peer["ratio"]
        axes.barh(row, ratio - 1, left=1, height=0.7, color=colours[_library(peer["name"])])
        note = f" {_digits(ratio)}x"
        if ours["of_write"] is not None:
            note += f", {_percent(ours['of_write'])} of write rate"
        elif ours["of_peak"] is not None:
            note += f", {_percent(ours['of_peak'])} of FMA peak"
        axes.text(max(ratio, 1), row, note, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [f"{title}  vs {peer['name']}" for title, _, peer in bars], fontsize=7)
    axes.set_ylim(max(len(bars), 1) - 0.4, -0.6)
    axes.set_xscale("log")
    least, most = (pick([1.0, *(peer["ratio"] for _, _, peer in bars)]) for pick in (min, max))
    # Room for the notes at the right: half of what the bars take of the logarithmic axis.
    axes.set_xlim(0.8 * least, 2 * most * (most / least) ** 0.5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("times faster than the peer (median of paired calls); 1 is equal")


def _draw_sweep(axes: Any, swept: dict[str, Any], gflops: float, colours: dict[str, str]) -> None:
    """Time over n: ours, every peer as far as it goes, and the floor."""
    points = swept["points"]
    sizes = [point["shape"]["n"] for point in points]
    shown: set[str] = set()
    for name in points[0]["lines"]:
        times = {
            point["shape"]["n"]: 1e3 * line["seconds"]["median"]
            for point in points
            if (line := point["lines"][name])["status"] == "ok"
        }
        if not times:
            continue
        end = next((point for point in points if point["lines"][name]["status"] == "left out"), None)
        note = "" if end is None else f"; n = {end['shape']['n']} {end['lines'][name]['detail']}"
        library = _library(name)
        style = {"color": "black", "linewidth": 2} if name == OURS else {"color": colours[library]}
        style["linestyle"] = ":" if library in shown else "-"
        shown.add(library)
        axes.loglog(list(times), list(times.values()), marker="o", markersize=3, label=name + note, **style)
    floor = [1e3 * _floor(point, gflops) for point in points]
    axes.loglog(sizes, floor, color="0.5", linestyle="--", label="floor: its flops at the FMA peak")
    axes.set_title(_over(swept), fontsize=8)
    axes.set_ylabel("ms", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.set_xticks(sizes, [f"{n:g}" for n in sizes])
    axes.minorticks_off()
    axes.legend(fontsize=6)
    axes.spines[["top", "right"]].set_visible(False)
