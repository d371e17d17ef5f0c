"""Losses of classes as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..softmax import check_reduction
from ..supervised import n_pairs_loss, sup_con_loss
from .temperature import TemperatureLoss


class SupConLoss(TemperatureLoss):
    """`nearfar.sup_con_loss` as a module; parameters as `InfoNCELoss`, temperature 0.1 by default.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.SupConLoss(1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])).item(), 4)
    0.5514
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, learnable_temperature, reduction, normalize)

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, *, positive_mask: Tensor | None = None
    ) -> Tensor:
        """The loss; arguments as in `nearfar.sup_con_loss`."""
        loss: Tensor = sup_con_loss(
            embeddings,
            labels,
            positive_mask=positive_mask,
            logit_scale=self.logit_scale,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss


class NPairsLoss(nn.Module):
    """`nearfar.n_pairs_loss` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.NPairsLoss(0.1)(torch.eye(4), torch.eye(4)).item(), 4)
    0.8437
    """

    def __init__(self, l2_reg: float = 0.0, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.l2_reg = l2_reg
        self.reduction = reduction

    def forward(self, anchor: Tensor, positive: Tensor) -> Tensor:
        """The loss of N anchors and their positives."""
        loss: Tensor = n_pairs_loss(anchor, positive, l2_reg=self.l2_reg, reduction=self.reduction)
        return loss

    def extra_repr(self) -> str:
        return f"l2_reg={self.l2_reg}"
