"""Losses that are functions of log-sum-exps by label: HCL, multi-similarity, circle, proxy anchor.

One operation (`loss_operations.labelled_lse`) sums, for every row, over the columns of its own label and over the
others, each with its own map of the scores; what is left is O(N) arithmetic, the `Tail` of the call. Nothing of size
N x N is stored.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from ..arrays import Array, check_matrix, check_points, check_shape, concatenate, finite, is_torch, namespace
from ..gradients import NOTHING, Call, Part, Tail, differentiable, shows
from .softmax import check_labelled, check_reduction, scale_part

# ---- arithmetic of both kinds ----------------------------------------------------------------------------------------


def library(array: Array) -> Any:
    """torch for its tensors, else NumPy, whose functions hand CuPy arrays on."""
    return sys.modules["torch"] if is_torch(array) else np


def _softplus(x: Array) -> Array:
    """log(1 + e^x), of -inf and NaN too."""
    if is_torch(x):
        return sys.modules["torch"].nn.functional.softplus(x, threshold=40)
    with np.errstate(invalid="ignore"):  # NaN is an answer here
        return np.logaddexp(x, 0.0)


def _sigmoid(x: Any) -> Any:
    """The derivative of softplus, for NumPy."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def constants(like: Array, *values: Any) -> Array:
    """In memory of the CPU, whose numbers the launch of a kernel carries: a GPU would have to be waited for."""
    if is_torch(like):
        return sys.modules["torch"].from_numpy(np.array(values, np.float64))
    return np.array(values, np.float64)


def numbers(like: Array, n: int) -> Array:
    """0 to n - 1 beside the points."""
    if is_torch(like):
        return sys.modules["torch"].arange(n, device=like.device)
    return namespace(like).arange(n)


def reduced(loss: Array, reduction: str, count: Any) -> Array:
    """The losses of rows, their sum, or that over `count`."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count


def linear(slope: float, shift: float) -> tuple[float, float, float, float]:
    """slope (s - shift) in the constants of a map: sign, q, r, shift."""
    return math.copysign(1.0, slope), 0.0, abs(slope), shift


# ---- HCL -------------------------------------------------------------------------------------------------------------


@shows(temperature=0.5)
@differentiable
def hcl_loss(
    z1: Array,
    z2: Array,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """HCL: NT-Xent with hard negatives weighted up and false ones taken out (Robinson et al.).

    With ``z = [z1; z2]``, ``p(i)`` the other view of i, :math:`s_{ij} = \\langle z_i, z_j\\rangle / \\tau`, ``D(i)``
    all rows but i and p(i), and M = 2N - 2 their number,

    .. math:: R_i = \\frac{\\sum_{j \\in D(i)} e^{(1 + \\beta) s_{ij}}}{\\frac1M \\sum_{j \\in D(i)} e^{\\beta s_{ij}}},
              \\qquad
              G_i = \\max\\Bigl(\\frac{R_i - \\tau^+ M e^{s_{i\\,p(i)}}}{1 - \\tau^+},\\; M e^{-1/\\tau}\\Bigr),
              \\qquad
              L_i = \\log\\frac{e^{s_{i\\,p(i)}} + G_i}{e^{s_{i\\,p(i)}}},

    as the authors' code computes it (the pseudo-code of the paper differs), but in logarithms, so that no temperature
    overflows.

    Parameters
    ----------
    z1, z2 : array (N, D)
        Two views of the same N items.
    temperature : positive number or 0-d array, optional
        Default 0.5. Differentiable when it is a tensor that requires a gradient, also through the bound of G.
    logit_scale : positive number or 0-d array, optional
        1 / temperature, instead of `temperature`.
    beta : number, at least 0
        How much hard negatives are preferred; 0: not at all.
    tau_plus : number in [0, 1)
        The share of negatives that are of the anchor's own class. With ``beta=0, tau_plus=0`` this is NT-Xent.
    reduction : {"mean", "sum", "none"}
        Over the 2N anchors; "none" gives (2N,): the anchors of `z1`, then those of `z2`.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (2N,)
        float32 for half precisions, else the inputs' dtype. No rows: 0. One item: 0 (there are no negatives).

    Raises
    ------
    ValueError
        Shapes that do not match; a temperature that is not positive; `beta` or `tau_plus` out of range.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    Robinson, Chuang, Sra, Jegelka: Contrastive Learning with Hard Negative Samples, 2021. Every row is in every
    denominator, so a NaN makes all losses NaN. Where the bound of G holds, only the positive has a gradient. First and
    second derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.hcl_loss(np.eye(16), np.eye(16), beta=0, tau_plus=0), 6))
    1.621378
    """
    check_points(z1=z1, z2=z2)
    check_matrix(z1, "z1")
    check_shape(z2, "z2", z1.shape, "z1")
    check_reduction(reduction)
    beta = finite(beta, "beta", 0.0)
    tau_plus = finite(tau_plus, "tau_plus", 0.0)
    if tau_plus >= 1:
        raise ValueError(f"tau_plus: expected a number below 1, got {tau_plus}")
    scale = scale_part(temperature, logit_scale, 0.5, z1)
    n = z1.shape[0]
    items = numbers(z1, n)
    return Call(
        "labelled_lse",
        (Part(("z1", "z2"), (z1, z2)), NOTHING, scale),
        (beta / (1 + beta), normalize),
        scalar=reduction != "none",
        extra=(concatenate((items, items)), constants(z1, linear(1, 0), linear(1 + beta, 0))),
        tail=_hcl_tail(2 * n - 2, tau_plus, reduction),
    )


def _hcl_tail(negatives: int, tau_plus: float, reduction: str) -> Tail:
    log_m = math.log(negatives) if negatives > 0 else -math.inf
    log_tau = math.log(tau_plus) if tau_plus > 0 else -math.inf

    def ratios(rows: Array, scale: Any) -> tuple[Array, Array, Array]:
        """log G_i / e^{positive}; where it is the bound; and log tau_plus M e^{positive} / R_i."""
        lib = library(rows)
        positive, log_sum, log_weights = rows.T
        gain = log_sum - log_weights - positive
        false = log_tau - gain
        none = false >= 0  # left after false ones are taken out; NaN goes on
        false = lib.where(none, -1.0, false)
        estimate = gain + lib.log(-lib.expm1(false)) + (log_m - math.log1p(-tau_plus))
        bound = log_m - scale - positive
        bounded = none | (estimate < bound)
        return lib.where(bounded, bound, estimate), bounded, false

    def value(rows: Array, scale: Any) -> Array:
        # A single item has no negatives: its loss is 0, and NaN if its positive is.
        loss = _softplus(ratios(rows, scale)[0]) if negatives > 0 else rows[:, 0] * 0
        return reduced(loss, reduction, max(rows.shape[0], 1))

    def slopes(rows: Array, scale: Any) -> tuple[Array, Any]:
        if negatives <= 0:
            return np.zeros_like(rows), 0.0
        log_ratio, bounded, false = ratios(rows, scale)
        weight = _sigmoid(log_ratio) / (max(len(rows), 1) if reduction == "mean" else 1)
        pull = weight * np.where(bounded, 0, -1 / np.expm1(false))
        return np.stack([np.where(bounded, -weight, -pull), pull, -pull], 1), -(weight * bounded).sum()

    return Tail(value, slopes)


# ---- multi-similarity ------------------------------------------------------------------------------------------------


@differentiable
def multi_similarity_loss(
    embeddings: Array,
    labels: Array,
    *,
    alpha: float = 2,
    beta: float = 50,
    base: float = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """Multi-similarity: positives pulled and negatives pushed, each by how far it is beyond a base (Wang et al.).

    With :math:`s_{ij} = \\langle x_i, x_j\\rangle`, ``P(i)`` the other rows of i's label and ``N(i)`` those of other
    labels,

    .. math:: L_i = \\frac1\\alpha \\log\\Bigl(1 + \\sum_{j \\in P(i)} e^{-\\alpha (s_{ij} - \\lambda)}\\Bigr)
                  + \\frac1\\beta \\log\\Bigl(1 + \\sum_{j \\in N(i)} e^{\\beta (s_{ij} - \\lambda)}\\Bigr).

    All pairs: the paper's pair mining is not inside.

    Parameters
    ----------
    embeddings : array (N, D)
    labels : integer array (N,)
        Of the kind of the embeddings, any integer dtype.
    alpha, beta : positive number
        Sharpness for positives and for negatives.
    base : number
        The similarity :math:`\\lambda` that parts both.
    reduction : {"mean", "sum", "none"}
        The mean is over all N anchors, as in the paper.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the embeddings' dtype. No positives or no negatives: that term is 0. No
        rows: 0.

    Raises
    ------
    ValueError
        Shapes that do not match; `alpha` or `beta` not positive.
    TypeError
        Arguments that are not arrays, of different kinds, embeddings not floating, labels not integers.

    Notes
    -----
    Wang, Han, Huang, Dong, Scott: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, 2019.
    Every row is a positive or a negative of every other one, so a NaN makes all losses NaN. First and second
    derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.multi_similarity_loss(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1])), 6))
    0.156631
    """
    check_labelled(embeddings, labels)
    check_reduction(reduction)
    alpha = finite(alpha, "alpha", 0.0, strict=True)
    beta = finite(beta, "beta", 0.0, strict=True)
    base = finite(base, "base")

    def value(rows: Array, scale: Any) -> Array:
        pulls, pushes = _softplus(rows).T
        return reduced(pulls / alpha + pushes / beta, reduction, max(rows.shape[0], 1))

    def slopes(rows: Array, scale: Any) -> tuple[Array, Any]:
        return _sigmoid(rows) / (alpha, beta) / (max(len(rows), 1) if reduction == "mean" else 1), 0.0

    maps = constants(embeddings, linear(-alpha, base), linear(beta, base))
    return _one_set(embeddings, labels, maps, normalize, reduction, Tail(value, slopes))


def _one_set(embeddings: Array, labels: Array, maps: Array, normalize: bool, reduction: str, tail: Tail) -> Call:
    """Every row against all others; dot products as they are."""
    return Call(
        "labelled_lse",
        (Part(("embeddings",), (embeddings,)), NOTHING, scale_part(None, None, 1.0, embeddings)),
        (None, normalize),
        scalar=reduction != "none",
        extra=(labels, maps),
        tail=tail,
    )


# ---- circle ----------------------------------------------------------------------------------------------------------


@differentiable
def circle_loss(
    embeddings: Array,
    labels: Array,
    *,
    m: float = 0.4,
    gamma: float = 80,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """Circle loss: every similarity is weighted by how far it is from its optimum (Sun et al.).

    With :math:`s_{ij} = \\langle x_i, x_j\\rangle`, ``P(i)`` the other rows of i's label and ``N(i)`` those of other
    labels,

    .. math:: L_i = \\log\\Bigl(1 + \\sum_{j \\in N(i)} e^{\\gamma \\alpha^n_{ij} (s_{ij} - m)}
                    \\sum_{j \\in P(i)} e^{-\\gamma \\alpha^p_{ij} (s_{ij} - 1 + m)}\\Bigr),
              \\qquad \\alpha^p = [1 + m - s]_+, \\quad \\alpha^n = [s + m]_+.

    The weights :math:`\\alpha` are constants to every derivative, as in the paper: the gradient is not that of the
    whole formula, and second derivatives are those of the formula with the weights held fixed.

    Parameters
    ----------
    embeddings : array (N, D)
    labels : integer array (N,)
        Of the kind of the embeddings, any integer dtype.
    m : number
        The relaxation margin; the paper uses 0.25 to 0.4.
    gamma : positive number
        The scale.
    reduction : {"mean", "sum", "none"}
        The mean is over the anchors that have at least one positive.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the embeddings' dtype. An anchor without positives or without negatives has
        loss 0; no anchor with a positive: 0.

    Raises
    ------
    ValueError
        Shapes that do not match; `gamma` not positive; `m` not finite.
    TypeError
        As `multi_similarity_loss`.

    Notes
    -----
    Sun, Cheng, Zhang, Zhang, Zheng, Wang, Wei: Circle Loss: A Unified Perspective of Pair Similarity Optimization,
    2020. pytorch-metric-learning has the same losses of anchors (to 2e-9: it takes log(1 + e^x) for x from 20 on), but
    its default mean leaves out those that are exactly 0.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.eye(2)[[0, 0, 1, 1]]
    >>> float(round(nf.circle_loss(x, np.array([0, 1, 0, 1]), gamma=1), 6))
    2.120995
    """
    check_labelled(embeddings, labels)
    check_reduction(reduction)
    m = finite(m, "m")
    gamma = finite(gamma, "gamma", 0.0, strict=True)

    def value(rows: Array, scale: Any) -> Array:
        positives, negatives = rows.T
        paired = positives != -math.inf
        # Without a positive 0, whatever the negatives are.
        both = library(rows).where(paired, positives + negatives, -math.inf)
        return reduced(_softplus(both), reduction, paired.sum().clip(1))

    def slopes(rows: Array, scale: Any) -> tuple[Array, Any]:
        paired = rows[:, 0] != -math.inf
        weight = np.where(paired, _sigmoid(rows[:, 0] + rows[:, 1]), 0)
        weight = weight / (paired.sum().clip(1) if reduction == "mean" else 1)
        return np.stack([weight, weight], 1), 0.0

    maps = constants(embeddings, (-1.0, -gamma, gamma * (1 + m), 1 - m), (1.0, gamma, gamma * m, m))
    return _one_set(embeddings, labels, maps, normalize, reduction, Tail(value, slopes))


# ---- proxy anchor ----------------------------------------------------------------------------------------------------


@differentiable
def proxy_anchor_loss(
    embeddings: Array,
    labels: Array,
    proxies: Array,
    *,
    margin: float = 0.1,
    alpha: float = 32,
    normalize: bool = True,
) -> Call:
    """Proxy anchor: each class's proxy against all embeddings of the batch (Kim et al.).

    With :math:`s_{ip} = \\langle x_i, p\\rangle`, P the C proxies, :math:`P^+` those with embeddings of their class,

    .. math:: \\frac1{|P^+|} \\sum_{p \\in P^+} \\log\\Bigl(1 + \\sum_{i: y_i = p} e^{-\\alpha (s_{ip} - \\delta)}
              \\Bigr) +
              \\frac1{|P|} \\sum_{p \\in P} \\log\\Bigl(1 + \\sum_{i: y_i \\ne p} e^{\\alpha (s_{ip} + \\delta)}\\Bigr).

    Parameters
    ----------
    embeddings : array (N, D)
    labels : integer array (N,)
        Classes in [0, C), of the kind of the embeddings, any integer dtype.
    proxies : array (C, D)
        One for each class, C >= 1.
    margin : number
        :math:`\\delta`.
    alpha : positive number
        The scale.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar
        float32 for half precisions, else the embeddings' dtype. No class present: the first term is 0. No embeddings:
        0.

    Raises
    ------
    ValueError
        Shapes that do not match; no proxies; a label out of range (on a GPU, which is not waited for, the loss is NaN);
        `alpha` not positive.
    TypeError
        As `multi_similarity_loss`.

    Notes
    -----
    Kim, Kim, Cho, Kwak: Proxy Anchor Loss for Deep Metric Learning, 2020. Sums run over the batch for each proxy, not
    over proxies for each embedding. First and second derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.proxy_anchor_loss(np.eye(3), np.arange(3), np.eye(3)), 6))
    3.913323
    """
    check_labelled(embeddings, labels)
    check_points(embeddings=embeddings, proxies=proxies)
    check_matrix(proxies, "proxies")
    check_shape(proxies, "proxies", (proxies.shape[0], embeddings.shape[1]), "embeddings")
    if proxies.shape[0] == 0:
        raise ValueError("proxies: expected at least one row")
    margin = finite(margin, "margin")
    alpha = finite(alpha, "alpha", 0.0, strict=True)

    def shares(rows: Array) -> tuple[Any, int]:
        """How many proxies each term is a mean over."""
        return (rows[:, 0] != -math.inf).sum().clip(1), rows.shape[0]

    def value(rows: Array, scale: Any) -> Array:
        with_positives, classes = shares(rows)
        pulls, pushes = _softplus(rows).sum(0)
        return pulls / with_positives + pushes / classes

    def slopes(rows: Array, scale: Any) -> tuple[Array, Any]:
        return _sigmoid(rows) / shares(rows), 0.0

    maps = constants(embeddings, linear(-alpha, margin), linear(alpha, -margin))
    return Call(
        "labelled_lse",
        (
            Part(("proxies",), (proxies,)),
            Part(("embeddings",), (embeddings,)),
            scale_part(None, None, 1.0, embeddings),
        ),
        (None, normalize),
        extra=(labels, maps),
        tail=Tail(value, slopes),
    )
