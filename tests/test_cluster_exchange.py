"""Workers that exchange their parts directly have what the collectives of FSDP2 promise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from workers import together

from posttrain.cluster.exchange import AllGather, ReduceScatter


def test_three_workers() -> None:
    """Worker r gives the part [r, r], and gradients 10 r + [0, 1, 2, 3, 4, 5]; 10 (0 + 1 + 2) + 3 i is their sum."""
    for rank, (whole, part) in enumerate(together(3, _exchanged)):
        assert whole == [0, 0, 1, 1, 2, 2]
        assert part == [30 + 3 * i for i in (2 * rank, 2 * rank + 1)]


def _exchanged() -> tuple[list[float], list[float]]:
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    whole, part = torch.full((6,), torch.nan), torch.empty(2)
    own = whole[2 * rank : 2 * rank + 2].fill_(rank)  # the two share memory, as FSDP's do
    AllGather()(whole, own, group, async_op=False)
    ReduceScatter()(part, torch.arange(6.0) + 10 * rank, group, op=None)
    return whole.tolist(), part.tolist()
