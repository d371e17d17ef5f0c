"""Products with a Gram matrix whose points are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import check_matrix, check_points, compute_dtype, is_torch
from ..kernels.named import by_name, resolve
from .ring import Ring, Tensors


def gram_matmul(
    x: Tensor, y: Tensor | None, v: Tensor, kernel: Any = "gaussian", *, group: Any = None, **params: Any
) -> Tensor:
    """``k(X, Y) @ V`` for points and vectors whose rows are spread over processes, without the Gram matrix.

    X, Y and V are the rows of all ranks, in their order. Each rank gets the product's rows of its own part of X. Blocks
    of Y and V travel round a ring.

    Parameters
    ----------
    x : tensor (n, D)
        This rank's rows of X.
    y : tensor (m, D) or None
        This rank's rows of Y; None: those of X.
    v : tensor (m, R) or (m,)
        This rank's rows of V.
    kernel : str or Kernel
        As in `nearfar.gram`, with `params`; the same on every rank.
    group : torch.distributed process group, optional
        Default: all processes.

    Returns
    -------
    tensor (n, R) or (n,)

    Raises
    ------
    NotImplementedError
        If a rank wants gradients, of hyper-parameters too: pass detached tensors, or call it under ``torch.no_grad()``.
    ValueError, TypeError
        As ``kernel.matmul``; arguments that differ between ranks where they may not.
    RuntimeError
        No process group; or another rank has refused its arguments.
    """
    ring = Ring(group)

    def check() -> tuple[Any, list[int], dict[str, Any]]:
        check_points(x=x, y=y, v=v)
        if not is_torch(x):
            raise TypeError(f"x: expected a torch.Tensor, got a {type(x).__name__}; processes exchange tensors")
        columns = x if y is None else y
        check_matrix(x, "x")
        check_matrix(columns, "y")
        if columns.shape[1] != x.shape[1]:
            raise ValueError(f"y: expected {x.shape[1]} columns to match x, got shape {tuple(columns.shape)}")
        if v.ndim not in (1, 2) or v.shape[0] != columns.shape[0]:
            raise ValueError(f"v: expected {columns.shape[0]} rows to match y, got shape {tuple(v.shape)}")
        ring.check_device(x, "x")
        found = by_name(kernel, x, **params) if isinstance(kernel, str) else resolve(kernel, x)
        wants = torch.is_grad_enabled() and any(t.requires_grad for t in (x, columns, v))
        if torch.is_grad_enabled() and len(x) and len(columns):  # one pair tells, hyper-parameters included
            wants = found.matmul(x[:1], columns[:1], v[:1]).requires_grad
        if wants:
            raise NotImplementedError("gram_matmul: no gradients over processes; pass detached tensors")
        options = {"kernel": repr(found), "dtype": str(x.dtype), "D": x.shape[1], "R": tuple(v.shape[1:])}
        return found, [len(columns)], options

    found, counts = ring.meet(check)
    columns = x if y is None else y
    dtype = getattr(torch, compute_dtype(x))
    out = torch.zeros((len(x), *v.shape[1:]), dtype=dtype, device=x.device)

    def work(source: int, block: Tensors) -> Tensors:
        points, vectors = block
        if len(x) and len(points):
            out.add_(found.matmul(x, points, vectors))
        return ()

    with torch.no_grad():
        ring.visit((columns.detach(), v.detach()), [own for own, *_ in counts], work)
    return out
