"""Losses of classes: every row of the class a positive (SupCon), or one pair a class (N-pairs)."""

from __future__ import annotations

from typing import Any

from ..arrays import (
    Array,
    check_device,
    check_matrix,
    check_memory,
    check_points,
    check_shape,
    dtype_name,
    finite,
    kind_of,
)
from ..gradients import Call, Part, differentiable, shows
from .softmax import check_labels, check_reduction, scale_part


def _check_mask(mask: Array, n: int, like: Array) -> None:
    """(n, n) booleans of the kind and device of the points."""
    kind, wanted = kind_of(mask, "positive_mask"), kind_of(like, "embeddings")
    if kind != wanted:
        raise TypeError(f"positive_mask: expected a {wanted} array to match embeddings, got {kind}")
    if dtype_name(mask) != "bool":
        raise TypeError(f"positive_mask: expected dtype bool, got {dtype_name(mask)}")
    check_shape(mask, "positive_mask", (n, n), "embeddings")
    if kind == "numpy":
        check_memory(mask, "positive_mask")
    elif str(mask.layout) != "torch.strided":
        raise TypeError(f"positive_mask: expected a dense tensor, got layout {mask.layout}")
    check_device(mask, "positive_mask", like, "embeddings")


@shows(temperature=0.1)
@differentiable
def sup_con_loss(
    embeddings: Array,
    labels: Array | None = None,
    *,
    positive_mask: Array | None = None,
    temperature: Any = None,
    logit_scale: Any = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """Supervised contrastive loss: all rows of an anchor's class are its positives.

    With :math:`s_{ij} = \\langle z_i, z_j\\rangle / \\tau` and P(i) the positives of i, itself not among them,

    .. math:: L_i = -\\frac{1}{|P(i)|}\\sum_{p \\in P(i)} s_{ip} + \\log\\sum_{j \\ne i} e^{s_{ij}}.

    Scores are symmetric, so each unordered pair is computed once; positives cost O(N D), not a matrix of pairs.

    Parameters
    ----------
    embeddings : array (N, D) or (N, V, D)
        Rows, or V views of each of N items: an anchor is one view of one item, with the label of the item. float16,
        bfloat16 (torch), float32 or float64.
    labels : integer array (N,), optional
        Items of the same label are positives of each other. Without labels and `positive_mask`, which needs V views,
        the views of an item are: with V = 2 that is NT-Xent.
    positive_mask : boolean array (N, N), optional
        Instead of `labels`: item j is a positive of item i. Need not be symmetric; the diagonal is ignored (the views
        of one item are always positives of each other). It is read where it lies, with any strides.
    temperature : positive number or 0-d array, optional
        Default 0.1. Differentiable when it is a tensor that requires a gradient. No other factor is hidden in the loss.
    logit_scale : positive number or 0-d array, optional
        The multiplier 1 / temperature, instead of `temperature`.
    reduction : {"mean", "sum", "none"}
        The mean is over the anchors that have a positive.
    normalize : bool
        Bring rows to unit norm first. A zero row stays zero and gets zero gradient.

    Returns
    -------
    scalar or array of shape (N,) or (N, V)
        float32 for half precisions, else the inputs' dtype. An anchor without a positive is skipped: it counts in no
        mean and is 0 with reduction "none", but is in the denominators of the others. No anchor with a positive: 0
        with zero gradient.

    Raises
    ------
    ValueError
        Shapes that do not match; both `labels` and `positive_mask`; neither of them for (N, D).
    TypeError
        Arguments that are not arrays, of different kinds, labels that are not integers, a mask that is not boolean.

    Notes
    -----
    Khosla et al.: Supervised Contrastive Learning, 2020, their L_out (the mean outside of the logarithm). The authors'
    code multiplies it by temperature / base_temperature, 0.07 by default, which changes the value and the gradient by
    the temperature; this function does not. pytorch-metric-learning's mean is over anchors of nonzero loss. Positives
    other than p stay in the denominator, so with k positives the loss is at least log k.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> classes = np.repeat(np.arange(4), 4)
    >>> float(round(nf.sup_con_loss(np.eye(4)[classes], classes, temperature=1.0), 6))
    2.003445
    """
    check_points(embeddings=embeddings)
    if embeddings.ndim == 3:
        if 0 in embeddings.shape[1:]:
            raise ValueError(f"embeddings: expected views and columns, got shape {tuple(embeddings.shape)}")
    else:
        check_matrix(embeddings, "embeddings")
        if labels is None and positive_mask is None:
            raise ValueError(f"labels: needed for embeddings of shape {tuple(embeddings.shape)}, or positive_mask")
    check_reduction(reduction)
    n = embeddings.shape[0]
    labels = check_labels(labels, n, embeddings, "labels", "embeddings")
    if positive_mask is not None:
        if labels is not None:
            raise ValueError("positive_mask: give labels or positive_mask, not both")
        _check_mask(positive_mask, n, embeddings)
    scale = scale_part(temperature, logit_scale, 0.1, embeddings)
    return Call(
        "sup_con",
        (Part(("embeddings",), (embeddings,)), scale),
        (reduction, bool(normalize)),
        scalar=reduction != "none",
        extra=(labels, positive_mask),
    )


@differentiable
def n_pairs_loss(anchor: Array, positive: Array, *, l2_reg: float = 0.0, reduction: str = "mean") -> Call:
    """N-pairs: one anchor and one positive of each of N classes, the positives of the others as negatives.

    .. math:: L_i = \\log\\Bigl(1 + \\sum_{j \\ne i} e^{\\langle a_i, p_j\\rangle - \\langle a_i, p_i\\rangle}\\Bigr)
              + \\frac{\\lambda}{2}\\bigl(\\lVert a_i\\rVert^2 + \\lVert p_i\\rVert^2\\bigr)

    Dot products are not normalised and have no temperature; `l2_reg` is what keeps norms from growing.

    Parameters
    ----------
    anchor, positive : array (N, D)
        Row i of one is the positive of row i of the other; no two rows of one class.
    l2_reg : number
        lambda, the weight of the mean squared norm of all 2N rows. Not negative.
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    scalar or array (N,)
        No rows: 0. One row: the penalty alone.

    Raises
    ------
    ValueError, TypeError
        As `info_nce_loss`; a negative `l2_reg`.

    Notes
    -----
    Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective, 2016. pytorch-metric-learning has this
    value with ``DotProductSimilarity(normalize_embeddings=False)``, which is not its default, and
    ``LpRegularizer(p=2, power=2)`` of weight lambda; TensorFlow's npairs_loss has half the penalty. Without it this is
    `info_nce_loss` with ``logit_scale=1, normalize=False``.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.n_pairs_loss(np.eye(4), np.eye(4)), 6))
    0.743668
    >>> float(round(nf.n_pairs_loss(np.eye(4), np.eye(4), l2_reg=0.1), 6))
    0.843668
    """
    check_points(anchor=anchor, positive=positive)
    check_matrix(anchor, "anchor")
    check_shape(positive, "positive", anchor.shape, "anchor")
    check_reduction(reduction)
    l2_reg = finite(l2_reg, "l2_reg", 0.0)
    parts = (Part(("anchor",), (anchor,)), Part(("positive",), (positive,)))
    return Call("n_pairs", parts, (l2_reg, reduction), scalar=reduction != "none")
