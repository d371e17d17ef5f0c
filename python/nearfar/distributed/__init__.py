from .losses import _launch
from ..losses import softmax, sigmoid
def info_nce_loss(*a, group=None, **k): return _launch(group, softmax.info_nce_loss, *a, **k)
def clip_loss(*a, group=None, **k): return _launch(group, softmax.clip_loss, *a, **k)
def nt_xent_loss(*a, group=None, **k): return _launch(group, softmax.nt_xent_loss, *a, **k)
def siglip_loss(*a, group=None, **k): return _launch(group, sigmoid.siglip_loss, *a, **k)
