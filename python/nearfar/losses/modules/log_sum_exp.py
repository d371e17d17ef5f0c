"""HCL, multi-similarity, circle and proxy anchor as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...arrays import integer
from ..log_sum_exp import circle_loss, hcl_loss, multi_similarity_loss, proxy_anchor_loss
from ..softmax import check_reduction
from .temperature import TemperatureLoss


class HCLLoss(TemperatureLoss):
    """`nearfar.hcl_loss` as a module; parameters as `NTXentLoss`, and `beta`, `tau_plus` as in the function.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.HCLLoss(beta=0, tau_plus=0)(torch.eye(16), torch.eye(16)).item(), 4)
    1.6214
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature, learnable_temperature, reduction, normalize)
        self.beta = beta
        self.tau_plus = tau_plus

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views."""
        loss: Tensor = hcl_loss(
            z1,
            z2,
            logit_scale=self.logit_scale,
            beta=self.beta,
            tau_plus=self.tau_plus,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}, tau_plus={self.tau_plus}"


class MultiSimilarityLoss(nn.Module):
    """`nearfar.multi_similarity_loss` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.MultiSimilarityLoss()(torch.eye(2), torch.tensor([0, 0])).item(), 4)
    0.6566
    """

    def __init__(
        self,
        alpha: float = 2,
        beta: float = 50,
        base: float = 0.5,
        *,
        reduction: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.reduction = reduction
        self.normalize = normalize

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of all pairs of a batch."""
        loss: Tensor = multi_similarity_loss(
            embeddings,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"


class CircleLoss(nn.Module):
    """`nearfar.circle_loss` as a module.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> round(nf.CircleLoss(gamma=1)(torch.eye(2).repeat(2, 1), torch.tensor([0, 0, 1, 1])).item(), 4)
    2.121
    """

    def __init__(self, m: float = 0.4, gamma: float = 80, *, reduction: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        check_reduction(reduction)
        self.m = m
        self.gamma = gamma
        self.reduction = reduction
        self.normalize = normalize

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of all pairs of a batch."""
        loss: Tensor = circle_loss(
            embeddings, labels, m=self.m, gamma=self.gamma, reduction=self.reduction, normalize=self.normalize
        )
        return loss

    def extra_repr(self) -> str:
        return f"m={self.m}, gamma={self.gamma}"


class ProxyAnchorLoss(nn.Module):
    """`nearfar.proxy_anchor_loss` as a module that holds the proxies.

    Parameters
    ----------
    num_classes, embedding_dim : int
        The shape of `proxies`, initialised as in the paper's code (Kaiming normal, fan out).
    margin, alpha, normalize
        As in the function.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> loss = nf.ProxyAnchorLoss(10, 16)
    >>> loss(torch.randn(32, 16), torch.arange(32) % 10).backward()
    >>> loss.proxies.grad.shape
    torch.Size([10, 16])
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, margin: float = 0.1, alpha: float = 32, *, normalize: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if integer(value, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        self.margin = margin
        self.alpha = alpha
        self.normalize = normalize
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; proxies are taken in the dtype of the embeddings, as autocast makes them."""
        loss: Tensor = proxy_anchor_loss(
            embeddings,
            labels,
            self.proxies.to(embeddings.dtype),
            margin=self.margin,
            alpha=self.alpha,
            normalize=self.normalize,
        )
        return loss

    def extra_repr(self) -> str:
        classes, dim = self.proxies.shape
        return f"num_classes={classes}, embedding_dim={dim}, margin={self.margin}, alpha={self.alpha}"
