"""Learning a Mahalanobis metric, d_M(x, y) = |L (x - y)| with M = L^T L, from labels or from pairs.

scikit-learn's interface without scikit-learn; SciPy, where its optimiser is used, is imported by `fit`.
"""

from .itml import ITML
from .lmnn import LMNN
from .mmc import MMC
from .nca import NCA

__all__ = ["ITML", "LMNN", "MMC", "NCA"]
