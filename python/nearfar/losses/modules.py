"""The losses as torch.nn.Modules: the same mathematics, parameters held by the module. Imports torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import number
from .softmax import check_reduction, clip_loss, info_nce_loss, nt_xent_loss
from .sphere import alignment, uniformity


class _TemperatureLoss(nn.Module):
    """A temperature that is fixed, or learned as `log_logit_scale` (init ln(1/temperature); at most ln 100)."""

    log_logit_scale: nn.Parameter

    def __init__(self, temperature: float, learnable_temperature: bool, reduction: str, normalize: bool) -> None:
        super().__init__()
        temperature = number(temperature, "temperature")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.learnable_temperature = learnable_temperature
        if learnable_temperature:
            self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    @property
    def logit_scale(self) -> float | Tensor:
        """1 / temperature as it is used now."""
        if not self.learnable_temperature:
            return 1 / self.temperature
        return self.log_logit_scale.clamp(max=math.log(100)).exp()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, learnable_temperature={self.learnable_temperature}"


class InfoNCELoss(_TemperatureLoss):
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


class NTXentLoss(_TemperatureLoss):
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


class ClipLoss(_TemperatureLoss):
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
