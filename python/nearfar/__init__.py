"""nearfar: reductions over all pairs of two point sets, fused, without the N x M matrix.

Contrastive losses, alignment and uniformity, distances, nearest neighbours, k-means assignment, Gram matrices, for
NumPy arrays and PyTorch tensors, with gradients.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import kernels, losses
from .clustering import kmeans_assign
from .distances import cdist, pdist
from .evaluation import Report, evaluate
from .gradients import value_and_grad
from .kernel_methods import KernelPCA, KernelRidge
from .kernels import check_mercer, cka, gram, hsic, mmd, mmd_permutation_test
from .kmeans import KMeans
from .losses import (
    alignment,
    batch_triplet_loss,
    circle_loss,
    clip_loss,
    contrastive_loss,
    dcl_loss,
    hcl_loss,
    info_nce_limit,
    info_nce_loss,
    mine_triplets,
    multi_similarity_loss,
    n_pairs_loss,
    nt_xent_loss,
    proxy_anchor_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
    uniformity,
    uniformity_gap,
    uniformity_of_sphere,
)
from .low_rank import nystrom, pivoted_cholesky, random_features
from .minibatch import MiniBatchKMeans
from .mutual_information import mi_lower_bound
from .neighbors import knn
from .psd import PSDReport, is_psd, psd_report
from .runtime import build_info, get_num_threads, set_num_threads

__version__ = "0.1.0"

# What is imported when it is asked for, not before: name -> module.
_LATER = dict.fromkeys(("ITML", "LMNN", "MMC", "NCA"), ".metric_learning")

__all__ = [
    *losses.LISTED,
    *(("distributed",) if losses.LISTED else ()),
    *_LATER,
    "KMeans",
    "KernelPCA",
    "KernelRidge",
    "MiniBatchKMeans",
    "PSDReport",
    "Report",
    "alignment",
    "batch_triplet_loss",
    "build_info",
    "cdist",
    "check_mercer",
    "circle_loss",
    "cka",
    "clip_loss",
    "contrastive_loss",
    "dcl_loss",
    "evaluate",
    "get_num_threads",
    "gram",
    "hcl_loss",
    "hsic",
    "info_nce_limit",
    "info_nce_loss",
    "is_psd",
    "kernels",
    "kmeans_assign",
    "knn",
    "losses",
    "mi_lower_bound",
    "mine_triplets",
    "mmd",
    "mmd_permutation_test",
    "multi_similarity_loss",
    "n_pairs_loss",
    "nt_xent_loss",
    "nystrom",
    "pdist",
    "pivoted_cholesky",
    "proxy_anchor_loss",
    "psd_report",
    "random_features",
    "set_num_threads",
    "siglip_loss",
    "sup_con_loss",
    "triplet_margin_loss",
    "uniformity",
    "uniformity_gap",
    "uniformity_of_sphere",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # torch is imported when a module that needs it is asked for, not before.
    if name in losses.MODULES:
        return getattr(losses, name)
    if name == "distributed":
        try:
            return importlib.import_module(".distributed", __name__)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("nearfar.distributed needs torch: pip install 'nearfar[torch]'") from error
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
