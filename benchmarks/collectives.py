"""Bytes that FSDP2's collectives move, counted where they are called: by `volumes.py`, and by a test."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist


def counted() -> Counter[str]:
    """What every all-gather and reduce-scatter of this process moves from now on, the whole of what is cut."""
    sent: Counter[str] = Counter()
    gather, scatter = dist.all_gather_single, dist.reduce_scatter_single

    def all_gather(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["all-gather"] += output.nbytes
        return gather(output, *args, **kwargs)

    def reduce_scatter(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["reduce-scatter"] += output.nbytes * dist.get_world_size()
        return scatter(output, *args, **kwargs)

    dist.all_gather_single, dist.reduce_scatter_single = all_gather, reduce_scatter
    return sent
