"""Lower bounds on mutual information from the critic of contrastive learning, without the matrix of its scores.

With N pairs and the critic f_ij = <q_i, k_j> / temperature each bound is a mean of the positives' scores less a
log-sum-exp over pairs: per row (InfoNCE), or of all pairs i != j (Donsker-Varadhan, NWJ).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import Array, cast, check_matrix, check_points, check_shape, compute_dtype, is_torch
from .gradients import NOTHING, Call, Part, run
from .losses.softmax import info_nce_loss, scale_part

_ESTIMATORS = ("infonce", "nwj", "dv")


def mi_lower_bound(
    query: Array, key: Array, *, temperature: Any, estimator: str = "infonce", normalize: bool = True
) -> Any:
    """A lower bound on the mutual information of paired samples, in nats.

    With :math:`f_{ij} = \\langle q_i, k_j\\rangle / \\tau`,

    .. math::
        \\text{infonce} &= \\log N - L_{\\text{InfoNCE}}
            = \\frac1N \\sum_i \\Bigl(f_{ii} - \\log\\frac1N\\sum_j e^{f_{ij}}\\Bigr) \\\\
        \\text{dv} &= \\frac1N \\sum_i f_{ii} - \\log \\frac{1}{N(N-1)} \\sum_{i \\ne j} e^{f_{ij}} \\\\
        \\text{nwj} &= \\frac1N \\sum_i f_{ii} - \\frac{1}{e\\,N(N-1)} \\sum_{i \\ne j} e^{f_{ij}}

    Parameters
    ----------
    query, key : array (N, D)
        Row i of one was drawn together with row i of the other; rows are independent of each other. N >= 2.
    temperature : positive number or 0-d array
    estimator : {"infonce", "nwj", "dv"}
    normalize : bool
        Bring rows to unit norm first. False takes dot products as they are, so that any critic that is an inner product
        of features can be judged.

    Returns
    -------
    scalar
        float32 for half precisions, else the inputs' dtype. For torch differentiable in query, key and temperature, so
        it can be maximised.

    Raises
    ------
    ValueError
        An unknown estimator, fewer than two rows, shapes that do not match, a temperature that is not positive.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    Every value bounds the mutual information from below in expectation, for every critic ("dv" only up to the bias of
    a log of a sample mean, which makes it too large for few rows). "infonce" is never more than log N and has little
    variance; "nwj" and "dv" have no ceiling but a variance that grows as the exponential of the information. The best
    critic is log p(x|y)/p(x) plus a constant: any for "dv", 1 for "nwj" (whose value is below "dv" for every other
    one), any function of the query for "infonce". A tighter bound is not a better representation (Tschannen et
    al., 2020).

    Poole, Ozair, van den Oord, Alemi, Tucker: On Variational Bounds of Mutual Information, 2019; Nguyen, Wainwright,
    Jordan, 2010 (nwj); Donsker, Varadhan, 1983 (dv).

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> views = np.eye(16)
    >>> bool(abs(nf.mi_lower_bound(views, views, temperature=0.01) - np.log(16)) < 1e-9)
    True
    >>> round(float(nf.mi_lower_bound(views, views, temperature=1.0, estimator="dv")), 6)
    1.0
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator: expected 'infonce', 'nwj' or 'dv', got {estimator!r}")
    check_points(query=query, key=key)
    check_matrix(query, "query")
    check_shape(key, "key", tuple(query.shape), "query")
    n = query.shape[0]
    if n < 2:
        raise ValueError(f"query: expected at least two rows, got {n}")
    if temperature is None:
        raise TypeError("temperature: expected a number, got NoneType")
    if estimator == "infonce":
        return math.log(n) - info_nce_loss(query, key, temperature=temperature, normalize=normalize)
    # Without the positive in its own denominator a row's loss is log sum_{j != i} exp(f_ij) - f_ii.
    scale = scale_part(temperature, None, 1.0, query)
    parts = (Part(("query",), (query,)), Part(("key",), (key,)), NOTHING, NOTHING, scale)
    loss = run(Call("softmax", parts, ("rows", "none", bool(normalize), False, 0), scalar=False, extra=(None,)))
    positive = _positive_scores(query, key, normalize) * cast(scale.value(), compute_dtype(query))
    log_mean = _log_sum_exp(loss + positive) - math.log(n * (n - 1))
    if estimator == "dv":
        return positive.mean() - log_mean
    exp = log_mean - 1
    return positive.mean() - (exp.exp() if is_torch(exp) else np.exp(exp))


def _positive_scores(query: Array, key: Array, normalize: bool) -> Array:
    """<q_i, k_i> in the dtype that computes."""
    query, key = (cast(a, compute_dtype(a)) for a in (query, key))
    if normalize:
        query, key = unit_rows(query), unit_rows(key)
    return (query * key).sum(-1)


def unit_rows(x: Array) -> Array:
    """Rows of unit norm; a zero row stays zero."""
    if is_torch(x):
        from .formulas import unit

        return unit(x)
    x = x / np.maximum(np.abs(x).max(-1, keepdims=True), np.finfo(x.dtype).tiny)  # no square overflows
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(x.dtype).tiny)


def _log_sum_exp(x: Array) -> Any:
    if is_torch(x):
        return x.logsumexp(0)
    most = x.max()
    return most + np.log(np.exp(x - most).sum()) if np.isfinite(most) else most
