"""The same over the processes of `torch.distributed`, each with its own rows: losses, k-means, products of kernels.

Blocks of rows travel round a ring (`ring`); nothing of the size of all rows is ever gathered. Imports torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..gradients import shows
from ..losses import sigmoid as _sigmoid
from ..losses import softmax as _softmax
from .kmeans import KMeans
from .losses import launch
from .products import gram_matmul

__all__ = ["KMeans", "clip_loss", "gram_matmul", "info_nce_loss", "nt_xent_loss", "siglip_loss"]


@shows(temperature=0.07)
def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    in_batch: bool | None = None,
    symmetric: bool = False,
    ids: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    group: Any = None,
) -> Tensor:
    """InfoNCE of a batch whose rows are spread over processes.

    Each rank passes its own rows. The value, the same bits on every rank, and the gradients are those of one process
    with the rows of all ranks, in their order: `nearfar.info_nce_loss`, where the formula is.

    Parameters
    ----------
    query, positive_key : tensor (n, D)
        This rank's rows. float16, bfloat16, float32 or float64, the same on every rank.
    negative_keys : tensor (m, D), optional
        This rank's rows of the shared negatives, which every rank's queries meet. Of a queue that is the same on every
        rank, pass a part: ``queue[rank::world_size]``.
    temperature, logit_scale : positive number or 0-d tensor, optional
        The same on every rank; a tensor may require a gradient.
    in_batch, symmetric : bool
        As there, the same on every rank.
    ids : integer tensor (n,), optional
        This rank's; compared with those of all.
    reduction : {"mean", "sum", "none"}
        Over the rows of all ranks. "none": the losses of this rank's rows, without gradients.
    normalize : bool
        Bring rows to unit norm first.
    group : torch.distributed process group, optional
        Default: all processes.

    Returns
    -------
    scalar tensor
        Gradients of rows are as many times those of one process as there are ranks, so that DistributedDataParallel,
        which averages, gives those of one process. Gradients of scalars are whole on every rank, and stay so.

    Raises
    ------
    RuntimeError
        No process group; or another rank has refused its arguments.
    ValueError, TypeError
        As `nearfar.info_nce_loss`; arguments that differ between ranks where they may not.
    NotImplementedError
        "none" where a rank wants gradients; negatives of shape (n, m, D).

    Notes
    -----
    Every block of keys meets every process twice: four products of the size of all pairs, shared by the ranks, also
    for both directions.
    Numbers of rows may differ between ranks, and be 0. `backward` communicates nothing. No second derivatives.
    """
    return launch(
        group,
        _softmax.info_nce_loss,
        query,
        positive_key,
        negative_keys,
        temperature=temperature,
        logit_scale=logit_scale,
        in_batch=in_batch,
        symmetric=symmetric,
        ids=ids,
        reduction=reduction,
        normalize=normalize,
    )


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any = 1 / 0.07,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    group: Any = None,
) -> Tensor:
    """CLIP of a batch whose rows are spread over processes.

    Each rank passes its own rows. The value, the same bits on every rank, and the gradients are those of one process
    with the rows of all ranks, in their order: `nearfar.clip_loss`, where the formula is.

    Parameters
    ----------
    image_features, text_features : tensor (n, D)
        This rank's rows. float16, bfloat16, float32 or float64, the same on every rank.
    logit_scale : positive number or 0-d tensor
        The multiplier, already exponentiated; the same on every rank.
    reduction : {"mean", "sum", "none"}
        Over the rows of all ranks. "none": the losses of this rank's rows, without gradients.
    normalize : bool
        Bring rows to unit norm first.
    group : torch.distributed process group, optional
        Default: all processes.

    Returns
    -------
    scalar tensor
        Gradients of rows are as many times those of one process as there are ranks, so that DistributedDataParallel,
        which averages, gives those of one process. Gradients of scalars are whole on every rank, and stay so.

    Raises
    ------
    RuntimeError
        No process group; or another rank has refused its arguments.
    ValueError, TypeError
        As `nearfar.clip_loss`; arguments that differ between ranks where they may not.
    NotImplementedError
        "none" where a rank wants gradients.

    Notes
    -----
    Numbers of rows may differ between ranks, and be 0. `backward` communicates nothing. No second derivatives.
    """
    return launch(
        group, _softmax.clip_loss, image_features, text_features, logit_scale, reduction=reduction, normalize=normalize
    )


@shows(temperature=0.5)
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Any = None,
    logit_scale: Any = None,
    reduction: str = "mean",
    normalize: bool = True,
    group: Any = None,
) -> Tensor:
    """NT-Xent (SimCLR) of a batch whose rows are spread over processes.

    Each rank passes its own rows. The value, the same bits on every rank, and the gradients are those of one process
    with the rows of all ranks, in their order: `nearfar.nt_xent_loss`, where the formula is.

    Parameters
    ----------
    z1, z2 : tensor (n, D)
        This rank's rows. float16, bfloat16, float32 or float64, the same on every rank.
    temperature, logit_scale : positive number or 0-d tensor, optional
        The same on every rank; a tensor may require a gradient.
    reduction : {"mean", "sum", "none"}
        Over the rows of all ranks. "none": the losses of this rank's rows, without gradients.
    normalize : bool
        Bring rows to unit norm first.
    group : torch.distributed process group, optional
        Default: all processes.

    Returns
    -------
    scalar tensor
        Gradients of rows are as many times those of one process as there are ranks, so that DistributedDataParallel,
        which averages, gives those of one process. Gradients of scalars are whole on every rank, and stay so.

    Raises
    ------
    RuntimeError
        No process group; or another rank has refused its arguments.
    ValueError, TypeError
        As `nearfar.nt_xent_loss`; arguments that differ between ranks where they may not.
    NotImplementedError
        "none" where a rank wants gradients.

    Notes
    -----
    Scores are symmetric: two processes meet once, half way round the ring.
    Numbers of rows may differ between ranks, and be 0. `backward` communicates nothing. No second derivatives.
    """
    return launch(
        group,
        _softmax.nt_xent_loss,
        z1,
        z2,
        temperature=temperature,
        logit_scale=logit_scale,
        reduction=reduction,
        normalize=normalize,
    )


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any = 10.0,
    logit_bias: Any = -10.0,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    group: Any = None,
) -> Tensor:
    """SigLIP of a batch whose rows are spread over processes.

    Each rank passes its own rows. The value, the same bits on every rank, and the gradients are those of one process
    with the rows of all ranks, in their order: `nearfar.siglip_loss`, where the formula is.

    Parameters
    ----------
    image_features, text_features : tensor (n, D)
        This rank's rows. float16, bfloat16, float32 or float64, the same on every rank.
    logit_scale, logit_bias : number or 0-d tensor
        The same on every rank.
    reduction : {"mean", "sum", "none"}
        Over the rows of all ranks. "none": the losses of this rank's rows, without gradients.
    normalize : bool
        Bring rows to unit norm first.
    group : torch.distributed process group, optional
        Default: all processes.

    Returns
    -------
    scalar tensor
        Gradients of rows are as many times those of one process as there are ranks, so that DistributedDataParallel,
        which averages, gives those of one process. Gradients of scalars are whole on every rank, and stay so.

    Raises
    ------
    RuntimeError
        No process group; or another rank has refused its arguments.
    ValueError, TypeError
        As `nearfar.siglip_loss`; arguments that differ between ranks where they may not.
    NotImplementedError
        "none" where a rank wants gradients.

    Notes
    -----
    One round: there is no normaliser.
    Numbers of rows may differ between ranks, and be 0. `backward` communicates nothing. No second derivatives.
    """
    return launch(
        group,
        _sigmoid.siglip_loss,
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        reduction=reduction,
        normalize=normalize,
    )
