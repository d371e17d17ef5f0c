"""Losses: functions here, torch.nn.Modules of the same mathematics when torch is installed."""

from __future__ import annotations

import importlib
from typing import Any

from .softmax import clip_loss, info_nce_limit, info_nce_loss, nt_xent_loss
from .sphere import alignment, uniformity, uniformity_gap, uniformity_of_sphere

MODULES = ("AlignmentLoss", "ClipLoss", "InfoNCELoss", "NTXentLoss", "UniformityLoss")

__all__ = [
    *MODULES,
    "alignment",
    "clip_loss",
    "info_nce_limit",
    "info_nce_loss",
    "nt_xent_loss",
    "uniformity",
    "uniformity_gap",
    "uniformity_of_sphere",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        modules = importlib.import_module(".modules", __name__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"nearfar.{name} needs torch: pip install 'nearfar[torch]'") from error
    return getattr(modules, name)
