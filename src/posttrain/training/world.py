"""The workers that take a step together: how many, which one this is, and the one way they talk."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class World(Protocol):
    rank: int
    """This worker's number, from 0; worker 0 leads: it alone writes what is written once."""
    size: int

    def gather(self, value: Any) -> list[Any]:
        """What every worker gave, in the order of their ranks, on every worker. Waits for all of them."""

    def twin(self) -> World:
        """The same workers on a line of their own, for a second thread. Every worker makes it, in the same order."""


class Alone:
    """One worker."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def twin(self) -> Alone:
        return self


class Distributed:
    """The workers of a process group of torch.distributed, by default of the one of all, which must be up."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def twin(self) -> Distributed:
        return Distributed(dist.new_group(backend="gloo"))


ALONE = Alone()


def local(tensor: Tensor) -> Tensor:
    """What this worker holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
