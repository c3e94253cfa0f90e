"""The workers that take a step together: how many, which one this is, and the one way they talk."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist


class World(Protocol):
    rank: int
    """This worker's number, from 0; worker 0 leads: it alone writes what is written once."""
    size: int

    def gather(self, value: Any) -> list[Any]:
        """What every worker gave, in the order of their ranks, on every worker. Waits for all of them."""


class Alone:
    """One worker."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Distributed:
    """The workers of torch.distributed's default group, which must be up."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Alone()
