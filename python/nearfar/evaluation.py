"""Judging a representation: one report of what is usually asked of embeddings, from fused passes over all pairs.

Quantities of the sphere (alignment, uniformity, anisotropy, neighbours, silhouette, mutual information) see rows of
unit norm; effective rank and linear probe see the embeddings as they are.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import (
    Array,
    check_matrix,
    check_points,
    check_seed,
    check_shape,
    is_installed,
    kind_of,
    to_numpy,
    unit_rows,
)
from .distances import cdist
from .losses.sphere import alignment, uniformity, uniformity_of_sphere
from .mutual_information import mi_lower_bound
from .neighbors import knn

__all__ = ["Report", "evaluate"]

NEIGHBORS = 5
HELD_OUT = 0.3  # part of every class that tests the linear probe
# Above these numbers of rows a quantity is computed on so many of them, drawn with the seed.
SILHOUETTE_ROWS = PROBE_ROWS = 20_000
BOUND_ROWS = 8192
_BLOCK = 512  # rows of distances at a time

NO_VIEWS, NO_LABELS = "needs views", "needs labels"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate` finds; ``print(report)`` is a table.

    Attributes
    ----------
    rows, dim : int
        Shape of the embeddings.
    classes : int or None
        Number of different labels.
    seed : int
        Of everything that draws rows or splits them.
    alignment : float or None
        Mean squared distance of positive pairs on the sphere (`nearfar.alignment`); 0 is perfect.
    uniformity, uniformity_optimum, uniformity_gap : float
        `nearfar.uniformity`, `nearfar.uniformity_of_sphere` and `nearfar.uniformity_gap`, all with t = 2.
    effective_rank : float
        exp of the entropy of the singular values divided by their sum (Roy & Vetterli, 2007), between 1 and dim. The
        embeddings are not centred. All zero: 0.
    anisotropy : float
        Mean cosine of distinct rows; 0 where directions are spread evenly, 1 where they coincide.
    knn_accuracy : float or None
        Leave-one-out: every row is given the class of most of its 5 nearest others by cosine, in a tie the one that
        has the nearest of them.
    linear_probe_accuracy : float or None
        Logistic regression (scikit-learn, C = 1, standardised columns) on 70 % of every class, drawn with the seed,
        tested on the rest; at most 20 000 rows.
    silhouette : float or None
        Mean over rows of (b - a) / max(a, b), a the mean distance to the own class and b that to the nearest other
        one, on the sphere (Rousseeuw, 1987); a class of one row counts 0. At most 20 000 rows.
    mi_lower_bound, mi_temperature : float or None
        The InfoNCE bound log N - L in nats at the temperature between 0.001 and 10 that makes it largest
        (`nearfar.mi_lower_bound`); at most 8192 rows, so at most log 8192 = 9.01. With more than two views the means.
    majority : float or None
        Share of the largest class: the accuracy of a constant answer.
    missing : dict of str to str
        What is None, and why.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> print(nf.evaluate(np.eye(8)))  # doctest: +ELLIPSIS
    8 x 8 embeddings
    ...
      effective rank ...8.0000   of 8 dimensions
    ...
    """

    rows: int
    dim: int
    classes: int | None
    seed: int
    alignment: float | None
    uniformity: float
    uniformity_optimum: float
    uniformity_gap: float
    effective_rank: float
    anisotropy: float
    knn_accuracy: float | None
    linear_probe_accuracy: float | None
    silhouette: float | None
    mi_lower_bound: float | None
    mi_temperature: float | None
    majority: float | None
    missing: dict[str, str]
    # What a picture is drawn of: embeddings, positive pairs, classes of the rows and their names.
    _data: tuple[Any, ...] = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON knows them.

        Examples
        --------
        >>> import numpy as np, nearfar as nf
        >>> nf.evaluate(np.eye(4)).to_dict()["effective_rank"]
        4.0
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "_data"]
        return {name: getattr(self, name) for name in names}

    def lines(self) -> list[tuple[str, str, str]]:
        """The table: (quantity, value, what to compare it with)."""
        chance = "" if self.majority is None else f"; largest class {self.majority:.3f}"
        largest = math.log(min(self.rows, BOUND_ROWS))
        at = "" if self.mi_temperature is None else f", at temperature {self.mi_temperature:.3g}"
        notes = {
            "alignment": "0 where positives coincide",
            "uniformity": f"{self.uniformity_optimum:.4f} for the uniform law on the sphere",
            "uniformity_gap": "squared MMD to the uniform law, 0 at best",
            "effective_rank": f"of {self.dim} dimensions",
            "anisotropy": "mean cosine, 0 where directions are even",
            "knn_accuracy": f"{NEIGHBORS} neighbours, leave-one-out{chance}",
            "linear_probe_accuracy": f"{HELD_OUT:.0%} held out, seed {self.seed}{chance}",
            "silhouette": "of the classes, between -1 and 1",
            "mi_lower_bound": f"nats, at most {largest:.3f}{at}",
        }
        found = []
        for name, note in notes.items():
            value = getattr(self, name)
            words = name.replace("_", " ").replace("knn", "k-NN").replace("mi lower", "MI lower")
            found.append((words, "-", self.missing[name]) if value is None else (words, f"{value:.4f}", note))
        return found

    @property
    def title(self) -> str:
        """How many rows, columns and classes."""
        return f"{self.rows} x {self.dim} embeddings" + (f", {self.classes} classes" if self.classes else "")

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, box=box.SIMPLE, show_header=False, title_justify="left")
        for justify in ("left", "right", "left"):
            table.add_column(justify=justify)
        for line in self.lines():
            table.add_row(*line)
        return table

    def __str__(self) -> str:
        if not is_installed("rich"):
            return "\n".join([self.title, *(f"  {name:<22}{value:>9}  {note}" for name, value, note in self.lines())])
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def plot(self, path: Any) -> None:
        """Save one picture: spectrum, distances of pairs, alignment and uniformity, the points in two dimensions.

        Parameters
        ----------
        path : str or path
            A name that ends in .png, .svg or .pdf.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib.
        """
        try:
            from .picture import draw
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise ModuleNotFoundError("nearfar.Report.plot needs matplotlib: pip install 'nearfar[plot]'") from error
        draw(self, path, *self._data)


def evaluate(embeddings: Array, labels: Array | None = None, *, views: Any = None, seed: int = 0) -> Report:
    """Judge a representation.

    Time is O(N^2 D) in fused passes (uniformity, neighbours); memory O(N D), never O(N^2).

    Parameters
    ----------
    embeddings : array (N, D)
        N >= 2; float16, bfloat16 (torch), float32 or float64.
    labels : array (N,), optional
        Integers, booleans or strings, of any kind of array, since tensors hold no strings. Gives knn_accuracy,
        linear_probe_accuracy (with scikit-learn) and silhouette.
    views : array (N, D) or (N, V, D), or a sequence of V arrays (N, D), optional
        Embeddings of another view of each item, paired with `embeddings`; or V >= 2 views of each item, paired with
        each other (the mean over pairs of views). Gives alignment and mi_lower_bound.
    seed : int
        Of the split for the probe, and of the rows that are drawn where a quantity does not use all (see `Report`).

    Returns
    -------
    Report
        What was not given the arrays or packages that it needs is None there, with the reason in ``missing``.

    Raises
    ------
    ValueError
        Fewer than two rows, NaN or infinity, shapes that do not match.
    TypeError
        Arguments that are not arrays, or of a wrong dtype.

    Notes
    -----
    Wang, Isola, 2020 (alignment, uniformity); Roy, Vetterli: The effective rank, 2007, used on embeddings by Garrido
    et al.: RankMe, 2023; Ethayarajh: How Contextual are Contextualized Word Representations?, 2019 (anisotropy).

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> angles = 2 * np.pi * np.arange(100) / 100
    >>> circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    >>> report = nf.evaluate(circle, np.arange(100) // 50, views=circle)
    >>> round(report.effective_rank, 6), round(report.alignment, 6), report.knn_accuracy
    (2.0, 0.0, 0.98)
    >>> nf.evaluate(circle).missing["alignment"]
    'needs views'
    """
    check_points(embeddings=embeddings)
    check_matrix(embeddings, "embeddings")
    n, d = embeddings.shape
    if n < 2:
        raise ValueError(f"embeddings: expected at least two rows, got {n}")
    points = _finite(embeddings, "embeddings")
    seed = check_seed(seed)
    positives = _positive_pairs(embeddings, views)
    codes, names = _class_codes(labels, n)
    found: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Report))
    missing: dict[str, str] = {}

    optimum = uniformity_of_sphere(d)
    spread = float(uniformity(points))
    found.update(uniformity=spread, uniformity_optimum=optimum, uniformity_gap=math.exp(spread) - math.exp(optimum))
    found.update(effective_rank=effective_rank(points), anisotropy=anisotropy(points))
    if positives:
        found["alignment"] = float(np.mean([alignment(x, y) for x, y in positives]))
        bounds = [_best_bound(x, y, seed) for x, y in positives]
        found["mi_lower_bound"], found["mi_temperature"] = map(float, np.mean(bounds, 0))
    else:
        missing.update(alignment=NO_VIEWS, mi_lower_bound=NO_VIEWS)
    if codes is None:
        missing.update(knn_accuracy=NO_LABELS, linear_probe_accuracy=NO_LABELS, silhouette=NO_LABELS)
    else:
        counts = np.bincount(codes)
        found.update(classes=len(counts), majority=float(counts.max() / n), knn_accuracy=knn_accuracy(points, codes))
        for name, measure in (("linear_probe_accuracy", linear_probe_accuracy), ("silhouette", silhouette)):
            try:
                found[name] = measure(points, codes, seed=seed)
            except _UndefinedError as reason:
                missing[name] = str(reason)
    found.update(rows=n, dim=d, seed=seed, missing=missing, _data=(points, positives, codes, names))
    return Report(**found)


class _UndefinedError(Exception):
    """A quantity that cannot be computed of this input, and why."""


def _finite(array: Array, name: str) -> NDArray[Any]:
    points = to_numpy(array)
    finite = np.isfinite(points).reshape(len(points), -1).all(1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in row {int(finite.argmin())}")
    return points


def _positive_pairs(embeddings: Array, views: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The pairs of sets whose rows are each other's positives."""
    if views is None:
        return []
    n, d = embeddings.shape
    if isinstance(views, (tuple, list)):
        if len(views) < 2:
            raise ValueError(f"views: expected an array or at least two of them, got {len(views)}")
        for i, view in enumerate(views):
            check_points(embeddings=embeddings, **{f"views[{i}]": view})
            check_shape(view, f"views[{i}]", (n, d), "embeddings")
        return list(itertools.combinations([_finite(view, f"views[{i}]") for i, view in enumerate(views)], 2))
    check_points(embeddings=embeddings, views=views)
    shape = tuple(views.shape)
    if shape != (n, d) and not (len(shape) == 3 and shape[::2] == (n, d) and shape[1] >= 2):
        raise ValueError(f"views: expected shape ({n}, {d}) or ({n}, V, {d}) with V of at least 2, got {shape}")
    own = _finite(views, "views")
    if own.ndim == 2:
        return [(to_numpy(embeddings), own)]
    return [(own[:, i], own[:, j]) for i, j in itertools.combinations(range(shape[1]), 2)]


def _class_codes(labels: Array | None, n: int) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Labels as 0, 1, ... in their order, and what they are called."""
    if labels is None:
        return None, []
    kind_of(labels, "labels")
    if tuple(labels.shape) != (n,):
        raise ValueError(f"labels: expected shape ({n},) to match embeddings, got {tuple(labels.shape)}")
    if not isinstance(labels, np.ndarray):
        labels = to_numpy(labels)
    if labels.dtype.kind not in "iubUS":
        raise TypeError(f"labels: expected integers, booleans or strings, got {labels.dtype}")
    names, codes = np.unique(labels, return_inverse=True)
    return codes.reshape(-1), [str(name) for name in names]


def _some(n: int, most: int, seed: int) -> NDArray[np.int64]:
    """All rows, or so many of them."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def singular_values(x: NDArray[Any]) -> NDArray[np.float64]:
    """In descending order, from the smaller of the two Gram matrices in float64; what is rounding of it is 0."""
    largest = float(np.abs(x).max(initial=0))
    if largest == 0:
        return np.zeros(min(x.shape))
    if x.shape[0] < x.shape[1]:
        wide = x.astype(np.float64) / largest
        gram = wide @ wide.T
    else:
        gram = np.zeros((x.shape[1], x.shape[1]))
        for begin in range(0, len(x), 1 << 14):
            block = x[begin : begin + (1 << 14)].astype(np.float64) / largest
            gram += block.T @ block
    squares = np.linalg.eigvalsh(gram)[::-1]
    noise = np.finfo(np.float64).eps * max(x.shape) * squares[0]
    return largest * np.sqrt(np.where(squares > noise, squares, 0))


def effective_rank(x: NDArray[Any]) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy & Vetterli, 2007)."""
    values = singular_values(x)
    if values[0] == 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def anisotropy(x: NDArray[Any]) -> float:
    """Mean cosine of distinct rows, O(N D): the squared norm of the sum of unit rows holds every pair twice."""
    unit = unit_rows(x)
    total = unit.sum(0, dtype=np.float64)
    n = len(unit)
    return float((total @ total - np.square(unit, dtype=np.float64).sum()) / (n * (n - 1)))


def knn_accuracy(x: NDArray[Any], codes: NDArray[np.int64]) -> float:
    """Leave-one-out accuracy of the majority of the nearest rows by cosine."""
    _, neighbors = knn(x, k=min(NEIGHBORS, len(x) - 1), metric="cosine")
    votes = codes[neighbors]
    # How many neighbours are of the class of each; the first of the most is the nearest of them.
    agreement = (votes[:, :, None] == votes[:, None, :]).sum(-1)
    chosen = np.take_along_axis(votes, agreement.argmax(1)[:, None], 1)[:, 0]
    return float(np.mean(chosen == codes))


def linear_probe_accuracy(x: NDArray[Any], codes: NDArray[np.int64], *, seed: int = 0) -> float:
    """Held-out accuracy of logistic regression; see `Report`."""
    chosen = np.random.default_rng(seed).permutation(_some(len(x), PROBE_ROWS, seed))
    x, codes = x[chosen], codes[chosen]
    by_class = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    place = np.empty(len(codes), np.int64)
    place[by_class] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    test = place < (HELD_OUT * counts[codes]).astype(np.int64)
    if (counts > 0).sum() < 2 or not test.any():
        raise _UndefinedError("needs two classes, and one of at least 4 rows")
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise _UndefinedError("needs scikit-learn: pip install 'nearfar[demo]'") from error
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after so many steps: stated, and still a probe
        model.fit(x[~test], codes[~test])
    return float(model.score(x[test], codes[test]))


def silhouette(x: NDArray[Any], codes: NDArray[np.int64], *, seed: int = 0) -> float:
    """Mean silhouette on the sphere; distances are summed by class, a block of rows at a time."""
    chosen = _some(len(x), SILHOUETTE_ROWS, seed)
    chosen = chosen[np.argsort(codes[chosen], kind="stable")]
    unit, codes = unit_rows(x[chosen]), codes[chosen]
    _, begins, own, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise _UndefinedError("needs two classes")
    total = 0.0
    for begin in range(0, len(unit), _BLOCK):
        rows = np.arange(begin, min(begin + _BLOCK, len(unit)))
        sums = np.add.reduceat(cdist(unit[rows], unit), begins, axis=1, dtype=np.float64)
        mine = (np.arange(len(rows)), own[rows])
        within = sums[mine] / np.maximum(counts[own[rows]] - 1, 1)
        sums[mine] = np.inf
        between = (sums / counts).min(1)
        most = np.maximum(within, between)
        valid = (counts[own[rows]] > 1) & (most > 0)
        total += np.where(valid, (between - within) / np.where(valid, most, 1), 0).sum()
    return float(total / len(unit))


def _best_bound(x: NDArray[Any], y: NDArray[Any], seed: int) -> tuple[float, float]:
    """The largest InfoNCE bound over temperatures, and where.

    The loss is convex in 1 / temperature, so the bound has one peak: golden section in the logarithm.
    """
    chosen = _some(len(x), BOUND_ROWS, seed)
    x, y = x[chosen], y[chosen]

    def bound(log_temperature: float) -> float:
        return float(mi_lower_bound(x, y, temperature=math.exp(log_temperature)))

    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(0.001), math.log(10)
    inner = [high - golden * (high - low), low + golden * (high - low)]
    values = [bound(t) for t in inner]
    while high - low > 0.05:
        if values[0] > values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - golden * (high - low)
            values[0] = bound(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + golden * (high - low)
            values[1] = bound(inner[1])
    best = int(values[1] > values[0])
    return values[best], math.exp(inner[best])
