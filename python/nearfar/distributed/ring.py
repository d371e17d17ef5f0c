"""The processes of a group as a circle: what they send each other, and the agreement before they do.

A block of rows visits one process after the other; while a process computes with the block it has, it already receives
the next one and passes its own on. What the processes compute for a block travels behind it, is added to on the way,
and comes home. Nobody ever holds more than a few blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Tensors = tuple[Tensor, ...]
_COUNTS = 3  # numbers of a process that others need to know


class Pending:
    """What has been posted; keeps alive what is on its way."""

    def __init__(self, operations: list[dist.P2POp], sent: Tensors, received: Tensors) -> None:
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._sent, self._received = sent, received

    def wait(self) -> Tensors:
        """What has been received; on a GPU the stream waits, not the caller."""
        for work in self._works:
            work.wait()
        return self._received


class Ring:
    """A process group as a circle."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "nearfar.distributed: no process group; call torch.distributed.init_process_group first (torchrun "
                "starts the processes)"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        # What each kind of device communicates by, such as "cpu:gloo,cuda:nccl".
        pairs = (item.partition(":") for item in str(dist.get_backend_config(group)).split(","))
        self.backends = {device: backend for device, _, backend in pairs}
        # Where small numbers lie that are not on a device already.
        self.device = torch.device("cpu" if "cpu" in self.backends else "cuda")

    def check_device(self, tensor: Tensor, name: str) -> None:
        """Refuses a tensor that this group cannot send."""
        kind = tensor.device.type
        if kind not in self.backends:
            raise ValueError(f"{name}: the process group sends tensors of {', '.join(self.backends)}, not of {kind}")
        if kind == "cuda" and self.backends[kind] == "gloo":
            raise ValueError(f"{name}: gloo does not send tensors on a GPU; initialise the group with nccl")

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def gather(self, numbers: Tensor) -> Tensor:
        """(size, k): the k numbers of every process."""
        numbers = numbers.contiguous()
        gathered = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(gathered, numbers, group=self.group)
        return torch.stack(gathered)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over processes, in their order: every process has the same bits."""
        gathered = self.gather(numbers)
        total = gathered[0].clone()
        for own in gathered[1:]:
            total += own
        return total

    def gather_objects(self, value: T) -> list[T]:
        """The (small) object of every process."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def meet(self, check: Callable[[], tuple[T, Sequence[int], dict[str, Any]]]) -> tuple[T, list[list[int]]]:
        """What `check` returns first here, and its second, some counts, of every process.

        Nobody goes on unless all can: where `check` raises, this process raises that, and the others say so, instead of
        waiting for it. Its third, options by name, must be the same everywhere.
        """
        failed: Exception | None = None
        result: Any = None
        counts: Sequence[int] = ()
        options: dict[str, Any] = {}
        try:
            result, counts, options = check()
        except Exception as error:
            failed = error
        digest = zlib.crc32(repr(sorted(options.items())).encode())
        row = [int(failed is None), digest, *counts, *(0,) * (_COUNTS - len(counts))]
        table = self.gather(torch.tensor(row, device=self.device)).tolist()
        if any(not ok for ok, *_ in table) or any(other != table[0][1] for _, other, *_ in table):
            self._disagree(failed, options)
        return result, [counts for _, _, *counts in table]

    def _disagree(self, failed: Exception | None, options: dict[str, Any]) -> None:
        said = self.gather_objects((f"{type(failed).__name__}: {failed}" if failed else None, options))
        if failed is not None:
            raise failed
        for rank, (message, _) in enumerate(said):
            if message is not None:
                raise RuntimeError(f"nearfar.distributed: rank {rank} has refused its arguments: {message}")
        for rank, (_, other) in enumerate(said):
            for name in sorted(said[0][1].keys() | other.keys()):
                first, own = said[0][1].get(name), other.get(name)
                if first != own:
                    raise ValueError(f"{name}: expected the same on all ranks, got {first!r} on 0, {own!r} on {rank}")

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def post(self, tensors: Tensors, hops: int, rows: int) -> Pending:
        """Send to the process `hops` before this one and receive from that `hops` after it, which sends `rows` rows."""
        sent = tuple(tensor.contiguous() for tensor in tensors)
        received = tuple(torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in sent)
        target, source = ((self.rank + step) % self.size for step in (-hops, hops))
        if self.group is not None:
            target, source = (dist.get_global_rank(self.group, rank) for rank in (target, source))
        operations = []
        for tag, (out, into) in enumerate(zip(sent, received, strict=True)):
            if out.numel():
                operations.append(dist.P2POp(dist.isend, out, target, self.group, tag))
            if into.numel():
                operations.append(dist.P2POp(dist.irecv, into, source, self.group, tag))
        return Pending(operations, sent, received)

    def visit(
        self,
        block: Tensors,
        sizes: Sequence[int],
        work: Callable[[int, Tensors], Tensors],
        merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
        steps: int | None = None,
    ) -> Tensors:
        """Let this process's block visit the others, or the `steps` before it.

        ``work(rank, block)`` is called with the own block, then with that of each of the next ranks. It returns
        tensors with as many rows as the block has; they are merged in the order of visits, brought home and returned.
        `sizes` are the numbers of rows of everybody's block.
        """
        steps = self.size - 1 if steps is None else steps
        coming = self.post(block, 1, sizes[(self.rank + 1) % self.size]) if steps else None
        own = work(self.rank, block)
        following: Pending | None = None
        for step in range(1, steps + 1):
            source = (self.rank + step) % self.size
            after = sizes[(source + 1) % self.size]
            assert coming is not None
            block = coming.wait()
            if step < steps:
                coming = self.post(block, 1, after)
            parts = work(source, block)
            if following is not None:
                parts = tuple(map(merge, following.wait(), parts))
            if parts:
                following = self.post(parts, 1, after) if step < steps else self.post(parts, -steps, sizes[self.rank])
        return own if following is None else tuple(map(merge, own, following.wait()))
