"""The operations of the benchmark. A new line is one `Case` in the file of its family, named here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..case import Case
from .distances import CDIST, CDIST_BACKWARD
from .gram import CKA_GAUSSIAN, CKA_LINEAR, KERNEL_RIDGE
from .kernels import (
    COMPOSED_MATMUL,
    GAUSSIAN_GRAM,
    GAUSSIAN_MATMUL,
    GAUSSIAN_MATMUL_GRADIENT,
    MATERN_MATMUL,
    RATIONAL_QUADRATIC_MATMUL,
)
from .losses import CLIP, INFO_NCE, INFO_NCE_MEMORY, NT_XENT, UNIFORMITY
from .neighbors import KMEANS_ASSIGN, KNN

CASES: tuple[Case, ...] = (
    INFO_NCE,
    INFO_NCE_MEMORY,
    CLIP,
    NT_XENT,
    UNIFORMITY,
    CDIST,
    CDIST_BACKWARD,
    GAUSSIAN_GRAM,
    GAUSSIAN_MATMUL,
    GAUSSIAN_MATMUL_GRADIENT,
    MATERN_MATMUL,
    RATIONAL_QUADRATIC_MATMUL,
    COMPOSED_MATMUL,
    CKA_LINEAR,
    CKA_GAUSSIAN,
    KERNEL_RIDGE,
    KMEANS_ASSIGN,
    KNN,
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
