"""Rollouts from Ray actors, each with a whole model of its own.

Weights travel through Ray's object store: put there once a version, fetched once by each node. Every request says which
version it is for, so an actor that was restarted has the right weights before it samples again, and every rollout
carries the digest of what its actor really held.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.chat import Renderer
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Ledger, Rollout, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import Answer
from posttrain.training.world import World

Packed = dict[str, NDArray[np.uint8]]
"""Weights as bytes, which the object store hands out without a copy."""


@ray.remote(max_restarts=-1, max_task_retries=-1)
class RolloutActor:
    """Sampling changes nothing but which weights are held, so Ray may ask again what a lost actor did not answer."""

    def __init__(self, load: Callable[[], Policy], system: str | None) -> None:
        self.policy = load()
        self.sampler = LocalSampler(self.policy, Renderer(self.policy.tokenizer, system=system))
        self.version = self.policy.digest()

    def sample(
        self,
        version: str,
        weights: list[ray.ObjectRef[Packed]],
        prompts: Sequence[Example],
        n: int,
        sampling: Sampling,
        seed: int,
        first: int,
    ) -> tuple[list[Rollout], Ledger]:
        """`weights` is one reference in a list: fetched only where another version is held."""
        if version != self.version:
            unpack_weights(ray.get(weights[0]), self.policy)
            self.version = self.policy.digest()
        return self.sampler(prompts, n, sampling, seed, first)


class Pool:
    """A `Sampler` over actors that can be asked ahead. All workers ask together; the leader's answer is everyone's.

    The prompts of a request are cut over the actors. Each completion draws from its own random stream, so the rollouts
    are those of one sampler, but for rounding: how many are computed together may change a last bit.
    """

    def __init__(self, actors: Sequence[Any], policy: Policy, world: World) -> None:
        self.actors, self.policy, self.world = actors, policy, world
        self.version = ""
        self.weights: ray.ObjectRef[Packed] | None = None

    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        return self.request(prompts, n, sampling, seed)()

    def request(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Answer:
        weights = self.policy.weights()
        asked: list[ray.ObjectRef[Any]] = []
        if self.world.rank == 0:
            version = self.policy.digest(weights)
            if version != self.version:
                self.version, self.weights = version, ray.put(pack_weights(weights))
            asked = [
                actor.sample.remote(version, [self.weights], prompts[start:stop], n, sampling, seed, start)
                for actor, (start, stop) in zip(self.actors, cuts(len(prompts), len(self.actors)), strict=True)
                if start < stop
            ]

        def answer() -> tuple[list[Rollout], Ledger]:
            found: tuple[list[Rollout], Ledger] | UserError | None = None
            if self.world.rank == 0:
                try:
                    parts = ray.get(asked)
                    found = [r for rollouts, _ in parts for r in rollouts], sum((cost for _, cost in parts), Ledger())
                except UserError as error:
                    found = UserError(str(error))
            found = self.world.gather(found)[0]
            if isinstance(found, UserError):
                raise found
            assert found is not None
            return found

        return answer


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """`size` things in `parts` runs, start and stop, that differ by one at most."""
    ends = [size * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def pack_weights(weights: Mapping[str, Tensor]) -> Packed:
    return {name: t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in weights.items()}


@torch.no_grad()
def unpack_weights(packed: Packed, policy: Policy) -> None:
    """Put the weights into the policy. Those that it does not have, or too few, are a KeyError."""
    parameters = policy.parameters()
    for name in parameters.keys() | packed.keys():
        parameter = parameters[name]
        raw = torch.frombuffer(bytearray(packed[name]), dtype=parameter.dtype) if packed[name].size else None
        if raw is not None:
            parameter.copy_(raw.view(parameter.shape))
