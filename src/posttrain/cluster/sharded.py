"""A policy whose weights are spread over workers by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from posttrain.cluster.exchange import AllGather, ReduceScatter
from posttrain.forest.attention import decoder
from posttrain.models.policy import Policy
from posttrain.training.world import World


class _Root(nn.Module):
    """Makes one forward pass of FSDP out of all that a method computes: the decoder, then the head in pieces.

    The head may be the embedding, and is used outside of the decoder's own forward; both belong to the root's group,
    which stays whole from the beginning of the pass until its gradient is done.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        return compute(self.model, *args)


@dataclass(frozen=True, eq=False)
class ShardedPolicy(Policy):
    """Each worker holds a part of every trained weight, its gradient and its moments, as a DTensor of the same name.

    Gradients add up over the workers, for each computes its part of the loss. What is said of all workers in
    `Policy` holds for `weights`, `digest`, `run` and a block under `swapped`.
    """

    root: nn.Module = field(kw_only=True)
    each_pass: bool = field(kw_only=True)
    """Whether weights and gradients travel in each pass; otherwise once a step, whatever its number of passes."""

    def run(self, compute: Callable[..., Tensor], *args: Any, more: bool = False) -> Tensor:
        ends = self.each_pass or not more
        for group in _groups(self.root):
            group.set_requires_gradient_sync(ends)
            group.set_reshard_after_backward(ends)
            group.set_is_last_backward(ends)
        found: Tensor = self.root(compute, *args)
        if not torch.is_grad_enabled():  # no backward pass will follow, after which the root's group is cut again
            for group in _groups(self.root):
                group.reshard()
        return found

    def weights(self) -> dict[str, Tensor]:
        for group in _groups(self.root):  # in FSDP's own collectives: one a group, not one a weight
            group.unshard()
        whole = self.snapshot()
        for group in _groups(self.root):
            group.reshard()
        return whole

    @contextmanager
    def swapped(self, snapshot: Mapping[str, Tensor]) -> Iterator[None]:
        """As for any policy, but by copying: FSDP keeps references to the storage of its parts."""
        kept = self.snapshot()
        try:
            self._put(snapshot)
            with torch.no_grad():
                yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(weights[name])


def shard(policy: Policy, world: World, always: bool = False) -> ShardedPolicy:
    """`policy` spread over the workers of `world`; it must not be used itself any more.

    Trained weights are cut between steps and whole within one: a step is one all-gather of them and one reduce-scatter
    of their gradient, which each worker adds up over its passes. Frozen weights, under an adapter, are whole on every
    worker. (ZeRO's stage 2, Rajbhandari et al., 1910.02054, but for weights that are cut between steps.)

    With `always`, for models of which no worker can hold all, all weights are cut within a step too (stage 3): every
    layer is gathered when its turn comes, forward and backward, and its gradient cut at once, in each pass.
    """
    model, root = policy.model, _Root(policy.model)
    weights = list(model.parameters())
    mesh = init_device_mesh(weights[0].device.type, (world.size,))
    whole = set() if always else {p for p in weights if not p.requires_grad}
    if not whole:
        kinds = decoder(model)._no_split_modules or ()
        for layer in [m for m in model.modules() if type(m).__name__ in kinds]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=always)
    fully_shard(root, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    for group in _groups(root):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        if mesh.device_type == "cpu":
            group.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
            group.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
    facts = policy.tokenizer, policy.source, policy.base_digest, policy.revision
    return ShardedPolicy(model, *facts, root=root, each_pass=always)


def _groups(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]
