"""The operations of the benchmark. A new line is one `Case` in the file of its family, named here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..case import Case
from .distances import CDIST, CDIST_BACKWARD, CDIST_BATCH, CDIST_CITYBLOCK
from .gram import CKA_GAUSSIAN, CKA_LINEAR, KERNEL_RIDGE
from .kernels import (
    CHI_SQUARED_GRAM,
    COMPOSED_MATMUL,
    COMPOSED_MATMUL_GRADIENT,
    GAUSSIAN_GRAM,
    GAUSSIAN_MATMUL,
    GAUSSIAN_MATMUL_GRADIENT,
    GRAM_BACKWARD,
    MATERN_MATMUL,
    RATIONAL_QUADRATIC_MATMUL,
)
from .kmeans import KMEANS, KMEANS_BATCH, KMEANS_SEEDING
from .log_sum_exp import HCL, MULTI_SIMILARITY
from .losses import CLIP, INFO_NCE, INFO_NCE_BFLOAT16, INFO_NCE_MEMORY, INFO_NCE_QUEUE, NT_XENT, UNIFORMITY
from .metric import NCA
from .neighbors import KMEANS_ASSIGN, KNN, KNN_FEW, KNN_LOW
from .ranking import BATCH_TRIPLET_HARD, BATCH_TRIPLET_SEMIHARD
from .supervised import DCL, SIGLIP, SUP_CON

CASES: tuple[Case, ...] = (
    INFO_NCE,
    INFO_NCE_BFLOAT16,
    INFO_NCE_MEMORY,
    INFO_NCE_QUEUE,
    CLIP,
    NT_XENT,
    HCL,
    MULTI_SIMILARITY,
    SUP_CON,
    DCL,
    SIGLIP,
    UNIFORMITY,
    BATCH_TRIPLET_HARD,
    BATCH_TRIPLET_SEMIHARD,
    CDIST,
    CDIST_BACKWARD,
    CDIST_CITYBLOCK,
    CDIST_BATCH,
    GAUSSIAN_GRAM,
    GRAM_BACKWARD,
    CHI_SQUARED_GRAM,
    GAUSSIAN_MATMUL,
    GAUSSIAN_MATMUL_GRADIENT,
    MATERN_MATMUL,
    RATIONAL_QUADRATIC_MATMUL,
    COMPOSED_MATMUL,
    COMPOSED_MATMUL_GRADIENT,
    CKA_LINEAR,
    CKA_GAUSSIAN,
    KERNEL_RIDGE,
    KMEANS_ASSIGN,
    KMEANS,
    KMEANS_SEEDING,
    KMEANS_BATCH,
    KNN,
    NCA,
    KNN_FEW,
    KNN_LOW,
)


def select(patterns: str | None) -> list[Case]:
    """The cases that match a comma-separated list of names or shell patterns; all without one."""
    if patterns is None:
        return list(CASES)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            raise ValueError(f"ops: expected some of {', '.join(case.name for case in CASES)}, got {pattern!r}")
    return [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in wanted)]
