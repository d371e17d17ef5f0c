"""nearfar: reductions over all pairs of two point sets, fused, without the N x M matrix.

Contrastive losses, alignment and uniformity, distances, nearest neighbours, k-means assignment, Gram matrices, for
NumPy arrays and PyTorch tensors, with gradients.
"""

from __future__ import annotations

from typing import Any

from . import kernels, losses
from .clustering import kmeans_assign
from .distances import cdist, pdist
from .gradients import value_and_grad
from .kernel_methods import KernelPCA, KernelRidge
from .kernels import cka, gram, hsic, mmd, mmd_permutation_test
from .losses import (
    alignment,
    clip_loss,
    info_nce_limit,
    info_nce_loss,
    nt_xent_loss,
    uniformity,
    uniformity_of_sphere,
)
from .low_rank import nystrom, pivoted_cholesky, random_features
from .neighbors import knn
from .psd import PSDReport, is_psd, psd_report
from .runtime import build_info, get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    *losses.MODULES,
    "KernelPCA",
    "KernelRidge",
    "PSDReport",
    "alignment",
    "build_info",
    "cdist",
    "cka",
    "clip_loss",
    "get_num_threads",
    "gram",
    "hsic",
    "info_nce_limit",
    "info_nce_loss",
    "is_psd",
    "kernels",
    "kmeans_assign",
    "knn",
    "losses",
    "mmd",
    "mmd_permutation_test",
    "nt_xent_loss",
    "nystrom",
    "pdist",
    "pivoted_cholesky",
    "psd_report",
    "random_features",
    "set_num_threads",
    "uniformity",
    "uniformity_of_sphere",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # torch is imported when a module that needs it is asked for, not before.
    if name in losses.MODULES:
        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
