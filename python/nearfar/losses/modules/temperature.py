"""What every loss with a temperature holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...arrays import cast, compute_dtype, finite
from ..softmax import check_reduction


class TemperatureLoss(nn.Module):
    """A temperature that is fixed, or learned as `log_logit_scale` (init ln(1/temperature); at most ln 100)."""

    log_logit_scale: nn.Parameter

    def __init__(self, temperature: float, learnable_temperature: bool, reduction: str, normalize: bool) -> None:
        super().__init__()
        temperature = finite(temperature, "temperature", 0.0, strict=True)
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
        # The parameter may be a half; the multiplier made of it is not rounded to one.
        log_scale: Tensor = cast(self.log_logit_scale, compute_dtype(self.log_logit_scale))
        return log_scale.clamp(max=math.log(100)).exp()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, learnable_temperature={self.learnable_temperature}"
