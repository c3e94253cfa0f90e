"""Bytes that FSDP2's collectives move, counted where they are called: by `volumes.py`, and by a test."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from posttrain.cluster.exchange import AllGather, ReduceScatter


def counted() -> Counter[str]:
    """What every all-gather and reduce-scatter of this process moves from now on, the whole of what is cut."""
    sent: Counter[str] = Counter()
    gather, scatter = AllGather.__call__, ReduceScatter.__call__

    def all_gather(self: AllGather, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sent["all-gather"] += output_tensor.nbytes
        gather(self, output_tensor, *args, **kwargs)

    def reduce_scatter(
        self: ReduceScatter, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **kwargs: Any
    ) -> None:
        sent["reduce-scatter"] += input_tensor.nbytes
        scatter(self, output_tensor, input_tensor, **kwargs)

    AllGather.__call__, ReduceScatter.__call__ = all_gather, reduce_scatter  # type: ignore[method-assign]
    return sent
