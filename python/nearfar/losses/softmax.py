"""Losses over a softmax of negatives: InfoNCE, CLIP, NT-Xent, DCL.

All are one operation, a masked log-sum-exp of scaled dot products with the positive as its first term, in three modes:
rows of one set against another, both directions at once, and one set against itself with every unordered pair once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import (
    Array,
    check_device,
    check_matrix,
    check_points,
    check_shape,
    dtype_name,
    finite,
    is_torch,
    kind_of,
    widened,
)
from ..gradients import NOTHING, Call, Outcome, Part, differentiable, shows

_REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    """One of mean, sum, none."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def scale_part(temperature: Any, logit_scale: Any, default: Any, like: Array) -> Part:
    """The multiplier of dot products as an operation's input, from whichever of the two was given."""
    if temperature is not None and logit_scale is not None:
        raise ValueError("temperature: give temperature or logit_scale, not both")
    if logit_scale is not None:
        return scalar_part(logit_scale, "logit_scale", like)
    return scalar_part(default if temperature is None else temperature, "temperature", like, inverse=True)


def scalar_part(given: Any, name: str, like: Array, *, inverse: bool = False, positive: bool = True) -> Part:
    """A number or 0-d array as an operation's input, or its inverse; finite, and positive unless told otherwise."""
    if is_torch(given):
        if not is_torch(like):
            raise TypeError(f"{name}: expected a number or a NumPy 0-d array to match the points, got a torch.Tensor")
        if given.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-d array, got shape {tuple(given.shape)}")
        if given.is_complex():
            raise TypeError(f"{name}: expected a real number, got {dtype_name(given)}")
        # The value is checked where it is known without stopping a compiled graph: in the operation. In double, so that
        # a temperature in a low precision is not rounded once more.
        return Part((name,), (1 / given.double() if inverse else given,))
    # Numbers apart: of one that the compiler takes for an input it knows no attributes.
    if not isinstance(given, (int, float)) and getattr(given, "ndim", 0) != 0:
        raise ValueError(f"{name}: expected a number or a 0-d array, got shape {given.shape}")
    value = finite(given, name, *((0.0,) if positive else ()), strict=positive)
    used = 1 / value if inverse else value
    return Part((name,), (used if is_torch(like) else np.float64(used),), -used * used if inverse else 1.0)


def check_labels(labels: Array | None, n: int, like: Array, name: str, like_name: str) -> Array | None:
    """(n,) integers of the kind of the points, or None."""
    if labels is None:
        return None
    kind, wanted = kind_of(labels, name), kind_of(like, like_name)
    if kind != wanted:
        raise TypeError(f"{name}: expected a {wanted} array to match {like_name}, got {kind}")
    check_shape(labels, name, (n,), like_name)
    if not dtype_name(labels).startswith(("int", "uint")):
        raise TypeError(f"{name}: expected an integer dtype, got {dtype_name(labels)}")
    check_device(labels, name, like, like_name)
    return labels


def check_labelled(embeddings: Array, labels: Array) -> None:
    """Embeddings (n, d) and their labels, neither of which is optional."""
    check_points(embeddings=embeddings)
    check_matrix(embeddings, "embeddings")
    kind_of(labels, "labels")  # not None
    check_labels(labels, embeddings.shape[0], embeddings, "labels", "embeddings")


@shows(temperature=0.07)
@differentiable
def info_nce_loss(
    query: Array,
    positive_key: Array,
    negative_keys: Array | None = None,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    ids: Array | None = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """InfoNCE: the cross-entropy of finding each query's positive among its negatives.

    With :math:`s_{ij} = \\langle q_i, k_j\\rangle / \\tau`,

    .. math:: L_i = -s_{ii} + \\log\\Bigl(e^{s_{ii}} + \\sum_{j \\in D(i)} e^{s_{ij}}\\Bigr).

    ``D(i)`` holds the other rows of `positive_key` (in-batch negatives), the rows of `negative_keys`, or both. Memory
    is O((N + M) D), and a strip of scores of at most 32 MiB (256 MiB on a GPU), whatever N and M.

    Parameters
    ----------
    query, positive_key : array (N, D)
        Row i of one is the positive of row i of the other. float16, bfloat16 (torch), float32 or float64.
    negative_keys : array (M, D) or (N, M, D), optional
        Negatives shared by all queries (a queue, mined negatives), or each query's own. Without them the other rows of
        `positive_key` are the negatives.
    temperature : positive number or 0-d array, optional
        Default 0.07. Differentiable when it is a tensor that requires a gradient.
    logit_scale : positive number or 0-d array, optional
        The multiplier 1 / temperature, instead of `temperature`.
    in_batch : bool, optional
        Whether the other rows of `positive_key` are in the denominator. Default: only without `negative_keys`.
    symmetric : bool
        The mean of query to key and key to query. Not with `negative_keys`.
    ids : integer array (N,), optional
        A key whose id is the query's, other than its positive, is left out of the denominator: duplicates in a batch
        are not negatives. Needs in-batch keys.
    reduction : {"mean", "sum", "none"}
    normalize : bool
        Bring rows to unit norm first. A zero row stays zero and gets zero gradient.

    Returns
    -------
    scalar or array (N,)
        float32 for half precisions, else the inputs' dtype. No rows: 0. One row and no other negatives: 0.

    Raises
    ------
    ValueError
        Shapes that do not match, a temperature that is not positive, both `temperature` and `logit_scale`.
    TypeError
        Arguments that are not arrays, of different kinds or dtypes, or not floating.

    Notes
    -----
    van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018. ``log(N) - L`` is a
    lower bound on mutual information. NaN in a row of `query` makes that row's loss NaN; NaN in a key makes every loss
    NaN whose denominator holds it. First and second derivatives; third ones raise.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.info_nce_loss(np.eye(16), np.eye(16), temperature=1.0), 6))
    1.874597
    >>> collapsed = np.ones((8, 3))
    >>> bool(abs(nf.info_nce_loss(collapsed, collapsed) - np.log(8)) < 1e-12)
    True
    """
    check_points(query=query, positive_key=positive_key, negative_keys=negative_keys)
    check_matrix(query, "query")
    check_reduction(reduction)
    n, d = query.shape
    check_shape(positive_key, "positive_key", (n, d), "query")
    own = negative_keys is not None and negative_keys.ndim == 3
    if negative_keys is not None:
        if negative_keys.ndim not in (2, 3):
            raise ValueError(
                f"negative_keys: expected shape (m, {d}) or ({n}, m, {d}), got {tuple(negative_keys.shape)}"
            )
        check_shape(negative_keys, "negative_keys", (*((n,) if own else ()), negative_keys.shape[-2], d), "query")
        if symmetric:
            raise ValueError("negative_keys: not with symmetric=True, which has no query for them")
    in_batch = negative_keys is None if in_batch is None else bool(in_batch)
    if not in_batch and negative_keys is None:
        raise ValueError("in_batch: expected True without negative_keys, got False")
    if symmetric and not in_batch:
        raise ValueError("in_batch: expected True with symmetric=True, got False")
    if ids is not None and not in_batch:
        raise ValueError("ids: needs in-batch keys, got in_batch=False")
    ids = check_labels(ids, n, query, "ids", "query")
    scale = scale_part(temperature, logit_scale, 0.07, query)

    keys = Part(("positive_key",), (positive_key,))
    shared = Part(("negative_keys",), (negative_keys,)) if negative_keys is not None and not own else NOTHING
    if in_batch:
        columns = Part(keys.names + shared.names, keys.arrays + shared.arrays)
        positive = NOTHING
    else:
        # Own negatives only: no columns at all.
        columns = Part((), (query[:0],)) if own else shared
        positive = keys
    paired = Part(("negative_keys",), (negative_keys,)) if own else NOTHING
    return Call(
        "softmax",
        (Part(("query",), (query,)), columns, positive, paired, scale),
        ("both" if symmetric else "rows", reduction, normalize, True, 0),
        scalar=reduction != "none",
        extra=(ids,),
    )


@differentiable
def clip_loss(
    image_features: Array,
    text_features: Array,
    logit_scale: Any = 1 / 0.07,
    *,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """CLIP: symmetric InfoNCE of two modalities, the mean of image to text and text to image.

    .. math:: L_i = -s_{ii} + \\tfrac12 \\log\\sum_j e^{s_{ij}} + \\tfrac12 \\log\\sum_j e^{s_{ji}},
              \\qquad s_{ij} = \\text{logit\\_scale}\\,\\langle x_i, y_j\\rangle.

    Both normalisers come from one product of the two sets.

    Parameters
    ----------
    image_features, text_features : array (N, D)
        Paired rows.
    logit_scale : positive number or 0-d array
        The multiplier, already exponentiated; differentiable when it is a tensor that requires a gradient.
    reduction : {"mean", "sum", "none"}
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (N,)

    Raises
    ------
    ValueError, TypeError
        As `info_nce_loss`.

    Notes
    -----
    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.clip_loss(np.eye(16), np.eye(16), 2.0), 6))
    1.108572
    """
    check_points(image_features=image_features, text_features=text_features)
    check_matrix(image_features, "image_features")
    check_shape(text_features, "text_features", image_features.shape, "image_features")
    check_reduction(reduction)
    scale = scalar_part(logit_scale, "logit_scale", image_features)
    parts = (Part(("image_features",), (image_features,)), Part(("text_features",), (text_features,)))
    return Call(
        "softmax",
        (*parts, NOTHING, NOTHING, scale),
        ("both", reduction, normalize, True, 0),
        scalar=reduction != "none",
        extra=(None,),
    )


def _two_views(
    z1: Array,
    z2: Array,
    temperature: Any,
    logit_scale: Any,
    default: float,
    reduction: str,
    normalize: bool,
    in_sum: bool,
) -> Call:
    """One set of 2N rows against itself, the positive of a row its other view."""
    check_points(z1=z1, z2=z2)
    check_matrix(z1, "z1")
    check_shape(z2, "z2", z1.shape, "z1")
    check_reduction(reduction)
    scale = scale_part(temperature, logit_scale, default, z1)
    return Call(
        "softmax",
        (Part(("z1", "z2"), (z1, z2)), NOTHING, NOTHING, NOTHING, scale),
        ("pairs", reduction, normalize, in_sum, z1.shape[0]),
        scalar=reduction != "none",
        extra=(None,),
    )


@shows(temperature=0.5)
@differentiable
def nt_xent_loss(
    z1: Array,
    z2: Array,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """NT-Xent (SimCLR): 2N anchors, each against the other 2N - 1 rows, its other view the positive.

    With ``z = [z1; z2]``, ``p(i)`` the other view of i and :math:`s_{ij} = \\langle z_i, z_j\\rangle / \\tau`,

    .. math:: L_i = -s_{i\\,p(i)} + \\log\\sum_{j \\ne i} e^{s_{ij}}.

    Scores are symmetric: every unordered pair is computed once.

    Parameters
    ----------
    z1, z2 : array (N, D)
        Two views of the same N items.
    temperature : positive number or 0-d array, optional
        Default 0.5.
    logit_scale : positive number or 0-d array, optional
        1 / temperature, instead of `temperature`.
    reduction : {"mean", "sum", "none"}
        Over the 2N anchors; "none" gives (2N,): the anchors of `z1`, then those of `z2`.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (2N,)
        No rows: 0. One item: 0 (its other view is all there is).

    Raises
    ------
    ValueError, TypeError
        As `info_nce_loss`.

    Notes
    -----
    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, 2020. The
    mean over 2N anchors, as in the paper; the authors' TensorFlow code returns twice that.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.nt_xent_loss(np.eye(16), np.eye(16)), 6))
    1.621378
    """
    return _two_views(z1, z2, temperature, logit_scale, 0.5, reduction, normalize, in_sum=True)


@shows(temperature=0.1)
@differentiable
def dcl_loss(
    z1: Array,
    z2: Array,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Call:
    """Decoupled contrastive loss: NT-Xent with the positive left out of the denominator.

    With ``z = [z1; z2]``, ``p(i)`` the other view of i and :math:`s_{ij} = \\langle z_i, z_j\\rangle / \\tau`,

    .. math:: L_i = -s_{i\\,p(i)} + \\log\\sum_{j \\ne i,\\, j \\ne p(i)} e^{s_{ij}}.

    Not bounded below by 0, and no bound on mutual information.

    Parameters
    ----------
    z1, z2 : array (N, D)
        Two views of the same N items.
    temperature : positive number or 0-d array, optional
        Default 0.1.
    logit_scale : positive number or 0-d array, optional
        1 / temperature, instead of `temperature`.
    reduction : {"mean", "sum", "none"}
        Over the 2N anchors; "none" gives (2N,): the anchors of `z1`, then those of `z2`.
    normalize : bool
        Bring rows to unit norm first.

    Returns
    -------
    scalar or array (2N,)
        No rows: 0. One item, which has no negatives: 0 with zero gradient.

    Raises
    ------
    ValueError, TypeError
        As `info_nce_loss`.

    Notes
    -----
    Yeh et al.: Decoupled Contrastive Learning, 2022. Both views are anchors; the authors' code takes those of `z1`
    only, and masks by a finite -103.6, which shows at low temperatures.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> float(round(nf.dcl_loss(np.eye(16), np.eye(16), temperature=0.5), 6))
    1.401197
    """
    return _two_views(z1, z2, temperature, logit_scale, 0.1, reduction, normalize, in_sum=False)


@differentiable
def info_nce_limit(x: Array, y: Array, temperature: Any) -> Call:
    """What InfoNCE less log M tends to as the number of negatives M grows (Wang & Isola, theorem 1).

    .. math:: -\\frac1\\tau \\operatorname{mean}_i \\langle x_i, y_i\\rangle
              + \\operatorname{mean}_i \\log \\operatorname{mean}_j e^{\\langle x_i, x_j\\rangle/\\tau}

    Rows are brought to unit norm. The inner mean is over all j, i included.

    Parameters
    ----------
    x, y : array (N, D)
        Positive pairs; N >= 1.
    temperature : positive number or 0-d array

    Returns
    -------
    scalar

    Raises
    ------
    ValueError
        No rows, or a temperature that is not positive.

    Notes
    -----
    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
    2020.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> collapsed = np.ones((8, 3))
    >>> bool(abs(nf.info_nce_limit(collapsed, collapsed, 0.5)) < 1e-12)
    True
    """
    check_points(x=x, y=y)
    check_matrix(x, "x")
    check_shape(y, "y", x.shape, "x")
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one row")
    if temperature is None:
        raise TypeError("temperature: expected a number, got NoneType")
    scale = scale_part(temperature, None, 1.0, x)
    x, y = widened(x, y)  # x is both rows and columns
    parts = (Part(("x",), (x,)), Part(("x",), (x,)), Part(("y",), (y,)), NOTHING, scale)
    outcome = Outcome(lambda loss: loss - math.log(x.shape[0]))
    return Call("softmax", parts, ("rows", "mean", True, False, 0), extra=(None,), outcome=outcome)
