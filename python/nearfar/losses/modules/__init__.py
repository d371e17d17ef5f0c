"""The losses as torch.nn.Modules: the same mathematics, parameters held by the module. Imports torch."""

from .ranking import BatchTripletLoss, ContrastiveLoss, TripletMarginLoss
from .softmax import ClipLoss, InfoNCELoss, NTXentLoss
from .sphere import AlignmentLoss, UniformityLoss

__all__ = ["AlignmentLoss", "ClipLoss", "InfoNCELoss", "NTXentLoss", "UniformityLoss"]
__all__ += ["BatchTripletLoss", "ContrastiveLoss", "TripletMarginLoss"]
