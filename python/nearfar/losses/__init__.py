"""Losses: functions here, torch.nn.Modules of the same mathematics when torch is installed."""

from __future__ import annotations

import importlib
from typing import Any

from ..arrays import is_installed
from .log_sum_exp import circle_loss, hcl_loss, multi_similarity_loss, proxy_anchor_loss
from .mining import mine_triplets
from .ranking import batch_triplet_loss, contrastive_loss, triplet_margin_loss
from .sigmoid import siglip_loss
from .softmax import clip_loss, dcl_loss, info_nce_limit, info_nce_loss, nt_xent_loss
from .sphere import alignment, uniformity, uniformity_gap, uniformity_of_sphere
from .supervised import n_pairs_loss, sup_con_loss

MODULES = (
    *("AlignmentLoss", "ClipLoss", "InfoNCELoss", "NTXentLoss", "UniformityLoss"),
    *("DCLLoss", "MemoryBank", "NPairsLoss", "SigLipLoss", "SupConLoss"),
    *("BatchTripletLoss", "ContrastiveLoss", "TripletMarginLoss"),
    *("CircleLoss", "HCLLoss", "MultiSimilarityLoss", "ProxyAnchorLoss"),
)

# Without torch they are not listed, so that help() and a star import work; asking for one says what is missing.
LISTED = MODULES if is_installed("torch") else ()

__all__ = [
    *LISTED,
    "alignment",
    "batch_triplet_loss",
    "circle_loss",
    "clip_loss",
    "contrastive_loss",
    "dcl_loss",
    "hcl_loss",
    "info_nce_limit",
    "info_nce_loss",
    "mine_triplets",
    "multi_similarity_loss",
    "n_pairs_loss",
    "nt_xent_loss",
    "proxy_anchor_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_margin_loss",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
