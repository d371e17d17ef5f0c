"""The losses as torch.nn.Modules: the same mathematics, parameters held by the module. Imports torch."""

from .memory import MemoryBank
from .ranking import BatchTripletLoss, ContrastiveLoss, TripletMarginLoss
from .sigmoid import SigLipLoss
from .softmax import ClipLoss, DCLLoss, InfoNCELoss, NTXentLoss
from .sphere import AlignmentLoss, UniformityLoss
from .supervised import NPairsLoss, SupConLoss

__all__ = [
    "AlignmentLoss",
    "BatchTripletLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "DCLLoss",
    "InfoNCELoss",
    "MemoryBank",
    "NPairsLoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "UniformityLoss",
]
__all__ = ["AlignmentLoss", "ClipLoss", "InfoNCELoss", "NTXentLoss", "UniformityLoss"]
