"""Nearest neighbours, by brute force and fused: no N x M matrix."""

from __future__ import annotations

from . import operations
from .arrays import Array, check_matrix, check_points, integer, is_torch
from .distances import metric_of


def knn(
    query: Array,
    reference: Array | None = None,
    k: int = 1,
    *,
    metric: str = "euclidean",
    exclude_self: bool | None = None,
) -> tuple[Array, Array]:
    """The k nearest rows of `reference` for every row of `query`.

    Parameters
    ----------
    query : array (N, D)
    reference : array (M, D), optional
        Without it: query against itself without itself.
    k : int
        1 <= k <= M, or M - 1 when rows are left out of their own neighbours.
    metric : {"euclidean", "sqeuclidean", "cosine", "dot"}
        For "dot" the largest products are the nearest, in descending order.
    exclude_self : bool, optional
        Whether row i of `reference` is left out for row i of `query`. Default: without `reference`.

    Returns
    -------
    distances : array (N, k)
        Sorted; float32 for half precisions, else the inputs' dtype. Computed from the differences of the rows.
    indices : int64 array (N, k)
        Ties by lower index. Reference rows with NaN are nobody's neighbours; where fewer than k remain (a query with
        NaN), the index is -1 and the distance NaN.

    Raises
    ------
    ValueError
        Shapes that do not match, an unknown metric, k out of range.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> distances, indices = nf.knn(np.array([[0.0], [1.0], [5.0]]), k=1)
    >>> indices.ravel(), distances.ravel()
    (array([1, 0, 1]), array([1., 1., 4.]))
    """
    map, normalize = metric_of(metric)
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
    if is_torch(query):
        query, reference = query.detach(), None if reference is None else reference.detach()
    y = None if reference is None else reference[None]
    distances, indices = operations.select(query[None], y, map, normalize, exclude_self, k)
    return distances[0], indices[0]
