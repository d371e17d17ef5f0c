"""Losses of independent pairs: a logistic regression on every pair (SigLIP)."""

from __future__ import annotations

from typing import Any

from ..arrays import Array, check_matrix, check_points, check_shape
from ..gradients import Call, Part, differentiable
from .softmax import check_reduction, scalar_part


@differentiable
def siglip_loss(
    image_features: Array,
    text_features: Array,
    logit_scale: Any = 10.0,
    logit_bias: Any = -10.0,
    *,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """SigLIP: every pair on its own, a match on the diagonal and none elsewhere.

    .. math:: L_i = \\sum_j \\log\\bigl(1 + e^{-z_{ij} l_{ij}}\\bigr), \\qquad
              l_{ij} = \\text{logit\\_scale}\\,\\langle x_i, y_j\\rangle + \\text{logit\\_bias}

    with z = 1 on the diagonal, else -1. The mean is over the N rows, not over the N x N pairs. There is no normaliser,
    so value and gradient come from one pass.

    Parameters
    ----------
    image_features, text_features : array (N, D)
        Paired rows. float16, bfloat16 (torch), float32 or float64.
    logit_scale : positive number or 0-d array
        The multiplier, already exponentiated; differentiable when it is a tensor that requires a gradient.
    logit_bias : number or 0-d array
        Differentiable in the same way. At -10 a batch whose cosines are 0 starts with a loss near 10 instead of
        N log 2.
    reduction : {"mean", "sum", "none"}
        "none" gives the sum over j for every row i; their mean is the loss.
    normalize : bool
        Bring rows to unit norm first. A zero row stays zero and gets zero gradient.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the inputs' dtype. No rows: 0.

    Raises
    ------
    ValueError
        Shapes that do not match, a `logit_scale` that is not positive, a `logit_bias` that is not finite.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    Zhai, Mustafa, Kolesnikov, Beyer: Sigmoid Loss for Language Image Pre-Training, 2023; the value of open_clip's
    SigLipLoss for features of unit norm. NaN in a row of `image_features` makes that row's loss NaN; NaN in
    `text_features` all of them. First and second derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.siglip_loss(np.eye(16), np.eye(16)), 6))
    0.693828
    """
    check_points(image_features=image_features, text_features=text_features)
    check_matrix(image_features, "image_features")
    check_shape(text_features, "text_features", image_features.shape, "image_features")
    check_reduction(reduction)
    parts = (
        Part(("image_features",), (image_features,)),
        Part(("text_features",), (text_features,)),
        scalar_part(logit_scale, "logit_scale", image_features),
        scalar_part(logit_bias, "logit_bias", image_features, positive=False),
    )
    return Call("sigmoid", parts, (reduction, bool(normalize)), scalar=reduction != "none")
