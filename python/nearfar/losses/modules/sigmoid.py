"""The sigmoid loss as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...arrays import finite
from ..sigmoid import siglip_loss
from .temperature import TemperatureLoss


class SigLipLoss(TemperatureLoss):
    """`nearfar.siglip_loss` as a module.

    Parameters
    ----------
    logit_scale, logit_bias : float
        Default 10 and -10.
    learnable_temperature : bool
        Hold ``log_logit_scale = ln(logit_scale)``, at most ln 100 in forward, and ``logit_bias`` as parameters.
    reduction, normalize
        As in the function.

    Notes
    -----
    ``forward(image_features, text_features, logit_scale=None, logit_bias=None)``: what is given is used in place of the
    module's, so that the module drops into an open_clip loop, whose model holds both.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> loss = nf.SigLipLoss(learnable_temperature=True)
    >>> round(loss(torch.eye(16), torch.eye(16)).item(), 4)
    0.6938
    >>> sorted(name for name, _ in loss.named_parameters())
    ['log_logit_scale', 'logit_bias']
    """

    logit_bias: float | Tensor

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        logit_scale = finite(logit_scale, "logit_scale", 0.0, strict=True)
        super().__init__(1 / logit_scale, learnable_temperature, reduction, normalize)
        bias = finite(logit_bias, "logit_bias")
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if learnable_temperature else bias

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Any = None, logit_bias: Any = None
    ) -> Tensor:
        """The loss of paired rows."""
        loss: Tensor = siglip_loss(
            image_features,
            text_features,
            self.logit_scale if logit_scale is None else logit_scale,
            self.logit_bias if logit_bias is None else logit_bias,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss

    def extra_repr(self) -> str:
        scale, bias = (v.item() if isinstance(v, Tensor) else v for v in (self.logit_scale, self.logit_bias))
        return f"logit_scale={scale}, logit_bias={bias}, learnable_temperature={self.learnable_temperature}"
