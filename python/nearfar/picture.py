"""The picture of a `nearfar.Report`: four views of one set of embeddings. Imports matplotlib."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .arrays import unit_rows
from .evaluation import Report, singular_values

PAIRS = 20_000  # random pairs whose distances are drawn
POINTS = 2000  # rows in the scatter
MOST_CLASSES = 10  # that colours and a legend can tell apart

INK, HERE = "0.25", "tab:red"
COLORS = {"random pairs": "tab:blue", "pairs of one class": "tab:green", "positive pairs": "tab:orange"}


def draw(
    report: Report,
    path: Any,
    points: NDArray[Any],
    positives: list[tuple[NDArray[Any], NDArray[Any]]],
    codes: NDArray[np.int64] | None,
    names: list[str],
) -> None:
    """Draw and save."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    figure.suptitle(report.title)
    axes = figure.subplots(2, 2).ravel()
    pairs = _pair_distances(report, points, positives, codes)
    _spectrum(axes[0], report, points)
    _distances(axes[1], report, pairs)
    _plane(axes[2], report, pairs)
    _scatter(axes[3], report, points, codes, names)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _pair_distances(report: Report, points: Any, positives: Any, codes: Any) -> dict[str, NDArray[Any]]:
    """Distances on the sphere of pairs drawn at random, of those of one class, and of all positive pairs."""
    rng = np.random.default_rng(report.seed)
    n = len(points)
    first = rng.integers(0, n, PAIRS)
    second = (first + rng.integers(1, n, PAIRS)) % n
    unit = unit_rows(points)
    found = {"random pairs": np.linalg.norm(unit[first] - unit[second], axis=1)}
    if codes is not None and (same := codes[first] == codes[second]).any():
        found["pairs of one class"] = found["random pairs"][same]
    if positives:
        near = [np.linalg.norm(unit_rows(x) - unit_rows(y), axis=1) for x, y in positives]
        found["positive pairs"] = np.concatenate(near)
    return found


def _spectrum(axis: Any, report: Report, points: NDArray[Any]) -> None:
    values = singular_values(points)
    positive = values[values > 0]
    index = np.arange(1, len(positive) + 1)
    if len(positive):
        axis.plot(index, positive / positive[0], color=INK, lw=1.2, marker="o", ms=max(1.0, min(4.0, 120 / len(index))))
        axis.set(yscale="log", ylim=(min(0.1, positive[-1] / positive[0]) / 1.5, 1.5))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.axvline(report.effective_rank, color=HERE, lw=1, ls="--")
    axis.text(
        report.effective_rank,
        0.98,
        f" effective rank {report.effective_rank:.1f}",
        transform=axis.get_xaxis_transform(),
        va="top",
        ha="left" if report.effective_rank < 0.6 * report.dim else "right",
        color=HERE,
    )
    axis.set(title=f"spectrum: {len(positive)} of {report.dim} dimensions in use", xlabel="dimension")
    axis.set_ylabel("singular value / largest")


def _sphere_density(r: NDArray[Any], dim: int) -> NDArray[Any]:
    """Density of the distance of two independent uniform points on the unit sphere of R^dim, dim >= 2."""
    log_beta = math.lgamma((dim - 1) / 2) + math.lgamma(0.5) - math.lgamma(dim / 2)
    with np.errstate(divide="ignore"):
        density: NDArray[Any] = np.exp((dim - 2) * np.log(r) + (dim - 3) / 2 * np.log1p(-r * r / 4) - log_beta)
    return density


def _distances(axis: Any, report: Report, pairs: dict[str, NDArray[Any]]) -> None:
    """Histograms on the sphere: what should be near against everything."""
    bins = np.linspace(0, 2, 81)
    tops = []
    for label, distances in pairs.items():
        style = dict(density=True, histtype="stepfilled", alpha=0.45, color=COLORS[label], label=label)
        tops.append(axis.hist(np.clip(distances, 0, 2), bins, **style)[0].max())
    if report.dim >= 2:
        r = np.linspace(1e-3, 2 - 1e-3, 400)
        density = _sphere_density(r, report.dim)
        axis.plot(r, density, color=INK, lw=1, ls="--", label="uniform on the sphere")
        tops.append(np.quantile(density, 0.99))
    axis.set(title="distances on the sphere", xlabel="distance", ylabel="density", yticks=[], xlim=(0, 2))
    # Coinciding positives are one bar that would hide the rest. Room for the legend above.
    axis.set_ylim(0, 1.25 * min(max(tops), 4 * min(tops)))
    axis.legend(frameon=False, loc="upper center", ncols=2, fontsize=9)


def _plane(axis: Any, report: Report, pairs: dict[str, NDArray[Any]]) -> None:
    """Where the representation is between collapse (0, 0) and the ideal (the sphere's optimum, 0)."""
    optimum = report.uniformity_optimum
    low = min(optimum, report.uniformity)
    width = max(-low, 0.1)
    near = {label: float(np.mean(np.square(pairs[label]))) for label in pairs if label != "random pairs"}
    if report.alignment is not None:
        near["positive pairs"] = report.alignment
    top = max(2.2, *(1.15 * value for value in near.values())) if near else 2.2
    axis.axvline(optimum, color=INK, lw=1, ls="--")
    axis.text(optimum, 1.0, "the sphere's optimum ", rotation=90, va="center", ha="right", color=INK, fontsize=9)
    marks = [(optimum, 0.0, "ideal", 8), (0.0, 0.0, "all points alike", -8)]
    if report.dim >= 2:
        marks.append((optimum, 2.0, "uniform, positives at random", 8))

    def note(text: str, x: float, y: float, shift: int, color: str) -> None:
        side = "left" if shift > 0 else "right"
        axis.annotate(text, (x, y), (shift, 7), textcoords="offset points", ha=side, color=color, fontsize=9)

    for x, y, text, shift in marks:
        axis.plot(x, y, "o", mfc="white", mec=INK, ms=6, clip_on=False, zorder=3)
        note(text, x, y, shift, INK)
    axis.axvline(report.uniformity, color=HERE, lw=1, alpha=0.5)
    shift = 10 if report.uniformity < 0.5 * low else -10
    if not near:
        note(f"uniformity {report.uniformity:.2f}\n(alignment needs views)", report.uniformity, top / 2, shift, HERE)
    for label, value in near.items():
        axis.plot(report.uniformity, value, "*", color=COLORS[label], mec="white", ms=17, zorder=4, clip_on=False)
        note(f"{label}: {value:.3f}", report.uniformity, value, shift, COLORS[label])
    axis.set(title="alignment and uniformity: lower is better", xlabel="uniformity", ylabel="alignment")
    axis.set(xlim=(low - 0.08 * width, 0.03 * width), ylim=(-0.02 * top, top))


def _scatter(axis: Any, report: Report, points: Any, codes: Any, names: list[str]) -> None:
    """The first two principal components of rows drawn at random."""
    rng = np.random.default_rng(report.seed)
    chosen = rng.permutation(len(points))[:POINTS]
    centered = points[chosen].astype(np.float64)
    centered -= centered.mean(0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    plane = np.zeros((len(chosen), 2))
    count = min(2, len(values))
    plane[:, :count] = (left * values)[:, :count]
    total = (values**2).sum()
    share = (values[:2] ** 2).sum() / total if total > 0 else 1.0
    if codes is None:
        axis.scatter(*plane.T, s=6, color=INK, alpha=0.6, lw=0)
    elif len(names) <= MOST_CLASSES:
        for c, name in enumerate(names):
            axis.scatter(*plane[codes[chosen] == c].T, s=7, color=f"C{c}", alpha=0.75, lw=0, label=name)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, handletextpad=0)
    else:
        axis.scatter(*plane.T, s=6, c=codes[chosen], cmap="turbo", alpha=0.75, lw=0)
    what = "points" if codes is None else f"{report.classes} classes"
    axis.set(title=f"{what} in two principal components ({share:.0%} of the variance)", xticks=[], yticks=[])
    axis.set_aspect("equal", "datalim")
    axis.spines[["left", "bottom"]].set_visible(False)
