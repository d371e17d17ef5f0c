"""Ranking losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ...arrays import finite
from ..ranking import batch_triplet_loss, contrastive_loss, triplet_margin_loss
from ..softmax import check_reduction


class _MarginLoss(nn.Module):
    def __init__(self, margin: float, reduction: str, normalize: bool) -> None:
        super().__init__()
        check_reduction(reduction)
        self.margin = finite(margin, "margin", 0.0)
        self.reduction = reduction
        self.normalize = normalize

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class ContrastiveLoss(_MarginLoss):
    """`nearfar.contrastive_loss` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> nf.ContrastiveLoss(2.0)(torch.eye(2), -torch.eye(2), torch.tensor([True, False])).item()
    2.0
    """

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean", normalize: bool = True) -> None:
        super().__init__(margin, reduction, normalize)

    def forward(self, x1: Tensor, x2: Tensor, same: Tensor) -> Tensor:
        """The loss of pairs."""
        loss: Tensor = contrastive_loss(
            x1, x2, same, margin=self.margin, reduction=self.reduction, normalize=self.normalize
        )
        return loss


class TripletMarginLoss(_MarginLoss):
    """`nearfar.triplet_margin_loss` as a module; a drop-in for ``torch.nn.TripletMarginLoss``.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.TripletMarginLoss()(torch.eye(2), torch.eye(2), -torch.eye(2)).item(), 4)
    0.0
    """

    def __init__(
        self,
        margin: float = 1.0,
        p: float = 2,
        eps: float = 1e-6,
        swap: bool = False,
        *,
        reduction: str = "mean",
        normalize: bool = False,
    ) -> None:
        super().__init__(margin, reduction, normalize)
        self.p = p
        self.eps = eps
        self.swap = swap

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of triplets."""
        loss: Tensor = triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            swap=self.swap,
            reduction=self.reduction,
            normalize=self.normalize,
            eps=self.eps,
        )
        return loss

    def extra_repr(self) -> str:
        return f"margin={self.margin}, p={self.p}, eps={self.eps}, swap={self.swap}"


class BatchTripletLoss(_MarginLoss):
    """`nearfar.batch_triplet_loss` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> x, labels = torch.eye(4, requires_grad=True), torch.tensor([0, 0, 1, 1])
    >>> round(nf.BatchTripletLoss(0.5, mining="all")(x, labels).item(), 4)
    0.5
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        mining: str = "hard",
        squared: bool = False,
        soft: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(margin, reduction, normalize)
        self.mining = mining
        self.squared = squared
        self.soft = soft

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a labelled batch."""
        loss: Tensor = batch_triplet_loss(
            embeddings,
            labels,
            margin=self.margin,
            mining=self.mining,
            squared=self.squared,
            soft=self.soft,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining}, squared={self.squared}, soft={self.soft}"
