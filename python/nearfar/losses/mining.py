"""Mining: index triplets of a labelled batch. Never N^3 memory; samples are drawn without enumerating."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import operations, triplets
from ..arrays import (
    Array,
    check_seed,
    codes_of,
    finite,
    integer,
    is_torch,
    laid_bare,
    of_kind,
    outside_transforms,
    to_numpy,
)
from .softmax import check_labelled

_BLOCK = 256  # anchors whose distances are at hand together
_MINING = ("all", "hard", "semihard", "band")

_Index = NDArray[np.int64]
_Triplets = tuple[_Index, _Index, _Index]


def mine_triplets(
    embeddings: Array,
    labels: Array,
    *,
    mining: str = "semihard",
    margin: float = 0.2,
    max_triplets: int | None = None,
    normalize: bool = True,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """Triplets (anchor, positive, negative) of a labelled batch, as indices.

    Anchor and positive are different rows of one class, the negative is of another; d is the distance.

    ===========  ====================================================================  =============================
    mining       which triplets                                                        how many
    ===========  ====================================================================  =============================
    "all"        every one                                                             anchors x positives x negatives
    "band"       :math:`d_{ap} < d_{an} < d_{ap} + m`: semi-hard as FaceNet has it     up to as many
    "semihard"   the smallest :math:`d_{an} > d_{ap}`, or else the largest d_an        one per anchor and positive
    "hard"       the largest d_ap with the smallest d_an                               one per anchor
    ===========  ====================================================================  =============================

    "hard" triplets have negatives nearer than their positives (:math:`d_{an} \\le d_{ap}`) wherever an anchor has any;
    "semihard" ones have negatives farther than their positives, only not by far.

    Parameters
    ----------
    embeddings : array (N, D)
        float16, bfloat16 (torch), float32 or float64. No gradient: indices have none.
    labels : integer array (N,)
        Classes, any integers.
    mining : {"all", "hard", "semihard", "band"}
    margin : number
        At least 0; of "band" only.
    max_triplets : int, optional
        At most so many: when there are more, a uniform sample of so many different ones.
    normalize : bool
        Distances of rows of unit norm.
    seed : int
        Of the sample: the same seed draws the same triplets.

    Returns
    -------
    anchor, positive, negative : int64 arrays (T,)
        Of the kind of `embeddings`; sorted by anchor. Equal distances: the lower index. Rows with NaN or inf are in no
        triplet, except of "all", which does not look at distances. No triplet: empty arrays.

    Raises
    ------
    ValueError
        Shapes that do not match, a negative margin, an unknown mining, max_triplets negative; ``torch.func.vmap`` over
        what decides how many triplets there are: labels, and embeddings unless of "all".
    TypeError
        Arguments that are not arrays or of different kinds, labels that are not integers.

    Notes
    -----
    On a GPU distances are computed there, a block of anchors at a time for "band"; labels and the search for what was
    drawn are on the host, so the stream is waited for.

    Memory is O(N D) and the result, also with a sample of "all" or "band": triplets are counted per anchor, in 64 bits,
    and only the ranks that were drawn are looked up. Without `max_triplets` the result of "all" and "band" can itself
    be of the order of N^3.

    Schroff, Kalenichenko, Philbin: FaceNet, 2015.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.array([[0.0], [1.0], [1.5], [4.0]])
    >>> for mining in ("hard", "semihard"):
    ...     a, p, n = nf.mine_triplets(x, np.array([0, 0, 1, 1]), mining=mining, normalize=False)
    ...     print(a, p, n)
    [0 1 2 3] [1 0 3 2] [2 2 1 1]
    [0 1 2 3] [1 0 3 2] [2 3 0 1]
    """
    check_labelled(embeddings, labels)
    if mining not in _MINING:
        raise ValueError(f"mining: expected 'all', 'hard', 'semihard' or 'band', got {mining!r}")
    margin = finite(margin, "margin", 0.0)
    if max_triplets is not None and (max_triplets := integer(max_triplets, "max_triplets")) < 0:
        raise ValueError(f"max_triplets: expected at least 0, got {max_triplets}")
    seed = check_seed(seed)
    why = "they say how many triplets there are"
    labels = laid_bare(labels, "labels", why)
    x = embeddings if mining == "all" else laid_bare(embeddings, "embeddings", why)
    with outside_transforms(labels):
        if mining == "all":
            found = _all(labels, max_triplets, seed)
        elif mining == "band":
            found = _band(x, labels, margin, normalize, max_triplets, seed)
        else:
            mined = triplets.mined(x, labels, mining, normalize)
            ranks = _sample(len(mined[0]), max_triplets, seed)
            found = mined if ranks is None else tuple(index[ranks] for index in mined)  # type: ignore[assignment]
    return tuple(of_kind(index, embeddings) for index in found)


def _sample(total: int, most: int | None, seed: int) -> _Index | None:
    """Ranks below `total`, sorted; None for all of them."""
    if most is None or total <= most:
        return None
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False, shuffle=False)).astype(np.int64)


class _Groups:
    """The rows of every class, ascending: row i's class is order[begin[code[i]]:end[code[i]]]."""

    def __init__(self, labels: Array) -> None:
        self.code, classes = codes_of(to_numpy(labels))
        self.order = np.argsort(self.code, kind="stable")
        self.size = np.bincount(self.code, minlength=classes)[self.code]  # of each row's class
        self.end = np.cumsum(np.bincount(self.code, minlength=classes))[self.code]
        self.begin = self.end - self.size

    def members(self, i: int) -> _Index:
        own: _Index = self.order[self.begin[i] : self.end[i]]
        return own


def _split(ranks: _Index, counts: _Index) -> tuple[_Index, _Index]:
    """Ranks among all as (place, rank within the place), where place k holds counts[k]."""
    ends = np.cumsum(counts)
    place = np.searchsorted(ends, ranks, "right")
    return place, ranks - (ends - counts)[place]


def _all(labels: Array, most: int | None, seed: int) -> _Triplets:
    groups = _Groups(labels)
    n = len(groups.code)
    counts = (groups.size - 1) * (n - groups.size)
    ranks = _sample(int(counts.sum()), most, seed)
    if ranks is None:
        ranks = np.arange(int(counts.sum()))
    anchor, rank = _split(ranks, counts)
    positive, negative = np.divmod(rank, np.maximum(n - groups.size, 1)[anchor])
    own = _place_of(groups)[anchor]
    positive += positive >= own - groups.begin[anchor]  # the anchor is not its own positive
    negative += np.where(negative >= groups.begin[anchor], groups.size[anchor], 0)  # negatives step over the class
    return anchor, groups.order[groups.begin[anchor] + positive], groups.order[negative]


def _place_of(groups: _Groups) -> _Index:
    """Where each row is in `order`."""
    place = np.empty(len(groups.order), np.int64)
    place[groups.order] = np.arange(len(groups.order))
    return place


def _rows(x: Array, wanted: _Index, normalize: bool) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each wanted row with its distances to all, float64; NaN to and from rows with NaN or inf."""
    for begin in range(0, len(wanted), _BLOCK):
        block = wanted[begin : begin + _BLOCK]
        part = x[block if not is_torch(x) else block.tolist()]
        square = to_numpy(operations.store(part, x, "sqeuclidean", normalize, False)).astype(np.float64)
        yield from zip(block.tolist(), np.sqrt(square), strict=True)


def _band_of(
    groups: _Groups, i: int, distance: NDArray[Any], margin: float
) -> tuple[_Index, NDArray[Any], _Index, _Index]:
    """Positives, the negatives' distances sorted, and for every positive the range of them inside the band."""
    members = groups.members(i)
    positives = members[members != i]
    others = distance.copy()
    others[members] = np.nan  # sorted to the end, inside no band
    others[np.isinf(others)] = np.nan
    ascending = np.sort(others)
    low = distance[positives]
    first = np.searchsorted(ascending, low, "right")
    last = np.maximum(np.searchsorted(ascending, low + margin, "left"), first)
    last = np.where(np.isfinite(low), last, first)
    return positives, others, first, last - first


def _band(x: Array, labels: Array, margin: float, normalize: bool, most: int | None, seed: int) -> _Triplets:
    """Triplets are ranked by anchor, positive, distance of the negative: counted first, then looked up."""
    groups = _Groups(labels)
    n = len(groups.code)
    counts = np.zeros(n, np.int64)
    anchors = np.flatnonzero((groups.size > 1) & (groups.size < n))
    for i, distance in _rows(x, anchors, normalize):
        counts[i] = _band_of(groups, i, distance, margin)[3].sum()
    ranks = _sample(int(counts.sum()), most, seed)
    if ranks is None:
        ranks = np.arange(int(counts.sum()))
    anchor, rank = _split(ranks, counts)
    positive, negative = np.empty((2, len(anchor)), np.int64)
    for i, distance in _rows(x, np.unique(anchor), normalize):
        own = slice(np.searchsorted(anchor, i), np.searchsorted(anchor, i, "right"))
        positives, others, first, inside = _band_of(groups, i, distance, margin)
        place, within = _split(rank[own], inside)
        positive[own] = positives[place]
        negative[own] = np.argsort(others, kind="stable")[first[place] + within]
    return anchor, positive, negative
