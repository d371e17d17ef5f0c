"""Nearest neighbours, exact and fused: no N x M matrix."""

from __future__ import annotations

from typing import Any

from . import operations
from .arrays import Array, autograd, check_matrix, check_points, integer, is_torch
from .distances import metric_of


def knn(
    query: Array,
    reference: Array | None = None,
    k: int = 1,
    *,
    metric: str = "euclidean",
    exclude_self: bool | None = None,
    p: float = 2.0,
    M: Any = None,
) -> tuple[Array, Array]:
    """The k nearest rows of `reference` for every row of `query`.

    Parameters
    ----------
    query : array (N, D)
    reference : array (M, D), optional
        Without it: query against itself without itself.
    k : int
        1 <= k <= M, or M - 1 when rows are left out of their own neighbours.
    metric, p, M
        As in `cdist`. For "dot" the largest products are the nearest, in descending order.
    exclude_self : bool, optional
        Whether row i of `reference` is left out for row i of `query`. Default: without `reference`.

    Returns
    -------
    distances : array (N, k)
        Sorted; float32 for half precisions, else the inputs' dtype. Computed from the differences of the rows. For
        tensors that require a gradient differentiable to any order, in O(N k D) memory.
    indices : int64 array (N, k)
        Ties by lower index. Reference rows with NaN are nobody's neighbours; where fewer than k remain (a query with
        NaN), the index is -1 and the distance NaN.

    Raises
    ------
    ValueError
        Shapes that do not match, an unknown metric, k out of range.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    Up to 2047 queries against many references, threads share the references, which are packed a chunk at a time: extra
    memory is O(N (D + k)). Else they share the queries, and a packed copy of the references is made. Every candidate is
    held against a list of k: k of the order of M costs O(N M k). On the CPU, by any metric of differences of
    coordinates, up to 8 dimensions and from 4096 references on (16384 in 8), both sets are first ordered so that near
    rows are together; references that are too far away, which boxes around runs of them show, are skipped.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> distances, indices = nf.knn(np.array([[0.0], [1.0], [5.0]]), k=1)
    >>> indices.ravel(), distances.ravel()
    (array([1, 0, 1]), array([1., 1., 4.]))
    """
    check_points(query=query, reference=reference)
    check_matrix(query, "query")
    if reference is not None:
        check_matrix(reference, "reference")
        if reference.shape[1] != query.shape[1]:
            raise ValueError(
                f"reference: expected {query.shape[1]} columns to match query, got shape {tuple(reference.shape)}"
            )
    exclude_self = reference is None if exclude_self is None else bool(exclude_self)
    if reference is query:
        reference = None
    rows = query.shape[0] if reference is None else reference.shape[0]
    most = rows - (1 if exclude_self else 0)
    k = integer(k, "k")
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most} (rows to choose from), got {k}")
    chosen = metric_of(metric, p, M, query)
    x, y = chosen.points(query, reference)
    return select(chosen.map, chosen.normalize, x, y, exclude_self, k)


def select(map: str, normalize: bool, x: Array, y: Array | None, exclude_self: bool, k: int) -> tuple[Array, Array]:
    """The k best of y (None: of x) for every row of x: values (n, k), connected to the graph for torch, and indices."""
    if is_torch(x):
        found: tuple[Array, Array] = autograd().select(map, normalize, x, y, exclude_self, k)
        return found
    return operations.select(x, y, map, normalize, exclude_self, k)
