"""Alignment and uniformity as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..softmax import check_reduction
from ..sphere import alignment, uniformity


class AlignmentLoss(nn.Module):
    """`nearfar.alignment` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> nf.AlignmentLoss()(torch.eye(2), torch.eye(2)).item()
    0.0
    """

    def __init__(self, alpha: float = 2, *, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.alpha = alpha
        self.normalize = normalize
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean distance of positive pairs, to the power alpha."""
        loss: Tensor = alignment(x, y, alpha=self.alpha, normalize=self.normalize, reduction=self.reduction)
        return loss

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class UniformityLoss(nn.Module):
    """`nearfar.uniformity` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.UniformityLoss()(torch.eye(3)).item(), 4)
    -4.0
    """

    def __init__(self, t: float = 2, *, normalize: bool = True) -> None:
        super().__init__()
        self.t = t
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        """The log of the mean Gaussian potential."""
        loss: Tensor = uniformity(x, t=self.t, normalize=self.normalize)
        return loss

    def extra_repr(self) -> str:
        return f"t={self.t}"
