"""An implicit process reward model, which learns from outcomes alone while the policy that it rewards is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from posttrain.credit.batch import as_row
from posttrain.forest import Forest, Row
from posttrain.losses import Counts, bco_unpaired
from posttrain.losses.reduce import reduce_pairs, segment_sum
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.memory import recomputing
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Optim
from posttrain.recipe.rl import Grpo, Prime
from posttrain.records import Failure, Ledger, Rollout
from posttrain.training.batch import Batch, LogProbs, Metrics, frozen_logprobs
from posttrain.training.loop import gradient
from posttrain.training.optim import adamw, clip, load_state, state_tensors, zero_state
from posttrain.training.world import World

WEIGHTS, MOMENTS = "weights/", "optimizer/"
"""Before the names of what a checkpoint holds of it."""


class ImplicitRewards(LogProbs):
    """beta log(model / reference) at each token, where the model learns whether whole answers are right: cross-entropy
    of s(beta sum_t log(model / reference)) (PRIME, Cui et al., 2502.01456, eq. 3 and 4; Yuan et al., 2412.01981).

    Reference and model are at first what the stage starts from. The model is a second set of the weights that the
    policy trains, which changes places with the first: under an adapter a second adapter on the same base.

    Departures. Each batch of rollouts is one step of AdamW, at a constant rate, before the model that learned from it
    says what it is worth. What is right is what the scores call correct, whatever they are worth. Log-probabilities are
    those at temperature 1.
    """

    def __init__(self, stage: Grpo, prime: Prime, policy: Policy, reference: Mapping[str, Tensor]) -> None:
        """`reference`: the policy's weights as the stage begins; must not be changed."""
        self.stage, self.prime, self.policy, self.reference = stage, prime, policy, reference
        self.optim = Optim(lr=prime.lr)
        self.weights = {name: nn.Parameter(weight.detach().clone()) for name, weight in reference.items()}
        self.optimizer = adamw(self.weights.items(), self.optim)
        zero_state(self.optimizer)

    def __call__(
        self, rollouts: Sequence[Rollout], right: Sequence[bool], world: World
    ) -> tuple[list[list[float]], dict[str, float], Ledger]:
        """The rewards of each rollout's tokens (0 where not sampled) by the model that has learned which rollouts are
        right; what learning showed, and what all of it cost.

        Raises:
            Failure: its loss or gradient is not finite.
        """
        if not rollouts:
            return [], {}, Ledger()
        rows = tuple(map(as_row, rollouts))
        with self.policy.swapped(self.reference):
            self.origin = self._logprobs(rows, world)
        told, ledger = self._learn(rows, right, world)
        with self.policy.swapped(self._now()):
            found = self._logprobs(rows, world)
        config = self.policy.model.config
        ledger += Ledger(
            reward_tokens=2 * sum(map(len, rows)),
            flops=2 * sum(forward_flops_per_token(config, len(row)) * len(row) for row in rows),
        )
        rewards = [
            [self.prime.beta * (p - q) for p, q in zip(now, before, strict=True)]
            for now, before in zip(found, self.origin, strict=True)
        ]
        return rewards, told, ledger

    def _learn(self, rows: tuple[Row, ...], right: Sequence[bool], world: World) -> tuple[dict[str, float], Ledger]:
        """One step; the policy is left as it was."""
        self.right = right
        batch = Batch(rows, tuple((i,) for i in range(len(rows))), Counts(pairs=len(rows)))
        model, budget = self.policy.model, self.stage.tokens_per_forward
        with self.policy.swapped(self._now()), torch.enable_grad():
            with recomputing(model, self.stage.activation_checkpointing):
                found, cost = gradient(self.policy, self, batch, world, budget)
            for name, parameter in self.policy.parameters().items():
                self.weights[name].grad, parameter.grad = parameter.grad, None
        norm = clip(self.weights.values(), self.optim.max_grad_norm).item()
        if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
            raise Failure(
                f"stage {self.stage.id!r}: the process reward model's loss is {found['loss']}, its gradient's norm "
                f"{norm}; lower prime.lr, and choose another --out"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"process_loss": found["loss"], "process_accuracy": found["accuracy"]}, cost

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor) -> tuple[Tensor, Metrics]:
        sums_S = segment_sum(logps_T[forest.target_T], forest.sequence_T[forest.target_T], len(rows))
        ratios_S = sums_S - torch.tensor([math.fsum(self.origin[r]) for r in rows], dtype=sums_S.dtype)
        right_S = torch.tensor([self.right[r] for r in rows])
        loss = reduce_pairs(bco_unpaired(ratios_S, right_S, 0.0, beta=self.prime.beta), batch.counts)
        agrees_S = ((ratios_S.detach() > 0) == right_S).to(sums_S.dtype)
        return loss, {"accuracy": reduce_pairs(agrees_S, batch.counts).item()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it."""
        weights = {f"{WEIGHTS}{name}": weight for name, weight in self._now().items()}
        return weights | {f"{MOMENTS}{name}": t for name, t in state_tensors(self.optimizer).items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"{WEIGHTS}{name}"])
        load_state(self.optimizer, {n.removeprefix(MOMENTS): t for n, t in tensors.items() if n.startswith(MOMENTS)})

    def _now(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def _logprobs(self, rows: Sequence[Row], world: World) -> list[list[float]]:
        return frozen_logprobs(self.policy, rows, self.stage.tokens_per_forward, world=world)
