"""The losses as torch.nn.Modules: the same mathematics, parameters held by the module. Imports torch."""

from .log_sum_exp import CircleLoss, HCLLoss, MultiSimilarityLoss, ProxyAnchorLoss
from .softmax import ClipLoss, InfoNCELoss, NTXentLoss
from .sphere import AlignmentLoss, UniformityLoss

__all__ = [
    "AlignmentLoss",
    "CircleLoss",
    "ClipLoss",
    "HCLLoss",
    "InfoNCELoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "ProxyAnchorLoss",
    "UniformityLoss",
]
