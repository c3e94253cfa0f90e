"""Learning from preferences between answers that are sampled while the policy is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.credit.batch import as_row
from posttrain.credit.pairs import pairs
from posttrain.forest import Forest
from posttrain.losses import Counts
from posttrain.losses.kl import kl
from posttrain.losses.online import nash_md, xpo
from posttrain.losses.preference import ipo, logistic
from posttrain.losses.reduce import reduce_pairs, reduce_tokens, segment_sum
from posttrain.recipe.preference import OnlinePreference
from posttrain.records import Example, Ledger, Rollout, derive
from posttrain.training.batch import Batch, Metrics, draws, scored_sample
from posttrain.training.own import OwnMethod, Scored, with_scores
from posttrain.training.rollouts import measured, ratios


class OnlineMethod(OwnMethod):
    """Online DPO and IPO (Guo et al., 2402.04792), Nash-MD (Munos et al., 2312.00886), XPO (Xie et al., 2405.21046).

    Each step samples anew, with the weights of now. The reference is what the stage starts from, and every sequence's
    score is the sum of its tokens' log-ratios. `dpo` and `ipo` compare a best and a worst of `n` answers of the policy;
    `xpo` an answer of the policy and one of the reference; `nash_md` pushes the policy's answer by the chance that it
    is preferred to one of the mixture of both.

    Departures. Rewards judge, where the papers ask a preference model: the chance is s(R - R'), Bradley-Terry's. Where
    rewards are equal there is no pair, and no exploration of XPO's. Nash-MD's mixture interpolates weights, which to
    first order is the papers' mixture of logits: the sampler draws from one model.
    """

    stage: OnlinePreference
    period = 1

    def __init__(self, stage: OnlinePreference, *args: Any, **kwargs: Any) -> None:
        super().__init__(stage, *args, **kwargs)
        self.order = draws(stage, self.data.rows, self.data.weights, self.seed)
        self.reference = self.policy.snapshot()

    def batch(self, step: int) -> Batch:
        stage = self.stage
        slots = self.order[step * stage.batch_size :][: stage.batch_size]
        drawn, ledger = self._drawn([self.data.rows[s][i].example for s, i in slots], step)
        metrics = dict(measured(drawn, stage.sampling.max_new_tokens))
        rollouts, scores = [r for r, _ in drawn], [s for _, s in drawn]
        if stage.loss == "nash_md":
            members = [k for k in range(0, len(drawn), 2) if None not in (scores[k].value, scores[k + 1].value)]
            self.chances = [win_chance(scores[k].value or 0.0, scores[k + 1].value or 0.0) for k in members]
            units: list[tuple[int, ...]] = [(i,) for i in range(len(members))]
            if members:
                metrics["preferred"] = sum(self.chances) / len(members)
        else:
            found = pairs(rollouts, scores, random.Random(derive(self.seed, stage.id, "ties", step)))
            members = [k for pair in found for k in pair]
            units = [(i, i + 1) for i in range(0, len(members), 2)]
        metrics["learned"] = len(units) / len(slots)
        # Where two sides are sampled, the second is not the policy's own.
        self.others = [stage.loss in ("nash_md", "xpo") and k % 2 == 1 for k in members]
        self.behaviour = [rollouts[k].logps for k in members]
        self.own_tokens = sum(rollouts[k].sampled for k, other in zip(members, self.others, strict=True) if not other)
        rows = tuple(as_row(rollouts[k]) for k in members)
        self.references: list[list[float]] = []
        if rows:
            with self.policy.swapped(self.reference):
                self.references = self.logprobs(rows)
        counts = Counts(tokens=sum(sum(row.target) for row in rows), sequences=len(rows), pairs=len(units))
        samples = tuple(scored_sample(*one) for one in drawn[:2])
        return Batch(rows, tuple(units), counts, metrics, samples, ledger)

    def _drawn(self, prompts: Sequence[Example], step: int) -> tuple[list[Scored], Ledger]:
        """Answers with their scores, those to one prompt together; of two sides the policy's own comes first."""
        stage = self.stage
        if stage.loss in ("dpo", "ipo"):
            rollouts, ledger = self._ask(prompts, stage.n, "own", step)
        else:
            own, ledger = self._ask(prompts, 1, "own", step)
            with self.policy.swapped(self._rival()):
                others, cost = self._ask(prompts, 1, "other", step)
            rollouts, ledger = [r for pair in zip(own, others, strict=True) for r in pair], ledger + cost
        return with_scores(self.score, rollouts, ledger)

    def _ask(self, prompts: Sequence[Example], n: int, who: str, step: int) -> tuple[list[Rollout], Ledger]:
        return self.sampler(prompts, n, self.stage.sampling, derive(self.seed, self.stage.id, who, step))

    def _rival(self) -> dict[str, Tensor]:
        """The weights that the policy's answers are compared with."""
        if self.stage.loss == "xpo":
            return self.reference
        share = self.stage.mixture
        live = self.policy.parameters()
        return {name: (1 - share) * live[name].detach() + share * kept for name, kept in self.reference.items()}

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor) -> tuple[Tensor, Metrics]:
        stage, counts, target_T = self.stage, batch.counts, forest.target_T
        reference_T = forest.spread([self.references[r] for r in rows]).to(logps_T.dtype)
        stats = self._own(rows, forest, logps_T.detach(), reference_T)
        if stage.loss == "nash_md":
            chance_T = forest.spread([[self.chances[r]] * len(self.references[r]) for r in rows]).to(logps_T.dtype)
            loss_T = nash_md(logps_T, reference_T, chance_T, target_T, beta=stage.beta)
            return reduce_tokens(loss_T, target_T, counts, how="constant", constant=1.0), stats
        sums_R = segment_sum(logps_T[target_T], forest.sequence_T[target_T], len(rows))
        reference_R = torch.tensor([math.fsum(self.references[r]) for r in rows], dtype=sums_R.dtype)
        chosen_P, rejected_P = (sums_R - reference_R).view(-1, 2).unbind(1)
        if stage.loss == "xpo":
            other_R = torch.tensor([self.others[r] for r in rows])
            loss_P = xpo(chosen_P, rejected_P, sums_R[other_R], beta=stage.beta, alpha=stage.alpha)
        else:
            loss_P = (logistic if stage.loss == "dpo" else ipo)(chosen_P, rejected_P, beta=stage.beta)
        logps_PK, margin_P = sums_R.detach().view(-1, 2), stage.beta * (chosen_P - rejected_P).detach()
        told: Mapping[str, Tensor] = {
            "margin": margin_P,
            "accuracy": (margin_P > 0).to(margin_P.dtype),
            "chosen_logp": logps_PK[:, 0],
            "rejected_logp": logps_PK[:, 1],
            "chosen_ratio": chosen_P.detach(),
        }
        stats |= {name: reduce_pairs(value, counts).item() for name, value in told.items()}
        return reduce_pairs(loss_P, counts), stats

    def _own(
        self, rows: Sequence[int], forest: Forest, logps_T: Tensor, reference_T: Tensor
    ) -> dict[str, float | Mapping[str, float]]:
        """How far the policy is from the reference, and trainer from sampler, on what is learned of its own answers."""
        own_R = torch.tensor([not self.others[r] for r in rows])
        own_T = forest.target_T & own_R[forest.sequence_T.clamp(min=0)]
        if not own_T.any():
            return {}
        behaviour_T = forest.spread([self.behaviour[r] for r in rows]).to(logps_T.dtype)
        mean = kl(logps_T, reference_T, own_T, "k1").sum().item() / self.own_tokens
        return {"kl": mean, **ratios("mismatch", (logps_T - behaviour_T)[own_T].exp())}


def win_chance(reward: float, other: float) -> float:
    """The chance that an answer of this reward is preferred to one of the other: s(R - R'), Bradley and Terry."""
    return torch.sigmoid(torch.tensor(reward - other, dtype=torch.float64)).item()
