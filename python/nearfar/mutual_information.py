"""Lower bounds on mutual information from the critic of contrastive learning, without the matrix of its scores.

With N pairs and the critic f_ij = <q_i, k_j> / temperature each bound is a mean of the positives' scores less a
log-sum-exp over pairs: per row (InfoNCE), or of all pairs i != j (Donsker-Varadhan, NWJ).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import Array, check_matrix, check_points, check_shape, is_torch
from .gradients import NOTHING, Call, Outcome, Part, Tail, differentiable
from .losses.log_sum_exp import constants, library, linear, numbers
from .losses.softmax import scale_part

_ESTIMATORS = ("infonce", "nwj", "dv")


@differentiable
def mi_lower_bound(
    query: Array, key: Array, *, temperature: Any, estimator: str = "infonce", normalize: bool = True
) -> Call:
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
        float32 for half precisions, else the inputs' dtype. Differentiable in query, key and temperature, so it can be
        maximised.

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
    check_shape(key, "key", query.shape, "query")
    n = query.shape[0]
    if n < 2:
        raise ValueError(f"query: expected at least two rows, got {n}")
    if temperature is None:
        raise TypeError("temperature: expected a number, got NoneType")
    parts = (Part(("query",), (query,)), Part(("key",), (key,)))
    scale = scale_part(temperature, None, 1.0, query)
    if estimator == "infonce":
        outcome = Outcome(lambda loss: math.log(n) - loss, lambda loss: -1.0)
        config = ("rows", "mean", bool(normalize), True, 0)
        return Call("softmax", (*parts, NOTHING, NOTHING, scale), config, extra=(None,), outcome=outcome)
    # Each pair is a label of its own: a row's sums are over its positive alone, and over all other keys.
    extra = (numbers(query, n), constants(query, linear(1.0, 0.0), linear(1.0, 0.0)))
    tail = _bound(n, estimator == "nwj")
    return Call("labelled_lse", (*parts, scale), (None, bool(normalize)), extra=extra, tail=tail)


def _bound(n: int, exponential: bool) -> Tail:
    """Donsker-Varadhan's bound, or (exponential) NWJ's, of the positives' scores and the rows' other log-sum-exps."""

    def log_mean(others: Array) -> Any:
        return _log_sum_exp(others) - math.log(n * (n - 1))

    def value(rows: Array, scale: Any) -> Any:
        positive, own = rows[:, 0].mean(), log_mean(rows[:, 1])
        return positive - (library(rows).exp(own - 1) if exponential else own)

    def slopes(rows: Array, scale: Any) -> tuple[Array, Any]:
        others = rows[:, 1]
        weight = np.exp(others - _log_sum_exp(others))
        if exponential:
            weight = weight * np.exp(log_mean(others) - 1)
        return np.stack([np.full_like(weight, 1 / n), -weight], 1), 0.0

    return Tail(value, slopes)


def _log_sum_exp(x: Array) -> Any:
    if is_torch(x):
        return x.logsumexp(0)
    most = x.max()
    return most + np.log(np.exp(x - most).sum()) if np.isfinite(most) else most
