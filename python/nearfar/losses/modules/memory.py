"""A queue of keys from earlier batches, as negatives for later ones (MoCo, cross-batch memory)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...arrays import FLOATS, dtype_name, integer


class MemoryBank(nn.Module):
    """The last `size` keys that were enqueued: a ring buffer, for `nearfar.info_nce_loss(query, key, bank.keys)`.

    Parameters
    ----------
    size : int
        How many keys are kept, at least 1.
    dim : int
        Columns of a key, at least 1.
    dtype : torch.dtype, optional
        What keys are stored in, torch's default dtype if not given. Losses want queries of the same dtype: store
        ``torch.bfloat16`` for features that autocast makes so.

    Attributes
    ----------
    keys : Tensor (n, dim), n <= size
        The keys held so far, in no particular order, without a gradient. A view of the bank's memory, not a copy. It
        does not change: if it is still in use when `enqueue` is called, by a variable or by the graph of a loss that
        waits for its backward pass, the bank goes on in a copy of its memory, and only then. What is derived from it
        (a slice, a transpose) does not count as use: there a later `enqueue` shows, and torch refuses a backward pass
        that needs it.

    Notes
    -----
    The state are two buffers, ``rows`` and ``total`` (the number of keys ever enqueued): they follow ``to()`` and
    ``state_dict()``. Keys are stored as given; losses normalise them. He et al.: Momentum Contrast for Unsupervised
    Visual Representation Learning, 2020; unlike their queue, batches of any size are taken, also larger than the bank.

    Examples
    --------
    >>> import torch, nearfar as nf
    >>> bank = nf.MemoryBank(4, 2)
    >>> bank.keys.shape
    torch.Size([0, 2])
    >>> bank.enqueue(torch.arange(12.0).reshape(6, 2))
    >>> bank.keys[:, 0].tolist()
    [8.0, 10.0, 4.0, 6.0]
    """

    rows: Tensor
    total: Tensor
    _lent: weakref.ref[Tensor] | None = None  # lives as long as anything in Python or in a graph holds it

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if integer(value, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if str(dtype).removeprefix("torch.") not in FLOATS:
            raise TypeError(f"dtype: expected one of {', '.join(FLOATS)}, got {dtype}")
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Add rows (B, dim), replacing the oldest ones; of more than `size` rows the last ones stay.

        Any floating dtype, rounded to that of the bank. Gradients end here.
        """
        rows, total = self.rows, self.total  # once: a module looks its buffers up for two microseconds
        size, dim = rows.shape
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys: expected a torch.Tensor, got {type(keys).__name__}")
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys: expected shape (b, {dim}), got {tuple(keys.shape)}")
        if dtype_name(keys) not in FLOATS:
            raise TypeError(f"keys: expected a floating dtype ({', '.join(FLOATS)}), got {dtype_name(keys)}")
        if keys.device != rows.device:
            raise ValueError(f"keys: expected device {rows.device} to match the bank, got {keys.device}")
        skipped = max(keys.shape[0] - size, 0)
        if self._lent is not None:
            if self._lent() is not None:
                self.rows = rows = rows.clone()
            self._lent = None
        places = torch.arange(skipped, keys.shape[0], device=keys.device).add_(total).remainder_(size)
        rows.index_copy_(0, places, keys[skipped:].to(rows.dtype))
        total += keys.shape[0]

    def __len__(self) -> int:
        return min(int(self.total), self.rows.shape[0])

    @property
    def keys(self) -> Tensor:
        """The keys held so far: a view that later keys do not change."""
        lent = None if self._lent is None else self._lent()
        if lent is None or lent._base is not self.rows:  # another dtype or device by now
            lent = self.rows[: len(self)]
            self._lent = weakref.ref(lent)
        return lent

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lent": None}

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"size={size}, dim={dim}, dtype={self.rows.dtype}"
