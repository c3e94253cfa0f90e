"""Group-relative policy optimisation: sample a group, score it, move towards what scored above its group."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from posttrain.credit.batch import as_row, groups
from posttrain.credit.grpo import advantages
from posttrain.data.prepare import Prepared
from posttrain.forest import Forest
from posttrain.losses import (
    Counts,
    clipped_share,
    importance,
    kl,
    policy_gradient,
    ratio,
    reduce_tokens,
)
from posttrain.models.policy import Policy
from posttrain.recipe.schema import Grpo
from posttrain.records import Example, Failure, Ledger, Rollout, Score, derive
from posttrain.sampling.protocol import Ahead, Answer, Sampler
from posttrain.training.batch import Batch, LogProbs, draws, frozen_logprobs, interval
from posttrain.training.world import ALONE, World


def check_weights(rollouts: Sequence[Rollout], allowed: Collection[str]) -> None:
    """Refuse rollouts of weights other than those whose digests are allowed: training on them would go wrong quietly.

    Raises:
        Failure: the sampler did not get the policy's weights, or fell further behind than it may.
    """
    for rollout in rollouts:
        if rollout.weights not in allowed:
            raise Failure(
                f"{rollout.example.id}: sampled with weights {rollout.weights[:12]}, and allowed are "
                f"{', '.join(sorted(digest[:12] for digest in allowed))}; the sampler did not get the policy's weights"
            )


def sampled_at(stage: Grpo, step: int) -> int:
    """The step before which the weights stand that sample the rollouts of `step`, where a batch begins.

    They are `staleness` batches old, but never from before the last checkpoint: so a run that continues there finds
    nothing on its way, asks for what the undisturbed run asked for, and counts nothing twice.
    """
    every = interval(stage.checkpoint_every, stage.iterations)
    return max(step - stage.staleness * stage.iterations, step // every * every)


class GrpoMethod(LogProbs):
    """Rollouts are drawn every `iterations` steps. Groups without signal are not computed.

    Departures from Shao et al.: the defaults of `aggregate` and the KL weight are DAPO's; sampler and trainer are
    kept apart by an importance weight; k1, whose gradient as a loss is 0 in expectation, is a penalty in the reward.
    """

    now: Batch
    """The batch in use, for `iterations` steps."""

    def __init__(
        self,
        stage: Grpo,
        data: Prepared,
        policy: Policy,
        sampler: Sampler,
        score: Callable[[Example, str], Score],
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.stage, self.data, self.policy, self.sampler, self.score, self.seed, self.world = (
            stage, data, policy, sampler, score, seed, world,
        )  # fmt: skip
        self.asked: dict[int, tuple[str, Answer]] = {}
        self.temperature = stage.sampling.temperature
        self.period = stage.iterations
        self.order = draws(stage, data.rows, data.weights, seed, self.period)
        self.reference = policy.snapshot() if stage.kl_weight else None

    def batch(self, step: int) -> Batch:
        if step % self.period:
            return Batch(self.now.rows, self.now.units, self.now.counts)
        stage = self.stage
        rollouts, ledger = self._rollouts(step)
        scores = [self.score(r.example, r.text) for r in rollouts]
        credit = advantages(rollouts, scores, std=stage.baseline_std, eps=stage.std_eps)
        scored = [i for i, advantage in enumerate(credit) if advantage is not None]
        # Under a KL penalty a group without signal still has something to say: it may have moved.
        live = [i for i in scored if credit[i] or self.reference is not None]

        rows = tuple(as_row(rollouts[i]) for i in live)
        self.advantages = [credit[i] or 0.0 for i in live]
        self.behaviour = [rollouts[i].logps for i in live]
        self.old: list[list[float] | None] = [None] * len(rows)
        self.references = None
        if self.reference is not None and rows:
            with self.policy.swapped(self.reference):
                self.references = frozen_logprobs(
                    self.policy, rows, stage.tokens_per_forward, self.temperature, self.world
                )

        # The denominators count the groups without signal too, for a zero is an answer, but not what is unscored.
        counts = Counts(tokens=sum(len(rollouts[i].ids) for i in scored), sequences=len(scored))
        generated = sum(len(r.ids) for r in rollouts)
        values = [s.value for s in scores if s.value is not None]
        metrics = {
            "reward": sum(values) / len(values) if values else math.nan,
            "signal": sum(any(credit[i] for i in group) for group in groups(rollouts)) / stage.batch_size,
            "length": generated / len(rollouts),
            "unparsed": sum(s.outcome == "unparsed" for s in scores) / len(scores),
            "unscored": 1 - len(scored) / len(scores),
            "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
            "entropy": -sum(sum(r.logps) for r in rollouts) / generated,
        }
        samples = tuple(
            {
                "prompt": str(r.example.prompt[-1]["content"]),
                "text": r.text,
                "score": s.value,
                "outcome": s.outcome,
            }
            for r, s in zip(rollouts[:2], scores[:2], strict=True)
        )
        self.now = Batch(rows, tuple((i,) for i in range(len(rows))), counts, metrics, samples, ledger)
        return self.now

    def _rollouts(self, step: int) -> tuple[list[Rollout], Ledger]:
        """The step's rollouts, once all those are asked for that the weights of now have to sample."""
        digest = self.policy.digest()
        for later in range(step, self.stage.steps, self.period):
            if sampled_at(self.stage, later) == step:
                self.asked[later] = digest, self._ask(later)
        asked, answer = self.asked.pop(step)
        rollouts, ledger = answer()
        check_weights(rollouts, {asked})
        return rollouts, ledger

    def _ask(self, step: int) -> Answer:
        stage, first = self.stage, step // self.period * self.stage.batch_size
        prompts = [self.data.rows[s][i].example for s, i in self.order[first : first + stage.batch_size]]
        question = prompts, stage.n, stage.sampling, derive(self.seed, stage.id, "step", step)
        if isinstance(self.sampler, Ahead):
            return self.sampler.request(*question)
        found = self.sampler(*question)
        return lambda: found

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        stage, target_T, sequence_T = self.stage, forest.target_T, forest.sequence_T
        for i, (start, stop) in zip(rows, forest.spans, strict=True):
            if self.old[i] is None:  # first use: these are the weights that sampled
                self.old[i] = logps_T[start:stop].tolist()
        fresh = self.now is batch
        old_T = logps_T.detach() if fresh else forest.spread([self.old[i] or [] for i in rows]).to(logps_T.dtype)
        behaviour_T = forest.spread([self.behaviour[i] for i in rows]).to(logps_T.dtype)
        advantages_T = forest.spread([self.advantages[i] for i in rows]).to(logps_T.dtype)
        clip = {"clip_low": stage.clip_low, "clip_high": stage.clip_high, "ratio_cap": stage.ratio_cap}

        stats: dict[str, float] = {}
        penalty_T = None
        if self.references is not None:
            reference_T = forest.spread([self.references[i] for i in rows]).to(logps_T.dtype)
            penalty_T = kl(logps_T, reference_T, target_T, stage.kl_estimator)
            stats["kl"] = reduce_tokens(penalty_T.detach(), target_T, batch.counts).item()
            if stage.kl_estimator == "k1":
                old_kl_T = kl(old_T, reference_T, target_T, "k1")
                advantages_T, penalty_T = advantages_T - stage.kl_weight * old_kl_T, None
        correction_T = importance(old_T, behaviour_T, target_T, how=stage.importance, cap=stage.importance_cap)
        loss_T = correction_T * policy_gradient(
            logps_T, old_T, advantages_T, target_T, sequence_T, level=stage.ratio, **clip
        )
        apart_T = (old_T - behaviour_T)[target_T].exp()
        moved_T = ratio(logps_T.detach(), old_T, target_T, sequence_T, stage.ratio)[target_T]
        stats |= {
            "mismatch_min": apart_T.min().item(),
            "mismatch_max": apart_T.max().item(),
            "ratio_min": moved_T.min().item(),
            "ratio_max": moved_T.max().item(),
            "clipped": clipped_share(
                logps_T, old_T, advantages_T, target_T, sequence_T, batch.counts, level=stage.ratio, **clip
            ).item(),
        }
        if penalty_T is not None:
            loss_T = loss_T + stage.kl_weight * penalty_T
        loss = reduce_tokens(
            loss_T,
            target_T,
            batch.counts,
            how=stage.aggregate,
            sequence_T=sequence_T,
            constant=stage.sampling.max_new_tokens,
        )
        return loss, stats
