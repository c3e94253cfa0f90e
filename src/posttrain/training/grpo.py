"""Group-relative policy optimisation: sample a group, score it, move towards what scored above its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import at_all, at_sampled, by_rollout, by_token, groups
from posttrain.credit.prime import process_returns
from posttrain.credit.reinforce import returns
from posttrain.credit.rloo import leave_one_out
from posttrain.forest import Forest
from posttrain.losses import kl, policy_gradient, ratio, reduce_tokens
from posttrain.losses.policy import Level, cispo, gmpo, sapo, vespo
from posttrain.losses.reduce import Reduction
from posttrain.recipe.rl import Grpo
from posttrain.records import Ledger, Rollout, Score
from posttrain.training.batch import Batch, Metrics
from posttrain.training.own import Scored
from posttrain.training.prime import ImplicitRewards
from posttrain.training.rollouts import RolloutMethod

PROCESS = "prime/"
"""Before the names of what a checkpoint holds of process rewards."""


class GrpoMethod(RolloutMethod):
    """GRPO (Shao et al., 2402.03300) and what has the same shape: completions of one prompt against each other.

    Departures from Shao et al.: the defaults of `aggregate` and the KL weight are DAPO's.
    """

    stage: Grpo

    def __init__(self, stage: Grpo, *args: Any, **kwargs: Any) -> None:
        super().__init__(stage, *args, **kwargs)
        self.objective, self.level = surrogate(stage)
        if stage.objective == "clip":
            self.clip = clip(stage)
        # A group without signal still has something to say of where the policy has moved, and how sure it is.
        self.always = bool(stage.entropy_weight or (stage.kl_weight and stage.kl_in == "loss"))
        self.process: ImplicitRewards | None = None
        if stage.prime is not None:
            origin = self.reference or self.policy.snapshot()
            self.process = ImplicitRewards(stage, stage.prime, self.policy, origin)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, state = super().state()
        own = self.process.state() if self.process else {}
        return tensors | {f"{PROCESS}{name}": tensor for name, tensor in own.items()}, state

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(PROCESS)}
        super().restore({name: tensor for name, tensor in tensors.items() if name not in own}, state)
        if self.process is not None:
            self.process.restore({name.removeprefix(PROCESS): tensor for name, tensor in own.items()})

    def draw(self, step: int) -> tuple[list[Scored], list[Scored], Ledger]:
        """Where several draws are allowed: until there are `batch_size` groups whose rewards differ (DAPO)."""
        drawn, ledger = self.sample(step)
        if self.stage.max_draws == 1:
            return drawn, drawn, ledger
        size, again = self.stage.batch_size, 0
        while len(kept := differing(drawn)) < size and again + 1 < self.stage.max_draws:
            again += 1
            more, cost = self.sample(step, again)
            # Their groups follow those that are there.
            drawn += [(dataclasses.replace(r, group=again * size + r.group), s) for r, s in more]
            ledger += cost
        self.told["draws"] = again + 1
        return drawn, [scored for group in kept[:size] for scored in group], ledger

    def credit(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[list[float] | None]:
        stage = self.stage
        if self.reference is not None and stage.kl_in == "reward":
            penalties = self.penalties(stage.kl_weight)
            if stage.advantage == "whitened":
                return returns(rollouts, scores, penalties)
            scores = [
                score if score.value is None else dataclasses.replace(score, value=score.value - sum(penalty))
                for score, penalty in zip(scores, penalties, strict=True)
            ]
        match stage.advantage:
            case "group":
                compare = partial(group_advantages, std=stage.baseline_std, eps=stage.std_eps)
                return by_token(rollouts, by_rollout(rollouts, scores, compare))
            case "leave_one_out":
                outcome = by_token(rollouts, by_rollout(rollouts, scores, leave_one_out))
                if self.process is not None:
                    return self._with_process(self.process, rollouts, scores, outcome)
                return outcome
            case "whitened":
                return returns(rollouts, scores)

    def _with_process(
        self,
        process: ImplicitRewards,
        rollouts: Sequence[Rollout],
        scores: Sequence[Score],
        outcome: Sequence[list[float] | None],
    ) -> list[list[float] | None]:
        """What tokens are worth by the outcome and by process rewards, added up."""
        scored = [i for i, score in enumerate(scores) if score.value is not None]
        right = [scores[i].outcome == "correct" for i in scored]
        found, told, cost = process([rollouts[i] for i in scored], right, self.world)
        self.told |= told
        self.spent += cost
        rewards: list[list[float] | None] = [None] * len(rollouts)
        for i, own in zip(scored, found, strict=True):
            rewards[i] = at_sampled(rollouts[i], own)
        worth = process_returns(rollouts, rewards, gamma=process.prime.gamma)
        return [
            None if a is None or b is None else [x + y for x, y in zip(a, at_all(rollout, b), strict=True)]
            for rollout, a, b in zip(rollouts, outcome, worth, strict=True)
        ]

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor) -> tuple[Tensor, Metrics]:
        stage, target_T, sequence_T = self.stage, forest.target_T, forest.sequence_T
        outputs_KT = outputs.view(-1, len(forest))
        logps_T = outputs_KT[0]
        loss_T, old_T, stats = self.policy_loss(batch, rows, forest, outputs_KT)
        if self.reference is not None and stage.kl_in == "loss":
            reference_T = self.spread(self.references, rows, forest).to(logps_T.dtype)
            kl_T = kl(logps_T, reference_T, target_T, stage.kl_estimator)
            stats["kl"] = reduce_tokens(kl_T.detach(), target_T, batch.counts).item()
            if stage.kl_corrected:
                kl_T = kl_T * ratio(logps_T, old_T, target_T, sequence_T)
            loss_T = loss_T + stage.kl_weight * kl_T
        how, constant = reduction(stage)
        loss = reduce_tokens(loss_T, target_T, batch.counts, how=how, sequence_T=sequence_T, constant=constant)
        return loss, stats


def surrogate(stage: Grpo) -> tuple[Callable[..., Tensor], Level]:
    """The loss that the stage's objective names, with its parameters, and the level of its ratio."""
    match stage.objective:
        case "clip":
            return partial(policy_gradient, **clip(stage)), stage.ratio
        case "cispo":
            return partial(cispo, cap=stage.cispo_cap, level=stage.ratio), stage.ratio
        case "sapo":
            positive, other = stage.sapo_tau
            return partial(sapo, tau_positive=positive, tau_negative=other, level=stage.ratio), stage.ratio
        case "gmpo":
            return partial(gmpo, clip=stage.gmpo_clip), "sequence"
        case "vespo":
            return partial(vespo, positive=stage.vespo_positive, negative=stage.vespo_negative), "product"


def clip(stage: Grpo) -> dict[str, Any]:
    bounds = {"clip_low": stage.clip_low, "clip_high": stage.clip_high, "ratio_cap": stage.ratio_cap}
    return {**bounds, "level": stage.ratio}


def reduction(stage: Grpo) -> tuple[Reduction, float]:
    """`how` and `constant` of `reduce_tokens`."""
    if stage.aggregate == "sum":
        return "constant", 1.0
    return stage.aggregate, stage.whole.max_new_tokens


def differing(drawn: Sequence[Scored]) -> list[list[Scored]]:
    """The groups whose rewards are not all equal."""
    members = [[drawn[i] for i in group] for group in groups([r for r, _ in drawn])]
    return [group for group in members if len({s.value for _, s in group} - {None}) > 1]
