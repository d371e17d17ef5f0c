"""Ranking losses: pairs that should be near or far, triplets that should be in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import (
    Array,
    check_device,
    check_matrix,
    check_points,
    check_shape,
    compute_dtype,
    dtype_name,
    finite,
    is_concrete,
    kind_of,
    number,
)
from ..gradients import Call, Part, Tail, differentiable
from .log_sum_exp import library, reduced
from .softmax import check_labelled, check_reduction

_MINING = ("hard", "all", "semihard")


def _check_same(same: Array, n: int, like: Array) -> Array:
    """Booleans (n,) of the points' kind, from such, or from integers or floats that are 0 or 1."""
    kind = kind_of(like, "x1")
    if kind_of(same, "same") != kind:
        raise TypeError(f"same: expected a {kind} array to match x1, got {kind_of(same, 'same')}")
    if tuple(same.shape) != (n,):
        raise ValueError(f"same: expected shape ({n},) to match x1, got {tuple(same.shape)}")
    check_device(same, "same", like, "x1")
    dtype = dtype_name(same)
    if not dtype.startswith(("bool", "int", "uint", "float", "bfloat")):
        raise TypeError(f"same: expected booleans or numbers 0 and 1, got {dtype}")
    if dtype == "bool":
        return same
    drawn = same != 0
    if is_concrete(same) and bool((drawn != same).any()):
        raise ValueError("same: expected 1 for pairs that are the same and 0 for others, got other values")
    return drawn


@differentiable
def contrastive_loss(
    x1: Array, x2: Array, same: Array, *, margin: float = 1.0, reduction: str = "mean", normalize: bool = True
) -> Call:
    """Contrastive loss of pairs (Hadsell, Chopra, LeCun): the same are drawn together, others pushed apart.

    With :math:`d_i = \\lVert x_{1,i} - x_{2,i}\\rVert`,

    .. math:: L_i = s_i\\, d_i^2 + (1 - s_i) \\max(0, m - d_i)^2.

    Parameters
    ----------
    x1, x2 : array (N, D)
        Pairs of rows. float16, bfloat16 (torch), float32 or float64.
    same : array (N,)
        True or 1 for pairs that are the same, False or 0 for others; boolean, integer or floating. No gradient.
    margin : number
        At least 0. Unit rows are at most 2 apart.
    reduction : {"mean", "sum", "none"}
        Over all pairs, also those without loss.
    normalize : bool
        Bring rows to unit norm first. A zero row stays zero and gets zero gradient.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the inputs' dtype; distances are computed in float64 from the differences. No
        pairs: 0. The gradient of a pair at distance 0 is 0.

    Raises
    ------
    ValueError
        Shapes that do not match, a negative margin, `same` with values other than 0 and 1.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    Hadsell, Chopra, LeCun: Dimensionality Reduction by Learning an Invariant Mapping, 2006, without their factor 1/2.
    pytorch-metric-learning's ContrastiveLoss is another: distances are not squared, and same and other pairs are
    averaged apart, each over those with positive loss. First and second derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [0.0]])
    >>> y = np.array([[0.5], [0.25]])
    >>> nf.contrastive_loss(x, y, np.array([1, 0]), normalize=False, reduction="none")
    array([0.25  , 0.5625])
    """
    check_points(x1=x1, x2=x2)
    check_matrix(x1, "x1")
    check_shape(x2, "x2", x1.shape, "x1")
    check_reduction(reduction)
    drawn = _check_same(same, x1.shape[0], x1)
    margin, count = finite(margin, "margin", 0.0), max(x1.shape[0], 1)
    least = float(np.finfo(compute_dtype(x1)).tiny)

    def shortfall(square: Array) -> tuple[Array, Array]:
        """How far others are below the margin, and their distance: not quite 0, where it has no derivative."""
        distance = square.clip(least, None) ** 0.5
        return (margin - distance).clip(0, None), distance

    def value(square: Array, _: Any) -> Array:
        return reduced(library(square).where(drawn, square, shortfall(square)[0] ** 2), reduction, count)

    def slopes(square: Array, _: Any) -> tuple[Array, Any]:
        short, distance = shortfall(square)
        return np.where(drawn, 1.0, -short / distance) / (count if reduction == "mean" else 1), 0.0

    parts = (Part(("x1",), (x1,)), Part(("x2",), (x2,)))
    config = (2.0, "none", bool(normalize))
    return Call("alignment", parts, config, scalar=reduction != "none", tail=Tail(value, slopes))


@differentiable
def triplet_margin_loss(
    anchor: Array,
    positive: Array,
    negative: Array,
    *,
    margin: float = 1.0,
    p: float = 2,
    swap: bool = False,
    reduction: str = "mean",
    normalize: bool = False,
    eps: float = 1e-6,
) -> Call:
    """Triplet loss of given triplets: the values of ``torch.nn.functional.triplet_margin_loss``.

    .. math:: L_i = \\max\\bigl(0,
              \\lVert a_i - p_i + \\epsilon\\rVert_p - \\lVert a_i - n_i + \\epsilon\\rVert_p + m\\bigr)

    Parameters
    ----------
    anchor, positive, negative : array (N, D)
        Row i of the three is a triplet. float16, bfloat16 (torch), float32 or float64.
    margin : number
        Positive.
    p : number
        Of the norm: positive, or inf.
    swap : bool
        The distance to the negative is the smaller one of the anchor's and the positive's (Balntas et al. 2016).
    reduction : {"mean", "sum", "none"}
        Over all triplets, also those without loss.
    normalize : bool
        Bring rows to unit norm first. Off by default, as in torch.
    eps : number
        Added to every difference, as torch does: the norm of equal rows is eps * D^(1/p), not 0, and has the gradient
        of that. At norm 0 the gradient is 0.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the inputs' dtype. No triplets: 0, where torch has NaN.

    Raises
    ------
    ValueError
        Shapes that do not match; margin or p not positive, eps negative.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> a, b = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    >>> float(round(nf.triplet_margin_loss(a, b, a, margin=0.5), 4))
    5.5
    """
    check_points(anchor=anchor, positive=positive, negative=negative)
    check_matrix(anchor, "anchor")
    check_shape(positive, "positive", anchor.shape, "anchor")
    check_shape(negative, "negative", anchor.shape, "anchor")
    check_reduction(reduction)
    margin, eps = finite(margin, "margin", 0.0, strict=True), finite(eps, "eps", 0.0)
    p = number(p, "p")
    if not p > 0:
        raise ValueError(f"p: expected a positive number or inf, got {p}")
    config = (margin, p, bool(swap), eps, reduction, bool(normalize))
    parts = (Part(("anchor",), (anchor,)), Part(("positive",), (positive,)), Part(("negative",), (negative,)))
    return Call("triplet_margin", parts, config, scalar=reduction != "none")


@differentiable
def batch_triplet_loss(
    embeddings: Array,
    labels: Array,
    *,
    margin: float = 0.2,
    mining: str = "hard",
    squared: bool = False,
    soft: bool = False,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """Triplet loss over the triplets of a labelled batch, mined and differentiated without enumerating them.

    A triplet is an anchor a, another row p of its class and a row n of another class. With d the distance,

    .. math:: L_{apn} = \\max(0, d_{ap} - d_{an} + m), \\quad\\text{or softly}\\quad \\log(1 + e^{d_{ap} - d_{an}}).

    Parameters
    ----------
    embeddings : array (N, D)
        float16, bfloat16 (torch), float32 or float64.
    labels : integer array (N,)
        Classes, any integers.
    margin : number
        At least 0. The soft form has none.
    mining : {"hard", "all", "semihard"}
        Which triplets count:

        - "hard": for every anchor one, with its farthest positive (the largest d_ap) and its nearest negative (the
          smallest d_an).
        - "semihard": for every anchor and positive one, with the closest negative that is farther than the positive
          (the smallest d_an > d_ap); where there is none, with the farthest negative. TensorFlow Addons' definition.
        - "all": every triplet.
    squared : bool
        Squared distances in place of distances.
    soft : bool
        The soft form (Hermans et al.).
    reduction : {"mean", "sum", "none"}
        "mean": over the triplets that count, for "all" those with positive loss. "none": (N,), the sum over the
        triplets of each anchor.
    normalize : bool
        Bring rows to unit norm first. A zero row stays zero and gets zero gradient.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the embeddings' dtype. No valid triplet (one class, every class a single row,
        no rows) or none with positive loss: 0 with zero gradient. Equal distances: the lower index is mined. The
        gradient of a pair at distance 0 is 0. A row with NaN or inf is nobody's positive or negative, and its own
        sum is NaN.

    Raises
    ------
    ValueError
        Shapes that do not match, a negative margin, an unknown mining.
    TypeError
        Arguments that are not arrays or of different kinds, embeddings that are not floating, labels that are not
        integers.

    Notes
    -----
    Memory is O(N D) for "hard" and O(N (D + 128)) for the others. "all" with `soft` has no closed form: its time is
    that of all triplets, its memory is not. The choice of triplets is not differentiated.

    Schroff, Kalenichenko, Philbin: FaceNet, 2015. Hermans, Beyer, Leibe: In Defense of the Triplet Loss for Person
    Re-Identification, 2017.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0], [1.5], [4.0]])
    >>> nf.batch_triplet_loss(x, np.array([0, 0, 1, 1]), normalize=False, reduction="none")
    array([0. , 0.7, 2.2, 0. ])
    """
    check_labelled(embeddings, labels)
    check_reduction(reduction)
    if mining not in _MINING:
        raise ValueError(f"mining: expected 'hard', 'all' or 'semihard', got {mining!r}")
    config = (mining, finite(margin, "margin", 0.0), bool(squared), bool(soft), reduction, bool(normalize))
    parts = (Part(("embeddings",), (embeddings,)),)
    return Call("batch_triplet", parts, config, scalar=reduction != "none", extra=(labels,))
