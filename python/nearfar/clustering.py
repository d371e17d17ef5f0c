"""k-means: the assignment step."""

from __future__ import annotations

from .arrays import Array, check_matrix, check_points
from .neighbors import select

_METRICS = {"sqeuclidean": ("sqeuclidean", False), "cosine": ("one_minus_dot", True)}


def kmeans_assign(x: Array, centroids: Array, *, metric: str = "sqeuclidean") -> tuple[Array, Array]:
    """The nearest centroid of every row: the encoder of k-means.

    .. math:: \\text{label}_i = \\arg\\min_k \\lVert x_i - c_k\\rVert^2

    Parameters
    ----------
    x : array (N, D)
    centroids : array (K, D)
        K >= 1.
    metric : {"sqeuclidean", "cosine"}

    Returns
    -------
    labels : int64 array (N,)
        Ties by lower index. -1 for a row with NaN.
    distances : array (N,)
        To the assigned centroid, computed from the differences; NaN for a row with NaN. Differentiable for tensors that
        require a gradient.

    Raises
    ------
    ValueError, TypeError
        Unknown metric; no centroids; shapes, dtypes or kinds that do not match.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> nf.kmeans_assign(np.array([[0.0], [4.0]]), np.array([[1.0], [3.0]]))
    (array([0, 1]), array([1., 1.]))
    """
    if not isinstance(metric, str) or metric not in _METRICS:
        raise ValueError(f"metric: expected one of {', '.join(_METRICS)}, got {metric!r}")
    map, normalize = _METRICS[metric]
    check_points(x=x, centroids=centroids)
    check_matrix(x, "x")
    check_matrix(centroids, "centroids")
    if centroids.shape[1] != x.shape[1]:
        raise ValueError(f"centroids: expected {x.shape[1]} columns to match x, got shape {tuple(centroids.shape)}")
    if centroids.shape[0] == 0:
        raise ValueError("centroids: expected at least one row")
    distances, labels = select(map, normalize, x, centroids, False, 1)
    return labels.reshape(-1), distances.reshape(-1)
