"""A sampler for policies that are cut over workers, without Ray."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.cluster.sharded import ShardedPolicy
from posttrain.models.policy import Policy
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import Renderer


class Here:
    """Rollouts from `whole`, a policy in one piece that is given the trained weights before each call."""

    def __init__(self, policy: ShardedPolicy, whole: Policy, renderer: Renderer) -> None:
        self.policy, self.whole, self.sampler = policy, whole, LocalSampler(whole, renderer)

    @torch.no_grad()
    def take(self) -> None:
        """Give `whole` the weights of now."""
        for name, weight in self.policy.weights().items():
            self.whole.parameters()[name].copy_(weight)

    def __call__(self, *question: Any) -> Any:
        self.take()
        return self.sampler(*question)
