"""The losses as torch.nn.Modules: the same mathematics, parameters held by the module. Imports torch."""

from .log_sum_exp import CircleLoss, HCLLoss, MultiSimilarityLoss, ProxyAnchorLoss
from .memory import MemoryBank
from .ranking import BatchTripletLoss, ContrastiveLoss, TripletMarginLoss
from .sigmoid import SigLipLoss
from .softmax import ClipLoss, DCLLoss, InfoNCELoss, NTXentLoss
from .sphere import AlignmentLoss, UniformityLoss
from .supervised import NPairsLoss, SupConLoss

__all__ = [
    "AlignmentLoss",
    "BatchTripletLoss",
    "CircleLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "DCLLoss",
    "HCLLoss",
    "InfoNCELoss",
    "MemoryBank",
    "MultiSimilarityLoss",
    "NPairsLoss",
    "NTXentLoss",
    "ProxyAnchorLoss",
    "SigLipLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "UniformityLoss",
]
