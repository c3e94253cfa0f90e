"""FSDP2's two collectives on CPUs: each worker sends each other one its part directly.

They move what a ring moves, (N - 1) / N of the tensor in and out of each of N workers. gloo's own ones take longer
between two processes of one machine (`benchmarks/cluster.py` compares them); nothing else was measured. They are handed
to FSDP, which calls `allocate` for what it passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Exchange):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool) -> None:
        """`output_tensor` [N * n] becomes every worker's `input_tensor` [n], by rank. It waits, asked to or not."""
        parts = output_tensor.view(group.size(), -1)
        parts[group.rank()].copy_(input_tensor)  # itself where FSDP lets the two share memory
        _exchange([input_tensor] * group.size(), list(parts), group)


class ReduceScatter(_Exchange):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object) -> None:
        """`output_tensor` [n] becomes the sum over workers of this rank's part of their `input_tensor` [N * n].

        Added up in the order of the ranks, so that every run gives the same; `op` is always a sum.
        """
        parts = input_tensor.view(group.size(), -1)
        received = torch.empty_like(parts)
        received[group.rank()].copy_(parts[group.rank()])
        _exchange(list(parts), list(received), group)
        torch.sum(received, 0, out=output_tensor)


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give `sent[k]` to worker k and take `received[k]` from it, for every other worker at once."""
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    work = [dist.P2POp(dist.isend, sent[k], group=group, group_peer=k) for k in others]
    work += [dist.P2POp(dist.irecv, received[k], group=group, group_peer=k) for k in others]
    for one in dist.batch_isend_irecv(work):
        one.wait()
