"""k-means of rows that are spread over processes: the steps of `nearfar.lloyd`, with sums over the group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import kmeans
from ..arrays import Array, cast, is_torch, to_numpy
from ..distances import cdist
from ..estimator import check_random_state, weights_of
from ..lloyd import Data, Numbers, Pass, unit
from .ring import Ring

__all__ = ["KMeans"]


class Shared(Data):
    """This process's rows, of which centroids, sums and random numbers are those of all. Rows count in rank order."""

    def __init__(self, ring: Ring, x: Array, weights: Numbers | None, normalize: bool, counts: list[int]) -> None:
        super().__init__(x, weights, normalize)
        self.ring, self.counts = ring, counts
        self.first = sum(counts[: ring.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def sum(self, numbers: Any) -> Numbers:
        own = torch.from_numpy(np.ascontiguousarray(numbers, np.float64)).to(self.ring.device)
        total: Numbers = self.ring.sum(own).cpu().numpy()
        return total

    def _agree(self, step: Pass) -> Pass:
        """Refuses rows that are not finite, on every process if there are any."""
        bad = self.sum([float(not math.isfinite(step.inertia) and step.distances is not None)])[0]
        if bad:
            if not math.isfinite(step.inertia):
                self.refuse(step.labels)
            raise ValueError("X: expected finite numbers, got NaN or inf in a row of another rank")
        return step

    def iterate(self, centers: Numbers, labels: Numbers | None = None, measure: bool = True) -> Pass:
        own = self._pass(centers, labels, True, measure)
        whole = self.sum(np.concatenate([own.sums.ravel(), own.counts, [own.inertia, own.changed]]))
        size, k = own.sums.size, len(centers)
        sums, counts, (inertia, changed) = whole[:size].reshape(own.sums.shape), whole[size : size + k], whole[-2:]
        return Pass(own.labels, own.distances, sums, counts, float(inertia), int(changed))

    def assign(self, centers: Numbers) -> Pass:
        own = self._agree(self._pass(centers, None, False, True))
        inertia, changed = self.sum([own.inertia, own.changed])
        return own._replace(inertia=float(inertia), changed=int(changed))

    def tolerance(self, tol: float) -> float:
        plain = Shared(self.ring, self.x, None, self.normalize, self.counts)
        # First each process measures its rows from one of its own: a row that is not finite must not hide in another's.
        first = Data.rows(plain, slice(0, 1)) if self.n else np.zeros((1, self.d), self.dtype)
        self._agree(plain._pass(first, None, False, True))
        if tol == 0:
            return 0.0
        center = plain.rows(np.zeros(1, np.int64))
        return tol * plain.variance(plain.iterate(center).sums)

    def rows(self, index: Any) -> Numbers:
        """Rows by their number in all; whoever has one gives it."""
        index = np.asarray(index) - self.first
        own = (index >= 0) & (index < self.n)
        rows = np.zeros((len(index), self.d))
        if own.any():
            rows[own] = super().rows(index[own])
        return self.sum(rows).astype(self.dtype)

    def distinct(self, labels: Numbers, k: int) -> int:
        return int((self.sum(np.bincount(labels, minlength=k)) > 0).sum())

    def probabilities(self) -> Numbers:
        own = np.ones(self.n) if self.weights is None else self.weights.astype(np.float64)
        whole = np.zeros(self.total)
        whole[self.first : self.first + self.n] = own
        whole = self.sum(whole)
        return whole / whole.sum()  # type: ignore[no-any-return]

    def farthest(self, step: Pass, centers: Numbers, count: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        own = super().farthest(step, centers, count)
        parts = list(zip(*self.ring.gather_objects(own), strict=True))
        distances, rows, labels, weights = (np.concatenate(part) for part in parts)
        order = np.argsort(-distances, kind="stable")[:count]
        return distances[order], rows[order], labels[order], weights[order]

    def spread(self, k: int, generator: np.random.RandomState) -> Numbers:
        trials = 2 + int(math.log(k))
        weights = np.ones(self.n) if self.weights is None else self.weights.astype(np.float64)
        masses = self.ring.gather_objects(float(weights.sum()))
        chosen = [int(self._pick(np.array([generator.random_sample()]), weights, masses)[0])]
        nearest = self._distances(self.rows(chosen))[:, 0]
        for uniforms in generator.uniform(size=(k - 1, trials)):
            pulls = weights * nearest
            candidates = self._pick(uniforms, pulls, self.ring.gather_objects(float(pulls.sum())))
            closer = np.minimum(self._distances(self.rows(candidates)), nearest[:, None])
            best = int(np.argmin(self.sum(weights @ closer)))
            chosen.append(int(candidates[best]))
            nearest = closer[:, best]
        return np.array(chosen)

    def _distances(self, rows: Numbers) -> Numbers:
        x = np.asarray(cast(self.x, self.dtype.name)) if self.n else np.empty((0, self.d), self.dtype)
        return cdist(unit(x) if self.normalize else x, rows, metric="sqeuclidean").astype(np.float64)  # type: ignore[no-any-return]

    def _pick(self, uniforms: Numbers, pulls: Numbers, masses: list[float]) -> Numbers:
        """The numbers of the rows at these shares of the summed pulls."""
        ends = np.cumsum(masses)
        places = np.asarray(uniforms) * ends[-1]
        holders = np.minimum(np.searchsorted(ends, places, side="right"), len(ends) - 1)
        while any(self.counts[h] == 0 for h in holders):  # nothing has any pull, or round-off
            holders = np.array([h if self.counts[h] else (h - 1) % len(ends) for h in holders])
        index = np.zeros(len(places))
        own = holders == self.ring.rank
        if own.any():
            before = ends[self.ring.rank] - masses[self.ring.rank]
            at = np.searchsorted(np.cumsum(pulls), places[own] - before, side="right")
            index[own] = self.first + np.minimum(at, self.n - 1)
        return self.sum(index).astype(np.int64)


class KMeans(kmeans.KMeans):
    """`nearfar.KMeans` of rows that are spread over the processes of a group.

    Every rank calls `fit` with its own rows. One iteration is the fused pass over these, and one exchange of K (D + 1)
    numbers. All ranks end with the same centroids, those that one process finds for all rows, in the order of ranks,
    from the same start, up to the round-off of sums.

    Parameters
    ----------
    n_clusters, init, n_init, max_iter, tol, spherical, random_state, verbose
        As `nearfar.KMeans`, the same on every rank. `random_state` None, or a RandomState: rank 0's, for all.
    group : torch.distributed process group, optional
        Default: all processes.

    Attributes
    ----------
    cluster_centers_, inertia_, n_iter_
        Of all rows: the same on every rank.
    labels_ : int64 array
        Of this rank's rows.

    Raises
    ------
    RuntimeError
        No process group; or another rank has refused its arguments.
    ValueError, TypeError
        As `nearfar.KMeans`.

    Notes
    -----
    A rank may have no rows. `fit` communicates; everything after it (`predict`, `transform`, `score`) is about the rows
    it is given and does not. ``init="random"``, and weights with it, take 8 bytes per row of all ranks. Arrays on the
    CPU, as `nearfar.KMeans`; with nccl the K (D + 1) numbers travel through the GPUs.
    """

    _least_rows = 0

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        spherical: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        group: Any = None,
    ) -> None:
        super().__init__(
            n_clusters,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            spherical=spherical,
            random_state=random_state,
            verbose=verbose,
        )
        self.group = group

    def _data(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Data:
        if not reset:
            return super()._data(X, sample_weight)
        ring = Ring(self.group)

        def check() -> tuple[tuple[Array, Numbers | None], list[int], dict[str, Any]]:
            x = self._points(X, reset=True)
            if is_torch(x) and x.is_cuda:
                raise NotImplementedError("X: not implemented on CUDA; pass arrays on the CPU")
            weights = weights_of(sample_weight, x) if len(x) or sample_weight is None else np.empty(0)
            options = {name: value for name, value in self.get_params().items() if name not in ("group", "verbose")}
            if not isinstance(self.random_state, int):
                options["random_state"] = None
            if not isinstance(self.init, str):  # an array: the same values, whatever they are in
                options["init"] = (to_numpy(self.init) if is_torch(self.init) else np.asarray(self.init)).tolist()
            options |= {"columns": x.shape[1], "sample_weight": weights is not None, "dtype": str(x.dtype)}
            return (x, weights), [len(x)], options

        (x, weights), counts = ring.meet(check)
        return Shared(ring, x, weights, bool(self.spherical), [own for own, *_ in counts])

    def _generator_of(self, data: Data) -> np.random.RandomState:
        if isinstance(self.random_state, int) or not isinstance(data, Shared):
            return check_random_state(self.random_state)
        generator = check_random_state(self.random_state)
        return np.random.RandomState(data.ring.gather_objects(int(generator.randint(2**31 - 1)))[0])
