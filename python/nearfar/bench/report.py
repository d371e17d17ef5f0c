"""How results are shown: a table of plain text, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import label

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
    if report["options"]["quick"]:
        head.append("--quick: sizes too small to judge speed by")
    head += _disturbance(report)
    lines: list[tuple[str, ...]] = [_HEADER]
    for result in report["results"]:
        lines += _lines(result)
    notes = [
        f"{result['case']} {label(result['shape'])}, {peer['name']}: {peer['detail'].splitlines()[0]}"
        for result in report["results"]
        for peer in result["peers"]
        if peer["detail"]
    ]
    return "\n".join([*head, "", *_aligned(lines), *notes]) + "\n"


def _disturbance(report: dict[str, Any]) -> list[str]:
    """A warning where other processes took part in the run; it goes on the picture too."""
    others, worst = max((r["others_processors"] or 0, r["case"]) for r in report["results"])
    if others <= _QUIET:
        return []
    return [f"NOT QUIET: others kept {others:.1f} processors busy during {worst}; do not quote these figures"]


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


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in _TEXT else cell.rjust(width)
            for name, cell, width in zip(_HEADER, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


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


def _library(peer: Result) -> str:
    """'torch' of 'torch.cdist' and 'torch dense': bars of one library share a colour."""
    name: str = peer["name"]
    return name.replace(".", " ").split()[0]


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Save one picture: how many times faster than each peer, with the fraction of the floor beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{result['case']}  {label(result['shape'])}", result["ours"], peer)
        for result in report["results"]
        for peer in result["peers"]
        if peer["ratio"] is not None
    ]
    figure = Figure(figsize=(9, 1.4 + 0.34 * max(len(bars), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    libraries = sorted({_library(peer) for _, _, peer in bars})
    for row, (_, ours, peer) in enumerate(bars):
        ratio = peer["ratio"]
        axes.barh(row, ratio - 1, left=1, height=0.7, color=f"C{libraries.index(_library(peer)) % 10}")
        note = f" {_digits(ratio)}x"
        if ours["of_write"] is not None:
            note += f", {_percent(ours['of_write'])} of write rate"
        elif ours["of_peak"] is not None:
            note += f", {_percent(ours['of_peak'])} of FMA peak"
        axes.text(max(ratio, 1), row, note, va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [f"{title}  vs {peer['name']}" for title, _, peer in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    least, most = (pick([1.0, *(peer["ratio"] for _, _, peer in bars)]) for pick in (min, max))
    # Room for the notes at the right: half of what the bars take of the logarithmic axis.
    axes.set_xlim(0.8 * least, 2 * most * (most / least) ** 0.5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("times faster than the peer (median of paired calls); 1 is equal")
    axes.set_title("\n".join([_title(report), *_disturbance(report)]), fontsize=9)
    figure.savefig(path, dpi=150)
