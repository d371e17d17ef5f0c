"""Losses over a softmax of negatives as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..softmax import clip_loss, dcl_loss, info_nce_loss, nt_xent_loss
from .temperature import TemperatureLoss


class InfoNCELoss(TemperatureLoss):
    """`nearfar.info_nce_loss` as a module.

    Parameters
    ----------
    temperature : float
        Default 0.07.
    learnable_temperature : bool
        Hold ``log_logit_scale = ln(1 / temperature)`` as a parameter, at most ln 100 in forward as in CLIP.
    symmetric, reduction, normalize
        As in the function.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> loss = nf.InfoNCELoss(learnable_temperature=True)
    >>> loss(torch.eye(4), torch.eye(4)).backward()
    >>> loss.log_logit_scale.grad is not None
    True
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, learnable_temperature, reduction, normalize)
        self.symmetric = symmetric

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        in_batch: bool | None = None,
    ) -> Tensor:
        """The loss; arguments as in `nearfar.info_nce_loss`."""
        loss: Tensor = info_nce_loss(
            query,
            positive_key,
            negative_keys,
            logit_scale=self.logit_scale,
            in_batch=in_batch,
            symmetric=self.symmetric,
            ids=ids,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss


class NTXentLoss(TemperatureLoss):
    """`nearfar.nt_xent_loss` as a module; parameters as `InfoNCELoss`, temperature 0.5 by default.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.NTXentLoss()(torch.eye(16), torch.eye(16)).item(), 4)
    1.6214
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, learnable_temperature, reduction, normalize)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views."""
        loss: Tensor = nt_xent_loss(
            z1, z2, logit_scale=self.logit_scale, reduction=self.reduction, normalize=self.normalize
        )
        return loss


class DCLLoss(TemperatureLoss):
    """`nearfar.dcl_loss` as a module; parameters as `InfoNCELoss`, temperature 0.1 by default.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.DCLLoss(0.5)(torch.eye(16), torch.eye(16)).item(), 4)
    1.4012
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

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views."""
        loss: Tensor = dcl_loss(
            z1, z2, logit_scale=self.logit_scale, reduction=self.reduction, normalize=self.normalize
        )
        return loss


class ClipLoss(TemperatureLoss):
    """`nearfar.clip_loss` as a module; parameters as `InfoNCELoss`.

    ``forward(image_features, text_features, logit_scale=None)``: a given `logit_scale` (already exponentiated) is used
    in place of the module's, so that the module drops into an open_clip loop.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.ClipLoss()(torch.eye(16), torch.eye(16), 2.0).item(), 4)
    1.1086
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, learnable_temperature, reduction, normalize)

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Any = None) -> Tensor:
        """The loss of paired rows."""
        scale = self.logit_scale if logit_scale is None else logit_scale
        loss: Tensor = clip_loss(
            image_features, text_features, scale, reduction=self.reduction, normalize=self.normalize
        )
        return loss
